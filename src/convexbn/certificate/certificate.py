"""The judge: objective, valid lower bound, gap and status of a given network, whoever trained it.

It takes a question and a record of arrays and recomputes everything: the network's own batch norm on the raw data, the
loss, the penalty, a dual point and its bound. It knows no solver; what a solver says of itself only names why it
stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from convexbn._types import EPS, Float
from convexbn.certificate.dual_bounds import DualBound
from convexbn.certificate.gated import GatedCase
from convexbn.certificate.question import Question
from convexbn.certificate.relu import ReluCase
from convexbn.certificate.status import Scope, Status, bound_note, message, status_of
from convexbn.data.preactivations import PreActivations
from convexbn.program.gated import GatedProgram
from convexbn.program.losses import Loss
from convexbn.program.network import BatchNormNetwork

_GOLDEN = (np.sqrt(5) - 1) / 2

#: Steps of a golden section: the interval shrinks by 1e-10.
_SECTIONS = 48

#: Relative difference of the loss by which stored statistics may change the network, where the tolerance is smaller.
_SAME_LOSS = 1e-9


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
        A key of ``status.STOPPED_BY``.
    weight_decay_objective : float
        Loss plus ``weight_decay / 2`` times the squared norm of the weights of the plain network of neurons.
    bound : str
        What bounds the dual point: ``"gates"`` (exact), ``"orthant"``, ``"branch and bound"``, ``"relaxation"``,
        ``"chosen dual point"``, ``"lifted dual point"`` or ``"lifted relaxation"``.
    estimated_gap : float or None
        Relative gap if a local search had found the worst pattern: an estimate, not a bound. The relative gap
        itself where that is within the tolerance; None for gates, and where no time was left to search.
    """

    objective: float
    lower_bound: float
    tolerance: float
    scope: str
    status: Status
    sentence: str
    stopped_by: str
    weight_decay_objective: float
    bound: str
    estimated_gap: float | None

    @property
    def gap(self) -> float:
        """``objective - lower_bound``."""
        return self.objective - self.lower_bound

    @property
    def relative_gap(self) -> float:
        """``gap / objective``, 0 when the objective is 0."""
        return self.gap / self.objective if self.objective != 0 else 0.0


def certify(
    question: Question,
    network: BatchNormNetwork,
    *,
    stopped_by: str = "tolerance",
    own_rows: bool = False,
    deadline: float | None = None,
) -> Certificate:
    """Judge a network: for its gates by the exact dual, a ReLU network over all widths and patterns.

    Parameters
    ----------
    question : Question
        Raw rows, program and tolerance.
    network : BatchNormNetwork
        The answer; a gated network names the gates of the program that its neurons sit on.
    stopped_by : str, default="tolerance"
        Why the solver stopped, a key of ``status.STOPPED_BY``.
    own_rows : bool, default=False
        Whether these are the rows that the network was trained on: with the statistics that it stores it must then
        have the loss that is judged, else NUMERICAL.
    deadline : float or None
        ``time.monotonic()`` after which no further bound over all patterns is tried; None: each does its stated work.

    Raises
    ------
    ValueError
        When a neuron does not follow the gate that it names.
    """
    program, weights = question.program, question.row_weights
    mean = network.mean if own_rows else None
    rank = question.rows.shape[1]
    responses = PreActivations.compute(question.X, network.weight, weights, rank=rank, mean=mean)
    coordinates, outside = _whitened(question, responses)
    case: GatedCase | ReluCase
    if isinstance(program, GatedProgram):
        case = GatedCase.examine(question, program, network, responses)
    else:
        case = ReluCase(question, program, network, responses, coordinates, deadline)
    outputs = case.outputs(_first_layer(responses, network.gamma, network.shift))
    proof = judge(
        program.loss, outputs, program.weight_decay, Penalty(case.penalty(coordinates), network.weight_decay_penalty),
        case.bounds, question.scope, question.tol, "outside" if outside else stopped_by,
    )  # fmt: skip
    return _with_stored_statistics(proof, case, outputs) if own_rows else proof


@dataclass(frozen=True)
class Penalty:
    """What weight decay multiplies: in the program, and of the plain network of neurons."""

    value: float
    plain: float


