"""``convexbn report``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from convexbn.cli.options import data_parser, file_parser
from convexbn.cli.output import check_writable, feature_names, quiet


def add_parser(commands: Any) -> None:
    """Options of ``report``."""
    tell = commands.add_parser(
        "report", parents=[file_parser(), data_parser()], help="write one HTML page on a saved network and its data"
    )
    tell.set_defaults(command=report)
    tell.add_argument("--out", metavar="HTML", help="by default the name of FILE with .html")
    tell.add_argument("--target", metavar="NAME", help="target column, by default that of the training")
    tell.add_argument("--path", metavar="CHECKPOINT", help="of the path that the network was chosen from, to draw it")
    tell.add_argument("--time-limit", type=float, metavar="SECONDS", help="for the bounds over all patterns (relu)")


def report(options: argparse.Namespace) -> int:
    """``convexbn report``: the certificate is recomputed, the page written in one step."""
    from convexbn.cli.model_page import report as written
    from convexbn.estimators import load
    from convexbn.files.atomic import write_atomically

    out = options.out or str(Path(options.file).with_suffix(".html"))
    check_writable(out)
    if os.path.realpath(out) in map(os.path.realpath, (options.file, options.data)):
        raise ValueError(f"--out {out} would replace what the report is about; name another file.")
    _check_matplotlib()
    model = load(options.file)
    points = [] if options.path is None else _points(options.path)
    write_atomically(out, written(_subject(model, options), points))
    print(f"page: {out}")
    return 0


def _subject(model: Any, options: argparse.Namespace) -> Any:
    """Rows of the training, and those held out from it, judged again."""
    from convexbn.cli.data_sources import read_data, split
    from convexbn.cli.model_page import Subject

    made = dict(getattr(model, "source_", {}))
    names = feature_names(model)
    data = read_data(
        options.data, options.target or made.get("target"),
        data_home=options.data_home, features=names, need_target=True,
    )  # fmt: skip
    known = made.get("data") == data.name
    rows = split(
        data, made["test_size"] if known else 0.0, made["seed"] if known else 0,
        task="classification" if hasattr(model, "classes_") else "regression",
    )  # fmt: skip
    X, y = rows.X_train, rows.y_train
    model.time_limit = options.time_limit
    with quiet():
        proof = model.certify(X, y)
    return Subject(
        name=Path(options.file).name, model=model, certificate=proof, data=data.name, X=X, y=y,
        X_test=rows.X_test, y_test=rows.y_test, feature_names=names, target=data.target,
        own_rows=model.fingerprint(X, y) == model.fingerprint_,
    )  # fmt: skip


def _points(file: str) -> list[Any]:
    from convexbn.estimators.path import load_path

    return load_path(file)


def _check_matplotlib() -> None:
    """Refuse, before any work, where nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("report draws with matplotlib: pip install 'convexbn[plot]'.") from error
