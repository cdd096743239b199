"""Closed form: where the rank is n - 1, training approaches from above what a formula gives at once."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn_studies import drawing
from convexbn_studies.data import draw
from convexbn_studies.drawing import BLUE, ORANGE, chosen, column, distinct
from convexbn_studies.study import PAPER, Cell, Finding, Picture, Row, Study

#: Share of the largest useful weight decay.
_FRACTION = 0.05
_CLASSES = 10
_WIDTH, _SEEDS = 50, 2

#: Excess above which a run is not drawn: it diverges.
_HIGHEST = 100.0

#: Learning rates of the quick and the full form.
_RATES: dict[bool, dict[str, tuple[float, ...]]] = {
    True: {"adam": (0.01, 0.1), "sgd": (0.1, 0.5)},
    False: {"adam": (0.001, 0.01, 0.1), "sgd": (0.01, 0.1, 0.5)},
}


def cells(quick: bool) -> list[Cell]:
    """The formula on each data set, then each optimiser and learning rate, all seeds at once."""
    sets: list[tuple[str, int, int]] = [("digits", 50, 1500)]
    if not quick:
        sets = [("fashion-mnist", 300, 2500), ("cifar-10", 300, 1000)]
    return [
        {"data": name, "n": n, "method": method, "rate": rate, "steps": steps}
        for name, n, steps in sets
        for method, rates in {"formula": (None,), **_RATES[quick]}.items()
        for rate in rates
    ]


def run(cell: Cell) -> list[Row]:
    """Objectives in float64, balanced, over CPU seconds."""
    X, labels = _rows(str(cell["data"]), int(str(cell["n"])))
    return _formula(cell, X, labels) if cell["method"] == "formula" else _training(cell, X, labels)


def findings(rows: list[Row]) -> list[Finding]:
    """The formula is certified, nothing is below it, training approaches it."""
    return [finding for name in distinct(rows, "data") for finding in _findings_of(name, chosen(rows, data=name))]


def pictures(rows: list[Row]) -> list[Picture]:
    """Excess over the formula by CPU seconds, one picture a data set."""
    return [_picture(name, chosen(rows, data=name)) for name in distinct(rows, "data")]


def _rows(name: str, n: int) -> tuple[Float, np.ndarray]:
    """The first images of every class, n in all, equally many of each."""
    ((X, y),) = draw(name, (min(20 * n, 1700 if name == "digits" else 20 * n),), seed=0)
    kept = np.concatenate([np.flatnonzero(y == label)[: n // _CLASSES] for label in range(_CLASSES)])
    return X[kept], y[kept]


def _weight_decay(n: int) -> float:
    """The largest useful one is the norm of a class's targets, ``sqrt(n / K)``."""
    return _FRACTION * float(np.sqrt(n / _CLASSES))


def _formula(cell: Cell, X: Float, labels: np.ndarray) -> list[Row]:
    from convexbn import ConvexBNClassifier

    started = time.process_time()
    program: dict[str, Any] = PAPER | {"activation": "relu", "loss": "squared"}
    model = ConvexBNClassifier(weight_decay=_weight_decay(len(X)), **program).fit(X, labels)
    seconds, proof = time.process_time() - started, model.certificate_
    settings = {key: cell[key] for key in ("data", "n", "method")}
    return [
        settings | {
            "rank": model.rank_, "neurons": model.network_.n_neurons, "seconds": seconds,
            "objective": proof.objective, "lower_bound": proof.lower_bound, "status": proof.status.value,
        }
    ]  # fmt: skip


def _training(cell: Cell, X: Float, labels: np.ndarray) -> list[Row]:
    from convexbn.program.losses import SquaredLoss
    from convexbn_studies.descent import Descent, balanced_objective

    given: Any = cell
    loss, weight_decay = SquaredLoss(np.eye(_CLASSES)[labels], np.ones(len(X))), _weight_decay(len(X))
    steps = np.unique(np.geomspace(1, given["steps"], 25).astype(int)).tolist()
    descent = Descent(given["method"], given["rate"], given["steps"], _WIDTH, range(_SEEDS))
    settings = {key: cell[key] for key in ("data", "n", "method", "rate")}
    return [
        settings | {
            "seed": seed, "step": step, "seconds": seconds / _SEEDS,
            "objective": balanced_objective(network, X, loss, weight_decay),
        }
        for step, seconds, networks in descent.train(X, loss, weight_decay, steps, dtype="float32")
        for seed, network in enumerate(networks)
    ]  # fmt: skip


