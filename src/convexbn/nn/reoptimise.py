"""The last two layers of a trained deep network, replaced by the best ones on its own features.

Deep networks are scale-free below their last batch norm, so that weight decay matters for its scale and shift and for
the last Linear alone. On the features of the layers before, these are the two-layer program of this package. At rank
n - 1 its optimum is that of the whole deep network: no other earlier layers give less (mathematics, section 4).
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import nn

from convexbn._threads import blas_threads
from convexbn._types import Float, is_over
from convexbn.certificate.certificate import Certificate
from convexbn.nn.batch_statistics import with_full_batch_statistics, without_momentum
from convexbn.nn.evaluation import Evaluation, Task
from convexbn.nn.interpolation import Point, Segment
from convexbn.nn.last_layers import NUMBERS, LastLayers, as_tensor, read_last_layers
from convexbn.program.layers import Layers, convertible, rounded
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Solution
from convexbn.solvers.closed_form import ClosedForm, NoFormulaError
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn.solvers.relu.lbfgs import lbfgs
from convexbn.training.audit import Effort, effort_of
from convexbn.training.fit import PRICING_TOL, SOLVER_SHARE, judge_on
from convexbn.training.relu_conversion import neurons_of
from convexbn.training.training_set import TrainingSet


class ReplacementEffort(Effort, total=False):
    """Keywords of ``reoptimise``."""

    certify: bool
    max_iter: int


_DEFAULTS = {"certify": True, "tol": 1e-6, "max_iter": 400, "time_limit": 60.0, "random_state": 0}

#: Rows that are run first, so that an error comes early.
_FEW = 64

#: Rows up to which neurons are priced; with more, a round takes minutes.
PRICING_ROWS = 5000


@dataclass(frozen=True, eq=False)
class Reoptimisation:
    """A module with its last two layers re-optimised.

    Attributes
    ----------
    module : torch.nn.Module
        The new module, in eval mode.
    before, after : Evaluation
        Of the given module and of the new one.
    certificate : Certificate or None
        Of the new module on its features, over all widths and patterns. None if it was not asked for, or if the module
        keeps a share of its output bias, which the program does not have: see ``convexbn.nn.certify``.
    step : float
        Place of the new layers between the trained ones at their best scale (0) and the optimum (1).
    statistics : {"all rows", "stored"}
        Statistics of the earlier batch norms.
    """

    module: nn.Module
    before: Evaluation
    after: Evaluation
    certificate: Certificate | None
    step: float = 1.0
    statistics: str = "all rows"


def reoptimise(
    module: nn.Module, X: Any, y: Any, *, loss: str, weight_decay: float, X_val: Any = None, y_val: Any = None,
    **effort: Unpack[ReplacementEffort],
) -> Reoptimisation:  # fmt: skip
    """Replace the last Linear, BatchNorm1d, ReLU, Linear of a trained network by better ones on the same features.

    Earlier layers are frozen. The running statistics of their batch norms become the biased ones of all rows at once,
    layer by layer, so that train mode on all rows and eval mode agree. The new layers are

    - the global optimum by formula, if the rank of the features is n - 1 and the targets have a formula;
    - otherwise, up to 5,000 rows, those of the ReLU program, from the module's own neurons by a local phase and neuron
      pricing;
    - beyond, those of the local phase alone (L-BFGS on all rows): no worse than the module's own, and optimal only as
      far as the certificate says.

    The program has no output bias: that of the last Linear becomes 0, and "no worse" is meant without it.

    A lower training objective need not generalise better. With validation rows and classes, the new layers come from
    the segment between the trained ones at their best scale and those above. They have the least objective among those
    whose validation accuracy is not below that of the given module, with its stored statistics or with those of all
    rows. (If the latter is less accurate, the earlier batch norms keep the stored ones.) Networks inside the segment
    hold both ends side by side and a share of the output bias. The objective is convex along it, and never above that
    of the trained layers at its beginning. Since the validation rows choose, take other rows to estimate the accuracy.

    Parameters
    ----------
    module : torch.nn.Module
        Trained, of float32 or float64, on any device. All layers before its last four, such as convolutions and
        pooling, are kept. It is not changed.
    X : ndarray or Tensor (n, ...)
        The training rows, as the module takes them.
    y : ndarray or Tensor (n,) or (n, K)
        Integers are classes 0 to K - 1, the indices of the outputs (with one output 0 or -1, and 1). Floats are targets
        as the loss takes them, without an accuracy.
    loss : {"squared", "squared_hinge", "logistic", "cross_entropy"}
        Summed over the rows; ``"squared"`` is half the squared error, ``"logistic"`` is for one output.
    weight_decay : float
        Strength against the *sum* of the losses. A torch optimiser's ``weight_decay`` lam on the last batch norm and
        Linear is ``lam * sqrt(n)`` with a mean loss, and ``lam * K * sqrt(n) / 2`` with ``MSELoss``. (AdamW's is
        another: it is not part of the gradient.)
    X_val, y_val : ndarray or Tensor, optional
        Validation rows; with classes they choose among the networks between the trained one and the optimum.
    **effort
        ``certify`` (bool, default True): whether to prove how good the new layers are; beyond 10,000 rows the proof can
        take longer than the layers, and its bound is loose. ``tol`` (float, default 1e-6): relative gap that counts as
        optimal. ``max_iter`` (int, default 400): iterations of the local phase. ``time_limit`` (float or None, default
        60): seconds for the layers and the proof, half of them for the layers if there is no formula; None does a
        stated amount of work. ``random_state`` (int, default 0): seed of the random starts of pricing.

    Raises
    ------
    TypeError, ValueError
        For a module with another ending, type of numbers, or batch norms without running statistics; for data that do
        not belong to it.

    Notes
    -----
    The solution determines the width. Every batch norm of the new module has momentum 0, so that a pass in train mode
    leaves its statistics; set it before training further. Features of float32 modules are computed in float64, and
    directions that float32 cannot tell from rounding are left out.

    Examples
    --------
    >>> import torch
    >>> from torch.nn import BatchNorm1d, Linear, ReLU, Sequential
    >>> earlier = [Linear(4, 40), BatchNorm1d(40), ReLU()]
    >>> module = Sequential(*earlier, Linear(40, 30), BatchNorm1d(30), ReLU(), Linear(30, 2))
    >>> X, y = torch.randn(20, 4, generator=torch.manual_seed(0)), torch.arange(20) % 2
    >>> _ = module(X)  # a pass in train mode gives the batch norm statistics
    >>> result = reoptimise(module.double(), X, y, loss="cross_entropy", weight_decay=0.1)
    >>> result.certificate.status.value, result.after.n_neurons, result.after.train_accuracy
    ('CERTIFIED', 2, 1.0)
    """
    chosen = effort_of("reoptimise", _DEFAULTS, effort)
    if (X_val is None) != (y_val is None):
        raise ValueError("give X_val and y_val together: the validation accuracy needs both.")
    budget, given, rows = Budget(chosen["time_limit"]), read_last_layers(module), as_tensor(X)
    task = Task.from_targets(rows, y, given.layers.output.shape[1], loss, weight_decay)
    if X_val is not None and task.labels is not None:
        task = task.validated_on(as_tensor(X_val), y_val)
    given.features(rows[:_FEW])
    start = _beginning(given, task)
    with blas_threads(len(rows)):
        data = TrainingSet.prepare(
            start.features, task.loss.targets, task.loss.weights,
            loss=type(task.loss), input_eps=float(np.finfo(_numbers(given)).eps),
        )  # fmt: skip
        step, layers, proof = _replace_layers(data, task, given, start, budget, chosen)
    new = _with_layers(start.module, given, layers)
    before = task.evaluation(given.module, start.layers, start.features)
    after = task.evaluation(new, layers, start.features)
    return Reoptimisation(new, before, after, proof, step, start.statistics)


def _replace_layers(
    data: TrainingSet, task: Task, given: LastLayers, start: _Beginning, budget: Budget, effort: dict[str, Any]
) -> tuple[float, Layers, Certificate | None]:
    """Step, layers and certificate of the best network, or of a validated one on the way to it."""
    program = data.relu_program(task.weight_decay)
    trained = neurons_of(data, start.layers.network(start.features)).balanced()
    found = _solve(data, program, trained, budget, effort)
    segment = Segment.between(program, trained, start.layers.output_bias, found.weights)
    step, layers = _choose(segment, data, start, given, task)
    if not effort["certify"] or layers.output_bias.any():
        return step, layers, None
    proof = judge_on(
        data, layers.network(start.features), program,
        tol=effort["tol"], stopped_by=found.stopped_by, own_rows=True, deadline=budget.deadline,
    )  # fmt: skip
    return step, layers, proof


class _Beginning(NamedTuple):
    """Earlier layers as they will stay, with their features, the trained last layers on these, and the statistics."""

    module: nn.Module
    features: Float
    layers: Layers
    statistics: str


def _beginning(given: LastLayers, task: Task) -> _Beginning:
    """Module with the statistics of all rows, or with the stored ones if these have higher validation accuracy."""
    module = with_full_batch_statistics(given.module, given.before, task.rows)
    features = read_last_layers(module).features(task.rows)
    layers = given.layers.with_statistics_of(features)
    if task.validation is None or task.validates(_with_layers(module, given, layers)) >= task.validates(given.module):
        return _Beginning(module, features, layers, "all rows")
    return _Beginning(without_momentum(given.module), given.features(task.rows), given.layers, "stored")


def _solve(
    data: TrainingSet, program: ReluProgram, own: Neurons, budget: Budget, effort: dict[str, Any]
) -> Solution[Neurons]:
    """Network by formula if there is one, otherwise from the module's own neurons."""
    if data.has_orthogonal_rows:
        with suppress(NoFormulaError):
            return ClosedForm().solve(program)
    share = replace(budget, time_limit=None if budget.time_limit is None else SOLVER_SHARE * budget.time_limit)
    found = lbfgs(program, own, effort["max_iter"], share.deadline)
    if len(data.X) <= PRICING_ROWS:
        rng = np.random.default_rng(effort["random_state"])
        return ColumnGeneration(tol=PRICING_TOL * effort["tol"]).solve(program, found, share, rng)
    return Solution(found, "time_limit" if is_over(share.deadline) else "tolerance")


