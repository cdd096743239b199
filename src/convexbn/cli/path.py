"""``convexbn path``."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from convexbn.cli.options import estimator_from, floats, in_words_of_options, network_parser, ranks
from convexbn.cli.output import (
    Terminated,
    broken_off,
    check_model_name,
    check_writable,
    measure_of,
    number,
    numbers,
)

#: Endings of pictures.
_PICTURES = (".png", ".svg", ".pdf")


def add_parser(commands: Any) -> None:
    """Options of ``path``."""
    many = commands.add_parser(
        "path", parents=[network_parser()], help="train over many weight decays and ranks, each point certified"
    )
    many.set_defaults(command=path)
    many.add_argument("--weight-decays", type=floats, metavar="B,...", help="by default 20 from the largest useful on")
    many.add_argument("--ranks", type=ranks, metavar="K,...", help="directions or shares to keep, or all")
    many.add_argument(
        "--validation-size", type=float, default=0.2, metavar="SHARE", help="of the training rows, to score on; 0: none"
    )
    many.add_argument("--checkpoint", metavar="FILE", help="keep finished points here, and go on from them")
    many.add_argument("--out", metavar="FILE", help="model of the highest score to write, .safetensors")
    many.add_argument("--plot", metavar="FILE", help="draw gap, neurons and score: .png, .svg or .pdf")
    many.add_argument("--plot-spectrum", metavar="FILE", help="draw what the best point uses of the spectrum")
    many.add_argument("--json", action="store_true", help="print one JSON object a point")


def path(options: argparse.Namespace) -> int:
    """Print one line a point, each certified; with a checkpoint finished points outlive an interruption."""
    from convexbn.cli.data_sources import read_columns, split
    from convexbn.estimators.path import fit_path

    _check_path_options(options)
    data = read_columns(options)
    rows = split(data, options.validation_size, options.seed, task=options.task)
    model = estimator_from(options, rows.task, data.image_shape)
    with in_words_of_options(rank="ranks"):
        points = fit_path(
            model, rows.X_train, rows.y_train,
            weight_decays=options.weight_decays, ranks=options.ranks, checkpoint=options.checkpoint,
            validation=(rows.X_test, rows.y_test) if options.validation_size else None,
        )  # fmt: skip
    printed = 0
    try:
        for printed, point in enumerate(points, start=1):
            print(_json(point, rows.task) if options.json else _point(point, f"{printed}/{len(points)}"), flush=True)
    except (KeyboardInterrupt, Terminated) as signalled:
        kept = "; with --checkpoint FILE they would have been kept"
        if options.checkpoint is not None:
            kept = f" and in {options.checkpoint}: the same command goes on from there"
        return broken_off(signalled, f"{printed} of {len(points)} points are finished{kept}")
    chosen = points.best if options.validation_size else points.points[-1]
    if options.out is not None:
        rows.describe(chosen.model)
        chosen.model.save(options.out)
    _draw_path(points.points, chosen.model, rows.X_train, options)
    if options.validation_size and not options.json:
        saved = "" if options.out is None else f", saved to {options.out}"
        print(f"best: {rows.told}   {_point(chosen, 'the first of the highest score')}{saved}")
    return 0


def _check_path_options(options: argparse.Namespace) -> None:
    """Refuse options that would fail after the work."""
    if options.out is not None:
        check_model_name(options.out)
    for name in ("checkpoint", "plot", "plot_spectrum"):
        if getattr(options, name) is not None:
            check_writable(getattr(options, name), f"--{name.replace('_', '-')}")
    if options.out is not None and not options.validation_size:
        raise ValueError("--out writes the best point, which takes rows to choose it by: give --validation-size.")
    for file in filter(None, (options.plot, options.plot_spectrum)):
        if Path(file).suffix not in _PICTURES:
            raise ValueError(f"{file!r} is no name of a picture: let it end in {', '.join(_PICTURES)}.")
        import matplotlib

        matplotlib.use("agg")


def _json(point: Any, task: str) -> str:
    """JSON object of a point."""
    result = {"weight_decay": point.weight_decay, "rank": point.model.rank_, "n_neurons": point.network.n_neurons}
    result |= numbers(point.certificate, "objective", "lower_bound", "relative_gap")
    score = None if point.score is None else number(point.score)
    result |= {"status": point.certificate.status.value, "score": score}
    return json.dumps(result | {"task": task, "measure": measure_of(task)})


def _point(point: Any, place: str) -> str:
    """Line on a point."""
    proof, scored = point.certificate, "" if point.score is None else f"   score {point.score:.4f}"
    told = f"{place}   weight decay {point.weight_decay:.4g}   rank {point.model.rank_}   {proof.status.value}"
    return f"{told}   gap {proof.relative_gap:.1e}   {point.network.n_neurons} neurons{scored}"


def _draw_path(points: list[Any], model: Any, X: Any, options: argparse.Namespace) -> None:
    """Draw the path, and the share of the spectrum that one model uses."""
    from convexbn.estimators.display import PathDisplay, SpectrumDisplay
    from convexbn.files.atomic import write_atomically

    for file, display in (
        (options.plot, lambda: PathDisplay(points)),
        (options.plot_spectrum, lambda: SpectrumDisplay.from_estimator(model, X)),
    ):
        if file is not None:
            picture = io.BytesIO()
            display().plot().figure_.savefig(picture, format=Path(file).suffix[1:], dpi=150)
            write_atomically(file, picture.getvalue())
