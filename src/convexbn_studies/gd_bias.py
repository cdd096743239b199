"""The implicit bias of gradient descent: it starts and moves along the leading singular directions of the data.

With ``C X = U S V'`` and ``q = S V'w`` gradient descent on ``w`` is ``q+ = q - rate S^2 grad_q``. Two effects
compound: a normal start of ``w`` is ``q_i ~ sigma_i``, and the speed of ``q_i`` is ``sigma_i^2`` (mathematics,
section 5).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn_studies import drawing
from convexbn_studies.data import leading, parts, planted
from convexbn_studies.drawing import BLUE, GREEN, ORANGE, PINK, chosen, column, distinct
from convexbn_studies.minibatch import MiniBatch, Outcome
from convexbn_studies.study import Cell, Finding, Picture, Row, Study

_WIDTH = 200

#: The four ways: which of the two effects they have, and name and colour in pictures.
_WAYS = {
    "start and speed": ("both (SGD on X)", BLUE),
    "start": ("start alone", GREEN),
    "speed": ("speed alone", PINK),
    "neither": ("neither (SGD on whitened X)", ORANGE),
}


def cells(quick: bool) -> list[Cell]:
    """The identity and the slope, then each way with each learning rate."""
    shared: Cell = {"data": "fashion-mnist", "n": 600, "epochs": 100}
    rates, seeds = [0.001, 0.003, 0.01, 0.03, 0.1], [0, 1]
    if quick:
        shared, rates, seeds = {"data": "digits", "n": 300, "epochs": 20}, [0.01, 0.1], [0]
    identity: list[Cell] = [{"part": "identity", "seed": seed} for seed in range(3)]
    return identity + [
        {**shared, "part": "ablation", "way": way, "rate": rate, "seed": seed}
        for seed in seeds
        for way in _WAYS
        for rate in rates
    ]


def run(cell: Cell) -> list[Row]:
    """The two descents side by side, or one training."""
    return [_identity(int(str(cell["seed"])))] if cell["part"] == "identity" else _trained(cell)


def findings(rows: list[Row]) -> list[Finding]:
    """What each effect is worth, the identity and its slope, and where the energy is."""
    best = _chosen_rates(rows)
    return [*_worth(best), *_mechanics(chosen(rows, part="identity"), best), _energy(best)]


def _worth(best: list[Row]) -> list[Finding]:
    test = {way: 100 * column(chosen(best, way=way), "test").mean() for way in _WAYS}
    both, neither, single = test["start and speed"], test["neither"], (test["start"], test["speed"])
    told = ", ".join(f"{_WAYS[way][0]} {value:.1f}" for way, value in test.items())
    return [
        Finding(
            "Without either effect gradient descent generalises far worse: the bias is in the geometry.",
            f"Test accuracy in per cent, learning rate by validation, mean of {len(distinct(best, 'seed'))} draws "
            f"of the data: {told}. On whitened data the same network class loses {both - neither:.1f} points.",
            bool(both > neither),
        ),
        Finding(
            "Either effect alone helps, and is worth less than both.",
            f"Start alone is {single[0] - neither:+.1f} points from neither and {single[0] - both:+.1f} from both; "
            f"speed alone {single[1] - neither:+.1f} and {single[1] - both:+.1f}.",
            bool(both > max(single) and min(single) > neither),
        ),
    ]


def _mechanics(identity: list[Row], best: list[Row]) -> list[Finding]:
    error, slopes = column(identity, "error").max(), column(identity, "slope")
    trained = column(chosen(best, way="start and speed"), "slope")
    return [
        Finding(
            "Gradient descent on w is q+ = q - rate S^2 grad_q.",
            f"Largest relative difference of the trajectories over 200 steps, with momentum and decay: {error:.1e}.",
            bool(error <= 1e-10),
        ),
        Finding(
            "A step moves direction i by sigma_i^2.",
            f"Slope of log |dq_i| on log sigma_i after one step: {slopes.mean():.2f} (between {slopes.min():.2f} and "
            f"{slopes.max():.2f}; predicted 2 where the gradient is the same in all directions). After the whole "
            f"training on images, over the larger half of the directions: {np.nanmean(trained):.2f}.",
            bool(abs(slopes.mean() - 2) <= 0.2),
        ),
    ]


def _energy(best: list[Row]) -> Finding:
    share = {way: column(chosen(best, way=way), "top_share").mean() for way in _WAYS}
    shares = ", ".join(f"{_WAYS[way][0]} {value:.2f}" for way, value in share.items())
    return Finding(
        f"The first layer's energy lies in the {best[0]['top']} leading directions, on whitened data not.",
        f"Share of the energy there: {shares}.",
        bool(share["start and speed"] > 0.5 > share["neither"]),
    )


def pictures(rows: list[Row]) -> list[Picture]:
    """Test accuracy of the four ways, and validation accuracy over the learning rate."""
    return [_accuracies(rows), _rates(rows)]


def _identity(seed: int) -> Row:
    """200 steps of both descents on planted data, in float64, and the slope of the first step."""
    X, Y = planted(60, 20, seed)
    X = X * np.geomspace(10, 0.1, X.shape[1])
    centred = X - X.mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    start = np.random.default_rng(seed).standard_normal((X.shape[1], 30))
    in_w = _trajectory(centred, Y, start, np.ones((X.shape[1], 1)), seed)
    in_q = _trajectory(left, Y, values[:, None] * (right @ start), values[:, None] ** 2, seed)
    images = values[:, None] * (right @ in_w)
    first = _trajectory(centred, Y, start, np.ones((X.shape[1], 1)), seed, steps=1, decay=0.0)
    moved = np.sqrt(np.mean((values[:, None] * (right @ (first[1] - first[0]))) ** 2, axis=1))
    slope = np.polyfit(np.log(values), np.log(moved), 1)[0]
    error = np.abs(images - in_q).max() / np.abs(in_q).max()
    return {"part": "identity", "seed": seed, "error": float(error), "slope": float(slope)}


def _trajectory(
    rows: Float, Y: Float, start: Float, speed: Float, seed: int, steps: int = 200, decay: float = 0.01
) -> Float:
    """First layers (steps + 1, d, m) of heavy-ball descent with decay, the first layer's gradient times ``speed``."""
    import torch
    from torch.nn import functional

    rng, m = np.random.default_rng([seed, 1]), start.shape[1]
    X, targets, metric = (torch.tensor(array) for array in (rows, Y, speed))
    others = rng.standard_normal((2, m)), rng.standard_normal((m, Y.shape[1])) / np.sqrt(m)
    parameters = [torch.tensor(array, requires_grad=True) for array in (start, *others)]
    weight, affine, output = parameters
    optimiser = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    told = [start]
    for _ in range(steps):
        optimiser.zero_grad()
        normalised = functional.batch_norm(X @ weight, None, None, affine[0], affine[1], training=True, eps=1e-3)
        (0.5 * (functional.relu(normalised) @ output - targets).square().mean()).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        weight.grad.mul_(metric).add_(weight.detach(), alpha=decay)
        optimiser.step()
        told.append(weight.detach().numpy().copy())
    return np.stack(told)


