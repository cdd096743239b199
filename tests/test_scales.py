"""Units do not matter: reliability.md 4.3, rows 31 to 33."""

import warnings

import numpy as np
import pytest

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status, load, max_weight_decay

RNG = np.random.default_rng(1)
X = RNG.standard_normal((60, 4))
Y = X[:, 0] ** 2 + np.sin(X[:, 1]) - 1
LABELS = (X[:, 0] * X[:, 1] > 0).astype(int)
NEW = RNG.standard_normal((25, 4))
UNITS = {
    "12": [1e-12, 1.0, 1e12, 3e3],
    "150": [1e-150, 1e150, 1.0, 7e-20],
    "300": [1e-300, 1e300, 1e-150, 1e150],
}


def classifier(**changes):
    return ConvexBNClassifier(**{"loss": "squared", "n_gates": 20, "random_state": 0, **changes})


def regressor(**changes):
    return ConvexBNRegressor(**{"n_gates": 20, "random_state": 0, **changes})


def assert_equal_in_units(model, scales, y, tolerance=1e-9):
    """Fit in two systems of units, with every floating-point warning an error."""
    expected = model.fit(X, y)
    outputs, objective = expected.network_.predict(NEW), expected.certificate_.objective
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X * scales, y)
        found = model.network_.predict(NEW * scales)
    assert model.certificate_.status is Status.CERTIFIED
    assert model.certificate_.objective == pytest.approx(objective, rel=max(1e-9, 1e-2 * tolerance))
    np.testing.assert_allclose(found, outputs, rtol=0, atol=tolerance * np.abs(outputs).max())
    np.testing.assert_allclose(
        model.network_.predict((NEW * scales)[:1]), outputs[:1], atol=10 * tolerance * np.abs(outputs).max()
    )


@pytest.mark.parametrize("gates", ["data", "whitened"])
@pytest.mark.parametrize("exponent", [-300, -150, -20, 20, 150, 300])
def test_a_common_unit_does_not_matter(exponent, gates):
    assert_equal_in_units(regressor(gates=gates), 10.0**exponent, Y)


@pytest.mark.parametrize("loss", ["squared", "logistic", "cross_entropy"])
@pytest.mark.parametrize("exponent", [-300, 300])
def test_a_common_unit_does_not_matter_for_any_loss(loss, exponent):
    near = 1e-9 if loss == "squared" else 1e-4  # a first-order method amplifies rounding up to its tolerance
    assert_equal_in_units(classifier(loss=loss, tol=1e-8), 10.0**exponent, LABELS, near)


@pytest.mark.parametrize("units", UNITS)
def test_units_of_the_columns_do_not_matter(units):
    assert_equal_in_units(regressor(gates="whitened"), np.array(UNITS[units]), Y)


