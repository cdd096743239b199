"""A study: cells that are computed one by one, the table that they make, what it decides, and its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Parameters of the estimators that give the program of the paper, on all directions of the data. Gated programs name
#: their gates besides.
PAPER: dict[str, Any] = {"fit_intercept": False, "linear": False, "spectral_filter": None, "standardize": False}

#: A value of a table: what CSV and JSON hold.
Value = str | int | float | bool | None

#: One line of a table.
Row = dict[str, Value]

#: Settings of one part of a study, which is finished or not: what a run that was interrupted resumes from.
Cell = dict[str, Value]


@dataclass(frozen=True)
class Finding:
    """A claim and the figure that decides it.

    Attributes
    ----------
    claim : str
        One sentence, what the paper says or the theorem predicts.
    figure : str
        What was measured, with its numbers and units.
    holds : bool or None
        Whether the claim holds here; None: the figures do not decide it, and ``figure`` says why.
    """

    claim: str
    figure: str
    holds: bool | None


@dataclass(frozen=True)
class Picture:
    """One picture, one idea.

    Attributes
    ----------
    title : str
        A sentence: what is to be seen.
    figure : matplotlib.figure.Figure
        Drawn without pyplot; axes have names and units.
    """

    title: str
    figure: Figure


@dataclass(frozen=True)
class Study:
    """An experiment of a paper.

    Attributes
    ----------
    name : str
        What ``convexbn reproduce`` calls it.
    title : str
        One line, what it shows.
    source : str
        Paper, and where in it.
    departures : str
        How the run differs from the paper: data, sizes, losses, tuning.
    needs : tuple of str
        Extras and data sets without which it cannot run, such as ``"torch"`` and ``"fashion-mnist"``. What the quick
        form can do without is not among them.
    minutes : (float, float)
        How long the quick and the full form take on two cores.
    cells : callable
        ``cells(quick)``: the parts, in their order; small enough that little is lost with one.
    run : callable
        ``run(cell)``: lines of the table of one cell, from its settings alone.
    findings : callable
        ``findings(rows)``: what the finished lines decide, the most important first.
    pictures : callable
        ``pictures(rows)``: the finished lines drawn; matplotlib is imported inside.
    needs_in_full : tuple of str, default=()
        What the full form needs besides.
    """

    name: str
    title: str
    source: str
    departures: str
    needs: tuple[str, ...]
    minutes: tuple[float, float]
    cells: Callable[[bool], list[Cell]]
    run: Callable[[Cell], list[Row]]
    findings: Callable[[list[Row]], list[Finding]]
    pictures: Callable[[list[Row]], list[Picture]]
    needs_in_full: tuple[str, ...] = ()