class Prover(Protocol):
    """Bounds of dual points."""

    def bounded(self, dual: Float) -> Iterable[DualBound]:
        """Bounded dual points from the dual ``-grad L(F)``, cheap ones first."""

    def estimate(self, dual: Float) -> float | None:
        """A lower estimate of the dual norm, for the estimated gap."""


def judge(
    loss: Loss,
    outputs: Float,
    weight_decay: float,
    penalty: Penalty,
    prover: Prover,
    scope: Scope,
    tol: float,
    stopped_by: str,
) -> Certificate:
    """Certificate of outputs ``F`` with a given penalty: dual points, lower bound, gap, status and sentence.

    Parameters
    ----------
    loss : Loss
    outputs : ndarray (n, K)
        ``F``.
    weight_decay : float
    penalty : Penalty
    prover : Prover
        Gives bounded dual points; no more are asked for than it takes to close the gap.
    scope : Scope
        Among what the outputs are compared.
    tol : float
        Relative gap that counts as optimal.
    stopped_by : str
        Why the solver stopped.
    """
    value = loss.value(outputs)
    objective = value + weight_decay * penalty.value
    best = _Best()
    dual = loss.negative_gradient(outputs)
    if np.isfinite(objective) and np.isfinite(dual).all():
        best = _best_bound(loss, dual, weight_decay, prover, objective, tol, at_zero=penalty.value == 0)
    lower, gap = best.lower, objective - best.lower
    if 0 > gap > -1e-9 * abs(objective):  # the objective's own rounding
        lower, gap = objective, 0.0
    relative = gap / objective if objective != 0 else 0.0
    status = status_of(relative, tol, trivial=best.trivial, stopped_by=stopped_by, estimated=best.estimated)
    sentence = message(status, objective, relative, tol, best.floor, scope, stopped_by)
    return Certificate(
        objective=objective,
        lower_bound=lower,
        tolerance=tol,
        scope=scope.name,
        status=status,
        sentence=sentence + bound_note(status, best.estimated, best.bound),
        stopped_by=stopped_by,
        weight_decay_objective=value + weight_decay * penalty.plain,
        bound=best.bound,
        estimated_gap=best.estimated,
    )


class _Best(NamedTuple):
    """The largest lower bound, by which bound of the dual norm, and what rounding may have taken, relative to it.

    ``trivial``: zero is optimal. ``estimated``: the relative gap if a local search has found the worst pattern.
    """

    lower: float = -np.inf
    bound: str = "none"
    floor: float = 0.0
    trivial: bool = False
    estimated: float | None = None


def _best_bound(
    loss: Loss, dual: Float, weight_decay: float, prover: Prover, objective: float, tol: float, *, at_zero: bool
) -> _Best:
    """Bounds from ``-grad L(F)`` on, until one closes the gap; ``at_zero``: whether ``F`` is of the zero network."""
    best, trivial = _Best(), False
    for point in prover.bounded(dual):
        found = lower_bound(loss, point.dual, point.bound, weight_decay)
        if found > best.lower:
            floor = point.rounding / max(point.bound, weight_decay) + 64 * EPS
            best = _Best(found, point.name, floor)
        own = at_zero and np.array_equal(point.dual, dual)
        trivial |= own and point.bound - point.rounding <= weight_decay * (1 + 64 * EPS)
        if objective - best.lower <= tol * objective:
            break
    estimated = None
    if best.bound != "gates":
        estimated = _estimated_gap(loss, dual, weight_decay, prover, objective, best.lower, tol)
    return best._replace(trivial=trivial, estimated=estimated)


def _estimated_gap(
    loss: Loss, dual: Float, weight_decay: float, prover: Prover, objective: float, lower: float, tol: float
) -> float | None:
    """Relative gap if a local search has found the worst pattern; the proved one where that is within ``tol``."""
    if objective - lower <= tol * objective:
        return max(objective - lower, 0.0) / objective if objective != 0 else 0.0
    norm = prover.estimate(dual)
    if norm is None:
        return None
    guess = max(lower_bound(loss, dual, max(norm, weight_decay), weight_decay), lower)
    return max(objective - guess, 0.0) / objective


