"""Whitening: orthonormal at every condition, and blind to units, offsets, mixing, order and repetition."""

import math
import tracemalloc
import warnings
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from convexbn import ConvexBNRegressor
from convexbn.data import qr
from convexbn.data.preactivations import PreActivations
from convexbn.data.warn import one_warning
from convexbn.data.whitening import whiten
from instances import EPS, THRESHOLD, conditioned, residual

FLOAT32_EPS = float(np.finfo(np.float32).eps)


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def basis(data, weights=None):
    """``diag(sqrt w) A``."""
    return data.rows if weights is None else np.sqrt(weights)[:, None] * data.rows


def projector(data, weights=None):
    """Orthogonal projector onto the range of ``[X, 1]``: what whitening may depend on."""
    B = basis(data, weights)
    return B @ B.T


def departure(data, weights=None):
    """Residual of orthonormality."""
    B = basis(data, weights)
    return residual(B.T @ B - np.eye(B.shape[1]), len(B))


# --- orthonormality and the range ---


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e7, 1e10, 1e13])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_orthonormal_at_every_condition(condition, weighted):
    rng = np.random.default_rng(3)
    X = conditioned(400, 10, condition, rng)
    weights = rng.uniform(0.1, 5, 400) if weighted else None
    data = whiten(X, weights)
    assert data.rank == 10
    assert departure(data, weights) < THRESHOLD
    root = np.ones(400) if weights is None else np.sqrt(weights)
    centred = root[:, None] * (X - data.mean)
    assert residual(centred - projector(data, weights) @ centred, 400, np.linalg.norm(centred, 2)) < THRESHOLD


@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (5, 40), (6, 6), (7, 6), (300, 1)])
def test_every_shape_from_two_rows_on(shape):
    n, d = shape
    data = whiten(normal(n, d))
    assert data.rank == min(n - 1, d) and data.rows.shape == (n, data.rank + 1)
    assert departure(data) < THRESHOLD


def test_weights_over_24_orders_of_magnitude():
    weights = 10.0 ** np.random.default_rng(0).uniform(-12, 12, 30)
    assert departure(whiten(normal(30, 4), weights), weights) < THRESHOLD


def test_last_column_is_the_constant_and_the_rest_is_centred():
    weights = np.random.default_rng(1).uniform(0.1, 3, 50)
    data = whiten(normal(50, 4), weights)
    assert np.all(data.rows[:, -1] == 1 / np.sqrt(weights.sum())) and data.total_weight == weights.sum()
    assert residual(weights @ data.rows[:, :-1], 50, np.sqrt(weights.sum())) < THRESHOLD


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    hnp.arrays(np.int8, st.tuples(st.integers(2, 7), st.integers(1, 5)), elements=st.integers(-3, 3)),
    st.lists(st.integers(-900, 900), min_size=5, max_size=5),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=7, max_size=7),
)
def test_rank_is_the_rank_of_exact_arithmetic(integers, exponents, weights):
    """Duplicate and constant columns, equal rows, grids, in any units and with any weights."""
    n, d = integers.shape
    X = np.ldexp(integers.astype(float), exponents[:d])
    exact = _exact_rank(np.c_[np.ones(n, dtype=int), integers]) - 1
    weights = np.array(weights[:n])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # exact collinearity may lie near the cut
        if exact == 0:
            with pytest.raises(ValueError, match="all features are constant"):
                whiten(X, weights)
            return
        data = whiten(X, weights)
    assert data.rank == exact
    assert departure(data, weights) < THRESHOLD
    assert residual(basis(data, weights) - np.sqrt(weights)[:, None] * data.transform(X), n, 1e2) < THRESHOLD


def _exact_rank(matrix):
    rows, rank = [[Fraction(int(x)) for x in row] for row in matrix], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column] != 0), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


# --- invariances ---


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.lists(st.integers(-990, 1000), min_size=4, max_size=4))
def test_units_that_are_powers_of_two_change_no_bit(seed, exponents):
    X = normal(20, 4, seed) + 0.5
    plain, scaled = whiten(X), whiten(np.ldexp(X, exponents))
    assert np.array_equal(plain.rows, scaled.rows)
    assert np.array_equal(np.ldexp(plain.mean, exponents), scaled.mean)
    assert np.array_equal(plain.projection, np.ldexp(scaled.projection, np.array(exponents)[:, None]))


