"""Canonical rows: order, repetition and weights of the input leave no trace."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convexbn.data import canonical
from convexbn.data.canonical import canonical_rows, distinct_rows, equal_rows, fingerprint

VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 1e300, -1e-300, 5e-324])


@st.composite
def weighted_rows(draw, weights):
    n, d = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    X = draw(hnp.arrays(float, (n, d), elements=VALUES))
    Y = draw(hnp.arrays(float, (n, 1), elements=st.sampled_from([0.0, -0.0, 1.0])))
    return X, Y, np.array(draw(st.lists(weights, min_size=n, max_size=n)))


def same_bits(first, second):
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(weighted_rows(st.sampled_from([0.0, 1.0, 2.0, 0.5])))
def test_canonical_rows_against_a_dictionary(data):
    X, Y, weights = data
    totals = defaultdict(float)
    for x, y, w in zip(X, Y, weights, strict=True):
        if w > 0:
            totals[(*x, *y)] += w  # 0.0 and -0.0 are one key; sums of halves are exact
    merged_X, merged_Y, merged = canonical_rows(X, Y, weights) if totals else (X[:0], Y[:0], weights[:0])
    found = {(*x, *y): w for x, y, w in zip(merged_X, merged_Y, merged, strict=True)}
    assert len(found) == len(merged) and found == dict(totals)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(weighted_rows(st.sampled_from([1.0, 0.1, 0.2, 0.3, 1e-12, 1e12])), st.randoms(use_true_random=False))
def test_order_of_the_input_changes_no_bit(data, random):
    X, Y, weights = data
    order = list(range(len(X)))
    random.shuffle(order)
    plain, permuted = canonical_rows(X, Y, weights), canonical_rows(X[order], Y[order], weights[order])
    assert same_bits(plain, permuted)
    assert fingerprint(*plain) == fingerprint(*permuted)


def test_sums_of_weights_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    X, Y, weights = rng.integers(0, 2, (60, 1)).astype(float), np.zeros((60, 1)), rng.uniform(0.1, 2, 60)
    plain = canonical_rows(X, Y, weights)
    for _ in range(20):
        order = rng.permutation(60)
        assert same_bits(plain, canonical_rows(X[order], Y[order], weights[order]))


@pytest.mark.parametrize("column", ["X", "Y"])
def test_negative_zero_is_zero(column):
    arrays = {"X": np.array([[0.0], [1.0]]), "Y": np.array([[0.0], [2.0]])}
    negative = arrays | {column: np.where(arrays[column] == 0, -0.0, arrays[column])}
    marks = {fingerprint(*canonical_rows(*a.values(), np.ones(2))) for a in (arrays, negative)}
    assert len(marks) == 1


@settings(deadline=None, derandomize=True, max_examples=100)
@given(weighted_rows(st.sampled_from([1.0, 0.25, 3.0])), st.integers(2, 5))
def test_repetition_is_a_weight(data, times):
    X, Y, weights = data
    repeated = canonical_rows(np.repeat(X, times, axis=0), np.tile(Y, (1, times)).reshape(-1, 1), weights.repeat(times))
    assert same_bits(canonical_rows(X, Y, weights * times), repeated)


def test_rows_of_weight_zero_leave_no_trace():
    rng = np.random.default_rng(0)
    X, Y, weights = rng.standard_normal((20, 3)), rng.standard_normal((20, 2)), rng.uniform(1, 2, 20)
    weights[::3] = 0
    kept = weights > 0
    assert same_bits(canonical_rows(X, Y, weights), canonical_rows(X[kept], Y[kept], weights[kept]))


def test_equal_features_with_different_targets_stay_apart():
    X, Y, weights = np.ones((3, 2)), np.array([[0.0], [1.0], [0.0]]), np.ones(3)
    merged_X, merged_Y, merged = canonical_rows(X, Y, weights)
    assert len(merged_X) == 2 and dict(zip(merged_Y.ravel(), merged, strict=True)) == {0.0: 2.0, 1.0: 1.0}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(hnp.arrays(float, st.tuples(st.integers(1, 15), st.integers(1, 3)), elements=st.sampled_from([0.0, 1.0, 0.1])))
def test_distinct_rows_give_every_row_back(X):
    distinct, place = distinct_rows(X)
    assert np.array_equal(distinct[place], X)
    assert len(distinct) == len({tuple(x) for x in X})
    order, starts = equal_rows(X)
    assert sorted(order) == list(range(len(X))) and starts[0] == 0 and len(starts) == len(distinct)


def test_rows_with_the_same_hash_stay_apart(monkeypatch):
    monkeypatch.setattr(canonical, "_row_hashes", lambda keys: np.zeros(len(keys), dtype=np.uint64))
    assert len(distinct_rows(np.array([[1.0], [2.0], [3.0]]))[0]) == 3


@pytest.mark.parametrize(
    ("values", "d"), [((-1.0, 1.0), 14), ((0.0, 1.0), 14), ((-1.0, 0.0, 1.0), 8), (tuple(np.arange(0, 1, 0.1)), 4)]
)
def test_hashes_of_grids_do_not_collide(values, d):
    grid = np.stack(np.meshgrid(*[values] * d), axis=-1).reshape(-1, d)
    assert len(np.unique(canonical._row_hashes(grid))) == len(values) ** d


def test_blocks_of_rows_give_the_same_hashes(monkeypatch):
    X = np.random.default_rng(0).standard_normal((100, 5))
    plain = canonical._row_hashes(X)
    monkeypatch.setattr(canonical, "_BLOCK", 7)
    assert np.array_equal(plain, canonical._row_hashes(X))
    assert np.array_equal(plain, canonical._row_hashes(np.asfortranarray(X)))


def test_fingerprint_sees_every_change():
    rng = np.random.default_rng(0)
    X, Y, weights = rng.standard_normal((6, 3)), rng.standard_normal((6, 2)), np.ones(6)
    marks = {fingerprint(X, Y, weights), fingerprint(X[:, :2], Y, weights), fingerprint(X, Y, 2 * weights)}
    for array in (X, Y, weights):
        array.flat[-1] = np.nextafter(array.flat[-1], np.inf)
        marks.add(fingerprint(X, Y, weights))
    assert len(marks) == 6
    assert fingerprint(X, Y, weights) == fingerprint(np.asfortranarray(X), Y.copy(), weights)
    wide, narrow = np.ones((1, 2)), np.ones((1, 1))
    assert fingerprint(wide, narrow, np.ones(1)) != fingerprint(narrow, wide, np.ones(1))


def test_inputs_are_not_changed():
    X, Y, weights = np.array([[-0.0], [1.0], [-0.0]]), np.zeros((3, 1)), np.array([1.0, 0.0, 2.0])
    copies = X.copy(), Y.copy(), weights.copy()
    canonical_rows(X, Y, weights)
    assert same_bits((X, Y, weights), copies)
