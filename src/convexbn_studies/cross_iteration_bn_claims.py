"""What the lines of the study ``cross-iteration-bn`` decide, and their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn_studies.drawing import SIZE, chosen, distinct
from convexbn_studies.images import of_finished_seeds
from convexbn_studies.study import Finding, Picture, Row

_STATISTICS = ("one batch", "naive", "linear", "exact", "recomputed")
_PHASES = ("early", "late")
_NAMES = {
    "one batch": "one batch",
    "naive": "window, not corrected",
    "linear": "window, corrected (the paper)",
    "exact": "window, corrected exactly",
    "recomputed": "window, recomputed",
}


def findings(rows: list[Row]) -> list[Finding]:
    """Errors of mean and variance, the exact second moment, and accuracy."""
    rows = of_finished_seeds(rows, network="perceptron", norm="linear")
    if not rows:
        return []
    return [_mean(rows), _variance(rows), _exact(rows), _one_batch(rows), *_accuracies(rows)]


def _errors(rows: list[Row], key: str, statistic: str) -> dict[tuple[Any, ...], float]:
    """Errors by seed, learning rate, phase and layer."""
    found: list[Any] = chosen(rows, part="statistics", statistic=statistic)
    return {(row["seed"], row["rate"], row["phase"], row["layer"]): row[key] for row in found}


def _ratios(rows: list[Row], key: str, one: str, other: str) -> list[float]:
    """Errors of one statistic over those of another, in each place."""
    first, second = (_errors(rows, key, statistic) for statistic in (one, other))
    return [first[place] / second[place] for place in first]


def _geometric(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def _told(ratios: list[float]) -> str:
    better = sum(ratio < 1 for ratio in ratios)
    return (
        f"{_geometric(ratios):.2f} times as large (geometric mean; {min(ratios):.2f} to {max(ratios):.2f}), and "
        f"smaller in {better} of {len(ratios)} places"
    )


def _mean(rows: list[Row]) -> Finding:
    ratios = _ratios(rows, "mean_error", "linear", "naive")
    return Finding(
        "The correction makes means over a window more exact than those that are not corrected.",
        f"The squared error of the mean is {_told(ratios)} (seed, rate, phase and layer).",
        _geometric(ratios) < 0.95,
    )


def _variance(rows: list[Row]) -> Finding:
    ratios = _ratios(rows, "variance_error", "linear", "naive")
    return Finding(
        "The correction makes variances over a window more exact too.",
        f"The squared error of the logarithm of the variance is {_told(ratios)}.",
        _geometric(ratios) < 0.95,
    )


def _exact(rows: list[Row]) -> Finding:
    ratios = _ratios(rows, "variance_error", "exact", "linear")
    again = _geometric(_ratios(rows, "variance_error", "recomputed", "linear"))
    return Finding(
        "The exact second moment repairs variances that the paper's first order underestimates.",
        f"Against the paper's, the error of the variance is {_told(ratios)}. With all statistics of the window "
        f"computed again by the present weights it would be {again:.2f} times: the rest is the few images.",
        _geometric(ratios) < 0.95,
    )


def _one_batch(rows: list[Row]) -> Finding:
    mean, variance = (_ratios(rows, key, "linear", "one batch") for key in ("mean_error", "variance_error"))
    return Finding(
        "Corrected statistics over a window of 8 are more exact than those of one batch of 4.",
        f"The error of the mean is {_told(mean)}; that of the variance {_told(variance)}.",
        _geometric(mean) < 0.5 and _geometric(variance) < 0.5,
    )


def _accuracies(rows: list[Row]) -> list[Finding]:
    """One finding a network: the paper's gain at small batches."""
    return [_gain(rows, network) for network in distinct(rows, "network")]


def _by_norm(rows: list[Row], network: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in chosen(rows, part="accuracy", network=network):
        found.setdefault(str(row["norm"]), []).append(float(row["test_accuracy"] or 0))
    return found


def _gain(rows: list[Row], network: str) -> Finding:
    found = _by_norm(rows, network)
    told = "; ".join(f"{norm} {', '.join(f'{value:.3f}' for value in values)}" for norm, values in found.items())
    return Finding(
        f"At small batches cross-iteration batch norm is more accurate than batch norm ({network}).",
        f"Test accuracies by seed: {told}.",
        all(windowed > plain for windowed, plain in zip(found["linear"], found["batch norm"], strict=True)),
    )


def pictures(rows: list[Row]) -> list[Picture]:
    """Errors of mean and variance, and accuracies."""
    rows = of_finished_seeds(rows, network="perceptron", norm="linear")
    if not rows:
        return []
    return [_draw_errors(rows), _draw_accuracy(rows)]


def _draw_errors(rows: list[Row]) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], 6.5))
    axes = figure.subplots(2, 1, sharex=True)
    places = list(dict.fromkeys(place[1:] for place in _errors(rows, "mean_error", "naive")))
    for axis, key, name in zip(axes, ("mean_error", "variance_error"), ("mean", "variance"), strict=True):
        for k, statistic in enumerate(_STATISTICS):
            errors = _mean_errors(rows, key, statistic, places)
            axis.plot(errors, "x:" if k == 0 else "o-", color=f"C{k}", ms=7 - k, label=_NAMES[statistic])
        axis.set(yscale="log", ylabel=f"squared error of the {name}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    marks = [f"layer {layer}\n{phase}\n{rate:g}" if layer == 2 else f"{layer}" for rate, phase, layer in places]
    axes[1].set_xticks(_positions(places), marks)
    axes[1].set_xlabel("layer, phase of the training, learning rate")
    return Picture("Means of later layers gain by the correction; the rest is the number of images", figure)


def _positions(places: list[tuple[Any, ...]]) -> list[int]:
    """Where they are on the axis, with a gap before each first layer."""
    gaps = np.cumsum([k > 0 and layer == 1 for k, (_, _, layer) in enumerate(places)])
    return [k + int(gap) for k, gap in enumerate(gaps)]


def _mean_errors(rows: list[Row], key: str, statistic: str, places: list[tuple[Any, ...]]) -> list[float]:
    """Means over the seeds, nan in the gaps."""
    found, drawn = _errors(rows, key, statistic), [float("nan")] * (_positions(places)[-1] + 1)
    for position, place in zip(_positions(places), places, strict=True):
        drawn[position] = float(np.mean([error for at, error in found.items() if at[1:] == place]))
    return drawn


def _draw_accuracy(rows: list[Row]) -> Picture:
    from matplotlib.figure import Figure

    networks = distinct(rows, "network")
    figure = Figure(figsize=(SIZE[0], 2.6 * len(networks)))
    for axis, network in zip(np.atleast_1d(figure.subplots(len(networks), 1)), networks, strict=True):
        found = _by_norm(rows, network)
        for place, values in enumerate(found.values()):
            axis.plot(values, [place] * len(values), "o", color="C0", ms=5)
            axis.plot(np.mean(values), place, "|", color="C1", ms=18, mew=2)
        axis.set_yticks(range(len(found)), list(found))
        axis.invert_yaxis()
        axis.set(title=network, xlabel="test accuracy")
    return Picture("Accuracy at batches of 4 (convolutions) and 2 (perceptron): points are seeds, bars means", figure)
