"""What must not matter: units and order of columns, order of rows, names and order of classes, units of y."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_wine

from convexbn import ConvexBNClassifier, ConvexBNRegressor

WINE, VINTAGE = load_wine(return_X_y=True)
WINE, VINTAGE = WINE[::2], VINTAGE[::2]
HEALTH, PROGRESS = (array[::4] for array in load_diabetes(return_X_y=True))


@functools.cache
def of_wine(**changes):
    """A model of the wines as they are."""
    return ConvexBNClassifier(random_state=0, **changes).fit(WINE, VINTAGE)


@settings(max_examples=10, deadline=None)
@given(exponents=st.lists(st.integers(-20, 20), min_size=13, max_size=13))
def test_units_of_columns_do_not_matter_by_default(exponents):
    units = 2.0 ** np.array(exponents)
    # units decide the order of the rows, so rounding, and descent is unique to the root of its tolerance of 1e-6 alone
    for loss, digits in (("squared", 1e-6), ("auto", 1e-3)):
        one = of_wine(loss=loss)
        other = ConvexBNClassifier(loss=loss, random_state=0).fit(WINE * units, VINTAGE)
        assert other.weight_decay_ == pytest.approx(one.weight_decay_, rel=1e-9)
        np.testing.assert_allclose(other.decision_function(WINE * units), one.decision_function(WINE), atol=digits)


@settings(max_examples=10, deadline=None)
@given(exponents=st.lists(st.floats(-6, 6), min_size=13, max_size=13))
def test_units_that_round_do_not_matter(exponents):
    units = 10.0 ** np.array(exponents)
    one = of_wine(gates="whitened")  # a training in float32 may go another way after rounding
    other = ConvexBNClassifier(gates="whitened", random_state=0).fit(WINE * units, VINTAGE)
    assert other.weight_decay_ == pytest.approx(one.weight_decay_, rel=1e-6)
    np.testing.assert_allclose(other.decision_function(WINE * units), one.decision_function(WINE), atol=1e-3)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "squared_hinge"])
def test_order_and_names_of_classes_do_not_matter(loss):
    shared = {"random_state": 0, "gates": "whitened", "loss": loss, "weight_decay": 0.3, "tol": 1e-9}
    one = ConvexBNClassifier(**shared).fit(WINE, VINTAGE)
    other = ConvexBNClassifier(**shared).fit(WINE, np.array(["c", "a", "b"])[VINTAGE])
    expected = one.decision_function(WINE)[:, [1, 2, 0]]
    np.testing.assert_allclose(other.decision_function(WINE), expected, atol=1e-3)
    assert other.certificate_.objective == pytest.approx(one.certificate_.objective, rel=1e-8)


@pytest.mark.parametrize("loss", ["squared", "logistic", "squared_hinge"])
def test_the_two_classes_are_alike(loss):
    shared = {"random_state": 0, "gates": "whitened", "loss": loss, "weight_decay": 0.3, "tol": 1e-9}
    labels = np.minimum(VINTAGE, 1)
    one, other = (ConvexBNClassifier(**shared).fit(WINE, y) for y in (labels, 1 - labels))
    np.testing.assert_allclose(other.decision_function(WINE), -one.decision_function(WINE), atol=1e-3)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 100))
def test_order_of_rows_does_not_matter(seed):
    order = np.random.default_rng(seed).permutation(len(PROGRESS))
    one = ConvexBNRegressor(random_state=0).fit(HEALTH, PROGRESS)
    other = ConvexBNRegressor(random_state=0).fit(HEALTH[order], PROGRESS[order])
    np.testing.assert_array_equal(other.predict(HEALTH), one.predict(HEALTH))


@settings(max_examples=5, deadline=None)
@given(exponent=st.integers(-30, 30), shift=st.integers(-(2**20), 2**20))
def test_units_of_y_do_not_matter(exponent, shift):
    unit, shared = 2.0**exponent, {"random_state": 0, "gates": "whitened"}
    one = ConvexBNRegressor(**shared).fit(HEALTH, PROGRESS)
    other = ConvexBNRegressor(**shared).fit(HEALTH, unit * (PROGRESS + shift))
    assert other.weight_decay_ == pytest.approx(unit * one.weight_decay_, rel=1e-6)
    assert other.certificate_.status == one.certificate_.status
    np.testing.assert_allclose(other.predict(HEALTH) / unit - shift, one.predict(HEALTH), rtol=1e-4)
