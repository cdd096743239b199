"""Plain training of the non-convex network never ends below the convex program's objective."""

import numpy as np
import pytest

from convexbn import ConvexBNRegressor, max_weight_decay

torch = pytest.importorskip("torch")

WIDTH, STEPS, RATE = 100, 1000, 0.1


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small gain nothing from threads, and lose much where the cores are taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def instance(n=60, d=2, neurons=5, seed=0):
    """Data, and the noisy outputs of unit variance of a batch-normalised ReLU network on it."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)) / np.sqrt(d))
    Z = X @ rng.standard_normal((d, neurons))
    scale, shift, output = rng.standard_normal((3, neurons))
    y = np.maximum(scale * (Z - Z.mean(0)) / Z.std(0) + shift, 0) @ output
    y = y / y.std() + 0.1 * rng.standard_normal(n)
    return X, y / y.std()


def objective(X, y, weight_decay, weight, gamma, shift, output):
    """Loss plus balanced weight decay of a network, batch norm recomputed from the data, in float64."""
    response = X @ weight
    response -= response.mean(0)
    hidden = np.maximum(gamma * response / np.linalg.norm(response, axis=0) + shift / np.sqrt(len(X)), 0)
    return 0.5 * np.sum((hidden @ output - y) ** 2) + weight_decay * np.hypot(gamma, shift) @ np.abs(output)


def adam(X, y, weight_decay, seed):
    """Objective at the end of Adam on the batch-normalised network from a random start, rate decayed to zero."""
    torch.manual_seed(seed)
    n, d = X.shape
    weight = torch.randn(d, WIDTH, dtype=torch.float64)
    gamma, shift = torch.ones(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    output = torch.randn(WIDTH, dtype=torch.float64) / np.sqrt(WIDTH)
    decayed = [gamma, shift, output]
    for parameter in [weight, *decayed]:
        parameter.requires_grad_()
    groups = [{"params": [weight]}, {"params": decayed, "weight_decay": weight_decay / np.sqrt(n)}]
    optimiser = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    rows, targets = torch.tensor(X), torch.tensor(y)
    for _ in range(STEPS):
        optimiser.zero_grad()
        response = rows @ weight  # torch's own batch norm refuses eps = 0
        normalised = gamma * (response - response.mean(0)) / response.std(0, correction=0) + shift
        (0.5 * torch.mean((torch.relu(normalised) @ output - targets) ** 2)).backward()
        optimiser.step()
        schedule.step()
    found = [parameter.detach().numpy() for parameter in (weight, gamma, shift, output)]
    # this normalises to variance 1, the program to norm 1: the square root of n moves to scale and shift
    return objective(X, y, weight_decay, found[0], np.sqrt(n) * found[1], np.sqrt(n) * found[2], found[3])


@pytest.mark.parametrize("fraction", [0.1, 0.02])
def test_no_run_of_adam_ends_below(fraction):
    X, y = instance()
    paper = {"activation": "relu", "fit_intercept": False}
    weight_decay = fraction * max_weight_decay(X, y, **paper)[0]
    model = ConvexBNRegressor(weight_decay=weight_decay, tol=5e-6, time_limit=10, random_state=0, **paper)
    network = model.fit(X, y).network_
    ours = objective(X, y, weight_decay, network.weight, network.gamma, network.shift, network.output[:, 0])
    runs = [adam(X, y, weight_decay, seed) for seed in range(2)]
    assert ours * (1 - 1e-6) <= min(runs) <= ours * (1 + 1e-2)
