"""``convexbn predict``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from convexbn.cli.options import model_parser, names
from convexbn.cli.output import check_writable, feature_names, note


def add_parser(commands: Any) -> None:
    """Options of ``predict``."""
    use = commands.add_parser("predict", parents=[model_parser()], help="predict with a saved network")
    use.set_defaults(command=predict)
    use.add_argument("--out", metavar="CSV", help="write here instead of to standard output")
    use.add_argument("--id", type=names, metavar="NAME,...", help="columns of a file to copy before the predictions")
    use.add_argument("--strict", action="store_true", help="refuse missing cells and categories that are unknown")
    use.add_argument("--proba", action="store_true", help="add the probability of each class")
    use.add_argument("--digits", type=int, metavar="N", help="significant digits of numbers, by default all")


def predict(options: argparse.Namespace) -> int:
    """Write one line a row of the data."""
    from convexbn.cli.data_sources import encode, read_data, read_model, reading_of
    from convexbn.files.atomic import write_atomically

    if options.out is not None:
        check_writable(options.out)
    if options.digits is not None and options.digits < 1:
        raise ValueError(f"--digits must be at least 1; got {options.digits}.")
    model = read_model(options.file)
    if options.proba and not hasattr(model, "classes_"):
        raise ValueError("--proba is for classes, and this model is of regression.")
    if options.id is not None and not os.path.isfile(options.data):
        raise ValueError(f"--id is for files, and {options.data} is none.")
    source = read_data(
        options.data, None, data_home=options.data_home, features=feature_names(model),
        reading=reading_of(model, options, options.id or ()),
    )  # fmt: skip
    note(source.notes)
    X: Any = source.X if source.X_test is None else source.X_test
    if hasattr(model, "columns_"):
        X = encode(model.columns_, X, strict=options.strict)
    lines = _lines(model, X, options.proba)
    if options.id is not None:
        ids = [[name, *source.verbatim[name]] for name in options.id]
        lines = ([*first, *cells] for *first, cells in zip(*ids, lines, strict=True))
    text = "".join(f"{','.join(_cell(value, options.digits) for value in line)}\n" for line in lines)
    if options.out is None:
        sys.stdout.write(text)
    else:
        write_atomically(options.out, text.encode())
    return 0


def _lines(model: Any, X: Any, proba: bool) -> Iterable[list[Any]]:
    """Header and rows of values."""
    predicted = model.predict(X)
    rows = [list(row) if getattr(row, "ndim", 0) else [row] for row in predicted]
    if not proba:
        return [["prediction"], *rows]
    names = [f"probability of {label}" for label in model.classes_.tolist()]
    return [["prediction", *names], *([*row, *p] for row, p in zip(rows, model.predict_proba(X), strict=True))]


def _cell(value: Any, digits: int | None) -> str:
    """CSV cell of a value."""
    value = value.item() if hasattr(value, "item") else value
    text = str(value) if digits is None or not isinstance(value, float) else f"{value:.{digits}g}"
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n\r') else text
