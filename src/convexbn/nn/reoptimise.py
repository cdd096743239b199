"""The last two layers of a trained deep network, replaced by the best there are on its own features.

Deep networks are scale-free below their last batch norm, so that only its scale and shift and the last Linear carry
weight decay that matters. On the features of the layers before, those are the two-layer program of this package. At
rank n - 1 its optimum is the global one of the whole deep network: no other earlier layers give less (mathematics,
section 4).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from convexbn._threads import blas_threads
from convexbn._types import Float, is_over
from convexbn.certificate.certificate import Certificate
from convexbn.nn.batch_statistics import with_full_batch_statistics, without_momentum
from convexbn.nn.evaluation import Evaluation, Task
from convexbn.nn.interpolation import Point, Segment
from convexbn.nn.last_layers import LastLayers, as_tensor, read_last_layers
from convexbn.program.layers import Layers, convertible, rounded
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Solution
from convexbn.solvers.closed_form import ClosedForm, NoFormulaError
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn.solvers.relu.lbfgs import lbfgs
from convexbn.training.audit import Effort, effort_of
from convexbn.training.fit import PRICING_TOL, SOLVER_SHARE, judged
from convexbn.training.relu_conversion import neurons_of
from convexbn.training.training_set import TrainingSet

_NUMBERS: dict[torch.dtype, type[np.floating[Any]]] = {torch.float32: np.float32, torch.float64: np.float64}


class ReplacementEffort(Effort, total=False):
    """Keywords of ``reoptimise``."""

    certify: bool
    max_iter: int


#: Defaults of the keywords.
_EFFORT = {"certify": True, "tol": 1e-6, "max_iter": 400, "time_limit": 60.0, "random_state": 0}

#: Rows that are run first, for an error in time.
_FEW = 64

#: Rows up to which neurons are priced: beyond, a round takes minutes.
PRICING_ROWS = 5000


@dataclass(frozen=True, eq=False)
class Reoptimisation:
    """A module with its last two layers re-optimised.

    Attributes
    ----------
    module : torch.nn.Module
        The new module, in eval mode.
    before, after : Evaluation
        Of the module that was given and of the new one.
    certificate : Certificate or None
        What is proved of the new module, over all widths and patterns, on its features. None if it was not asked for,
        or the module keeps a share of its output bias, which the program has not: see ``convexbn.nn.certify``.
    step : float
        How far the new layers are on the way from the trained ones, at their best scale (0), to the optimum (1).
    statistics : {"all rows", "stored"}
        Of the earlier batch norms.
    """

    module: nn.Module
    before: Evaluation
    after: Evaluation
    certificate: Certificate | None
    step: float = 1.0
    statistics: str = "all rows"


def reoptimise(
    module: nn.Module,
    X: Any,
    y: Any,
    *,
    loss: str,
    weight_decay: float,
    X_val: Any = None,
    y_val: Any = None,
    **effort: Unpack[ReplacementEffort],
) -> Reoptimisation:
    """Replace the last Linear, BatchNorm1d, ReLU, Linear of a trained network by better ones on the same features.

    Earlier layers are frozen; the running statistics of their batch norms become the biased ones of all rows at once,
    layer by layer, so that train mode on all rows and eval mode agree. The new layers are

    - the global optimum by formula, where the rank of the features is n - 1 and the targets have a formula;
    - up to 5,000 rows those of the ReLU program, from the module's own neurons by a local phase and neuron pricing;
    - beyond, those of the local phase alone (L-BFGS on all rows): no worse than the module's own, and optimal only as
      far as the certificate says.

    The program has no output bias: that of the last Linear becomes 0, and "no worse" means than without it.

    A lower training objective need not generalise better. With validation rows and classes the new module is the one
    of least objective, on the segment from the trained layers at their best scale to those above, whose validation
    accuracy is not below that of the module that was given, nor of it with the statistics of all rows; if the latter is
    less accurate, the earlier batch norms keep their stored ones. The objective is convex along the segment, whose
    networks hold both ends side by side and a share of the output bias; at its beginning it is never above that of the
    trained layers. The validation rows choose, so that their accuracy is no estimate any more: take other rows for
    that.

    Parameters
    ----------
    module : torch.nn.Module
        Trained, of float32 or float64, on any device; whatever comes before its last four layers is kept, such as
        convolutions and pooling. It is not changed.
    X : ndarray or Tensor (n, ...)
        The training rows, as the module takes them.
    y : ndarray or Tensor (n,) or (n, K)
        Integers are classes 0 to K - 1, the numbers of the outputs (with one output 0 or -1, and 1); floats are
        targets as the loss takes them, for which there is no accuracy.
    loss : {"squared", "squared_hinge", "logistic", "cross_entropy"}
        Summed over the rows; ``"squared"`` is half the squared error, ``"logistic"`` is for one output.
    weight_decay : float
        Strength against the *sum* of the losses. A torch optimiser's ``weight_decay`` lam on the last batch norm and
        Linear is ``lam * sqrt(n)`` with a mean loss, and ``lam * K * sqrt(n) / 2`` with ``MSELoss``. (AdamW's is
        another: it is not part of the gradient.)
    X_val, y_val : ndarray or Tensor, optional
        Validation rows; with classes they choose among the networks between the trained one and the optimum.
    **effort
        The keywords below.
    certify : bool, default=True
        Whether to prove how good the new layers are. Beyond 10,000 rows the proof can take longer than the layers, and
        its bound is loose.
    tol : float, default=1e-6
        Relative gap that counts as optimal.
    max_iter : int, default=400
        Iterations of the local phase.
    time_limit : float or None, default=60
        Seconds for the layers and the proof: half for the layers where there is no formula. None: a stated amount of
        work.
    random_state : int, default=0
        For the random starts of pricing.

    Returns
    -------
    Reoptimisation

    Raises
    ------
    TypeError, ValueError
        For a module that does not end so, has batch norms without running statistics, or has another type of numbers;
        for data that do not belong to it.

    Notes
    -----
    The width becomes what the solution needs. Every batch norm of the new module has momentum 0, so that a pass in
    train mode leaves its statistics; set it before training further. Features of float32 modules are computed in
    float64, and directions that float32 cannot tell from rounding are left out.

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
    chosen = effort_of("reoptimise", _EFFORT, effort)
    if (X_val is None) != (y_val is None):
        raise ValueError("give X_val and y_val together: validation rows are there for their accuracy.")
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
        step, layers, proof = _replaced(data, task, given, start, budget, chosen)
    new = _with_layers(start.module, given, layers)
    before = task.evaluation(given.module, start.layers, start.features)
    after = task.evaluation(new, layers, start.features)
    return Reoptimisation(new, before, after, proof, step, start.statistics)


