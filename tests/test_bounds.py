"""Upper bounds over all patterns: never below the truth, rounding included, and exact where they say so."""

import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convexbn.bounds import orthant
from convexbn.data.whitening import whiten
from convexbn.program.rays import group_directions
from instances import THRESHOLD, orthant_in_digits, residual

KINDS = ("normal", "one-hot", "cross-entropy", "parallel", "nearly parallel", "grid", "positive")


def draw(kind, n, K, rng):
    """Dual variable of a kind, (n, K)."""
    sizes = rng.uniform(0.1, 3, (n, 1))
    if kind == "one-hot":
        return np.eye(K)[rng.integers(K, size=n)] * sizes
    if kind == "cross-entropy" and K > 1:
        return (np.eye(K) - 1 / K)[rng.integers(K, size=n)] * sizes
    V = rng.standard_normal((n, K))
    if kind == "parallel":
        return V[rng.integers((n + 1) // 2, size=n)] * sizes
    if kind == "nearly parallel":
        return V[rng.integers((n + 1) // 2, size=n)] * sizes * (1 + 1e-10 * rng.standard_normal((n, K)))
    return {"grid": np.round(V), "positive": np.abs(V)}.get(kind, V)


def sampled(V, rng, count=3000):
    """Largest ``||V'u||`` over random ``u >= 0`` of unit norm, sparse ones too, each improved by a few steps."""
    u = np.abs(rng.standard_normal((count, len(V)))) * (rng.uniform(size=(count, len(V))) < 0.6)
    for _ in range(20):
        u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-300)
        u = np.maximum(u + (u @ V) @ V.T, 0)
    u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-300)
    return float(np.linalg.norm(u @ V, axis=1).max())


# --- never below ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_never_below_the_exact_maximum_in_fifty_digits(kind, K):
    rng = np.random.default_rng(K)
    for n in (1, 2, 3, 4, 5):
        V = draw(kind, n, K, rng)
        bound, rounding = orthant(V)
        with mp.workdps(50):
            assert mp.mpf(bound) >= orthant_in_digits(V)
        assert 0 <= rounding <= 1e-8 * np.linalg.norm(V)  # left-out parts of merged rows included


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [20, 150])
def test_never_below_dense_sampling(kind, K, n):
    rng = np.random.default_rng(n + K)
    V = draw(kind, n, K, rng)
    bound, rounding = orthant(V)
    assert sampled(V, rng, 300) <= bound
    assert bound <= np.linalg.norm(V, 2) * (1 + 1e-12) + rounding  # u >= 0 cannot do more than any u


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4), st.sampled_from(KINDS))
def test_never_below_the_networks_of_any_data(seed, n, K, kind):
    """``(A s)_+`` of every whitened data set lies in the orthant, whatever its rank."""
    rng = np.random.default_rng(seed)
    A = whiten(rng.standard_normal((n + 1, rng.integers(1, n + 1)))).rows
    V, s = draw(kind, n + 1, K, rng), rng.standard_normal((A.shape[1], 200))
    hidden = np.maximum(A @ s, 0) / np.linalg.norm(s, axis=0)
    assert np.linalg.norm(V.T @ hidden, axis=0).max() <= orthant(V)[0]


@pytest.mark.parametrize(("K", "n"), [(1, 1000), (1, 1_000_000), (2, 1000), (2, 200_000)])
def test_never_below_long_sums_that_round_one_way(K, n):
    """Equal rows: the true maximum is ``sqrt(n) v``, and every addition of squares may round downwards."""
    for number in (1 / 3, 0.1, 0.7, np.pi):
        V = np.zeros((n, K))
        V[:, 0] = number
        bound, _ = orthant(V)
        exact = Fraction(number) ** 2 * n
        assert Fraction(bound) ** 2 >= exact
        assert float((Fraction(bound) ** 2 - exact) / exact) < 1e-9


@pytest.mark.parametrize("exponent", [-1000, -600, -300, 300, 600, 1000])
@pytest.mark.parametrize("K", [1, 3])
def test_scales_without_overflow_or_underflow(exponent, K):
    V = draw("normal", 6, K, np.random.default_rng(0))
    plain, scaled = orthant(V), orthant(np.ldexp(V, exponent))
    assert residual(np.ldexp(scaled[0], -exponent) - plain[0], 6, plain[0]) < THRESHOLD
    assert scaled[1] > 0


