"""From raw rows to a program and from its solution to a certified network: what the doors share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._threads import numpy_alone
from convexbn._types import Float
from convexbn.certificate import certificate
from convexbn.certificate.certificate import Certificate
from convexbn.program.gated import GatedProgram
from convexbn.program.losses import SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.pooled_loss import PooledLoss
from convexbn.solvers import closed_form
from convexbn.solvers.base import Budget, Progress, Solution, Solver
from convexbn.solvers.gated.conic import Conic
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from convexbn.solvers.gated.subspace import Subspace
from convexbn.solvers.relu.column_generation import NeuronPricing, Neurons
from convexbn.solvers.relu.large_scale import ManyRows
from convexbn.solvers.relu.local_pricing import LocalPricing
from convexbn.solvers.relu.sgd import StochasticPhase
from convexbn.training.training_set import IMAGES_DESCENT, TrainingSet

#: Rows up to which ``solver="auto"`` factorises n x n matrices; beyond the fewer of them only where a factorisation has
#: no more flops than so many pairs of products with the rows.
NEWTON_ROWS, FEW_ROWS, PRODUCTS = 6000, 2500, 20

#: Entries ``n q`` of the whitened rows up to which ReLU networks are priced.
PRICING_ENTRIES = 1 << 20


#: Rows beyond which an epoch has so many steps that the polish takes no more than a fifth of the descent's time, which
#: one iteration for this many epochs is: on CIFAR-10 two lower the objective by .4 per cent in the time of two and a
#: half epochs, of which the last three of 15 lower it by 1.7.
FEW_STEPS_ROWS, EPOCHS_A_POLISH = 20_000, 8


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
