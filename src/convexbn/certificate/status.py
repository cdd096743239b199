"""What is proved, in one word and in a sentence with cause and remedy."""

from __future__ import annotations

from enum import StrEnum

import numpy as np


class Status(StrEnum):
    """What is proved."""

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
    "max_iter": "the iteration limit was reached; raise max_iter",
    "time_limit": "the time limit was reached; raise time_limit",
    "callback": "the callback asked to stop",
    "stalled": "no further progress was possible in this precision; raise tol or weight_decay",
    "outside": "the weights use directions that the rank cut left out, or rounding in nearly collinear columns "
    "moved them there; certify with rank=None, or lower rank",
    "statistics": "the stored mean and scale do not give the network that was proved, or rounding of a large offset in "
    "the features keeps them from it; subtract the offsets from the data",
    "numerical": "a value that is not finite appeared; rescale y or raise weight_decay",
}


def status_of(relative: float, tolerance: float, *, trivial: bool, stopped_by: str, estimated: float | None) -> Status:
    """Status that the numbers earn; what the solver said can only lower it."""
    if stopped_by == "outside" or not (np.isfinite(relative) and relative >= 0):
        return Status.NUMERICAL
    if relative <= tolerance:
        return Status.TRIVIAL if trivial else Status.CERTIFIED
    if stopped_by == "numerical":
        return Status.NUMERICAL
    if stopped_by == "callback":
        return Status.INTERRUPTED
    return Status.GAP_OPEN if estimated is None or estimated > tolerance else Status.RESTRICTED


def told_apart(status: Status, relative: float, estimated: float | None, bound: str) -> str:
    """Where the valid bound comes from, and the estimate beside it, for networks over all patterns."""
    if bound in ("gates", "none"):
        return ""
    told = f" The bound is valid ({bound})."
    if estimated is not None and status in (Status.RESTRICTED, Status.GAP_OPEN):
        told += f" A local search over patterns estimates a gap of {estimated:.1g}: an estimate, not a bound."
    return told


def restriction_to(directions: int | None, filtered: bool) -> str:
    """How a program differs from the plain one on all directions of the data, in words."""
    words = f" on the leading {directions} directions of the data (rank)" if directions is not None else ""
    return words + " with this spectral filter (weight decay of the filtered program)" * filtered


def sentence_of(
    status: Status,
    objective: float,
    relative: float,
    tolerance: float,
    floor: float,
    scope: str,
    stopped_by: str,
    restriction: str = "",
    block_norm: str = "Frobenius",
) -> str:
    """Status, cause and remedy in words."""
    among = {
        "these gates": f"all networks with these gates (penalty: one {block_norm} norm per gate)",
        "all patterns": "all batch-normalised ReLU networks of any width",
    }[scope] + restriction
    reason = STOPPED_BY[stopped_by]
    if status is Status.TRIVIAL:
        return (
            f"The zero network is optimal among {among}: weight_decay is at or above its largest useful "
            "value; lower it to obtain a network."
        )
    if status is Status.CERTIFIED:
        return f"Objective {objective:.9g} is proved to be within {relative:.2g} (relative) of the best among {among}."
    if status is Status.NUMERICAL:
        return (
            f"No valid bound: objective {objective:.9g}; "
            f"{reason or 'rounding spoiled the dual point; rescale y or raise weight_decay'}."
        )
    if status is Status.RESTRICTED:
        return (
            "Optimal for its own patterns, and a local search found no better neuron; proved is only that the "
            f"objective {objective:.9g} is at most {relative:.2g} (relative) above the best among {among}; allow more "
            "time for the proof, or raise weight_decay."
        )
    if tolerance < floor:
        reason = f"{reason}; tol={tolerance:.1g} is below what float64 can prove here ({floor:.1g})".lstrip("; ")
    return (
        f"Not yet optimal within tol={tolerance:.1g}: objective {objective:.9g} is at most {relative:.2g} "
        f"(relative) above the best among {among}; {reason or 'the network is not the optimum of its program'}."
    )