def _trained(cell: Cell) -> list[Row]:
    """One way with one learning rate: accuracies, and where the first layer's energy is."""
    given: Any = cell
    outcome, values = _ablation(given)
    energy = outcome.energies / outcome.energies.sum()
    top, share = leading(outcome.energies)
    row: Row = {
        "part": "ablation", "way": given["way"], "rate": given["rate"], "seed": given["seed"],
        "validation": outcome.validation, "test": outcome.test, "top": top, "top_share": share,
        "centroid": float(np.sum(energy * np.arange(1, len(energy) + 1))), "slope": _slope(outcome, values),
    }  # fmt: skip
    return [row]


def _ablation(given: Any) -> tuple[Outcome, Float]:
    """Train on coordinates that have the start and the speed of the way: ``U S^speed``, started at ``S^start z``.

    In coordinates ``u`` with ``q = S^a u`` gradient descent has the speed ``S^2a``.
    """
    rows = parts(given["data"], given["n"], 500 if given["data"] == "digits" else 2000, given["seed"])
    X = rows[0][0]
    mean = X.mean(axis=0)
    _, found, right = np.linalg.svd(X - mean, full_matrices=False)
    live = found > 1e-9 * found[0]
    values, right = found[live] / found[0], right[live]
    power = float(given["way"] in ("start and speed", "speed"))
    start = float(given["way"] in ("start and speed", "start")) - power
    to = right.T * values ** (power - 1) * np.sqrt(len(X)) / (found[0] * np.linalg.norm(values**power))
    coordinates = [((part - mean) @ to, labels) for part, labels in rows]
    training = MiniBatch(_WIDTH, given["rate"], given["epochs"], seed=given["seed"])
    deviations = values**start / np.linalg.norm(values**start)
    return training.train(*coordinates, start=deviations, metric=values**power), values


