"""Feature importances and the line that a network prints."""

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectFromModel

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor, Convolution, fit_path


def rows(n=80, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) + 3, rng


def regressor(**changes):
    return ConvexBNRegressor(**{"n_gates": 30, "random_state": 0, **changes})


def test_the_formula_is_the_written_one_with_weights():
    X, rng = rows()
    weights = rng.integers(0, 3, len(X)).astype(float)
    model = regressor().fit(X, np.abs(X[:, 1] - 3), weights)
    network, deviation = model.network_, np.repeat(X, weights.astype(int), axis=0).std(axis=0)
    expected = np.zeros(5)
    for w, gamma, c in zip(network.weight.T, network.gamma, network.output, strict=True):
        expected += np.abs(w) * deviation * gamma * np.linalg.norm(c)
    assert np.allclose(model.feature_importances_, expected / expected.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("settings", [{}, {"gates": "trained"}, {"activation": "relu", "max_iter": 2, "time_limit": 5}])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_feature_that_decides_is_the_most_important(settings):
    X, _ = rows()
    found = regressor(weight_decay=1.0, **settings).fit(X, 5 * np.abs(X[:, 2] - 3)).feature_importances_
    assert found.shape == (5,) and (found >= 0).all() and found.sum() == pytest.approx(1)
    assert found.argmax() == 2 and found[2] > 0.5


def test_units_do_not_matter_and_a_constant_feature_has_no_share():
    X, _ = rows()
    X[:, 4] = 7.0
    y = X[:, 0] * X[:, 1]
    plain = regressor(gates="whitened").fit(X, y).feature_importances_
    scaled = regressor(gates="whitened").fit(X * [1, 1e3, 1e-3, 1e6, 2], y).feature_importances_
    assert np.allclose(plain, scaled, rtol=1e-6, atol=1e-12) and plain[4] == scaled[4] == 0


def test_a_network_without_neurons_has_none():
    X, _ = rows()
    assert not regressor(weight_decay=1e6).fit(X, X[:, 0]).feature_importances_.any()


def test_files_paths_searches_and_selectors(tmp_path):
    X, y = load_iris(return_X_y=True)
    model = ConvexBNClassifier(n_gates=20, random_state=0, rank=2).fit(X, y)
    model.save(tmp_path / "m.safetensors")
    again = convexbn.load(tmp_path / "m.safetensors")
    assert np.array_equal(again.feature_importances_, model.feature_importances_)
    chosen = ConvexBNClassifierCV(weight_decays=[1.0], n_gates=20, cv=2, random_state=0).fit(X, y)
    assert np.array_equal(chosen.feature_importances_, chosen.best_estimator_.feature_importances_)
    file = tmp_path / "path"
    for _ in range(2):
        (point,) = fit_path(ConvexBNClassifier(n_gates=20, random_state=0), X, y, weight_decays=[1.0], checkpoint=file)
        assert np.allclose(point.model.feature_importances_, chosen.feature_importances_, rtol=1e-3)
    kept = SelectFromModel(model, prefit=True, max_features=1, threshold=-np.inf).get_support()
    assert kept.argmax() == model.feature_importances_.argmax() and kept.sum() == 1


def test_where_there_are_none_an_attribute_error_says_why():
    assert not hasattr(regressor(), "feature_importances_")
    with pytest.raises(NotFittedError):
        _ = ConvexBNClassifierCV().feature_importances_
    X, _ = rows(n=20, d=6)
    model = regressor(convolution=Convolution(3, input_shape=(6, 1)), tol=1e-3).fit(X, X[:, 0])
    with pytest.raises(AttributeError, match="a convolution weighs the places of a patch"):
        _ = model.feature_importances_
    del (plain := regressor().fit(X, X[:, 0]))._deviations
    with pytest.raises(AttributeError, match="an older one: fit it again"):
        _ = plain.feature_importances_


def test_a_network_prints_one_line():
    X, y = load_digits(return_X_y=True)
    network = ConvexBNClassifier(random_state=0, tol=1e-2).fit(X, y).network_
    gates = len(set(network.gate_index))
    assert str(network) == f"<gated network: 64 inputs, {network.n_neurons} neurons, 10 outputs, {gates} gates>"
    X, _ = rows(n=5, d=6)
    network = regressor(activation="relu").fit(X, X[:, 0] - 3).network_
    assert repr(network) == f"<ReLU network: 6 inputs, {network.n_neurons} neurons, 1 output>"
    for layer, words in [
        (Convolution(3, input_shape=(6, 1)), "inputs of 6 x 1, filters of 3"),
        (Convolution((1, 2), input_shape=(2, 3, 1)), "inputs of 2 x 3 x 1, filters of 1 x 2"),
    ]:
        network = regressor(convolution=layer, n_gates=4, tol=1e-2).fit(X, X[:, 0]).network_
        counts = [(network.n_neurons, "neuron"), (1, "output"), (len(set(network.gate_index)), "gate")]
        told = ", ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts)
        assert repr(network) == f"<gated convolutional network: {words}, {told}>"
