"""Patches, pooling and the whitening of patches: against loops, adjoints and dense data."""

import numpy as np
import pytest

from convexbn.data import qr, row_matrix
from convexbn.data import whitening as whitening_module
from convexbn.data.convolution import Convolution
from convexbn.data.patches import Geometry, PatchMatrix
from convexbn.data.pooling import Regions
from convexbn.data.preactivations import PreActivations
from convexbn.data.row_matrix import ProjectedRows
from convexbn.data.spectrum import Kept
from convexbn.data.whitening import whiten
from convexbn.program.losses import CrossEntropyLoss, LogisticLoss, SquaredLoss
from convexbn.program.readout import AveragePooling, MaxPooling
from instances import residual

GEOMETRIES = [
    Geometry((5, 6, 2), (3, 2), (1, 1), (0, 0)),
    Geometry((5, 6, 2), (3, 3), (2, 1), (1, 2)),
    Geometry((1, 9, 1), (1, 3), (1, 2), (0, 1), 1),
]
POOLINGS = [
    kind(Regions(locations, grid))
    for kind in (AveragePooling, MaxPooling)
    for locations, grid in [((3, 4), (1, 1)), ((4, 4), (2, 2)), ((5, 3), (2, 2)), ((2, 3), (2, 3)), ((1, 7), (1, 3))]
]


def naive_patches(images, geometry):
    """Patches one number at a time."""
    (H, W, C), (kh, kw), (sh, sw), (ph, pw) = geometry.image, geometry.kernel, geometry.stride, geometry.padding
    rows = []
    for image in images.reshape(-1, H, W, C):
        padded = np.zeros((H + 2 * ph, W + 2 * pw, C))
        padded[ph : ph + H, pw : pw + W] = image
        for y in range(0, H + 2 * ph - kh + 1, sh):
            for x in range(0, W + 2 * pw - kw + 1, sw):
                rows.append(
                    [padded[y + dy, x + dx, c] for c in range(C) for dy in range(kh) for dx in range(kw)]
                )  # fmt: skip
    return np.array(rows)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_patches_are_those_of_a_loop_however_they_are_read(geometry, dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, geometry.n_features)).astype(dtype)
    X, expected = PatchMatrix(images, geometry), naive_patches(images, geometry)
    assert X.shape == expected.shape and X.dtype == dtype and len(X) == len(expected) and X.size == expected.size
    np.testing.assert_array_equal(np.asarray(X), expected)
    for index in (slice(3, 17), slice(5, 5), slice(len(X) - 3, None), 4, expected[:, 0] > 100, np.array([9, 0, 9])):
        np.testing.assert_array_equal(X[index], expected[index])
    np.testing.assert_array_equal(X.of_cases(np.array([5, 1])), np.vstack([X.of_cases([5]), X.of_cases([1])]))
    np.testing.assert_array_equal(X.min(axis=0), expected.min(axis=0))
    np.testing.assert_array_equal(X.max(axis=0), expected.max(axis=0))
    assert X.min(initial=0) == expected.min(initial=0) and X.max(initial=300) == 300


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_pooling_reads_regions_and_its_gradient_is_its_derivative(pooling):
    rng = np.random.default_rng(0)
    n, m, K = 3, 4, 2
    hidden = rng.uniform(0.1, 1, (n * pooling.rows_per_case, m))
    output = rng.standard_normal((m, pooling.n_regions * K))
    pooled = pooling.pool(hidden).reshape(n, pooling.n_regions, m)
    for i, r, j in np.ndindex(pooled.shape):
        inside = hidden.reshape(n, -1, m)[i, pooling.regions.members[r], j]
        assert pooled[i, r, j] == pytest.approx(inside.mean() if pooling.linear else inside.max())
    outputs, dual = pooling.outputs(hidden, output), rng.standard_normal((n, K))
    flat = output.reshape(m, pooling.n_regions, K)
    np.testing.assert_allclose(outputs, np.einsum("nrm,mrk->nk", pooled, flat), rtol=1e-13)
    by_hidden = pooling.unpool(dual @ pooling.by_region(output).T, hidden)
    by_output = pooling.by_neuron(pooling.pool(hidden).T @ dual)
    np.testing.assert_array_equal(pooling.by_neuron(pooling.by_region(output)), output)
    along, step = rng.standard_normal(hidden.shape), 1e-6
    change = (pooling.outputs(hidden + step * along, output) - outputs) / step
    assert np.sum(dual * change) == pytest.approx(np.sum(by_hidden * along), rel=1e-5, abs=1e-6)
    assert np.sum(dual * outputs) == pytest.approx(np.sum(by_output * output), rel=1e-12)
    ratios = np.linalg.norm(pooled, axis=1) / np.linalg.norm(hidden.reshape(n, -1, m), axis=1)
    assert ratios.max() <= pooling.norm


