"""Result of a proof, in one word and in a sentence with cause and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Status(StrEnum):
    """Result of a proof."""

    CERTIFIED = "CERTIFIED"
    RESTRICTED = "RESTRICTED"
    GAP_OPEN = "GAP_OPEN"
    INTERRUPTED = "INTERRUPTED"
    NUMERICAL = "NUMERICAL"
    TRIVIAL = "TRIVIAL"


#: Why a solver stopped, and what a user can do about it.
STOPPED_BY = {
    "tolerance": "",
    "formula": "",
    "max_iter": "the network is unfinished, as the iteration limit was reached; raise max_iter",
    "time_limit": "the network is unfinished, as the time limit was reached; raise time_limit",
    "callback": "the network is unfinished, as the callback asked to stop",
    "stalled": "no further progress was possible in this precision; raise tol or weight_decay",
    "outside": "the weights use directions that the rank cut left out, or rounding in nearly collinear columns "
    "moved them there; certify with rank=None, or lower rank",
    "statistics": "the stored mean and scale do not give the network that was proved, or rounding of a large offset in "
    "the features keeps them from it; subtract the offsets from the data",
    "numerical": "a value that is not finite appeared; rescale y or raise weight_decay",
}


#: Estimated share of a gap below which the bound is said to be loose, not the network to be far from its optimum.
_LOOSE = 0.5


@dataclass(frozen=True)
class Scope:
    """Networks to compare with.

    ``restriction`` tells how the program differs from that of dense data without truncation or filter; ``block_norm``
    is the penalty of a gate; ``exception`` names what rounding cut from the data, in words that follow.
    """

    name: str
    restriction: str = ""
    block_norm: str = "Frobenius"
    exception: str = ""

    @property
    def label(self) -> str:
        """Name and exception."""
        return self.name + self.exception

    def __str__(self) -> str:
        if self.name == "these gates":
            networks = f"networks with these gates (penalty: one {self.block_norm} norm per gate)"
        else:
            networks = "batch-normalised ReLU networks of any width"
        return f"all {networks}{self.restriction}{self.exception}"


def status_of(relative: float, tol: float, *, trivial: bool, stopped_by: str, estimated: float | None) -> Status:
    """Status that the numbers earn; the solver's reason to stop can only lower it.

    Parameters
    ----------
    relative, estimated : float, float or None
        Relative gap to the valid bound, and to an estimate of it.
    tol : float
        Relative gap that counts as optimal.
    trivial : bool
        Whether the zero network is proved to be optimal.
    stopped_by : str
        A key of ``STOPPED_BY``.
    """
    if stopped_by == "outside" or not (np.isfinite(relative) and relative >= 0):
        return Status.NUMERICAL
    if relative <= tol:
        return Status.TRIVIAL if trivial else Status.CERTIFIED
    if stopped_by == "numerical":
        return Status.NUMERICAL
    if stopped_by == "callback":
        return Status.INTERRUPTED
    return Status.GAP_OPEN if estimated is None or estimated > tol else Status.RESTRICTED


def bound_note(status: Status, estimated: float | None, bound: str, remark: str) -> str:
    """Sentences on the source of the valid bound, the estimated gap, and more time; empty for gates.

    Parameters
    ----------
    status : Status
    estimated, bound : float or None, str
        See ``Certificate``.
    remark : str
        What more time for the proof would buy.
    """
    if bound in ("gates", "none"):
        return ""
    note = f" The bound is valid ({bound})."
    if estimated is not None and status in (Status.RESTRICTED, Status.GAP_OPEN):
        note += f" A local search over patterns estimates a gap of {estimated:.1g}: an estimate, not a bound."
    return note + remark if status in (Status.RESTRICTED, Status.GAP_OPEN, Status.INTERRUPTED) else note


def message(
    status: Status, objective: float, relative: float, tol: float, floor: float, scope: Scope, stopped_by: str,
    estimated: float | None = None,
) -> str:  # fmt: skip
    """Status, cause and remedy in words.

    Parameters
    ----------
    status, scope : Status, Scope
    objective, relative : float
        Objective and relative gap.
    tol, floor : float
        Relative gap that counts as optimal, and the smallest that float64 can prove.
    stopped_by : str
        A key of ``STOPPED_BY``.
    estimated : float or None
        See ``Certificate``.
    """
    reason = STOPPED_BY[stopped_by]
    if status is Status.TRIVIAL:
        return (
            f"The zero network is optimal among {scope}: weight_decay is at or above its largest useful "
            "value; lower it to obtain a network."
        )
    if status is Status.CERTIFIED:
        return f"Objective {objective:.9g} is proved to be within {relative:.2g} (relative) of the best among {scope}."
    if status is Status.NUMERICAL:
        return (
            f"No valid bound: objective {objective:.9g}; "
            f"{reason or 'rounding spoiled the dual point; rescale y or raise weight_decay'}."
        )
    if status is Status.RESTRICTED:
        return (
            "Optimal for its own patterns, and a local search found no better neuron; proved is only that the "
            f"objective {objective:.9g} is at most {relative:.2g} (relative) above the best among {scope}."
        )
    if not reason and scope.name == "all patterns" and estimated is None:
        reason = "no time was left to estimate whether that is the network or the bound"
    if estimated is not None and estimated < _LOOSE * relative:
        cause, _, remedy = reason.partition("; ")
        reason = "most of that is the bound, which is loose"
        if cause:  # more iterations tighten no bound, more time may
            reason += f", but {cause}" + (f"; {remedy}" if stopped_by == "time_limit" else "")
    if tol < floor:
        reason = f"{reason}; tol={tol:.1g} is below what float64 can prove here ({floor:.1g})".lstrip("; ")
    return (
        f"Not yet optimal within tol={tol:.1g}: objective {objective:.9g} is at most {relative:.2g} "
        f"(relative) above the best among {scope}; {reason or 'the network is not the optimum of its program'}."
    )
