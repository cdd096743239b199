"""Neural collapse: the figures of mathematics 4, the definitions written out, and a training that gets there."""

import matplotlib
import numpy as np
import pytest
import torch

from convexbn.estimators.display import CollapseDisplay
from convexbn.training.neural_collapse import CollapseMetrics, collapse_metrics, optimal_collapse
from instances import labels

matplotlib.use("Agg")

BALANCED, UNBALANCED = (8, 8, 8, 8), (14, 9, 6, 3)
K = 4

#: NC1, NC2 (norms, angles), NC3 (centred, uncentred), NC4 at a weight decay of .5; None: not tabulated.
FIGURES = {
    ("squared", BALANCED): (0, 0, 0, 0.5176, 0, 0),
    ("cross_entropy", BALANCED): (0, 0, 0, 0, 0.5176, 0),
    ("squared", UNBALANCED): (0, 0.0705, 0.0915, 0.577, None, 0),
    ("cross_entropy", UNBALANCED): (0, 0.0510, 0.0643, 0.272, None, 0),
}


def fields(metrics):
    return [getattr(metrics, name) for name in CollapseMetrics.__dataclass_fields__]


def check_figures(metrics, loss, counts, precision=1e-12):
    for found, figure in zip(fields(metrics), FIGURES[loss, counts], strict=True):
        if figure is not None:
            assert found == pytest.approx(figure, abs=precision if figure == 0 else 6e-4 if figure > 0.2 else 6e-5)


def plain(features, y, classifier, bias=0.0):
    """The same measures, one class and one sample at a time."""
    classes = range(classifier.shape[1])
    means = [features[y == k].mean(axis=0) for k in classes]
    centred = [m - sum(means) / len(means) for m in means]
    within = sum(np.cov(features[y == k].T, bias=True) for k in classes) / len(means)
    between = sum(np.outer(m, m) for m in centred) / len(means)
    norms = [np.linalg.norm(m) for m in centred]
    cosines = [centred[i] @ centred[j] / norms[i] / norms[j] for i in classes for j in classes if i != j]
    unit = classifier.T / np.linalg.norm(classifier)
    nearest = [np.argmin([np.linalg.norm(row - m) for m in means]) for row in features]
    return (
        np.trace(within @ np.linalg.pinv(between, rcond=1e-12)) / len(means),
        np.std(norms) / np.mean(norms),
        max(abs(c + 1 / (len(means) - 1)) for c in cosines),
        np.linalg.norm(unit - np.array(centred) / np.linalg.norm(centred)),
        np.linalg.norm(unit - np.array(means) / np.linalg.norm(means)),
        np.mean([np.argmax(row @ classifier + bias) != k for row, k in zip(features, nearest, strict=True)]),
    )


@pytest.mark.parametrize("p", [3, 7, 40])
@pytest.mark.parametrize("bias", [None, np.array([3.0, 0, 0, -1])])
def test_the_definitions_written_out(p, bias):
    rng = np.random.default_rng(p)
    y = labels(UNBALANCED)
    features = rng.standard_normal((K, p))[y] + 0.5 * rng.standard_normal((len(y), p))
    classifier = rng.standard_normal((p, K))
    found = collapse_metrics(features, y, classifier, bias)
    assert fields(found) == pytest.approx(plain(features, y, classifier, 0.0 if bias is None else bias), rel=1e-9)
    shuffled = rng.permutation(len(y))
    assert fields(collapse_metrics(features[shuffled], y[shuffled], classifier, bias)) == pytest.approx(fields(found))


@pytest.mark.parametrize(("loss", "counts"), FIGURES)
def test_figures_of_the_optimum(loss, counts):
    check_figures(optimal_collapse(counts, 0.5, loss=loss), loss, counts)


