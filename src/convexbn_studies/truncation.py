"""Truncation: the convex optimum overfits in directions that gradient descent hardly moves; leaving them out helps.

Every method has the same number of tries, chosen among by their accuracy on 2,000 validation rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from convexbn._types import Float, FloatMatrix
from convexbn_studies import drawing
from convexbn_studies.data import leading, split
from convexbn_studies.drawing import BLUE, GREEN, ORANGE, PINK, YELLOW, chosen, column, distinct
from convexbn_studies.minibatch import MiniBatch, Rows
from convexbn_studies.study import PAPER, Cell, Finding, Picture, Row, Study

#: Methods: name on the page, colour, marker.
_METHODS = {
    "sgd": ("SGD on X", BLUE, "o"),
    "sgd-whitened": ("SGD on whitened X", ORANGE, "s"),
    "convex": ("convex, all directions", PINK, "v"),
    "truncated": ("convex, truncated", GREEN, "^"),
    "filtered": ("convex, filtered", YELLOW, "D"),
}

#: Rows up to which the convex program is the gated one, with a certified gap; beyond, ReLU descent on whitened rows.
_GATED_ROWS = 2000

#: Seconds for a truncated ReLU network and its bound: 10,000 rows in 100 directions are few enough for pricing, which
#: has half of them.
_TRUNCATED_SECONDS = 60

#: Passes of SGD over the data: few and many.
_EPOCHS = {200: (20, 40), 600: (40, 80), 2000: (15, 30), 10_000: (6, 12)}
_EPOCHS_OF_ALL = (8, 16)

_VALIDATION = 2000


class _Try(NamedTuple):
    """Accuracies of one setting, in words, and energies by singular direction."""

    setting: str
    validation: float
    test: float
    energies: Float | None


def cells(quick: bool) -> list[Cell]:
    """Each method on each number of rows, the small ones first; 0 stands for all but the validation rows."""
    data, sizes = (("digits",), (200,)) if quick else (("fashion-mnist", "cifar-10"), (600, 2000, 10_000, 0))
    return [
        {"data": name, "n": n, "method": method, "seed": seed}
        for n in sizes
        for name in data
        for seed in ((0, 1) if n == 600 else (0,))
        for method in _METHODS
    ]


def run(cell: Cell) -> list[Row]:
    """All tries of one method, the chosen one marked, and its energies."""
    given: Any = cell
    training, validation, test = _rows(given)
    trained = _sgd if given["method"].startswith("sgd") else _convex
    tries = list(trained(given, training, validation, test))
    best = max(tries, key=lambda found: found.validation)
    shared: Row = {"data": given["data"], "n": len(training[0]), "method": given["method"], "seed": given["seed"]}
    told: list[Row] = [
        shared | {"setting": found.setting, "validation": found.validation, "test": found.test, "chosen": found is best}
        for found in tries
    ]
    return told + [shared | row for row in _profile(best.energies)]


def findings(rows: list[Row]) -> list[Finding]:
    """Whitening costs SGD its accuracy; truncation gives it back to the convex program; where the energy is."""
    tests = {key: _test(rows, *key) for key in _keys(rows)}
    return [*_geometry(tests), *_truncation(tests), *_against_sgd(tests), *_energy(rows)]


def pictures(rows: list[Row]) -> list[Picture]:
    """Accuracy over the number of rows for each data set, and the energy profile of the smallest."""
    return [_accuracies(name, rows) for name in distinct(rows, "data")] + _profiles(rows)


def _rows(given: Any) -> tuple[tuple[FloatMatrix, np.ndarray], ...]:
    """Training, validation and test rows as they are stored."""
    held_out = 500 if given["data"] == "digits" else _VALIDATION
    return tuple(split(given["data"], given["n"], held_out, given["seed"]))


def _sgd(given: Any, *rows: tuple[FloatMatrix, np.ndarray]) -> Iterator[_Try]:
    """Learning rates, decays and epochs, on coordinates in singular directions: a rotation, which SGD does not see."""
    from convexbn.data.whitening import whiten

    X = rows[0][0]
    whitening = whiten(X, np.ones(len(X)), rank=X.shape[1])
    values = whitening.singular_values[: whitening.rank] / whitening.singular_values[0]
    metric = values if given["method"] == "sgd" else np.ones_like(values)
    scale = np.sqrt(len(X)) * metric / np.linalg.norm(metric)
    parts = [_coordinates(whitening, part, labels, scale) for part, labels in rows]
    epochs = _EPOCHS.get(given["n"], _EPOCHS_OF_ALL)
    for rate, (decay, passes) in _tries(given, (0.03, 0.1, 0.01, 0.05), ((1e-3, epochs[1]), (0.0, epochs[0]))):
        training = MiniBatch(200, rate, passes, weight_decay=decay, seed=given["seed"])
        outcome = training.train(*parts, metric=metric)
        setting = f"rate {rate:g}, decay {decay:g}, {passes} epochs"
        yield _Try(setting, outcome.validation, outcome.test, outcome.energies)


def _coordinates(whitening: Any, X: FloatMatrix, labels: np.ndarray, scale: Float) -> Rows:
    coordinates = np.empty((len(X), len(scale)), dtype=np.float32)
    for start in range(0, len(X), 4096):
        part = slice(start, start + 4096)
        coordinates[part] = whitening.transform(X[part])[:, :-1] * scale
    return coordinates, labels


def _tries(given: Any, first: tuple[Any, ...], second: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Eight settings; four where there are 10,000 rows, two where there are more."""
    settings = list(product(first, second))
    return settings[: {10_000: 4, 0: 2}.get(given["n"], 8)]