def downgraded(proof: Certificate, stopped_by: str) -> Certificate:
    """The certificate without its claim: NUMERICAL, for a reason of ``status.STOPPED_BY``."""
    numbers = proof.objective, proof.relative_gap, proof.tolerance, 0.0
    sentence = message(Status.NUMERICAL, *numbers, Scope(proof.scope), stopped_by)
    return replace(proof, status=Status.NUMERICAL, sentence=sentence, stopped_by=stopped_by)


def lower_bound(loss: Loss, dual: Float, dual_norm: float, weight_decay: float) -> float:
    """Best ``D(t V)`` over the feasible multiples ``t <= weight_decay / dual_norm`` of a dual point.

    ``D`` is concave in ``t``, so a golden section finds the best; every value on the way is valid.

    Parameters
    ----------
    loss : Loss
    dual : ndarray (n, K)
        The dual point ``V``.
    dual_norm, weight_decay : float
        Norm of the correlations of ``V``, and the bound on it that makes a point feasible.
    """
    largest = weight_decay / dual_norm if dual_norm > 0 else 1.0
    high = min(largest, 2.0)  # beyond twice the residual nothing is won near an optimum
    tried = [loss.dual_value(t * dual) for t in (0.0, min(1.0, high), high)]

    def value(t: float) -> float:
        tried.append(loss.dual_value(t * dual))
        return tried[-1]

    low, left, right = 0.0, (1 - _GOLDEN) * high, _GOLDEN * high
    at_left, at_right = value(left), value(right)
    for _ in range(_SECTIONS):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = value(right)
    return max(tried)


def _with_stored_statistics(proof: Certificate, case: GatedCase | ReluCase, outputs: Float) -> Certificate:
    """The certificate, NUMERICAL where the network with its stored statistics has another loss."""
    network, question, responses = case.network, case.question, case.responses
    loss, total = question.program.loss, float(question.row_weights.sum())
    scale = network.gamma * responses.norms / np.sqrt(network.n_effective)
    constant = (network.gamma * responses.offsets + network.shift) * np.sqrt(total / network.n_effective)
    allowed = max(proof.tolerance, _SAME_LOSS) * proof.weight_decay_objective
    same_mean = isinstance(case, ReluCase) or np.array_equal(network.mean, question.mean)
    if same_mean:
        change = np.hypot(scale - network.gamma, constant - network.shift) @ np.linalg.norm(network.output, axis=1)
        if _loss_moves_at_most(loss, outputs, question.readout.norm * float(change)) <= allowed:
            return proof
    stored = (case if same_mean else case.at_mean(network.mean)).outputs(_first_layer(responses, scale, constant))
    judged = proof.weight_decay_objective - question.program.weight_decay * network.weight_decay_penalty
    return downgraded(proof, "statistics") if abs(loss.value(stored) - judged) > allowed else proof


def _loss_moves_at_most(loss: Loss, outputs: Float, distance: float) -> float:
    """Change of the loss when the outputs move by a weighted norm: no loss has more curvature than 1."""
    slope = float(np.linalg.norm(loss.negative_gradient(outputs) / np.sqrt(loss.weights)[:, None]))
    return (slope + distance) * distance  # a power would raise where it overflows


def _first_layer(responses: PreActivations, scale: Float, constant: Float) -> Float:
    """First-layer columns on the rows of normalised pre-activations: (r + 1, m)."""
    return np.vstack([scale * responses.coefficients, constant])


def _whitened(question: Question, responses: PreActivations) -> tuple[Float, bool]:
    """Coordinates ``Phi^{-1} q_j / ||q_j||`` of pre-activations, and whether one leaves the directions kept."""
    rows, phi = question.rows, question.spectral_filter
    phi = np.ones(rows.shape[1] - 1) if phi is None else phi
    coordinates = responses.products(rows, question.row_weights) / phi[:, None]
    norms = np.linalg.norm(coordinates, axis=0)
    outside = bool(np.any(responses.coefficients.any(axis=0) & (norms < 1 - 1e-6)))
    return coordinates / np.where(norms > 0, norms, 1.0) / phi[:, None], outside
