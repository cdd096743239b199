"""Networks that torch trained, judged: translation, honesty, causes of a gap, and files that are hostile."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from convexbn import ConvexBNClassifier, ConvexBNRegressor, FormatError, cli
from convexbn.certificate.status import Status
from convexbn.data.whitening import whiten
from convexbn.files.torch import is_checkpoint, read_checkpoint
from convexbn.nn import certify, read_last_layers, to_module
from convexbn.program.layers import Layers
from convexbn.program.losses import LOSSES, HuberLoss, SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.output_bias import WithOutputBias
from convexbn.training.audit import audit
from convexbn.training.audit_report import Cause
from convexbn.training.trained_objective import Objective, TrainedLoss, targets_of_labels
from instances import EPS, LOSS_NAMES, targets_for

CANARY = "certify-canary"


def two_layers(d, m, K, *, bias=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, m), nn.BatchNorm1d(m), nn.ReLU(), nn.Linear(m, K, bias=bias)).double()


def trained(module, X, y, loss, optimizer, steps):
    """Full-batch training; the module is left in train mode."""
    X, y = torch.as_tensor(X), torch.as_tensor(y)
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module(X), y).backward()
        optimizer.step()
    return module


def torch_objective(module, X, y, loss, optimizer):
    """Loss in train mode plus ``weight_decay / 2`` times squares of all but the first Linear, by torch alone."""
    module = copy.deepcopy(module).train()
    decays = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    original = dict(zip(map(id, module.parameters()), (decay for _, decay in decays), strict=True))
    with torch.no_grad():
        value = loss(module(torch.as_tensor(X)), torch.as_tensor(y))
        for name, parameter in module.named_parameters():
            if not name.startswith("0."):
                value += original[id(parameter)] / 2 * (parameter**2).sum()
    return float(value)


def problem(name, n=12, d=20, seed=0):
    """Rows of rank n - 1, and targets that have a formula, as our estimators and as torch take them."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    labels = np.arange(n) % 3
    if name == "one output":
        return X, "squared", ConvexBNRegressor, rng.standard_normal(n)
    if name == "one-hot":
        return X, "squared", ConvexBNRegressor, np.eye(3)[labels]
    if name == "huber":
        return X, "huber", ConvexBNRegressor, 2 * rng.standard_normal(n)
    two_classes = name in ("logistic", "squared_hinge")
    return X, name, ConvexBNClassifier, np.where(labels > 0, 1, -1) if two_classes else labels


PROBLEMS = ("one output", "one-hot", "huber", "squared_hinge", "logistic", "cross_entropy")


def optimum(name, weight_decay=0.5, **settings):
    X, loss, kind, y = problem(name)
    model = kind(activation="relu", loss=loss, weight_decay=weight_decay, **settings).fit(X, y)
    return X, y, loss, model


# -- the optimum and its neighbourhood --


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_a_network_at_the_known_optimum_is_certified(name, fit_intercept):
    X, y, loss, model = optimum(name, fit_intercept=fit_intercept)
    found = certify(to_module(model.network_, dtype=torch.float64), X, y, loss=loss, weight_decay=0.5)
    assert found.status is Status.CERTIFIED and found.cause is Cause.NONE and 0 <= found.relative_gap <= 1e-6
    assert found.balanced_objective == pytest.approx(model.certificate_.objective, rel=1e-12)
    assert found.factor == 1 and found.loss == pytest.approx(found.stored_loss, rel=1e-9)
    assert "Nothing is left to win" in found.explanation and found.trained_on_objective is None


@pytest.mark.parametrize(
    ("name", "loss", "factor"),
    [
        ("one output", nn.MSELoss(), 2 / 12),
        ("one-hot", nn.MSELoss(), 2 / 36),
        ("one-hot", nn.MSELoss(reduction="sum"), 2),
        ("cross_entropy", nn.CrossEntropyLoss(), 1 / 12),
        ("cross_entropy", nn.CrossEntropyLoss(reduction="sum"), 1),
        ("logistic", nn.BCEWithLogitsLoss(), 1 / 12),
        ("huber", nn.HuberLoss(), 1 / 12),
    ],
    ids=str,
)
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_decay_of_an_optimiser_is_that_of_the_program(name, loss, factor, fit_intercept):
    """beta = lam / (factor sqrt n): the optimum of our program is that of torch's objective, its output bias free."""
    lam = 0.01
    X, y, _, model = optimum(name, lam / (factor * np.sqrt(12)), fit_intercept=fit_intercept)
    y = (y + 1) / 2 if name == "logistic" else y
    module = to_module(model.network_, dtype=torch.float64)
    groups = [{"params": [p], "weight_decay": 0.0 if p is module[-1].bias else lam} for p in module.parameters()]
    found = certify(module, X, y, loss=loss, optimizer=torch.optim.SGD(groups))
    assert found.factor == pytest.approx(factor) and found.status is Status.CERTIFIED
    assert found.weight_decay == pytest.approx(model.weight_decay_)
    assert found.balanced_objective == pytest.approx(factor * model.certificate_.objective, rel=1e-10)


def test_perturbed_optima_are_never_certified():
    X, y, loss, model = optimum("cross_entropy")
    best, exact = model.certificate_.objective, to_module(model.network_, dtype=torch.float64)
    generator, excesses = torch.Generator().manual_seed(0), []
    for k in range(100):
        module = copy.deepcopy(exact)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 10 ** (-1 - 2 * (k % 10) / 9) * parameter.abs().max() * noise
        # every tenth is searched on: then our own network gives the bound, which is the sharpest there is
        found = certify(module, X, y, loss=loss, weight_decay=0.5, time_limit=5 if k % 10 == 9 else 0)
        excesses.append(1 - best / found.balanced_objective)
        assert found.status is Status.GAP_OPEN and found.relative_gap >= excesses[-1] - 1e-12 > 1e-6
        assert found.lower_bound <= best * (1 + 1e-12)
    assert min(excesses) < 2e-4 and max(excesses) > 1e-2