@pytest.mark.parametrize("pooling", [p for p in POOLINGS if p.linear], ids=str)
def test_spread_is_the_adjoint_of_gather_and_outputs_gather_those_of_the_rows(pooling):
    rng = np.random.default_rng(1)
    n, K, m = 4, 2, 3
    rows = rng.standard_normal((n * pooling.rows_per_case, pooling.n_regions * K))
    dual = rng.standard_normal((n, K))
    assert np.sum(pooling.gather(rows) * dual) == pytest.approx(np.sum(rows * pooling.spread(dual)), rel=1e-12)
    hidden, output = rng.random((n * pooling.rows_per_case, m)), rng.standard_normal((m, pooling.n_regions * K))
    np.testing.assert_allclose(pooling.gather(hidden @ output), pooling.outputs(hidden, output), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["average", "max"])
def test_regions_are_those_of_torch(kind):
    torch = pytest.importorskip("torch")
    pooling = (AveragePooling if kind == "average" else MaxPooling)(Regions((5, 7), (2, 3)))
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 5, 7, 3))
    layer = (torch.nn.AdaptiveAvgPool2d if kind == "average" else torch.nn.AdaptiveMaxPool2d)((2, 3))
    expected = layer(torch.tensor(hidden).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 6, 3).numpy()
    np.testing.assert_allclose(pooling.pool(hidden.reshape(-1, 3)), expected.reshape(2, 18), rtol=1e-14)


@pytest.mark.parametrize("loss", [SquaredLoss, LogisticLoss, CrossEntropyLoss])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_a_pooled_loss_keeps_the_fenchel_young_equality(loss, grid):
    rng = np.random.default_rng(0)
    n, K, pooling = 5, 3, AveragePooling(Regions((2, 3), grid))
    targets = np.eye(K)[rng.integers(K, size=n)]
    images = loss(2 * targets - 1 if loss is LogisticLoss else targets, rng.uniform(1, 2, n))
    pooled = pooling.composed(images)
    G = rng.standard_normal(pooled.targets.shape)
    W = pooled.negative_gradient(G)
    assert pooled.value(G) == pytest.approx(pooled.dual_value(W) - np.sum(W * G), rel=1e-12)
    assert pooled.dual_value(0.5 * W) + 1e-12 >= images.dual_value(0.5 * images.negative_gradient(pooling.gather(G)))
    assert pooled.dual_value(W + 1e-3 * rng.standard_normal(W.shape)) == -np.inf
    part = pooled.of_rows(slice(6, 18))
    assert part.value(G[6:18]) == pytest.approx(images.of_rows(slice(1, 3)).value(pooling.gather(G)[1:3]))


