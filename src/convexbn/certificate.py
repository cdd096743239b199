"""The judge: objective, valid lower bound, gap and status of a given network, whoever trained it.

It takes arrays and recomputes everything: the network's own batch norm on the raw data, the loss, the
penalty, a dual point and its bound. It knows no solver; what a solver says of itself only names why it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from convexbn import bounds
from convexbn._typing import Float, FloatMatrix, Index
from convexbn.losses import Loss
from convexbn.patterns import gate_patterns
from convexbn.program import GatedProgram, block_norms
from convexbn.whitening import batch_normalize

_EPS = float(np.finfo(np.float64).eps)
_GOLDEN = (np.sqrt(5) - 1) / 2


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
    "numerical": "a value that is not finite appeared; rescale y or raise weight_decay",
}


@dataclass(frozen=True)
class Certificate:
    """Objective and lower bound of a network, in the units of the objective, on unscaled data.

    Attributes
    ----------
    objective : float
        Loss plus penalty, recomputed from the raw data with the network's own batch norm.
    lower_bound : float
        No network of the scope has a smaller objective.
    tolerance : float
        Relative gap that counts as optimal.
    scope : str
        ``"these gates"`` (the gates are part of the model) or ``"all patterns"``.
    status : Status
    sentence : str
        Status, cause and remedy in words.
    stopped_by : str
        A key of ``STOPPED_BY``.
    weight_decay_objective : float
        Loss plus ``weight_decay / 2`` times the squared norm of the weights of the plain network of neurons.
    """

    objective: float
    lower_bound: float
    tolerance: float
    scope: str
    status: Status
    sentence: str
    stopped_by: str
    weight_decay_objective: float

    @property
    def gap(self) -> float:
        """``objective - lower_bound``."""
        return self.objective - self.lower_bound

    @property
    def relative_gap(self) -> float:
        """``gap / objective``, 0 when the objective is 0."""
        return self.gap / self.objective if self.objective != 0 else 0.0


def certify_gated(
    program: GatedProgram,
    X: FloatMatrix,
    mean: Float,
    *,
    weight: Float,
    gamma: Float,
    shift: Float,
    output: Float,
    gates: Float,
    gate_offsets: Float,
    gate_index: Index,
    tolerance: float,
    stopped_by: str,
) -> Certificate:
    """Certify a gated network for its gates: ``L + weight_decay * sum_i ||S_i||_F`` against the dual.

    Parameters
    ----------
    program : GatedProgram
        The question: whitened rows, patterns of all gates, loss and weight decay.
    X : ndarray (n, d)
        The raw rows that the statistics are taken from.
    mean : ndarray (d,)
        Their means, as the patterns of the program used them.
    weight, gamma, shift, output, gates, gate_offsets, gate_index : ndarray
        The answer: one column (row of ``output``) a neuron, and the gate of the program it sits on.
    tolerance : float
        Relative gap that counts as optimal.
    stopped_by : str
        Why the solver stopped.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        When a neuron does not follow the gate that it names.
    """
    weights = program.loss.weights
    normalized = batch_normalize(X, weight, weights)
    opened = gate_patterns(X, mean, gates, gate_offsets)
    _check_gates(opened, program.patterns[:, gate_index])
    coordinates = program.rows[:, :-1].T @ (weights[:, None] * normalized)  # q_j / ||q_j||
    first_layer = np.vstack([gamma * coordinates, shift])  # columns s_j
    outputs = (opened * (gamma * normalized + shift / np.sqrt(weights.sum()))) @ output
    used, place = np.unique(gate_index, return_inverse=True)
    blocks = np.zeros((len(used), *program.block_shape))
    np.add.at(blocks, place, first_layer.T[:, :, None] * output[:, None, :])
    return judge(
        program.loss,
        outputs,
        program.weight_decay,
        penalty=float(block_norms(blocks).sum()),
        plain_penalty=_plain_penalty(gamma, shift, output),
        dual_norm_bound=program.dual_norm_bound,
        scope="these gates",
        tolerance=tolerance,
        stopped_by="outside" if _leaves_span(coordinates, normalized) else stopped_by,
    )


def certify_blocks(
    program: GatedProgram, gate_index: Index, blocks: Float, *, tolerance: float, stopped_by: str
) -> Certificate:
    """Certify blocks ``S_i`` (m, q, K) on the whitened data, before they become a network's weights."""
    finite = bool(np.isfinite(blocks).all())
    return judge(
        program.loss,
        program.outputs(gate_index, blocks),
        program.weight_decay,
        penalty=float(block_norms(blocks).sum()),
        plain_penalty=float(np.linalg.svd(blocks, compute_uv=False).sum()) if finite else np.nan,
        dual_norm_bound=program.dual_norm_bound,
        scope="these gates",
        tolerance=tolerance,
        stopped_by=stopped_by,
    )


