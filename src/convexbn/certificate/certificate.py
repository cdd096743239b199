"""The judge: objective, valid lower bound, gap and status of a given network, whoever trained it.

It takes arrays and recomputes everything: the network's own batch norm on the raw data, the loss, the
penalty, a dual point and its bound. It knows no solver; what a solver says of itself only names why it stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from convexbn._types import EPS, Bool, Float, FloatMatrix, Index
from convexbn.certificate.dual_bounds import AllPatterns, Evidence
from convexbn.certificate.status import Status, restriction_to, sentence_of, status_of, told_apart
from convexbn.data.preactivations import Responses
from convexbn.data.row_matrix import MappedRows
from convexbn.program.gated import GatedProgram
from convexbn.program.gates import distinct_gates, gate_patterns
from convexbn.program.losses import Loss
from convexbn.program.pooled_loss import PooledLoss
from convexbn.program.relu import relu_outputs

_GOLDEN = (np.sqrt(5) - 1) / 2

#: Steps of a golden section: the interval shrinks by 1e-10.
_SECTIONS = 48

#: Hidden activations held at once.
_ENTRIES = 1 << 22

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


@dataclass(frozen=True)
class Statistics:
    """What a network stores of its training rows: ``mean`` (d,) and ``n_effective``, the sum of their weights."""

    mean: Float
    n_effective: float

    def scales(self, responses: Responses, gamma: Float, shift: Float, total: float) -> tuple[Float, Float]:
        """What the network with these statistics has for ``gamma`` and ``shift`` on its normalised responses."""
        scale = gamma * responses.norms / np.sqrt(self.n_effective)
        constant = (gamma * responses.offsets + shift) * np.sqrt(total / self.n_effective)
        return scale, constant


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
    truncated: bool = False,
    spectral_filter: Float | None = None,
    statistics: Statistics | None = None,
) -> Certificate:
    """Certify a gated network for its gates: ``L + weight_decay * sum_i ||S_i||_F`` against the dual.

    Parameters
    ----------
    program : GatedProgram
        The question: whitened rows, patterns of all gates, loss and weight decay.
    X : ndarray (n, d) or PatchMatrix
        The raw rows that the statistics are taken from.
    mean : ndarray (d,)
        Their means, as the patterns of the program used them.
    weight, gamma, shift, output, gates, gate_offsets, gate_index : ndarray
        The answer: one column (row of ``output``) a neuron, and the gate of the program it sits on.
    tolerance : float
        Relative gap that counts as optimal.
    stopped_by : str
        Why the solver stopped.
    truncated : bool
        Whether the whitened rows leave directions of the data out, which the sentence then says.
    spectral_filter : ndarray (q - 1,), optional
        ``phi`` of rows ``A Phi``: the penalty is on ``||Phi^{-1} S_i||_F``, which the sentence then says.
    statistics : Statistics, optional
        What the network stores of its training rows: with them it must have the loss that is judged, else NUMERICAL.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        When a neuron does not follow the gate that it names.
    """
    weights, total = program.on_rows.weights, float(program.on_rows.weights.sum())
    place = _checked_gates(program, X, mean, gates, gate_offsets, gate_index)
    stored_mean = mean if statistics is None else statistics.mean
    responses = Responses.of(X, weight, weights, rank=program.block_shape[0], mean=stored_mean)
    used = np.unique(gate_index)
    patterns = program.patterns[:, used]

    def outputs_of(first: Float, opened: Bool) -> Float:
        """Outputs of first-layer columns on the network's own responses."""
        return program.outputs_on(responses.rows, opened, _summed(first, output, place, len(used)))

    coordinates, outside = _whitened(program.rows, weights, responses, spectral_filter)
    blocks = _summed(np.vstack([gamma * coordinates, shift]), output, place, len(used))
    outputs = outputs_of(_first_layer(responses, gamma, shift), patterns)
    proof = judge(
        program.loss,
        outputs,
        program.weight_decay,
        penalty=float(program.norms(blocks).sum()),
        plain_penalty=_plain_penalty(gamma, shift, output),
        evidence=lambda dual: [Evidence(dual, *program.dual_norm_bound(dual), "gates")],
        scope="these gates",
        tolerance=tolerance,
        stopped_by="outside" if outside else stopped_by,
        restriction=_restriction(program.on_rows, program.block_shape[0], truncated, spectral_filter),
        block_norm=program.penalty,
    )
    if statistics is None:
        return proof
    scale, constant = statistics.scales(responses, gamma, shift, total)
    if np.array_equal(statistics.mean, mean):
        moved = _outputs_move_at_most(program.on_rows, scale - gamma, constant - shift, output)
        if _loss_moves_at_most(program.loss, outputs, moved) <= _allowed(proof):
            return proof
    else:
        first = np.unique(place, return_index=True)[1]
        patterns = gate_patterns(X, statistics.mean, gates[:, first], gate_offsets[first])
    stored = outputs_of(_first_layer(responses, scale, constant), patterns)
    return _with_statistics(proof, program.loss, stored, program.weight_decay, _plain_penalty(gamma, shift, output))


