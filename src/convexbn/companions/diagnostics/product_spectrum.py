"""Spectrum of a product of Gaussian matrices: the Fuss-Catalan law, to which deep linear networks tend.

The more factors, the heavier its tails on both sides, and the worse the condition number that sets the rate of gradient
descent (Bjorck et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, pi

import numpy as np
from numpy.typing import ArrayLike

from convexbn._types import Float

#: Halvings of the interval of the angle: to the last digit of float64.
_HALVINGS = 60


@dataclass(frozen=True)
class FussCatalan:
    """Limit law of the squared singular values of a product of square Gaussian matrices of entry variance 1 / size.

    Attributes
    ----------
    factors : int
        Number ``M`` of matrices; 1 is the law of Marchenko and Pastur.

    Notes
    -----
    Points and density have one parameter, an angle ``p`` between 0 (the edge) and ``pi / (M + 1)`` (zero):
    ``x = sin((M+1)p)^(M+1) / (sin p sin(Mp)^M)`` and ``density = sin(p)^2 sin(Mp)^(M-1) / (pi sin((M+1)p)^M)``.

    Examples
    --------
    >>> law = FussCatalan(factors=2)
    >>> law.edge, law.moment(2)
    (6.75, 3)
    >>> bool(abs(FussCatalan(1).density(2.0) - 1 / (2 * 3.141592653589793)) < 1e-12)
    True
    """

    factors: int

    def __post_init__(self) -> None:
        if self.factors < 1:
            raise ValueError(f"factors must be 1 or more, got {self.factors}.")

    @property
    def edge(self) -> float:
        """Largest point of the support, ``(M + 1)^(M + 1) / M^M``."""
        M = self.factors
        return float((M + 1) ** (M + 1) / M**M)

    def moment(self, order: int) -> int:
        """Moment of an order, a Fuss-Catalan number ``C((M + 1) p, p) / (M p + 1)``."""
        return comb((self.factors + 1) * order, order) // (self.factors * order + 1)

    def density(self, x: ArrayLike) -> Float:
        """Density at points; 0 outside of the support, infinite at 0."""
        points = np.asarray(x, dtype=np.float64)
        inside = (points > 0) & (points < self.edge)
        p, M = self._angle(np.where(inside, points, self.edge / 2)), self.factors
        value = np.sin(p) ** 2 * np.sin(M * p) ** (M - 1) / (pi * np.sin((M + 1) * p) ** M)
        return np.where(inside, value, np.where(points == 0, np.inf, 0.0))

    def _angle(self, x: Float) -> Float:
        """Angles of points inside, by bisection: the point falls as the angle grows."""
        M = self.factors
        low, high = np.zeros_like(x), np.full_like(x, pi / (M + 1))
        for _ in range(_HALVINGS):
            p = (low + high) / 2
            above = (M + 1) * np.log(np.sin((M + 1) * p)) - np.log(np.sin(p)) - M * np.log(np.sin(M * p)) > np.log(x)
            low, high = np.where(above, p, low), np.where(above, high, p)
        return (low + high) / 2


def product_spectrum(factors: int, size: int, random_state: int | np.random.Generator = 0) -> Float:
    """Squared singular values of a product of square Gaussian matrices, the largest first.

    Parameters
    ----------
    factors, size : int
        Number of matrices, and their rows and columns; the entries have variance ``1 / size``. Float64 resolves the
        smallest values up to about five factors.
    random_state : int or numpy.random.Generator, default=0
        For the entries.

    Examples
    --------
    >>> values = product_spectrum(3, 100)
    >>> bool(abs(values.mean() - 1) < 0.2), bool(values[0] < 1.2 * FussCatalan(3).edge)
    (True, True)
    """
    rng = np.random.default_rng(random_state)
    product = np.eye(size)
    for _ in range(FussCatalan(factors).factors):
        product = rng.standard_normal((size, size)) / np.sqrt(size) @ product
    return np.square(np.linalg.svd(product, compute_uv=False), dtype=np.float64)