# -- translation --


LOSS_CASES = {
    "mse": (nn.MSELoss(), 2, "numbers"),
    "mse, one output": (nn.MSELoss(), 1, "numbers"),
    "mse, sum": (nn.MSELoss(reduction="sum"), 2, "numbers"),
    "huber": (nn.HuberLoss(delta=0.4), 2, "numbers"),
    "huber, sum": (nn.HuberLoss(reduction="sum"), 1, "numbers"),
    "cross-entropy": (nn.CrossEntropyLoss(), 3, "labels"),
    "cross-entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), 3, "labels"),
    "cross-entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), 3, "labels"),
    "cross-entropy, soft": (nn.CrossEntropyLoss(), 3, "probabilities"),
    "bce": (nn.BCEWithLogitsLoss(), 2, "shares"),
    "bce, sum": (nn.BCEWithLogitsLoss(reduction="sum"), 1, "shares"),
}


def targets(kind, n, K, rng):
    return {
        "numbers": rng.standard_normal((n, K)),
        "labels": rng.integers(K, size=n),
        "probabilities": rng.dirichlet(np.ones(K), n),
        "shares": rng.uniform(0, 1, (n, K)),
    }[kind]


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_objective_is_torchs_own(case, bias):
    loss, K, kind = LOSS_CASES[case]
    rng = np.random.default_rng(3)
    X, y = rng.standard_normal((30, 4)), targets(kind, 30, K, rng)
    module = two_layers(4, 7, K, bias=bias)
    module[1].eps = 0.3
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, weight_decay=0.02)
    trained(module, X, y, loss, optimizer, 50)
    found = certify(module, X, y, loss=loss, optimizer=optimizer, time_limit=0)
    assert found.objective == pytest.approx(torch_objective(module, X, y, loss, optimizer), rel=1e-12)
    assert found.balanced_objective <= found.objective * (1 + 1e-12)
    module.eval()
    with torch.no_grad():
        assert found.stored_loss == pytest.approx(float(loss(module(torch.tensor(X)), torch.tensor(y))), rel=1e-12)
    assert abs(found.stored_loss - found.loss) > 1e-6  # momentum and the unbiased variance


