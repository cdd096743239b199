"""``convexbn predict``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from convexbn.cli.options import model_parser
from convexbn.cli.output import check_writable, feature_names


def add_parser(commands: Any) -> None:
    """Options of ``predict``."""
    use = commands.add_parser("predict", parents=[model_parser()], help="predict with a saved network")
    use.set_defaults(command=predict)
    use.add_argument("--out", metavar="CSV", help="write here instead of to standard output")


def predict(options: argparse.Namespace) -> int:
    """Write one line a row of the data."""
    from convexbn.cli.data_sources import read_data
    from convexbn.estimators import load
    from convexbn.files.atomic import write_atomically

    if options.out is not None:
        check_writable(options.out)
    model = load(options.file)
    source = read_data(options.data, None, data_home=options.data_home, features=feature_names(model))
    predicted = model.predict(source.X if source.X_test is None else source.X_test)
    text = "".join(f"{line}\n" for line in ("prediction", *map(_cell, predicted)))
    if options.out is None:
        sys.stdout.write(text)
    else:
        write_atomically(options.out, text.encode())
    return 0


def _cell(value: Any) -> str:
    """CSV cell of a prediction; commas separate several outputs."""
    if getattr(value, "ndim", 0):
        return ",".join(repr(float(v)) for v in value)
    text = str(value.item() if hasattr(value, "item") else value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n\r') else text
