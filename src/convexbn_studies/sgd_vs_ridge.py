"""SGD against ridge: how many rows tuned ridge needs for the risk of one tuned pass of averaged SGD."""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn.companions.excess_risk import (
    LeastSquares,
    gaussian_ridge_risk,
    one_hot_ridge_risk,
    samples_needed,
    sgd_risk,
    tuned,
)
from convexbn_studies import drawing
from convexbn_studies.drawing import BLUE, GREEN, ORANGE, chosen, column, distinct
from convexbn_studies.study import Cell, Finding, Picture, Row, Study

_TRUTHS = {0: "w* = 1", 1: "w* = 1/i", 10: "w* = i^-10"}
_COLOURS = {0: ORANGE, 1: GREEN, 10: BLUE}
_PENALTIES = np.geomspace(1e-4, 1e4, 33)
_SEEDS = 3

#: Rows of SGD from which on ratios are told: with fewer the draws of ridge differ much.
_FROM = 200


def cells(quick: bool) -> list[Cell]:
    """The separation for each number of rows; on Gaussian rows SGD, exactly, and ridge, drawn."""
    one_hot = (64, 256, 1024) if quick else (32, 64, 128, 256, 512, 1024, 2048, 4096)
    largest, most, runs = (400, 1600, 8) if quick else (1600, 6000, 20)
    sgd: Cell = {"design": "gaussian", "method": "sgd", "largest": largest}
    ridge: Cell = {"design": "gaussian", "method": "ridge", "largest": most, "runs": runs}
    parts: list[Cell] = [{"design": "one_hot", "n": n} for n in one_hot]
    for decay in (1, 2):
        for truth in (0, 10) if quick else _TRUTHS:
            parts += [{**sgd, "decay": decay, "truth": truth}]
            parts += [{**ridge, "decay": decay, "truth": truth, "seed": seed} for seed in range(_SEEDS)]
    return parts


def run(cell: Cell) -> list[Row]:
    """Tuned risks, and on one-hot rows how many of them ridge needs."""
    given: Any = cell
    if cell["design"] == "one_hot":
        return [_separation(given["n"])]
    problem = LeastSquares.power_law(given["decay"], given["truth"])
    settings = {key: cell[key] for key in ("design", "method", "decay", "truth")}
    sizes = np.unique(np.geomspace(50, given["largest"], 11 if cell["method"] == "sgd" else 15).astype(int)).tolist()
    if cell["method"] == "sgd":
        return [settings | _sgd(problem, n) for n in sizes]
    rng = np.random.default_rng(given["seed"])
    return [settings | {"seed": given["seed"]} | _ridge(problem, n, given["runs"], rng) for n in sizes]


def findings(rows: list[Row]) -> list[Finding]:
    """The separation, the cases in which SGD is worse and better, and the theorem that it is never far worse."""
    separated, averaged = _separated(chosen(rows, design="one_hot")), _averaged(chosen(rows, method="sgd"))
    return [separated, _leading(rows), _everywhere(rows), _never_far(rows), averaged]


def pictures(rows: list[Row]) -> list[Picture]:
    """Rows of ridge for rows of SGD."""
    return [_separation_picture(chosen(rows, design="one_hot")), *(_gaussian_picture(rows, d) for d in (1, 2))]


def _separation(n: int) -> Row:
    problem = LeastSquares.separation(n)

    def ridge(rows: int) -> tuple[float, float]:
        return tuned(lambda penalty: one_hot_ridge_risk(problem, rows, penalty), 1e-4, 1e6)

    step, risk = tuned(lambda g: sgd_risk(problem, n, g, design="one_hot"), 1e-4, 1.0)
    penalty, same = ridge(n)
    needed = samples_needed(lambda rows: ridge(rows)[1], risk, n)
    return {
        "design": "one_hot", "n": n, "risk": risk, "step": step, "ridge_risk": same, "penalty": penalty,
        "ridge_rows": needed, "ratio": needed / n,
    }  # fmt: skip


def _sgd(problem: LeastSquares, n: int) -> Row:
    """Steps are given times ``tr H``."""
    ends = 1e-4 / problem.trace, 1 / problem.trace
    step, risk = tuned(lambda g: sgd_risk(problem, n, g), *ends)
    _, all_iterates = tuned(lambda g: sgd_risk(problem, n, g, average="all"), *ends)
    return {"n": n, "risk": risk, "step": step * problem.trace, "risk_of_all": all_iterates}


