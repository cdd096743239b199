"""Convolutional first layer, as a user describes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._types import FloatMatrix
from convexbn.data.patches import Geometry
from convexbn.data.pooling import Regions

#: A number, or one for each dimension.
Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """First layer of a network on images or signals: convolution, batch norm over all locations, and pooling.

    Parameters
    ----------
    kernel_size : int or tuple of int
        Size of the filters, in all dimensions or in each.
    stride, padding : int or tuple of int
        Distance of the filters' places, and zeros around the input.
    pooling : {"average", "max"}, default="average"
        Whether the average or the maximum of a region of locations is kept.
    regions : int, tuple of int or "all", default=1
        Regions in each dimension, as torch's adaptive pooling divides the locations: 1 is global pooling, ``(4, 4)`` a
        grid of 16, and ``"all"`` a flattened layer, every location a region. The output layer has weights for each.
    input_shape : tuple of int, optional
        ``(height, width, channels)`` of an image or ``(length, channels)`` of a signal. Flattened rows, the channels of
        a pixel side by side, need it; inputs of several axes have it themselves.
    channels : {"last", "first"}, default="last"
        Where the channels are in ``input_shape`` and in inputs of several axes.

    Raises
    ------
    ValueError
        If an argument is not valid, or does not fit the input shape.

    Examples
    --------
    >>> layer = Convolution(5, regions=4, input_shape=(28, 28, 1))
    >>> layer.geometry.n_locations, layer.geometry.patch_size, layer.pool.n_regions
    (576, 25, 16)
    """

    kernel_size: Sizes
    stride: Sizes = 1
    padding: Sizes = 0
    pooling: str = "average"
    regions: Sizes | str = 1
    input_shape: tuple[int, ...] | None = None
    channels: str = "last"

    def __post_init__(self) -> None:
        if self.pooling not in ("average", "max"):
            raise ValueError(f"pooling must be 'average' or 'max', got {self.pooling!r}.")
        if self.channels not in ("last", "first"):
            raise ValueError(f"channels must be 'last' or 'first', got {self.channels!r}.")
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("regions", 1)):
            value = getattr(self, name)
            if (name, value) != ("regions", "all") and not _are_integers(_items(value), least):
                raise ValueError(f"{name} must be an integer from {least}, or one a dimension; got {value!r}.")
        if self.input_shape is not None:
            shape = _items(self.input_shape)
            if len(shape) not in (2, 3) or not _are_integers(shape, 1):
                raise ValueError(f"input_shape must have 2 (signals) or 3 (images) integers from 1, got {shape}.")
            object.__setattr__(self, "input_shape", tuple(int(size) for size in shape))
            _ = self.pool

    @property
    def dimensions(self) -> int:
        """1 for signals, 2 for images."""
        return len(self._shape) - 1

    @property
    def geometry(self) -> Geometry:
        """Places of the patches."""
        *sizes, channels = self._shape if self.channels == "last" else (*self._shape[1:], self._shape[0])
        height, width = (1, *sizes)[-2:]
        kernel, stride, padding = self._both("kernel_size", 1), self._both("stride", 1), self._both("padding", 0)
        return Geometry((height, width, channels), kernel, stride, padding, len(sizes))

    @property
    def pool(self) -> Regions:
        """Regions of the locations over which the layer pools."""
        locations = self.geometry.locations
        grid = locations if self.regions == "all" else self._both("regions", 1)
        if any(parts > size for parts, size in zip(grid, locations, strict=True)):
            raise ValueError(f"regions={self.regions} are more than the {locations} locations of the filters.")
        return Regions(locations, grid)

    def rows(self, X: Any) -> FloatMatrix:
        """Inputs of the ``input_shape`` as rows (n, features), with the channels of a pixel side by side."""
        X = np.asarray(X)
        flat = (self.geometry.n_features,)
        if X.shape[1:] not in (self._shape, flat):
            raise ValueError(f"X must have shape (n, {', '.join(map(str, self._shape))}), got {X.shape}.")
        if X.ndim > 2 and self.channels == "first":
            X = np.moveaxis(X, 1, -1)
        return X.reshape(len(X), *flat)

    def for_inputs(self, X: Any) -> Convolution:
        """Layer with the shape of inputs of several axes as ``input_shape``, unless it has one."""
        shape = np.shape(X)[1:]
        if self.input_shape is not None:
            return self
        if len(shape) not in (2, 3):
            raise ValueError(
                "the rows of X do not tell the shape of an image: give Convolution an input_shape, or X the shape "
                "(n, height, width, channels)."
            )
        return replace(self, input_shape=tuple(int(size) for size in shape))

    @property
    def _shape(self) -> tuple[int, ...]:
        if self.input_shape is None:
            raise ValueError("the layer does not know the shape of its inputs: give input_shape.")
        return self.input_shape

    def _both(self, name: str, neutral: int) -> tuple[int, int]:
        """Values down and across; a signal is of height 1, where the value is ``neutral``."""
        given = _items(getattr(self, name))
        values = given * self.dimensions if len(given) == 1 else given
        if len(values) != self.dimensions:
            raise ValueError(f"{name} must have {self.dimensions} numbers for this input_shape, got {given}.")
        down, across = (neutral, *values)[-2:]
        return down, across


def _are_integers(values: tuple[Any, ...], least: int) -> bool:
    return all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v >= least for v in values)


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
