"""``convexbn report``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from convexbn.cli.options import model_parser
from convexbn.cli.output import check_writable, feature_names


def add_parser(commands: Any) -> None:
    """Options of ``report``."""
    tell = commands.add_parser(
        "report", parents=[model_parser()], help="write one HTML page on a saved network and its data"
    )
    tell.set_defaults(command=report)
    tell.add_argument("--out", metavar="HTML", help="by default the name of FILE with .html")
    tell.add_argument("--target", metavar="NAME", help="target column, by default that of the training")
    tell.add_argument("--path", metavar="CHECKPOINT", help="of the path that the network was chosen from, to draw it")
    tell.add_argument("--time-limit", type=float, metavar="SECONDS", help="for the bounds over all patterns (relu)")


def report(options: argparse.Namespace) -> int:
    """Recompute the certificate and write the page in one step."""
    from convexbn.cli.data_sources import judge_again, read_model
    from convexbn.cli.model_page import Subject
    from convexbn.cli.model_page import report as written
    from convexbn.estimators.path import load_path
    from convexbn.files.atomic import write_atomically

    out = options.out or str(Path(options.file).with_suffix(".html"))
    check_writable(out)
    if os.path.realpath(out) in map(os.path.realpath, (options.file, options.data)):
        raise ValueError(f"--out {out} would replace what the report is about; name another file.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("report draws with matplotlib: pip install 'convexbn[plot]'.") from error
    model = read_model(options.file)
    points = [] if options.path is None else load_path(options.path)
    rows, proof, same = judge_again(model, options)
    names = feature_names(model) if rows.columns is None else rows.columns.inputs
    subject = Subject(
        name=Path(options.file).name, model=model, certificate=proof, data=rows.description["data"],
        X=rows.X_train, y=rows.y_train, X_test=rows.X_test, y_test=rows.y_test,
        feature_names=names, target=rows.description["target"], own_rows=same,
    )  # fmt: skip
    write_atomically(out, written(subject, points))
    print(f"page: {out}")
    return 0
