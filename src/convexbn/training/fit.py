"""Certified networks from a training set: program, solver and judge put together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._threads import single_scipy_blas
from convexbn._types import Float, now
from convexbn.certificate.certificate import Certificate, certify
from convexbn.certificate.dual_bounds import NOTHING_KNOWN, KnownBound
from convexbn.program.gated import GateBlocks, GatedProgram, MaskedRows
from convexbn.program.losses import SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Progress, Solution, Solver, nonzero
from convexbn.solvers.closed_form import ClosedForm, NoFormulaError
from convexbn.solvers.gated.conic import Conic
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from convexbn.solvers.gated.subspace import Subspace
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn.solvers.relu.large_scale import LargeScale
from convexbn.solvers.relu.sgd import SGD
from convexbn.training.held_out import Choice, held_out_choice
from convexbn.training.training_set import IMAGES_DESCENT, TrainingSet

#: ``solver="auto"`` factorises n x n matrices up to ``NEWTON_ROWS`` rows; beyond ``FEW_ROWS`` only if a factorisation
#: has no more flops than ``PRODUCTS`` pairs of products with the rows.
NEWTON_ROWS, FEW_ROWS, PRODUCTS = 6000, 4500, 20

#: Beyond ``FEW_STEPS_ROWS`` rows the polish takes at most a fifth of the descent's time: one iteration for every
#: ``EPOCHS_A_POLISH`` epochs. On CIFAR-10 two iterations lower the objective by .4 per cent in the time of two and a
#: half epochs; the last three of 15 epochs lower it by 1.7.
FEW_STEPS_ROWS, EPOCHS_A_POLISH = 20_000, 8

WIDTHS = 100, 1000  # fewest and most neurons by default on many rows: twice the inputs

CRUDE = 1e-2  # relative gap of the solutions by which held-out rows choose a weight decay, and their most iterations
CRUDE_STEPS = {"subspace": {"max_iter": 5}, "proximal": {"max_iter": 20}}

PRICING_ENTRIES = 1 << 20  # n q of the whitened rows up to which column generation trains ReLU networks
PRICING_TOL = 0.1  # fraction of the tolerance that pricing aims at: the valid bounds need the rest
SOLVER_SHARE = 0.5  # of a time limit that the ReLU solver may take before the proof begins
LEAST_PROOF = 1.0  # seconds of a proof beyond the time of the solver: in low dimension it is exact by then

#: Shares of a time limit by which the search for "auto" weight decay and the training of gates end, and the solver of a
#: gated program: the judge takes the rest.
SEARCH_SHARE, GATES_SHARE, GATED_SHARE = 0.15, 0.4, 0.9

#: Solvers of gated programs by their public names.
SOLVERS: dict[str, Callable[..., Solver[GatedProgram, GateBlocks]]] = {
    "group_newton": GroupNewton, "proximal": Proximal, "subspace": Subspace, "conic": Conic,
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A trained network, its certificate, and the solver's history."""

    network: BatchNormNetwork
    certificate: Certificate
    history: list[Progress]
    n_iter: int


def fit_gated(
    data: TrainingSet, program: GatedProgram, gates: tuple[Float, Float], *, solver: str = "auto", tol: float = 1e-6,
    max_iter: int | None = None, budget: Budget | None = None, start: GateBlocks | None = None,
) -> Fit:  # fmt: skip
    """Solve a gated program, read the network off its blocks, and have it judged on the raw rows.

    Parameters
    ----------
    data, program : TrainingSet, GatedProgram
        The program is on the rows of ``data``.
    gates : (ndarray (d, P), ndarray (P,))
        Directions and offsets of the program's gates.
    solver : str
        A name of ``SOLVERS``, or ``"auto"``.
    tol, max_iter : float, int or None
        Relative gap that counts as optimal, and limit of the iterations; None for the solver's own limit.
    budget, start : Budget, GateBlocks, optional
        Limits of time, and a warm start.

    Raises
    ------
    TypeError
        For a solver that does not take the program.
    """
    settings: dict[str, Any] = {"tol": tol} if max_iter is None else {"tol": tol, "max_iter": max_iter}
    method = SOLVERS[choose_solver(solver, program)](**settings)
    budget = budget or Budget()
    limit = None if budget.time_limit is None else GATED_SHARE * budget.time_limit
    solution = _Unbroken(method, tol).solve(program, start, replace(budget, time_limit=limit))
    index, values = solution.weights
    if not np.isfinite(values).all():
        solution = replace(solution, weights=GateBlocks(index[:0], values[:0]), stopped_by="numerical")
    network = BatchNormNetwork.from_blocks(data.whitening, solution.weights, *gates, data.convolution)
    network = replace(network, output_bias=data.output_bias(lambda: program.outputs(*solution.weights)))
    proof = judge_on(data, network, program, tol=tol, stopped_by=solution.stopped_by, own_rows=True)
    return Fit(network, proof, solution.history, solution.n_iter)


