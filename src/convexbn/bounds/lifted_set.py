"""The doubly nonnegative relaxation of ``{(A u)_+ : ||u|| = 1}``, and bounds from any of its multipliers.

With ``x = (A u)_+`` and ``z = (-A u)_+`` the vector ``(x, z)`` is nonnegative, ``x_i z_i = 0``, ``||(x, z)|| = ||u||``
since A has orthonormal columns, and it lies in the subspace ``x - z in range(A)``: in coordinates ``s = x + z`` (any)
and ``u``, ``x = (s + A u) / 2`` and ``z = (s - A u) / 2``. Lifted to ``Z = (x, z)(x, z)'`` and with its rank forgotten,

    Z psd on the subspace,  tr Z = 1,  Z >= 0,  Z_(i, n+i) = 0.

For any symmetric N, nonnegative except on the entries that are zero, ``max <C, Z>`` is at most the largest eigenvalue
of ``C + N`` on the subspace. With ``C = V V'`` on the block of x this bounds ``||V'x||^2``. One output: a first row
``x_0 = tau = 1, z_0 = 0`` makes the objective ``tau v'x`` linear and tells the two signs of v apart. The trace becomes
2, to be divided by. ``tau^2 = ||(x, z)||^2`` need not be asked: scaling tau against the rest, the trace is least there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from convexbn._types import EPS, Float

_COMPLETE = 1e-6  # norm that a column may lack, in quadrature, without completion: valid, only less tight


@dataclass(frozen=True)
class Blocks:
    """A symmetric matrix on ``(x, z)``: blocks ``xx``, ``zz`` (symmetric) and ``xz``."""

    xx: Float
    zz: Float
    xz: Float

    @staticmethod
    def zeros(n: int) -> Blocks:
        """Zero matrix."""
        return Blocks(*np.zeros((3, n, n)))

    def plus(self, other: Blocks, factor: float = 1.0) -> Blocks:
        """``self + factor * other``."""
        return Blocks(self.xx + factor * other.xx, self.zz + factor * other.zz, self.xz + factor * other.xz)

    def times(self, factor: float) -> Blocks:
        """``factor * self``."""
        return Blocks(factor * self.xx, factor * self.zz, factor * self.xz)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(np.sqrt((self.xx**2).sum() + (self.zz**2).sum() + 2 * (self.xz**2).sum()))


def completed(A: Float) -> Float:
    """Append rows to orthogonal columns of at most unit norm so that all have unit norm; not if they have it already.

    Rows of weight 0 change neither ``V'(A u)_+`` nor its maximum over the ball.
    """
    missing = np.sqrt(np.maximum(1 - np.einsum("ij,ij->j", A, A), 0))
    return np.vstack([A, np.diag(missing)[missing > _COMPLETE]])


class LiftedSet:
    """The relaxed set for rows A; ``homogenised``: with a first row for which ``a_0'u = tau >= 0``, so ``z_0 = 0``."""

    def __init__(self, A: Float, *, homogenised: bool) -> None:
        self.A = scipy.linalg.block_diag(1.0, A) if homogenised else A
        self.size = len(self.A)
        self.zero_xz = np.eye(self.size, dtype=bool)
        self.zero_zz = np.zeros((self.size, self.size), dtype=bool)
        if homogenised:
            self.zero_xz[:, 0] = self.zero_zz[0] = self.zero_zz[:, 0] = True

    def lift(self, factor: Float) -> Blocks:
        """``B F F'B'`` for the orthonormal basis B of the subspace and F (n + q, r) in coordinates ``(s, u)``."""
        s, t = factor[: self.size], self.A @ factor[self.size :]
        x, z = (s + t) / np.sqrt(2), (s - t) / np.sqrt(2)
        return Blocks(x @ x.T, z @ z.T, x @ z.T)

    def adjoint(self, N: Blocks) -> Float:
        """``B'N B``."""
        twice, skew = N.xz + N.xz.T, N.xz - N.xz.T
        total = N.xx + N.zz
        cross = 0.5 * (N.xx - N.zz - skew) @ self.A
        return np.block([[0.5 * (total + twice), cross], [cross.T, 0.5 * self.A.T @ (total - twice) @ self.A]])

    def nearest(self, Y: Blocks) -> Blocks:
        """Nearest blocks that satisfy the entrywise constraints."""
        zz = np.where(self.zero_zz, 0.0, np.maximum(Y.zz, 0))
        return Blocks(np.maximum(Y.xx, 0), zz, np.where(self.zero_xz, 0.0, np.maximum(Y.xz, 0)))

    def bound(self, objective: Blocks, N: Blocks) -> tuple[float, float]:
        """Upper bound of ``<C, Z>`` over the set for any multipliers N, and the part of it that covers rounding."""
        # multipliers of entries that are not fixed to zero must be nonnegative
        zz = np.where(self.zero_zz, N.zz, np.maximum(N.zz, 0))
        N = Blocks(np.maximum(N.xx, 0), zz, np.where(self.zero_xz, N.xz, np.maximum(N.xz, 0)))
        matrix = self.adjoint(objective.plus(N))
        top = float(np.linalg.eigvalsh(matrix)[-1])
        rounding = 16 * len(matrix) * EPS * (objective.norm() + N.norm())
        return max(top, 0.0) + rounding, rounding

    def weights(self, v: Float) -> Blocks:
        """Objective ``v'x`` of one output on the homogenised set, where ``tr Z = 1`` and ``Z_0x = tau x / 2``."""
        objective = Blocks.zeros(self.size)
        objective.xx[0, 1:] = objective.xx[1:, 0] = v
        return objective
