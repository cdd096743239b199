"""Convolutional networks and torch modules, both ways, and audits of modules."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")


import convexbn.nn  # noqa: E402
from convexbn import ConvexBNClassifier, ConvexBNRegressor, Convolution  # noqa: E402

nn = torch.nn
LAYERS = {
    "average": Convolution(3, padding=1),
    "grid": Convolution((3, 2), stride=(1, 2), regions=(2, 2)),
    "flattened": Convolution(3, stride=3, regions="all"),
    "max": Convolution(3, stride=2, pooling="max", padding=(0, 1)),
    "max grid": Convolution(2, pooling="max", regions=2),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(layer, shape=(6, 5, 2), K=2, m=4, seed=0):
    """A network with the statistics of random images."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((30, *shape)) + 1
    model = ConvexBNRegressor(
        activation="relu", convolution=layer, width=m, max_iter=1, weight_decay=0.05, rank=6, time_limit=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(X, rng.standard_normal((30, K))).network_, X


def images(X):
    return torch.tensor(np.moveaxis(X, -1, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_modules_give_the_outputs_in_eval_and_train_mode_and_come_back(name):
    net, X = network(LAYERS[name])
    module = convexbn.nn.to_module(net, dtype=torch.float64, X=X)
    kinds = [type(layer).__name__ for layer in module]
    pool = {"average": "AdaptiveAvgPool2d", "max": "AdaptiveMaxPool2d"}[LAYERS[name].pooling]
    assert kinds == [
        "Conv2d", "BatchNorm2d", "ReLU", *([] if name == "flattened" else [pool]), "Flatten", "Linear"
    ]  # fmt: skip
    expected = net.predict(X.reshape(30, -1))
    with torch.no_grad():
        for part in (module.eval(), module.train()):
            np.testing.assert_allclose(part(images(X)).numpy(), expected, rtol=1e-10, atol=1e-12)
    folded = convexbn.nn.to_module(net, dtype=torch.float64, fold=True)
    single = convexbn.nn.to_module(net, dtype=torch.float32, tol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(folded(images(X)).numpy(), expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(single(images(X).float()).numpy(), expected, atol=1e-5 * np.abs(expected).max())
    for statistics in ("stored", "batch"):
        back = convexbn.nn.from_module(module, images(X), statistics=statistics)
        assert back.convolution.channels == "first"
        rows = back.convolution.rows(images(X).numpy())
        np.testing.assert_allclose(back.predict(rows), expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(back.gamma, net.gamma, rtol=1e-9)


def test_signals_become_conv1d():
    net, X = network(Convolution(3, stride=2, regions=3), shape=(13, 2))
    module = convexbn.nn.to_module(net, dtype=torch.float64, X=X)
    assert [type(layer).__name__ for layer in module][:2] == ["Conv1d", "BatchNorm1d"]
    np.testing.assert_allclose(module(images(X)).detach(), net.predict(X.reshape(30, -1)), rtol=1e-10, atol=1e-12)
    back = convexbn.nn.from_module(module, images(X))
    np.testing.assert_allclose(back.output, net.output, rtol=1e-9)


class Pooled(nn.Module):
    """The pooling is a call in the forward."""

    def __init__(self, kind, flat=1):
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.last = nn.Linear(5 * flat, 2, bias=False)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.conv(x)))
        pooled = {"mean": lambda: hidden.mean((2, 3)), "max": lambda: hidden.amax((2, 3)), "flat": lambda: hidden}
        return self.last(pooled[self.kind]().flatten(1))


@pytest.mark.parametrize(("kind", "expected"), [("mean", "average"), ("max", "max"), ("flat", "all")])
def test_pooling_in_the_forward_is_found_by_its_outputs(kind, expected):
    torch.manual_seed(0)
    module, X = Pooled(kind, 12 if kind == "flat" else 1), torch.randn(20, 2, 6, 5)
    module(X)
    back = convexbn.nn.from_module(module, X)
    assert expected in (back.convolution.pooling, back.convolution.regions)
    with torch.no_grad():
        outputs = module.double().eval()(X.double()).numpy()
    np.testing.assert_allclose(back.predict(back.convolution.rows(X.double().numpy())), outputs, rtol=1e-9, atol=1e-11)


def test_windows_are_regions():
    torch.manual_seed(0)
    for pool in (nn.AvgPool2d(2), nn.MaxPool2d(2)):
        module = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(12, 2, bias=False)
        )
        module(X := torch.randn(15, 1, 6, 6))
        assert convexbn.nn.from_module(module, X).convolution.regions == (2, 2)


def test_the_bias_of_the_last_linear_is_the_output_bias():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    module, X = nn.Sequential(*layers).double(), torch.randn(15, 1, 6, 6, dtype=torch.float64)
    outputs = module(X).detach().numpy()
    back = convexbn.nn.from_module(module, X, statistics="batch")
    assert np.array_equal(back.output_bias, layers[-1].bias.detach().numpy())
    np.testing.assert_allclose(back.predict(back.convolution.rows(X.numpy())), outputs, rtol=1e-9, atol=1e-11)


def trained(layer, weight_decay, *, bias, epochs=300):
    """A module trained by Adam on all images at once: mean squared error halved, decay on batch norm and output."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    X = torch.tensor(rng.standard_normal((10, 1, 4)))
    y = torch.tensor(rng.standard_normal((10, 1)))
    module = nn.Sequential(
        nn.Conv1d(1, 12, 2), nn.BatchNorm1d(12), nn.ReLU(), layer, nn.Flatten(), nn.Linear(12, 1, bias=bias)
    ).double()
    decayed = [*module[1].parameters(), module[5].weight]
    free = [*module[0].parameters(), *([module[5].bias] if bias else [])]
    optimizer = torch.optim.Adam([{"params": decayed, "weight_decay": weight_decay}, {"params": free}], lr=0.02)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(X), y).backward()
        optimizer.step()
    return module, X, y, optimizer


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool1d(1)], ids=["average", "max"])
@pytest.mark.parametrize("bias", [False, True])
def test_audits_count_the_locations_in_the_weight_decay_and_bound_the_module(pool, bias):
    decay = 0.02
    module, X, y, optimizer = trained(pool, decay, bias=bias)
    found = convexbn.nn.certify(module, X, y, loss=nn.MSELoss(), optimizer=optimizer, time_limit=None, tol=1e-2)
    module.train()
    with torch.no_grad():
        squares = sum(float((p**2).sum()) for p in [*module[1].parameters(), module[5].weight])
        objective = float(nn.functional.mse_loss(module(X), y)) + 0.5 * decay * squares
    assert found.objective == pytest.approx(objective, rel=1e-4)  # eps of batch norm
    n, N = 10, 30
    assert found.weight_decay == pytest.approx(decay / (2 / n / np.sqrt(1)) / np.sqrt(N), rel=1e-9)
    assert found.lower_bound <= found.best_known * (1 + 1e-9) and found.best_known <= found.balanced_objective
    assert found.lower_bound >= 0.5 * found.best_known > 0
    own = convexbn.nn.certify(module, X, y, loss="squared", weight_decay=found.weight_decay, time_limit=0)
    assert own.balanced_objective * found.factor == pytest.approx(found.balanced_objective, rel=1e-9)


def test_what_cannot_be_converted_is_refused():
    net, X = network(LAYERS["average"])
    torch.manual_seed(0)
    batch = torch.randn(8, 2, 6, 5)

    def module(conv=None, pool=None, last=None):
        conv, pool = conv or nn.Conv2d(2, 4, 3), pool or nn.AdaptiveAvgPool2d(1)
        made = nn.Sequential(
            conv, nn.BatchNorm2d(4), nn.ReLU(), pool, nn.Flatten(), last or nn.Linear(4, 2, bias=False)
        )
        made(batch)
        return made

    with pytest.raises(ValueError, match="does not hold the shape"):
        convexbn.nn.from_module(module())
    with pytest.raises(ValueError, match="has groups, dilation"):
        convexbn.nn.from_module(module(nn.Conv2d(2, 4, 3, dilation=2)), batch)
    with pytest.raises(ValueError, match="windows that overlap"):
        convexbn.nn.from_module(module(pool=nn.MaxPool2d(3, stride=1), last=nn.Linear(8, 2, bias=False)), batch)
    with pytest.raises(ValueError, match="must have 2 channels"):
        convexbn.nn.from_module(module(), torch.randn(8, 3, 6, 5))
    with pytest.raises(ValueError, match="other layers before"):
        convexbn.nn.from_module(nn.Sequential(nn.Conv2d(2, 2, 1), module()), batch)
    other = nn.Sequential(*list(module())[:2], nn.Sigmoid(), *list(module())[3:])
    other(batch)
    with pytest.raises(TypeError, match="only networks that end in"):
        convexbn.nn.from_module(other, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gated = ConvexBNClassifier(convolution=LAYERS["average"], n_gates=3, max_iter=2).fit(X, np.arange(30) % 2)
    with pytest.raises(TypeError, match="gated convolutional network"):
        convexbn.nn.to_module(gated.network_)
    assert net.n_features == 60