def test_decays_of_batch_norm_and_of_the_last_layer_act_through_their_product():
    rng = np.random.default_rng(0)
    X, y, loss = rng.standard_normal((30, 4)), rng.standard_normal((30, 2)), nn.MSELoss()
    module = two_layers(4, 6, 2, bias=True)
    groups = [
        {"params": module[0].parameters(), "weight_decay": 0.3},
        {"params": module[1].parameters(), "weight_decay": 0.02},
        {"params": [module[3].weight], "weight_decay": 0.05},
        {"params": [module[3].bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    trained(module, X, y, loss, optimizer, 30)
    found = certify(module, X, y, loss=loss, optimizer=optimizer, time_limit=0)
    assert found.objective == pytest.approx(torch_objective(module, X, y, loss, optimizer), rel=1e-12)
    assert found.weight_decay == pytest.approx(np.sqrt(0.02 * 0.05) / (2 / 60 * np.sqrt(30)))


def test_the_weight_decay_of_this_package():
    X, y, loss, model = optimum("one output")
    module = to_module(model.network_, dtype=torch.float64, eps=0.1)
    found = certify(module, X, y, loss=loss, weight_decay=0.5)
    plain = 12 * ((module[1].weight ** 2).sum() + (module[1].bias ** 2).sum()) + (module[3].weight ** 2).sum()
    assert found.objective == pytest.approx(found.loss + 0.25 * float(plain.detach()), rel=1e-12)
    assert found.balanced_objective < found.objective  # eps costs a larger scale
    assert found.status is Status.CERTIFIED


def refusals():
    module = two_layers(4, 6, 2, bias=True)
    parameters = list(module.parameters())
    split = [{"params": parameters[2:3], "weight_decay": 0.1}, {"params": parameters[:2] + parameters[3:]}]
    optim = torch.optim
    return module, {
        "adamw": (dict(optimizer=optim.AdamW(parameters)), "AdamW does not add its weight decay to the gradient"),
        "adam, decoupled": (
            dict(optimizer=optim.Adam(parameters, weight_decay=0.1, decoupled_weight_decay=True)),
            "Adam does not add its weight decay",
        ),
        "no decay": (dict(optimizer=optim.Adam(parameters)), "weight decay is 0.0 for batch norm and 0.0 for the last"),
        "on one": (dict(optimizer=optim.SGD(split, weight_decay=0.2)), "is 0.1 for weight and 0.2 for bias of Batch"),
        "complex": (dict(y=np.zeros((9, 2)) + 1j, weight_decay=1.0), "y must be real, and is complex"),
        "complex rows": (dict(X=torch.ones(9, 4) * 1j, weight_decay=1.0), "X must be real, and is complex"),
        "maximise": (dict(optimizer=optim.SGD(parameters, weight_decay=0.1, maximize=True)), "SGD maximises"),
        "other": (dict(optimizer=optim.SGD(parameters[:3], weight_decay=0.1)), "does not hold bias of BatchNorm1d '1'"),
        "none": (dict(), "give optimizer=, whose weight decay .* or weight_decay=.* lam \\* sqrt\\(n\\)"),
        "both": (dict(optimizer=optim.SGD(parameters), weight_decay=1.0), "and not both"),
        "negative": (dict(weight_decay=-1.0), "weight_decay must be a positive number, got -1.0"),
        "no optimiser": (dict(optimizer=0.1), "must be a torch.optim.Optimizer, got float"),
        "weights": (dict(loss=nn.CrossEntropyLoss(torch.ones(2)), weight_decay=1.0), "CrossEntropyLoss has weight"),
        "pos_weight": (
            dict(loss=nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), weight_decay=1.0),
            "BCEWithLogitsLoss has pos_weight",
        ),
        "reduction": (dict(loss=nn.MSELoss(reduction="none"), weight_decay=1.0), "has reduction='none'"),
        "ignored": (
            dict(loss=nn.CrossEntropyLoss(ignore_index=1), y=np.arange(9) % 2, weight_decay=1.0),
            "ignores the rows of y that are 1",
        ),
        "other loss": (dict(loss=nn.L1Loss(), weight_decay=1.0), "loss must be nn.MSELoss.*got L1Loss"),
        "other name": (dict(loss="hinge", weight_decay=1.0), "loss must be one of squared, .*got 'hinge'"),
        "labels": (dict(loss=nn.CrossEntropyLoss(), y=np.arange(9), weight_decay=1.0), "class indices from 0 to 1"),
        "probabilities": (dict(loss=nn.CrossEntropyLoss(), weight_decay=1.0), "or rows of probabilities"),
        "shares": (dict(loss=nn.BCEWithLogitsLoss(), weight_decay=1.0), "takes targets in \\[0, 1\\]"),
        "signs": (dict(loss="logistic", weight_decay=1.0), "takes targets -1 and \\+1"),
        "signs of the hinge": (dict(loss="squared_hinge", weight_decay=1.0), "hinge takes targets -1 and \\+1"),
        "shape": (dict(y=np.zeros(9), weight_decay=1.0), "the network has 2 outputs, and y has shape \\(9,\\)"),
        "rows": (dict(y=np.zeros((8, 2)), weight_decay=1.0), "X has 9 rows and y has 8"),
        "infinite": (dict(X=np.full((9, 4), np.inf), weight_decay=1.0), "finite"),
        "no time": (dict(time_limit=-1.0, weight_decay=1.0), "time_limit must not be negative"),
        "tol": (dict(tol=np.nan, weight_decay=1.0), "tol must be a number"),
        "constant": (dict(X=np.ones((9, 4)), weight_decay=1.0), "do not vary over the rows|constant"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals()[1])
def test_what_has_no_such_objective_is_refused_in_a_sentence(case):
    module, cases = refusals()
    given, words = cases[case]
    rng = np.random.default_rng(0)
    data = {"X": rng.standard_normal((9, 4)), "y": 3 + rng.standard_normal((9, 2)), "loss": nn.MSELoss()}
    module(torch.tensor(data["X"]))  # batch norm statistics
    with pytest.raises((TypeError, ValueError), match=words) as refusal:
        certify(module, **data | given)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_a_frozen_scale_has_no_decay():
    module = two_layers(4, 6, 2)
    module(torch.randn(9, 4, dtype=torch.float64))
    module[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="weight of BatchNorm1d '1' is frozen"):
        certify(module, torch.ones(9, 4), np.ones((9, 2)), loss=nn.MSELoss(), optimizer=optimizer)


def test_asgd_decays_by_its_lambd_too():
    rng = np.random.default_rng(0)
    X, y = torch.tensor(rng.standard_normal((30, 3))), torch.tensor(rng.standard_normal((30, 1)))
    module = two_layers(3, 4, 1)
    optimizer = torch.optim.ASGD(module.parameters(), lr=0.05, weight_decay=1e-2, lambd=3e-2, t0=1e9)
    trained(module, X, y, nn.MSELoss(), optimizer, 5000)
    last = module[3].weight
    slope = torch.autograd.grad(nn.MSELoss()(module(X), y), last)[0]
    at_work = -float((slope * last.detach()).sum() / last.detach().square().sum())  # gradient and decay cancel
    found = certify(module, X, y, loss=nn.MSELoss(), optimizer=optimizer, time_limit=0)
    assert found.weight_decay * 2 / 30 * np.sqrt(30) == pytest.approx(at_work, rel=2e-2)  # of an unfinished descent
    assert at_work == pytest.approx(4e-2, rel=2e-2)


def test_adamw_is_judged_for_a_weight_decay_that_is_given():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((9, 4)), rng.standard_normal((9, 2))
    module = two_layers(4, 6, 2)
    trained(module, X, y, nn.MSELoss(), torch.optim.AdamW(module.parameters()), 3)
    assert certify(module, X, y, loss=nn.MSELoss(), weight_decay=0.3, time_limit=0).weight_decay == 0.3


# -- an output bias --


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_the_loss_with_its_best_bias_is_a_loss(name, decay):
    rng = np.random.default_rng(1)
    K = 1 if name == "logistic" else 3
    inner = LOSSES[name](targets_for(name, 20, K, rng), rng.uniform(0.5, 2, 20))
    loss, F, step = WithOutputBias.with_decay(inner, decay), rng.standard_normal((20, K)), rng.standard_normal((20, K))
    value, dual = loss.value(F), loss.negative_gradient(F)
    for b in rng.standard_normal((30, K)):  # no bias is better
        assert value <= inner.value(F + b) + decay / 2 * b @ b
    slope = (loss.value(F + 1e-5 * step) - loss.value(F - 1e-5 * step)) / 2e-5
    assert slope == pytest.approx(-np.sum(dual * step), rel=1e-7)
    assert value == pytest.approx(loss.dual_value(dual) - np.sum(dual * F), rel=1e-11)  # Fenchel-Young
    assert loss.value(F + step) >= loss.dual_value(dual) - np.sum(dual * (F + step))
    if decay == 0:
        assert np.abs(dual.sum(axis=0)).max() < 1e-14 and loss.dual_value(dual + 0.01) == -np.inf


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_the_best_bias_is_found_from_where_the_huber_loss_is_linear_on_all_rows(delta):
    rng = np.random.default_rng(0)
    inner = HuberLoss(1e4 * np.array([1, -3]) + rng.standard_normal((30, 2)), rng.uniform(0.5, 2, 30), delta=delta)
    bias = WithOutputBias.with_decay(inner, 0.0).best_bias(np.zeros((30, 2)))
    pull = inner.negative_gradient(np.broadcast_to(bias, (30, 2))).sum(axis=0)
    assert np.abs(pull).max() < 30 * EPS * 3e4 * inner.weights.sum()


def test_a_network_is_judged_in_all_directions_of_its_rows():
    """Beside a column of large offset, two columns that differ by the target: their network is not below a bound."""
    rng = np.random.default_rng(0)
    sign, column = np.sign(rng.standard_normal(40)), rng.standard_normal(40)
    X = np.c_[3e7 + rng.standard_normal(40), column, column + 1e-10 * sign]
    hidden = np.maximum(np.c_[sign, -sign] - sign.mean() * np.array([1, -1]), 0) / np.std(sign)
    output = np.linalg.lstsq(hidden, sign, rcond=None)[0]
    value = 0.5 * np.sum((hidden @ output - sign) ** 2) + 0.05 * np.sqrt(40) * np.abs(output).sum()
    module = two_layers(3, 2, 1, bias=False)
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
        module(torch.tensor(X))
    found = certify(module, X, sign, loss="squared", weight_decay=0.05, time_limit=0)
    assert found.lower_bound <= value and "except" not in found.scope
    X[:, 2] = column + 2e-15 * sign
    found = certify(module, X, sign, loss="squared", weight_decay=0.05, time_limit=0)
    assert found.scope.endswith("of any width, except along 1 direction of features 1, 2, which rounding may have made")
    assert "except along" in found.explanation


def test_one_hot_targets_with_an_output_bias_at_the_known_optimum():
    """Mathematics 2f: counts (4, 4, 4), b = 1/3, optimum 1.7195918 at beta 0.4."""
    labels, beta = np.arange(12) % 3, 0.4
    X, Y = np.random.default_rng(0).standard_normal((12, 20)), np.eye(3)[labels]
    whitening, lengths = whiten(X), 2 * np.sqrt(2 / 3)
    output = (lengths - beta) * (np.eye(3) - 1 / 3) / np.sqrt(2 / 3)
    network = BatchNormNetwork.from_neurons(whitening, Neurons(whitening.rows.T @ Y / 2, output))
    layers = Layers.from_network(network, np.float64, 1e-5)
    module = to_module(network, dtype=torch.float64)
    module[3] = nn.Linear(3, 3).double()
    with torch.no_grad():
        module[3].weight.copy_(torch.tensor(layers.output.T))
        module[3].bias.fill_(0.1)  # of no consequence: the best one is taken
    found = certify(module, X, Y, loss="squared", weight_decay=beta)
    assert found.status is Status.CERTIFIED and found.balanced_objective == pytest.approx(1.7195918, abs=1e-7)
    assert (
        found.scope == "the network, of any width, with an output bias" and found.objective > found.balanced_objective
    )


@pytest.mark.parametrize("decayed", [True, False])
def test_an_output_bias_is_bounded_for_its_own_decay(decayed):
    rng = np.random.default_rng(0)
    X, y, loss = rng.standard_normal((14, 20)), rng.integers(3, size=14), nn.CrossEntropyLoss()
    module = two_layers(20, 12, 3, bias=True)
    rest = [p for name, p in module.named_parameters() if name != "3.bias"]
    groups = [{"params": rest}, {"params": [module[3].bias], "weight_decay": 0.01 if decayed else 0.0}]
    optimizer = torch.optim.Adam(groups, lr=1e-2, weight_decay=0.01)
    trained(module, X, y, loss, optimizer, 2000)
    found = certify(module, X, y, loss=loss, optimizer=optimizer, time_limit=None)
    reached = torch_objective(module, X, y, loss, torch.optim.SGD(
        [{"params": [p], "weight_decay": 0.0 if name == "3.bias" and not decayed else 0.01}
         for name, p in module.named_parameters()]
    ))  # fmt: skip
    assert found.objective == pytest.approx(reached, rel=1e-12)
    assert found.lower_bound <= found.best_known <= found.balanced_objective <= reached
    assert found.best_known - found.lower_bound < 1e-6 * found.best_known  # ours, and the bound at rank n - 1
    assert found.best_n_neurons == 3


# -- honesty --


RUNS = [("SGD", 0.05, 40), ("SGD", 0.2, 12), ("Adam", 0.02, 40), ("Adam", 0.05, 12), ("Adam", 0.01, 100)]


@pytest.mark.parametrize("case", ["low rank", "full rank", "bias"])
def test_no_bound_is_above_what_a_training_run_reaches(case):
    rng = np.random.default_rng(7)
    n, d, K = (16, 20, 3) if case == "full rank" else (24, 2, 1)
    X = rng.standard_normal((n, d))
    y = rng.integers(K, size=n) if K > 1 else np.sin(3 * X[:, :1]) + X[:, 1:2] ** 2
    loss = nn.CrossEntropyLoss() if K > 1 else nn.MSELoss()
    reached, bounds = [], []
    for k, (kind, rate, width) in enumerate(RUNS):
        module = two_layers(d, width, K, bias=case == "bias", seed=k)
        momentum = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(torch.optim, kind)(module.parameters(), lr=rate, weight_decay=5e-3, **momentum)
        for steps in (30, 600):
            trained(module, X, y, loss, optimizer, steps)
            found = certify(module, X, y, loss=loss, optimizer=optimizer, time_limit=None if k == 2 else 0)
            reached.append(torch_objective(module, X, y, loss, optimizer))
            bounds.append(found.lower_bound)
            assert found.best_known <= found.balanced_objective <= reached[-1] * (1 + 1e-12)
    assert max(bounds) <= min(reached)
    assert max(bounds) > 0.5 * min(reached)


# -- what the gap means --


def curve(n=40):
    rng = np.random.default_rng(2)
    X = rng.standard_normal((n, 2))
    return X, np.sin(3 * X[:, :1]) + X[:, 1:2] ** 2


def judged(module, X, y, steps, **settings):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, weight_decay=2e-3)
    trained(module, X, y, nn.MSELoss(), optimizer, steps)
    return certify(module, X, y, loss=nn.MSELoss(), optimizer=optimizer, **settings)


def test_a_narrow_network_has_too_few_neurons():
    X, y = curve()
    found = judged(two_layers(2, 2, 1), X, y, 1500, time_limit=None)
    assert found.cause is Cause.WIDTH and found.n_neurons == 2 < found.best_n_neurons
    assert f"want of neurons: 2 against {found.best_n_neurons}" in found.explanation
    assert found.best_known < 0.7 * found.trained_on_objective


def test_a_network_that_was_trained_little_can_be_trained_on():
    X, y = curve()
    found = judged(two_layers(2, 40, 1), X, y, 30, time_limit=None)
    assert found.cause is Cause.OPTIMISATION and found.trained_on_objective < 0.7 * found.balanced_objective
    assert "optimisation error: train longer" in found.explanation and found.status is Status.GAP_OPEN
    hasty = judged(two_layers(2, 40, 1), X, y, 30, time_limit=0)
    assert hasty.cause is Cause.OPTIMISATION and hasty.trained_on_objective is None
    assert "finds a neuron that would lower" in hasty.explanation


def test_a_loose_bound_is_told_from_a_bad_network():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 9)), np.sign(rng.standard_normal((40, 3)))
    model = ConvexBNRegressor(activation="relu", weight_decay=0.5, random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(X, y)
    module = to_module(model.network_, dtype=torch.float64)
    found = certify(module, X, y, loss="squared", weight_decay=0.5, time_limit=None)
    assert found.cause is Cause.BOUND and found.relative_gap > 1e-3 and "valid and may be loose" in found.explanation
    assert found.best_known > found.balanced_objective * (1 - 1e-3)


# -- deep networks, and what is left alone --


def deep(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 40), nn.ReLU()]
    head = [nn.Linear(40, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)]
    return nn.Sequential(nn.Sequential(*body), *head)