def _slope(outcome: Outcome, values: Float) -> float:
    """Slope of ``log rms |dq_i|`` on ``log sigma_i`` over directions in the upper half."""
    kept = slice(0, len(values) // 2)
    return float(np.polyfit(np.log(values[kept]), np.log(outcome.moved[kept]), 1)[0])


def _chosen_rates(rows: list[Row]) -> list[Row]:
    """Of every way and draw the line of the best validation accuracy."""
    ablation = chosen(rows, part="ablation")
    best = []
    for seed in distinct(ablation, "seed"):
        for way in _WAYS:
            lines = chosen(ablation, seed=seed, way=way)
            best.append(lines[int(np.nanargmax(column(lines, "validation")))])
    return best


def _accuracies(rows: list[Row]) -> Picture:
    picture, axes = drawing.chart(
        "Test accuracy of the same network with both effects, either, and neither", "", "test accuracy (%)"
    )
    best = _chosen_rates(rows)
    for i, (way, (_, colour)) in enumerate(_WAYS.items()):
        values = 100 * column(chosen(best, way=way), "test")
        axes.bar(i, values.mean(), color=colour, width=0.6)
        axes.plot(i + 0.1 * (np.arange(len(values)) - (len(values) - 1) / 2), values, "o", color="0.2", ms=4)
        axes.text(i, values.max() + 1.5, f"{values.mean():.1f}", ha="center")
    axes.set_xticks(range(4), [name.replace(" (", "\n(") for name, _ in _WAYS.values()], fontsize=9)
    axes.set_ylim(0, 100)
    return picture


def _rates(rows: list[Row]) -> Picture:
    picture, axes = drawing.chart(
        "Validation accuracy over the learning rate: no rate makes up for whitening",
        "learning rate",
        "validation accuracy (%)",
        xscale="log",
    )
    ablation = chosen(rows, part="ablation")
    for way, (name, colour) in _WAYS.items():
        lines = chosen(ablation, way=way)
        rates = sorted(distinct(lines, "rate"))
        mean = [100 * np.nanmean(column(chosen(lines, rate=rate), "validation")) for rate in rates]
        axes.plot(rates, mean, "o-", color=colour, label=name)
    drawing.legend(axes)
    return picture


STUDY = Study(
    name="gd-bias",
    title="Gradient descent starts and moves along the leading singular directions of the data",
    source="Ergen et al., Demystifying Batch Normalization in ReLU Networks, ICLR 2022, arXiv 2103.01499",
    departures=(
        "The paper compares cosines of trained first layers with singular vectors, and accuracies of SGD with those "
        "of its convex program. Here the update identity is checked to rounding, and its two parts are taken apart: "
        "networks are trained on coordinates of the data in which the start, the speed, both or neither depend on the"
        " singular values. 600 Fashion-MNIST images, one hidden layer of 200 neurons, one-hot squared loss, batches "
        "of 100, momentum 0.9, no weight decay; the learning rate of each way is chosen among the same five on 2,000 "
        "validation images."
    ),
    needs=("torch",),
    minutes=(0.2, 2),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)
