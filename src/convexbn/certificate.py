"""The judge: objective, valid lower bound, gap and status of a given network, whoever trained it.

It takes arrays and recomputes everything: the network's own batch norm on the raw data, the loss, the
penalty, a dual point and its bound. It knows no solver; what a solver says of itself only names why it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from convexbn._typing import Bool, Float, FloatMatrix, Index
from convexbn.evidence import AllPatterns, Evidence
from convexbn.losses import Loss
from convexbn.patterns import gate_patterns
from convexbn.pooled_loss import PooledLoss
from convexbn.program import GatedProgram
from convexbn.verdict import Status, restriction_to, sentence_of, status_of, told_apart
from convexbn.whitening import MappedRows, RowStatistics, batch_normalize

_EPS = float(np.finfo(np.float64).eps)
_GOLDEN = (np.sqrt(5) - 1) / 2

#: Activations of gated neurons held at once.
_ENTRIES = 1 << 24


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
        A key of ``verdict.STOPPED_BY``.
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
    truncated : bool
        Whether the whitened rows leave directions of the data out, which the sentence then says.
    spectral_filter : ndarray (q - 1,), optional
        ``phi`` of rows ``A Phi``: the penalty is on ``||Phi^{-1} S_i||_F``, which the sentence then says.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        When a neuron does not follow the gate that it names.
    """
    neurons = _Gated(weight, gamma, shift, output, gates, gate_offsets, gate_index)
    outputs = np.zeros_like(program.loss.targets)
    used, place = np.unique(gate_index, return_inverse=True)
    blocks = np.zeros((len(used), *program.block_shape))
    outside = False
    for part, seen, products, varies in neurons.parts(program, X, mean):
        outputs += seen
        coordinates, leaves = _whitened(products, varies, spectral_filter)
        outside |= leaves
        first_layer = np.vstack([gamma[part] * coordinates, shift[part]])  # columns s_j
        np.add.at(blocks, place[part], first_layer.T[:, :, None] * output[part][:, None, :])
    return judge(
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
    rows: Float,
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
    """
    outputs, products, varies = _relu_outputs(rows, loss, X, weight, gamma, shift, output)
    coordinates, outside = _whitened(products, varies, spectral_filter)
    lengths = np.ones(len(gamma)) if spectral_filter is None else np.linalg.norm(coordinates, axis=0)
    lengths[lengths == 0] = 1.0  # a direction on which the rows do not vary still has its scale
    directions = np.vstack([gamma * coordinates, shift]).T
    prover = AllPatterns(loss, rows, weight_decay, directions, tolerance, deadline)
    return judge(
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


class _Gated:
    """Neurons with their gates, whose outputs are computed for some neurons, or some rows, at a time."""

    def __init__(
        self, weight: Float, gamma: Float, shift: Float, output: Float, gates: Float, offsets: Float, index: Index
    ) -> None:
        self.weight, self.gamma, self.shift, self.output, self.index = weight, gamma, shift, output, index
        self.distinct, self.gate = np.unique(np.vstack([gates, offsets]), axis=1, return_inverse=True)

    def parts(self, program: GatedProgram, X: FloatMatrix, mean: Float) -> Iterator[tuple[slice, Float, Float, Bool]]:
        """Neurons, their outputs, ``A'W`` times their normalised responses, and which of these vary."""
        if isinstance(program.rows, MappedRows):
            yield self._all_neurons(program, X, mean)
            return
        loss, patterns = program.on_rows, self._opened(X, mean)
        size = max(1, _ENTRIES // len(X))
        for start in range(0, len(self.index), size):
            part = slice(start, start + size)
            normalized = batch_normalize(X, self.weight[:, part], loss.weights)
            opened = patterns[:, self.gate[part]]
            _check_gates(opened, program.patterns[:, self.index[part]], start)
            outputs = loss.outputs(opened * self._response(normalized, loss, part), self.output[part])
            yield part, outputs, *_products(program.rows, loss.weights, normalized)

    def _all_neurons(self, program: GatedProgram, X: FloatMatrix, mean: Float) -> tuple[slice, Float, Float, Bool]:
        """The same for all neurons, by blocks of rows."""
        loss, every, whitened = program.on_rows, slice(0, len(self.index)), cast("MappedRows", program.rows)
        statistics, outputs = RowStatistics(X, loss.weights), [np.zeros((0, program.loss.targets.shape[1]))]
        for rows, normalized in statistics.blocks(self.weight, loss.rows_together):
            opened = self._opened(X[rows], mean)[:, self.gate]
            _check_gates(opened, program.patterns[rows][:, self.index], 0)
            outputs.append(loss.outputs(opened * self._response(normalized, loss, every), self.output))
        return every, np.concatenate(outputs), *statistics.products(self.weight, whitened.projection)

    def _opened(self, X: FloatMatrix, mean: Float) -> Bool:
        return gate_patterns(X, mean, self.distinct[:-1], self.distinct[-1])

    def _response(self, normalized: Float, loss: Loss, part: slice) -> Float:
        response: Float = self.gamma[part] * normalized + self.shift[part] / np.sqrt(loss.weights.sum())
        return response


def _relu_outputs(
    rows: Float | MappedRows, loss: Loss, X: FloatMatrix, weight: Float, gamma: Float, shift: Float, output: Float
) -> tuple[Float, Float, Bool]:
    """Outputs with the rows' own batch norm, ``A'W`` times the normalised responses, and which of these vary."""
    offset = shift / np.sqrt(loss.weights.sum())
    if not isinstance(rows, MappedRows):
        normalized = batch_normalize(X, weight, loss.weights)
        outputs = loss.outputs(np.maximum(gamma * normalized + offset, 0), output)
        return outputs, *_products(rows, loss.weights, normalized)
    statistics = RowStatistics(X, loss.weights)
    blocks = statistics.blocks(weight, loss.rows_together)
    outputs = np.concatenate([loss.outputs(np.maximum(gamma * block + offset, 0), output) for _, block in blocks])
    return outputs, *statistics.products(weight, rows.projection)


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
                floor = point.rounding / max(point.bound, weight_decay) + 64 * _EPS
            at_zero = penalty == 0 and np.array_equal(point.dual, dual)
            trivial |= at_zero and point.bound - point.rounding <= weight_decay * (1 + 64 * _EPS)
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
    """The certificate without its claim: NUMERICAL, for a reason of ``verdict.STOPPED_BY``."""
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
    low = 0.0
    best = max(loss.dual_value(t * dual) for t in (0.0, min(1.0, high), high))
    for _ in range(48):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = loss.dual_value(left * dual), loss.dual_value(right * dual)
        best = max(best, at_left, at_right)
        low, high = (low, right) if at_left >= at_right else (left, high)
    return best


def _restriction(loss: Loss, q: int, truncated: bool, spectral_filter: Float | None) -> str:
    """How the program differs from the plain one on dense data, in words."""
    layer = " with this convolution and pooling" if isinstance(loss, PooledLoss) else ""
    return layer + restriction_to(q - 1 if truncated else None, spectral_filter is not None)


def _check_gates(opened: np.ndarray, named: np.ndarray, first: int) -> None:
    wrong = np.flatnonzero((opened != named).any(axis=0))
    if len(wrong):
        raise ValueError(
            f"neuron {first + wrong[0]} does not follow the gate that it names: the network and the gates do not "
            "belong together, so there is nothing to certify."
        )


def _products(rows: Float, weights: Float, normalized: Float) -> tuple[Float, Bool]:
    """``A'W`` times normalised responses, without its constant, and which of them vary."""
    varies: Bool = np.any(normalized, axis=0, keepdims=True)[0]
    return rows[:, :-1].T @ (weights[:, None] * normalized), varies


def _whitened(products: Float, varies: Bool, phi: Float | None) -> tuple[Float, bool]:
    """Coordinates ``Phi^{-1} q_j / ||q_j||`` of normalised responses, and whether one leaves the directions kept."""
    phi = np.ones(len(products)) if phi is None else phi
    coordinates = products / phi[:, None]
    norms = np.linalg.norm(coordinates, axis=0)
    outside = bool(np.any(varies & (norms < 1 - 1e-6)))
    return coordinates / np.where(norms > 0, norms, 1.0) / phi[:, None], outside


def _plain_penalty(gamma: Float, shift: Float, output: Float) -> float:
    return float(0.5 * (gamma @ gamma + shift @ shift + np.sum(output**2)))