def test_of_a_deep_network_the_last_two_layers_are_judged_on_its_features():
    module, images = deep(), torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    y, loss = torch.arange(16) % 3, nn.CrossEntropyLoss()
    with torch.no_grad():
        module[-1].bias.zero_()
    module[-1].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss(module(images), y).backward()
        optimizer.step()
    found = certify(module, images, y, loss=loss, optimizer=optimizer, time_limit=5)
    assert found.scope == "the last two layers on these features, of any width" and found.universal
    assert "whatever the layers before compute" in found.explanation
    beta = 1e-2 * np.sqrt(16)
    tau = beta / np.sqrt([6, 5, 5]) * np.sqrt(2 / 3)  # mathematics 2e
    counts, amplitude = np.array([6, 5, 5]), np.log(2 * (1 - tau) / tau)
    best = np.sum(-counts * np.log1p(-tau) + beta * np.sqrt(counts * 2 / 3) * amplitude) / 16
    assert found.best_known == pytest.approx(best, rel=1e-6) and found.lower_bound <= best * (1 + 1e-9)
    tail = read_last_layers(module)
    own = nn.Sequential(*list(module)[1:])
    same = certify(own, tail.features(images), y, loss=loss, optimizer=optimizer, time_limit=0)
    assert same.objective == pytest.approx(found.objective, rel=1e-12) and not same.universal