def certify_blocks(
    program: GatedProgram, gate_index: Index, blocks: Float, *, tolerance: float, stopped_by: str
) -> Certificate:
    """Certify blocks ``S_i`` (m, q, K) on the whitened data, before they become a network's weights."""
    finite = bool(np.isfinite(blocks).all())
    return judge(
        program.loss,
        program.outputs(gate_index, blocks),
        program.weight_decay,
        penalty=float(program.norms(blocks).sum()),
        plain_penalty=float(np.linalg.svd(blocks, compute_uv=False).sum()) if finite else np.nan,
        evidence=lambda dual: [Evidence(dual, *program.dual_norm_bound(dual), "gates")],
        scope="these gates",
        tolerance=tolerance,
        stopped_by=stopped_by,
    )


def certify_relu(
    rows: Float | MappedRows,
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
    truncated: bool = False,
    spectral_filter: Float | None = None,
    deadline: float | None = None,
    statistics: Statistics | None = None,
) -> Certificate:
    """Certify a ReLU network over all widths and patterns, by the cheapest bound that closes the gap.

    Parameters
    ----------
    rows : ndarray (n, q) or MappedRows
        Whitened rows ``A`` of the (distinct) rows ``X``.
    loss : Loss
        Loss bound to targets and weights.
    X : ndarray (n, d) or PatchMatrix
        The raw rows that the statistics are taken from.
    weight_decay : float
    weight, gamma, shift, output : ndarray
        One column (row of ``output``) a neuron.
    tolerance : float
        Relative gap that counts as optimal.
    stopped_by : str
        Why the solver stopped.
    truncated : bool
        Whether the whitened rows leave directions of the data out, which the sentence then says.
    spectral_filter : ndarray (q - 1,), optional
        ``phi`` of rows ``A Phi``: the penalty is on ``||Phi^{-1} s_j||``, which the sentence then says.
    deadline : float or None
        ``time.monotonic()`` after which no further bound is tried; None: each bound does its stated work.
    statistics : Statistics, optional
        As in ``certify_gated``.
    """
    total = float(loss.weights.sum())
    stored_mean = None if statistics is None else statistics.mean
    responses = Responses.of(X, weight, loss.weights, rank=rows.shape[1], mean=stored_mean)
    coordinates, outside = _whitened(rows, loss.weights, responses, spectral_filter)
    lengths = np.ones(len(gamma)) if spectral_filter is None else np.linalg.norm(coordinates, axis=0)
    lengths[lengths == 0] = 1.0  # a direction on which the rows do not vary still has its scale
    directions = np.vstack([gamma * coordinates, shift]).T
    prover = AllPatterns(loss, rows, weight_decay, directions, tolerance, deadline)
    outputs = relu_outputs(responses.rows, loss, _first_layer(responses, gamma, shift), output)
    proof = judge(
        loss.of_cases,
        outputs,
        weight_decay,
        penalty=float(np.hypot(gamma * lengths, shift) @ np.linalg.norm(output, axis=1)),
        plain_penalty=_plain_penalty(gamma, shift, output),
        evidence=prover.evidence,
        estimate=prover.estimate,
        scope="all patterns",
        tolerance=tolerance,
        stopped_by="outside" if outside else stopped_by,
        restriction=_restriction(loss, rows.shape[1], truncated, spectral_filter),
    )
    if statistics is None:
        return proof
    scale, constant = statistics.scales(responses, gamma, shift, total)
    moved = _outputs_move_at_most(loss, scale - gamma, constant - shift, output)
    if _loss_moves_at_most(loss.of_cases, outputs, moved) <= _allowed(proof):
        return proof
    stored = relu_outputs(responses.rows, loss, _first_layer(responses, scale, constant), output)
    return _with_statistics(proof, loss.of_cases, stored, weight_decay, _plain_penalty(gamma, shift, output))


