"""Gates keep their distance from training rows: rounding rows to float32 changes no pattern, moving gates neither."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_wine

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.data.whitening import whiten
from convexbn.program.gate_margins import apart_from_rows
from convexbn.program.gates import gate_patterns, sample_gates


def touching(X, n_gates, touched, seed, kind="whitened"):
    """Whitening of rows, and gates through some rows each, to the last digits."""
    whitening, rng = whiten(X), np.random.default_rng(seed)
    gates, offsets = sample_gates(kind, n_gates, whitening, np.random.RandomState(seed))
    for j in range(n_gates):
        A = whitening.rows[:][rng.choice(len(X), touched, replace=False)]
        h = np.linalg.svd(A)[2][touched:].T @ rng.standard_normal(A.shape[1] - touched)
        gates[:, j], offsets[j] = whitening.projection @ h[:-1], h[-1] / np.sqrt(whitening.total_weight)
    return whitening, gates, offsets


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(3, 8), st.integers(1, 6), st.sampled_from([0.0, 1.0, 1e4]),
    st.sampled_from([1.0, 1e3, 1e-150, 1e150]),
)  # fmt: skip
def test_patterns_stay_and_rounded_rows_have_them_too(seed, d, touched, offset, unit):
    rng = np.random.default_rng(seed)
    X = unit * (rng.standard_normal((60, d)) * 10.0 ** rng.uniform(-2, 2, d) + offset)
    whitening, gates, offsets = touching(X, 8, min(touched, d), seed)
    patterns = gate_patterns(X, whitening.mean, gates, offsets)
    new, shifts = apart_from_rows(X, whitening, gates, offsets, patterns)
    assert np.array_equal(gate_patterns(X, whitening.mean, new, shifts), patterns)
    with np.errstate(over="ignore"):
        rounded = X.astype(np.float32).astype(np.float64)
    if unit in (1.0, 1e3) and offset < 1e4:
        assert np.array_equal(gate_patterns(rounded, whitening.mean, new, shifts), patterns)


def test_rounded_rows_would_have_other_patterns():
    """Without the distance: the property above has something to find."""
    X = np.random.default_rng(0).standard_normal((60, 5))
    whitening, gates, offsets = touching(X, 8, 3, 0)
    patterns = [gate_patterns(rows, whitening.mean, gates, offsets) for rows in (X, X.astype(np.float32).astype(float))]
    assert not np.array_equal(*patterns)


def test_gates_that_touch_no_row_stay_as_they_are():
    X = np.random.default_rng(0).standard_normal((60, 4))
    for kind in ("data", "whitened"):
        whitening = whiten(X)
        gates, offsets = sample_gates(kind, 20, whitening, np.random.RandomState(0))
        patterns = gate_patterns(X, whitening.mean, gates, offsets)
        new, shifts = apart_from_rows(X, whitening, gates, offsets, patterns)
        assert np.array_equal(new, gates) and np.array_equal(shifts, offsets)


def test_rows_that_float32_holds_need_no_distance():
    X = np.random.default_rng(0).integers(0, 255, (60, 4)).astype(np.float64)
    whitening, gates, offsets = touching(X, 8, 3, seed=0)
    patterns = gate_patterns(X, whitening.mean, gates, offsets)
    assert apart_from_rows(X, whitening, gates, offsets, patterns)[0] is gates


@pytest.mark.parametrize("unit", [1e-300, 1e-60, 1e60, 1e300])
def test_units_beyond_float32_move_nothing(unit):
    X = unit * np.random.default_rng(0).standard_normal((60, 4))
    whitening, gates, offsets = touching(X, 8, 3, seed=0)
    patterns = gate_patterns(X, whitening.mean, gates, offsets)
    assert apart_from_rows(X, whitening, gates, offsets, patterns)[0] is gates


def test_a_gate_that_is_open_everywhere_moves_too():
    X = np.random.default_rng(0).standard_normal((60, 3))
    whitening = whiten(X)
    gates = np.eye(3, 1)
    offsets = -((X - whitening.mean) @ gates).min(axis=0)
    patterns = gate_patterns(X, whitening.mean, gates, offsets)
    assert patterns.all() or patterns.sum() == 59
    new, shifts = apart_from_rows(X, whitening, gates, offsets, patterns)
    margins = np.abs((X - whitening.mean) @ new + shifts)
    assert margins.min() > 1e-3 and np.array_equal(gate_patterns(X, whitening.mean, new, shifts), patterns)


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_trained_gates_predict_the_same_for_rows_in_float32(load):
    X, y = load(return_X_y=True)
    model = ConvexBNClassifier(random_state=0, gates="trained").fit(X, y)
    expected = model.decision_function(X)
    error = np.abs(model.decision_function(X.astype(np.float32)) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()
    assert model.certify(X, y).status == "CERTIFIED"


def test_trained_gates_of_patches_too():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 40)).cumsum(axis=1) / 7
    y = X[:, 3] * X[:, 20]
    layer = Convolution(4, stride=2, input_shape=(40, 1))
    model = ConvexBNRegressor(random_state=0, gates="trained", convolution=layer, n_gates=30).fit(X, y)
    geometry, mean = model.network_.convolution.geometry, model.network_.mean
    exact, rounded = (PatchMatrix(rows, geometry) for rows in (X, X.astype(np.float32)))
    arrays = mean, model.gates_, model.gate_offsets_
    assert np.array_equal(gate_patterns(exact, *arrays), gate_patterns(rounded, *arrays))
    assert np.allclose(model.predict(X.astype(np.float32)), model.predict(X), rtol=0, atol=1e-5 * np.abs(y).max())
