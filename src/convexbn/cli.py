"""The command line: ``convexbn fit | predict | certify | path``."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from convexbn import __version__

INTERRUPTED, TERMINATED = 130, 143
_TERMINATION = "terminated", TERMINATED

#: Pictures that can be drawn.
_PICTURES = (".png", ".svg", ".pdf")

_LOSSES = ["squared", "logistic", "cross_entropy", "MSELoss", "BCEWithLogitsLoss", "CrossEntropyLoss"]

#: Options of ``certify`` for what the file of a model holds itself.
_QUESTION = ("loss", "weight_decay", "optimizer_decay", "eps", "tol")


class _Terminated(BaseException):
    """SIGTERM arrived."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()  # closed by `>&-`
    options = _parser().parse_args(arguments)
    in_main = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _say("interrupted: nothing was written.", INTERRUPTED)
    except _Terminated:
        return _say("terminated: nothing was written.", TERMINATED)
    except BrokenPipeError:  # `convexbn ... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        return _say(f"error: {error}", 1)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, former)


def fit(options: argparse.Namespace) -> int:
    """``convexbn fit``: train, judge, save."""
    from convexbn.progress import reporter
    from convexbn.sources import estimator_for, read_source

    _check_writable(options.out)
    source = read_source(options.data, options.target, data_home=options.data_home)
    split = source.split(options.test_size, options.seed, task=options.task)
    started = time.perf_counter()
    with reporter(sys.stderr) as report:
        model = estimator_for(split.task)(
            activation=options.activation,
            loss=options.loss,
            weight_decay=options.weight_decay,
            n_gates=options.n_gates,
            width=options.width,
            gates=options.gates,
            rank=options.rank,
            spectral_filter=options.spectral_filter,
            convolution=_convolution(options, source.image_shape),
            tol=options.tol,
            max_iter=options.max_iter,
            time_limit=options.time_limit,
            random_state=options.seed,
            callback=report,
        )
        with _quiet():
            model.fit(split.X_train, split.y_train)
    seconds = time.perf_counter() - started
    model.source_ = split.description
    model.save(options.out)
    result = _result(model, split, seconds)
    print(json.dumps(result) if options.json else _summary(result, model.certificate_.sentence, options.out))
    return 0


def path(options: argparse.Namespace) -> int:
    """``convexbn path``: one line a point, each certified; finished points outlive an interruption."""
    from convexbn.path import fit_path
    from convexbn.sources import estimator_for, read_source

    _check_path_options(options)
    source = read_source(options.data, options.target, data_home=options.data_home)
    split = source.split(options.validation_size, options.seed, task=options.task)
    model = estimator_for(split.task)(
        activation=options.activation,
        loss=options.loss,
        n_gates=options.n_gates,
        width=options.width,
        gates=options.gates,
        spectral_filter=options.spectral_filter,
        convolution=_convolution(options, source.image_shape),
        tol=options.tol,
        max_iter=options.max_iter,
        time_limit=options.time_limit,
        random_state=options.seed,
    )
    points = fit_path(
        model, split.X_train, split.y_train,
        weight_decays=options.weight_decays, ranks=options.ranks, checkpoint=options.checkpoint,
        validation=(split.X_test, split.y_test) if options.validation_size else None,
    )  # fmt: skip
    printed = 0
    try:
        for printed, point in enumerate(points, start=1):
            print(_point(point, f"{printed}/{len(points)}", as_json=options.json), flush=True)
    except (KeyboardInterrupt, _Terminated) as signalled:
        return _say(*_broken_off(signalled, printed, len(points), options.checkpoint))
    chosen = points.best if options.validation_size else points.points[-1]
    if options.out is not None:
        chosen.model.source_ = split.description
        chosen.model.save(options.out)
    _draw_path(points.points, chosen.model, split.X_train, options)
    if options.validation_size and not options.json:
        saved = "" if options.out is None else f", saved to {options.out}"
        print(f"best: {_point(chosen, 'the first of the highest score', as_json=False)}{saved}")
    return 0


