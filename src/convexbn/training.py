"""From raw rows to a program and from its solution to a certified network: what the doors share."""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._threads import numpy_alone
from convexbn._types import Bool, Float, FloatMatrix
from convexbn.certificate import certificate
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.dual_bounds import AllPatterns
from convexbn.data.canonical import canonical_rows, distinct_rows, fingerprint
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.data.whitening import Whitening, whiten
from convexbn.program.convolutional_network import ConvolutionalNetwork
from convexbn.program.gated import GatedProgram
from convexbn.program.gates import first_of_each_pattern, gate_patterns, gates_along, sample_directions, sample_gates
from convexbn.program.losses import Loss, LossKind, SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.pooled_loss import PooledLoss
from convexbn.program.pooled_program import PooledProgram
from convexbn.solvers import closed_form
from convexbn.solvers.base import Budget, Progress, Solution, Solver
from convexbn.solvers.gated.conic import Conic
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from convexbn.solvers.gated.subspace import Subspace
from convexbn.solvers.relu.column_generation import NeuronPricing, Neurons
from convexbn.solvers.relu.large_scale import ManyRows
from convexbn.solvers.relu.local_pricing import LocalPricing
from convexbn.solvers.relu.sgd import StochasticPhase, random_start

#: Fraction of the largest useful weight decay that ``weight_decay="auto"`` takes.
AUTO_FRACTION = 0.02

#: Rows up to which ``solver="auto"`` factorises n x n matrices; beyond the fewer of them only where a factorisation has
#: no more flops than so many pairs of products with the rows.
NEWTON_ROWS, FEW_ROWS, PRODUCTS = 6000, 2500, 20

#: Entries ``n q`` of the whitened rows up to which ReLU networks are priced.
PRICING_ENTRIES = 1 << 20

#: The descent whose neurons are trained gates, and rows that it sees at least, each as often as it takes.
GATES_DESCENT, GATES_ROWS = StochasticPhase(epochs=8, learning_rate=0.2), 250_000

#: Rows beyond which an epoch has so many steps that the polish takes no more than a fifth of the descent's time, which
#: one iteration for this many epochs is: on CIFAR-10 two lower the objective by .4 per cent in the time of two and a
#: half epochs, of which the last three of 15 lower it by 1.7.
FEW_STEPS_ROWS, EPOCHS_A_POLISH = 20_000, 8

#: The descent on images: one is as many patches, which agree on a class.
IMAGES_DESCENT = StochasticPhase(batch_size=100)

#: Share of a time limit that the ReLU solver may take before the proof begins.
SOLVER_SHARE = 0.5

#: Fraction of the tolerance that pricing aims at: the valid bounds need the rest.
PRICING_TOL = 0.1

SOLVERS: dict[str, Callable[..., Solver]] = {
    "group_newton": GroupNewton,
    "proximal": Proximal,
    "subspace": Subspace,
    "conic": Conic,
}


