"""Where the patches of an image lie: its shape, a kernel, strides and padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """Patches of images ``(height, width, channels)``; a signal is an image of height 1.

    Attributes
    ----------
    image : tuple of int
        ``(height, width, channels)``.
    kernel, stride, padding : tuple of int
        Down and across; the padding is of zeros, on both sides.
    dimensions : int
        1 for signals, 2 for images.
    """

    image: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dimensions: int = 2

    def __post_init__(self) -> None:
        if min(self.locations) < 1:
            raise ValueError(
                f"a kernel of {self.kernel[-self.dimensions :]} does not fit into inputs of "
                f"{self.image[-self.dimensions - 1 : -1]} with padding {self.padding[-self.dimensions :]}: "
                "give a smaller kernel_size, or more padding."
            )

    @property
    def locations(self) -> tuple[int, int]:
        """Places of the kernel down and across."""
        rows, columns = (
            (size + 2 * padding - kernel) // stride + 1
            for size, kernel, stride, padding in zip(
                self.image[:2], self.kernel, self.stride, self.padding, strict=True
            )
        )
        return rows, columns

    @property
    def n_locations(self) -> int:
        """Patches of an image, ``Kp``."""
        return int(np.prod(self.locations))

    @property
    def patch_size(self) -> int:
        """Numbers of a patch, ``h``."""
        return int(np.prod(self.kernel)) * self.image[2]

    @property
    def n_features(self) -> int:
        """Numbers of an image."""
        return int(np.prod(self.image))
