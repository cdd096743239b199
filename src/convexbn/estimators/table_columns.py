"""What the columns of a table became as inputs of a network: numbers, indicators of categories, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convexbn._types import Bool, Float
from convexbn.files import schema
from convexbn.files.dataset import Table
from convexbn.files.tables.table import quoted

#: Categories of a text column: as many at any rate, then a share of the rows, and never more than that.
_CATEGORIES, _SHARE, _MOST_CATEGORIES = 20, 0.1, 200
#: Most columns that a line names.
_NAMED = 12

#: Types of the value that a missing cell is taken for, by what a column became.
_FILLS = {"number": float, "categories": str, "left out": type(None)}
RULE = schema.each(
    schema.record(
        name=schema.text,
        kind=schema.one_of(*_FILLS),
        fill=schema.none_or(schema.either(schema.number, schema.text)),
        categories=schema.names,
    )
)


@dataclass(frozen=True)
class TableColumn:
    """What one column became.

    Attributes
    ----------
    name : str
    kind : {"number", "categories", "left out"}
    fill : float, str or None
        What a missing cell is taken for: the median of the numbers, or the most frequent category.
    categories : list of str
        Texts that have an indicator each; of two the second alone.
    """

    name: str
    kind: str
    fill: float | str | None
    categories: list[str]

    def __post_init__(self) -> None:
        fits = (self.fill in self.categories and len(self.categories) > 1) or self.kind != "categories"
        if not (fits and isinstance(self.fill, _FILLS[self.kind])):
            raise ValueError(f"column {self.name!r}: {self.fill!r} does not fill a column that became {self.kind!r}.")

    @classmethod
    def learn(cls, name: str, cells: np.ndarray) -> TableColumn:
        """What a column becomes by its cells: floats with NaN, or objects with None, where they are missing."""
        from sklearn.impute import SimpleImputer

        if cells.dtype.kind == "f":
            if np.isnan(cells).all():
                return cls(name, "left out", None, [])
            return cls(name, "number", float(SimpleImputer(strategy="median").fit(cells[:, None]).statistics_[0]), [])
        categories = sorted(set(cells.tolist()) - {None})
        if not 2 <= len(categories) <= max(_CATEGORIES, min(_SHARE * len(cells), _MOST_CATEGORIES)):
            return cls(name, "left out", None, [])
        imputer = SimpleImputer(strategy="most_frequent", missing_values=None).fit(cells[:, None])
        return cls(name, "categories", imputer.statistics_[0], categories)

    @property
    def inputs(self) -> list[str]:
        """Names of its inputs of the network."""
        if self.kind != "categories":
            return [self.name] if self.kind == "number" else []
        return [f"{self.name} = {category}" for category in self.categories[len(self.categories) == 2 :]]

    def of(self, table: Table | Mapping[str, Any]) -> np.ndarray:
        """Its cells in a table, as ``learn`` takes them."""
        cells = np.asarray(table[self.name])
        if self.kind == "categories":
            written = cells.dtype.kind in "iufb"  # in a file that declares the categories as numbers
            return np.array([f"{cell:.17g}" for cell in cells] if written else cells, dtype=object)
        try:
            return cells.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {self.name!r} holds text, and in training it held numbers.") from error

    def gaps(self, cells: np.ndarray) -> Bool:
        """Which cells are taken for ``fill``: missing ones, and categories that training did not have."""
        if self.kind == "number":
            return np.isnan(cells)
        known = set(self.categories)
        return np.fromiter((cell not in known for cell in cells), dtype=bool, count=len(cells))

    def encode(self, cells: np.ndarray) -> Float:
        """Inputs of the network (n, k)."""
        from sklearn.impute import SimpleImputer
        from sklearn.preprocessing import OneHotEncoder

        if self.kind == "number":
            imputer = SimpleImputer(strategy="constant", fill_value=self.fill, keep_empty_features=True)
            return np.asarray(imputer.fit_transform(cells[:, None]), dtype=np.float64)
        known = np.where(self.gaps(cells), np.array(self.fill, dtype=object), cells)[:, None]
        categories = [np.array(self.categories, dtype=object)]
        return np.asarray(
            OneHotEncoder(categories=categories, drop="if_binary", sparse_output=False).fit_transform(known)
        )


@dataclass(frozen=True)
class TableColumns:
    """What the columns of a table became, learned on training rows and repeated on others.

    Attributes
    ----------
    columns : tuple of TableColumn
    """

    columns: tuple[TableColumn, ...]

    @classmethod
    def learn(cls, table: Table, names: Sequence[str]) -> TableColumns:
        """What the columns of training rows become."""
        found = cls(tuple(TableColumn.learn(name, table[name]) for name in names))
        if not found.used:
            raise ValueError(f"no column is left to learn from: {'; '.join(found.told_of_training(table))}.")
        return found

    @property
    def used(self) -> list[TableColumn]:
        """Columns that are not left out."""
        return [column for column in self.columns if column.kind != "left out"]

    @property
    def texts(self) -> list[str]:
        """Names of the columns of text that are used."""
        return [column.name for column in self.columns if column.kind == "categories"]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs of the network."""
        return [name for column in self.columns for name in column.inputs]

    @property
    def summary(self) -> dict[str, str]:
        """Names of the columns that are no numbers, by what they became."""
        kinds = {"categories": "columns of text, an indicator a category", "left out": "columns left out"}
        names = {told: [c.name for c in self.columns if c.kind == kind] for kind, told in kinds.items()}
        return {told: ", ".join(map(quoted, of[:_NAMED])) for told, of in names.items() if of}

    def encode(self, table: Table | Mapping[str, Any]) -> Float:
        """Inputs of the network (n, d) from the columns of a table, found by name.

        Parameters
        ----------
        table : Table
            Or another mapping of names to columns, such as a data frame, with NaN or None where a cell is missing.
        """
        return np.hstack([column.encode(column.of(table)) for column in self.used])

    def told_of_training(self, table: Table) -> list[str]:
        """What is no column of numbers, in short lines."""
        encoded = [f"{quoted(c.name)} ({len(c.categories)} categories)" for c in self.columns if c.kind == "categories"]
        out = [f"{quoted(c.name)} ({_reason(table[c.name])})" for c in self.columns if c.kind == "left out"]
        return [*_line("text as indicators", encoded), *_line("left out", out)]

    def told_of_gaps(self, table: Table) -> list[str]:
        """Which cells of a table are filled in, in short lines."""
        missing, unknown = [], []
        for column in self.used:
            cells = column.of(table)
            absent = np.isnan(cells) if column.kind == "number" else np.array([cell is None for cell in cells])
            more = int(column.gaps(cells).sum() - absent.sum())
            value = f"median {column.fill:.6g}" if column.kind == "number" else quoted(column.fill)
            missing += [f"{quoted(column.name)} ({absent.sum()} by {value})"] * bool(absent.any())
            unknown += [f"{quoted(column.name)} ({more} by {value})"] * bool(more)
        return [*_line("missing cells filled in", missing), *_line("categories unknown in training replaced", unknown)]


def _reason(cells: np.ndarray) -> str:
    """Why a column is left out."""
    numeric = cells.dtype.kind == "f"
    distinct = 0 if numeric else len(set(cells.tolist()) - {None})
    return "empty" if not distinct else "one text" if distinct == 1 else f"{distinct} different texts"


def _line(told: str, names: Sequence[str]) -> Iterable[str]:
    """Line on some columns, or none."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"{told}: {', '.join(names[:_NAMED])}{more}"] if names else []


def to_json(columns: TableColumns) -> list[dict[str, Any]]:
    """Plain values for the header of a file."""
    return [asdict(column) for column in columns.columns]


def from_json(block: Sequence[Mapping[str, Any]]) -> TableColumns:
    """Columns from the header of a file."""
    columns = []
    for values in block:
        fill = values["fill"]
        try:
            columns.append(TableColumn(**{**values, "fill": float(fill) if values["kind"] == "number" else fill}))
        except (TypeError, ValueError):
            schema.require(False, "columns")
    return TableColumns(tuple(columns))