def judge(
    loss: Loss,
    outputs: Float,
    weight_decay: float,
    *,
    penalty: float,
    plain_penalty: float,
    evidence: Callable[[Float], Iterable[Evidence]],
    scope: str,
    tolerance: float,
    stopped_by: str,
    estimate: Callable[[Float], float | None] | None = None,
    restriction: str = "",
    block_norm: str = "Frobenius",
) -> Certificate:
    """Certificate of outputs ``F`` with a given penalty: dual points, lower bound, gap, status and sentence.

    ``evidence`` gives bounded dual points from the dual ``-grad L(F)``, cheap ones first; no more are asked for
    than it takes to close the gap. ``estimate`` gives a lower estimate of the dual norm, for the estimated gap.
    ``restriction`` says how the program differs from the plain one, ``block_norm`` what a gate is penalised by.
    """
    value = loss.value(outputs)
    objective = value + weight_decay * penalty
    dual = loss.negative_gradient(outputs)
    lower, bound, floor, trivial = -np.inf, "none", 0.0, False
    estimated: float | None = None
    if np.isfinite(objective) and np.isfinite(dual).all():
        for point in evidence(dual):
            found = lower_bound(loss, point.dual, point.bound, weight_decay)
            if found > lower:
                lower, bound = found, point.name
                floor = point.rounding / max(point.bound, weight_decay) + 64 * EPS
            at_zero = penalty == 0 and np.array_equal(point.dual, dual)
            trivial |= at_zero and point.bound - point.rounding <= weight_decay * (1 + 64 * EPS)
            if objective - lower <= tolerance * objective:
                break
        if estimate is not None and objective - lower <= tolerance * objective:
            estimated = max(objective - lower, 0.0) / objective if objective != 0 else 0.0
        elif estimate is not None and (norm := estimate(dual)) is not None:
            guess = max(lower_bound(loss, dual, max(norm, weight_decay), weight_decay), lower)
            estimated = max(objective - guess, 0.0) / objective
    gap = objective - lower
    if 0 > gap > -1e-9 * abs(objective):  # the objective's own rounding
        lower, gap = objective, 0.0
    relative = gap / objective if objective != 0 else 0.0
    status = status_of(relative, tolerance, trivial=trivial, stopped_by=stopped_by, estimated=estimated)
    sentence = sentence_of(status, objective, relative, tolerance, floor, scope, stopped_by, restriction, block_norm)
    return Certificate(
        objective=objective,
        lower_bound=lower,
        tolerance=tolerance,
        scope=scope,
        status=status,
        sentence=sentence + told_apart(status, relative, estimated, bound),
        stopped_by=stopped_by,
        weight_decay_objective=value + weight_decay * plain_penalty,
        bound=bound,
        estimated_gap=estimated,
    )


def downgraded(proof: Certificate, stopped_by: str) -> Certificate:
    """The certificate without its claim: NUMERICAL, for a reason of ``status.STOPPED_BY``."""
    sentence = sentence_of(
        Status.NUMERICAL, proof.objective, proof.relative_gap, proof.tolerance, 0.0, proof.scope, stopped_by
    )
    return replace(proof, status=Status.NUMERICAL, sentence=sentence, stopped_by=stopped_by)


