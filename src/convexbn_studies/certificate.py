"""The certificate of networks that others train: how its gap closes with training time, width and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn.program.network import BatchNormNetwork
from convexbn_studies import drawing
from convexbn_studies.data import draw, planted
from convexbn_studies.drawing import BLUE, ORANGE, chosen, column, distinct
from convexbn_studies.study import PAPER, Cell, Finding, Picture, Row, Study

#: Relative gap that counts as closed, in these trainings of a few thousand steps.
CLOSED = 1e-2

_FRACTION = 0.05
_RATES = {"adam": 0.02, "sgd": 0.1}
_LABELS = {True: "with decay", False: "without decay"}


def cells(quick: bool) -> list[Cell]:
    """The optimum of each problem, then each training by width, all seeds at once."""
    problems = ("planted",) if quick else ("images", "planted")
    data, n, steps = ("digits", 50, 1500) if quick else ("fashion-mnist", 100, 3000)
    widths = (2, 50) if quick else (2, 5, 10, 50)
    shared: Cell = {"data": data, "n": n, "seeds": 2}
    optima: list[Cell] = [{"problem": problem, **shared, "method": "convex"} for problem in problems]
    return optima + [
        {"problem": problem, **shared, "method": method, "decay": decay, "width": width, "steps": steps}
        for problem in problems
        for method in _RATES
        for decay in (True, False)
        for width in widths
    ]


def run(cell: Cell) -> list[Row]:
    """Objectives and each network's own lower bound, over the steps."""
    given: Any = cell
    X, Y = _rows(given)
    weight_decay = _weight_decay(given["problem"], X, Y)
    if given["method"] == "convex":
        return [_optimum(given, X, Y, weight_decay)]
    return list(_judged(given, X, Y, weight_decay))


def findings(rows: list[Row]) -> list[Finding]:
    """The gap closes with training, is valid, and stays open for narrow networks and without decay."""
    found = [_findings_of(problem, chosen(rows, problem=problem)) for problem in distinct(rows, "problem")]
    return [finding for kind in zip(*found, strict=True) for finding in kind]


def pictures(rows: list[Row]) -> list[Picture]:
    """The gap over the steps, and at the end over the width, for each problem."""
    problems = distinct(rows, "problem")
    return [draw_one(problem, rows) for draw_one in (_over_steps, _over_width) for problem in problems]


def _rows(given: Any) -> tuple[Float, Float]:
    """Fewer images than pixels, ten classes; or 60 rows of two features, one output."""
    if given["problem"] == "planted":
        return planted(60, 2, seed=0, neurons=5)
    ((X, y),) = draw(given["data"], (given["n"],), seed=0)
    return X, np.eye(10)[y]


def _weight_decay(problem: str, X: Float, Y: Float) -> float:
    from convexbn import max_weight_decay

    largest: Any = max_weight_decay(X, Y if Y.shape[1] > 1 else Y[:, 0], activation="relu", **PAPER)
    return float(f"{_FRACTION * largest[0]:.4g}")


def _optimum(given: Any, X: Float, Y: Float, weight_decay: float) -> Row:
    from convexbn import ConvexBNRegressor

    model = ConvexBNRegressor(activation="relu", weight_decay=weight_decay, random_state=0, **PAPER)
    proof = model.fit(X, Y if Y.shape[1] > 1 else Y[:, 0]).certificate_
    title = "planted network, 60 rows of 2 features" if given["problem"] == "planted" else (
        f"{given['data']}, {len(X)} rows, {X.shape[1]} pixels"
    )  # fmt: skip
    return {
        "problem": given["problem"], "title": title, "method": "convex", "objective": proof.objective,
        "lower_bound": proof.lower_bound, "gap": proof.relative_gap, "neurons": model.network_.n_neurons,
    }  # fmt: skip


def _judged(given: Any, X: Float, Y: Float, weight_decay: float) -> Iterator[Row]:
    """Train with or without decay, and judge for the weight decay of the problem."""
    from convexbn.program.losses import SquaredLoss
    from convexbn_studies.descent import Descent, balanced_objective

    loss, judge = SquaredLoss(Y, np.ones(len(X))), _Judge(X, Y, weight_decay)
    steps = np.unique(np.geomspace(10, given["steps"], 8).astype(int)).tolist()
    descent = Descent(given["method"], _RATES[given["method"]], given["steps"], given["width"], range(given["seeds"]))
    settings = {key: given[key] for key in ("problem", "method", "decay", "width")}
    for step, _, networks in descent.train(X, loss, weight_decay if given["decay"] else 0.0, steps):
        for seed, network in enumerate(networks):
            if network is not None:
                value, lower = balanced_objective(network, X, loss, weight_decay), judge.lower_bound(network)
                yield settings | {
                    "seed": seed, "step": step, "objective": value, "lower_bound": lower, "gap": 1 - lower / value,
                }  # fmt: skip


