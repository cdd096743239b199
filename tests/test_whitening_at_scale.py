"""Many rows: whitening by the Gram matrix, in blocks and of any type, against the SVD of the whole matrix."""

import tracemalloc
import warnings

import numpy as np
import pytest

from convexbn import ConvexBNClassifier
from convexbn.data import moments
from convexbn.data.gram import spectrum
from convexbn.data.moments import Moments
from convexbn.data.preactivations import PreActivations
from convexbn.data.whitening import whiten
from instances import THRESHOLD, residual

N, D = 9000, 30


def images(dtype=np.uint8, n=N, d=D, seed=0):
    """Smooth rows of pixels: a spectrum that falls, an offset, one column that never changes."""
    rng = np.random.default_rng(seed)
    waves = np.cumsum(rng.standard_normal((n, d)), axis=1)
    pixels = np.clip(110 + 18 * waves, 0, 255).astype(np.uint8)
    pixels[:, 3] = 7
    return pixels.astype(dtype)


def dense(X, weights=None, k=None):
    """``(U, s, V)`` of the centred data by NumPy."""
    X = np.asarray(X, dtype=np.float64)
    weights = np.ones(len(X)) if weights is None else weights
    root = np.sqrt(weights)[:, None]
    left, s, right = np.linalg.svd(root * (X - np.average(X, axis=0, weights=weights)), full_matrices=False)
    return left[:, :k], s[:k], right[:k].T


def weights_of(kind, n=N):
    rng = np.random.default_rng(1)
    return {"none": None, "repeated": rng.integers(1, 4, n).astype(float), "any": rng.uniform(0.1, 3, n)}[kind]


# --- moments ---


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.bool_])
def test_products_of_small_integers_are_exact(dtype, monkeypatch):
    X = np.random.default_rng(0).integers(0, 2 if dtype == np.bool_ else 256, (5000, 12)).astype(dtype)
    X[:, 0] = np.sort(X[:, 0])  # the first block says nothing of the mean
    whole = X.astype(np.int64)
    found = moments.moments(X, np.ones(5000))
    total = whole.sum(axis=0)
    centred = 5000 * (whole.T @ whole) - np.outer(total, total)  # 5000 times the Gram matrix, in integers
    assert np.allclose(5000 * found.gram, centred, rtol=1e-14, atol=1e-14 * centred.max())
    if found.exact is not None:  # extended precision is not everywhere
        assert np.abs(5000 * found.exact - centred).max() <= 1e-18 * np.abs(centred).max()
    assert moments.moments(X, np.full(5000, 2.0)).exact is None
    centre = np.full(12, 3.0)
    gram, sums = moments._read_integers(X, np.ones(5000), centre, None)
    assert np.array_equal(gram, ((whole - 3).T @ (whole - 3)).astype(float))
    assert np.array_equal(sums, (whole - 3).sum(axis=0).astype(float))


