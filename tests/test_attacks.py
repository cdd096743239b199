"""No network of a certificate's scope is below its bound: small versions of benchmarks/attacks.py, and named cases."""

import warnings

import numpy as np
import pytest

from attacks import KINDS, Directions, attack, best_found, squared
from convexbn import ConvexBNClassifier, ConvexBNRegressor, load
from convexbn.data.whitening import whiten
from instances import PAPER

pytestmark = pytest.mark.filterwarnings("ignore")

GATED = {"n_gates": 6, "random_state": 0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters", [PAPER | GATED, GATED], ids=["paper", "default"])
@pytest.mark.parametrize("seed", range(3))
def test_no_gated_network_is_below_the_bound(kind, parameters, seed):
    rng = np.random.default_rng(seed)
    X, y = KINDS[kind](rng, 12 + 8 * seed)
    weights = 10.0 ** rng.uniform(-1, 1, len(X)) if seed == 1 else None
    if set(y) == {-1, 1} and seed == 2:
        model = ConvexBNClassifier(loss="logistic", weight_decay=0.03, **parameters)
    else:
        model = ConvexBNRegressor(weight_decay=0.05, **parameters)
    found = attack(model, X, y, rng, weights)
    assert found.excepted or not found.beats, found


@pytest.mark.parametrize("kind", ["offset", "float32", "weather", "collinear"])
def test_no_relu_network_is_below_the_bound(kind):
    rng = np.random.default_rng(5)
    X, y = KINDS[kind](rng, 10)
    model = ConvexBNRegressor(activation="relu", weight_decay=0.05, max_iter=2, proof_time=0.05, random_state=0)
    found = attack(model, X, y, rng)
    assert found.excepted or not found.beats, found


def test_the_judge_finds_networks_below_a_bound_that_is_none():
    """On two columns that differ by the target the bound of one of them is beaten."""
    rng = np.random.default_rng(0)
    X, y = KINDS["offset"](rng, 20)
    rows, everywhere = Directions.of(X, np.ones(20)).rows, np.ones((20, 1, 1))
    assert rows.shape == (20, 4)
    values = [
        best_found(everywhere * part[:, None, :], squared(y[:, None]), np.ones(20), 0.05, intercept=False)
        for part in (rows, Directions.of(X[:, :2], np.ones(20)).rows)
    ]
    assert values[0] < 0.1 * values[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_smaller_types_are_exact(dtype):
    """The certificate is that of the same numbers in float64."""
    rng = np.random.default_rng(3)
    for kind in ("float32", "weather", "float16"):
        X, y = KINDS[kind](rng, 20)
        one, two = (ConvexBNRegressor(weight_decay=0.05, **PAPER | GATED).fit(data, y) for data in (X, X.astype(dtype)))
        assert one.rank_ == two.rank_ == X.shape[1]
        assert one.certificate_.lower_bound == two.certificate_.lower_bound


@pytest.mark.parametrize("offset", [0.0, 1e3, 3e7, 1e12])
@pytest.mark.parametrize("distance", [1e-12, 1e-10, 1e-3])
def test_the_offset_of_a_column_leaves_the_directions_of_others(offset, distance):
    rng = np.random.default_rng(1)
    sign, column = np.sign(rng.standard_normal(30)), rng.standard_normal(30)
    pair = np.c_[column, column + distance * sign]
    found = whiten(np.c_[offset + rng.standard_normal(30), pair])
    assert found.rank == 3 and not found.cut
    projected = found.rows @ (found.rows.T @ (sign - sign.mean()))
    assert np.abs(projected - (sign - sign.mean())).max() < 1e-15 * 30 / distance + 1e-9


def exactly_dependent(rng, n):
    """Columns that depend on each other exactly or up to the rounding of the last operation, with their rank."""
    X = rng.standard_normal((n, 3))
    far = X + 10.0 ** rng.uniform(2, 7)
    shares = np.abs(X) / np.abs(X).sum(axis=1, keepdims=True)
    codes = [np.eye(k)[rng.permutation(np.arange(n) % k)] for k in (3, 4, 7)]
    yield np.c_[X, X[:, 0]], 3
    yield np.c_[X, -3 * X[:, 1] + 2], 3
    yield np.c_[X, X[:, 0] + X[:, 1], X[:, 1] - X[:, 2]], 3
    yield np.c_[far, far[:, 0] + far[:, 1]], 3
    yield np.c_[far, 0.3 * far[:, 0] + 0.7 * far[:, 1]], 3
    yield shares, 2
    yield np.hstack([*codes, X]), 14
    yield np.round(np.c_[100 * np.abs(X), 100 * np.abs(X).sum(axis=1)], 0), None


@pytest.mark.parametrize("seed", range(5))
def test_exact_dependence_is_silent_and_no_exception(seed):
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for X, rank in exactly_dependent(rng, 60):
            for weights in (None, rng.uniform(0.1, 5, 60)):
                found = whiten(X, weights)
                assert not found.cut and rank in (None, found.rank)


def hidden_case():
    """A direction of features 1 and 2 at a few units in the last place, and feature 4 within its own rounding."""
    rng = np.random.default_rng(0)
    sign, column = np.sign(rng.standard_normal(40)), 1.5 + 0.4 * rng.random(40)
    near = 1e8 + 1e-8 * sign
    return np.c_[rng.standard_normal(40), column, column + 3 * 2.0**-51 * sign, rng.standard_normal(40), near], sign


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_what_rounding_cut_is_named_everywhere(activation, tmp_path):
    X, y = hidden_case()
    model = ConvexBNRegressor(activation=activation, weight_decay=0.1, max_iter=20, proof_time=0.1, **PAPER | GATED)
    with pytest.warns(UserWarning, match="features 1, 2"):
        model.fit(X, y)
    proof, words = model.certificate_, "except along 1 direction of features 1, 2 and along feature 4"
    assert model.rank_ == 3 and words in proof.scope and words in proof.sentence
    model.save(tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").certificate_.scope == proof.scope
    assert model.certify(X, y).scope == proof.scope
    without = ConvexBNRegressor(weight_decay=0.1, **PAPER | GATED).fit(X[:, [0, 1, 3]], y)
    assert without.certificate_.scope == "these gates"
