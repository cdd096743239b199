"""How far a network that was trained elsewhere is from the best network, and why.

Our own solvers split the gap of the certificate: they train the network's neurons further, and a network of any width
from scratch. The training left what the first run wins; what the second wins beyond needs other or more neurons; the
rest, down to the lower bound, is not proved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from convexbn._threads import blas_threads
from convexbn._types import Float, is_over
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import Status, status_of
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.program.layers import Layers
from convexbn.program.neurons import Neurons, merge
from convexbn.program.output_bias import WithOutputBias
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget
from convexbn.solvers.relu.lbfgs import lbfgs
from convexbn.solvers.relu.newton import polish
from convexbn.training.audit_report import Audit, Cause, explanation_of
from convexbn.training.fit import fit_relu, judge_on
from convexbn.training.relu_conversion import neurons_of
from convexbn.training.trained_objective import Objective
from convexbn.training.training_set import TrainingSet

#: Share of the time, and iterations, in which the network's own neurons are trained further.
_FURTHER_SHARE, _ITERATIONS = 0.2, 2000


def audit(
    layers: Layers, X: Float, objective: Objective, *, deep: bool = False, tol: float = 1e-6,
    time_limit: float | None = None, random_state: int = 0, convolution: Convolution | None = None,
) -> Audit:  # fmt: skip
    """Judge trained layers on the rows and the objective of their training.

    Parameters
    ----------
    layers : Layers
        An output bias other than zero becomes part of the program.
    X : ndarray (n, d)
        Inputs of the layers.
    objective : Objective
        With targets for the same rows.
    deep : bool
        Whether ``X`` are features of a deeper network.
    tol, time_limit, random_state
        As in ``Effort``.
    convolution : Convolution, optional
        If given, ``X`` are images, and the layers see their patches.

    Raises
    ------
    ValueError
        When the rows do not fit the layers and the targets, or a neuron does not vary over them.
    """
    seen = X if convolution is None else np.asarray(PatchMatrix(X, convolution.geometry), dtype=np.float64)
    _check(layers, seen, len(X), objective, tol, time_limit)
    budget, loss = Budget(time_limit), objective.loss
    with blas_threads(len(X)):
        batch = layers.with_statistics_of(seen)
        data = TrainingSet.prepare(X, loss.targets, np.ones(len(X)), loss=loss.kind, convolution=convolution)
        if batch.output_bias.any():
            data = replace(data, loss=WithOutputBias.with_decay(data.loss, objective.bias_decay))
        network = replace(batch.network(seen), convolution=convolution)
        program, neurons = data.relu_program(objective.weight_decay), neurons_of(data, network).balanced()
        network = replace(network, output_bias=data.output_bias(lambda: program.outputs(neurons)))
        alone = judge_on(data, network, program, tol=tol, deadline=0.0)
        case = _Case(data, program, objective, neurons, alone, tol)
        found = _Found(None, True, alone.objective, case.n_neurons, alone.lower_bound, alone.bound)
        if time_limit != 0 and alone.status in (Status.GAP_OPEN, Status.RESTRICTED):
            found = _search(case, budget, random_state)
        outputs = batch.predict(seen)
        return _report(
            case, found, deep=deep, distinct=len(data.X) == len(X), objective=objective.value(layers, outputs),
            loss=loss.value(outputs), stored_loss=loss.value(layers.predict(seen)),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Case:
    """The program, and the network that is judged: balanced, on the whitened rows, with its own certificate."""

    data: TrainingSet
    program: ReluProgram
    objective: Objective
    neurons: Neurons
    alone: Certificate
    tol: float

    @property
    def n_neurons(self) -> int:
        return len(self.neurons.output)


@dataclass(frozen=True)
class _Found:
    """Objectives, neurons and bound that our own training found, in the units of the summed loss."""

    trained_on: float | None
    in_time: bool
    best: float
    n_neurons: int
    lower_bound: float
    bound: str


def _search(case: _Case, budget: Budget, random_state: int) -> _Found:
    """Train the neurons further, train our own network, and bound the program by its dual point."""
    data, program, alone = case.data, case.program, case.alone
    soon = budget.until(_FURTHER_SHARE)
    further = lbfgs(program, case.neurons, _ITERATIONS, soon)
    if program.readout.linear:
        further = polish(program.on_rows, further, deadline=soon)
    in_time = not is_over(soon)
    reached = min(program.objective(further), alone.objective)
    rest = Budget(None if budget.time_limit is None else (1 - _FURTHER_SHARE) * budget.time_limit)
    rng = np.random.default_rng(np.random.RandomState(random_state).randint(2**31))
    ours = fit_relu(data, program.weight_decay, tol=case.tol, budget=rest, rng=rng, proof_time=np.inf)
    best, n_neurons = min(
        (alone.objective, case.n_neurons),
        (reached, len(merge(further).output)),
        (ours.certificate.objective, len(merge(neurons_of(data, ours.network)).output)),
    )
    lower, bound = max((proof.lower_bound, proof.bound) for proof in (alone, ours.certificate))
    return _Found(reached, in_time, best, n_neurons, lower, bound)


def _report(
    case: _Case, found: _Found, *, deep: bool, distinct: bool, objective: float, loss: float, stored_loss: float
) -> Audit:
    alone, factor, reached = case.alone, case.objective.loss.factor, case.alone.objective
    lower = reached if 0 > reached - found.lower_bound > -1e-9 * abs(reached) else found.lower_bound
    relative = (reached - lower) / reached if reached else 0.0
    estimated = alone.estimated_gap if found.trained_on is None else (reached - found.best) / reached
    status = status_of(
        relative, case.tol, trivial=alone.status is Status.TRIVIAL, stopped_by=alone.stopped_by, estimated=estimated
    )
    bias = ", with an output bias" if isinstance(case.data.loss, WithOutputBias) else ""
    report = Audit(
        objective=objective, balanced_objective=factor * reached, lower_bound=factor * lower, tol=case.tol,
        status=status, cause=_cause(case, found, status, lower), explanation="",
        scope=f"{'the last two layers on these features' if deep else 'the network'}, of any width{bias}"
        f"{case.data.whitening.cut}",
        factor=factor, weight_decay=case.program.weight_decay, n_neurons=case.n_neurons,
        loss=loss, stored_loss=stored_loss,
        trained_on_objective=None if found.trained_on is None else factor * found.trained_on,
        best_known=factor * found.best, best_n_neurons=found.n_neurons,
        universal=deep and distinct and found.bound == "orthant", certificate=alone,
    )  # fmt: skip
    return replace(report, explanation=explanation_of(report, found.bound, found.in_time))


def _cause(case: _Case, found: _Found, status: Status, lower: float) -> Cause:
    """The largest part of the gap; without a search, the cause that the estimate suggests."""
    if status not in (Status.GAP_OPEN, Status.RESTRICTED):
        return Cause.NONE
    if found.trained_on is None:
        return Cause.BOUND if status is Status.RESTRICTED else Cause.OPTIMISATION
    training_left, others = case.alone.objective - found.trained_on, found.trained_on - found.best
    if found.best - lower >= max(training_left, others):
        return Cause.BOUND
    if training_left >= others or case.n_neurons >= found.n_neurons or not found.in_time:
        return Cause.OPTIMISATION
    return Cause.WIDTH


def _check(layers: Layers, X: Float, n_cases: int, objective: Objective, tol: float, time_limit: float | None) -> None:
    d, n = len(layers.weight), len(objective.loss.targets)
    if X.ndim != 2 or X.shape[1] != d or len(X) < 2:
        raise ValueError(f"X must have two rows or more, of {d} features; got shape {X.shape}.")
    if n_cases != n:
        raise ValueError(f"X has {n_cases} rows and y has {n}: give one target for each row.")
    if not np.isfinite(X).all():
        raise ValueError("X must be finite: drop the rows that are not, or fill their gaps.")
    _check_effort(tol, time_limit)


class Effort(TypedDict, total=False):
    """Keywords of the functions that certify modules.

    The relative gap that counts as optimal; seconds for our own training and the proof (0: the cheapest bound alone,
    None: a stated amount of work); and the seed of our own training.
    """

    tol: float
    time_limit: float | None
    random_state: int


def effort_of(function: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with defaults for those that are not given.

    Parameters
    ----------
    function : str
        The function's name, for the error message.
    defaults, given : mapping

    Raises
    ------
    TypeError
        For an unknown keyword.
    ValueError
        For a tolerance or a time limit that is negative or not a number.
    """
    if unknown := set(given) - set(defaults):
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown.pop()!r}")
    effort = {**defaults, **given}
    _check_effort(effort["tol"], effort["time_limit"])
    return effort


def _check_effort(tol: float, time_limit: float | None) -> None:
    if not 0 <= tol < np.inf:
        raise ValueError(f"tol must be a number that is not negative, got {tol}.")
    if time_limit is not None and not time_limit >= 0:
        raise ValueError(f"time_limit must not be negative, got {time_limit}.")