@pytest.mark.parametrize(
    "scale",
    [1e-300, 1e-150, 1e150, 1e300, (1e-300, 1.0, 1e300, 1e-5), (1e-12, 1e12, 1e-12, 1e12), (1e17, 1.0, 1.0, 1.0)],
)
def test_units(scale):
    X = normal(60, 4)
    plain, scaled = whiten(X), whiten(X * np.array(scale))
    assert scaled.rank == 4 and departure(scaled) < THRESHOLD
    assert residual(projector(scaled) - projector(plain), 60) < THRESHOLD
    assert residual(scaled.transform(X * np.array(scale)) - scaled.rows, 60) < THRESHOLD


@pytest.mark.parametrize("rank", [None, 2])
def test_values_that_overflow_when_centred(rank):
    signs = np.sign(normal(40, 3))
    plain, huge = whiten(signs, rank=rank), whiten(1.5e308 * signs, rank=rank)
    assert departure(huge) < THRESHOLD
    assert residual(projector(huge) - projector(plain), 40) < THRESHOLD
    # the projection is subnormal here: its digits end at 2^-1074
    spacing = max(1.0, 2.0**-1074 / np.abs(huge.projection).max() / EPS)
    assert residual(huge.transform(1.5e308 * signs) - huge.rows, 40, spacing) < THRESHOLD


def test_a_column_that_overflows_beside_an_ordinary_one():
    X = normal(40, 3)
    wide = X.copy()
    wide[:, 0] = np.where(X[:, 0] > 0, 1.5e308, -1.5e308)
    signs = np.c_[np.sign(X[:, 0]), X[:, 1:]]
    assert residual(projector(whiten(wide)) - projector(whiten(signs)), 40) < THRESHOLD


@pytest.mark.parametrize("scale", [1e-310, 1e-320])
def test_denormal_data_give_finite_statistics_or_a_reason(scale):
    X = normal(20, 3) * scale
    try:
        data = whiten(X)
    except ValueError:
        return
    assert np.isfinite(data.projection).all() and np.isfinite(data.transform(X)).all()


@pytest.mark.filterwarnings("ignore:feature")
@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0, 9), st.sampled_from([-1.0, 1.0]))
def test_shifting_columns(seed, magnitude, sign):
    X = normal(30, 3, seed)
    offset = sign * 10.0**magnitude
    plain, shifted = whiten(X), whiten(X + offset)
    assert shifted.rank == 3 and departure(shifted) < THRESHOLD
    scale = np.linalg.cond(X - X.mean(axis=0)) * (1 + abs(offset))
    assert residual(projector(shifted) - projector(plain), 30, scale) < THRESHOLD


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0, 6))
def test_invertible_mixing_of_features(seed, magnitude):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((30, 4))
    mixing = conditioned(5, 4, 10.0**magnitude, rng)[:4]
    condition = np.linalg.cond((X - X.mean(axis=0)) @ mixing)
    plain, mixed = whiten(X), whiten(X @ mixing)
    assert mixed.rank == 4
    assert residual(projector(mixed) - projector(plain), 30, condition) < THRESHOLD


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.permutations(range(25)))
def test_order_of_the_rows(order):
    X, weights = normal(25, 4), np.random.default_rng(0).uniform(0.1, 3, 25)
    plain, permuted = whiten(X, weights), whiten(X[order], weights[order])
    expected = projector(plain, weights)[np.ix_(order, order)]
    assert residual(projector(permuted, weights[order]) - expected, 25) < THRESHOLD


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=15, max_size=15))
def test_weights_are_repetition(counts):
    X = normal(15, 4) + 1
    weighted, repeated = whiten(X, np.array(counts, dtype=float)), whiten(np.repeat(X, counts, axis=0))
    assert weighted.rank == repeated.rank and weighted.total_weight == repeated.total_weight
    assert residual(weighted.mean - repeated.mean, 90) < THRESHOLD
    assert residual(weighted.singular_values - repeated.singular_values, 90) < THRESHOLD
    first, second = np.repeat(weighted.rows, counts, axis=0), repeated.rows
    assert residual(first @ first.T - second @ second.T, 90) < THRESHOLD


