"""What the lines of the study ``understanding-bn`` decide, and their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn_studies.drawing import SIZE, chart, chosen, distinct, legend
from convexbn_studies.images import of_finished_seeds
from convexbn_studies.study import Finding, Picture, Row

#: Accuracy on ten classes that counts as learnt: twice that of chance.
_LEARNT = 0.2

_WORDS = {False: "without batch norm", True: "with batch norm"}


def findings(rows: list[Row]) -> list[Finding]:
    """The claims of the paper on these lines."""
    rows = of_finished_seeds(rows, part="spectrum", factors=5)
    if not rows:
        return []
    return [
        _usable(rows), _best(rows), _growth(rows), _landscape(rows), _tails(rows), _signs(rows), _same_class(rows),
        _noise_bound(rows), _edges(rows), _small_rates(rows),
    ]  # fmt: skip


def _of(rows: list[Row], part: str, key: str, **settings: Any) -> list[Any]:
    """Values of a column in lines of a part."""
    return [row[key] for row in chosen(rows, part=part, **settings) if row.get(key) is not None]


def _seeds(rows: list[Row]) -> list[Any]:
    return distinct(rows, "seed")


def _usable_rate(rows: list[Row], batch_norm: bool, seed: int) -> float:
    runs: list[Any] = chosen(rows, part="rate", batch_norm=batch_norm, seed=seed)
    return float(max((row["rate"] for row in runs if (row["test_accuracy"] or 0) >= _LEARNT), default=0.0))


def _usable(rows: list[Row]) -> Finding:
    pairs = [[_usable_rate(rows, batch_norm, seed) for batch_norm in (False, True)] for seed in _seeds(rows)]
    told = ", ".join(f"{plain:g} and {normalised:g}" for plain, normalised in pairs)
    return Finding(
        "Batch norm makes learning rates usable that are at least 30 times larger.",
        f"The largest rate of the grid with finite losses and an accuracy of at least {_LEARNT} is, without and with "
        f"batch norm, {told} (by seed).",
        all(normalised >= 30 * plain > 0 for plain, normalised in pairs),
    )


def _best(rows: list[Row]) -> Finding:
    best = [
        [max(_of(rows, "rate", "test_accuracy", seed=seed, batch_norm=batch_norm)) for batch_norm in (False, True)]
        for seed in _seeds(rows)
    ]
    told = ", ".join(f"{plain:.3f} and {normalised:.3f}" for plain, normalised in best)
    return Finding(
        "At the best rate of each, the network with batch norm is more accurate.",
        f"Test accuracies without and with batch norm: {told} (by seed).",
        all(normalised > plain for plain, normalised in best),
    )


def _growth(rows: list[Row]) -> Finding:
    factors: dict[bool, list[float]] = {False: [], True: []}
    for batch_norm, found in factors.items():
        for seed in _seeds(rows):
            std = _of(rows, "depth", "channel_std", seed=seed, batch_norm=batch_norm)
            found.append((std[-1] / std[0]) ** (1 / (len(std) - 1)))
    return Finding(
        "Channel moments of residual networks grow exponentially with depth at initialisation, unless normalised.",
        f"From one branch to the next the standard deviation of channels is multiplied by {_range(factors[False], 3)} "
        f"without and by {_range(factors[True], 3)} with batch norm.",
        min(factors[False]) > 1.2 and max(abs(factor - 1) for factor in factors[True]) < 0.01,
    )


def _landscape(rows: list[Row]) -> Finding:
    plain, normalised = (_of(rows, "gradients", "relative_loss", step=10.0, batch_norm=b) for b in (False, True))
    return Finding(
        "A gradient step after which the loss explodes without batch norm changes it little with batch norm.",
        f"After a step of rate 10 the loss of the batch is {_range(plain)} times that before without, and "
        f"{_range(normalised)} times with batch norm.",
        min(plain, default=np.inf) > 100 * max(normalised),
    )


def _middle(rows: list[Row], key: str) -> list[list[float]]:
    """Means over the middle third of the layers, by seed, without and with batch norm."""
    last = max(_of(rows, "gradients", "layer"))
    thirds = range(last // 3, 2 * last // 3 + 1)

    def mean(seed: int, batch_norm: bool) -> float:
        layers = [_of(rows, "gradients", key, seed=seed, batch_norm=batch_norm, layer=k) for k in thirds]
        return float(np.mean(layers))

    return [[mean(seed, batch_norm) for seed in _seeds(rows)] for batch_norm in (False, True)]


def _tails(rows: list[Row]) -> Finding:
    plain, normalised = _middle(rows, "kurtosis")
    return Finding(
        "Gradients of middle layers are heavy-tailed without batch norm and are not with it.",
        f"Their kurtosis at initialisation is {_range(plain)} without and {_range(normalised)} with batch norm; normal "
        "is 3.",
        min(plain) > 2 * max(normalised) and max(normalised) < 6,
    )


def _signs(rows: list[Row]) -> Finding:
    plain, normalised = _middle(rows, "sign_ratio")
    return Finding(
        "Summands of the gradients agree in sign without batch norm and cancel with it.",
        f"The sum of their absolute values is {_range(plain)} times the absolute value of their sum without, and "
        f"{_range(normalised)} times with batch norm, in middle layers at initialisation. The paper's 110 layers of "
        "convolutions differ by two orders of magnitude, this perceptron does not.",
        min(normalised) > 1.5 * max(plain),
    )


def _same_class(rows: list[Row]) -> Finding:
    plain, normalised = (_of(rows, "gradients", "commonest_class", batch_norm=b) for b in (False, True))
    return Finding(
        "At initialisation a deep network without batch norm gives most images the same class, one with it does not.",
        f"The share of the commonest class is {_range(plain)} without and {_range(normalised)} with batch norm.",
        min(plain) > 0.7 and max(normalised) < 0.5,
    )


def _noise_bound(rows: list[Row]) -> Finding:
    found, factors = _of(rows, "noise", "over_bound"), _of(rows, "noise", "factor")
    worst = max(abs(ratio / factor - 1) for ratio, factor in zip(found, factors, strict=True))
    return Finding(
        "The noise of a step is at most rate^2 / batch * C, times (n - B) / (n - 1) for batches without replacement.",
        f"Drawn 100 times, it is {_range(found)} of the bound for batches of 8 to 512 of 1,000 samples, "
        f"and differs from the expected share by {worst:.0%} at most (eval mode).",
        worst < 0.25,
    )


def _edges(rows: list[Row]) -> Finding:
    told, off = [], []
    for factors in sorted(set(_of(rows, "spectrum", "factors"))):
        largest, edge = (_of(rows, "spectrum", key, factors=factors) for key in ("largest", "edge"))
        condition = np.median(_of(rows, "spectrum", "log10_condition", factors=factors))
        told.append(f"{factors}: {np.mean(largest):.2f}, {edge[0]:.2f}, 10^{condition:.1f}")
        off.append(np.mean(largest) / edge[0])
    return Finding(
        "Squared singular values of products of Gaussian matrices follow the law of Fuss and Catalan; the condition "
        "number grows with every factor.",
        f"Factors: largest value, edge of the law, condition number: {'; '.join(told)} (200 x 200, mean over seeds).",
        0.8 < min(off) <= max(off) < 1.1,
    )


def _small_rates(rows: list[Row]) -> Finding:
    rate = min(_of(rows, "rate", "rate"))
    plain, normalised = (_of(rows, "rate", "test_accuracy", rate=rate, batch_norm=b) for b in (False, True))
    return Finding(
        "At a small learning rate networks with and without batch norm end about equal.",
        f"After the few epochs here, at rate {rate:g}, accuracies are {_range(plain)} without and {_range(normalised)} "
        "with batch norm. The claim is about training to a plateau, which this is not.",
        None,
    )


def _range(values: list[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}g}", f"{max(values):.{digits}g}"
    return low if low == high else f"{low} to {high}"


def pictures(rows: list[Row]) -> list[Picture]:
    """Learning rates, growth with depth, landscape, gradients and spectrum."""
    rows = of_finished_seeds(rows, part="spectrum", factors=5)
    if not rows:
        return []
    return [_draw_rates(rows), _draw_depth(rows), _draw_landscape(rows), _draw_gradients(rows), _draw_spectrum(rows)]


def _lines(axes: Any, rows: list[Row], part: str, x: str, y: str) -> None:
    """One line a seed, one colour with batch norm and one without."""
    for b, colour in ((False, "C1"), (True, "C0")):
        for k, seed in enumerate(_seeds(rows)):
            found = chosen(rows, part=part, batch_norm=b, seed=seed)
            points = [(row[x], row[y]) for row in found if row.get(y) is not None]
            axes.plot(*np.array(points).T, "o-", color=colour, ms=3, lw=1.2, label=None if k else _WORDS[b])
    legend(axes)


def _draw_rates(rows: list[Row]) -> Picture:
    picture, axes = chart(
        "With batch norm, much larger rates still train; lines end where the loss overflows",
        "learning rate", "test accuracy", xscale="log", ylim=(0, 1),
    )  # fmt: skip
    _lines(axes, rows, "rate", "rate", "test_accuracy")
    axes.axhline(0.1, color="0.7", lw=1)
    axes.text(min(_of(rows, "rate", "rate")), 0.11, "chance", color="0.4")
    return picture


def _draw_depth(rows: list[Row]) -> Picture:
    picture, axes = chart(
        "Branches of a residual network grow exponentially at initialisation, unless normalised",
        "block of the residual network", "standard deviation of its branch", yscale="log",
    )  # fmt: skip
    _lines(axes, rows, "depth", "layer", "channel_std")
    return picture


def _draw_landscape(rows: list[Row]) -> Picture:
    picture, axes = chart(
        "One step along the gradient: without batch norm the loss explodes",
        "step along the gradient", "loss after / loss before", xscale="log", yscale="log",
    )  # fmt: skip
    _lines(axes, rows, "gradients", "step", "relative_loss")
    axes.axhline(1, color="0.7", lw=1)
    return picture


def _draw_gradients(rows: list[Row]) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], 5.5))
    above, below = figure.subplots(2, 1, sharex=True)
    _lines(above, rows, "gradients", "layer", "kurtosis")
    above.axhline(3, color="0.7", lw=1)
    above.set(yscale="log", ylabel="kurtosis (normal: 3)")
    _lines(below, rows, "gradients", "layer", "sign_ratio")
    below.get_legend().remove()
    below.set(yscale="log", xlabel="layer", ylabel="sum |d| / |sum d|")
    return Picture(
        "Weight gradients at initialisation: heavy tails without batch norm; summands and their signs", figure
    )


def _draw_spectrum(rows: list[Row]) -> Picture:
    picture, axes = chart(
        "Products of Gaussian matrices: every factor makes both tails heavier",
        "squared singular value", "density (points: measured, lines: law)", xscale="log", yscale="log",
    )  # fmt: skip
    for k, factors in enumerate(sorted(set(_of(rows, "spectrum", "factors")))):
        value, law = (_of(rows, "spectrum", key, factors=factors, seed=_seeds(rows)[0]) for key in ("value", "law"))
        axes.plot(value, law, color=f"C{k}", lw=1.2, label=f"{factors} factor{'s' * (factors > 1)}")
        density = [_of(rows, "spectrum", "density", factors=factors, seed=seed) for seed in _seeds(rows)]
        axes.plot(value, np.mean(density, axis=0), "o", color=f"C{k}", ms=4)
    legend(axes, ncols=4)
    return picture