@dataclass(frozen=True)
class TrainingSet:
    """Canonical training rows, their loss and whitening.

    Attributes
    ----------
    X : ndarray (n, d)
        Distinct rows in canonical order.
    loss : Loss
        Loss bound to targets and weights of those rows, as the rows that the first layer sees make its outputs.
    whitening : Whitening
        Whitened rows and statistics.
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
        rank: int | float | None,
        input_eps: float,
        merge_features: bool,
        spectral_filter: float | None = None,
        convolution: Convolution | None = None,
    ) -> TrainingSet:
        """Canonical order, merging and whitening: of the rows, or of the patches of images.

        With ``merge_features`` (ReLU by formula) rows of equal features are merged whatever their targets, where the
        loss depends on their mean: averaged for the squared loss, soft labels for those of classes.
        """
        X, Y, weights = canonical_rows(X, Y, sample_weight)
        mark = fingerprint(X, Y, weights)
        bound = loss(Y, weights)
        if merge_features and bound.depends_on_means:
            X, place = distinct_rows(X)
            bound = bound.merged(place, len(X))
        if convolution is not None:
            bound = PooledLoss.of(bound, convolution.pool)
        inputs: Any = X if convolution is None else PatchMatrix(X, convolution.geometry)
        whitening = whiten(inputs, bound.weights, rank=rank, spectral_filter=spectral_filter, input_eps=input_eps)
        return cls(X, bound, whitening, mark, inputs, convolution)

    def network(self, dense: BatchNormNetwork) -> BatchNormNetwork:
        """A network on what the first layer sees as one on the rows."""
        return dense if self.convolution is None else ConvolutionalNetwork.of(dense, self.convolution)

    @property
    def has_orthogonal_rows(self) -> bool:
        """Whether the whitened rows are square and unfiltered, which the formulas need."""
        square = self.whitening.rank == len(self.X) - 1
        return self.convolution is None and square and not self.whitening.filtered

    def leading(self, rank: int | float | None, spectral_filter: float | None = None) -> TrainingSet:
        """The same rows on fewer directions, or filtered: one SVD serves them all, see ``Whitening.leading``."""
        return replace(self, whitening=self.whitening.leading(rank, spectral_filter))

    def gated_program(self, gates: Float, gate_offsets: Float, weight_decay: float = 1.0) -> GatedProgram:
        """The gated program on these rows."""
        return self._program(gate_patterns(self.inputs, self.whitening.mean, gates, gate_offsets), weight_decay)

    def _program(self, patterns: Bool, weight_decay: float) -> GatedProgram:
        if isinstance(self.loss, PooledLoss):
            return PooledProgram.of(self.whitening.rows, patterns, self.loss, weight_decay)
        return GatedProgram(self.whitening.rows, patterns, self.loss, weight_decay)

    def draw_gates(
        self, gates: str | FloatMatrix, n_gates: int, random_state: np.random.RandomState
    ) -> tuple[Float, Float, GatedProgram]:
        """Sampled or given gates, of equal training patterns the first, (d, P) and (P,), and their program."""
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
        program = self._program(np.ascontiguousarray(patterns[:, kept]), 1.0)
        return np.ascontiguousarray(directions[:, kept]), offsets[kept], program

    def _trained_gates(
        self, n_gates: int, whitening: Whitening, random_state: np.random.RandomState
    ) -> tuple[Float, Float]:
        """First layers of so many ReLU neurons after a short mini-batch descent: (d, P), (P,)."""
        directions = sample_directions(n_gates, whitening, random_state)
        untrained = self.gated_program(*gates_along(whitening, directions))
        rng, n = np.random.default_rng(random_state.randint(2**31)), len(whitening.rows)
        settings = GATES_DESCENT if self.convolution is None else IMAGES_DESCENT
        epochs = max(GATES_DESCENT.epochs, -(-GATES_ROWS // n))
        descent = replace(settings, epochs=epochs).run(
            whitening.rows, self.loss, AUTO_FRACTION * untrained.max_weight_decay(),
            random_start(directions, self.loss, rng), rng,
        )  # fmt: skip
        neurons, _ = deque(descent, maxlen=1).pop()
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
        cases, q = self.loss.of_cases, self.whitening.rank + 1
        dual = cases.negative_gradient(np.zeros_like(cases.targets))
        prover = AllPatterns(self.loss, self.whitening.rows, weight_decay=0.0, directions=np.zeros((0, q)))
        return prover.dual_norm(dual, proved=proved)


@dataclass(frozen=True)
class Fit:
    """A trained network, its certificate and how it was reached."""

    network: BatchNormNetwork
    certificate: Certificate
    history: list[Progress]
    n_iter: int


def fit_gated(
    data: TrainingSet,
    program: GatedProgram,
    gates: Float,
    gate_offsets: Float,
    *,
    solver: str,
    tol: float,
    max_iter: int | None,
    budget: Budget,
    start: Solution | None = None,
) -> Fit:
    """Solve the program of some gates, read the network off its blocks, and have it judged on the raw rows."""
    settings: dict[str, Any] = {"tol": tol} if max_iter is None else {"tol": tol, "max_iter": max_iter}
    method: Solver = SOLVERS[choose_solver(solver, program)](**settings)
    solution = method.solve(program, start, budget).finite()
    network = data.network(
        BatchNormNetwork.from_blocks(data.whitening, solution.gate_index, solution.blocks, gates, gate_offsets)
    )
    proof = certify(
        data, network, program.weight_decay, program, tol=tol, stopped_by=solution.stopped_by, own_rows=True
    )
    return Fit(network, proof, solution.history, solution.n_iter)


def fit_relu(
    data: TrainingSet,
    weight_decay: float,
    *,
    tol: float,
    max_iter: int | None,
    budget: Budget,
    random_state: np.random.RandomState,
    width: int | None = None,
    n_starts: int = 1,
    start: Neurons | None = None,
) -> Fit:
    """Train over all patterns, by formula where there is one and by pricing elsewhere, and have the network judged.

    Of a time limit pricing takes ``SOLVER_SHARE`` at most; the proof has the rest, and no time after a callback has
    asked to stop.
    """
    network, history, stopped_by = _relu_by_formula(data, weight_decay), [], "formula"
    if network is None:
        rng = np.random.default_rng(random_state.randint(2**31))
        share = None if budget.time_limit is None else SOLVER_SHARE * budget.time_limit
        solution = _relu_solver(data, tol, max_iter, width, n_starts).solve(
            data.whitening.rows, data.loss, weight_decay, rng, replace(budget, time_limit=share), start
        )
        dense = BatchNormNetwork.from_neurons(data.whitening, solution.neurons.first, solution.neurons.output)
        network = data.network(dense)
        history, stopped_by = solution.history, solution.stopped_by
    proof = certify(
        data, network, weight_decay, None, tol=tol, stopped_by=stopped_by, own_rows=True,
        deadline=time.monotonic() if stopped_by == "callback" else budget.deadline,
    )  # fmt: skip
    history = history or [Progress(1, proof.objective, proof.lower_bound, network.n_neurons)]
    return Fit(network, proof, history, len(history))


def _relu_solver(
    data: TrainingSet, tol: float, max_iter: int | None, width: int | None, n_starts: int
) -> NeuronPricing | LocalPricing | ManyRows:
    """Pricing, or on many rows mini-batch descents, of which an iteration is an epoch."""
    given: dict[str, Any] = {} if width is None else {"width": width}
    if data.whitening.rows.size > PRICING_ENTRIES:
        descent = StochasticPhase() if data.convolution is None else IMAGES_DESCENT
        epochs = descent.epochs if max_iter is None else max_iter
        if data.convolution is not None:  # on all patches an iteration of the polish takes as long as an epoch
            given |= {"polish": 0}
        elif len(data.whitening.rows) > FEW_STEPS_ROWS:
            given |= {"polish": -(-epochs // EPOCHS_A_POLISH)}
        return ManyRows(**given, n_starts=n_starts, descent=replace(descent, epochs=epochs))
    maxima = isinstance(data.loss, PooledLoss) and not data.loss.pooling.linear
    pricing = LocalPricing if maxima else NeuronPricing
    return pricing(tol=PRICING_TOL * tol, **given, **({} if max_iter is None else {"max_iter": max_iter}))


def _relu_by_formula(data: TrainingSet, weight_decay: float) -> BatchNormNetwork | None:
    """The globally optimal network at rank n - 1 for targets that have a formula, else None."""
    if not data.has_orthogonal_rows:
        return None
    try:
        first, output = closed_form.solve_full_rank(data.whitening.rows, data.loss, weight_decay)
    except closed_form.NoFormulaError:
        return None
    return BatchNormNetwork.from_neurons(data.whitening, first, output)


def certify(
    data: TrainingSet,
    network: BatchNormNetwork,
    weight_decay: float,
    program: GatedProgram | None,
    *,
    tol: float,
    stopped_by: str,
    own_rows: bool,
    deadline: float | None = None,
) -> Certificate:
    """Judge a network on rows, for the gates of a program or as a ReLU network: every answer is recomputed.

    On the rows that it was trained on (``own_rows``) its stored statistics must give the same network. ReLU networks
    are judged over all patterns, by bounds that are tried until ``deadline``.
    """
    phi = data.whitening.filter if data.whitening.filtered else None
    question: dict[str, Any] = {
        "truncated": data.whitening.truncated,
        "spectral_filter": phi,
        "tolerance": tol,
        "stopped_by": stopped_by,
        "statistics": certificate.Statistics(network.mean, network.n_effective) if own_rows else None,
    }
    with numpy_alone():
        if program is None:
            return certificate.certify_relu(
                data.whitening.rows,
                data.loss,
                data.inputs,
                weight_decay,
                **network.neurons(),
                **question,
                deadline=deadline,
            )
        program = program.with_weight_decay(weight_decay)
        return certificate.certify_gated(program, data.inputs, data.whitening.mean, **network.neurons(), **question)


def choose_solver(solver: str, program: GatedProgram) -> str:
    """Resolve ``"auto"``: descent in subspaces, and for the squared loss on few rows Newton on the group scales.

    Newton takes some five factorisations of size ``n``, descent to 1e-6 some sixty pairs of products with the rows.
    Either is the faster on its side of the line, or level, on the twelve data sets of ``benchmarks/choice.py``.
    """
    if isinstance(program.on_rows, PooledLoss):
        if solver not in ("auto", "proximal", "conic"):
            raise ValueError(f"solver={solver!r} is for dense data: use 'proximal' with a convolution.")
        return "proximal" if solver == "auto" else solver
    if solver != "auto":
        return solver
    (q, K), n = program.block_shape, len(program.rows)
    dear = n > FEW_ROWS and n**3 / 3 > PRODUCTS * 4 * n * q * program.n_gates * K
    newton = isinstance(program.loss, SquaredLoss) and n <= NEWTON_ROWS and not dear
    return "group_newton" if newton else "subspace"


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