# --- exact cases ---


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=12))
def test_one_output_is_the_larger_of_both_signs(values):
    bound, rounding = orthant(np.array(values)[:, None])
    exact = max(math.hypot(*(v for v in values if v > 0)), math.hypot(*(v for v in values if v < 0)))
    assert exact <= bound <= exact + 2 * rounding


@pytest.mark.parametrize("kind", ["one-hot", "cross-entropy"])
@pytest.mark.parametrize("K", [2, 3, 4, 10])
def test_directions_without_acute_angles_are_exact(kind, K):
    """The largest norm of a class of rows (mathematics, section 2d)."""
    rng = np.random.default_rng(K)
    V = draw(kind, 200, K, rng)
    classes = V.argmax(axis=1)
    exact = max(np.linalg.norm(V[classes == k]) for k in range(K))
    bound, rounding = orthant(V)
    assert exact * (1 - 1e-14) <= bound <= exact + 2 * rounding and rounding < 1e-12 * exact


def test_parallel_rows_count_once():
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(3)
    sizes = rng.uniform(0.1, 2, (50, 1))
    bound, rounding = orthant(sizes * direction)
    assert abs(bound - np.linalg.norm(sizes) * np.linalg.norm(direction)) <= 2 * rounding
    opposite, _ = orthant(np.vstack([sizes, -2 * sizes]) * direction)
    assert opposite == pytest.approx(2 * bound, rel=1e-13)


def test_positive_rows_are_exact():
    """With nonnegative inner products the top singular vector is in the orthant."""
    V = draw("positive", 40, 3, np.random.default_rng(0))
    bound, rounding = orthant(V)
    assert abs(bound - np.linalg.norm(V, 2)) <= 2 * rounding + THRESHOLD * 1e-15 * bound


def test_better_than_the_largest_singular_value():
    V = draw("normal", 30, 3, np.random.default_rng(1))
    assert orthant(V)[0] < 0.97 * np.linalg.norm(V, 2)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 3), (5, 3)])
def test_zero(shape):
    assert orthant(np.zeros(shape)) == (0.0, 0.0)


def test_zero_rows_and_order_do_not_matter():
    rng = np.random.default_rng(0)
    V = draw("normal", 12, 3, rng)
    padded = np.vstack([V, np.zeros((4, 3))])[rng.permutation(16)]
    assert residual(orthant(padded)[0] - orthant(V)[0], 16, orthant(V)[0]) < THRESHOLD
    copy = V.copy()
    orthant(V)
    assert np.array_equal(copy, V)


def test_clusters_of_eigenvalues():
    """At an optimum all live rays have the same norm: LAPACK's subset drivers fail on some such matrices."""
    for seed in range(750):
        rng = np.random.default_rng(seed)
        K = int(rng.integers(2, 8))
        noise = 1e-14 * rng.standard_normal((K, K)) * (rng.uniform(size=(K, K)) < 0.2)
        V = np.diag(1 + 1e-14 * rng.standard_normal(K)) + noise
        assert np.diag(V).max() <= orthant(V)[0] <= 1 + 1e-12


# --- grouping ---


def test_groups_of_directions():
    rows = np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.5, 0.0], [-1.0, 0.0], [0.0, 1e-100]])
    group, directions = group_directions(rows)
    assert group[1] == -1 and group[0] == group[3] and group[2] == group[5]
    assert len(directions) == 3 and len({group[0], group[2], group[4]}) == 3
    live = group >= 0
    norms = np.linalg.norm(rows[live], axis=1, keepdims=True)
    assert residual(norms * directions[group[live]] - rows[live], 1, 3) < THRESHOLD


@pytest.mark.parametrize("component", [0.5, 0.1234567885, 2.0**-10, 1e-9, 0.7071067815])
def test_multiples_of_one_row_are_one_group(component):
    """Also where the ninth decimal of its direction is a tie."""
    direction = np.array([component, -np.sqrt(1 - component**2)])
    sizes = np.random.default_rng(0).uniform(0.1, 3, (200, 1))
    group, directions = group_directions(sizes * direction)
    assert len(directions) == 1 and not group.any()