def _ridge(problem: LeastSquares, n: int, runs: int, rng: np.random.Generator) -> Row:
    risks = gaussian_ridge_risk(problem, n, _PENALTIES, rng, runs).mean(axis=0)
    best = int(risks.argmin())
    return {"n": n, "risk": float(risks[best]), "penalty": float(_PENALTIES[best])}


def _rows_needed(ridge: list[Row], risks: Float) -> Float:
    """Rows at which the curve of ridge, a line on logarithmic axes, reaches risks: nan beyond its ends."""
    curve = np.log(np.minimum.accumulate(column(ridge, "risk")))
    sizes = np.log(column(ridge, "n"))
    return np.exp(np.interp(np.log(risks), curve[::-1], sizes[::-1], left=np.nan, right=np.nan))


def _curves(rows: list[Row], decay: int, truth: int) -> tuple[Float, Float]:
    """Rows of SGD (m,), and those of ridge for its risk: (seeds, m)."""
    case = chosen(rows, design="gaussian", decay=decay, truth=truth)
    sgd, ridge = chosen(case, method="sgd"), chosen(case, method="ridge")
    needed = [_rows_needed(chosen(ridge, seed=s), column(sgd, "risk")) for s in distinct(ridge, "seed")]
    return column(sgd, "n"), np.array(needed)


def _separated(rows: list[Row]) -> Finding:
    n, needed = column(rows, "n"), column(rows, "ridge_rows")
    slopes = np.diff(np.log(needed)) / np.diff(np.log(n))
    ratios = ", ".join(f"{ratio:.1f}" for ratio in needed / n)
    better = column(rows, "risk") < column(rows, "ridge_risk")
    return Finding(
        "There are instances on which tuned ridge needs about N^2 / log^2 N rows for what tuned SGD does with N.",
        f"One-hot rows, exact: for N = {', '.join(f'{k:.0f}' for k in n)} ridge needs {ratios} times as many. The "
        f"exponent of N goes from {slopes[0]:.2f} to {slopes[-1]:.2f}, that of N^2 / log^2 N between the last two is "
        f"{_exponent(n[-2:]):.2f}. With equal rows SGD is better at {int(better.sum())} of {len(rows)} sizes.",
        bool((np.diff(needed / n) > 0).all() and abs(slopes[-1] - _exponent(n[-2:])) < 0.1 and better.all()),
    )


def _exponent(n: Float) -> float:
    """Slope of ``log(N^2 / log^2 N)`` in ``log N`` between two sizes."""
    predicted = 2 * np.log(n) - 2 * np.log(np.log(n))
    return float(np.diff(predicted)[0] / np.diff(np.log(n))[0])


def _leading(rows: list[Row]) -> Finding:
    figures, ratios = _told(rows, 10)
    claim = "With w* = i^-10, in the leading directions, ridge needs more rows than SGD."
    return Finding(claim, figures, bool(ratios.min() > 1) if len(ratios) else None)


def _everywhere(rows: list[Row]) -> Finding:
    figures, ratios = _told(rows, 0)
    claim = "With w* = 1, in all directions, SGD needs more rows, by a nearly constant factor."
    return Finding(claim, figures, bool(ratios.max() < 1) if len(ratios) else None)


def _never_far(rows: list[Row]) -> Finding:
    gaussian = chosen(rows, design="gaussian")
    cases = [(decay, truth) for decay in distinct(gaussian, "decay") for truth in distinct(gaussian, "truth")]
    ratios = np.concatenate([_ratios(rows, *case)[1].ravel() for case in cases])
    worst = ratios[np.isfinite(ratios)].min(initial=1.0)
    return Finding(
        "On every instance SGD needs at most logarithmically more rows than ridge, a condition number aside.",
        f"At worst it needs {1 / worst:.1f} times as many on these instances (all sizes and seeds); constants and "
        "logarithms cannot be told apart up to these sizes.",
        None,
    )


