"""The convolutional layer as a user describes it."""

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
    """A convolution, its batch norm over all locations, and pooling: the first layer of a network on images or signals.

    Parameters
    ----------
    kernel_size : int or tuple of int
        Size of the filters; a number is for every dimension.
    stride, padding : int or tuple of int
        Distance of the filters' places, and zeros around the input.
    pooling : {"average", "max"}, default="average"
        What is kept of a region of locations.
    regions : int, tuple of int or "all", default=1
        Regions in each dimension, as torch's adaptive pooling divides the locations: 1 is global pooling, ``(4, 4)``
        a grid of 16, and ``"all"`` a flattened layer, every location a region. The output layer has weights for each.
    input_shape : tuple of int, optional
        ``(height, width, channels)`` of an image or ``(length, channels)`` of a signal. Inputs of that many axes have
        it themselves; flattened rows, the channels of a pixel side by side, need it.
    channels : {"last", "first"}, default="last"
        Where the channels are in ``input_shape`` and in inputs of several axes.

    Raises
    ------
    ValueError
        When a number does not fit.

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
            if name == "regions" and value == "all":
                continue
            if not _are_integers(_items(value), least):
                raise ValueError(f"{name} must be an integer from {least}, or one a dimension; got {value!r}.")
        if self.input_shape is not None:
            shape = _items(self.input_shape)
            if len(shape) not in (2, 3) or not _are_integers(shape, 1):
                raise ValueError(
                    f"input_shape must have 2 integers (signals) or 3 (images) from 1, got {self.input_shape!r}."
                )
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
        image = (1, sizes[0], channels) if len(sizes) == 1 else (sizes[0], sizes[1], channels)
        return Geometry(
            image, self._both("kernel_size", 1), self._both("stride", 1), self._both("padding", 0), len(sizes)
        )

    @property
    def pool(self) -> Regions:
        """Regions of the locations that are pooled."""
        locations = self.geometry.locations
        grid = locations if self.regions == "all" else self._both("regions", 1)
        if any(parts > size for parts, size in zip(grid, locations, strict=True)):
            raise ValueError(f"regions={self.regions} are more than the {locations} locations of the filters.")
        return Regions(locations, grid)

    def rows(self, X: Any) -> FloatMatrix:
        """Inputs of several axes as rows (n, features) with the channels of a pixel side by side.

        Raises
        ------
        ValueError
            When the shape is not that of ``input_shape``.
        """
        X = np.asarray(X)
        flat = (self.geometry.n_features,)
        if X.shape[1:] not in (self._shape, flat):
            raise ValueError(f"X must have shape (n, {', '.join(map(str, self._shape))}), got {X.shape}.")
        if X.shape[1:] == flat:
            flattened: FloatMatrix = X
        else:
            flattened = (X if self.channels == "last" else np.moveaxis(X, 1, -1)).reshape(len(X), *flat)
        return flattened

    def for_inputs(self, X: Any) -> Convolution:
        """The same layer with the shape of inputs of several axes, where it has none."""
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
        """Values down and across; a signal has no height."""
        given = _items(getattr(self, name))
        values = given * self.dimensions if len(given) == 1 else given
        if len(values) != self.dimensions:
            raise ValueError(f"{name} must have {self.dimensions} numbers for this input_shape, got {given}.")
        return (neutral, values[0]) if self.dimensions == 1 else (values[0], values[1])


def _are_integers(values: tuple[Any, ...], least: int) -> bool:
    return all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v >= least for v in values)


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
