"""The judge: objective, valid lower bound, gap and status of a given network, whoever trained it.

It takes a question and a network, and recomputes everything: batch norm on the raw data, the loss, the penalty, a dual
point and its bound. It knows no solver; what a solver says of itself only names why it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from convexbn._types import EPS, Float
from convexbn.certificate.dual_bounds import NOTHING_KNOWN, DualBound, KnownBound, ReluDualBounds
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

#: Relative change of the objective that stored statistics may make, if the tolerance is smaller.
_SAME_LOSS = 1e-9


@dataclass(frozen=True)
class Certificate:
    """Objective and lower bound of a network, in the units of the objective, on unscaled data.

    Attributes
    ----------
    objective, lower_bound : float
        Loss plus penalty, recomputed with the network's own batch norm; no network of the scope is below the bound.
    tolerance : float
        Relative gap that counts as optimal.
    scope : str
        ``"these gates"`` or ``"all patterns"``, the networks with the same gates or all batch-normalised ReLU networks;
        followed by ``", except along ..."`` if directions of the data were cut because they may be rounding.
    status, sentence : Status, str
        The result in one word; status, cause and remedy in words.
    stopped_by : str
        A key of ``status.STOPPED_BY``.
    weight_decay_objective : float
        Loss plus ``weight_decay / 2`` times the squared norm of the weights of the plain network of neurons.
    bound : str
        Source of the bound: ``"gates"`` (exact), ``"orthant"``, ``"every cell"`` (exact), ``"branch and bound"``,
        ``"relaxation"``, ``"chosen dual point"``, ``"lifted dual point"`` or ``"lifted relaxation"``; ``"none"``
        without a bound.
    estimated_gap : float or None
        Relative gap if a local search found the worst pattern: an estimate, not a bound. Equal to the relative gap
        if that is within the tolerance; None for gates, or if no time was left to search.
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
    question: Question, network: BatchNormNetwork, *, stopped_by: str = "tolerance", own_rows: bool = False,
    deadline: float | None = None, known: KnownBound = NOTHING_KNOWN,
) -> Certificate:  # fmt: skip
    """Judge a gated network by the exact dual of its gates, a ReLU network over all widths and patterns.

    Parameters
    ----------
    question, network : Question, BatchNormNetwork
        A gated network names the gate of the program for each neuron; a ValueError if a neuron does not follow it.
    stopped_by : str
        Why the solver stopped, a key of ``status.STOPPED_BY``.
    own_rows : bool
        Whether the network was trained on these rows. Its stored statistics must then give the loss that is judged,
        else the status is NUMERICAL.
    deadline : float or None
        ``now()`` after which no further bound over all patterns is tried; None: each does its stated work.
    known : KnownBound
        Lower bound over all patterns of this very program that was proved before, and its name.
    """
    program, mean, rank = question.program, network.mean if own_rows else None, question.rows.shape[1]
    bias = network.output_bias - question.target_offset
    if bias.any() and program.loss is program.loss.without_bias:
        raise ValueError("the network has an output bias and the program none: give the program an intercept.")
    responses = PreActivations.compute(question.X, network.weight, question.row_weights, rank=rank, mean=mean)
    coordinates, outside = _whitened_coordinates(question, responses)
    case: GatedCase | ReluCase
    if isinstance(program, GatedProgram):
        case = GatedCase.examine(question, program, network, responses)
    else:
        directions = np.vstack([network.gamma * coordinates, network.shift]).T
        prover = ReluDualBounds(program, directions, question.tol, deadline, known)
        case = ReluCase(question, network, responses, prover)
    outputs = case.outputs(np.vstack([network.gamma * responses.coefficients, network.shift]))
    found = Found(outputs, case.penalty(coordinates), network.weight_decay_penalty, bias)
    proof = judge(
        program.loss, found, program.weight_decay, case.bounds, question.scope, question.tol,
        "outside" if outside else stopped_by, question.stretch,
    )  # fmt: skip
    return _with_stored_statistics(proof, case, found) if own_rows else proof