def lower_bound(loss: Loss, dual: Float, dual_norm: float, weight_decay: float) -> float:
    """Best ``D(t V)`` over the feasible multiples ``t <= weight_decay / dual_norm`` of a dual point.

    ``D`` is concave in ``t``, so a golden section finds the best; every value on the way is valid.
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


def _checked_gates(
    program: GatedProgram, X: FloatMatrix, mean: Float, gates: Float, gate_offsets: Float, gate_index: Index
) -> Index:
    """Place of every neuron among the gates that are used, after a look at whether its own gate is that one."""
    first, distinct = distinct_gates(gates, gate_offsets)
    pairs, pair = np.unique(np.stack([distinct, gate_index]), axis=1, return_inverse=True)
    differ, size = np.zeros(pairs.shape[1], dtype=bool), max(64, _ENTRIES // max(pairs.shape[1], 1))
    for start in range(0, len(X), size):
        part = slice(start, start + size)
        opened = gate_patterns(X[part], mean, gates[:, first], gate_offsets[first])
        differ |= (opened[:, pairs[0]] != program.patterns[part][:, pairs[1]]).any(axis=0)
    wrong = differ[pair.ravel()]
    if wrong.any():
        raise ValueError(
            f"neuron {np.flatnonzero(wrong)[0]} does not follow the gate that it names: the network and the gates do "
            "not belong together, so there is nothing to certify."
        )
    return np.unique(gate_index, return_inverse=True)[1]


def _summed(first: Float, output: Float, place: Index, count: int) -> Float:
    """Blocks ``sum_j s_j c_j'`` over the neurons of every place: (count, q, K)."""
    order = np.argsort(place, kind="stable")
    ends = np.searchsorted(place[order], np.arange(count + 1))
    parts = [order[start:stop] for start, stop in itertools.pairwise(ends)]
    return np.array([first[:, part] @ output[part] for part in parts]).reshape(count, len(first), output.shape[1])


def _restriction(loss: Loss, q: int, truncated: bool, spectral_filter: Float | None) -> str:
    """How the program differs from the plain one on dense data, in words."""
    layer = " with this convolution and pooling" if isinstance(loss, PooledLoss) else ""
    return layer + restriction_to(q - 1 if truncated else None, spectral_filter is not None)


def _with_statistics(
    proof: Certificate, loss: Loss, outputs: Float, weight_decay: float, plain_penalty: float
) -> Certificate:
    """The certificate, NUMERICAL where the network with its stored statistics has other outputs, by their loss."""
    judged = proof.weight_decay_objective - weight_decay * plain_penalty
    return downgraded(proof, "statistics") if abs(loss.value(outputs) - judged) > _allowed(proof) else proof


def _allowed(proof: Certificate) -> float:
    """How far the loss of the network with its stored statistics may be from the one that is judged."""
    return max(proof.tolerance, _SAME_LOSS) * proof.weight_decay_objective


def _loss_moves_at_most(loss: Loss, outputs: Float, distance: float) -> float:
    """Change of the loss when the outputs move by a weighted norm: no loss has more curvature than 1."""
    slope = float(np.linalg.norm(loss.negative_gradient(outputs) / np.sqrt(loss.weights)[:, None]))
    return (slope + distance) * distance  # a power would raise where it overflows


def _outputs_move_at_most(loss: Loss, scale: Float, constant: Float, output: Float) -> float:
    """Weighted norm by which the outputs move when scales and constants of the neurons move by so much."""
    return loss.hidden_norm * float(np.hypot(scale, constant) @ np.linalg.norm(output, axis=1))


def _first_layer(responses: Responses, scale: Float, constant: Float) -> Float:
    """First-layer columns on the rows of normalised responses: (r + 1, m)."""
    return np.vstack([scale * responses.coefficients, constant])


def _whitened(rows: Float | MappedRows, weights: Float, responses: Responses, phi: Float | None) -> tuple[Float, bool]:
    """Coordinates ``Phi^{-1} q_j / ||q_j||`` of normalised responses, and whether one leaves the directions kept."""
    phi = np.ones(rows.shape[1] - 1) if phi is None else phi
    coordinates = responses.products(rows, weights) / phi[:, None]
    norms = np.linalg.norm(coordinates, axis=0)
    outside = bool(np.any(responses.coefficients.any(axis=0) & (norms < 1 - 1e-6)))
    return coordinates / np.where(norms > 0, norms, 1.0) / phi[:, None], outside


def _plain_penalty(gamma: Float, shift: Float, output: Float) -> float:
    return float(0.5 * (gamma @ gamma + shift @ shift + np.sum(output**2)))
