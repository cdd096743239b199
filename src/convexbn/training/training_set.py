"""Rows made ready for training: canonical, merged, whitened, with their loss, gates and programs."""

from __future__ import annotations

import functools
import os
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._types import Float, FloatMatrix
from convexbn.certificate.dual_bounds import ReluDualBounds
from convexbn.certificate.question import Question
from convexbn.data.canonical import canonical_rows, distinct_rows, fingerprint
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.data.whitening import Whitening, whiten
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.gates import first_of_each_pattern, gate_patterns, gates_along, sample_directions, sample_gates
from convexbn.program.losses import Loss, LossKind
from convexbn.program.readout import Readout, readout_of
from convexbn.program.relu import ReluProgram
from convexbn.solvers import closed_form
from convexbn.solvers.relu.sgd import SGD, random_start

#: Fraction of the largest useful weight decay that ``weight_decay="auto"`` takes.
AUTO_FRACTION = 0.02

#: The descent whose neurons are trained gates, and rows that it sees at least, each as often as it takes.
GATES_DESCENT, GATES_ROWS = SGD(epochs=8, learning_rate=0.2), 250_000

#: The descent on images: one is as many patches, which agree on a class.
IMAGES_DESCENT = SGD(batch_size=100)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Canonical training rows, their loss and whitening.

    Attributes
    ----------
    X : ndarray (n, d)
        Distinct rows in canonical order.
    loss : Loss
        Loss bound to targets and weights of those rows.
    whitening : Whitening
        Whitened rows and statistics, of the patches where the rows are images.
    fingerprint : str
        Hash of the canonical rows, targets and weights.
    inputs : ndarray (n, d), or PatchMatrix
        What the first layer sees: the rows, or the patches of the images.
    convolution : Convolution or None
        Where the rows are images, of whose patches the first layer is made.
    """

    X: FloatMatrix
    loss: Loss
    whitening: Whitening
    fingerprint: str
    inputs: Any
    convolution: Convolution | None = None

    @classmethod
    def prepare(
        cls,
        X: FloatMatrix,
        Y: Float,
        sample_weight: Float,
        *,
        loss: LossKind,
        merge_features: bool = True,
        convolution: Convolution | None = None,
        **whitening: Any,
    ) -> TrainingSet:
        """Canonical order, merging and whitening: of the rows, or of the patches of images.

        Parameters
        ----------
        X : ndarray (n, d)
            Finite rows of any real type.
        Y : ndarray (n, K)
            Targets as the loss takes them.
        sample_weight : ndarray (n,)
            Weights, not negative; rows of weight zero are left out.
        loss : callable
            Binds targets and weights to a loss.
        merge_features : bool, default=True
            Whether rows of equal features are merged whatever their targets, where the loss depends on their mean:
            averaged for the squared loss, soft labels for those of classes. Formulas and exact ReLU training need it.
        convolution : Convolution, optional
            Where the rows are flattened images.
        **whitening
            ``rank``, ``spectral_filter`` and ``input_eps``, as in ``whiten``.
        """
        X, Y, weights = canonical_rows(X, Y, sample_weight)
        mark = fingerprint(X, Y, weights)
        bound = loss(Y, weights)
        if merge_features and bound.depends_on_means:
            X, place = distinct_rows(X)
            bound = bound.merged(place, len(X))
        inputs: Any = X if convolution is None else PatchMatrix(X, convolution.geometry)
        row_weights = readout_of(convolution).row_weights(bound.weights)
        return cls(X, bound, whiten(inputs, row_weights, **whitening), mark, inputs, convolution)

    @property
    def readout(self) -> Readout:
        """What the loss sees of the hidden units of a case's rows."""
        return readout_of(self.convolution)

    @property
    def row_weights(self) -> Float:
        """Weights of what the first layer sees."""
        return self.readout.row_weights(self.loss.weights)

    @property
    def has_orthogonal_rows(self) -> bool:
        """Whether the whitened rows are square and unfiltered, which the formulas need."""
        square = self.whitening.rank == len(self.X) - 1
        return self.convolution is None and square and not self.whitening.filtered

    def leading(self, rank: int | float | None, spectral_filter: float | None = None) -> TrainingSet:
        """The same rows on fewer directions, or filtered: one SVD serves them all, see ``Whitening.leading``."""
        return replace(self, whitening=self.whitening.leading(rank, spectral_filter))

    def relu_program(self, weight_decay: float) -> ReluProgram:
        """The ReLU program on these rows."""
        return ReluProgram(self.whitening.rows, self.loss, weight_decay, self.readout)

    def gated_program(self, gates: Float, gate_offsets: Float, weight_decay: float = 1.0) -> GatedProgram:
        """The gated program on these rows, of gates (d, P) with offsets (P,)."""
        patterns = gate_patterns(self.inputs, self.whitening.mean, gates, gate_offsets)
        return GatedProgram(gated_operator(self.whitening.rows, patterns, self.readout), self.loss, weight_decay)

    def question(self, program: GatedProgram | ReluProgram, tol: float) -> Question:
        """What a network on these rows is judged by."""
        phi = self.whitening.filter if self.whitening.filtered else None
        return Question(self.inputs, self.whitening.mean, program, tol, self.whitening.truncated, phi)

    def draw_gates(
        self, gates: str | FloatMatrix, n_gates: int, random_state: np.random.RandomState
    ) -> tuple[Float, Float, GatedProgram]:
        """Sampled or given gates, of equal training patterns the first, (d, P) and (P,), and their program.

        Parameters
        ----------
        gates : {"data", "whitened", "trained"} or ndarray (d, P) or (d + 1, P)
            How gates are drawn, or the gates, with offsets in the last row if there is one.
        n_gates : int
            Number of draws.
        random_state : numpy.random.RandomState
        """
        n, d = self.inputs.shape
        if isinstance(gates, str):
            check_memory(n, d, n_gates)
            drawn = self._trained_gates if gates == "trained" else functools.partial(sample_gates, gates)
            directions, offsets = drawn(n_gates, self.whitening, random_state)
        else:
            directions, offsets = split_gates(np.asarray(gates, dtype=np.float64), d)
            check_memory(n, d, len(offsets))
        patterns = gate_patterns(self.inputs, self.whitening.mean, directions, offsets)
        kept = first_of_each_pattern(patterns)
        patterns = np.ascontiguousarray(patterns[:, kept])
        program = GatedProgram(gated_operator(self.whitening.rows, patterns, self.readout), self.loss, 1.0)
        return np.ascontiguousarray(directions[:, kept]), offsets[kept], program

    def _trained_gates(
        self, n_gates: int, whitening: Whitening, random_state: np.random.RandomState
    ) -> tuple[Float, Float]:
        """First layers of so many ReLU neurons after a short mini-batch descent: (d, P), (P,)."""
        directions = sample_directions(n_gates, whitening, random_state)
        untrained = self.gated_program(*gates_along(whitening, directions))
        rng, n = np.random.default_rng(random_state.randint(2**31)), len(whitening.rows)
        settings = GATES_DESCENT if self.convolution is None else IMAGES_DESCENT
        descent = replace(settings, epochs=max(GATES_DESCENT.epochs, -(-GATES_ROWS // n)))
        program = self.relu_program(AUTO_FRACTION * untrained.max_weight_decay())
        neurons, _ = deque(descent.run(program, random_start(program, directions, rng), rng), maxlen=1).pop()
        return gates_along(whitening, neurons.first)

    def max_weight_decay_relu(self, *, proved: bool = True) -> tuple[float, float]:
        """Smallest weight decay at which the zero ReLU network is optimal: local-search value and valid upper bound.

        Equal at rank n - 1 where the targets have a formula; elsewhere infinity stands for a bound that is not asked
        for.
        """
        if self.has_orthogonal_rows:
            try:
                return (exact := closed_form.max_weight_decay(self.loss)), exact
            except closed_form.NoFormulaError:
                pass
        program = self.relu_program(weight_decay=0.0)
        prover = ReluDualBounds(program, directions=np.zeros((0, program.n_inputs)))
        return prover.dual_norm(self.loss.negative_gradient(np.zeros_like(self.loss.targets)), proved=proved)


def split_gates(gates: FloatMatrix, d: int) -> tuple[Float, Float]:
    """Directions (d, P) and offsets (P,) of an array of gates (d, P), or (d + 1, P) with offsets last."""
    if gates.ndim != 2 or gates.shape[0] not in (d, d + 1) or gates.shape[1] == 0:
        raise ValueError(
            f"gates must have shape ({d}, n_gates), or ({d + 1}, n_gates) with offsets last; got {gates.shape}."
        )
    if not np.isfinite(gates).all():
        raise ValueError("gates must be finite.")
    offsets = gates[d] if gates.shape[0] == d + 1 else np.zeros(gates.shape[1])
    return gates[:d], offsets


def check_memory(n: int, d: int, n_gates: int) -> None:
    """Refuse gates whose directions and patterns cannot fit in memory, before allocating them."""
    needed = 8 * n_gates * (2 * d + 2 * n)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * physical:
        raise MemoryError(
            f"{n_gates} gates on {n} rows of {d} features need {needed:.3g} bytes, more than 80 % of the "
            f"{physical:.3g} bytes of this machine; lower n_gates."
        )
