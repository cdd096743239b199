"""The ReLU program restricted to given patterns and output directions: a second-order-cone interior point.

    min over w_j   1/2 ||sum_j (D_j A w_j) c_j' - Y||^2 + beta sum_j ||w_j||    s.t.   (2 D_j - I) A w_j >= 0

with unit output rows ``c_j`` (+-1 for one output). In its cone every neuron is linear, so the solution is a
network with the same objective; it is optimal among all networks of these patterns and directions.

Nesterov-Todd scaling on the cones ``||w_j|| <= t_j``, Mehrotra's predictor and corrector on them and on the linear
constraints (Nesterov and Todd 1997; Vandenberghe 2010). The epigraph variables are eliminated by hand, so that an
iteration is one Cholesky factorisation of size ``m q``: ``(m q)^3 / 3 + 2 m n q^2`` flops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from convexbn._typing import Float


@dataclass(frozen=True)
class ConeProgram:
    """Data of the restricted program.

    Parameters
    ----------
    rows : ndarray (n, q)
        Whitened rows with orthonormal columns (scaled by ``sqrt(w)`` where weighted).
    targets : ndarray (n, K)
        Targets on those rows.
    weight_decay : float
    opened : ndarray (m, n) of bool
        Pattern of every neuron.
    output : ndarray (m, K)
        Unit output direction of every neuron.
    """

    rows: Float
    targets: Float
    weight_decay: float
    opened: np.ndarray
    output: Float

    @np.errstate(all="ignore")
    def solve(self, start: Float, *, tol: float = 1e-9, max_iter: int = 60) -> Float:
        """Optimal ``w`` (m, q), from vectors inside their cones.

        Parameters
        ----------
        start : ndarray (m, q)
            One vector a neuron, in its cone.
        tol : float
            Relative complementarity at which to stop.
        max_iter : int
            Largest number of iterations; the best point so far is returned.
        """
        state = _Iterate(self, start)
        for _ in range(max_iter):
            if state.converged(tol) or not state.advance():
                break
        return state.w


class _Iterate:
    """One point of the interior-point method: ``(t_j, w_j)`` with duals ``z_j``, slacks with multipliers."""

    def __init__(self, program: ConeProgram, start: Float) -> None:
        self.beta = program.weight_decay
        self.m, self.q = start.shape
        self.rows = program.rows
        self.signs = np.where(program.opened, 1.0, -1.0)  # (m, n)
        gated = (program.opened[:, :, None] * program.rows).transpose(1, 0, 2).reshape(len(program.rows), -1)
        couplings = np.kron(program.output @ program.output.T, np.ones((self.q, self.q)))
        self.gram = gated.T @ gated * couplings
        self.linear = np.einsum("nmq,nm->mq", gated.reshape(-1, self.m, self.q), program.targets @ program.output.T)
        self.constant = 0.5 * float(np.sum(program.targets**2))
        self.w = start.copy()
        sizes = np.linalg.norm(start, axis=1)
        typical = max(sizes.mean(), 1e-8)
        self.t = 1.1 * sizes + typical
        self.z = np.hstack([np.full((self.m, 1), self.beta), np.zeros((self.m, self.q))])
        images = self._images(start)
        self.slack = np.maximum(images, typical / np.sqrt(len(program.rows)))
        share = max(self.beta * self.t.sum(), 0.1 * self.objective()) / self.slack.size
        self.multiplier = share / self.slack

    def _images(self, w: Float) -> Float:
        """``(2 D_j - I) A w_j``: (m, n)."""
        images: Float = self.signs * (w @ self.rows.T)
        return images

    def _pullback(self, multiplier: Float) -> Float:
        """``A' (2 D_j - I) lambda_j``: (m, q)."""
        pulled: Float = (self.signs * multiplier) @ self.rows
        return pulled

    @property
    def complementarity(self) -> float:
        """``sum_j s_j'z_j + lambda'slack``."""
        cones = float(self.t @ self.z[:, 0] + np.sum(self.w * self.z[:, 1:]))
        return cones + float(np.sum(self.slack * self.multiplier))

    def objective(self) -> float:
        """Value at ``w``."""
        flat = self.w.ravel()
        fit = 0.5 * flat @ (self.gram @ flat) - flat @ self.linear.ravel() + self.constant
        return float(fit + self.beta * np.linalg.norm(self.w, axis=1).sum())

    def converged(self, tol: float) -> bool:
        """Complementarity and residuals are small against the objective and the data."""
        scale = max(self.objective(), 1e-300)
        infeasible = np.abs(self._images(self.w) - self.slack).max() * self.multiplier.sum()
        stationary = np.abs(self._stationarity()).max() * np.abs(self.w).sum()
        return self.complementarity <= tol * scale and max(infeasible, stationary) <= 10 * tol * scale

    def _stationarity(self) -> Float:
        gradient = (self.gram @ self.w.ravel()).reshape(self.w.shape) - self.linear
        residual: Float = gradient - self._pullback(self.multiplier) - self.z[:, 1:]
        return residual

    def advance(self) -> bool:
        """One predictor-corrector step; False when the factorisation breaks down."""
        scaling = _NesterovTodd(np.column_stack([self.t, self.w]), self.z)
        system = self._system(scaling)
        if system is None:
            return False
        degree = 2 * self.m + self.slack.size
        mean = self.complementarity / degree
        affine = self._direction(system, scaling, scaling.minus_square(), -self.slack * self.multiplier)
        length = self._longest(*affine)
        ahead = self._complementarity_after(length, *affine) / degree
        target = mean * min(max(ahead / mean, 0.0), 1.0) ** 3
        cones = scaling.corrected(affine[0], affine[1], target)
        slacks = target - self.slack * self.multiplier - affine[2] * affine[3]
        step = self._direction(system, scaling, cones, slacks)
        if not all(np.isfinite(part).all() for part in step):
            return False
        self._move(0.99 * self._longest(*step), *step)
        return True

    def _system(self, scaling: _NesterovTodd) -> tuple[Float, Float] | None:
        """Factorised Newton matrix in ``w``: Gram + slack terms + cone terms with ``t`` eliminated."""
        ratio = self.multiplier / self.slack
        blocks = np.matmul((ratio[:, :, None] * self.rows).transpose(0, 2, 1), self.rows)
        blocks += scaling.reduced_hessian()
        matrix = self.gram.copy()
        view = matrix.reshape(self.m, self.q, self.m, self.q)
        index = np.arange(self.m)
        view[index, :, index, :] += blocks
        try:
            factor = scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            return None
        return factor  # type: ignore[no-any-return]

    def _direction(
        self, system: tuple[Float, Float], scaling: _NesterovTodd, cones: Float, slacks: Float
    ) -> tuple[Float, Float, Float, Float]:
        """Newton direction ``(ds, dz, dslack, dmultiplier)`` for given complementarity right-hand sides."""
        h = scaling.pull(cones)  # dz = h - W^{-2} ds
        violation = self._images(self.w) - self.slack
        from_slack = (slacks - self.multiplier * violation) / self.slack
        numerator = h[:, 0] - self.beta + self.z[:, 0]
        right = -self._stationarity() + self._pullback(from_slack) + h[:, 1:]
        right -= scaling.cross * (numerator / scaling.corner)[:, None]
        dw = scipy.linalg.cho_solve(system, right.ravel(), check_finite=False).reshape(self.w.shape)
        dt = (numerator - np.einsum("mq,mq->m", scaling.cross, dw)) / scaling.corner
        ds = np.column_stack([dt, dw])
        dz = h - scaling.inverse_square(ds)
        dslack = self._images(dw) + violation
        dmultiplier = (slacks - self.multiplier * dslack) / self.slack
        return ds, dz, dslack, dmultiplier

    def _longest(self, ds: Float, dz: Float, dslack: Float, dmultiplier: Float) -> float:
        s = np.column_stack([self.t, self.w])
        lengths = [_cone_step(s, ds), _cone_step(self.z, dz)]
        for values, steps in ((self.slack, dslack), (self.multiplier, dmultiplier)):
            shrinking = steps < 0
            lengths.append(float((-values[shrinking] / steps[shrinking]).min(initial=np.inf)))
        return min(1.0, *lengths)

    def _complementarity_after(self, length: float, ds: Float, dz: Float, dl: Float, dm: Float) -> float:
        s = np.column_stack([self.t, self.w]) + length * ds
        slack, multiplier = self.slack + length * dl, self.multiplier + length * dm
        return float(np.sum(s * (self.z + length * dz)) + np.sum(slack * multiplier))

    def _move(self, length: float, ds: Float, dz: Float, dslack: Float, dmultiplier: Float) -> None:
        self.t, self.w = self.t + length * ds[:, 0], self.w + length * ds[:, 1:]
        self.z = self.z + length * dz
        self.slack = self.slack + length * dslack
        self.multiplier = self.multiplier + length * dmultiplier


