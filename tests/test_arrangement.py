"""Enumerated patterns against rational arithmetic, linear programs, Zaslavsky's count and known counts."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convexbn.data.whitening import whiten
from convexbn.program.arrangement import count_bound, enumerate_patterns, facets


def normal(n, q, seed=0):
    return np.random.default_rng(seed).standard_normal((n, q))


def grid(*sizes):
    """Integer points of a box, with the constant column."""
    points = np.array(list(itertools.product(*(range(size) for size in sizes))), dtype=float)
    return np.column_stack([points, np.ones(len(points))])


def rank(rows):
    """Rank of integer rows by fraction-free elimination."""
    matrix, found = [[Fraction(int(x)) for x in row] for row in rows], 0
    for column in range(len(matrix[0]) if matrix else 0):
        pivot = next((i for i in range(found, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            continue
        matrix[found], matrix[pivot] = matrix[pivot], matrix[found]
        for i in range(found + 1, len(matrix)):
            factor = matrix[i][column] / matrix[found][column]
            matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[found], strict=True)]
        found += 1
    return found


def zaslavsky(rows):
    """Number of cells of integer normals: ``sum over subsets B of (-1)^(|B| - rank B)`` (Zaslavsky 1975)."""
    live = [row for row in rows if row.any()]
    subsets = itertools.chain.from_iterable(itertools.combinations(live, k) for k in range(len(live) + 1))
    return sum((-1) ** (len(subset) - rank(subset)) for subset in subsets)


def exact_patterns(rows, directions):
    """Patterns of float directions on integer rows in rational arithmetic; every live row is off its hyperplane."""
    patterns = []
    for direction in directions:
        s = [Fraction(float(x)) for x in direction]
        values = [sum(int(a) * x for a, x in zip(row, s, strict=True)) for row in rows]
        assert all(value != 0 or not row.any() for value, row in zip(values, rows, strict=True))
        patterns.append([value >= 0 for value in values])
    return np.array(patterns)


def as_set(patterns):
    return {tuple(pattern) for pattern in patterns.tolist()}


def by_linear_programs(rows):
    """Every sign vector tried: is there ``s`` with ``sign_i a_i's >= 1``, zero rows being open?"""
    found, live = set(), rows.any(axis=1)
    for signs in itertools.product([True, False], repeat=len(rows)):
        opened = np.array(signs)
        if not opened[~live].all():
            continue
        walls = np.where(opened, -1.0, 1.0)[live, None] * rows[live]
        answer = scipy.optimize.linprog(np.zeros(rows.shape[1]), walls, -np.ones(live.sum()), bounds=(None, None))
        if answer.status == 0:
            found.add(signs)
    return found


def check(rows):
    """Distinct patterns, each realised by its direction, as many as there are cells."""
    patterns, directions = enumerate_patterns(rows)
    assert len(as_set(patterns)) == len(patterns) == zaslavsky(rows)
    assert np.array_equal(exact_patterns(rows, directions), patterns)
    assert np.allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-14)


# --- general position ---


@pytest.mark.parametrize(
    ("n", "q"), [(1, 1), (7, 1), (1, 3), (3, 5), (5, 5), (9, 2), (60, 2), (60, 3), (200, 3), (30, 4), (16, 5), (16, 6)]
)
def test_count_in_general_position(n, q):
    A = normal(n, q, seed=n + q)
    patterns, directions = enumerate_patterns(A)
    assert len(as_set(patterns)) == len(patterns) == count_bound(n, q)
    assert np.array_equal(directions @ A.T >= 0, patterns)


@pytest.mark.parametrize(("n", "d"), [(60, 2), (16, 3), (5, 4), (5, 9)])
def test_count_of_whitened_data(n, d):
    """``2 sum_k C(n - 1, k)``, ``k`` up to the rank ``r``; all sign vectors at rank ``n - 1``."""
    A = whiten(normal(n, d)).rows
    count = len(enumerate_patterns(A).patterns)
    assert count == 2 * sum(math.comb(n - 1, k) for k in range(min(d, n - 1) + 1))
    assert d < n - 1 or count == 2**n


def test_sampling_finds_no_other_pattern():
    A = whiten(normal(40, 3)).rows
    sampled = np.random.default_rng(1).standard_normal((20_000, 4)) @ A.T >= 0
    assert as_set(np.unique(sampled, axis=0)) <= as_set(enumerate_patterns(A).patterns)


# --- ties, against exact arithmetic ---

