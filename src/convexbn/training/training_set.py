"""Training sets: canonical, merged and whitened rows with their loss, gates and programs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._types import Float, FloatMatrix
from convexbn.certificate.dual_bounds import ReluDualBounds
from convexbn.certificate.question import Question
from convexbn.data.canonical import canonical_rows, distinct_rows, fingerprint
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.data.row_matrix import row_matrix
from convexbn.data.whitening import Whitening, whiten
from convexbn.program.gate_margins import apart_from_rows
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.gates import first_of_each_pattern, gate_patterns, gates_along, sample_directions, sample_gates
from convexbn.program.losses import Loss, LossKind
from convexbn.program.output_bias import WithOutputBias
from convexbn.program.readout import Readout, readout_of
from convexbn.program.relu import ReluProgram
from convexbn.solvers import closed_form
from convexbn.solvers.relu.sgd import SGD, random_start
from convexbn.training.held_out import AUTO_FRACTION, balanced_order

GATES_DESCENT, GATES_STEPS = SGD(epochs=8, learning_rate=0.2), 1000  # trains gates; takes at least so many steps
IMAGES_DESCENT = SGD(batch_size=100)  # small batches, because an image is many patches that agree on a class


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Canonical training rows, their loss and whitening.

    Attributes
    ----------
    X, loss : ndarray (n, d), Loss
        Distinct rows in canonical order, and their loss, bound to targets and weights.
    whitening, fingerprint : Whitening, str
        Whitened rows (of the patches if the rows are images), and a hash of the canonical rows, targets and weights.
    inputs : ndarray (n, d), or PatchMatrix
        Inputs of the first layer: the rows, or the patches of the images.
    target_offset : ndarray (K,)
        What was subtracted from the targets, and is part of the network's output bias.
    convolution : Convolution or None
        If given, the rows are images, and the first layer acts on their patches.
    """

    X: FloatMatrix
    loss: Loss
    whitening: Whitening
    fingerprint: str
    inputs: Any
    target_offset: Float
    convolution: Convolution | None = None

    @classmethod
    def prepare(
        cls, X: FloatMatrix, Y: Float, sample_weight: Float, *, loss: LossKind, merge_features: bool = True,
        convolution: Convolution | None = None, fit_intercept: bool = False, **whitening: Any,
    ) -> TrainingSet:  # fmt: skip
        """Sort, merge and whiten rows, or the patches of images.

        Parameters
        ----------
        X, Y : ndarray (n, d), (n, K)
            Finite rows of any real type, and targets of the loss.
        sample_weight : ndarray (n,)
            Weights, not negative; rows of weight zero are left out.
        loss : callable
            Makes a loss of targets and weights.
        merge_features : bool, default=True
            Whether to merge rows of equal features and different targets, if the loss depends on the targets' mean
            alone: averages for the squared loss, soft labels for classes. Formulas and exact ReLU training need it.
        convolution : Convolution, optional
            If given, the rows are flattened images.
        fit_intercept : bool, default=False
            Whether the program has an output bias without penalty. Targets that are numbers are then centred.
        **whitening
            ``rank``, ``spectral_filter`` and ``input_eps``, as in ``whiten``.
        """
        X, Y, weights = canonical_rows(X, Y, sample_weight)
        mark = fingerprint(X, Y, weights)
        bound = loss(Y, weights)
        if merge_features and bound.depends_on_means:
            X, place = distinct_rows(X)
            bound = bound.merged(place, len(X))
        offset = np.zeros(Y.shape[1])
        if fit_intercept:
            if "regression" in bound.tasks:
                offset = bound.weights @ bound.targets / bound.weights.sum()
                bound = bound.shifted(offset)
            bound = WithOutputBias.with_decay(bound, 0.0)
        inputs: Any = X if convolution is None else PatchMatrix(X, convolution.geometry)
        row_weights = readout_of(convolution).row_weights(bound.weights)
        return cls(X, bound, whiten(inputs, row_weights, **whitening), mark, inputs, offset, convolution)

    @property
    def readout(self) -> Readout:
        """Map from hidden units to the inputs of the output layer."""
        return readout_of(self.convolution)

    @property
    def row_weights(self) -> Float:
        """Weights of the inputs of the first layer."""
        return self.readout.row_weights(self.loss.weights)

    @property
    def has_orthogonal_rows(self) -> bool:
        """Whether the whitened rows are square and unfiltered, which the formulas need."""
        square = self.whitening.rank == len(self.X) - 1
        return self.convolution is None and square and not self.whitening.filtered

    def leading(self, rank: int | float | None, spectral_filter: float | None = None) -> TrainingSet:
        """Training set on fewer directions, or filtered, from the same SVD: see ``Whitening.leading``."""
        return replace(self, whitening=self.whitening.leading(rank, spectral_filter))

    def relu_program(self, weight_decay: float) -> ReluProgram:
        """ReLU program on these rows."""
        return ReluProgram(self.whitening.rows, self.loss, weight_decay, self.readout)

    def gated_program(self, gates: Float, gate_offsets: Float, weight_decay: float = 1.0) -> GatedProgram:
        """Gated program on these rows.

        Parameters
        ----------
        gates, gate_offsets, weight_decay : ndarray (d, P), ndarray (P,), float
        """
        patterns = gate_patterns(self.inputs, self.whitening.mean, gates, gate_offsets)
        return GatedProgram(gated_operator(self.whitening.rows, patterns, self.readout), self.loss, weight_decay)

    def question(self, program: GatedProgram | ReluProgram, tol: float) -> Question:
        """Question that the certificate of a network on these rows answers."""
        whitening = self.whitening
        return Question(
            self.inputs, whitening.mean, program, tol, whitening.truncated,
            spectral_filter=whitening.filter if whitening.filtered else None, target_offset=self.target_offset,
            cut=whitening.cut, stretch=whitening.stretch,
        )  # fmt: skip

    def output_bias(self, outputs: Callable[[], Float]) -> Float:
        """Output bias (K,) of a network; its outputs without it on these rows are asked for only if it has one."""
        has_none = self.loss.without_bias is self.loss
        return self.target_offset if has_none else self.loss.best_bias(outputs()) + self.target_offset

    def draw_gates(
        self, gates: str | FloatMatrix, n_gates: int, random_state: np.random.RandomState, *, linear: bool = False,
        deadline: float | None = None,
    ) -> tuple[Float, Float, GatedProgram]:  # fmt: skip
        """Sampled or given gates with their offsets, (d, P) and (P,), and their program; of equal patterns the first.

        Sampled gates keep their distance from the rows, see ``program.gate_margins``; given ones stay as they are.

        Parameters
        ----------
        gates : {"data", "whitened", "trained"} or ndarray (d, P) or (d + 1, P)
            How gates are drawn, or the gates, optionally with offsets in a last row.
        n_gates, random_state : int, numpy.random.RandomState
            Number and source of draws.
        linear : bool, default=False
            Whether the first gate is open everywhere: its block is a linear model on the whitened rows.
        deadline : float, optional
            ``now()`` by which the training of gates ends.
        """
        (n, d), drawn = self.inputs.shape, isinstance(gates, str)
        if isinstance(gates, str):
            _check_memory(n, d, n_gates)
            if gates == "trained":
                directions, offsets = self._trained_gates(n_gates, random_state, deadline)
            else:
                directions, offsets = sample_gates(gates, n_gates, self.whitening, random_state)
        else:
            directions, offsets = _split_gates(np.asarray(gates, dtype=np.float64), d)
            _check_memory(n, d, len(offsets))
        if linear:
            directions, offsets = np.hstack([np.zeros((d, 1)), directions]), np.append(1.0, offsets)
        patterns = gate_patterns(self.inputs, self.whitening.mean, directions, offsets)
        kept = first_of_each_pattern(patterns)
        patterns = np.ascontiguousarray(patterns[:, kept])
        program = GatedProgram(gated_operator(self.whitening.rows, patterns, self.readout), self.loss, 1.0)
        directions, offsets = np.ascontiguousarray(directions[:, kept]), offsets[kept]
        if drawn:
            directions, offsets = apart_from_rows(self.inputs, self.whitening, directions, offsets, patterns)
        return directions, offsets, program

    def _trained_gates(
        self, n_gates: int, random_state: np.random.RandomState, deadline: float | None
    ) -> tuple[Float, Float]:
        """First layers of ReLU neurons after a short mini-batch descent: directions (d, P) and offsets (P,)."""
        directions = sample_directions(n_gates, self.whitening, random_state)
        untrained = self.gated_program(*gates_along(self.whitening, directions))
        rng = np.random.default_rng(random_state.randint(2**31))
        settings = GATES_DESCENT if self.convolution is None else IMAGES_DESCENT
        batches = -(-len(self.loss.weights) // settings.batch_size)
        descent = replace(settings, epochs=max(GATES_DESCENT.epochs, -(-GATES_STEPS // batches)))
        program = self.relu_program(AUTO_FRACTION * untrained.max_weight_decay())
        if self.convolution is None:  # batches must not depend on units of columns, as the order of the rows does
            order = balanced_order(program.rows, program.loss)
            inner = self.loss.without_bias.reweighted(order, self.loss.weights[order])
            loss = inner if self.loss.without_bias is self.loss else WithOutputBias.with_decay(inner, 0.0)
            program = ReluProgram(row_matrix(program.rows).of_cases(order), loss, program.weight_decay)
        start = random_start(program, directions, rng)
        neurons, _ = deque(descent.run(program, start, rng, deadline), maxlen=1).pop()
        return gates_along(self.whitening, neurons.first)

    def max_weight_decay_relu(self, *, proved: bool = True, deadline: float | None = None) -> tuple[float, float]:
        """Smallest weight decay at which the zero ReLU network is optimal: local-search value and valid upper bound.

        The two are equal at rank n - 1 if the targets have a formula. Else the bound is infinite unless ``proved``,
        and at a deadline both are what has been found by then.
        """
        if self.has_orthogonal_rows:
            with suppress(closed_form.NoFormulaError):
                return (exact := closed_form.max_weight_decay(self.loss)), exact
        program = self.relu_program(weight_decay=0.0)
        prover = ReluDualBounds(program, directions=np.zeros((0, program.n_inputs)), deadline=deadline)
        dual = self.loss.negative_gradient(np.zeros_like(self.loss.targets))
        lower, upper = prover.dual_norm(dual, proved=proved)
        return lower, self.whitening.stretch * upper


def _split_gates(gates: FloatMatrix, d: int) -> tuple[Float, Float]:
    """Directions (d, P) and offsets (P,) of an array of gates (d, P), or (d + 1, P) with offsets last."""
    if gates.ndim != 2 or gates.shape[0] not in (d, d + 1) or gates.shape[1] == 0:
        raise ValueError(
            f"gates must have shape ({d}, n_gates), or ({d + 1}, n_gates) with offsets last; got {gates.shape}."
        )
    if not np.isfinite(gates).all():
        raise ValueError("gates must be finite.")
    offsets = gates[d] if gates.shape[0] == d + 1 else np.zeros(gates.shape[1])
    return gates[:d], offsets


def _check_memory(n: int, d: int, n_gates: int) -> None:
    """Refuse gates whose directions and patterns do not fit in memory, before allocating them."""
    needed = 8 * n_gates * (2 * d + 2 * n)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * physical:
        raise MemoryError(
            f"{n_gates} gates on {n} rows of {d} features need {needed:.3g} bytes, more than 80 % of the "
            f"{physical:.3g} bytes of this machine; lower n_gates."
        )