class _NesterovTodd:
    """Scaling ``W`` of every cone with ``W^{-1} s = W z``, for points ``s, z`` (m, 1 + q) inside the cones."""

    def __init__(self, s: Float, z: Float) -> None:
        size_s, size_z = np.sqrt(_determinant(s)), np.sqrt(_determinant(z))
        unit_s, unit_z = s / size_s[:, None], z / size_z[:, None]
        inner = np.sqrt(0.5 * (1 + np.einsum("mi,mi->m", unit_s, unit_z)))
        reflected = np.column_stack([unit_z[:, 0], -unit_z[:, 1:]])
        self.point = (unit_s + reflected) / (2 * inner)[:, None]  # J w_bar has the other sign on the tail
        self.size = np.sqrt(size_s / size_z)
        head, tail = self.point[:, 0], self.point[:, 1:]
        scale = self.size**-2
        self.corner = scale * (2 * head**2 - 1)  # entries of W^{-2}
        self.cross = -2 * (scale * head)[:, None] * tail
        self.scaled = self.apply_inverse(s)

    def apply_inverse(self, x: Float) -> Float:
        """``W^{-1} x``."""
        return self._apply(x, -1.0) / self.size[:, None]

    def apply(self, x: Float) -> Float:
        """``W x``."""
        return self._apply(x, 1.0) * self.size[:, None]

    def _apply(self, x: Float, sign: float) -> Float:
        head, tail = self.point[:, 0], sign * self.point[:, 1:]
        inner = np.einsum("mi,mi->m", tail, x[:, 1:])
        first = head * x[:, 0] + inner
        rest = x[:, 1:] + (x[:, 0] + inner / (1 + head))[:, None] * tail
        return np.column_stack([first, rest])

    def inverse_square(self, x: Float) -> Float:
        """``W^{-2} x``."""
        return self.apply_inverse(self.apply_inverse(x))

    def reduced_hessian(self) -> Float:
        """``W^{-2}`` with its first coordinate eliminated: (m, q, q)."""
        head, tail = self.point[:, 0], self.point[:, 1:]
        eye = np.eye(tail.shape[1])
        outer = tail[:, :, None] * tail[:, None, :] * (2 / (2 * head**2 - 1))[:, None, None]
        hessian: Float = (self.size**-2)[:, None, None] * (eye - outer)
        return hessian

    def minus_square(self) -> Float:
        """Predictor's right-hand side ``-lambda o lambda``."""
        return -_product(self.scaled, self.scaled)

    def corrected(self, ds: Float, dz: Float, target: float) -> Float:
        """Corrector's ``target e - lambda o lambda - (W^{-1} ds) o (W dz)``."""
        right = self.minus_square() - _product(self.apply_inverse(ds), self.apply(dz))
        right[:, 0] += target
        return right

    def pull(self, right: Float) -> Float:
        """``W^{-1}`` of the solution ``x`` of ``lambda o x = right``."""
        head, tail = self.scaled[:, 0], self.scaled[:, 1:]
        inner = np.einsum("mi,mi->m", tail, right[:, 1:])
        first = (head * right[:, 0] - inner) / _determinant(self.scaled)
        rest = (right[:, 1:] - first[:, None] * tail) / head[:, None]
        return self.apply_inverse(np.column_stack([first, rest]))