class _Judge:
    """Dual values of networks: a bound for all widths and patterns, sharp at rank n - 1 and where cells are few."""

    def __init__(self, X: Float, Y: Float, weight_decay: float) -> None:
        from convexbn.certificate.dual_bounds import ReluDualBounds
        from convexbn.program.losses import SquaredLoss
        from convexbn.training.training_set import TrainingSet

        self.data, self.weight_decay = TrainingSet.prepare(X, Y, np.ones(len(X)), loss=SquaredLoss), weight_decay
        program = self.data.relu_program(weight_decay)
        self.prover = ReluDualBounds(program, directions=program.rows[:0], deadline=0.0)

    def lower_bound(self, network: BatchNormNetwork) -> float:
        """Value of the best feasible multiple of the network's negative gradient."""
        loss = self.data.loss
        dual = loss.negative_gradient(network.predict(self.data.X))
        bound = min(point.bound for point in self.prover.bounded(dual))
        best = float(np.sum(dual * loss.targets) / np.sum(dual**2))
        return loss.dual_value(float(np.clip(best, 0.0, self.weight_decay / bound)) * dual)


def _ends(rows: list[Row], **wanted: Any) -> list[Row]:
    """Lines of the last step."""
    last = max(distinct(rows, "step"))
    return chosen(rows, step=last, **wanted)


def _findings_of(problem: str, rows: list[Row]) -> list[Finding]:
    best: Any = chosen(rows, method="convex")[0]
    trained = [row for row in rows if row["method"] != "convex"]
    widest, narrowest = max(distinct(trained, "width")), min(distinct(trained, "width"))
    wide = _ends(trained, width=widest, decay=True)
    closed = column(wide, "gap").min()
    narrow = column(_ends(trained, width=narrowest, decay=True), "gap").min()
    without = column(_ends(trained, decay=False), "gap").min()
    excess = column(trained, "lower_bound") / best["objective"] - 1
    title = best["title"]
    return [
        Finding(
            f"The gap of a wide network closes as it is trained, and proves how good it is ({title}).",
            f"Width {widest} with decay: the smallest gap at the end is {closed:.1e} ({_least(wide)}), from "
            f"{column(chosen(trained, width=widest, decay=True), 'gap').max():.1e} at the start (closed: {CLOSED:g}).",
            bool(closed <= CLOSED),
        ),
        Finding(
            f"No bound that a network gives is above the optimum ({title}).",
            f"The highest of {len(trained)} is {excess.max():+.1e} relative to the optimum, which is known to "
            f"{best['gap']:.0e}.",
            bool(excess.max() <= 1e-9),
        ),
        Finding(
            f"The gap of narrow networks stays open ({title}).",
            f"Width {narrowest}: the smallest at the end is {narrow:.1e}; the optimum that was found has "
            f"{best['neurons']} neurons.",
            bool(narrow > CLOSED) if narrowest < best["neurons"] else None,
        ),
        Finding(
            f"Networks trained without weight decay are far from the optimum of the program with it ({title}).",
            f"The smallest gap of any at the end is {without:.1e}.",
            bool(without > CLOSED),
        ),
    ]  # fmt: skip


def _least(rows: list[Row]) -> str:
    return str(rows[int(np.argmin(column(rows, "gap")))]["method"])


def _name(rows: list[Row], problem: str) -> str:
    return str(chosen(rows, problem=problem, method="convex")[0]["title"])


def _styles() -> Iterator[tuple[str, bool, str, str]]:
    for method, colour in (("adam", BLUE), ("sgd", ORANGE)):
        for decay, style in ((True, "-"), (False, "--")):
            yield method, decay, colour, style


def _over_steps(problem: str, rows: list[Row]) -> Picture:
    trained = [row for row in rows if row["problem"] == problem and row["method"] != "convex"]
    widest = max(distinct(trained, "width"))
    picture, axes = drawing.chart(
        f"The certified gap closes while a network is trained (width {widest}; {_name(rows, problem)})",
        "steps", "certified relative gap", xscale="log", yscale="log",
    )  # fmt: skip
    for method, decay, colour, style in _styles():
        for seed in distinct(trained, "seed"):
            run = chosen(trained, width=widest, method=method, decay=decay, seed=seed)
            label = f"{method} {_LABELS[decay]}" if seed == 0 else None
            axes.plot(column(run, "step"), column(run, "gap"), style, color=colour, lw=1.4, label=label)
    drawing.legend(axes)
    return picture


def _over_width(problem: str, rows: list[Row]) -> Picture:
    trained = [row for row in rows if row["problem"] == problem and row["method"] != "convex"]
    picture, axes = drawing.chart(
        f"At the end the gap is small for wide networks with decay alone ({_name(rows, problem)})",
        "width (neurons)", "certified relative gap", xscale="log", yscale="log",
    )  # fmt: skip
    widths = sorted(distinct(trained, "width"))
    for method, decay, colour, style in _styles():
        gaps = [column(_ends(trained, width=width, method=method, decay=decay), "gap").min() for width in widths]
        axes.plot(widths, gaps, f"o{style}", color=colour, ms=4, lw=1.4, label=f"{method} {_LABELS[decay]}")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    drawing.legend(axes)
    return picture


STUDY = Study(
    name="certificate",
    title="A network's own residual proves how far it is from the best of any width",
    source="Ergen et al., Demystifying Batch Normalization in ReLU Networks, ICLR 2022, arXiv 2103.01499",
    departures=(
        "The paper uses the dual program to derive optima; it does not certify trained networks. Here each network's "
        "own negative gradient is scaled to a feasible dual point, whose value no network of any width can beat. "
        "Images: fewer rows than pixels, where the bound over all patterns is sharp; planted network: two features, "
        "where all cells are looked at. Squared loss, one-hot targets, weight decay 5 % of the largest useful one, "
        "full batches, cosine schedule; networks without decay are judged for the same objective."
    ),
    needs=("torch",),
    minutes=(0.5, 4),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)