@dataclass(frozen=True)
class Found:
    """Outputs (n, K) of a network without its output bias, what the weight decay multiplies, and the bias (K,).

    ``penalty`` is that of the program, ``plain`` half the squared norm of the weights of the plain network of neurons.
    """

    outputs: Float
    penalty: float
    plain: float
    bias: Float | float = 0.0


class Prover(Protocol):
    """Source of dual points with bounds of their dual norms."""

    @property
    def known(self) -> KnownBound:
        """A lower bound of the program that was proved before."""

    @property
    def remark(self) -> str:
        """What more time would buy, in a sentence, once the bounds have been made."""

    def bounded(self, dual: Float) -> Iterable[DualBound]:
        """Dual points found from ``-grad L(F)``, cheap bounds first."""

    def estimate(self, dual: Float) -> float | None:
        """Lower estimate of the dual norm; None without one."""


def judge(
    loss: Loss, found: Found, weight_decay: float, prover: Prover, scope: Scope, tol: float, stopped_by: str,
    stretch: float = 1.0,
) -> Certificate:  # fmt: skip
    """Certificate of outputs with a given output bias and penalty.

    Parameters
    ----------
    loss, found, weight_decay : Loss, Found, float
    prover : Prover
        Asked for dual points until the gap is closed.
    scope : Scope
        Networks to compare with.
    tol, stopped_by : float, str
        Relative gap that counts as optimal, and why the solver stopped.
    stretch : float
        Factor of the prover's dual norms, see ``Question``.
    """
    value, dual = loss.value_at(found.outputs, found.bias), loss.negative_gradient(found.outputs)
    objective, best = value + weight_decay * found.penalty, _Best()
    if np.isfinite(objective) and np.isfinite(dual).all():
        best = _best_bound(loss, dual, weight_decay, prover, objective, tol, stretch, at_zero=found.penalty == 0)
    lower, gap = best.lower, objective - best.lower
    if 0 > gap > -1e-9 * abs(objective):  # the objective's own rounding
        lower, gap = objective, 0.0
    relative = gap / objective if objective != 0 else 0.0
    status = status_of(relative, tol, trivial=best.trivial, stopped_by=stopped_by, estimated=best.estimated)
    sentence = message(status, objective, relative, tol, best.floor, scope, stopped_by, best.estimated)
    return Certificate(
        objective=objective, lower_bound=lower, tolerance=tol, scope=scope.label, status=status,
        sentence=sentence + bound_note(status, best.estimated, best.bound, prover.remark), stopped_by=stopped_by,
        weight_decay_objective=value + weight_decay * found.plain, bound=best.bound, estimated_gap=best.estimated,
    )  # fmt: skip


class _Best(NamedTuple):
    """Largest lower bound, the source of its dual norm, and its relative loss by rounding.

    ``trivial``: zero is optimal. ``estimated``: the relative gap if a local search found the worst pattern.
    """

    lower: float = -np.inf
    bound: str = "none"
    floor: float = 0.0
    trivial: bool = False
    estimated: float | None = None


def _best_bound(
    loss: Loss, dual: Float, weight_decay: float, prover: Prover, objective: float, tol: float, stretch: float, *,
    at_zero: bool,
) -> _Best:  # fmt: skip
    """Best of the prover's bounds, up to one that closes the gap; ``at_zero``: ``F`` is of the zero network."""
    best, trivial, closed = _Best(*prover.known), False, False
    for point in prover.bounded(dual):
        found = lower_bound(loss, point.dual, stretch * point.bound, weight_decay)
        if found > best.lower:
            best = _Best(found, point.name, point.rounding / max(point.bound, weight_decay) + 64 * EPS)
        own = at_zero and np.array_equal(point.dual, dual)
        trivial |= own and point.bound - point.rounding <= weight_decay * (1 + 64 * EPS)
        if closed := objective - best.lower <= tol * objective:
            break
    best, guess = best._replace(trivial=trivial), best.lower
    if best.bound == "gates":
        return best
    if not closed:
        if (norm := prover.estimate(dual)) is None:
            return best
        guess = max(lower_bound(loss, dual, max(norm, weight_decay), weight_decay), guess)
    return best._replace(estimated=max(objective - guess, 0.0) / objective if objective != 0 else 0.0)


