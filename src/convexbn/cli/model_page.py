"""One HTML page on a fitted model: data, spectrum and cut, program, certificate in words, network, predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import convexbn
from convexbn._types import Float
from convexbn.certificate.certificate import Certificate
from convexbn.cli.output import described, measure_of
from convexbn.data.convolution import Convolution
from convexbn.data.moments import moments
from convexbn.data.patches import PatchMatrix
from convexbn.estimators.display import CertificateDisplay, PathDisplay, SpectrumDisplay
from convexbn.files.html import Html, facts, page, paragraph, picture, shown, styled, table

#: Most classes of a confusion table, points of a scatter plot, neurons in the table, and characters of a name.
_CLASSES, _POINTS, _NEURONS, _NAME = 20, 1500, 12, 60

#: Rows up to which the energies by singular direction are computed.
_SPECTRUM_ROWS = 20_000


@dataclass(frozen=True, eq=False)
class Subject:
    """Subject of a report.

    Attributes
    ----------
    name, data, target, feature_names : str or sequence of str
        Names of the model, the rows, the predicted column and the features.
    model : ConvexBNClassifier or ConvexBNRegressor
        Fitted.
    certificate : Certificate
        Recomputed on the rows; ``model.certificate_`` is what was claimed.
    X, y, X_test, y_test : ndarray
        Training rows, and rows that were held out.
    own_rows : bool
        Whether the model was trained on these rows.
    """

    name: str
    model: Any
    certificate: Certificate
    data: str
    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    feature_names: Sequence[str] | None = None
    target: str | None = None
    own_rows: bool = True

    @property
    def classifies(self) -> bool:
        """Whether targets are classes."""
        return hasattr(self.model, "classes_")

    @property
    def task(self) -> str:
        """Name of the task."""
        return "classification" if self.classifies else "regression"

    @property
    def layer(self) -> Convolution | None:
        """The convolution of the network."""
        return getattr(self.model.network_, "convolution", None)

    def feature(self, index: int) -> str:
        """Name of an input of the first layer: a feature, of bounded length, or a place of a patch."""
        if self.layer is not None:
            geometry = self.layer.geometry
            channel, down, across = np.unravel_index(index, (geometry.image[2], *geometry.kernel))
            place = f"place {across}" if self.layer.dimensions == 1 else f"row {down}, column {across}"
            return f"{place} of channel {channel}"
        return f"feature {index}" if self.feature_names is None else _short(self.feature_names[index])

    def deviations(self) -> Float:
        """Standard deviation of every feature, or of every place of the patches."""
        if self.layer is None:
            return np.asarray(self.X.std(axis=0, dtype=np.float64))
        patches: Any = PatchMatrix(self.X, self.layer.geometry)
        gram = moments(patches, np.ones(len(patches))).gram
        return np.sqrt(gram.diagonal() / len(patches))


def report(subject: Subject, points: Sequence[Any] = ()) -> bytes:
    """HTML of a model on its data, and of the points of the path that it was chosen from, in UTF-8.

    Names are escaped and cut, tables and pictures bounded: a page takes at most some hundred kilobytes.
    """
    title = f"{_short(subject.name)}: a certified network on {_short(subject.data)}"
    footer = [facts({"convexbn": convexbn.__version__, "fingerprint of the rows": subject.model.fingerprint_})]
    return page(title, _parts(subject, points), footer)


def _parts(subject: Subject, points: Sequence[Any]) -> Iterator[Html]:
    yield from _proof(subject)
    parts = {"Predictions": _predictions, "Data": _data, "Program": _program, "Network": _network}
    for heading, part in parts.items():
        yield Html(f"<h2>{heading}</h2>")
        yield from part(subject)
    if points:
        count = 2 + any(point.score is not None for point in points)
        yield Html("<h2>Path</h2>")
        yield _draw("Score, neurons and gap over the path", PathDisplay(points), height=2.2 * count, rows=count)


def _proof(subject: Subject) -> Iterator[Html]:
    proof = subject.certificate
    css = "claim holds" if proof.status.value in ("CERTIFIED", "TRIVIAL") else "claim"
    yield Html(
        f'<section class="{css}"><span class="word">{proof.status.value}</span>{paragraph(proof.sentence)}</section>'
    )
    rows = "the rows that it was trained on" if subject.own_rows else "other rows than it was trained on"
    yield paragraph(f"Recomputed from {len(subject.X)} rows, {rows}.", "quiet")
    told = {
        "objective": f"{proof.objective:.9g}", "lower bound": f"{proof.lower_bound:.9g}",
        "relative gap": f"{proof.relative_gap:.2g}", "among": proof.scope, "bound": proof.bound,
    }  # fmt: skip
    if proof.estimated_gap is not None:
        told["estimated gap (no bound)"] = f"{proof.estimated_gap:.2g}"
    yield facts(told)
    if len(subject.model.history_) > 1:
        display = CertificateDisplay.from_estimator(subject.model)
        bound = "estimated bound" if display.estimated else "lower bound"
        yield _draw(f"Objective and {bound} over iterations", display, height=5.6)


def _data(subject: Subject) -> Iterator[Html]:
    target, n_classes = subject.target, len(subject.model.classes_) if subject.classifies else None
    task = described(subject.task, None if target is None else _short(target), n_classes)
    told = {"name": _short(subject.data), "task": task, "training rows": len(subject.X), "features": subject.X.shape[1]}
    if (columns := getattr(subject.model, "columns_", None)) is not None:
        told |= columns.summary
    if subject.X_test is not None:
        told["rows held out"] = len(subject.X_test)
    if not subject.classifies:
        told["target values"] = f"mean {np.mean(subject.y):.4g}, deviation {np.std(subject.y):.4g}"
    yield facts(told)
    if len(subject.X) <= _SPECTRUM_ROWS:
        display = SpectrumDisplay.from_estimator(subject.model, subject.X)
        yield _draw("Singular values of the data, and what the first layer uses of them", display, height=5.2)


def _program(subject: Subject) -> Iterator[Html]:
    model = subject.model
    cut = model.rank_ if model.rank is None else f"{model.rank_} (asked for: {model.rank})"
    tau = "none" if model._tau is None else f"{model._tau:g} of the largest"
    told = {
        "activation": model.activation, "loss": model.loss_, "weight decay": f"{model.weight_decay_:.6g}",
        "directions kept": cut, "spectral filter": tau, "tolerance": f"{model.tol:g}",
    }  # fmt: skip
    if (layer := subject.layer) is not None:
        told["convolution"] = f"filters of {' x '.join(map(str, layer.geometry.kernel[-layer.dimensions :]))}"
        told["locations"] = layer.geometry.n_locations
        told["pooling"] = f"{layer.pooling} of {layer.pool.n_regions} regions"
    if model.gates_ is not None:
        told["gates"] = model.gates_.shape[1]
    yield facts(told)


def _network(subject: Subject) -> Iterator[Html]:
    network = subject.model.network_
    masses = np.hypot(network.gamma, network.shift) * np.linalg.norm(network.output, axis=1)
    order = np.argsort(-masses)
    told = {"neurons": network.n_neurons, "outputs": network.output.shape[1]}
    if network.gate_index is not None:
        told["gates that are used"] = len(set(network.gate_index.tolist()))
    yield facts(told)
    if network.n_neurons:
        axes = _axes(height=3.2)
        axes.plot(np.arange(1, len(masses) + 1), np.maximum(masses[order], 1e-300), ".-", lw=0.8)
        axes.set(xlabel="neuron, by norm", ylabel="norm of first layer times output", yscale="log")
        yield picture("How the network is spread over its neurons", axes.figure)
        influence = network.influences(subject.deviations())
        yield table([_neuron(subject, j, masses[j], influence[:, j]) for j in order[:_NEURONS]])


def _neuron(subject: Subject, j: int, mass: float, influence: Float) -> dict[str, Any]:
    """Line on a neuron; features by the deviation that they contribute."""
    network, total = subject.model.network_, influence.sum() or 1.0
    heaviest = (f"{subject.feature(i)} ({influence[i] / total:.0%})" for i in np.argsort(-influence)[:3])
    return {
        "neuron": int(j), "norm": float(mass), "scale": float(network.gamma[j]), "shift": float(network.shift[j]),
        "heaviest features": ", ".join(heaviest),
    }  # fmt: skip


def _predictions(subject: Subject) -> Iterator[Html]:
    held_out = subject.X_test is not None and subject.y_test is not None
    X, y = (subject.X_test, subject.y_test) if held_out else (subject.X, subject.y)
    assert X is not None
    assert y is not None
    word = "held out" if held_out else "of the training"
    measure = measure_of(subject.task)
    scores = {f"{measure} on the training rows": f"{subject.model.score(subject.X, subject.y):.4f}"}
    if held_out:
        scores[f"{measure} on the rows held out"] = f"{subject.model.score(X, y):.4f}"
    yield facts(scores)
    predicted = subject.model.predict(X)
    if subject.classifies:
        yield from _confusion(subject.model.classes_, np.asarray(y), predicted, word)
    elif np.ndim(y) == 1:
        yield _scatter(np.asarray(y, dtype=np.float64), predicted, subject.target, word)


def _confusion(classes: np.ndarray, y: np.ndarray, predicted: np.ndarray, word: str) -> Iterator[Html]:
    """Rows of each class by prediction; for many classes the recall, lowest first."""
    if len(classes) > _CLASSES:
        hits = [(c, predicted[y == c] == c) for c in classes]
        recall = [{"class": _short(c), "rows": len(h), "recall": float(h.mean()) if len(h) else None} for c, h in hits]
        yield paragraph(f"The classes of lowest recall, rows {word}:", "quiet")
        yield table(sorted(recall, key=lambda line: (line["recall"] is None, line["recall"]))[:_CLASSES])
        return
    yield paragraph(f"Rows {word}: true classes down, predictions across.", "quiet")
    names = [f"{_short(c)}{' ' * i if _short(c) in map(_short, classes[:i]) else ''}" for i, c in enumerate(classes)]
    yield table(
        [
            {"true": name} | {n: int(np.sum((y == c) & (predicted == p))) for n, p in zip(names, classes, strict=True)}
            for name, c in zip(names, classes, strict=True)
        ]
    )


def _scatter(y: Float, predicted: Float, target: str | None, word: str) -> Html:
    kept = np.random.default_rng(0).permutation(len(y))[:_POINTS]
    y, predicted, axes = y[kept], predicted[kept], _axes(height=4.2)
    axes.plot(y, predicted, "o", ms=3, alpha=0.5, mew=0)
    ends = [min(y.min(), predicted.min()), max(y.max(), predicted.max())]
    axes.plot(ends, ends, color="0.5", lw=1)
    axes.set(xlabel="target (its own units)", ylabel="prediction (the same units)")
    named = "the target" if target is None else _short(target)
    return picture(f"Predictions of {named} over its values, rows {word}", axes.figure)


def _axes(height: float, rows: int = 1) -> Any:
    """Axes of a new figure, one above the other."""
    from matplotlib.figure import Figure

    with styled():
        return Figure(figsize=(5.6, height)).subplots(rows, sharex=rows > 1)


def _draw(title: str, display: Any, height: float, rows: int = 2) -> Html:
    axes = _axes(height, rows)
    with styled():
        return picture(title, display.plot(axes).figure_)


def _short(value: object) -> str:
    words = str(shown(value.item() if isinstance(value, np.generic) else value))
    return words if len(words) <= _NAME else f"{words[: _NAME - 1]}…"
