"""The last two layers re-optimised: the torch objective, read off the module alone, against the closed form."""

import copy
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from convexbn.certificate.status import Status
from convexbn.nn.interpolation import Segment
from convexbn.nn.reoptimise import reoptimise
from convexbn.program.losses import CrossEntropyLoss
from convexbn.program.neurons import Neurons
from convexbn.training.neural_collapse import collapse_metrics
from convexbn.training.training_set import TrainingSet
from instances import EPS, labels, network_outputs
from test_collapse import BALANCED, FIGURES, UNBALANCED, check_figures

torch.set_num_threads(1)
N, D, M, K, BETA = 32, 10, 64, 4, 0.5

#: Optima at a weight decay of .5 (mathematics, section 4).
OPTIMA = {
    ("squared", BALANCED): 5.156854249492381,
    ("cross_entropy", BALANCED): 19.0792659138,
    ("squared", UNBALANCED): 4.961598968562998,
    ("cross_entropy", UNBALANCED): 18.4135263594,
}


def randomise(module, seed=0):
    """Random scale, shift and statistics in every batch norm: as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5)):
                tensor.data.uniform_(low, high, generator=generator)
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            layer.num_batches_tracked.fill_(1)
    return module


def deep(width=20, outputs=K, dtype=torch.float64, bias=True, seed=0):
    """Four layers, the first two random."""
    torch.manual_seed(seed)
    layers = [nn.Linear(D, M), nn.BatchNorm1d(M), nn.ReLU(), nn.Linear(M, M), nn.BatchNorm1d(M), nn.ReLU()]
    layers += [nn.Linear(M, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, outputs, bias=bias)]
    return randomise(nn.Sequential(*layers).to(dtype))


def data(counts=BALANCED, dtype=torch.float64, d=D, seed=0):
    X = torch.randn(sum(counts), d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return X.to(dtype), torch.tensor(labels(counts))


def torch_loss(outputs, y, loss):
    if loss == "squared_hinge":
        signs = 2 * torch.eye(outputs.shape[1], dtype=outputs.dtype)[y] - 1
        return 0.5 * (1 - signs * outputs).clamp(min=0).square().sum()
    if loss == "squared":
        return 0.5 * (outputs - torch.eye(outputs.shape[1], dtype=outputs.dtype)[y]).square().sum()
    return nn.functional.cross_entropy(outputs, y, reduction="sum")


def torch_objective(module, X, y, loss, weight_decay, tail=("6", "7", "9")):
    """Loss in train mode plus the balanced penalty, from hooks on a copy: no code of the package."""
    module, seen = copy.deepcopy(module).double().train(), []
    _, norm, last = (module.get_submodule(name) for name in tail)
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        value = torch_loss(module(X.double()), y, loss)
        squares = (seen[0] - seen[0].mean(dim=0)).square().sum(dim=0)
        n = len(X)
        gamma = n**0.5 * norm.weight * (squares / (squares + n * norm.eps)).sqrt()
        hidden = torch.hypot(gamma, n**0.5 * norm.bias)
        return float(value + weight_decay * (hidden * last.weight.norm(dim=0)).sum())


def hidden_of(module, X):
    """Features of the last Linear in eval mode."""
    with torch.no_grad():
        return module[:-1](X).numpy()


# --- rank n - 1 ---


@pytest.mark.parametrize(("loss", "counts"), OPTIMA)
@pytest.mark.parametrize("bias", [True, False])
def test_four_layers_reach_the_closed_form(loss, counts, bias):
    module, (X, y) = deep(bias=bias), data(counts)
    result = reoptimise(module, X, y, loss=loss, weight_decay=BETA)
    optimum = OPTIMA[loss, counts]
    assert torch_objective(result.module, X, y, loss, BETA) == pytest.approx(optimum, rel=1e-9)
    assert result.after.objective == pytest.approx(optimum, rel=1e-9)
    assert result.after.weight_decay_objective == pytest.approx(optimum, rel=1e-4)  # eps of batch norm
    assert result.certificate.status is Status.CERTIFIED, result.certificate.sentence
    assert result.certificate.objective == pytest.approx(optimum, rel=1e-9)
    assert result.after.n_neurons == K and result.after.train_accuracy == 1
    last = result.module[-1]
    check_figures(
        collapse_metrics(hidden_of(result.module, X), y.numpy(), last.weight.detach().numpy().T), loss, counts
    )
    assert last.bias is None if not bias else not last.bias.any()


def test_the_squared_hinge_reaches_its_closed_form():
    """Rays of +-1 targets of norm ``2 sqrt(8)``: ``beta ||Y_k|| - beta^2 / 2`` each."""
    module, (X, y) = deep(), data()
    result = reoptimise(module, X, y, loss="squared_hinge", weight_decay=BETA)
    optimum = K * (BETA * np.sqrt(N / K * K) - BETA**2 / 2)
    assert torch_objective(result.module, X, y, "squared_hinge", BETA) == pytest.approx(optimum, rel=1e-9)
    assert result.certificate.status is Status.CERTIFIED and result.after.train_accuracy == 1


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_before_is_the_given_module_with_full_batch_statistics(loss):
    module, (X, y) = deep(), data()
    before = reoptimise(module, X, y, loss=loss, weight_decay=BETA).before
    assert before.objective == pytest.approx(torch_objective(module, X, y, loss, BETA), rel=1e-9)
    with torch.no_grad():
        squares = N * (module[7].weight.square().sum() + module[7].bias.square().sum())
        squares += module[9].weight.square().sum()
        raw = torch_loss(copy.deepcopy(module).train()(X), y, loss) + BETA / 2 * squares
        accuracy = (module.eval()(X).argmax(dim=1) == y).double().mean()
    assert before.weight_decay_objective == pytest.approx(float(raw), rel=1e-9)
    assert before.train_accuracy == float(accuracy) and before.validation_accuracy is None
    assert before.n_neurons == 20


def test_train_mode_on_all_rows_is_eval_mode_and_leaves_the_statistics():
    X, y = data(UNBALANCED)
    new = reoptimise(deep(), X, y, loss="squared", weight_decay=BETA).module
    stored = {name: tensor.clone() for name, tensor in new.state_dict().items() if "running" in name}
    with torch.no_grad():
        assert not new.training
        expected = new(X)
        assert torch.allclose(new.train()(X), expected, rtol=0, atol=1e-11)
    assert all(torch.equal(new.state_dict()[name], tensor) for name, tensor in stored.items())
    with torch.no_grad():
        first = new[0](X)
    assert torch.allclose(new[1].running_mean, first.mean(dim=0), rtol=0, atol=1e-12)
    assert torch.allclose(new[1].running_var, first.var(dim=0, unbiased=False), rtol=1e-12)


def test_the_given_module_is_not_changed():
    module, (X, y) = deep().train(), data()
    module.requires_grad_(False)[9].requires_grad_(True)
    before = copy.deepcopy(module.state_dict())
    new = reoptimise(module, X, y, loss="squared", weight_decay=BETA).module
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training and module[1].momentum == 0.1 and not module[6]._forward_pre_hooks
    assert {name for name, part in new.named_parameters() if part.requires_grad} == {"9.weight", "9.bias"}
    assert not {part.data_ptr() for part in new.parameters()} & {part.data_ptr() for part in module.parameters()}
    assert new.load_state_dict(copy.deepcopy(new).state_dict())
    layers = nn.Linear(M, K), nn.BatchNorm1d(K, momentum=0.0), nn.ReLU(), nn.Linear(K, K)
    assert [str(layer) for layer in new[6:]] == [str(layer) for layer in layers]


def test_float32():
    X, y = data(dtype=torch.float32)
    result = reoptimise(deep(dtype=torch.float32), X, y, loss="squared", weight_decay=BETA, tol=1e-4)
    optimum = OPTIMA["squared", BALANCED]
    assert {part.dtype for part in result.module.parameters()} == {torch.float32}
    assert result.after.objective == pytest.approx(optimum, rel=1e-4)
    assert result.certificate.status is Status.CERTIFIED, result.certificate.sentence
    with torch.no_grad():
        assert float(torch_loss(result.module(X), y, "squared")) == pytest.approx(4 * 0.125, rel=1e-3)


def test_dead_classes_and_a_dead_network():
    X, y = data(UNBALANCED)
    for weight_decay, live in ((2.0, 3), (3.3, 1)):
        result = reoptimise(deep(), X, y, loss="squared", weight_decay=weight_decay)
        assert result.after.n_neurons == live
        assert result.certificate.status is Status.CERTIFIED
        assert torch_objective(result.module, X, y, "squared", weight_decay) == pytest.approx(
            sum(min(weight_decay * r - weight_decay**2 / 2, r**2 / 2) if r > weight_decay else r**2 / 2
                for r in np.sqrt(UNBALANCED)), rel=1e-9,
        )  # fmt: skip
    result = reoptimise(deep(), X, y, loss="squared", weight_decay=4.0)
    assert result.certificate.status is Status.TRIVIAL
    with torch.no_grad():
        assert not result.module(X).any() and result.module[6].out_features == 1
    assert result.after.objective == pytest.approx(N / 2)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("negative", [0, -1])
def test_one_output_has_two_classes(loss, negative):
    X, y = data((20, 12))
    result = reoptimise(deep(outputs=1), X, torch.where(y == 1, 1, negative), loss=loss, weight_decay=BETA)
    assert result.certificate.status is Status.CERTIFIED
    assert result.after.train_accuracy == 1 and result.after.n_neurons == 2
    with torch.no_grad():
        assert torch.equal(result.module(X)[:, 0] > 0, y == 1)


def test_numbers_are_targets():
    X, _ = data()
    y = X[:, 0] ** 2
    result = reoptimise(deep(outputs=1), X, y, loss="squared", weight_decay=BETA, X_val=X, y_val=y)
    assert result.certificate.status is Status.CERTIFIED
    assert result.before.train_accuracy is result.after.validation_accuracy is None


# --- modules of other kinds ---


def wrapped_forward():
    """Layers called by name, the ReLU a function."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(1, 4, 3, padding=1)
            self.first_norm = nn.BatchNorm2d(4)
            self.narrow, self.norm = nn.Linear(64, 12), nn.BatchNorm1d(12)
            self.last = nn.Linear(12, 3)

        def forward(self, x):
            x = nn.functional.avg_pool2d(torch.relu(self.first_norm(self.convolution(x))), 2)
            return self.last(torch.relu(self.norm(self.narrow(x.flatten(1)))))

    return Network(), ("narrow", "norm", "last")