@pytest.mark.parametrize("units", UNITS)
def test_units_of_the_columns_do_not_matter_to_given_gates(units):
    """Gates in the units of the data see the same half-spaces."""
    scales, gates = np.array(UNITS[units]), RNG.standard_normal((4, 15))
    expected = regressor(gates=gates).fit(X, Y).predict(NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = regressor(gates=gates / scales[:, None]).fit(X * scales, Y)
        np.testing.assert_allclose(model.predict(NEW * scales), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("units", ["12", "150", "300"])
@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_formula_and_certificate_in_any_units(units, activation):
    scales, n = np.array(UNITS[units]), 5
    options = {"activation": activation, "gates": "whitened", "weight_decay": 0.2}
    expected = regressor(**options).fit(X[:n], Y[:n])
    model = regressor(**options).fit(X[:n] * scales, Y[:n])
    assert model.certify(X[:n] * scales, Y[:n]).status is Status.CERTIFIED
    assert model.certificate_.objective == pytest.approx(expected.certificate_.objective, rel=1e-8)


def test_extreme_units_are_saved_and_loaded(tmp_path):
    for name, scales in UNITS.items():
        model = regressor(gates="whitened").fit(X * np.array(scales), Y)
        model.save(tmp_path / name)
        np.testing.assert_array_equal(
            load(tmp_path / name).predict(NEW * np.array(scales)), model.predict(NEW * np.array(scales))
        )


def test_the_rank_in_numbers_is_in_the_units_of_the_data():
    scaled = X * [1, 1e3, 1, 1]
    assert regressor(rank=0.99, standardize=False).fit(X, Y).rank_ == 4
    assert regressor(rank=0.99, standardize=False).fit(scaled, Y).rank_ == 1
    for factor in (1e-250, 1e250):
        assert regressor(rank=0.99, standardize=False).fit(scaled * factor, Y).rank_ == 1


# -- 32 --


@pytest.mark.parametrize("exponent", [-150, -80, -3, 3, 80, 150])
@pytest.mark.parametrize("solver", ["group_newton", "proximal"])
@pytest.mark.parametrize("K", [1, 2])
def test_units_of_the_targets_scale_the_solution(exponent, solver, K):
    """Outputs and weight decay scale with y, the objective with its square; the relative gap stays."""
    factor, y = 10.0**exponent, np.column_stack([Y, Y[::-1]])[:, :K]
    options = {"solver": solver, "tol": 1e-9 if solver == "group_newton" else 1e-6}
    expected = regressor(weight_decay=1.0, **options).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = regressor(weight_decay=factor, **options).fit(X, factor * y)
    assert model.certificate_.status is expected.certificate_.status is Status.CERTIFIED
    assert model.certificate_.objective / factor**2 == pytest.approx(expected.certificate_.objective, rel=1e-6)
    near = 1e-4 if solver == "group_newton" else 1e-2
    np.testing.assert_allclose(model.predict(NEW) / factor, expected.predict(NEW), atol=near)


@pytest.mark.parametrize("exponent", [-150, -3, 3, 150])
@pytest.mark.parametrize("solver", ["proximal", "subspace"])
def test_units_of_the_targets_and_of_delta_scale_the_solution_of_the_huber_loss(exponent, solver):
    factor = 10.0**exponent
    options = {"solver": solver, "loss": "huber", "tol": 1e-5}
    expected = regressor(weight_decay=0.1, huber_delta=0.3, **options).fit(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = regressor(weight_decay=0.1 * factor, huber_delta=0.3 * factor, **options).fit(X, factor * Y)
    assert model.certificate_.status is expected.certificate_.status is Status.CERTIFIED
    assert model.certificate_.objective / factor**2 == pytest.approx(expected.certificate_.objective, rel=1e-5)


@pytest.mark.parametrize("exponent", [-150, -3, 3, 150])
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_units_of_the_targets_scale_the_formula(exponent, loss):
    factor = 10.0**exponent
    options = {"activation": "relu", "loss": loss}
    expected = regressor(weight_decay=0.3, huber_delta=0.3, **options).fit(X[:5], Y[:5])
    model = regressor(weight_decay=0.3 * factor, huber_delta=0.3 * factor, **options).fit(X[:5], factor * Y[:5])
    assert model.certificate_.status is Status.CERTIFIED
    np.testing.assert_allclose(model.predict(NEW) / factor, expected.predict(NEW), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exponent", [-150, 150])
def test_the_largest_and_automatic_weight_decay_scale_with_the_targets(exponent):
    factor = 10.0**exponent
    largest = max_weight_decay(X, Y, random_state=0)
    assert max_weight_decay(X, factor * Y, random_state=0) == pytest.approx(factor * largest, rel=1e-12)
    assert regressor().fit(X, factor * Y).weight_decay_ == pytest.approx(factor * regressor().fit(X, Y).weight_decay_)


# -- 33 --


@pytest.mark.parametrize("offset", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("gates", ["data", "whitened"])
def test_offsets_do_not_matter(offset, gates):
    """To the digits that are left: an offset of 1e9 leaves seven of them in the input."""
    X_offset, NEW_offset = X + offset, NEW + offset
    stored, stored_new = X_offset - offset, NEW_offset - offset  # what the rounded data hold
    expected = regressor(gates=gates).fit(stored, Y).network_.predict(stored_new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="feature . has .mean. / deviation")
        found = regressor(gates=gates).fit(X_offset, Y).network_.predict(NEW_offset)
    np.testing.assert_allclose(found, expected, atol=max(1e-9, 1e2 * offset * np.finfo(float).eps))


def test_units_and_offsets_together():
    scales, offsets = np.array([1e-12, 1e12, 1.0, 1e6]), np.array([0.0, 1e15, 1e5, -1e9])
    data, new = X * scales + offsets, NEW * scales + offsets
    expected = regressor(gates="whitened").fit((data - offsets) / scales, Y).predict((new - offsets) / scales)
    model = regressor(gates="whitened").fit(data, Y)
    assert model.certificate_.status is Status.CERTIFIED and model.rank_ == 4
    np.testing.assert_allclose(model.predict(new), expected, atol=1e-8)


@pytest.mark.parametrize("offset", [1e11, 1e12, 1e13])
def test_offsets_that_eat_the_digits_warn_and_stay_honest(offset):
    data, y = np.random.default_rng(2).standard_normal((300, 4)), np.tile(LABELS, 5)
    model = classifier(n_gates=100, callback=lambda progress: progress.iteration >= 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(data + offset, y)
        again = model.certify(data + offset, y)
    assert any("subtract the offset" in str(warning.message) for warning in caught)
    assert again.status is model.certificate_.status
    assert again.lower_bound <= again.objective