def _replaced(
    data: TrainingSet, task: Task, given: LastLayers, start: _Beginning, budget: Budget, effort: dict[str, Any]
) -> tuple[float, Layers, Certificate | None]:
    """Step, layers and certificate of the best network, or of one on the way to it that validates."""
    program, tol = data.relu_program(task.weight_decay), effort["tol"]
    trained = neurons_of(data, start.layers.network(start.features)).balanced()
    found = _solved(data, program, trained, budget, effort)
    segment = Segment.between(program, trained, start.layers.output_bias, found.weights)
    step, layers = 1.0, _layers_of(segment.at(1.0), data, given)
    if task.validation is not None:
        step, layers = _choose(segment, data, start, given, task)
    if not effort["certify"] or layers.output_bias.any():
        return step, layers, None
    proof = judged(
        data, layers.network(start.features), program,
        tol=tol, stopped_by=found.stopped_by, own_rows=True, deadline=budget.deadline,
    )  # fmt: skip
    return step, layers, proof


@dataclass(frozen=True, eq=False)
class _Beginning:
    """Earlier layers as they will stay, the features that they compute, and the trained last layers on these."""

    module: nn.Module
    features: Float
    layers: Layers
    statistics: str

    def with_layers(self, given: LastLayers) -> nn.Module:
        """The whole module."""
        return _with_layers(self.module, given, self.layers)