def _convex(given: Any, *rows: tuple[FloatMatrix, np.ndarray]) -> Iterator[_Try]:
    """Weight decays, and ranks or filters, of one certified program or of ReLU descent."""
    from convexbn import ConvexBNClassifier
    from convexbn.estimators.path import RegularisationPath
    from convexbn.estimators.path_data import PathData

    (X, y), validation, test = rows
    gated = len(X) <= _GATED_ROWS
    decays = (0.03, 0.1, 0.01, 0.003, 0.3, 0.001, 3e-4, 1e-4) if gated else (0.003, 0.01, 0.03, 0.001)
    settings = {
        "convex": _tries(given, decays, (None,)),
        "truncated": _tries(given, (50, 100, 25, 200) if gated else (200, 100), decays[:2]),
        "filtered": _tries(given, (0.1, 0.3, 0.03, 1.0) if gated else (0.05, 0.1), decays[:2]),
    }
    shared: dict[str, Any] = PAPER | {"loss": "squared", "random_state": given["seed"], "tol": 1e-3}
    shared |= {"gates": "data", "n_gates": 60} if gated else {"activation": "relu", "width": 300}
    if not gated and given["method"] == "truncated":
        shared["time_limit"] = _TRUNCATED_SECONDS
    whitened: dict[Any, PathData] = {}
    for one, other in settings[given["method"]]:
        decay = np.sqrt(len(X)) * (one if given["method"] == "convex" else other)
        rank = one if given["method"] == "truncated" else None
        tau = one if given["method"] == "filtered" else None
        model = ConvexBNClassifier(**shared | {"spectral_filter": tau})
        if (rank, tau) not in whitened:
            whitened = {(rank, tau): PathData.prepare(model, [rank], X, y, None)}
        score = functools.partial(_score, validation)
        (point,) = RegularisationPath(model, whitened[rank, tau], [float(decay)], [rank], score=score)
        yield _Try(
            _told(decay, rank, tau, point), float(point.score or 0), point.model.score(*test), _energies(point, X)
        )


def _score(rows: tuple[FloatMatrix, np.ndarray], model: Any) -> float:
    return float(model.score(*rows))


def _told(decay: float, rank: Any, tau: float | None, point: Any) -> str:
    cut = f", filter {tau:g}" if tau else f", {rank} directions" if rank else ""
    return f"weight decay {decay:.2g}{cut}; {point.certificate.status.value}"


def _energies(point: Any, X: FloatMatrix) -> Float | None:
    """Energies by singular direction, of a size where the spectrum is cheap."""
    from convexbn.estimators.display import SpectrumDisplay

    return SpectrumDisplay.from_estimator(point.model, X).energies if len(X) <= _GATED_ROWS else None


def _profile(energies: Float | None) -> list[Row]:
    """Share of the energy in groups of directions, and in the first ones."""
    if energies is None or not energies.sum() > 0:
        return []
    shares = energies / energies.sum()
    edges = np.unique(np.concatenate([np.geomspace(1, len(shares), 16).astype(int) - 1, [len(shares)]]))
    top, share = leading(energies)
    told: list[Row] = [{"top": top, "top_share": share}]
    for low, high in pairwise(edges):
        told.append({"direction": float(np.sqrt((low + 1) * high)), "energy": float(shares[low:high].mean())})
    return told


def _keys(rows: list[Row]) -> list[tuple[Any, Any]]:
    return list(dict.fromkeys((row["data"], row["n"]) for row in rows))


def _test(rows: list[Row], data: Any, n: Any) -> dict[str, float]:
    """Mean test accuracy of the chosen tries of each method, in per cent."""
    best = chosen(rows, data=data, n=n, chosen=True)
    return {
        method: 100 * float(column(chosen(best, method=method), "test").mean())
        for method in _METHODS
        if chosen(best, method=method)
    }


def _differences(tests: dict[tuple[Any, Any], dict[str, float]], one: str, other: str) -> dict[str, float]:
    """Points by which one method is better than another, by data set and rows."""
    return {
        f"{data}, {n} rows": test[one] - test[other]
        for (data, n), test in tests.items()
        if one in test and other in test
    }