@pytest.mark.parametrize("kind", ["none", "repeated", "any"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_moments_do_not_depend_on_type_blocks_or_order(dtype, kind, monkeypatch):
    X, weights = images(dtype), weights_of(kind)
    weights = np.ones(N) if weights is None else weights
    mean = np.average(X.astype(float), axis=0, weights=weights)
    expected = (weights[:, None] * (X - mean)).T @ (X - mean)
    order = np.argsort(X[:, 0])
    monkeypatch.setattr(moments, "BLOCK_BYTES", 8 * D * 700)
    for found in (moments.moments(X, weights), moments.moments(X[order], weights[order])):
        gram = np.ldexp(found.gram, found.exponents + found.exponents[:, None])
        assert residual(np.ldexp(found.mean, found.exponents) - mean, N, 255) < THRESHOLD
        assert residual(gram - expected, N, expected.max()) < THRESHOLD
        assert isinstance(found, Moments) and np.flatnonzero(~found.varies).tolist() == [3]


def test_rows_sorted_far_apart_lose_no_digits(monkeypatch):
    rng = np.random.default_rng(0)
    X = np.r_[rng.standard_normal((100, 3)) * 1e-3, 1e6 + rng.standard_normal((5000, 3)) * 1e-3]
    monkeypatch.setattr(moments, "BLOCK_BYTES", 8 * 3 * 100)
    weights = np.r_[np.full(100, 1e-18), np.ones(5000)]  # the first block is nowhere near the mean
    found = moments.moments(X, weights)
    mean = weights @ X / weights.sum()
    exact = (weights[:, None] * (X - mean)).T @ (X - mean)
    assert np.allclose(np.ldexp(found.gram, 2 * found.exponents[0]), exact, rtol=1e-6)


# --- the whitening ---


@pytest.mark.parametrize("kind", ["none", "repeated", "any"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("k", [5, 20])
def test_top_directions_are_those_of_the_dense_svd(dtype, kind, k):
    X, weights = images(dtype), weights_of(kind)
    found, (left, s, right) = whiten(X, weights, rank=k), dense(X, weights, k)
    root = 1.0 if weights is None else np.sqrt(weights)[:, None]
    assert found.departure is not None and found.rank == k and found.truncated and found.numerical_rank == D - 1
    assert np.allclose(found.singular_values[:k], s, rtol=1e-12)
    assert np.linalg.norm(found.directions - right @ (right.T @ found.directions), 2) < 1e-9
    whitened = root * found.rows
    assert np.linalg.norm(whitened[:, :k] - left @ (left.T @ whitened[:, :k]), 2) < 1e-9
    assert np.abs(np.abs(np.sum(left * whitened[:, :k], axis=0)) - 1).max() < 1e-9
    gram = whitened.T @ whitened
    assert np.linalg.norm(gram[:k, :k] - np.eye(k)) < found.departure + 1e-12 < 2e-11
    assert residual(gram - np.eye(k + 1), N) < THRESHOLD
    assert residual(found.transform(X) - found.rows, N) < THRESHOLD


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 0.95}, {"spectral_filter": 0.05}, {"rank": 8, "spectral_filter": 0.2}, {"spectral_filter": 1e9}],
)
def test_both_ways_of_whitening_agree(settings, monkeypatch):
    X = images()
    by_gram = whiten(X, **settings)
    monkeypatch.setattr("convexbn.data.qr.BLOCK_ROWS", N)
    by_qr = whiten(X, **settings)
    assert by_gram.departure is not None and by_qr.departure is None
    assert by_gram.rank == by_qr.rank and by_gram.numerical_rank == by_qr.numerical_rank == D - 1
    assert np.array_equal(by_gram.constant, by_qr.constant) and np.allclose(by_gram.mean, by_qr.mean, rtol=1e-14)
    assert np.allclose(by_gram.filter, by_qr.filter, rtol=1e-10)
    assert by_gram.rank_cut == pytest.approx(by_qr.rank_cut, rel=1e-12)
    assert residual(by_gram.rows @ by_gram.rows.T[:, :50] - by_qr.rows @ by_qr.rows.T[:, :50], N) < THRESHOLD


@pytest.mark.parametrize("d", [1, 2, 3, 40])
@pytest.mark.parametrize("size", [1e-90, 1.0, 1e90])
def test_the_spectrum_and_its_leading_vectors_are_those_of_a_full_decomposition(d, size):
    X = size * np.random.default_rng(d).standard_normal((60, d))
    X[:, : d // 2] = X[:, d // 2 : d // 2 * 2] + 1e-9 * X[:, : d // 2]  # near pairs
    s = np.linalg.svd(X, compute_uv=False)
    gram = X.T @ X
    for k in {1, (d + 1) // 2, d}:
        values, vectors = spectrum(gram.copy(), lambda found, k=k: k)
        assert np.allclose(values, s, atol=3e-8 * s[0]) and vectors.shape == (d, k)
        assert np.linalg.norm(vectors.T @ vectors - np.eye(k)) < 1e-12
        left = (gram @ vectors - vectors * values[:k] ** 2) / s[0] ** 2
        assert np.linalg.norm(left) < 1e-13 * d


def test_blocks_and_order_change_rounding_alone(monkeypatch):
    X, order = images(), np.random.default_rng(2).permutation(N)
    plain = whiten(X, rank=10)
    monkeypatch.setattr(moments, "BLOCK_BYTES", 8 * D * 333)
    other = whiten(X[order], rank=10)
    signs = np.sign(np.sum(plain.directions * other.directions, axis=0))
    assert np.abs(signs * other.rows[:, :-1] - plain.rows[order, :-1]).max() < 1e-12
    assert np.allclose(signs * other.projection, plain.projection, atol=1e-11 * np.abs(plain.projection).max())


@pytest.mark.parametrize("dependence", ["sum", "nearly", "steep"])
def test_what_the_gram_matrix_does_not_resolve_is_left_to_the_qr(dependence):
    X = images(np.float64)
    rng = np.random.default_rng(0)
    if dependence == "sum":
        X[:, 5] = X[:, 6] + X[:, 7]
    elif dependence == "nearly":
        X[:, 5] = X[:, 6] + 1e-6 * rng.standard_normal(N)
    else:
        X = rng.standard_normal((N, D)) @ (
            np.geomspace(1, 1e-9, D)[:, None] * np.linalg.qr(rng.standard_normal((D, D)))[0]
        )
    exact = {"sum": D - 2, "nearly": D - 1, "steep": D}[dependence]
    whole, top = whiten(X), whiten(X, rank=5)
    assert whole.departure is None and whole.rank == exact
    assert residual(whole.rows.T @ whole.rows - np.eye(exact + 1), N) < THRESHOLD
    assert top.departure is not None and top.rank == 5 and top.truncated
    left, _, _ = dense(X, k=5)
    assert np.linalg.norm(top.rows[:, :5] - left @ (left.T @ top.rows[:, :5]), 2) < 1e-6


def test_a_departure_from_orthonormality_is_removed():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((D, D)))[0]
    X = rng.standard_normal((N, D)) @ (np.geomspace(1, 1e-3, D)[:, None] * rotation)
    found = whiten(X)
    once = (X - found.mean) @ (dense(X)[2] / dense(X)[1])
    assert found.departure < 1e-11 and found.rank == D
    gram = found.rows.T @ found.rows
    assert np.linalg.norm(gram[:-1, :-1] - np.eye(D)) < found.departure + 1e-12
    assert residual(found.transform(X) - found.rows, N, 1e3) < THRESHOLD
    assert residual(once @ (once.T @ found.rows[:, :-1]) - found.rows[:, :-1], N, 1e3) < THRESHOLD


def test_all_that_is_resolved_is_not_said_to_be_all_there_is():
    low = images(np.float64)[:, :4] @ np.random.default_rng(0).standard_normal((4, 9))
    found = whiten(low, rank=3)
    assert found.rank == 3 and not found.truncated and found.departure is None  # decided by the QR


@pytest.mark.parametrize("scale", [1e-290, 1e290, np.geomspace(1e-12, 1e12, D)])
def test_units(scale):
    X = images(np.float64)
    plain, scaled = whiten(X), whiten(X * scale)
    assert scaled.rank == D - 1
    assert residual(scaled.rows @ scaled.rows[:50].T - plain.rows @ plain.rows[:50].T, N) < THRESHOLD


def test_memory_is_that_of_the_result_and_some_blocks(monkeypatch):
    X = images(n=60_000, d=100)
    monkeypatch.setattr(moments, "BLOCK_BYTES", 1 << 20)
    PreActivations.compute(X[:9000], np.ones((100, 2)), np.ones(9000))
    tracemalloc.start()
    found = whiten(X, rank=5)
    whitening = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    PreActivations.compute(X, found.projection, np.ones(len(X)))
    normalising = tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert whitening < found.rows.nbytes + (10 << 20) < X.nbytes * 4
    assert normalising < 8 * found.rows.nbytes + (4 << 20) < X.nbytes * 5


def test_the_data_are_not_changed():
    for dtype in (np.uint8, np.float64):
        X = images(dtype)
        copy, weights = X.copy(), np.ones(N)
        whiten(X, weights, rank=4)
        PreActivations.compute(X, np.ones((D, 1)), weights)
        assert np.array_equal(X, copy) and np.all(weights == 1)


# --- the doors ---


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.float32])
@pytest.mark.parametrize("n", [300, 9000])
def test_estimators_do_not_see_the_type(dtype, n):
    X = images(n=n, d=12)
    X = (X // 2 if dtype == np.int8 else X).astype(dtype)
    if dtype == np.int8:
        X = (X.astype(int) * 2 - 128).astype(np.int8)  # all of the range
    y = (X[:, 8].astype(int) > X[:, 2]).astype(int) + (X[:, 11].astype(int) > 50)
    settings = {"loss": "squared", "n_gates": 5, "rank": 6, "random_state": 0, "tol": 1e-2, "max_iter": 50}
    small, large = ConvexBNClassifier(**settings), ConvexBNClassifier(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.fit(X, y), large.fit(X.astype(np.float64), y)
    assert small.fingerprint_ == large.fingerprint_
    assert small.certificate_.objective == pytest.approx(large.certificate_.objective, rel=1e-9)
    assert np.array_equal(small.network_.predict(X), small.network_.predict(X.astype(np.float64)))
    assert small.certify(X, y).objective == pytest.approx(small.certify(X.astype(float), y).objective, rel=1e-9)


def test_small_types_stay_small():
    from convexbn.estimators.validation import checked_data, checked_rows

    X, y = images(n=50), np.arange(50) % 2
    model = ConvexBNClassifier()
    rows, _, _ = checked_data(model, X, y, None, numeric_targets=False, reset=True)
    assert rows.dtype == np.uint8 and checked_rows(model, X).dtype == np.uint8
    rows, _, _ = checked_data(model, X.astype(np.float32), y, None, numeric_targets=False, reset=True)
    assert rows.dtype == np.float32
    assert checked_data(model, X.astype(np.int64), y, None, numeric_targets=False, reset=True)[0].dtype == np.float64