def test_a_simplex_is_collapsed():
    simplex = np.eye(K) - 1 / K
    found = collapse_metrics(simplex[labels(UNBALANCED)], labels(UNBALANCED), 3 * simplex)
    assert fields(found) == pytest.approx([0] * 6, abs=1e-12)
    turned = collapse_metrics(simplex[labels(BALANCED)], labels(BALANCED), -simplex)
    assert (turned.duality_centred, turned.disagreement) == (pytest.approx(2), 1)


def test_a_dead_class_disagrees_and_features_of_nothing_have_no_geometry():
    rare_dead = optimal_collapse(UNBALANCED, 2.0, loss="squared")  # sqrt(3) < 2
    assert rare_dead.disagreement == pytest.approx(3 / 32)
    assert rare_dead.within_class == pytest.approx(0, abs=1e-12)
    nothing = optimal_collapse(UNBALANCED, 5.0, loss="squared")
    assert np.isnan(fields(nothing)[:5]).all()


@pytest.mark.parametrize(
    ("y", "classifier", "words"),
    [
        ([0, 1, 1], np.ones((3, 2)), "shape"),
        ([0, 1, 1], np.ones((2, 1)), "columns -w and w"),
        ([0.0, 1.0, 1.0], np.ones((2, 2)), "integers"),
        ([0, 1], np.ones((2, 2)), "3 integers"),
        ([0, 0, 0], np.ones((2, 2)), "each at least once"),
        ([0, 1, 2], np.ones((2, 2)), "labels must be 0 to 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(y, classifier, words):
    with pytest.raises(ValueError, match=words):
        collapse_metrics(np.eye(3)[:, :2], np.array(y), classifier)


def test_training_collapses_to_the_optimum():
    """All layers trained by Adam: the same values to two digits, seen on the way by the display (mathematics, 4)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, beta, y = 32, 0.5, torch.tensor(labels(UNBALANCED))
    X, Y = torch.randn(n, 10, dtype=torch.float64), torch.eye(K, dtype=torch.float64)[y]
    layers = [torch.nn.Linear(10, 40), torch.nn.BatchNorm1d(40), torch.nn.ReLU()]
    layers += [torch.nn.Linear(40, 20), norm := torch.nn.BatchNorm1d(20), torch.nn.ReLU()]
    body, last = torch.nn.Sequential(*layers).double(), torch.nn.Linear(20, K, bias=False).double()
    optimizer = torch.optim.Adam([*body.parameters(), *last.parameters()], lr=0.02)
    history, epochs = [], []
    for step in range(801):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 801)
        features = body(X)
        if step % 50 == 0:
            history.append(collapse_metrics(features.detach().numpy(), y.numpy(), last.weight.detach().numpy().T))
            epochs.append(step)
        optimizer.zero_grad()
        squares = n * (norm.weight.square().sum() + norm.bias.square().sum()) + last.weight.square().sum()
        (0.5 * (last(features) - Y).square().sum() + beta / 2 * squares).backward()
        optimizer.step()
    optimum = optimal_collapse(UNBALANCED, beta, loss="squared")
    assert fields(history[-1]) == pytest.approx(fields(optimum), abs=0.02)
    assert history[0].within_class > 0.1
    display = CollapseDisplay(history, epochs, optimum).plot()
    assert [axis.get_title()[:3] for axis in display.axes_] == ["NC1", "NC2", "NC3", "NC4"]
    dashed, drawn = display.axes_[2].get_lines()[:2]
    assert list(drawn.get_xdata()) == epochs and drawn.get_ydata()[-1] == history[-1].duality_centred
    assert dashed.get_ydata()[0] == optimum.duality_centred
    names = [text.get_text() for axis in display.axes_ for text in axis.get_legend().get_texts()]
    assert "centred means (dashed: optimum 0.577)" in names and names.count("features (optimum 0)") == 2
    assert CollapseDisplay(history).epochs == list(range(1, len(history) + 1))


def test_losses_of_other_targets_are_refused():
    with pytest.raises(ValueError, match="one-hot"):
        optimal_collapse([8] * 4, 0.5, loss="squared_hinge")