def _listed(differences: dict[str, float]) -> str:
    return "; ".join(f"{place}: {points:+.1f}" for place, points in differences.items())


def _geometry(tests: dict[tuple[Any, Any], dict[str, float]]) -> Iterator[Finding]:
    points = _differences(tests, "sgd", "sgd-whitened")
    if points:
        yield Finding(
            "The same network class trained by SGD on whitened data generalises worse: the bias is in the geometry.",
            f"Points of test accuracy that SGD on X is better by: {_listed(points)}.",
            all(value > 0 for value in points.values()),
        )


def _truncation(tests: dict[tuple[Any, Any], dict[str, float]]) -> Iterator[Finding]:
    for method, word in (("truncated", "Truncation"), ("filtered", "A smooth filter")):
        points = _differences(tests, method, "convex")
        if points:
            yield Finding(
                f"{word} improves the convex program's test accuracy.",
                f"Points over all directions: {_listed(points)}.",
                all(value > 0 for value in points.values()),
            )


def _against_sgd(tests: dict[tuple[Any, Any], dict[str, float]]) -> Iterator[Finding]:
    points = _differences(tests, "truncated", "sgd")
    if points:
        yield Finding(
            "The truncated convex program generalises at least as well as SGD on X.",
            f"Points over SGD, both tuned with equally many tries: {_listed(points)}.",
            all(value >= 0 for value in points.values()),
        )


def _energy(rows: list[Row]) -> Iterator[Finding]:
    shares = [row for row in rows if row.get("top_share") is not None]
    for data in distinct(shares, "data"):
        n = min(distinct(chosen(shares, data=data), "n"))
        found = {
            method: float(column(lines, "top_share").mean())
            for method in _METHODS
            if (lines := chosen(shares, data=data, n=n, method=method))
        }
        if {"sgd", "convex"} <= set(found):
            told = ", ".join(f"{_METHODS[method][0]} {share:.2f}" for method, share in found.items())
            yield Finding(
                f"SGD keeps the first layer in the leading directions, the convex optimum does not ({data}, {n} rows).",
                f"Share of its energy in the {shares[0]['top']} leading singular directions: {told}.",
                found["sgd"] > found["convex"],
            )


def _accuracies(name: str, rows: list[Row]) -> Picture:
    picture, axes = drawing.chart(
        f"Test accuracy over the number of training rows ({name})",
        "training rows", "test accuracy (%)", xscale="log",
    )  # fmt: skip
    sizes = sorted(distinct(chosen(rows, data=name), "n"))
    for method, (label, colour, marker) in _METHODS.items():
        points = [(n, test[method]) for n in sizes if method in (test := _test(rows, name, n))]
        if points:
            axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, ms=5, label=label)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_xlim(0.7 * sizes[0], 1.4 * sizes[-1])
    drawing.legend(axes)
    return picture


def _profiles(rows: list[Row]) -> list[Picture]:
    profile = [row for row in rows if row.get("direction") is not None]
    if not profile:
        return []
    data, n = profile[0]["data"], min(distinct(chosen(profile, data=profile[0]["data"]), "n"))
    picture, axes = drawing.chart(
        f"The first layer's energy: SGD in the leading directions, the convex optimum in all ({data}, {n} rows)",
        "singular direction of the data", "share of the energy, a direction", xscale="log", yscale="log",
    )  # fmt: skip
    for method, (label, colour, marker) in _METHODS.items():
        if lines := chosen(profile, data=data, n=n, method=method, seed=0):
            energy = np.maximum(column(lines, "energy"), 1e-8)
            axes.plot(column(lines, "direction"), energy, f"{marker}-", color=colour, ms=4, label=label)
    drawing.legend(axes)
    return [picture]


STUDY = Study(
    name="truncation",
    title="Leaving small singular directions out makes the convex program generalise",
    source="Ergen et al., Demystifying Batch Normalization in ReLU Networks, ICLR 2022, arXiv 2103.01499",
    departures=(
        "The paper truncates to a fixed number of directions and compares with SGD on CIFAR and SVHN. Here the rank, "
        "the filter and the weight decay are chosen on 2,000 validation images, and so are SGD's learning rate, decay"
        " and epochs, with the same number of tries for all methods: eight up to 2,000 rows, four on 10,000, two on "
        "all. Up to 2,000 rows the convex program has 60 gates and is certified to 1e-3; beyond, it is the ReLU "
        "network of width 300 that 20 passes of descent over the whitened rows train (for 10,000 rows in 100 "
        "directions pricing, for 30 seconds), which is not certified. SGD: one hidden layer of 200 neurons, batches of "
        "100, momentum 0.9, squared loss on one-hot targets. Raw pixels, no augmentation; means of two draws on 600 "
        "rows, one draw beyond."
    ),
    needs=("torch",),
    minutes=(0.3, 90),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist", "cifar-10"),
)