def _check_path_options(options: argparse.Namespace) -> None:
    """Refuse, before any work, what would fail after it."""
    for name in ("checkpoint", "out", "plot", "plot_spectrum"):
        if getattr(options, name) is not None:
            _check_writable(getattr(options, name), f"--{name.replace('_', '-')}")
    if options.out is not None and not options.validation_size:
        raise ValueError("--out writes the best point, which takes rows to choose it by: give --validation-size.")
    for file in filter(None, (options.plot, options.plot_spectrum)):
        if Path(file).suffix not in _PICTURES:
            raise ValueError(f"{file!r} is no name of a picture: let it end in {', '.join(_PICTURES)}.")
        import matplotlib

        matplotlib.use("agg")


def _point(point: Any, place: str, *, as_json: bool) -> str:
    """A line on one point of a path."""
    proof, model = point.certificate, point.model
    if as_json:
        numbers = {"weight_decay": point.weight_decay, "rank": model.rank_, "n_neurons": point.network.n_neurons}
        values = {name: _number(getattr(proof, name)) for name in ("objective", "lower_bound", "relative_gap")}
        score = None if point.score is None else _number(point.score)
        return json.dumps(numbers | values | {"status": proof.status.value, "score": score})
    scored = "" if point.score is None else f"   score {point.score:.4f}"
    return (
        f"{place}   weight decay {point.weight_decay:.4g}   rank {model.rank_}   {proof.status.value}   "
        f"gap {proof.relative_gap:.1e}   {point.network.n_neurons} neurons{scored}"
    )


def _broken_off(signalled: BaseException, finished: int, total: int, checkpoint: str | None) -> tuple[str, int]:
    """What is kept of a path, how to go on, and the exit code."""
    kept = "; with --checkpoint FILE they would have been kept"
    if checkpoint is not None:
        kept = f" and in {checkpoint}: the same command goes on from there"
    word, code = ("interrupted", INTERRUPTED) if isinstance(signalled, KeyboardInterrupt) else _TERMINATION
    return f"{word}: {finished} of {total} points are finished{kept}.", code


def _draw_path(points: list[Any], model: Any, X: Any, options: argparse.Namespace) -> None:
    """Pictures of the path, and of what one model uses of the spectrum."""
    from convexbn.container import write_atomically
    from convexbn.display import PathDisplay, SpectrumDisplay

    for file, display in (
        (options.plot, lambda: PathDisplay(points)),
        (options.plot_spectrum, lambda: SpectrumDisplay.from_estimator(model, X)),
    ):
        if file is not None:
            picture = io.BytesIO()
            display().plot().figure_.savefig(picture, format=Path(file).suffix[1:], dpi=150)
            write_atomically(file, picture.getvalue())


def predict(options: argparse.Namespace) -> int:
    """``convexbn predict``: one line a row of the data."""
    from convexbn.container import write_atomically
    from convexbn.sources import read_source
    from convexbn.storage import load

    if options.out is not None:
        _check_writable(options.out)
    model = load(options.file)
    source = read_source(options.data, None, data_home=options.data_home, features=_feature_names(model))
    rows = source.X if source.X_test is None else source.X_test
    lines = ["prediction", *(_cell(value) for value in model.predict(rows))]
    text = "".join(f"{line}\n" for line in lines)
    if options.out is None:
        sys.stdout.write(text)
    else:
        write_atomically(options.out, text.encode())
    return 0


def certify(options: argparse.Namespace) -> int:
    """``convexbn certify``: a model of ``fit``, or a network that torch trained."""
    from convexbn.checkpoints import is_checkpoint

    return _certify_checkpoint(options) if is_checkpoint(options.file) else _certify_model(options)