@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"rank": 6, "spectral_filter": 0.1}], ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_patches_are_whitened_in_blocks_as_the_matrix_that_they_stand_for(dtype, settings, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(row_matrix, "_KEPT_ENTRIES", 1000)
    rng = np.random.default_rng(0)
    geometry = Geometry((9, 9, 1), (3, 3), (1, 1), (1, 1))
    images = np.cumsum(rng.integers(0, 20, (150, 81)), axis=1).reshape(150, 81).astype(dtype)
    X, weights = PatchMatrix(images, geometry), np.repeat(rng.integers(1, 3, 150), 81).astype(float)
    found = whiten(X, weights, **settings)
    assert isinstance(found.rows, ProjectedRows) is not kept
    dense = np.asarray(X, dtype=np.float64)
    directions = qr.by_qr(dense, weights, Kept(**settings), 2.0**-52)
    expected = whitening_module._filtered(dense, *directions)
    rows = found.rows[:]
    gram = rows.T @ (weights[:, None] * rows)
    np.testing.assert_allclose(gram, np.diag(np.append(found.filter, 1.0) ** 2), atol=1e-10)
    # the same space: the projectors agree, singular vectors may turn
    both = (rows[:, :-1] / found.filter).T @ (weights[:, None] * expected.rows[:, :-1] / expected.filter)
    np.testing.assert_allclose(np.linalg.svd(both, compute_uv=False), 1.0, rtol=1e-8)
    np.testing.assert_allclose(found.transform(np.asarray(X)[:50]), rows[:50], rtol=1e-7, atol=1e-10)


def test_responses_of_mapped_rows_are_those_of_the_matrix_that_they_stand_for(monkeypatch):
    rng = np.random.default_rng(0)
    X = PatchMatrix(rng.standard_normal((40, 30)) + 5, Geometry((1, 30, 1), (1, 4), (1, 1), (0, 0), 1))
    weights, W = np.repeat(rng.uniform(1, 2, 40), X.geometry.n_locations), rng.standard_normal((4, 3))
    mean, columns = rng.standard_normal(4), rng.standard_normal((len(X), 3))
    expected = PreActivations.compute(np.asarray(X), W, weights, mean=mean)
    kept = PreActivations.compute(X, W, weights, mean=mean)
    monkeypatch.setattr(row_matrix, "_KEPT_ENTRIES", 0)
    mapped = PreActivations.compute(X, W, weights, mean=mean)
    assert isinstance(mapped.rows, ProjectedRows)
    np.testing.assert_array_equal(kept.normalized, expected.normalized)
    assert residual(mapped.normalized - expected.normalized, len(X), np.abs(expected.normalized).max()) < 30
    np.testing.assert_allclose(mapped.norms, expected.norms, rtol=1e-13)
    np.testing.assert_allclose(mapped.offsets, (weights @ np.asarray(X) / weights.sum() - mean) @ W, rtol=1e-12)
    plain = columns[:, :-1].T @ (weights[:, None] * expected.normalized)
    np.testing.assert_allclose(mapped.products(columns, weights), plain, rtol=1e-12, atol=1e-13)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"kernel of .* does not fit"):
        Convolution(9, input_shape=(8, 8, 1))
    with pytest.raises(ValueError, match="pooling must be"):
        Convolution(3, pooling="sum")
    with pytest.raises(ValueError, match="stride must be"):
        Convolution(3, stride=0)
    with pytest.raises(ValueError, match="regions=9 are more"):
        Convolution(3, regions=9, input_shape=(8, 8, 1))
    with pytest.raises(ValueError, match="must have 1 numbers"):
        Convolution((3, 3), input_shape=(8, 1))
    with pytest.raises(ValueError, match="give Convolution an input_shape"):
        Convolution(3).for_inputs(np.zeros((5, 64)))
    with pytest.raises(ValueError, match=r"X must have shape \(n, 8, 8, 1\)"):
        Convolution(3, input_shape=(8, 8, 1)).rows(np.zeros((5, 8, 9, 1)))
    with pytest.raises(ValueError, match="input_shape must have"):
        Convolution(3, input_shape=(8,))
    with pytest.raises(ValueError, match="channels must be"):
        Convolution(3, channels="middle")


def test_channels_may_come_first():
    X = np.random.default_rng(0).standard_normal((4, 3, 6, 5))
    first = Convolution(2, input_shape=(3, 6, 5), channels="first")
    last = Convolution(2, input_shape=(6, 5, 3))
    np.testing.assert_array_equal(first.rows(X), last.rows(np.moveaxis(X, 1, -1)))
    assert first.geometry == last.geometry
    assert Convolution(2, channels="first").for_inputs(X).input_shape == (3, 6, 5)


@pytest.mark.parametrize("grid", [(2, 2), (2, 1), (3, 3)])  # cells, and regions that overlap
def test_the_first_of_equal_maxima_has_the_gradient(grid):
    pooling, rng = MaxPooling(Regions((4, 4), grid)), np.random.default_rng(0)
    hidden, gradient = rng.integers(0, 2, (6 * 16, 3)).astype(float), rng.standard_normal((6, pooling.n_regions, 3))
    expected = np.zeros((6, 16, 3))
    for i, r, j in np.ndindex(gradient.shape):
        inside = np.flatnonzero(pooling.regions.members[r])
        expected[i, inside[hidden.reshape(6, 16, 3)[i, inside, j].argmax()], j] += gradient[i, r, j]
    np.testing.assert_allclose(
        pooling.unpool(gradient.reshape(6, -1), hidden), expected.reshape(hidden.shape), rtol=1e-14
    )


@pytest.mark.parametrize("grid", [(7, 7), (3, 2), (2, 2), (14, 14), (1, 7)])
def test_averages_are_the_matrix_of_the_pooling(grid):
    pooling, rng = AveragePooling(Regions((14, 14), grid)), np.random.default_rng(0)
    hidden, gradient = rng.standard_normal((3 * 196, 5)), rng.standard_normal((3, pooling.n_regions, 5))
    images = hidden.reshape(3, 196, 5)
    assert np.allclose(pooling.pool(hidden), (pooling.regions.averages @ images).reshape(3, -1), rtol=0, atol=1e-14)
    spread = (pooling.regions.averages.T @ gradient).reshape(hidden.shape)
    assert np.allclose(pooling.unpool(gradient.reshape(3, -1), hidden), spread, rtol=0, atol=1e-14)
