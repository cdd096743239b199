"""How far a network that was trained elsewhere is from the best there is, and why.

The gap of a certificate is split by what our own solvers reach: the same neurons trained on from where they stand, and
a network of any width from scratch. What the first wins was left by the training, what the second wins beyond needs
other or more neurons, and what remains above the lower bound is not proved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from convexbn._threads import blas_threads
from convexbn._types import Float
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import Status, status_of
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.program.layers import Layers
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons, merge
from convexbn.program.output_bias import WithOutputBias
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget
from convexbn.solvers.relu.lbfgs import lbfgs
from convexbn.solvers.relu.newton import polish
from convexbn.training.audit_report import Audit, Cause, explanation_of, scope_of
from convexbn.training.fit import Fit, fit_relu, judged
from convexbn.training.relu_conversion import neurons_of
from convexbn.training.trained_objective import Objective
from convexbn.training.training_set import TrainingSet

#: Share of the time for training the network's own neurons on.
_FURTHER_SHARE = 0.2

#: Iterations of training the network's own neurons on.
_ITERATIONS = 2000


def audit(
    layers: Layers,
    X: Float,
    objective: Objective,
    *,
    deep: bool = False,
    tol: float = 1e-6,
    time_limit: float | None = None,
    random_state: int = 0,
    convolution: Convolution | None = None,
) -> Audit:
    """Judge layers that were trained on rows for an objective.

    Parameters
    ----------
    layers : Layers
        An output bias of zero counts as none; another is part of the program.
    X : ndarray (n, d)
        Inputs of the layers.
    objective : Objective
        With targets of the same rows.
    deep : bool
        Whether ``X`` are features of a deeper network.
    tol : float
        Relative gap that counts as optimal.
    time_limit : float or None
        Seconds for our own training and the proof; 0: the cheapest bound alone; None: their stated work.
    random_state : int
        For our own training.
    convolution : Convolution, optional
        Where ``X`` are images, and the layers are of their patches.

    Raises
    ------
    ValueError
        When the rows do not fit the layers and the targets, or a neuron does not vary over them.
    """
    seen = X if convolution is None else np.asarray(PatchMatrix(X, convolution.geometry), dtype=np.float64)
    _check(layers, seen, len(X), objective, tol, time_limit)
    budget = Budget(time_limit)
    with blas_threads(len(X)):
        batch = layers.with_statistics_of(seen)
        case = _Case.prepare(batch, X, seen, objective, tol, convolution)
        alone = case.certified(case.network, deadline=0.0)
        found = _Found.nothing(alone, case.n_neurons)
        if time_limit != 0 and alone.status in (Status.GAP_OPEN, Status.RESTRICTED):
            found = _search(case, alone, budget, random_state)
        outputs = batch.predict(seen)
        return _report(
            case, alone, found, deep=deep,
            trained=objective.value(layers, outputs),
            loss=objective.loss.value(outputs),
            stored=objective.loss.value(layers.predict(seen)),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Case:
    """The question and the network that is judged."""

    data: TrainingSet
    program: ReluProgram
    objective: Objective
    network: BatchNormNetwork
    n_rows: int
    tol: float

    @classmethod
    def prepare(
        cls, batch: Layers, X: Float, seen: Float, objective: Objective, tol: float, convolution: Convolution | None
    ) -> _Case:
        """Rows, program and network of layers with the statistics of ``seen``."""
        loss = objective.loss
        data = TrainingSet.prepare(X, loss.targets, np.ones(len(X)), loss=loss.kind, convolution=convolution)
        if batch.output_bias.any():
            data = replace(data, loss=WithOutputBias.with_decay(data.loss, objective.bias_decay))
        network = replace(batch.network(seen), convolution=convolution)
        return cls(data, data.relu_program(objective.weight_decay), objective, network, len(X), tol)

    @property
    def has_bias(self) -> bool:
        return isinstance(self.data.loss, WithOutputBias)

    @property
    def neurons(self) -> Neurons:
        """The network on the whitened rows, balanced."""
        return neurons_of(self.data, self.network).balanced()

    @property
    def n_neurons(self) -> int:
        return len(self.neurons.output)

    def certified(self, network: BatchNormNetwork, deadline: float | None) -> Certificate:
        return judged(self.data, network, self.program, tol=self.tol, deadline=deadline)

    def trained_on(self, deadline: float | None) -> Neurons:
        """The network's own neurons or fewer, at a stationary point."""
        found = lbfgs(self.program, self.neurons, _ITERATIONS, deadline)
        return polish(self.program.on_rows, found, deadline=deadline) if self.program.readout.linear else found

    def of_any_width(self, budget: Budget, random_state: int) -> Fit:
        """Network of our own, by formula or column generation."""
        rng = np.random.default_rng(np.random.RandomState(random_state).randint(2**31))
        return fit_relu(self.data, self.program.weight_decay, tol=self.tol, budget=budget, rng=rng)