SMALL = {
    "ties": np.array([[1, 0, 1], [2, 0, 1], [3, 0, 1], [0, 1, 1], [0, 2, 1], [1, 1, 1], [2, 2, 1.0]]),
    "duplicates": np.repeat(normal(4, 3).round(1) * 10, 2, axis=0).round(),
    "multiples": np.array([[1, 2, 1], [3, 6, 3], [-2, -4, -2], [0, 1, 1], [0, -5, -5], [1, 0, 0], [1, 1, 1.0]]),
    "antiparallel": np.vstack([np.eye(3), -np.eye(3), np.ones((1, 3)), -np.ones((1, 3))]),
    "zero rows": np.array([[0, 0, 0], [1, 2, 1], [0, 0, 0], [1, -1, 1], [2, 1, 1.0]]),
    "grid": grid(4, 2),
    "binary": grid(2, 2),
    "symmetric": np.array([[x, y, 1] for x, y in [(1, 2), (-1, -2), (3, -1), (-3, 1), (2, 2), (-2, -2), (0, 0.0)]]),
    "one column repeated": np.column_stack([np.arange(6.0), np.arange(6.0), np.ones(6)]),
    "all alike": np.ones((5, 3)),
}


@pytest.mark.parametrize("name", SMALL)
def test_ties_against_linear_programs_and_rational_arithmetic(name):
    rows = SMALL[name]
    check(rows)
    assert as_set(enumerate_patterns(rows).patterns) == by_linear_programs(rows)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(hnp.arrays(int, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.integers(-2, 2)))
def test_small_integer_rows_against_zaslavsky(rows):
    if rows.any():
        check(rows.astype(float))
    else:
        assert enumerate_patterns(rows.astype(float)).patterns.tolist() == [[True] * len(rows)]


@pytest.mark.parametrize("q", [2, 3, 4, 5])
def test_reflection_arrangements(q):
    """Hyperplanes ``s_i = s_j`` have ``q!`` cells, with ``s_i = -s_j`` and ``s_i = 0`` there are ``2^q q!``."""
    unit = np.eye(q)
    braid = np.array([unit[i] - unit[j] for i in range(q) for j in range(i)])
    assert len(enumerate_patterns(braid).patterns) == math.factorial(q)
    if q < 5:
        full = np.vstack([braid, np.abs(braid), unit])
        assert len(enumerate_patterns(full).patterns) == 2**q * math.factorial(q)


@pytest.mark.parametrize(("features", "count"), [(1, 4), (2, 14), (3, 104), (4, 1882)])
def test_binary_features_give_the_threshold_functions(features, count):
    """Boolean functions of a hyperplane: 4, 14, 104, 1882, ... (OEIS A000609)."""
    X = np.array(list(itertools.product([0.0, 1.0], repeat=features)))
    for rows in (np.c_[X, np.ones(len(X))], np.c_[2 * X - 1, np.ones(len(X))], whiten(X).rows):
        assert len(enumerate_patterns(rows).patterns) == count


@pytest.mark.parametrize(("size", "lines"), [(2, 7), (3, 29), (4, 87), (5, 201), (6, 419), (7, 749)])
def test_lines_divide_a_square_grid(size, lines):
    """Ways to divide its points by a line, no division included (OEIS A114043); each has two signs."""
    assert len(enumerate_patterns(grid(size, size)).patterns) == 2 * lines


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.1, [3.0, -70.0]), ([1.0, 1e-6], 0.0), (1.0, 1e6)])
def test_ties_survive_whitening(scale, offset):
    integer = grid(5, 5)
    X = integer[:, :2] * scale + offset
    expected = as_set(enumerate_patterns(integer).patterns)
    assert len(expected) == 402 and as_set(enumerate_patterns(whiten(X).rows).patterns) == expected


def test_ties_that_rounding_of_the_data_broke_take_a_tolerance():
    integer = grid(5, 5)
    A = whiten(integer[:, :2] * 1e-4 + 1e3).rows  # the rounding of 1000 is 1e-9 of the spacing
    assert len(enumerate_patterns(A).patterns) > 402
    expected = as_set(enumerate_patterns(integer).patterns)
    assert as_set(enumerate_patterns(A, tolerance=1e-7).patterns) == expected


# --- invariance ---


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_invariant_under_row_order_row_scale_and_column_mixing(seed, n, q, integer):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, (n, q)).astype(float) if integer else rng.standard_normal((n, q))
    rows[:, -1] += ~rows.any(axis=1)
    patterns = enumerate_patterns(rows).patterns
    order = rng.permutation(n)
    assert as_set(enumerate_patterns(rows[order]).patterns) == as_set(patterns[:, order])
    assert as_set(enumerate_patterns(rng.uniform(1e-3, 1e3, (n, 1)) * rows).patterns) == as_set(patterns)
    rotations = np.linalg.qr(rng.standard_normal((2, q, q)))[0]
    mixed = rows @ rotations[0] * np.geomspace(1, 1e3, q) @ rotations[1]
    assert as_set(enumerate_patterns(mixed).patterns) == as_set(patterns)
    twice = np.vstack([rows, -rows, rows[:1]])
    assert as_set(enumerate_patterns(twice).patterns) == as_set(np.hstack([patterns, ~patterns, patterns[:, :1]]))