def certify_relu(
    loss: Loss,
    X: FloatMatrix,
    weight_decay: float,
    *,
    weight: Float,
    gamma: Float,
    shift: Float,
    output: Float,
    tolerance: float,
    stopped_by: str,
) -> Certificate:
    """Certify a ReLU network over all widths and patterns by the orthant bound (tight at rank n - 1).

    Parameters
    ----------
    loss : Loss
        Loss bound to targets and weights; rows of ``X`` should be distinct, or the bound is loose.
    X : ndarray (n, d)
        The raw rows that the statistics are taken from.
    weight_decay : float
    weight, gamma, shift, output : ndarray
        One column (row of ``output``) a neuron.
    tolerance : float
        Relative gap that counts as optimal.
    stopped_by : str
        Why the solver stopped.
    """
    normalized = batch_normalize(X, weight, loss.weights)
    hidden = np.maximum(gamma * normalized + shift / np.sqrt(loss.weights.sum()), 0)
    root = np.sqrt(loss.weights)[:, None]
    return judge(
        loss,
        hidden @ output,
        weight_decay,
        penalty=float(np.hypot(gamma, shift) @ np.linalg.norm(output, axis=1)),
        plain_penalty=_plain_penalty(gamma, shift, output),
        dual_norm_bound=lambda dual: bounds.orthant(dual / root),
        scope="all patterns",
        tolerance=tolerance,
        stopped_by=stopped_by,
    )


def judge(
    loss: Loss,
    outputs: Float,
    weight_decay: float,
    *,
    penalty: float,
    plain_penalty: float,
    dual_norm_bound: Callable[[Float], tuple[float, float]],
    scope: str,
    tolerance: float,
    stopped_by: str,
) -> Certificate:
    """Certificate of outputs ``F`` with a given penalty: dual point, lower bound, gap, status and sentence."""
    value = loss.value(outputs)
    objective = value + weight_decay * penalty
    dual = loss.negative_gradient(outputs)
    if not (np.isfinite(objective) and np.isfinite(dual).all()):
        lower, floor, optimal_at_zero = -np.inf, 0.0, False
    else:
        bound, rounding = dual_norm_bound(dual)
        lower = lower_bound(loss, dual, bound, weight_decay)
        floor = rounding / max(bound, weight_decay) + 64 * _EPS
        optimal_at_zero = penalty == 0 and bound - rounding <= weight_decay * (1 + 64 * _EPS)
    gap = objective - lower
    if 0 > gap > -1e-9 * abs(objective):  # the objective's own rounding
        lower, gap = objective, 0.0
    relative = gap / objective if objective != 0 else 0.0
    status = _status(relative, tolerance, trivial=optimal_at_zero, stopped_by=stopped_by)
    sentence = _sentence(status, objective, relative, tolerance, floor, scope, stopped_by)
    return Certificate(
        objective=objective,
        lower_bound=lower,
        tolerance=tolerance,
        scope=scope,
        status=status,
        sentence=sentence,
        stopped_by=stopped_by,
        weight_decay_objective=value + weight_decay * plain_penalty,
    )


def lower_bound(loss: Loss, dual: Float, dual_norm: float, weight_decay: float) -> float:
    """Best ``D(t V)`` over the feasible multiples ``t <= weight_decay / dual_norm`` of a dual point.

    ``D`` is concave in ``t``, so a golden section finds the best; every value on the way is valid.
    """
    largest = weight_decay / dual_norm if dual_norm > 0 else 1.0
    high = min(largest, 2.0)  # beyond twice the residual nothing is won near an optimum
    low = 0.0
    best = max(loss.dual_value(t * dual) for t in (0.0, min(1.0, high), high))
    for _ in range(48):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = loss.dual_value(left * dual), loss.dual_value(right * dual)
        best = max(best, at_left, at_right)
        low, high = (low, right) if at_left >= at_right else (left, high)
    return best


def _check_gates(opened: np.ndarray, named: np.ndarray) -> None:
    wrong = np.flatnonzero((opened != named).any(axis=0))
    if len(wrong):
        raise ValueError(
            f"neuron {wrong[0]} does not follow the gate that it names: the network and the gates do not "
            "belong together, so there is nothing to certify."
        )


def _leaves_span(coordinates: Float, normalized: Float) -> bool:
    """Whether a normalised response has a part outside the whitened directions."""
    norms = np.linalg.norm(coordinates, axis=0)
    return bool(np.any(normalized.any(axis=0) & (norms < 1 - 1e-6)))


def _plain_penalty(gamma: Float, shift: Float, output: Float) -> float:
    return float(0.5 * (gamma @ gamma + shift @ shift + np.sum(output**2)))


def _status(relative: float, tolerance: float, *, trivial: bool, stopped_by: str) -> Status:
    if not (np.isfinite(relative) and relative >= 0):
        return Status.NUMERICAL
    if stopped_by == "outside":
        return Status.NUMERICAL
    if relative <= tolerance:
        return Status.TRIVIAL if trivial else Status.CERTIFIED
    if stopped_by == "numerical":
        return Status.NUMERICAL
    return Status.INTERRUPTED if stopped_by == "callback" else Status.GAP_OPEN


def _sentence(
    status: Status,
    objective: float,
    relative: float,
    tolerance: float,
    floor: float,
    scope: str,
    stopped_by: str,
) -> str:
    among = {
        "these gates": "all networks with these gates (penalty: one Frobenius norm per gate)",
        "all patterns": "all batch-normalised ReLU networks of any width",
    }[scope]
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
    if tolerance < floor:
        reason = f"{reason}; tol={tolerance:.1g} is below what float64 can prove here ({floor:.1g})".lstrip("; ")
    return (
        f"Not yet optimal within tol={tolerance:.1g}: objective {objective:.9g} is at most {relative:.2g} "
        f"(relative) above the best among {among}; {reason or 'the network is not the optimum of its program'}."
    )