def _told(rows: list[Row], truth: int) -> tuple[str, Float]:
    """Ratios of a truth in words, and all that ridge reaches."""
    cases = {decay: _ratios(rows, decay, truth) for decay in (1, 2)}
    figures = "; ".join(f"l = i^-{decay}: {_described(*case)}" for decay, case in cases.items())
    ratios = np.concatenate([ratios[n >= _FROM].ravel() for n, ratios in cases.values()])
    told = f"Rows of ridge over rows of SGD on Gaussian data, N >= {_FROM}, {_SEEDS} seeds: {figures}."
    return told, ratios[np.isfinite(ratios)]


def _ratios(rows: list[Row], decay: int, truth: int) -> tuple[Float, Float]:
    """Rows of SGD, and the ratios of ridge to them: (seeds, m)."""
    n, needed = _curves(rows, decay, truth)
    return n, (needed / n).T


def _described(n: Float, ratios: Float) -> str:
    """Ratios at the first size from 200 on and at the last that ridge reaches, over the seeds."""
    if not (np.isfinite(ratios).all(axis=1) & (n >= _FROM)).any():
        return "beyond the sizes of ridge"
    reached = [k for k in range(len(n)) if n[k] >= _FROM and np.isfinite(ratios[k]).all()]
    return " to ".join(
        f"{ratios[k].min():.2f}-{ratios[k].max():.2f} (N = {n[k]:.0f})" for k in (reached[0], reached[-1])
    )


def _averaged(rows: list[Row]) -> Finding:
    gains = column(rows, "risk_of_all") / column(rows, "risk")
    least = rows[int(gains.argmin())]
    return Finding(
        "Averaging the last half of the iterates is better than averaging all of them.",
        f"The risk of all is {gains.min():.2f} to {gains.max():.2f} times that of the tail, steps tuned for each; "
        f"least for l = i^-{least['decay']}, {_TRUTHS[int(str(least['truth']))]}.",
        bool((gains > 1).all()),
    )


def _separation_picture(rows: list[Row]) -> Picture:
    n = column(rows, "n")
    picture, axes = drawing.chart(
        "One-hot rows: ridge needs nearly the square of what SGD needs",
        "rows of SGD, N", "rows of ridge for the same risk", xscale="log", yscale="log",
    )  # fmt: skip
    axes.plot(n, column(rows, "ridge_rows"), "o-", color=BLUE, label="tuned ridge, exact")
    axes.plot(n, n**2 / np.log(n) ** 2, "--", color=ORANGE, label="N² / log² N")
    axes.plot(n, n, ":", color="0.4", label="N")
    drawing.legend(axes)
    return picture


def _gaussian_picture(rows: list[Row], decay: int) -> Picture:
    picture, axes = drawing.chart(
        f"Gaussian rows, eigenvalues 1/i{'²' * (decay == 2)}: who needs fewer rows depends on where the signal is",
        "rows of SGD, N", "rows of ridge for the same risk", xscale="log", yscale="log",
    )  # fmt: skip
    for truth in distinct(chosen(rows, decay=decay), "truth"):
        n, needed = _curves(rows, decay, truth)
        for curve, label in zip(needed, [_TRUTHS[truth], *[None] * len(needed)], strict=False):
            axes.plot(n, curve, ".-", color=_COLOURS[truth], lw=1, alpha=0.8, label=label)
    axes.plot(n, n, ":", color="0.4", label="N")
    drawing.legend(axes)
    return picture


STUDY = Study(
    name="sgd-vs-ridge",
    title="How many rows tuned ridge needs for the risk of one tuned pass of averaged SGD",
    source=(
        "Zou, Wu, Braverman, Gu, Foster, Kakade, The Benefits of Implicit Regularization from SGD in Least Squares "
        "Problems, NeurIPS 2021, arXiv 2108.04552: the theorems, and the figures on Gaussian data"
    ),
    departures=(
        "Risks of SGD are exact instead of means over runs, and so is ridge on one-hot rows; ridge on Gaussian rows is "
        "the mean over 20 draws (quick form: 8), with the penalty of least mean, in three seeds. The instance of the "
        "separation is one of our own of the order that the paper proves; its constants are not the paper's. Gaussian "
        "cases have 200 dimensions and unit noise; SGD averages the last half of its iterates. Curves of ridge are "
        "interpolated between 15 sizes up to 6000 (1600); where SGD is below their end there is no point."
    ),
    needs=(),
    minutes=(0.5, 8),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
)
