"""What the pictures of the studies share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from convexbn_studies.study import Picture, Row

#: Inches of a picture: its text is read at 400 pixels.
SIZE = (5.6, 3.8)

#: Colours that all eyes tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
)  # fmt: skip


def chart(
    title: str, xlabel: str, ylabel: str, size: tuple[float, float] = SIZE, **settings: Any
) -> tuple[Picture, Any]:
    """A picture and its axes; ``settings`` are those of ``Axes.set``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, **settings)
    return Picture(title, figure), axes


def legend(axes: Any, **settings: Any) -> None:
    """A legend above the axes, where it covers nothing."""
    axes.legend(**{"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderaxespad": 0.2} | settings)


def chosen(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """Values of a column in order of appearance, those of rows that have it."""
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def column(rows: Iterable[Row], key: str) -> np.ndarray:
    """Numbers of a column."""
    return np.array([np.nan if row[key] is None else row[key] for row in rows], dtype=np.float64)