def test_module_gradients_and_random_numbers_are_left_as_they_were():
    module, images, y = deep(), torch.randn(16, 1, 6, 6), np.arange(16) % 3
    nn.CrossEntropyLoss()(module(images), torch.tensor(y)).backward()
    state = copy.deepcopy(module.state_dict())
    grads = [parameter.grad.clone() for parameter in module.parameters()]
    before = torch.get_rng_state(), np.random.mtrand._rand.get_state()[1].copy()
    certify(module, images, y, loss=nn.CrossEntropyLoss(), weight_decay=0.1, time_limit=1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(module.parameters(), grads, strict=True))
    assert module.training and torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.mtrand._rand.get_state()[1], before[1])


def test_dead_neurons_and_repeated_rows():
    rng = np.random.default_rng(0)
    X, y = np.repeat(rng.standard_normal((10, 3)), 2, axis=0), rng.standard_normal((20, 1))
    module = two_layers(3, 5, 1)
    module(torch.tensor(X))
    with torch.no_grad():
        module[3].weight[:, 1] = 0
    found = certify(module, X, y, loss=nn.MSELoss(), weight_decay=0.4, time_limit=2)
    assert found.n_neurons == 4 and found.lower_bound <= found.best_known
    with torch.no_grad():
        module[3].weight.zero_()
    nothing = certify(module, X, y, loss=nn.MSELoss(), weight_decay=0.4, time_limit=2)
    assert nothing.n_neurons == 0 and nothing.cause is not Cause.NONE
    assert nothing.lower_bound == pytest.approx(found.lower_bound, rel=1e-2)
    largest = 1.01 * np.linalg.norm(y) * 2
    assert certify(module, X, y, loss=nn.MSELoss(), weight_decay=largest).status is Status.TRIVIAL