@pytest.mark.parametrize("times", [1, 10, 100, 1000])
def test_repeating_float32_rows_does_not_change_the_rank(times):
    X = conditioned(60, 8, 1e3, np.random.default_rng(0)).astype(np.float32).astype(np.float64)
    for repeated, weights in ((np.tile(X, (times, 1)), None), (X, np.full(60, float(times)))):
        data = whiten(repeated, weights, input_eps=FLOAT32_EPS)
        assert data.rank == 8
        assert departure(data, weights) < THRESHOLD
        assert data.rank_cut == pytest.approx(8 * FLOAT32_EPS, rel=1e-3)


# --- constant columns and offsets ---


def test_constant_columns_are_named_and_left_out():
    X = normal(20, 5)
    X[:, 1], X[:, 3] = 0.1, -7e300
    data = whiten(X)
    assert data.constant.tolist() == [False, True, False, True, False] and data.rank == 3
    assert np.all(data.projection[[1, 3]] == 0)
    assert residual(projector(data) - projector(whiten(X[:, [0, 2, 4]])), 20) < THRESHOLD
    elsewhere = X.copy()
    elsewhere[:, [1, 3]] = 5.0  # a constant column carries no information about new rows either
    assert np.array_equal(data.transform(elsewhere), data.transform(X))