def test_complements_are_the_second_half_and_nothing_is_mutated():
    A = normal(20, 3)
    copy = A.copy()
    first, second = enumerate_patterns(A), enumerate_patterns(A)
    assert np.array_equal(A, copy)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    half = len(first.patterns) // 2
    assert np.array_equal(first.patterns[half:], ~first.patterns[:half])
    assert np.array_equal(first.directions[half:], -first.directions[:half])


@pytest.mark.parametrize(("angle", "count"), [(1e-3, 10), (1e-7, 10), (1e-11, 10), (1e-13, 8), (0.0, 8)])
def test_hyperplanes_coincide_within_the_tolerance(angle, count):
    angles = np.array([0.0, 0.7, 1.4, 2.1, 2.1 + angle])
    rows = np.column_stack([np.cos(angles), np.sin(angles)])
    assert len(enumerate_patterns(rows).patterns) == count
    assert len(enumerate_patterns(rows, tolerance=1e-2).patterns) == 8


@pytest.mark.parametrize("width", [1e-5, 1e-7, 1e-9])
def test_thin_cells_are_found(width):
    """Lines that all but meet in one point: the small triangle is a cell."""
    rows = np.array([[1, 0, 0], [0, 1, 0], [1, 1, -width], [1, -1, 3], [2, 1, 5.0]])
    assert len(enumerate_patterns(rows).patterns) == count_bound(5, 3)
    assert len(enumerate_patterns(np.where(rows == -width, 0.0, rows)).patterns) < count_bound(5, 3)


# --- faces ---


@pytest.mark.parametrize("name", [*SMALL, "normal"])
def test_directions_on_hyperplanes_are_in_the_closure_of_a_cell(name):
    """``(A s)_+ = D A s`` for the gates ``D`` of some cell, so that its pattern serves them."""
    rows = SMALL.get(name, normal(8, 3))
    patterns = enumerate_patterns(rows).patterns
    flats = [np.linalg.svd(rows[list(pair)])[2][-1] for pair in itertools.combinations(range(len(rows)), 2)]
    for s in [*flats, *np.cross(rows, normal(len(rows), 3, 1))]:
        response = rows @ s
        response[np.abs(response) < 1e-13 * np.abs(rows).max()] = 0
        gated = patterns * response
        assert (np.abs(gated - np.maximum(response, 0)).max(axis=1) == 0).any()


def test_facets_in_general_position():
    """A hyperplane has a facet on both sides of every cell that the others leave on it."""
    patterns = enumerate_patterns(normal(12, 3)).patterns
    walls = facets(patterns)
    assert walls.sum(axis=0).tolist() == [2 * count_bound(11, 2)] * 12
    assert walls.sum(axis=1).min() >= 3


@pytest.mark.parametrize("name", [*SMALL, "normal"])
def test_facets_imply_all_inequalities_and_none_is_idle(name):
    rows = SMALL.get(name, normal(9, 3))
    patterns = enumerate_patterns(rows).patterns
    for opened, wall in zip(patterns, facets(patterns), strict=True):
        inward = np.where(opened, 1.0, -1.0)[:, None] * rows
        for row in np.flatnonzero(~wall):  # a_i's >= 0 is a nonnegative combination of the facets (Farkas)
            _, distance = scipy.optimize.nnls(inward[wall].T, inward[row])
            assert distance <= 1e-9
        for row in np.flatnonzero(wall):
            others = wall & (np.arange(len(rows)) != row)
            _, distance = scipy.optimize.nnls(inward[others].T, inward[row]) if others.any() else (None, 1.0)
            assert distance > 1e-9


# --- budget ---


def test_the_budget_is_checked_before_memory_is_taken():
    A = normal(2000, 8)
    tracemalloc.start()
    try:
        with pytest.raises(MemoryError, match=r"2000 hyperplanes in 8 dimensions may have 5\.0\de\+19 .*pricing"):
            enumerate_patterns(A)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    with pytest.raises(MemoryError, match="bytes"):
        enumerate_patterns(normal(3000, 400))


def test_the_budget_is_the_size_of_the_answer():
    A = normal(60, 3)
    size = sum(array.nbytes for array in enumerate_patterns(A))
    assert size == 3542 * (60 + 3 * 8)
    assert len(enumerate_patterns(A, max_bytes=size).patterns) == 3542
    with pytest.raises(MemoryError, match=f"3\\.54e\\+3 activation patterns, .* max_bytes={size - 1}"):
        enumerate_patterns(A, max_bytes=size - 1)


def test_repeated_rows_count_once_in_the_budget():
    rows = np.repeat(normal(6, 3), 100, axis=0) * np.random.default_rng(0).uniform(-2, 2, (600, 1))
    patterns = enumerate_patterns(rows, max_bytes=count_bound(6, 3) * (600 + 24)).patterns
    assert len(patterns) == count_bound(6, 3)
