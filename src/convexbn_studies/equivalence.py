"""Equivalence: training the non-convex network ends at the optimum of the convex program or above, never below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from convexbn._types import Float
from convexbn_studies import drawing
from convexbn_studies.data import draw, planted
from convexbn_studies.drawing import BLUE, ORANGE, chosen, column, distinct
from convexbn_studies.study import PAPER, Cell, Finding, Picture, Row, Study

#: Relative excess that counts as touching.
TOUCHING = 1e-3

#: Share of the largest useful weight decay.
_FRACTIONS = {"planted": 0.02, "images": 0.05}

_CLASSES = (0, 1, 8)
_TRAININGS = {False: (("adam", 0.1), ("adam", 0.02), ("sgd", 0.2)), True: (("adam", 0.1), ("sgd", 0.2))}


def cells(quick: bool) -> list[Cell]:
    """The certified optimum of each problem, then networks by width and optimiser, all seeds of one a cell."""
    images = "digits" if quick else "fashion-mnist"
    widths = (2, 30) if quick else (1, 2, 3, 5, 10, 50)
    problems: list[Cell] = [{"problem": "planted"}, {"problem": "images", "data": images}]
    steps, seeds = (800, 4) if quick else (2000, 6)
    return [{**problem, "method": "convex"} for problem in problems] + [
        {**problem, "method": optimiser, "rate": rate, "width": width, "steps": steps, "seeds": seeds}
        for problem in problems
        for optimiser, rate in _TRAININGS[quick]
        for width in widths
    ]


def run(cell: Cell) -> list[Row]:
    """Objectives in float64, balanced."""
    X, Y, weight_decay = _problem(cell)
    if cell["method"] == "convex":
        return [_optimum(cell, X, Y, weight_decay)]
    return list(_trained(cell, X, Y, weight_decay))


def findings(rows: list[Row]) -> list[Finding]:
    """Nothing below the bound, wide networks touch, narrow ones stay above."""
    found = []
    for problem in distinct(rows, "problem"):
        optimum = chosen(rows, problem=problem, method="convex")[0]
        runs = [row for row in rows if row["problem"] == problem and row["method"] != "convex"]
        found += _findings_of(str(optimum["title"]), optimum, runs)
    return sorted(found, key=lambda finding: order(finding.claim))


def order(claim: str) -> int:
    """Claims of one kind together, the most important first."""
    return next(i for i, start in enumerate(("No", "Wide", "Narrow")) if claim.startswith(start))


def pictures(rows: list[Row]) -> list[Picture]:
    """Excess of every run over the width, one picture a problem."""
    return [_picture(rows, problem) for problem in distinct(rows, "problem")]


def _problem(cell: Cell) -> tuple[Float, Float, float]:
    """Rows, targets and weight decay."""
    from convexbn import max_weight_decay

    X, Y = planted(60, 2, seed=0, neurons=5) if cell["problem"] == "planted" else _images(str(cell["data"]))
    largest = cast(tuple[float, float], max_weight_decay(X, _targets(Y), activation="relu", **PAPER))[0]
    return X, Y, float(f"{_FRACTIONS[str(cell['problem'])] * largest:.4g}")


def _images(name: str) -> tuple[Float, Float]:
    """Twenty images of each of three classes on the two leading directions of all 60; one-hot targets."""
    ((X, y),) = draw(name, (1500,), seed=0)
    rows = np.concatenate([np.flatnonzero(y == label)[:20] for label in _CLASSES])
    centred = X[rows] - X[rows].mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * values[:2], (y[rows, None] == np.array(_CLASSES)).astype(np.float64)


def _targets(Y: Float) -> Float:
    return Y[:, 0] if Y.shape[1] == 1 else Y


def _optimum(cell: Cell, X: Float, Y: Float, weight_decay: float) -> Row:
    from convexbn import ConvexBNRegressor

    model = ConvexBNRegressor(activation="relu", weight_decay=weight_decay, tol=1e-5, random_state=0, **PAPER)
    proof = model.fit(X, _targets(Y)).certificate_
    source = "planted network" if cell["problem"] == "planted" else f"{cell['data']}, three classes"
    return {
        "problem": cell["problem"], "method": "convex", "objective": proof.objective, "lower_bound": proof.lower_bound,
        "neurons": model.network_.n_neurons, "status": proof.status.value, "weight_decay": weight_decay,
        "title": f"{source}, {len(X)} rows, {Y.shape[1]} output{'s' * (Y.shape[1] > 1)}",
    }  # fmt: skip


def _trained(cell: Cell, X: Float, Y: Float, weight_decay: float) -> Iterator[Row]:
    from convexbn.program.losses import SquaredLoss
    from convexbn_studies.descent import Descent, balanced_objective

    given: Any = cell
    loss, seeds = SquaredLoss(Y, np.ones(len(Y))), range(given["seeds"])
    descent = Descent(given["method"], given["rate"], given["steps"], given["width"], seeds)
    for seed, network in zip(seeds, descent.last(X, loss, weight_decay), strict=True):
        yield {
            "problem": given["problem"], "method": given["method"], "rate": given["rate"], "width": given["width"],
            "seed": seed, "objective": balanced_objective(network, X, loss, weight_decay),
        }  # fmt: skip


def _findings_of(title: str, optimum: Row, runs: list[Row]) -> list[Finding]:
    best: Any = optimum
    objectives, widths = column(runs, "objective"), column(runs, "width")
    lowest = np.nanmin(objectives)
    widest, neurons = widths.max(), best["neurons"]
    touching = float(np.nanmin(objectives[widths == widest]) / best["objective"] - 1)
    narrow = widths < neurons
    above = float(np.nanmin(objectives[narrow], initial=np.inf) / best["objective"] - 1)
    return [
        Finding(
            f"No training ends below the dual bound ({title}).",
            f"The lowest of {len(runs)} runs ends at {lowest:.9g}; the bound is {best['lower_bound']:.9g}, and the "
            f"convex optimum {best['objective']:.9g}, certified to {1 - best['lower_bound'] / best['objective']:.0e}.",
            bool(lowest >= best["lower_bound"]),
        ),
        Finding(
            f"Wide networks touch the optimum ({title}).",
            f"The best run of width {widest:.0f} is {touching:.1e} above it, relative (touching: {TOUCHING:g}).",
            touching <= TOUCHING,
        ),
        Finding(
            f"Narrow networks stay above it ({title}).",
            f"The optimum that was found has {neurons} neurons; the best run of fewer is {above:.1e} above it.",
            bool(above > TOUCHING) if narrow.any() else None,
        ),
    ]


def _picture(rows: list[Row], problem: str) -> Picture:
    best: Any = chosen(rows, problem=problem, method="convex")[0]
    gap = max(1 - best["lower_bound"] / best["objective"], 1e-10)
    picture, axes = drawing.chart(
        f"Every run ends above the certified optimum; wide networks touch it ({best['title']})",
        "width (neurons)", "objective above the optimum (relative)", xscale="log", yscale="log",
    )  # fmt: skip
    for method, colour, marker, side in (("adam", BLUE, "o", 0.95), ("sgd", ORANGE, "^", 1.05)):
        runs = chosen(rows, problem=problem, method=method)
        excess = np.maximum(column(runs, "objective") / best["objective"] - 1, gap)
        axes.plot(side * column(runs, "width"), excess, marker, color=colour, ms=4, alpha=0.45, mew=0, label=method)
    widths = sorted(distinct(rows, "width"))
    lowest = [
        np.nanmin([column(chosen(rows, problem=problem, width=width), "objective")]) / best["objective"] - 1
        for width in widths
    ]
    axes.plot(widths, np.maximum(lowest, gap), "-", color="0.3", lw=1, label="best run of the width")
    axes.axhline(gap, color="0.3", ls="--", lw=1, label="certified gap of the optimum")
    axes.axvline(best["neurons"], color="0.6", ls=":", label=f"{best['neurons']} neurons of the optimum")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    drawing.legend(axes)
    return picture


STUDY = Study(
    name="equivalence",
    title="Training the non-convex network ends at the convex optimum or above it",
    source="Ergen et al., Demystifying Batch Normalization in ReLU Networks, ICLR 2022, arXiv 2103.01499",
    departures=(
        "The paper compares objective curves of SGD with the optimum of its convex program. Here every run is judged "
        "in float64 from the raw rows, the optimum is certified over all activation patterns, and the problems are "
        "small enough for that: 60 rows of two features, a planted network with one output, and three classes of "
        "images on their two leading directions with one-hot targets. Squared loss, full batches, cosine schedule; "
        "the objective is the balanced one, which is never above that of the weights as they are."
    ),
    needs=("torch",),
    minutes=(0.5, 2),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)