def test_layers_can_be_judged_without_torch():
    X, y, _, model = optimum("one output")
    layers = Layers.from_network(model.network_, np.float64, 1e-5)
    objective = Objective.with_weight_decay(TrainedLoss.from_name("squared", y, 1), 0.5)
    found = audit(layers, X, objective)
    assert found.status is Status.CERTIFIED and found.gap == found.balanced_objective - found.lower_bound
    with pytest.raises(ValueError, match="of 20 features; got shape"):
        audit(layers, X[:, :3], objective)


# -- files --


def exported(path, module, X):
    sizes = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(module, (torch.as_tensor(X),), dynamic_shapes=sizes), path)


def written(folder, module, X):
    """The same network as every kind of file."""
    state = module.state_dict()
    exported(folder / "model.pt2", module, X)
    torch.save(state, folder / "state.pt")
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3}, folder / "checkpoint.pt")
    save_file({name: tensor.numpy() for name, tensor in state.items()}, folder / "state.safetensors")
    return sorted(folder.iterdir())


class Functional(nn.Module):
    """What an export makes other steps of: images, a call of the ReLU in place, dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 5), nn.BatchNorm1d(5, eps=0.2), nn.Linear(5, 2)

    def forward(self, x):
        hidden = torch.relu_(self.norm(self.first(x.flatten(1))))
        return self.last(nn.functional.dropout(hidden, training=self.training))


def test_every_kind_of_file_gives_the_same_layers(tmp_path):
    X, _, _, model = optimum("one-hot")
    module = to_module(model.network_, dtype=torch.float64)
    expected = read_last_layers(module).layers
    for path in written(tmp_path, module, X):
        assert is_checkpoint(path)
        layers, assumed = read_checkpoint(path)
        assert np.array_equal(layers.predict(X), expected.predict(X)), path
        assert assumed.startswith("A state dict does not hold its activation or eps") != (path.suffix == ".pt2")
    assert read_checkpoint(tmp_path / "state.pt", eps=0.3).layers.eps == 0.3
    model.save(tmp_path / "ours.safetensors")
    assert not is_checkpoint(tmp_path / "ours.safetensors") and not is_checkpoint(tmp_path)


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_program_holds_its_own_eps_and_order(training, tmp_path):
    torch.manual_seed(0)
    module, X = Functional(), torch.randn(9, 3, 4)
    module(X)
    exported(tmp_path / "model.pt2", module.train(training), X)
    layers = read_checkpoint(tmp_path / "model.pt2").layers
    with torch.no_grad():
        expected = module.eval()(X).numpy()
    assert layers.eps == 0.2 and np.abs(layers.predict(X.flatten(1).double().numpy()) - expected).max() < 1e-6


class Canary:
    """Creates the canary file when it is unpickled."""

    def __reduce__(self):
        return open, (CANARY, "w")


def rezipped(path, changes=None, *, compression=zipfile.ZIP_STORED, folder=None):
    """The same archive with some entries replaced by bytes, by functions of them, or added."""
    changes, buffer = dict(changes or {}), io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        top = folder or old.namelist()[0].split("/")[0]
        for entry in old.namelist():
            name, content = entry.split("/", 1)[1], old.read(entry)
            change = changes.pop(name, content)
            new.writestr(f"{top}/{name}", change(content) if callable(change) else change)
        for name, content in changes.items():
            new.writestr(f"{top}/{name}", content)
    return buffer.getvalue()


def as_json(change):
    def changed(content):
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return changed


def weight_of(name, **values):
    return as_json(lambda config: config["config"][name].update(values))


def meta_of(name, **values):
    return as_json(lambda config: config["config"][name]["tensor_meta"].update(values))


def node(place, target):
    return as_json(lambda program: program["graph_module"]["graph"]["nodes"][place].update(target=target))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def hostile(folder):
    """Files by name, and what their refusal says."""
    module = two_layers(4, 6, 2)
    module(torch.randn(8, 4).double())
    written(folder, module.eval(), torch.randn(8, 4).double())
    pt2, state = folder / "model.pt2", module.state_dict()
    config, program = "data/weights/model_weights_config.json", "models/model.json"
    canary = saved(Canary())
    many = {"is_param": True, "use_pickle": True}
    whole = pickle.dumps(Canary(), 2)
    compressed = rezipped(pt2, {"data/weights/weight_0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    yield "pickle-in-state.pt", canary, "holds something else than tensors"
    yield "module.pt", saved(module), "it names torch.nn.modules.container.Sequential"
    yield "mixed.pt", saved({**state, "canary": Canary()}), "holds something else than tensors"
    yield "swapped.pt", rezipped(folder / "state.pt", {"data.pkl": whole}), "holds something else than tensors"
    yield "damaged.pt", rezipped(folder / "state.pt", {"data.pkl": b"\x80\x02}."}), "holds 0 state dicts"
    yield "script.pt", rezipped(folder / "state.pt", {"constants.pkl": whole}), "no state dict or exported program"
    yield "numbers.pt", saved({"a": 1.0}), "holds 0 state dicts"
    yield "two.pt", saved({"a": state, "b": state}), "holds 2 state dicts"
    yield "expanded.pt", saved({**state, "0.weight": torch.ones(1).expand(6, 4)}), "is an expanded tensor"
    yield "complex.pt", saved({**state, "0.weight": torch.ones(6, 4) * 1j}), "no plain tensor of real numbers"
    yield "deep.pt", saved(deep().state_dict()), "1 other layers|2 batch norm"
    yield "nan.pt", saved({**state, "0.weight": torch.full((6, 4), np.nan)}), "no finite numbers"
    yield "untrained.pt", saved(two_layers(4, 6, 2).state_dict()), "untrained \\(num_batches_tracked is 0\\)"
    yield "square.pt", saved(trained_state(4, 4, 4)), "both orders of its Linear layers fit"
    yield "shapes.pt", saved({**state, "3.weight": torch.ones(2, 5)}), "do not fit its batch norm"
    yield "variance.pt", saved({**state, "1.running_var": -torch.ones(6)}), "no variance"
    yield "plain-norm.pt", saved({k: v for k, v in state.items() if k != "1.bias"}), "no scale and shift"
    yield "cut-to-inner.pt2", rezipped(pt2)[:-30], "holds 0 state dicts"
    yield "bomb.pt2", compressed, "compressed or lie over"
    yield "empty.pt2", b"PK\x05\x06" + bytes(18), "neither an archive"
    yield "sample.pt2", rezipped(pt2, {"data/sample_inputs/model.pt": canary}), None
    yield (
        "use-pickle.pt2",
        rezipped(pt2, {config: weight_of("0.weight", **many), "data/weights/weight_0": canary}),
        "0.weight is no plain tensor",
    )
    yield "constants.pt2", rezipped(pt2, {"data/constants/model_constants_config.json": b"\x80"}), None
    yield "short.pt2", rezipped(pt2, {"data/weights/weight_0": b"abc"}), "other bytes than its shape"
    yield "large.pt2", rezipped(pt2, {config: meta_of("0.weight", sizes=[{"as_int": 2**62}] * 2)}), "not contiguous"
    yield "strides.pt2", rezipped(pt2, {config: meta_of("0.weight", strides=[{"as_int": 0}] * 2)}), "not contiguous"
    yield "sizes.pt2", rezipped(pt2, {config: meta_of("0.weight", sizes=[{"as_int": 1}])}), "another form than torch"
    yield "dtype.pt2", rezipped(pt2, {config: meta_of("0.weight", dtype=12)}), "no plain tensor"
    yield "path.pt2", rezipped(pt2, {config: weight_of("0.weight", path_name="../../../x")}), "has no entry"
    yield "big-endian.pt2", rezipped(pt2, {"byteorder": b"big"}), "other bytes"
    yield "no-json.pt2", rezipped(pt2, {program: b"{"}), "is no JSON"
    yield "nested.pt2", rezipped(pt2, {program: b"[" * 10**6}), "is no JSON"
    yield "other-json.pt2", rezipped(pt2, {program: b"[1, 2]"}), "another form than torch writes"
    yield (
        "gelu.pt2",
        rezipped(pt2, {program: node(2, "torch.ops.aten.gelu.default")}),
        "aten.gelu.default where aten.relu",
    )
    yield "code.pt2", rezipped(pt2, {program: node(2, "os.system")}), "os.system where aten.relu.default is expected"
    yield "two-programs.pt2", rezipped(pt2, {"models/b.json": b"{}"}), "holds 2 programs"
    yield "cut.pt2", pt2.read_bytes()[:-200], "holds 0 state dicts"
    yield "flipped.pt2", flipped(pt2.read_bytes()), "is damaged|table of entries"
    yield "cut.safetensors", (folder / "state.safetensors").read_bytes()[:-9], "cannot be read"
    yield "legacy.pt", whole, "neither an archive of torch nor"
    yield "page.html", b"<!doctype html>", "neither an archive of torch nor"


def trained_state(d, m, K):
    module = two_layers(d, m, K)
    module(torch.randn(8, d).double())
    return module.state_dict()


def flipped(data):
    """One bit of the first weight flipped: its check sum does not match."""
    data = bytearray(data)
    place = data.find(b"weight_0") + 100
    data[place] ^= 1
    return bytes(data)


def test_nothing_in_a_hostile_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    count = 0
    for name, content, words in hostile(tmp_path):
        path = tmp_path / f"hostile-{name}"
        path.write_bytes(content)
        count += 1
        if words is None:
            read_checkpoint(path)
            continue
        with pytest.raises(FormatError, match=words) as refusal:
            read_checkpoint(path)
        assert str(refusal.value).startswith(f"{path} is not read: ") and str(refusal.value).count("\n") == 0
    assert count == 41 and not (tmp_path / CANARY).exists()
    with open(tmp_path / "hostile-mixed.pt", "rb") as file:
        torch.load(file, weights_only=False)["canary"].close()
    assert (tmp_path / CANARY).exists()  # the canary sings where it is let


def test_a_pipe_and_a_name_with_nul_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):  # without a writer a reader would wait
        read_checkpoint(tmp_path / "pipe")
    with pytest.raises(OSError, match="cannot hold a NUL character"):
        read_checkpoint("a\0b")


@pytest.mark.parametrize("name", ["model.pt2", "state.pt", "state.safetensors"])
def test_files_that_are_cut_or_changed_are_refused_or_sound(name, tmp_path):
    """No crash and no other error, whatever bit is wrong."""
    module = two_layers(4, 6, 2)
    module(torch.randn(8, 4).double())
    written(tmp_path, module.eval(), torch.randn(8, 4).double())
    data, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    for k in range(150):
        place = int(rng.integers(len(data)))
        changed = data[:place] if k % 3 == 0 else data[:place] + bytes([data[place] ^ 1 << k % 8]) + data[place + 1 :]
        (tmp_path / "changed").write_bytes(changed)
        try:
            layers = read_checkpoint(tmp_path / "changed").layers
        except FormatError:
            continue
        assert layers.weight.shape == (4, 6) and np.isfinite(layers.weight).all()


# -- the command line --


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line_certifies_files_of_torch(tmp_path, capsys):
    X, y, _, model = optimum("cross_entropy", 0.01 * np.sqrt(12), fit_intercept=False)
    names = np.array(["red", "green", "blue"])[y]
    np.savez(tmp_path / "data.npz", X=X, y=y, names=np.char.add([f"{label} " for label in y], names))
    module = to_module(model.network_, dtype=torch.float64)
    for path in written(tmp_path, module, X):
        if path.suffix == ".npz":
            continue
        question = ("--loss", "CrossEntropyLoss", "--optimizer-decay", 0.01)
        code, out, _ = run(capsys, "certify", path, tmp_path / "data.npz", "--target", "y", *question)
        assert code == 0 and out.startswith("CERTIFIED, on 12 rows: The network, of any width: the objective ")
        assert ("A state dict does not hold its activation or eps" in out) == (path.suffix != ".pt2")
        question = ("--loss", "cross_entropy", "--weight-decay", 0.01 * np.sqrt(12), "--json")
        code, out, _ = run(capsys, "certify", path, tmp_path / "data.npz", "--target", "names", *question)
        result = json.loads(out)
        assert result["status"] == "CERTIFIED" and result["cause"] == "none"
        assert result["balanced_objective"] == pytest.approx(model.certificate_.objective, rel=1e-9)


def test_the_command_line_refuses_in_one_sentence(tmp_path, capsys):
    X, y, _, model = optimum("one output")
    np.savez(tmp_path / "data.npz", X=X, y=y, words=y.astype(str))
    model.save(tmp_path / "ours.safetensors")
    exported(tmp_path / "model.pt2", to_module(model.network_, dtype=torch.float64), X)
    data = (tmp_path / "data.npz", "--target", "y")
    loss, decay = ("--loss", "MSELoss"), ("--optimizer-decay", 0.1)
    for arguments, words in [
        (("model.pt2", *data), "does not hold its objective: give --loss"),
        (("model.pt2", *data, *loss), "give --loss, and --weight-decay or --optimizer-decay"),
        (("model.pt2", *data, *loss, *decay, "--weight-decay", 1), "--weight-decay or --optimizer-decay"),
        (("model.pt2", *data, *loss, *decay, "--eps", 0.1), "holds its own eps"),
        (("model.pt2", *data, *loss, "--weight-decay", 0), "weight_decay must be a positive number"),
        (("model.pt2", *data, *loss, *decay, "--time-limit", -1), "time_limit must not be negative"),
        (("model.pt2", data[0], "--target", "words", *loss, *decay), "outputs for 2 classes, and y has 12 labels"),
        (("model.pt2", data[0], *loss, *decay), "--target is required"),
        (("model.pt2", "digits", *loss, *decay), "outputs for|of 20 features"),
        (("ours.safetensors", *data, *loss), "--loss is for networks that torch trained"),
        (("data.npz", *data, *loss, *decay), "not in one folder|no state dict|compressed"),
    ]:
        code, out, err = run(capsys, "certify", tmp_path / arguments[0], *arguments[1:])
        assert code == 1 and out == "" and any(word in err for word in words.split("|")), err
        assert err.startswith("convexbn: error: ") and err.count("\n") == 1


def test_labels_of_a_table_as_targets():
    assert targets_of_labels("MSELoss", np.array([0.5, 2.0]), 1).tolist() == [0.5, 2.0]
    assert targets_of_labels("squared", np.array([2, 0, 1]), 3).tolist() == np.eye(3)[[2, 0, 1]].tolist()
    assert targets_of_labels("logistic", np.array(["no", "yes"]), 1).tolist() == [[-1], [1]]
    assert targets_of_labels("BCEWithLogitsLoss", np.array([7, 3]), 1).tolist() == [[1], [0]]
    assert targets_of_labels("CrossEntropyLoss", np.array([0, 2]), 3).tolist() == [0, 2]


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from convexbn.cli import main
question = ["data.npz", "--target", "y", "--loss", "MSELoss", "--weight-decay", "0.5", "--json"]
for name in ("model.pt2", "state.safetensors", "state.pt"):
    print(name, main(["certify", name, *question]))
"""