def _findings_of(name: str, rows: list[Row]) -> list[Finding]:
    formula: Any = chosen(rows, method="formula")[0]
    runs = [row for row in rows if row["method"] != "formula"]
    ends = [row for row in runs if row["step"] == max(distinct(chosen(runs, method=row["method"]), "step"))]
    excess = column(ends, "objective") / formula["objective"] - 1
    best: Any = ends[int(np.nanargmin(excess))]
    gap = 1 - formula["lower_bound"] / formula["objective"]
    lowest = float(np.nanmin(column(runs, "objective")))
    return [
        Finding(
            f"The formula gives the global optimum ({name}, {formula['n']} rows).",
            f"Objective {formula['objective']:.9g} with {formula['neurons']} neurons in {formula['seconds']:.2f} CPU "
            f"seconds, {formula['status']}: no network of any width is lower by more than {max(gap, 0):.0e}.",
            formula["status"] == "CERTIFIED",
        ),
        Finding(
            f"Training never goes below it ({name}).",
            f"The lowest of {len(ends)} runs at any time is {lowest:.9g}, {lowest / formula['objective'] - 1:+.1e} "
            "relative to the formula.",
            lowest >= formula["lower_bound"],
        ),
        Finding(
            f"Training approaches it to a per cent within {best['step']} steps ({name}).",
            f"The best end is {np.nanmin(excess):.2e} above it ({best['method']}, rate {best['rate']:g}, "
            f"{best['seconds']:.1f} CPU seconds); the worst is {np.nanmax(excess):.2e} above it.",
            bool(np.nanmin(excess) <= 0.01),
        ),
    ]


def _picture(name: str, rows: list[Row]) -> Picture:
    formula: Any = chosen(rows, method="formula")[0]
    picture, axes = drawing.chart(
        f"Training approaches the formula from above ({name}, {formula['n']} rows, 10 classes)",
        "CPU seconds of training", "objective above the formula (relative)", xscale="log", yscale="log",
    )  # fmt: skip
    for method, colour in (("adam", BLUE), ("sgd", ORANGE)):
        runs = chosen(rows, method=method)
        for rate, style in zip(distinct(runs, "rate"), ("-", "--", ":"), strict=False):
            for seed in distinct(runs, "seed"):
                run = chosen(runs, rate=rate, seed=seed)
                excess = column(run, "objective") / formula["objective"] - 1
                label = f"{method}, rate {rate:g}" if seed == 0 else None
                axes.plot(column(run, "seconds"), excess, style, color=colour, lw=1.2, alpha=0.8, label=label)
    lowest = np.nanmin(column([row for row in rows if row["method"] != "formula"], "objective"))
    axes.set_ylim(0.5 * (lowest / formula["objective"] - 1), _HIGHEST)
    axes.axvline(formula["seconds"], color="0.3", lw=1, label=f"formula: {formula['seconds']:.2f} s, excess 0")
    drawing.legend(axes)
    return picture


STUDY = Study(
    name="closed-form",
    title="Where the rank is n - 1, a formula gives what training approaches from above",
    source="Ergen et al., Demystifying Batch Normalization in ReLU Networks, ICLR 2022, arXiv 2103.01499: closed forms",
    departures=(
        "The paper draws the formula beside SGD runs on small CIFAR-10 subsets. Here the rows are class-balanced "
        "subsets of 300 images (50 in the quick form), fewer than their pixels, with one-hot targets and the squared "
        "loss; the weight decay is 5 % of the largest useful one; networks have 50 neurons, full batches, a cosine "
        "schedule, float32 training and a float64 judge. The formula's seconds include whitening and its certificate."
    ),
    needs=("torch",),
    minutes=(0.4, 2.5),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist", "cifar-10"),
)