def _certify_model(options: argparse.Namespace) -> int:
    """Take the question from the file, recompute every answer from the data."""
    from convexbn.sources import read_source
    from convexbn.storage import load

    model = load(options.file)
    given = [f"--{name.replace('_', '-')}" for name in _QUESTION if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{given[0]} is for networks that torch trained: the file of a model holds its own.")
    made = dict(getattr(model, "source_", {}))
    target = options.target or made.get("target")
    source = read_source(
        options.data, target, data_home=options.data_home, features=_feature_names(model), need_target=True
    )
    X, y = source.training_rows(made)
    model.time_limit = options.time_limit
    trained_with = model.spectral_filter
    if options.without_filter:
        model.spectral_filter = None
    with _quiet():
        proof = model.certify(X, y)
        same = model.fingerprint(X, y) == model.fingerprint_
    rows = "the rows it was trained on" if same else "OTHER rows than it was trained on (statistics from these)"
    result = {
        "objective": _number(proof.objective),
        "lower_bound": _number(proof.lower_bound),
        "relative_gap": _number(proof.relative_gap),
        "status": proof.status.value,
        "scope": proof.scope,
        "weight_decay_objective": _number(proof.weight_decay_objective),
        "training_rows": same,
        "spectral_filter": model.spectral_filter,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{proof.status.value}, recomputed on {len(X)} rows: {rows}.")
        print(proof.sentence)
        if trained_with is not None:
            judged = "Judged as a plain network, without" if options.without_filter else "Judged with"
            print(f"{judged} the spectral filter of its training, {trained_with:g} of the largest singular value.")
        print(f"objective {proof.objective:.12g}   lower bound {proof.lower_bound:.12g}   ", end="")
        print(f"weight-decay objective of the plain network of neurons {proof.weight_decay_objective:.12g}")
    return 0


def _certify_checkpoint(options: argparse.Namespace) -> int:
    """Take the layers from the file, the question from the options."""
    import numpy as np

    from convexbn.audit import audit
    from convexbn.checkpoints import read_checkpoint
    from convexbn.objective import Objective, TrainedLoss, targets_of_labels
    from convexbn.sources import read_source

    if options.loss is None or (options.weight_decay is None) == (options.optimizer_decay is None):
        raise ValueError(
            "a file of torch does not hold its objective: give --loss, and --weight-decay or --optimizer-decay."
        )
    layers, assumed = read_checkpoint(options.file, eps=options.eps)
    source = read_source(options.data, options.target, data_home=options.data_home, need_target=True)
    assert source.y is not None
    n_outputs = layers.output.shape[1]
    loss = TrainedLoss.of(options.loss, targets_of_labels(options.loss, source.y, n_outputs), n_outputs)
    if options.weight_decay is not None:
        objective = Objective.with_weight_decay(loss, options.weight_decay)
    else:
        objective = Objective.with_optimizer_decay(loss, options.optimizer_decay)
    found = audit(
        layers, np.asarray(source.X, dtype=np.float64), objective,
        tol=1e-6 if options.tol is None else options.tol,
        time_limit=60.0 if options.time_limit is None else options.time_limit,
    )  # fmt: skip
    told = f"{found.status.value}, on {len(source.X)} rows: {found.explanation} {assumed}".rstrip()
    print(json.dumps(_audit(found) | {"assumed": assumed}) if options.json else told)
    return 0


def _audit(found: Any) -> dict[str, Any]:
    numbers = ("objective", "balanced_objective", "lower_bound", "relative_gap", "best_known", "loss", "stored_loss")
    return {name: _number(getattr(found, name)) for name in numbers} | {
        "status": found.status.value,
        "cause": found.cause.value,
        "scope": found.scope,
        "weight_decay": found.weight_decay,
        "n_neurons": found.n_neurons,
        "best_n_neurons": found.best_n_neurons,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convexbn", description="Batch-normalised ReLU networks trained to a certified global optimum."
    )
    parser.add_argument("--version", action="version", version=f"convexbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="fit | predict | certify | path")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("data", metavar="DATA", help="digits, fashion-mnist, cifar-10, or a .csv, .parquet or .npz file")
    data.add_argument("--data-home", metavar="DIR", help="folder of the files of fashion-mnist or cifar-10")

    network = _network_parser()
    train = commands.add_parser(
        "fit", parents=[data, network], help="train a network to a certified optimum and save it"
    )
    train.set_defaults(command=fit)
    train.add_argument("--out", metavar="FILE", required=True, help="model to write, .safetensors")
    train.add_argument("--weight-decay", type=_auto_or_float, default="auto", metavar="BETA", help="or auto")
    train.add_argument("--rank", type=_rank, metavar="K", help="directions to keep, or a share such as 0.95")
    train.add_argument("--test-size", type=float, metavar="SHARE", help="share of the rows to hold out")
    train.add_argument("--json", action="store_true", help="print one JSON object last")

    use = commands.add_parser("predict", help="predict with a saved network", parents=[_file_parser(), data])
    use.set_defaults(command=predict)
    use.add_argument("--out", metavar="CSV", help="write here instead of to standard output")

    judge = commands.add_parser(
        "certify",
        help="recompute objective, bound and gap of a saved network",
        parents=[_file_parser(), data],
    )
    judge.set_defaults(command=certify)
    judge.add_argument("--target", metavar="NAME", help="target column, by default that of the training")
    judge.add_argument("--time-limit", type=float, metavar="SECONDS", help="for the bounds over all patterns (relu)")
    judge.add_argument(
        "--without-filter", action="store_true", help="judge as a plain network, without the model's spectral filter"
    )
    judge.add_argument("--json", action="store_true", help="print one JSON object last")
    trained = judge.add_argument_group("for networks that torch trained (.pt2, state dicts in .pt or .safetensors)")
    trained.add_argument("--loss", choices=_LOSSES, help="summed over rows, or torch's own with its mean")
    trained.add_argument("--weight-decay", type=float, metavar="BETA", help="against the sum of the losses")
    trained.add_argument("--optimizer-decay", type=float, metavar="LAM", help="weight_decay of SGD or Adam")
    trained.add_argument("--eps", type=float, help="of the batch norm of a state dict, by default 1e-5")
    trained.add_argument("--tol", type=float, help="relative gap that counts as optimal, by default 1e-6")

    many = commands.add_parser(
        "path", parents=[data, network], help="train over many weight decays and ranks, each point certified"
    )
    many.set_defaults(command=path)
    many.add_argument("--weight-decays", type=_floats, metavar="B,...", help="by default 20 from the largest useful on")
    many.add_argument("--ranks", type=_ranks, metavar="K,...", help="directions or shares to keep, or all")
    many.add_argument(
        "--validation-size", type=float, default=0.2, metavar="SHARE", help="of the training rows, to score on; 0: none"
    )
    many.add_argument("--checkpoint", metavar="FILE", help="keep finished points here, and go on from them")
    many.add_argument("--out", metavar="FILE", help="model of the highest score to write, .safetensors")
    many.add_argument("--plot", metavar="FILE", help="draw gap, neurons and score: .png, .svg or .pdf")
    many.add_argument("--plot-spectrum", metavar="FILE", help="draw what the best point uses of the spectrum")
    many.add_argument("--json", action="store_true", help="print one JSON object a point")
    return parser


def _network_parser() -> argparse.ArgumentParser:
    """Options of training."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--target", metavar="NAME", help="target column (files only)")
    parser.add_argument("--activation", choices=["gated", "relu"], default="gated")
    parser.add_argument("--loss", choices=["squared", "logistic", "cross_entropy"], default="squared")
    parser.add_argument("--n-gates", type=int, default=100, metavar="P")
    parser.add_argument("--width", type=int, metavar="M", help="neurons that relu training starts with")
    parser.add_argument("--gates", choices=["data", "whitened"], default="data")
    parser.add_argument(
        "--spectral-filter", type=float, metavar="TAU", help="shrink directions below TAU of the largest singular value"
    )
    parser.add_argument("--filter", type=int, metavar="SIZE", help="convolve images with filters of SIZE x SIZE pixels")
    parser.add_argument("--stride", type=int, default=1, metavar="PIXELS", help="distance of the filters' places")
    parser.add_argument("--padding", type=int, default=0, metavar="PIXELS", help="zeros around the images")
    parser.add_argument("--pool", choices=["avg", "max"], default="avg", help="average or maximum of a region")
    parser.add_argument(
        "--regions", type=_regions, default=1, metavar="G", help="pool G x G regions of an image, or all: every place"
    )
    parser.add_argument("--image", metavar="HxWxC", help="shape of the images of a file, such as 28x28x1")
    parser.add_argument("--tol", type=float, default=1e-6, help="relative gap that counts as optimal")
    parser.add_argument("--max-iter", type=int, metavar="N")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS")
    parser.add_argument("--task", choices=["auto", "classification", "regression"], default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the gates")
    return parser


def _file_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("file", metavar="FILE", help="model written by fit, or for certify by torch")
    return parser


def _auto_or_float(text: str) -> str | float:
    return text if text == "auto" else float(text)


def _regions(text: str) -> int | str:
    return text if text == "all" else int(text)


def _convolution(options: argparse.Namespace, shape: tuple[int, ...] | None) -> Any:
    """The convolutional layer that was asked for; None without ``--filter``."""
    from convexbn.convolution import Convolution

    if options.filter is None:
        return None
    if options.image is not None:
        shape = tuple(int(size) for size in options.image.split("x"))
    if shape is None:
        raise ValueError("--filter needs the shape of the images: give --image, such as --image 28x28x1.")
    pooling = {"avg": "average", "max": "max"}[options.pool]
    return Convolution(
        options.filter, stride=options.stride, padding=options.padding, pooling=pooling, regions=options.regions,
        input_shape=shape,
    )  # fmt: skip


def _rank(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _ranks(text: str) -> list[int | float | None]:
    return [None if part == "all" else _rank(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _result(model: Any, split: Any, seconds: float) -> dict[str, Any]:
    proof, network = model.certificate_, model.network_
    has_test = split.X_test is not None
    return {
        "objective": _number(proof.objective),
        "lower_bound": _number(proof.lower_bound),
        "relative_gap": _number(proof.relative_gap),
        "status": proof.status.value,
        "scope": proof.scope,
        "train_score": _number(model.score(split.X_train, split.y_train)),
        "test_score": _number(model.score(split.X_test, split.y_test)) if has_test else None,
        "n_iter": model.n_iter_,
        "seconds": round(seconds, 4),
        "n_neurons": network.n_neurons,
        "n_gates_active": None if network.gate_index is None else len(set(network.gate_index.tolist())),
        "rank": model.rank_,
    }


def _summary(result: dict[str, Any], sentence: str, out: str) -> str:
    test = "none held out" if result["test_score"] is None else _shown(result["test_score"], ".4f")
    return (
        f"{result['status']} ({result['scope']}): {sentence}\n"
        f"objective {_shown(result['objective'], '.9g')}   lower bound {_shown(result['lower_bound'], '.9g')}   "
        f"relative gap {_shown(result['relative_gap'], '.2g')}\n"
        f"train score {_shown(result['train_score'], '.4f')}   test score {test}   {result['n_iter']} iterations in "
        f"{result['seconds']:.2f} s   {result['n_neurons']} neurons   rank {result['rank']}\n"
        f"saved to {out}"
    )


def _shown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> str:
    """One CSV cell a prediction; several outputs are separated by commas."""
    if getattr(value, "ndim", 0):
        return ",".join(repr(float(v)) for v in value)
    text = str(value.item() if hasattr(value, "item") else value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n\r') else text


def _feature_names(model: Any) -> list[str] | None:
    """Columns that the model was trained on, by name, where it knows them."""
    if hasattr(model, "feature_names_in_"):
        return list(model.feature_names_in_)
    names: list[str] | None = getattr(model, "source_", {}).get("feature_names")
    return names


def _check_writable(out: str, option: str = "--out") -> None:
    """Refuse, before any work, a place that cannot be written to."""
    folder = Path(out).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {out}: the folder {folder} does not exist; create it first")
    if Path(out).is_dir():
        raise IsADirectoryError(f"{option} {out} is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{option} {out}: the folder {folder} cannot be written to")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning that the printed sentence repeats."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


def _nowhere() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _say(message: str, code: int) -> int:
    print(f"convexbn: {message}", file=sys.stderr)
    return code