def _determinant(x: Float) -> Float:
    """``x_0^2 - ||x_1||^2``, as a product that keeps its digits near the boundary."""
    tail = np.linalg.norm(x[:, 1:], axis=1)
    determinant: Float = np.maximum((x[:, 0] - tail) * (x[:, 0] + tail), 1e-300)
    return determinant


def _product(x: Float, y: Float) -> Float:
    """Jordan product ``(x'y, x_0 y_1 + y_0 x_1)``."""
    first = np.einsum("mi,mi->m", x, y)
    return np.column_stack([first, x[:, :1] * y[:, 1:] + y[:, :1] * x[:, 1:]])


def _cone_step(x: Float, dx: Float) -> float:
    """Largest step for which ``x + step dx`` stays in every cone."""
    a = dx[:, 0] ** 2 - np.einsum("mi,mi->m", dx[:, 1:], dx[:, 1:])
    b = x[:, 0] * dx[:, 0] - np.einsum("mi,mi->m", x[:, 1:], dx[:, 1:])
    c = _determinant(x)
    discriminant = b**2 - a * c
    root = -b + np.sqrt(np.maximum(discriminant, 0))  # the stable form c / (-b + sqrt(...)) of the first root
    inside = (discriminant < 0) | (root <= 0)
    steps = np.where(inside, np.inf, c / np.where(inside, 1.0, root))
    return float(steps.min(initial=np.inf))