def _beginning(given: LastLayers, task: Task) -> _Beginning:
    """The statistics of all rows, unless the module has higher validation accuracy with the stored ones."""
    module = with_full_batch_statistics(given.module, given.before, task.rows)
    features = read_last_layers(module).features(task.rows)
    exact = _Beginning(module, features, given.layers.with_statistics_of(features), "all rows")
    if task.validation is None or task.validates(exact.with_layers(given)) >= task.validates(given.module):
        return exact
    return _Beginning(without_momentum(given.module), given.features(task.rows), given.layers, "stored")


def _choose(
    segment: Segment, data: TrainingSet, start: _Beginning, given: LastLayers, task: Task
) -> tuple[float, Layers]:
    """Step and layers of least objective with which the module, as it will be, is no less accurate than it began."""
    least = task.validates(start.with_layers(given))
    for point in segment.points():
        layers = _layers_of(point, data, given)
        if task.validates(_with_layers(start.module, given, layers)) >= least:
            return point.step, layers
    return 0.0, start.layers


def _layers_of(point: Point, data: TrainingSet, given: LastLayers) -> Layers:
    """Last layers of a point in numbers of the module's type."""
    network = BatchNormNetwork.from_neurons(data.whitening, point.neurons)
    numbers = _numbers(given)
    layers = Layers.from_network(convertible(network), numbers, given.layers.eps)
    return replace(layers, output_bias=rounded(point.output_bias, numbers))


def _solved(
    data: TrainingSet, program: ReluProgram, own: Neurons, budget: Budget, effort: dict[str, Any]
) -> Solution[Neurons]:
    """The network by formula where there is one, from the given one elsewhere."""
    if data.has_orthogonal_rows:
        try:
            return ClosedForm().solve(program)
        except NoFormulaError:
            pass
    solving_time = None if budget.time_limit is None else SOLVER_SHARE * budget.time_limit
    share = replace(budget, time_limit=solving_time)
    found = lbfgs(program, own, effort["max_iter"], share.deadline)
    if len(data.X) <= PRICING_ROWS:
        rng = np.random.default_rng(effort["random_state"])
        return ColumnGeneration(tol=PRICING_TOL * effort["tol"]).solve(program, found, share, rng)
    return Solution(found, "time_limit" if is_over(share.deadline) else "tolerance")


def _with_layers(module: nn.Module, last: LastLayers, layers: Layers) -> nn.Module:
    """A copy with other last layers, of any width."""
    copied = copy.deepcopy(module)
    linear, batch_norm, output = _last_layers(copied, last)
    _fill(linear, weight=layers.weight.T, bias=layers.bias)
    _fill(batch_norm, weight=layers.scale, bias=layers.offset)
    _fill(batch_norm, running_mean=layers.running_mean, running_var=layers.running_var)
    _fill(output, weight=layers.output.T)
    if output.bias is not None:
        _fill(output, bias=layers.output_bias)
    linear.out_features = batch_norm.num_features = output.in_features = len(layers.scale)
    batch_norm.momentum = 0.0
    return copied


def _last_layers(module: nn.Module, last: LastLayers) -> list[Any]:
    """Linear, batch norm, Linear."""
    return [module.get_submodule(name) for name in (last.linear, last.batch_norm, last.output)]


def _fill(layer: Any, **arrays: Float) -> None:
    """Put new tensors in the places of a layer's parameters and buffers, of whatever size."""
    old = layer.weight
    for name, array in arrays.items():
        value = torch.tensor(np.ascontiguousarray(array), dtype=old.dtype, device=old.device)
        setattr(layer, name, value if name in layer._buffers else nn.Parameter(value, old.requires_grad))


def _numbers(last: LastLayers) -> type[np.floating[Any]]:
    """Type of the numbers of the last layers."""
    dtype = _last_layers(last.module, last)[0].weight.dtype
    if dtype not in _NUMBERS:
        raise TypeError(f"the module holds {dtype}: convert it to torch.float32 or torch.float64 first.")
    return _NUMBERS[dtype]
