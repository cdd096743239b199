"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Options of a convolution, and its poolings by their names here.
_OF_FILTERS = ("stride", "padding", "pool", "regions", "image")
_POOLING = {"avg": "average", "max": "max"}


class Names:
    """Choices that are imported when a command is parsed or explained: they need numpy."""

    def __init__(self, module: str, function: str) -> None:
        self.module, self.function = module, function

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(importlib.import_module(self.module), self.function)())


def model_parser() -> argparse.ArgumentParser:
    """Options of a command on a saved network: its file, and where rows come from."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("file", metavar="FILE", help="model written by fit, or for certify by torch")
    _add_data(parser)
    return parser


def network_parser() -> argparse.ArgumentParser:
    """Options of training, and where rows come from."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_data(parser)
    option = parser.add_argument
    option("--target", metavar="NAME", help="target column (files only)")
    option("--columns", type=names, metavar="NAME,...", help="features to use (files only), by default all others")
    option("--drop", type=names, metavar="NAME,...", help="columns to leave out (files only)")
    option("--strict", action="store_true", help="refuse text, missing cells and decimal commas in features")
    option("--activation", choices=["gated", "relu"], default="gated")
    losses = Names("convexbn.estimators.parameters", "loss_names")
    option("--loss", choices=losses, metavar="LOSS", help="one of %(choices)s")
    option("--class-weight", choices=["balanced"], help="give all classes the same total weight")
    option("--huber-delta", type=float, metavar="DELTA", help="error from which on huber is linear")
    option("--n-gates", type=int, metavar="P", help="number of gates to draw, 100 by default")
    option("--width", type=int, metavar="M", help="neurons that relu training starts with")
    option("--n-starts", type=int, metavar="N", help="descents of relu training on many rows, then averaged")
    option("--gates", choices=["data", "whitened", "trained"], help="how gates are drawn, trained by default")
    option("--no-linear", dest="linear", action="store_false", help="leave out the gate that is always open")
    option("--no-intercept", dest="fit_intercept", action="store_false", help="leave out the bias of the outputs")
    option("--no-standardize", dest="standardize", action="store_false", help="directions of columns in their units")
    option(
        "--spectral-filter", type=auto_or_none_or_float, default="auto", metavar="TAU",
        help="relative singular value below which directions shrink, none, or auto",
    )  # fmt: skip
    option("--filter", type=int, metavar="SIZE", help="convolve images with filters of SIZE x SIZE pixels")
    option("--stride", type=int, metavar="PIXELS", help="distance between places of the filters, 1 by default")
    option("--padding", type=int, metavar="PIXELS", help="zeros around the images")
    option("--pool", choices=list(_POOLING), help="average (the default) or maximum of a region")
    option("--regions", type=_regions, metavar="G", help="pool G x G regions, 1 by default, or all: every place")
    option("--image", type=_image_shape, metavar="HxWxC", help="shape of the images of a file, such as 28x28x1")
    option("--tol", type=float, default=1e-6, help="relative gap that counts as optimal")
    option("--max-iter", type=int, metavar="N")
    option("--time-limit", type=float, metavar="SECONDS", help="for the whole fit")
    option("--proof-time", type=float, metavar="SECONDS", help="for the bounds over all patterns (relu)")
    option("--task", choices=["auto", "classification", "regression"], default="auto")
    option("--seed", type=int, default=0, help="of the split and the gates")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="DATA", help="digits, fashion-mnist, cifar-10, or a .csv, .csv.gz, .parquet, .npz file"
    )
    parser.add_argument(
        "--decimal", choices=[",", "."], help="decimal mark of a text file, if it can be read both ways"
    )
    parser.add_argument("--data-home", metavar="DIR", help="folder of the files of fashion-mnist or cifar-10")


def names(text: str) -> list[str]:
    """Names between commas."""
    return text.split(",")


