"""Patterns: the gate convention at the boundary, isotropic sampling, deduplication against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convexbn.data.whitening import whiten
from convexbn.program import gates as patterns_module
from convexbn.program.gates import first_of_each_pattern, gate_patterns, sample_gates
from instances import THRESHOLD, residual


def draw(kind, X, n_gates, seed=0, weights=None, **options):
    whitening = whiten(X, weights, **options)
    return whitening, *sample_gates(kind, n_gates, whitening, np.random.RandomState(seed))


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


# --- evaluation ---


def test_gates_are_open_on_their_hyperplane():
    X = np.array([[0.0, 0.0], [1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [0.5, -0.5]])
    gates, offsets = np.array([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]]), np.array([0.0, 0.0, -2.0])
    expected = [[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 0], [1, 1, 0]]
    patterns = gate_patterns(X, np.zeros(2), gates, offsets)
    assert patterns.dtype == bool and patterns.tolist() == np.array(expected, dtype=bool).tolist()
    mean = np.array([3.0, -7.0])
    assert np.array_equal(gate_patterns(X + mean, mean, gates, offsets), patterns)


def test_a_zero_gate_is_always_open_or_always_closed():
    patterns = gate_patterns(normal(9, 2), np.zeros(2), np.zeros((2, 3)), np.array([0.0, 1e-300, -1e-300]))
    assert patterns.all(axis=0).tolist() == [True, True, False] and not patterns[:, 2].any()


@pytest.mark.parametrize("exponent", [-1000, -300, 0, 300, 1010])
def test_patterns_do_not_depend_on_the_units_of_a_common_factor(exponent):
    X = normal(30, 4)
    whitening, gates, offsets = draw("whitened", X, 50)
    scaled, gates_scaled, offsets_scaled = draw("whitened", np.ldexp(X, exponent), 50)
    plain = gate_patterns(X, whitening.mean, gates, offsets)
    again = gate_patterns(np.ldexp(X, exponent), scaled.mean, gates_scaled, offsets_scaled)
    assert np.array_equal(offsets, offsets_scaled) and np.array_equal(plain, again)


def test_patterns_of_values_that_overflow_when_centred():
    signs = np.sign(normal(40, 3))
    centred = gate_patterns(signs, np.zeros(3), normal(3, 20, 1), np.zeros(20))
    assert np.array_equal(gate_patterns(1.5e308 * signs, np.zeros(3), normal(3, 20, 1), np.zeros(20)), centred)
    mean = np.array([-1.5e308, 1e308, 0.0])
    huge = gate_patterns(1.5e308 * signs, mean, normal(3, 20, 1), np.zeros(20))
    assert np.array_equal(huge, gate_patterns(signs, mean / 1.5e308, normal(3, 20, 1), np.zeros(20)))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_blocks_of_rows_give_the_same(monkeypatch, n):
    X, gates, offsets = normal(n, 3), normal(3, 20, 1), normal(1, 20, 2)[0]
    whole = gate_patterns(X, np.ones(3), gates, offsets)
    monkeypatch.setattr(patterns_module, "_BLOCK_ENTRIES", 1)
    assert np.array_equal(gate_patterns(X, np.ones(3), gates, offsets), whole)
    assert np.array_equal(whole, (X - 1) @ gates + offsets >= 0)


@pytest.mark.parametrize("seed", range(3))
def test_rows_on_a_hyperplane_are_treated_alike_in_every_batch(seed):
    """Tenths, symmetric data, and the row at the mean: responses are zero up to rounding."""
    rng = np.random.default_rng(seed)
    half = rng.integers(-9, 10, (30, 41))
    gates = rng.integers(-9, 10, (41, 40)).astype(float)
    gates[0] = np.where(rng.uniform(size=40) < 0.5, 1, -1)
    half[:, 0] -= (half @ gates[:, 0] * gates[0, 0]).astype(int)  # every row on the first gate's hyperplane
    X = 0.1 * np.vstack([half, -half, np.zeros((1, 41))])
    for rows, mean in ((X, np.zeros(41)), (X + 0.3, whiten(X + 0.3).mean)):
        whole = gate_patterns(rows, mean, gates, np.zeros(40))
        singly = np.vstack([gate_patterns(row[None], mean, gates, np.zeros(40)) for row in rows])
        by_gate = np.hstack([gate_patterns(rows, mean, gates[:, [j]], np.zeros(1)) for j in range(40)])
        assert np.array_equal(whole, singly) and np.array_equal(whole, by_gate)


def test_patterns_count_is_bounded_by_the_arrangement():
    """At most ``2 sum_k C(n - 1, k)``, ``k = 0 .. r`` (mathematics, section 0); all of them for one feature."""
    for d, found_all in ((1, True), (2, False)):
        X = normal(12, d)
        whitening, gates, offsets = draw("whitened", X, 20000)
        count = len(first_of_each_pattern(gate_patterns(X, whitening.mean, gates, offsets)))
        most = 2 * sum(math.comb(11, k) for k in range(d + 1))
        assert count <= most and (count == most or not found_all)
        assert count > 0.5 * most


# --- sampling ---


def test_data_gates_are_standard_normal_directions_without_offsets():
    _, gates, offsets = draw("data", normal(30, 4), 7, seed=3)
    assert np.array_equal(gates, np.random.RandomState(3).standard_normal((4, 7))) and not offsets.any()


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_whitened_gates_respond_as_normal_directions_on_the_whitened_rows(rank, weighted):
    """``(x - mean)'g + b = a(x)'h`` with ``h ~ N(0, I)``."""
    weights = np.random.default_rng(0).uniform(0.2, 3, 50) if weighted else np.ones(50)
    X = normal(50, 5) * np.geomspace(1, 1e-3, 5) + 1
    whitening, gates, offsets = draw("whitened", X, 20000, seed=5, weights=weights, rank=rank)
    response = (X - whitening.mean) @ gates + offsets
    h = whitening.rows.T @ (weights[:, None] * response)
    scale = 1e3 * np.abs(whitening.rows).max() * np.abs(h).max()  # units over three orders of magnitude
    assert residual(response - whitening.rows @ h, 50, scale) < THRESHOLD
    assert np.abs(h @ h.T / 20000 - np.eye(whitening.rank + 1)).max() < 5 * np.sqrt(2 / 20000)
    assert np.abs(h.mean(axis=1)).max() < 5 / np.sqrt(20000)


@pytest.mark.parametrize("kind", ["data", "whitened"])
def test_patterns_do_not_depend_on_how_the_singular_vectors_are_signed(kind):
    """Rows in another order give the same gates to rounding, so the same patterns."""
    X = normal(30, 4) + 1
    order = np.random.default_rng(0).permutation(30)
    (first, *gates), (second, *other) = draw(kind, X, 40), draw(kind, X[order], 40)
    patterns = gate_patterns(X, first.mean, *gates)
    assert np.array_equal(gate_patterns(X[order], second.mean, *other), patterns[order])


@pytest.mark.parametrize("kind", ["data", "whitened"])
def test_draws_repeat_and_leave_the_global_generator_alone(kind):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (draw(kind, normal(20, 3), 9, seed=1)[1:] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], draw(kind, normal(20, 3), 9, seed=2)[1])
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


# --- deduplication ---


@settings(deadline=None, derandomize=True, max_examples=150)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 12))))
def test_first_of_each_pattern_against_a_dictionary(patterns):
    first = {}
    for j, column in enumerate(patterns.T):
        first.setdefault(tuple(column), j)
    kept = first_of_each_pattern(patterns)
    assert kept.tolist() == list(first.values())
    assert np.array_equal(first_of_each_pattern(np.asfortranarray(patterns)), kept)


def test_rows_that_pad_a_byte_do_not_matter():
    for n in range(1, 18):
        patterns = np.eye(n, dtype=bool)
        twice = np.hstack([patterns, patterns, ~patterns])
        expected = list(range(n)) + (list(range(2 * n, 3 * n)) if n > 2 else [])
        assert first_of_each_pattern(twice).tolist() == (expected if n != 1 else [0, 2])