def test_exported_programs_and_safetensors_need_no_torch(tmp_path):
    X, y, _, model = optimum("one output")
    np.savez(tmp_path / "data.npz", X=X, y=y)
    written(tmp_path, to_module(model.network_, dtype=torch.float64), X)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count('"status": "CERTIFIED"') == 2, done.stderr
    assert [line for line in done.stdout.splitlines() if line.endswith(" 0")] == ["model.pt2 0", "state.safetensors 0"]
    assert done.stdout.endswith("state.pt 1\n") and "pip install 'convexbn[torch]'" in done.stderr


def test_an_unsafe_torch_is_not_used(tmp_path, monkeypatch):
    torch.save(trained_state(4, 6, 2), tmp_path / "state.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ImportError, match=r"torch 2.5.1\+cpu may run code in a hostile file .* 'torch>=2.10'"):
        read_checkpoint(tmp_path / "state.pt")


def test_losses_of_this_package_take_their_own_targets():
    rng = np.random.default_rng(0)
    F = rng.standard_normal((9, 2))
    loss = TrainedLoss.from_name("squared", F + 1, 2)
    assert loss.value(F) == pytest.approx(9) and loss.factor == 1
    assert isinstance(LOSSES[loss.name](loss.targets, np.ones(9)), SquaredLoss)