def lower_bound(loss: Loss, dual: Float, dual_norm: float, weight_decay: float) -> float:
    """Best ``D(t V)`` over the feasible multiples ``t <= weight_decay / dual_norm`` of a dual point.

    ``D`` is concave in ``t``, so a golden section finds the best; every value on the way is valid.

    Parameters
    ----------
    loss : Loss
    dual : ndarray (n, K)
        The dual point ``V``.
    dual_norm, weight_decay : float
        Norm of the correlations of ``V``; a point is feasible if the norm is at most ``weight_decay``.
    """
    # beyond twice the residual nothing is won near an optimum
    high = min(weight_decay / dual_norm if dual_norm > 0 else 1.0, 2.0)
    tried = [loss.dual_value(t * dual) for t in (0.0, min(1.0, high), high)]

    def value(t: float) -> float:
        tried.append(loss.dual_value(t * dual))
        return tried[-1]

    low, left, right = 0.0, (1 - _GOLDEN) * high, _GOLDEN * high
    at_left, at_right = value(left), value(right)
    for _ in range(_SECTIONS):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            at_left = value(left := high - _GOLDEN * (high - low))
        else:
            low, left, at_left = left, right, at_right
            at_right = value(right := low + _GOLDEN * (high - low))
    return max(tried)


def _with_stored_statistics(proof: Certificate, case: GatedCase | ReluCase, found: Found) -> Certificate:
    """Certificate of a network on its own rows: NUMERICAL if its stored statistics give another loss."""
    network, question, responses = case.network, case.question, case.responses
    loss, total = question.program.loss, float(question.row_weights.sum())
    scale = network.gamma * responses.norms / np.sqrt(network.n_effective)
    constant = (network.gamma * responses.offsets + network.shift) * np.sqrt(total / network.n_effective)
    allowed = max(proof.tolerance, _SAME_LOSS) * proof.objective
    change = np.hypot(scale - network.gamma, constant - network.shift) @ np.linalg.norm(network.output, axis=1)
    if isinstance(case, GatedCase) and not np.array_equal(network.mean, question.mean):
        case = case.at_mean(network.mean)
    elif _loss_moves_at_most(loss, found, question.readout.norm * float(change)) <= allowed:
        return proof
    stored = case.outputs(np.vstack([scale * responses.coefficients, constant]))
    judged = loss.value_at(found.outputs, found.bias)
    if not abs(loss.value_at(stored, found.bias) - judged) <= allowed:
        numbers = proof.objective, proof.relative_gap, proof.tolerance, 0.0
        sentence = message(Status.NUMERICAL, *numbers, question.scope, "statistics")
        return replace(proof, status=Status.NUMERICAL, sentence=sentence, stopped_by="statistics")
    return proof


def _loss_moves_at_most(loss: Loss, found: Found, distance: float) -> float:
    """Bound on the change of the loss if the outputs move by a weighted norm: no loss has curvature above 1."""
    dual = loss.without_bias.negative_gradient(found.outputs + found.bias)
    slope = float(np.linalg.norm(dual / np.sqrt(loss.weights)[:, None]))
    return (slope + distance) * distance  # a power would raise where it overflows


def _whitened_coordinates(question: Question, responses: PreActivations) -> tuple[Float, bool]:
    """Coordinates ``Phi^{-1} q_j / ||q_j||`` of pre-activations, and whether one leaves the directions kept."""
    phi = np.ones(question.rows.shape[1] - 1) if question.spectral_filter is None else question.spectral_filter
    coordinates = responses.products(question.rows, question.row_weights) / phi[:, None]
    norms = np.linalg.norm(coordinates, axis=0)
    outside = bool(np.any(responses.coefficients.any(axis=0) & (norms < 1 - 1e-6)))
    return coordinates / np.where(norms > 0, norms, 1.0) / phi[:, None], outside