@dataclass(frozen=True)
class _Unbroken(Solver[GatedProgram, GateBlocks]):
    """A solver; where rounding breaks it, the same without the start, then descent; at last the zero network."""

    method: Solver[GatedProgram, GateBlocks]
    tol: float

    def _solve(
        self, program: GatedProgram, start: GateBlocks | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[GateBlocks]:
        attempts = [(self.method, start)] if start is None else [(self.method, start), (self.method, None)]
        if isinstance(program.operator, MaskedRows):
            attempts.append((Subspace(self.tol), None))
        for solver, begin in attempts:
            with suppress(np.linalg.LinAlgError):
                return solver.solve(program, begin, budget)
        return Solution(nonzero(np.zeros((program.n_gates, *program.block_shape))), "numerical")


def fit_relu(
    data: TrainingSet, weight_decay: float, *, solver: ReluSettings | None = None, tol: float = 1e-6,
    budget: Budget | None = None, rng: np.random.Generator | None = None, start: Neurons | None = None,
    proof_time: float | None = None,
) -> Fit:  # fmt: skip
    """Train over all patterns, by formula if there is one and else by search, and have the network judged.

    The solver takes at most ``SOLVER_SHARE`` of a time limit, the proof the rest. A callback that asks to stop leaves
    the proof no time.

    Parameters
    ----------
    data, weight_decay, solver : TrainingSet, float, ReluSettings
    tol : float
        Relative gap that counts as optimal.
    proof_time : float, optional
        Seconds for the proof, within the time limit; infinity: a stated amount of work. By default the rest of a time
        limit, without one as long as the solver took and ``LEAST_PROOF`` more.
    budget, rng, start : Budget, numpy.random.Generator, Neurons, optional
        Limits of time, the source of random neurons and batches, and a warm start.
    """
    program, budget, began = data.relu_program(weight_decay), budget or Budget(), now()
    solution = None
    if data.has_orthogonal_rows:
        with suppress(NoFormulaError):
            solution = ClosedForm().solve(program)
    if solution is None:
        share = None if budget.time_limit is None else SOLVER_SHARE * budget.time_limit
        method = (solver or ReluSettings()).solver_for(data, tol)
        solution = method.solve(program, start, replace(budget, time_limit=share), rng)
    network = BatchNormNetwork.from_neurons(data.whitening, solution.weights, data.convolution)
    network = replace(network, output_bias=data.output_bias(lambda: program.outputs(solution.weights)))
    if proof_time is None and budget.time_limit is None:
        proof_time = now() - began + LEAST_PROOF
    deadline = now() if solution.stopped_by == "callback" else budget.sooner(proof_time)
    proof = judge_on(data, network, program, tol=tol, stopped_by=solution.stopped_by, own_rows=True, deadline=deadline)
    history = solution.history or [Progress(1, proof.objective, proof.lower_bound, network.n_neurons)]  # by formula
    return Fit(network, proof, history, len(history))


@dataclass(frozen=True)
class ReluSettings:
    """Settings of ReLU training.

    Parameters
    ----------
    width, max_iter : int or None
        Neurons to begin with, and rounds of column generation or, on many rows, epochs; None for the solver's own.
    n_starts : int
        Mini-batch descents whose mean is the network, on many rows.
    """

    width: int | None = None
    n_starts: int = 1
    max_iter: int | None = None

    def solver_for(self, data: TrainingSet, tol: float) -> Solver[ReluProgram, Neurons]:
        """Column generation, or on many rows mini-batch descents, one epoch an iteration."""
        given: dict[str, Any] = {} if self.width is None else {"width": self.width}
        if data.whitening.rows.size <= PRICING_ENTRIES:
            return ColumnGeneration(tol=PRICING_TOL * tol, max_iter=self.max_iter, **given)
        if data.convolution is None:  # more neurons than a table needs take more passes over it
            given = {"width": int(np.clip(2 * data.whitening.rows.shape[1], *WIDTHS))} | given
        descent = SGD() if data.convolution is None else IMAGES_DESCENT
        epochs = descent.epochs if self.max_iter is None else self.max_iter
        if data.convolution is not None:  # on all patches an iteration of the polish takes as long as an epoch
            given |= {"polish": 0}
        elif len(data.whitening.rows) > FEW_STEPS_ROWS:
            given |= {"polish": -(-epochs // EPOCHS_A_POLISH)}
        return LargeScale(**given, n_starts=self.n_starts, descent=replace(descent, epochs=epochs))


def chosen_weight_decay(program: GatedProgram, budget: Budget) -> Choice:
    """Weight decay that held-out rows choose for a gated program, by crude solutions; 1 if none is useful."""
    kind = choose_solver("auto", program)
    crude = SOLVERS[kind](tol=CRUDE, **CRUDE_STEPS.get(kind, {}))
    return held_out_choice(program, _Unbroken(crude, CRUDE), budget)


def judge_on(
    data: TrainingSet, network: BatchNormNetwork, program: GatedProgram | ReluProgram, *, tol: float = 1e-6,
    stopped_by: str = "tolerance", own_rows: bool = False, deadline: float | None = None,
    known: KnownBound = NOTHING_KNOWN,
) -> Certificate:  # fmt: skip
    """Judge a network from the raw rows of a training set, for the gates of a program or as a ReLU network.

    Parameters
    ----------
    data, network, program : TrainingSet, BatchNormNetwork, GatedProgram or ReluProgram
        The program is on the rows of ``data``.
    tol, stopped_by, own_rows, deadline, known
        As in ``certificate.certify``, ``tol`` in its question.
    """
    with single_scipy_blas():
        question = data.question(program, tol)
        return certify(question, network, stopped_by=stopped_by, own_rows=own_rows, deadline=deadline, known=known)


def choose_solver(solver: str, program: GatedProgram) -> str:
    """Resolve ``"auto"``: descent in subspaces, or for the squared loss on few rows Newton on the group scales.

    Newton takes some five factorisations of size ``n``, descent to 1e-6 some sixty pairs of products with the rows.
    On the twelve data sets of ``benchmarks/choice.py`` neither is slower than the other on its side of the line.
    """
    if solver != "auto":
        return solver
    if not isinstance(program.operator, MaskedRows):
        return "proximal"
    (q, K), n = program.block_shape, len(program.operator.rows)
    dear = n > FEW_ROWS and n**3 / 3 > PRODUCTS * 4 * n * q * program.n_gates * K
    newton = isinstance(program.loss.without_bias, SquaredLoss) and n <= NEWTON_ROWS and not dear
    return "group_newton" if newton else "subspace"