def _regions(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of regions or all")
    return text if text == "all" else int(text)


def _image_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 28x28x1") from None


def estimator_from(options: argparse.Namespace, task: str, image_shape: tuple[int, ...] | None, **others: Any) -> Any:
    """Estimator of a task, with the options that are its parameters.

    Parameters
    ----------
    options : Namespace
        Options of ``network_parser`` and of the command.
    task : {"classification", "regression"}
    image_shape : tuple of int or None
        Shape of the rows, if they are known to be images.
    **others
        Parameters that are not options.
    """
    from convexbn.estimators.classifier import ConvexBNClassifier
    from convexbn.estimators.regressor import ConvexBNRegressor

    if options.class_weight is not None and task == "regression":
        raise ValueError("--class-weight is for classification, and this is regression.")
    if options.huber_delta is not None and (options.loss != "huber" or task != "regression"):
        raise ValueError("--huber-delta is for --loss huber, which is for regression.")
    _check_loss(options.loss, task)
    estimator: Any = ConvexBNClassifier() if task == "classification" else ConvexBNRegressor()
    known, layer = estimator.get_params(), _convolution(options, image_shape)
    given = {name: value for name, value in vars(options).items() if name in known and value is not None}
    given["spectral_filter"] = None if options.spectral_filter == "none" else options.spectral_filter
    estimator.set_params(**given, convolution=layer, random_state=options.seed, **others)
    with in_words_of_options():
        estimator._validate_params()
    if unused := estimator._unused:
        other = "gated" if options.activation == "relu" else "relu"
        raise ValueError(f"--{unused[0].replace('_', '-')} is for --activation {other}: leave it out, or change that.")
    return estimator


@contextmanager
def in_words_of_options(**renamed: str) -> Iterator[None]:
    """Context in which refusals of parameters name options.

    Parameters
    ----------
    **renamed : str
        Options by their parameters, where they have another name.
    """
    renamed = {"random_state": "seed", **renamed}
    try:
        yield
    except ValueError as error:
        found = re.fullmatch(r"(?:The '(\w+)' parameter of \w+|(weight_decays)) must be (.*)", str(error))
        if found is None:
            raise
        name = found[1] or found[2]
        valid = re.sub(r"(, an instance of '[^']*')| or None(?=\.)", "", found[3])
        valid = re.sub(r", (?=a float [^,]*, [^,]*$)", " or ", valid)
        raise ValueError(f"--{renamed.get(name, name.replace('_', '-'))} must be {valid}") from error


def _check_loss(loss: str | None, task: str) -> None:
    """Refuse a loss of the other task."""
    from convexbn.estimators.parameters import loss_names

    if loss is not None and loss not in loss_names(task):
        other = "regression" if task == "classification" else "classification"
        raise ValueError(
            f"--loss {loss} is for {other}, and this is {task}: choose among {', '.join(loss_names(task))}, or give "
            f"--task {other}."
        )


def _convolution(options: argparse.Namespace, shape: tuple[int, ...] | None) -> Any:
    """Convolutional layer of the options; None without ``--filter``."""
    from convexbn.data.convolution import Convolution

    given = {name: value for name in _OF_FILTERS if (value := getattr(options, name)) is not None}
    if options.filter is None:
        if given:
            raise ValueError(f"--{next(iter(given))} is for convolutions: give --filter SIZE with it.")
        return None
    shape = given.pop("image", shape)
    if shape is None:
        raise ValueError("--filter needs the shape of the images: give --image, such as --image 28x28x1.")
    pooling = _POOLING[given.pop("pool", "avg")]
    return Convolution(options.filter, pooling=pooling, input_shape=shape, **given)


def auto_or_float(text: str) -> str | float:
    """A number, or ``auto``."""
    return text if text == "auto" else _number(text, "a number or auto")


def auto_or_none_or_float(text: str) -> str | float:
    """A number, ``auto`` or ``none``."""
    return text if text in ("auto", "none") else _number(text, "a number, none or auto")


def rank(text: str) -> int | float:
    """A number of directions, or a share."""
    return int(text) if text.isdigit() else _number(text, "a number of directions such as 50, or a share such as 0.95")


def _number(text: str, valid: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {valid}") from None


def ranks(text: str) -> list[int | float | None]:
    """Numbers of directions, shares, or ``all``, between commas."""
    return [None if part == "all" else rank(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    """Numbers between commas."""
    return [_number(part, "a number") for part in text.split(",")]