@pytest.mark.parametrize(
    ("column", "eps"),
    [
        (np.full(50, 0.1, dtype=np.float32), FLOAT32_EPS),
        (np.full(50, 0.1), EPS),
        (np.full(50, 1e-300), EPS),
        (np.full(50, 1.5e308), EPS),
        (np.zeros(50), EPS),
        (1e8 + 1e-8 * np.arange(50), EPS),
        (np.float32(1e7) + np.arange(50, dtype=np.float32) % 2, FLOAT32_EPS),
        (0.1 + np.spacing(0.1) * (np.arange(50) % 3), EPS),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_constant_up_to_the_rounding_of_the_input(column, eps, beside):
    column = column.astype(np.float64)[:, None]
    if not beside:
        with pytest.raises(ValueError, match="all features are constant"):
            whiten(column, input_eps=eps)
        return
    varies = pytest.warns(UserWarning, match="feature 0 varies") if np.ptp(column) > 0 else nullcontext()
    with varies:
        data = whiten(np.hstack([column, normal(50, 2)]), input_eps=eps)
    assert data.constant.tolist() == [True, False, False] and data.rank == 2


def test_tiny_but_varying_columns_are_kept():
    X = normal(50, 3)
    X[:, 0] = 1e-300 * X[:, 1] ** 2
    X[:, 2] = 1 + 1e-12 * X[:, 2]
    with pytest.warns(UserWarning, match="feature 2"):
        data = whiten(X)
    assert not data.constant.any() and data.rank == 3


@pytest.mark.parametrize("equal", [np.ones((5, 3)), np.tile([[1.0, -2.0, 1e9]], (5, 1)), np.zeros((4, 1))])
def test_all_constant_is_refused(equal):
    with pytest.raises(ValueError, match="all features are constant"):
        whiten(equal)


@pytest.mark.parametrize("offset", [1e9, 1e12, 1e13])
def test_offsets_are_centred_twice_and_warned_of(offset):
    X = np.random.default_rng(0).standard_normal((200, 4)) + offset
    with pytest.warns(UserWarning, match=r"\|mean\| / deviation"):
        data = whiten(X)
    exact = np.array([float(sum(map(Fraction, column)) / 200 - Fraction(offset)) for column in X.T])
    assert np.abs((data.mean - offset) - exact).max() <= np.spacing(offset)
    assert data.rank == 4 and departure(data) < THRESHOLD
    assert np.abs(data.rows[:, :-1].sum(axis=0)).max() < THRESHOLD * 200 * EPS
    exactly = whiten(X - offset)  # exact: every value is within a factor 2 of the offset
    assert residual(projector(data) - projector(exactly), 200, np.linalg.cond(exactly.projection)) < THRESHOLD


def test_ordinary_offsets_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whiten(normal(50, 3) + 1e6)


# --- numerical rank and truncation ---


@pytest.mark.parametrize(("distance", "rank"), [(1e-6, 3), (1e-10, 3), (0.0, 2)])
@pytest.mark.filterwarnings("ignore:a singular value")
def test_nearly_collinear_columns(distance, rank):
    X = normal(80, 3)
    X[:, 2] = X[:, 0] - 2 * X[:, 1] + distance * X[:, 2]
    data = whiten(X)
    assert data.rank == rank and departure(data) < THRESHOLD
    relative = data.singular_values / data.singular_values[0]
    assert np.count_nonzero(relative > data.rank_cut) == rank
    assert EPS < data.rank_cut < 10 * 3 * EPS


@pytest.mark.parametrize("offset", [1e3, 1e5, 1e6])
@pytest.mark.filterwarnings("ignore:a singular value")
def test_offsets_raise_the_floor_of_exact_collinearity(offset):
    """The rounding of ``x + offset`` is in the input already; the cut takes it into account."""
    for seed in range(20):
        X = normal(80, 3, seed) + offset
        X[:, 2] = 0.3 * X[:, 0] + 0.7 * X[:, 1]
        assert whiten(X).rank == 2
        assert whiten(normal(80, 3, seed) + offset).rank == 3


def test_a_singular_value_near_the_cut_is_warned_of():
    X = normal(80, 3)
    X[:, 2] = X[:, 0] - 2 * X[:, 1] + 1e-14 * X[:, 2]
    with pytest.warns(UserWarning, match="rank cut"):
        data = whiten(X)
    assert data.rank in (2, 3) and departure(data) < THRESHOLD
    X[:, 2] = X[:, 0] - 2 * X[:, 1] + 1e-10 * normal(80, 1, 1)[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whiten(X)


@pytest.mark.parametrize("seed", range(12))
def test_exact_collinearity_is_silent(seed):
    """All columns of two dummy codings, as OneHotEncoder gives them: nothing is ambiguous about their rank."""
    rng = np.random.default_rng(seed)
    X = np.hstack([rng.normal(size=(200, 2)), np.eye(4)[rng.integers(0, 4, 200)], np.eye(3)[rng.integers(0, 3, 200)]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whiten(X).rank == 7


def test_warnings_are_one_at_the_line_of_the_caller():
    X = normal(50, 3) + np.array([0, 1e10, 1e12])
    X[:, 0] = 1e17 + 16 * (X[:, 0] > 0)
    with warnings.catch_warnings(record=True) as caught, one_warning():
        warnings.simplefilter("always")
        whiten(X)
        whiten(X)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "feature 0 varies" in str(caught[0].message) and "feature 2 has" in str(caught[0].message)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_pipeline(StandardScaler(with_std=False), ConvexBNRegressor(max_iter=0)).fit(X[:, 1:], X[:, 1])
    assert [(w.category, w.filename) for w in caught] == [(ConvergenceWarning, __file__)]


@pytest.mark.parametrize("redundant", ["duplicate", "sum", "one-hot"])
@pytest.mark.filterwarnings("ignore:a singular value")
def test_redundant_columns_change_nothing(redundant):
    X = normal(60, 3)
    if redundant == "one-hot":
        X = np.eye(4)[np.arange(60) % 4][:, :3]
    extra = {"duplicate": X[:, :1], "sum": X.sum(axis=1, keepdims=True), "one-hot": 1 - X.sum(axis=1, keepdims=True)}
    plain, more = whiten(X), whiten(np.hstack([X, extra[redundant]]))
    assert more.rank == plain.rank == 3
    assert residual(projector(more) - projector(plain), 60) < THRESHOLD


@pytest.mark.parametrize("k", [1, 3, 6, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_rank_keeps_the_top_directions_of_the_unscaled_data(k, weighted):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 6)) * np.geomspace(100, 0.1, 6) + 3
    weights = rng.uniform(0.2, 2, 50) if weighted else np.ones(50)
    data = whiten(X, weights, rank=k)
    centred = np.sqrt(weights)[:, None] * (X - weights @ X / weights.sum())
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    kept = min(k, 6)
    gap = values[kept - 1] - (values[kept] if kept < 6 else 0)
    top = left[:, :kept] @ left[:, :kept].T + np.outer(np.sqrt(weights), np.sqrt(weights)) / weights.sum()
    assert data.rank == kept
    assert residual(projector(data, weights) - top, 50, values[0] / gap) < THRESHOLD
    assert residual(data.singular_values - values, 50, values[0]) < THRESHOLD
    directions = data.projection / np.linalg.norm(data.projection, axis=0)
    assert residual(np.abs(np.sum(directions * right[:kept].T, axis=0)) - 1, 50, values[0] / gap) < THRESHOLD


@pytest.mark.parametrize("share", [1e-9, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0])
def test_rank_as_a_share_of_the_variance(share):
    X = normal(50, 6) * np.geomspace(10, 0.1, 6)
    variances = np.linalg.svd(X - X.mean(axis=0), compute_uv=False) ** 2
    fewest = next(k for k in range(1, 7) if variances[:k].sum() >= share * variances.sum() * (1 - 1e-12))
    assert whiten(X, rank=share).rank == fewest


def test_one_direction_and_the_whole_share_are_different_requests():
    X = normal(20, 3)
    assert whiten(X, rank=1).rank == 1 and whiten(X, rank=np.int64(1)).rank == 1
    assert whiten(X, rank=1.0).rank == 3


@pytest.mark.filterwarnings("ignore:a singular value")
def test_rank_is_at_most_the_number_of_directions():
    X = normal(20, 3)
    assert whiten(np.hstack([X, X]), rank=5).rank == 3


@pytest.mark.parametrize("scale", [(1e20, 1.0, 1.0, 1.0), (1e12, 1e-12, 1.0, 1.0), (1.0, 1e-20, 1e20, 1.0)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_truncation_in_mixed_units_stays_consistent(scale, k):
    """The rows kept must be the rows that the stored statistics give, whatever the spread of the units."""
    X = normal(30, 4) * np.array(scale)
    data = whiten(X, rank=k)
    assert 1 <= data.rank <= k and departure(data) < THRESHOLD
    assert np.isfinite(data.projection).all()
    assert residual(data.transform(X) - data.rows, 30, 1e2) < THRESHOLD


def test_truncation_of_wide_data_needs_no_square_of_the_features():
    X = normal(6, 2000)
    tracemalloc.start()
    try:
        whiten(X, rank=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * X.nbytes


@pytest.mark.parametrize("rank", [None, 3])
def test_directions_are_orthonormal_and_belong_to_the_projection(rank):
    """``V``, in the user's units when truncated, of the standardised columns otherwise."""
    X = normal(40, 5) * np.geomspace(1, 1e-3, 5)
    X[:, 2] = 7.0
    data = whiten(X, rank=rank)
    V = data.directions
    assert V.shape == data.projection.shape and not V[2].any()
    assert residual(V.T @ V - np.eye(data.rank), 5) < THRESHOLD
    centred = X - X.mean(axis=0)
    units = np.ones(5) if rank else np.where(data.constant, 1.0, np.linalg.norm(centred, axis=0))
    values = data.singular_values[: data.rank]
    assert residual((centred / units) @ V - data.rows[:, :-1] * values, 40, values[0]) < THRESHOLD


# --- computation and the way back ---


@pytest.mark.parametrize("n", [33, 64, 100, 257])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_rows_give_the_same(monkeypatch, n, weighted):
    weights = np.random.default_rng(0).uniform(0.1, 3, n) if weighted else None
    X = normal(n, 5) @ np.diag(np.geomspace(1, 1e-6, 5)) + 2
    plain = whiten(X, weights)
    monkeypatch.setattr(qr, "BLOCK_ROWS", 16)
    blocked = whiten(X, weights)
    assert departure(blocked, weights) < THRESHOLD
    assert residual(projector(blocked, weights) - projector(plain, weights), n, 1e2) < THRESHOLD
    assert residual(blocked.singular_values - plain.singular_values, n) < THRESHOLD
    assert residual(blocked.transform(X) - blocked.rows, n, 1e7) < THRESHOLD  # offset / smallest deviation


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8])
def test_transform_of_the_training_rows_gives_the_rows(condition):
    X = conditioned(80, 6, condition, np.random.default_rng(1))
    data = whiten(X)
    assert residual(data.transform(X) - data.rows, 80, condition) < THRESHOLD
    assert np.array_equal(data.transform(X[:0]), np.zeros((0, 7)))


def test_transform_of_new_rows_is_affine():
    X, Z = normal(40, 5), normal(3, 5, 1)
    data = whiten(X)
    middle = data.transform((Z[:1] + Z[1:2]) / 2)
    assert residual(middle - (data.transform(Z[:1]) + data.transform(Z[1:2])) / 2, 5) < THRESHOLD
    assert np.all(data.transform(data.mean[None])[0, :-1] == 0)


def test_transform_of_rows_far_larger_than_the_training_rows():
    X = normal(40, 3)
    data = whiten(X)
    far = np.ldexp(X[:2], 1000)
    expected = np.ldexp(X[:2] @ data.projection, 1000)
    assert residual(data.transform(far)[:, :-1] / expected - 1, 3, 1e3) < THRESHOLD


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_batch_normalize_gives_the_coordinates_of_the_mathematics(scale):
    """``C X w / ||C X w|| = U q / ||q||`` with ``q = S V' w``."""
    rng = np.random.default_rng(0)
    X, weights = scale * (rng.standard_normal((50, 4)) + 1), rng.uniform(0.2, 3, 50)
    data = whiten(X, weights)
    directions = rng.standard_normal((data.rank, 7))
    directions /= np.linalg.norm(directions, axis=0)
    normalized = PreActivations.compute(X, data.projection @ directions, weights).normalized
    assert residual(normalized - data.rows[:, :-1] @ directions, 50, 10) < THRESHOLD
    assert residual(np.einsum("ij,ij,i->j", normalized, normalized, weights) - 1, 50) < THRESHOLD
    assert residual(weights @ normalized, 50, np.sqrt(weights.sum())) < THRESHOLD


def test_batch_normalize_is_blind_to_the_length_of_the_weights_and_to_offsets():
    X, weights = normal(30, 3), np.ones(30)
    W = normal(3, 4, 1)
    plain = PreActivations.compute(X, W, weights).normalized
    assert np.array_equal(PreActivations.compute(X, np.ldexp(W, [900, -900, 5, 0]), weights).normalized, plain)
    assert residual(PreActivations.compute(X + 1e6, W, weights).normalized - plain, 30, 1e6) < THRESHOLD
    signs, small = np.sign(X), np.ldexp(W, -1030)
    huge = PreActivations.compute(1.5e308 * signs, small, weights).normalized
    assert residual(huge - PreActivations.compute(signs, W, weights).normalized, 30) < THRESHOLD


def test_batch_normalize_of_a_direction_that_does_not_vary_is_zero():
    X = normal(30, 3)
    X[:, 1] = 4.0
    normalized = PreActivations.compute(X, np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), np.ones(30)).normalized
    assert not normalized[:, 0].any() and normalized[:, 1].any()


def test_inputs_are_not_changed():
    X, weights = normal(30, 3), np.full(30, 2.0)
    copies = X.copy(), weights.copy()
    data = whiten(X, weights, rank=2)
    data.transform(X)
    PreActivations.compute(X, data.projection, weights)
    assert np.array_equal(X, copies[0]) and np.array_equal(weights, copies[1])


def test_total_weight_counts_weights_not_rows():
    data = whiten(normal(8, 2), np.full(8, 0.25))
    assert data.total_weight == 2.0 and math.isclose(data.rows[0, -1], 1 / math.sqrt(2))