def _choose(
    segment: Segment, data: TrainingSet, start: _Beginning, given: LastLayers, task: Task
) -> tuple[float, Layers]:
    """Step and layers of the optimum or, with validation rows, of least objective without a loss of accuracy."""
    if task.validation is None:
        return 1.0, _layers_of(segment.at(1.0), data, given)
    least = task.validates(_with_layers(start.module, given, start.layers))
    for point in segment.points():
        layers = _layers_of(point, data, given)
        if task.validates(_with_layers(start.module, given, layers)) >= least:
            return point.step, layers
    return 0.0, start.layers


def _layers_of(point: Point, data: TrainingSet, given: LastLayers) -> Layers:
    """Last layers of a point in numbers of the module's type."""
    network, numbers = BatchNormNetwork.from_neurons(data.whitening, point.neurons), _numbers(given)
    layers = Layers.from_network(convertible(network), numbers, given.layers.eps)
    return replace(layers, output_bias=rounded(point.output_bias, numbers))


def _with_layers(module: nn.Module, last: LastLayers, layers: Layers) -> nn.Module:
    """Copy a module with other last layers, of any width."""
    copied: Any = copy.deepcopy(module)
    linear, batch_norm, output = (copied.get_submodule(name) for name in (last.linear, last.batch_norm, last.output))
    statistics = {"running_mean": layers.running_mean, "running_var": layers.running_var}
    _fill(linear, weight=layers.weight.T, bias=layers.bias)
    _fill(batch_norm, weight=layers.scale, bias=layers.offset, **statistics)
    _fill(output, weight=layers.output.T)
    if output.bias is not None:
        _fill(output, bias=layers.output_bias)
    linear.out_features = batch_norm.num_features = output.in_features = len(layers.scale)
    batch_norm.momentum = 0.0
    return copied


def _fill(layer: Any, **arrays: Float) -> None:
    """Replace parameters and buffers of a layer by tensors of any size."""
    old = layer.weight
    for name, array in arrays.items():
        value = torch.tensor(np.ascontiguousarray(array), dtype=old.dtype, device=old.device)
        setattr(layer, name, value if name in layer._buffers else nn.Parameter(value, old.requires_grad))


def _numbers(last: LastLayers) -> type[np.floating[Any]]:
    """Type of the numbers of the last layers."""
    linear: Any = last.module.get_submodule(last.linear)
    if linear.weight.dtype not in NUMBERS:
        raise TypeError(f"the module holds {linear.weight.dtype}: convert it to torch.float32 or torch.float64 first.")
    return NUMBERS[linear.weight.dtype]
