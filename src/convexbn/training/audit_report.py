"""Audit of a trained network: the numbers proved, and the meaning of the gap in words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import Status


class Cause(StrEnum):
    """The largest part of a gap."""

    NONE = "none"
    OPTIMISATION = "optimisation"
    WIDTH = "width"
    BOUND = "bound"


@dataclass(frozen=True, eq=False)
class Audit:
    """Objective of a trained network, a lower bound for all networks, and the meaning of the gap.

    All numbers are in the units of the given loss (such as torch's mean), except for those of ``certificate``.

    Attributes
    ----------
    objective : float
        Loss with the full-batch statistics plus weight decay, of the numbers as they stand.
    balanced_objective : float
        Objective after rescaling every neuron to its least penalty, with the best output bias if the layers have one.
    lower_bound, tol : float
        No network of the scope has a smaller objective; relative gap that counts as optimal.
    status, cause : Status, Cause
        The verdict, and the largest part of the gap.
    explanation, scope : str
        What the gap means and what to do; the networks that this one is compared with.
    factor, weight_decay : float
        Factor of the sum of the losses over rows, and beta of the program, against that sum.
    n_neurons : int
        Number of neurons of nonzero norm.
    loss, stored_loss : float
        Loss with the full-batch statistics of the rows, and in eval mode with the stored ones.
    trained_on_objective : float or None
        Objective of its neurons after further training; None if that was not tried.
    best_known, best_n_neurons : float, int
        Smallest objective of all networks seen, this one and ours, and the number of its neurons.
    universal : bool
        Whether the bound also holds for all other features of these rows: whatever the layers before compute.
    certificate : Certificate
        Of the network alone, in the units of the summed loss.
    """

    objective: float
    balanced_objective: float
    lower_bound: float
    tol: float
    status: Status
    cause: Cause
    explanation: str
    scope: str
    factor: float
    weight_decay: float
    n_neurons: int
    loss: float
    stored_loss: float
    trained_on_objective: float | None
    best_known: float
    best_n_neurons: int
    universal: bool
    certificate: Certificate

    @property
    def gap(self) -> float:
        """``balanced_objective - lower_bound``."""
        return self.balanced_objective - self.lower_bound

    @property
    def relative_gap(self) -> float:
        """``gap / balanced_objective``, 0 when the objective is 0."""
        return self.gap / self.balanced_objective if self.balanced_objective else 0.0


def explanation_of(report: Audit, bound: str, in_time: bool) -> str:
    """Explain what was measured, what it means, and what to do.

    Parameters
    ----------
    report, bound : Audit, str
        All of it but the explanation, and the name of the lower bound.
    in_time : bool
        Whether the further training of the network's neurons ended before its time limit.
    """
    if report.status is Status.NUMERICAL:
        return report.certificate.sentence
    left = f"{gap:.1%}" if (gap := report.relative_gap) >= 1e-3 else f"{gap:.1g}"
    parts = [
        f"{report.scope[0].upper()}{report.scope[1:]}: the objective is {report.balanced_objective:.9g} (norms "
        f"balanced; {report.objective:.9g} as it stands), and the least possible is at least "
        f"{report.lower_bound:.9g} ({bound}): no more than {left} of the objective can be won."
    ]
    if report.cause is Cause.NONE:
        parts.append("Nothing is left to win by longer training or more neurons.")
    elif report.trained_on_objective is None:
        parts.append(_UNSEARCHED[report.cause])
    else:
        far = "" if in_time else ", as far as time allowed"
        parts.append(
            f"Trained on from where they stand{far}, its {report.n_neurons} neurons reach "
            f"{report.trained_on_objective:.9g}; the best network that we found has {report.best_n_neurons} and "
            f"reaches {report.best_known:.9g}."
        )
        parts.append(_MEANING[report.cause].format(few=report.n_neurons, more=report.best_n_neurons))
    if report.universal:
        parts.append("The bound holds for all features of these rows: whatever the layers before compute.")
    return " ".join(parts)


#: The meaning of the cause of a gap after a search.
_MEANING = {
    Cause.OPTIMISATION: "Most of the gap is optimisation error: train longer, with a smaller learning rate at the end "
    "or another start.",
    Cause.WIDTH: "Most of the gap is for want of neurons: {few} against {more}; widen the hidden layer (a local "
    "minimum of the narrow one cannot be told from this).",
    Cause.BOUND: "Most of the gap lies between that and the bound, which is valid and may be loose, unless our search "
    "stopped short: allow more time, or raise the weight decay.",
}

#: Its meaning without one.
_UNSEARCHED = {
    Cause.OPTIMISATION: "A local search finds a neuron that would lower the objective: train longer or widen the "
    "hidden layer, and allow more time to learn which.",
    Cause.BOUND: "A local search finds no neuron that would lower the objective: most of the gap may be a loose bound.",
}