def pooled():
    """Two convolutions, global average pooling, dropout, a nested tail."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 60, 3), nn.BatchNorm2d(60)]
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)]
    tail = nn.Sequential(nn.Linear(60, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    return nn.Sequential(*layers, tail), ("9.0", "9.1", "9.3")


@pytest.mark.parametrize("network", [wrapped_forward, pooled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions(network, dtype):
    torch.manual_seed(0)
    module, tail = network()
    module = randomise(module.to(dtype))
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(24, 1, 8, 8, generator=generator).to(dtype), torch.arange(24) % 3
    result = reoptimise(module, X, y, loss="cross_entropy", weight_decay=0.3, X_val=X[:5], y_val=y[:5], tol=1e-3)
    tau = 0.3 / np.sqrt(8) * np.sqrt(2 / 3)
    optimum = 3 * (-8 * np.log(1 - tau) + 0.3 * np.sqrt(8) * np.log(2 * (1 - tau) / tau) * np.sqrt(2 / 3))
    assert result.after.objective == pytest.approx(optimum, rel=1e-9 if dtype == torch.float64 else 1e-3)
    assert result.certificate.status is Status.CERTIFIED, result.certificate.sentence
    assert result.after.validation_accuracy == 1
    if dtype == torch.float64:
        for dropout in result.module.modules():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0
        value = torch_objective(result.module, X, y, "cross_entropy", 0.3, tail)
        assert value == pytest.approx(optimum, rel=1e-9)


def test_statistics_of_many_batches_are_those_of_one(monkeypatch):
    X, y = data()
    whole = reoptimise(deep(), X, y, loss="squared", weight_decay=BETA).module.state_dict()
    monkeypatch.setattr("convexbn.nn.batch_statistics._BATCH", 5)
    parts = reoptimise(deep(), X, y, loss="squared", weight_decay=BETA).module.state_dict()
    assert all(torch.allclose(parts[name], whole[name], rtol=0, atol=1e-9) for name in whole)


# --- other ranks ---


def trained(n=150, width=12, seed=0, bias=True):
    """A narrow network trained by Adam, whose features do not reach rank n - 1."""
    torch.manual_seed(seed)
    X = torch.randn(n, 4, dtype=torch.float64)
    y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 1).long()
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()]
    layers += [nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3, bias=bias)]
    module = nn.Sequential(*layers).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02, weight_decay=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X), y).backward()
        optimizer.step()
    return module, X, y


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_a_trained_network_is_improved_and_the_bound_is_valid(loss):
    module, X, y = trained()
    result = reoptimise(module, X, y, loss=loss, weight_decay=1.0, tol=1e-3, time_limit=3)
    before, after = (torch_objective(m, X, y, loss, 1.0, ("3", "4", "6")) for m in (module, result.module))
    assert result.before.objective == pytest.approx(before, rel=1e-9)
    assert result.after.objective == pytest.approx(after, rel=1e-9)
    assert after < before
    proof = result.certificate
    assert proof.lower_bound <= after and proof.objective == pytest.approx(after, rel=1e-9)
    assert proof.status in (Status.CERTIFIED, Status.RESTRICTED, Status.GAP_OPEN)


# --- validation rows choose ---


def accuracy_of(module, X, y):
    with torch.no_grad():
        return float((copy.deepcopy(module).eval()(X).argmax(dim=1) == y).double().mean())


@pytest.fixture
def unpriced(monkeypatch):
    """The local phase alone, as on many rows."""
    monkeypatch.setattr(import_module("convexbn.nn.reoptimise"), "PRICING_ROWS", 100)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight_decay", [0.02, 1.0])
def test_the_objective_falls_and_validation_accuracy_does_not(unpriced, seed, weight_decay):
    module, X, y = trained(n=200, seed=seed)
    X, X_val, y, y_val = X[:120], X[120:], y[:120], y[120:]
    options = {"loss": "cross_entropy", "weight_decay": weight_decay, "certify": False, "time_limit": None}
    result = reoptimise(module, X, y, X_val=X_val, y_val=y_val, **options)
    assert result.after.validation_accuracy == accuracy_of(result.module, X_val, y_val)
    assert result.after.validation_accuracy >= accuracy_of(module, X_val, y_val) == result.before.validation_accuracy
    assert result.after.objective < result.before.objective
    alone = reoptimise(module, X, y, **options)
    assert alone.step == 1 and alone.statistics == "all rows"
    if result.step == 1 and result.statistics == "all rows":
        assert result.after.objective == alone.after.objective


def test_a_module_that_is_right_on_all_validation_rows_stays_so(unpriced):
    """Its own classes as labels: whatever the optimum says of them, the layers stop short of changing one."""
    module, X, y = trained()
    X_val = 2 * torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        y_val = copy.deepcopy(module).eval()(X_val).argmax(dim=1)
    result = reoptimise(module, X, y, loss="cross_entropy", weight_decay=1.0, X_val=X_val, y_val=y_val)
    assert result.before.validation_accuracy == result.after.validation_accuracy == 1
    assert result.statistics == "stored" and 0 <= result.step < 1
    assert result.after.objective < 0.95 * result.before.objective
    assert all(torch.equal(result.module[1].state_dict()[name], t) for name, t in module[1].state_dict().items())
    assert result.module[1].momentum == 0 and module[1].momentum == 0.1
    assert result.certificate is None and result.module[-1].bias.any()


def test_where_zero_is_optimal_the_trained_layers_may_stay(unpriced):
    module, X, y = trained()
    options = {"loss": "cross_entropy", "weight_decay": 1e4, "certify": False}
    assert reoptimise(module, X, y, **options).after.objective == pytest.approx(150 * np.log(3))
    result = reoptimise(module, X, y, X_val=X, y_val=y, **options)
    assert result.after.validation_accuracy >= result.before.validation_accuracy > 0.9
    assert result.after.objective <= result.before.objective * (1 + 1e-12) and result.step < 1


def test_without_an_output_bias_the_chosen_layers_are_certified(unpriced):
    module, X, y = trained(bias=False)
    with torch.no_grad():
        y_val = copy.deepcopy(module).eval()(X).argmax(dim=1)
    result = reoptimise(module, X, y, loss="cross_entropy", weight_decay=0.2, X_val=X, y_val=y_val, time_limit=2)
    proof = result.certificate
    assert proof.objective == pytest.approx(result.after.objective, rel=1e-9)
    assert proof.lower_bound <= proof.objective and result.after.validation_accuracy == 1


def test_the_objective_is_convex_along_the_segment():
    rng = np.random.default_rng(0)
    Y = np.eye(3)[rng.integers(3, size=60)]
    data = TrainingSet.prepare(
        rng.standard_normal((60, 4)), Y, np.ones(60), loss=CrossEntropyLoss, rank=None, input_eps=EPS,
        merge_features=True,
    )  # fmt: skip
    first, second = (Neurons(rng.standard_normal((5, 6)), rng.standard_normal((6, 3))) for _ in range(2))
    segment = Segment.between(data.relu_program(0.3), first.balanced(), np.array([0.1, -0.2, 0.3]), second)

    def objective(step, scale=1.0):
        point = segment.at(step)
        outputs = network_outputs(data.whitening.rows, point.neurons) + point.output_bias
        return data.loss.value(scale * outputs) + 0.3 * scale * float(point.neurons.norms.sum())

    values = np.array([objective(step) for step in np.linspace(0, 1, 11)])
    assert (np.diff(values, 2) >= -1e-12 * values[:-2]).all()
    assert min(objective(0.0, scale) for scale in (0.999, 1.001)) >= values[0] * (1 - 1e-10)  # the best scale
    found = [objective(point.step) for point in segment.points()]
    assert len(found) == 21 and found == sorted(found)
    assert len(segment.at(0.5).neurons.output) == 12 and len(segment.at(0.0).neurons.output) == 6


def test_many_rows_have_the_local_phase_alone(monkeypatch):
    monkeypatch.setattr(import_module("convexbn.nn.reoptimise"), "PRICING_ROWS", 100)
    module, X, y = trained()
    options = {"loss": "cross_entropy", "weight_decay": 1.0, "time_limit": None, "certify": False}
    few, many = (reoptimise(module, X, y, max_iter=steps, **options).after.objective for steps in (5, 200))
    result = reoptimise(module, X, y, max_iter=200, **options | {"certify": True, "time_limit": 1.0})
    assert many < few < result.before.objective
    assert result.certificate.lower_bound <= many and result.after.objective < result.before.objective


def test_without_time_the_module_is_not_worse_and_without_proof_there_is_none():
    module, X, y = trained(bias=False)
    result = reoptimise(module, X, y, loss="cross_entropy", weight_decay=1e-3, time_limit=0.0, certify=False)
    assert result.after.objective <= result.before.objective * (1 + 1e-12) and result.certificate is None


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight_decay": 0.0}, ValueError, "weight_decay must be positive"),
        ({"loss": "hinge"}, ValueError, "loss='hinge' is not for a module of 4 outputs"),
        ({"loss": "logistic"}, ValueError, "'cross_entropy'"),
        ({"y": torch.full((N,), 4)}, ValueError, "0 to 3.*got 4 to 4"),
        ({"y": torch.zeros(N - 1, dtype=torch.long)}, ValueError, "32 integers"),
        ({"y": torch.zeros(N, 3)}, ValueError, "4 outputs"),
        ({"y": torch.full((N, K), torch.nan)}, ValueError, "finite"),
        ({"X": torch.zeros(N, D + 1)}, ValueError, r"rows of shape \(11,\)"),
        ({"X": torch.full((N, D), torch.nan)}, ValueError, "X must be finite"),
        ({"X": torch.zeros(0, D)}, ValueError, r"X must have rows.*shape \(0, 10\)"),
        ({"X": "rows.csv"}, TypeError, "X must be an array or tensor of numbers"),
        ({"tol": float("nan")}, ValueError, "tol must be a number"),
        ({"time_limit": -1.0}, ValueError, "time_limit must not be negative"),
        ({"X_val": torch.zeros(3, D)}, ValueError, "give X_val and y_val together"),
        ({"X_val": torch.zeros(3, D), "y_val": [0, 1]}, ValueError, "y_val must hold 3 integers"),
        ({"module": deep(dtype=torch.bfloat16)}, TypeError, "bfloat16"),
        ({"module": deep()[:6]}, TypeError, "that end in Linear, BatchNorm1d, ReLU, Linear"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes, error, words):
    X, y = data()
    asked = {"module": deep(), "X": X, "y": y, "loss": "squared", "weight_decay": BETA} | changes
    with pytest.raises(error, match=words):
        reoptimise(asked.pop("module"), asked.pop("X"), asked.pop("y"), **asked)


def test_a_batch_norm_without_statistics_is_refused():
    module, (X, y) = deep(), data()
    module[1] = nn.BatchNorm1d(M, track_running_stats=False).double()
    with pytest.raises(ValueError, match="BatchNorm1d '1' has no stored statistics"):
        reoptimise(module, X, y, loss="squared", weight_decay=BETA)


def test_figures_are_there_for_every_optimum():
    assert set(OPTIMA) == set(FIGURES)
