"""Arguments that several commands take, and the types of their values."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

#: Options that a convolution has, and what pools a region by its name here.
_OF_FILTERS = ("stride", "padding", "pool", "regions", "image")
_POOLING = {"avg": "average", "max": "max"}


class Names:
    """Choices that are read when a command is parsed or explained, since they take numpy to import."""

    def __init__(self, module: str, function: str) -> None:
        self.module, self.function = module, function

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(importlib.import_module(self.module), self.function)())

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)


def data_parser() -> argparse.ArgumentParser:
    """Where rows come from."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "data", metavar="DATA", help="digits, fashion-mnist, cifar-10, or a .csv, .parquet or .npz file"
    )
    parser.add_argument("--data-home", metavar="DIR", help="folder of the files of fashion-mnist or cifar-10")
    return parser


def network_parser() -> argparse.ArgumentParser:
    """Options of training."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--target", metavar="NAME", help="target column (files only)")
    parser.add_argument("--activation", choices=["gated", "relu"], default="gated")
    losses = Names("convexbn.program.losses", "losses_for")
    parser.add_argument("--loss", choices=losses, default="squared", metavar="LOSS", help="one of %(choices)s")
    parser.add_argument("--huber-delta", type=float, metavar="DELTA", help="error from which on huber is linear")
    parser.add_argument("--n-gates", type=int, default=100, metavar="P")
    parser.add_argument("--width", type=int, metavar="M", help="neurons that relu training starts with")
    parser.add_argument(
        "--n-starts",
        type=int,
        default=1,
        metavar="N",
        help="descents of relu training on many rows, of which it takes the mean",
    )
    parser.add_argument("--gates", choices=["data", "whitened", "trained"], default="data")
    parser.add_argument(
        "--spectral-filter", type=float, metavar="TAU", help="shrink directions below TAU of the largest singular value"
    )
    _add_convolution(parser)
    parser.add_argument("--tol", type=float, default=1e-6, help="relative gap that counts as optimal")
    parser.add_argument("--max-iter", type=int, metavar="N")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS")
    parser.add_argument("--task", choices=["auto", "classification", "regression"], default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the gates")
    return parser


def _add_convolution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--filter", type=int, metavar="SIZE", help="convolve images with filters of SIZE x SIZE pixels")
    parser.add_argument("--stride", type=int, metavar="PIXELS", help="distance of the filters' places, 1 by default")
    parser.add_argument("--padding", type=int, metavar="PIXELS", help="zeros around the images")
    parser.add_argument("--pool", choices=list(_POOLING), help="average (the default) or maximum of a region")
    parser.add_argument(
        "--regions",
        type=_regions,
        metavar="G",
        help="pool G x G regions of an image, one by default, or all: every place",
    )
    parser.add_argument(
        "--image", type=_image_shape, metavar="HxWxC", help="shape of the images of a file, such as 28x28x1"
    )


def convolution(options: argparse.Namespace, shape: tuple[int, ...] | None) -> Any:
    """The convolutional layer that was asked for; None without ``--filter``."""
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


def _regions(text: str) -> int | str:
    return text if text == "all" else int(text)


def _image_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 28x28x1") from None


def estimator_from(options: argparse.Namespace, task: str, image_shape: tuple[int, ...] | None, **others: Any) -> Any:
    """The estimator of a task with the options that are its parameters.

    Parameters
    ----------
    options : Namespace
        Of ``network_parser``, and options of the command that are called as parameters.
    task : {"classification", "regression"}
    image_shape : tuple of int or None
        Of the rows, where they are known to be images.
    **others
        Parameters that are no options.
    """
    from convexbn.estimators.classifier import ConvexBNClassifier
    from convexbn.estimators.regressor import ConvexBNRegressor

    if options.huber_delta is not None and (options.loss != "huber" or task != "regression"):
        raise ValueError("--huber-delta is for --loss huber, which is for regression.")
    estimator: Any = ConvexBNClassifier() if task == "classification" else ConvexBNRegressor()
    known = estimator.get_params()
    given = {name: value for name, value in vars(options).items() if name in known and value is not None}
    return estimator.set_params(
        **given, convolution=convolution(options, image_shape), random_state=options.seed, **others
    )


def file_parser() -> argparse.ArgumentParser:
    """A file with a network."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("file", metavar="FILE", help="model written by fit, or for certify by torch")
    return parser


def auto_or_float(text: str) -> str | float:
    """A number, or ``auto``."""
    return text if text == "auto" else float(text)


def rank(text: str) -> int | float:
    """A number of directions, or a share."""
    return int(text) if text.isdigit() else float(text)


def ranks(text: str) -> list[int | float | None]:
    """Numbers of directions, shares, or ``all``, between commas."""
    return [None if part == "all" else rank(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(part) for part in text.split(",")]
