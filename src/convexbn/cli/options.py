"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
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
    option("--activation", choices=["gated", "relu"], default="gated")
    losses = Names("convexbn.program.losses", "losses_for")
    option("--loss", choices=losses, default="squared", metavar="LOSS", help="one of %(choices)s")
    option("--huber-delta", type=float, metavar="DELTA", help="error from which on huber is linear")
    option("--n-gates", type=int, default=100, metavar="P")
    option("--width", type=int, metavar="M", help="neurons that relu training starts with")
    option("--n-starts", type=int, default=1, metavar="N", help="descents of relu training on many rows, then averaged")
    option("--gates", choices=["data", "whitened", "trained"], default="data")
    option("--spectral-filter", type=float, metavar="TAU", help="relative singular value below which directions shrink")
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
    parser.add_argument("data", metavar="DATA", help="digits, fashion-mnist, cifar-10, or a .csv, .parquet, .npz file")
    parser.add_argument("--data-home", metavar="DIR", help="folder of the files of fashion-mnist or cifar-10")


def _regions(text: str) -> int | str:
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

    if options.huber_delta is not None and (options.loss != "huber" or task != "regression"):
        raise ValueError("--huber-delta is for --loss huber, which is for regression.")
    estimator: Any = ConvexBNClassifier() if task == "classification" else ConvexBNRegressor()
    known, layer = estimator.get_params(), _convolution(options, image_shape)
    given = {name: value for name, value in vars(options).items() if name in known and value is not None}
    return estimator.set_params(**given, convolution=layer, random_state=options.seed, **others)


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
