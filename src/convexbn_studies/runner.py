"""Runs a study cell by cell; its file of results is its checkpoint."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import convexbn
from convexbn.files.atomic import write_atomically
from convexbn_studies import data
from convexbn_studies.study import Cell, Finding, Row, Study

_DATA_SETS = ("fashion-mnist", "cifar-10")
_PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "clarabel", "cvxpy", "matplotlib")

#: Extra of this package that brings another.
_EXTRAS = {"matplotlib": "plot", "torch": "torch", "clarabel": "reference", "cvxpy": "test"}


@dataclass(frozen=True)
class Finished:
    """A cell that is finished.

    Attributes
    ----------
    settings : Cell
    seconds : float
        CPU seconds of this process.
    rows : list of Row
        Its lines of the table.
    """

    settings: Cell
    seconds: float
    rows: list[Row]


class Run:
    """A run of a study: what is finished of it, in a file that is replaced in one step after every cell.

    Parameters
    ----------
    study : Study
    quick : bool
    folder : path-like
        Where ``NAME.json`` is, or ``NAME-quick.json``.

    Attributes
    ----------
    cells : list of Cell
        All that belong to it.
    finished : dict of str to Finished
        By the settings' JSON, those of other settings left aside.

    Raises
    ------
    ValueError
        When there is such a file and it is not one of this study's results.
    """

    def __init__(self, study: Study, quick: bool, folder: str | os.PathLike[str]) -> None:
        self.study, self.quick, self.folder = study, quick, Path(folder)
        self.cells = study.cells(quick)
        wanted = [_key(cell) for cell in self.cells]
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"two cells of {study.name} have the same settings.")
        found = {_key(cell.settings): cell for cell in _read(self.path("json"), study.name)}
        self.finished = {key: found[key] for key in wanted if key in found}

    def path(self, ending: str) -> Path:
        """File of the run with an ending."""
        return self.folder / f"{self.study.name}{'-quick' * self.quick}.{ending}"

    @property
    def rows(self) -> list[Row]:
        """Lines of the finished cells, in the order of the cells."""
        return [row for cell in self.cells if (done := self.finished.get(_key(cell))) for row in done.rows]

    @property
    def complete(self) -> bool:
        """Whether every cell is finished."""
        return len(self.finished) == len(self.cells)

    @property
    def findings(self) -> list[Finding]:
        """What the finished lines decide."""
        return self.study.findings(self.rows)

    def missing(self) -> Iterator[Cell]:
        """Cells that are not finished, in their order."""
        return (cell for cell in self.cells if _key(cell) not in self.finished)

    def go_on(self, report: Callable[[int, int, str], None] = lambda done, total, cell: None) -> None:
        """Compute what is missing; ``report(finished, total, cell)`` is called before each cell and at the end."""
        for cell in list(self.missing()):
            report(len(self.finished), len(self.cells), described(cell))
            started = time.process_time()
            rows = [_plain(row) for row in self.study.run(cell)]
            self.finished[_key(cell)] = Finished(cell, round(time.process_time() - started, 2), rows)
            self.write()
        report(len(self.finished), len(self.cells), "")

    def write(self) -> None:
        """Replace the file of results."""
        done = [self.finished[key] for cell in self.cells if (key := _key(cell)) in self.finished]
        cells = ",\n".join(json.dumps(vars(cell), allow_nan=False) for cell in done)
        head = json.dumps({"study": self.study.name} | self.circumstances(), indent=1)[:-2]
        write_atomically(self.path("json"), f'{head},\n "cells": [\n{cells}\n]}}\n'.encode())

    def write_csv(self) -> None:
        """Write the lines as CSV."""
        stream, rows = io.StringIO(), self.rows
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path("csv"), stream.getvalue().encode())

    def circumstances(self) -> dict[str, Any]:
        """What the figures depend on besides the settings."""
        seconds = sum(cell.seconds for cell in self.finished.values())
        return {
            "command": f"convexbn reproduce {self.study.name}{' --quick' * self.quick}",
            "finished": f"{len(self.finished)} of {len(self.cells)} parts, {seconds:.0f} CPU seconds",
            "versions": {"convexbn": convexbn.__version__, "python": platform.python_version()} | _versions(),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, BLAS threads {_threads()}",
        }


def check_needs(study: Study, quick: bool) -> None:
    """Refuse, before any work, what cannot run here.

    Raises
    ------
    ImportError, FileNotFoundError
        Naming the package or the data set, and how to get it.
    """
    needs = dict.fromkeys(["matplotlib", *study.needs, *(() if quick else study.needs_in_full)])
    for need in (need for need in needs if need not in _DATA_SETS):
        if importlib.util.find_spec(need) is None:
            package = f"'convexbn[{_EXTRAS[need]}]'" if need in _EXTRAS else need
            raise ImportError(f"the study {study.name} needs {need}: pip install {package}.")
    for need in (need for need in needs if need in _DATA_SETS):
        data.load(need)


def described(cell: Cell) -> str:
    """Settings in a line."""
    return "   ".join(f"{key} {value}" for key, value in cell.items())


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True, allow_nan=False)


def _plain(row: Row) -> Row:
    """The row with numbers of Python; None for what is not finite, which JSON does not hold."""
    plain: Row = {}
    for key, given in row.items():
        value: Any = getattr(given, "item", lambda given=given: given)()
        if not isinstance(value, str | int | float | bool | None):
            raise TypeError(f"a value of a table is a string, a number, a boolean or None; {key} is {type(value)}.")
        plain[key] = None if isinstance(value, float) and not math.isfinite(value) else value
    return plain


def _read(path: Path, name: str) -> list[Finished]:
    """Finished cells of a file, none where there is no file."""
    try:
        held = json.loads(path.read_bytes())
        if held["study"] != name:
            raise KeyError
        return [Finished(cell["settings"], cell["seconds"], cell["rows"]) for cell in held["cells"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no results of the study {name}: move it away, or give another --out.") from None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _threads() -> int:
    from threadpoolctl import threadpool_info

    return max((library["num_threads"] for library in threadpool_info()), default=1)
