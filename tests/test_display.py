"""Pictures of paths and spectra: what is drawn is what was computed."""

import matplotlib.pyplot
import numpy as np
import pytest

from convexbn import ConvexBNRegressor, fit_path
from convexbn.estimators.display import PathDisplay, SpectrumDisplay

matplotlib.use("agg")
RNG = np.random.default_rng(2)
X = RNG.standard_normal((60, 5)) * [30, 10, 3, 1, 0.3]
Y = np.tanh(X[:, 0] / 30) + 0.1 * RNG.standard_normal(60)


def regressor(**changes):
    return ConvexBNRegressor(**{"n_gates": 20, "random_state": 0, "weight_decay": 0.1, **changes})


@pytest.fixture(autouse=True)
def _close():
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("scored", [True, False])
def test_a_path_is_drawn_point_by_point(scored):
    path = fit_path(
        regressor(), X, Y, weight_decays=[3, 1, 0.1], ranks=[2, None], validation=(X, Y) if scored else None
    )
    axes = PathDisplay(list(path)).plot().axes_
    assert len(axes) == 2 + scored
    assert [axis.get_ylabel() for axis in axes] == ["validation score"] * scored + ["neurons", "relative gap"]
    assert axes[-1].get_xlabel() == "weight decay" and axes[-1].get_yscale() == axes[-1].get_xscale() == "log"
    for line, rank in zip(axes[-2].lines, (2, None), strict=True):
        points = [point for point in path.points if point.rank == rank]
        drawn = dict(line.get_xydata().tolist())
        assert drawn == {point.weight_decay: point.network.n_neurons for point in points}
    assert [text.get_text() for text in axes[0].get_legend().get_texts()][:2] == ["rank 2", "all directions"]
    gaps = np.concatenate([line.get_ydata() for line in axes[-1].lines[:2]])
    assert sorted(gaps) == sorted(point.certificate.relative_gap for point in path.points)
    if scored:
        assert tuple(axes[0].lines[-1].get_xydata()[0]) == (path.best.weight_decay, path.best.score)
        assert f"best: {path.best.score:.4g}" in axes[0].get_legend().get_texts()[-1].get_text()


def test_an_unfinished_path_can_be_drawn():
    path = fit_path(regressor(), X, Y, weight_decays=[1e9, 1], ranks=[2, None])
    next(path)
    assert len(PathDisplay(path.points).plot().axes_) == 2


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"rank": 2}, {"spectral_filter": None}, {"rank": 3, "spectral_filter": 0.1}], ids=str
)
def test_energies_are_those_of_the_first_layer_on_the_whitened_data(changes, standardize):
    model = regressor(standardize=standardize, **changes).fit(X, Y)
    display = SpectrumDisplay.from_estimator(model, X)
    centred = X - X.mean(axis=0)
    unit = np.linalg.norm(centred, axis=0) if standardize else 1.0
    left, values, _ = np.linalg.svd(centred / unit, full_matrices=False)
    assert np.allclose(display.singular_values, values, rtol=1e-12)
    network = model.network_
    images = left.T @ (centred @ network.weight) / np.sqrt(60) * network.gamma  # unit variance: ||C X w||^2 = n
    energies = np.sum(images**2 * np.sum(network.output**2, axis=1), axis=1)
    assert np.allclose(display.energies, energies / energies.sum(), atol=1e-12)
    assert display.rank == model.rank_ == changes.get("rank", 5)
    tau = changes.get("spectral_filter", 0.3)
    assert display.tau == (None if tau is None else pytest.approx(tau * values[0]))


def test_a_spectrum_is_drawn_with_its_cut_and_filter():
    model = regressor(rank=2, spectral_filter=0.1).fit(X, Y)
    axes = SpectrumDisplay.from_estimator(model, X).plot().axes_
    told = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert told == ["filter: directions below are shrunk", "cut: 2 of 5 directions"]
    assert axes[1].get_xlabel() == "singular direction" and "standardised columns" in axes[0].get_ylabel()
    whole = SpectrumDisplay.from_estimator(regressor(spectral_filter=None, standardize=False).fit(X, Y), X).plot().axes_
    assert (
        "units of the data" in whole[0].get_ylabel()
        and whole[0].get_legend() is None
        and len(whole[1].lines[0].get_xdata()) == 5
    )


def test_weights_of_rows_are_repetition():
    weights = np.arange(60) % 3
    model = regressor(rank=3).fit(X, Y, weights)
    weighted = SpectrumDisplay.from_estimator(model, X, weights)
    repeated = SpectrumDisplay.from_estimator(model, X.repeat(weights, axis=0))
    assert np.allclose(weighted.energies, repeated.energies, atol=1e-12)
    assert np.allclose(weighted.singular_values, repeated.singular_values, rtol=1e-12)


def test_a_network_without_neurons_has_no_energy():
    model = regressor(weight_decay=1e9).fit(X, Y)
    display = SpectrumDisplay.from_estimator(model, X)
    assert not display.energies.any() and display.plot().figure_ is not None


def test_no_points_are_refused():
    with pytest.raises(ValueError, match="no points"):
        PathDisplay([]).plot()
