"""``convexbn reproduce``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from convexbn.cli.output import Terminated, broken_off

#: Lines of a table that are printed.
_LINES = 60


def add_parser(commands: Any) -> None:
    """Options of ``reproduce``."""
    again = commands.add_parser("reproduce", help="run an experiment of the papers and draw it on a page")
    again.set_defaults(command=reproduce)
    again.add_argument("name", metavar="NAME", nargs="?", help="of a study; --list tells which there are")
    again.add_argument("--list", action="store_true", help="tell what each study shows, and how long it takes")
    again.add_argument("--quick", action="store_true", help="the small form, minutes")
    again.add_argument(
        "--out", metavar="FOLDER", default="experiments", help="for NAME.html, .csv and .json, by default experiments"
    )
    again.add_argument("--draw", action="store_true", help="compute nothing, draw what is finished")


def reproduce(options: argparse.Namespace) -> int:
    """Run a study; finished cells outlive an interruption, and the same command goes on from them."""
    from convexbn.estimators.counter import counter
    from convexbn_studies import study
    from convexbn_studies.runner import Run, check_needs

    if options.list or options.name is None:
        return _list(options)
    chosen, folder = study(options.name), Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--out {options.out}: the folder cannot be written to")
    run = Run(chosen, options.quick, folder)
    if not (options.draw or run.complete):
        check_needs(chosen, options.quick)
    try:
        with counter(sys.stderr) as report:
            if not options.draw:
                run.go_on(report)
    except (KeyboardInterrupt, Terminated) as signalled:
        if run.finished:
            run.write()  # the signal may have come between the end of a part and its writing
        kept = f"{len(run.finished)} of {len(run.cells)} parts are finished and in {run.path('json')}"
        return broken_off(signalled, f"{kept}: the same command goes on from there")
    _tell(run)
    return 0


def _list(options: argparse.Namespace) -> int:
    """Print one paragraph a study."""
    from convexbn_studies import NAMES, study

    if not options.list:
        raise ValueError(f"name a study, or give --list: there are {', '.join(NAMES)}.")
    for known in map(study, NAMES):
        quick, full = known.minutes
        needs = ", ".join(known.needs) or "nothing"
        in_full = f"; in full {', '.join(known.needs_in_full)}" if known.needs_in_full else ""
        print(f"{known.name}\n    {known.title}\n    {known.source}")
        print(f"    about {quick:g} min quick, {full:g} min in full; needs {needs}{in_full}")
    return 0


def _tell(run: Any) -> None:
    """Write page and table, and print table and findings."""
    from convexbn.files.atomic import write_atomically
    from convexbn_studies.page import study_page, verdict

    write_atomically(run.path("html"), study_page(run))
    run.write_csv()
    print(*_lines(run.rows), "", *map(verdict, run.findings), sep="\n")
    print(f"\npage: {run.path('html')}   table: {run.path('csv')}   results: {run.path('json')}")


def _lines(rows: list[Any]) -> list[str]:
    """Lines of the table in columns; of a long table the beginning."""
    from convexbn.files.html import shown

    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([shown(row.get(key)) for key in columns] for row in rows[:_LINES])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return lines + [f"... {len(rows) - _LINES} lines more in the table"] * (len(rows) > _LINES)