@dataclass(frozen=True)
class _Found:
    """What our own training found, in the units of the summed loss."""

    trained_on: float | None
    in_time: bool
    best: float
    n_neurons: int
    lower_bound: float
    bound: str

    @classmethod
    def nothing(cls, alone: Certificate, n_neurons: int) -> _Found:
        return cls(None, True, alone.objective, n_neurons, alone.lower_bound, alone.bound)


def _search(case: _Case, alone: Certificate, budget: Budget, random_state: int) -> _Found:
    """Train the neurons on, train our own network, and bound the program by its dual point."""
    limit = budget.time_limit
    soon = None if limit is None else budget.started + _FURTHER_SHARE * limit
    further = case.trained_on(soon)
    in_time = soon is None or time.monotonic() < soon
    reached = min(case.program.objective(further), alone.objective)
    rest = Budget(None if limit is None else (1 - _FURTHER_SHARE) * limit)
    ours = case.of_any_width(rest, random_state)
    known = [(reached, _width(further)), (ours.certificate.objective, _width(neurons_of(case.data, ours.network)))]
    best, n_neurons = min([(alone.objective, case.n_neurons), *known])
    lower, bound = max((proof.lower_bound, proof.bound) for proof in (alone, ours.certificate))
    return _Found(reached, in_time, best, n_neurons, lower, bound)


def _width(neurons: Neurons) -> int:
    """Neurons that matter, those that are alike counted once."""
    return len(merge(neurons).output)


def _report(
    case: _Case, alone: Certificate, found: _Found, *, deep: bool, trained: float, loss: float, stored: float
) -> Audit:
    reached, factor = alone.objective, case.objective.loss.factor
    lower = reached if 0 > reached - found.lower_bound > -1e-9 * abs(reached) else found.lower_bound
    relative = (reached - lower) / reached if reached else 0.0
    estimated = alone.estimated_gap if found.trained_on is None else (reached - found.best) / reached
    status = status_of(
        relative, case.tol, trivial=alone.status is Status.TRIVIAL, stopped_by=alone.stopped_by, estimated=estimated
    )
    cause = _cause(case, alone, found, status, lower)
    universal = deep and found.bound == "orthant" and len(case.data.X) == case.n_rows
    report = Audit(
        objective=trained,
        balanced_objective=factor * reached,
        lower_bound=factor * lower,
        tol=case.tol,
        status=status,
        cause=cause,
        explanation="",
        scope=scope_of(deep, case.has_bias),
        factor=factor,
        weight_decay=case.program.weight_decay,
        n_neurons=case.n_neurons,
        loss=loss,
        stored_loss=stored,
        trained_on_objective=None if found.trained_on is None else factor * found.trained_on,
        best_known=factor * found.best,
        best_n_neurons=found.n_neurons,
        universal=universal,
        certificate=alone,
    )
    return replace(report, explanation=explanation_of(report, found.bound, found.in_time))


def _cause(case: _Case, alone: Certificate, found: _Found, status: Status, lower: float) -> Cause:
    """The largest part of the gap; without a search, what the estimate says."""
    if status not in (Status.GAP_OPEN, Status.RESTRICTED):
        return Cause.NONE
    if found.trained_on is None:
        return Cause.BOUND if status is Status.RESTRICTED else Cause.OPTIMISATION
    training_left, others = alone.objective - found.trained_on, found.trained_on - found.best
    unproved = found.best - lower
    if unproved >= max(training_left, others):
        return Cause.BOUND
    if training_left >= others or case.n_neurons >= found.n_neurons or not found.in_time:
        return Cause.OPTIMISATION
    return Cause.WIDTH


def _check(layers: Layers, X: Float, n_cases: int, objective: Objective, tol: float, time_limit: float | None) -> None:
    d, n = len(layers.weight), len(objective.loss.targets)
    if X.ndim != 2 or X.shape[1] != d or len(X) < 2:
        raise ValueError(f"X must have two rows or more, of {d} features; got shape {X.shape}.")
    if n_cases != n:
        raise ValueError(f"X has {n_cases} rows and y has {n}: give a target a row.")
    if not np.isfinite(X).all():
        raise ValueError("X must be finite: leave out or fill the rows that are not.")
    check_effort(tol, time_limit)


class Effort(TypedDict, total=False):
    """How good an answer must be, and how long it may take: keywords of the functions that certify modules."""

    tol: float
    time_limit: float | None
    random_state: int


def effort_of(function: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with defaults for those that are not given.

    Parameters
    ----------
    function : str
        What it is for, in errors.
    defaults, given : mapping

    Raises
    ------
    TypeError
        For an unknown keyword.
    ValueError
        As ``check_effort``.
    """
    unknown = set(given) - set(defaults)
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown.pop()!r}")
    effort = {**defaults, **given}
    check_effort(effort["tol"], effort["time_limit"])
    return effort


def check_effort(tol: float, time_limit: float | None) -> None:
    """Refuse a tolerance that is not a number from 0, or a negative time limit."""
    if not 0 <= tol < np.inf:
        raise ValueError(f"tol must be a number that is not negative, got {tol}.")
    if time_limit is not None and not time_limit >= 0:
        raise ValueError(f"time_limit must not be negative, got {time_limit}.")
