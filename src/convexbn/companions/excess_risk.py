"""Excess risk of one-pass averaged SGD and of ridge regression in linear least squares (Zou et al. 2021).

Targets are ``y = <w*, x> + noise`` of variance ``sigma^2``; with the second moments ``H = E[x x']``, in whose
eigenvectors everything is written, the excess risk of a random ``w`` is ``E (w - w*)' H (w - w*)``. SGD starts at 0 and
sees every row once, ``w_t = w_{t-1} + step (y_t - <w_{t-1}, x_t>) x_t``; its answer is an average of
``w_0, ..., w_{N-1}``. Ridge is ``argmin ||X w - y||^2 + penalty ||w||^2``, the penalty not divided by ``N``.

The error ``e_t`` of SGD has second moments ``m_t`` that obey a linear recursion in every coordinate, with eigenvalue
``l``, and ``E[e_s e_t] = (1 - step l)^{t-s} m_s``. So its risk is exact, up to rounding, for two designs:

    one-hot  (x = unit vector i with probability l_i):  m' = (1 - 2 step l + step^2 l) m + step^2 l sigma^2
    Gaussian (x ~ N(0, H)):   m' = (1 - 2 step l + 2 step^2 l^2) m + step^2 l (sigma^2 + sum_j l_j m_j)

Ridge is exact for the one-hot design, as an expectation over a binomial count for every coordinate, and simulated for
the Gaussian one.

References
----------
Zou, Wu, Braverman, Gu, Foster, Kakade, "The benefits of implicit regularization from SGD in least squares problems",
NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from convexbn._types import Float

#: Logarithm of the smallest probability that counts: float64 still holds it.
_LEAST = -700.0


@dataclass(frozen=True)
class LeastSquares:
    """A least squares problem in the eigenvectors of its second moments.

    Parameters
    ----------
    eigenvalues, optimum : ndarray (d,)
        Nonnegative eigenvalues of ``H``, and ``w*``.
    noise : float, default=1.0
        Variance ``sigma^2`` of the noise.

    Examples
    --------
    >>> LeastSquares.power_law(2, 1, d=3).eigenvalues
    array([1.        , 0.25      , 0.11111111])
    """

    eigenvalues: Float
    optimum: Float
    noise: float = 1.0

    @classmethod
    def power_law(cls, decay: float, truth: float, d: int = 200) -> LeastSquares:
        """Problem with ``l_i = i^-decay``, ``w*_i = i^-truth`` and unit noise: the six Gaussian cases of the paper.

        Parameters
        ----------
        decay, truth, d : float, float, int
        """
        index = np.arange(1, d + 1, dtype=np.float64)
        return cls(index**-decay, index**-truth)

    @classmethod
    def separation(cls, n_samples: int) -> LeastSquares:
        """One-hot problem on which ridge needs about ``N^2 / log^2 N`` rows to do as well as SGD with ``N``.

        One coordinate has probability ``l = log N / sqrt N`` and ``w* = l^-1/2``; ``N >= 10`` others without signal
        share the rest. A penalty that keeps their noise out shrinks the first.
        """
        if n_samples < 10:
            raise ValueError(f"the separation needs at least 10 samples, got {n_samples}.")
        first = np.log(n_samples) / np.sqrt(n_samples)
        eigenvalues = np.r_[first, np.full(n_samples, (1 - first) / n_samples)]
        return cls(eigenvalues, np.r_[first**-0.5, np.zeros(n_samples)])

    @property
    def trace(self) -> float:
        """``tr H``: SGD on Gaussian rows needs steps below ``1 / trace``, and half of it if one eigenvalue leads."""
        return float(self.eigenvalues.sum())

    def _distinct(self, design: str) -> tuple[Float, Float, Float]:
        """Eigenvalues and optimum of the distinct coordinates, and how often each occurs; checked for a design."""
        if design == "one_hot" and (abs(self.trace - 1) > 1e-9 or self.eigenvalues.min() < 0):
            raise ValueError(f"one-hot rows need probabilities as eigenvalues, and these sum to {self.trace:.6g}.")
        pairs, counts = np.unique(np.c_[self.eigenvalues, self.optimum], axis=0, return_counts=True)
        return pairs[:, 0], pairs[:, 1], counts.astype(np.float64)


def sgd_risk(
    problem: LeastSquares, n_samples: int, step: ArrayLike, *, design: str = "gaussian", average: str = "tail"
) -> Float:
    """Exact excess risk of one pass of averaged SGD with a constant step, of the shape of ``step``.

    Parameters
    ----------
    problem, n_samples : LeastSquares, int
        The number of rows is ``N``.
    step : float or ndarray
        One-hot rows diverge above 2, Gaussian ones above about ``1 / trace``.
    design : {"gaussian", "one_hot"}, default="gaussian"
        Distribution of the rows.
    average : {"tail", "all"}, default="tail"
        Average of the last half of the iterates, ``w_{N//2}, ..., w_{N-1}``, or of all.

    Examples
    --------
    >>> problem = LeastSquares(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    >>> [round(float(sgd_risk(problem, n, 0.1, design="one_hot")), 4) for n in (10, 100)]
    [0.2716, 0.0267]
    """
    if design not in ("gaussian", "one_hot") or average not in ("tail", "all"):
        raise ValueError(f"design is 'gaussian' or 'one_hot', average 'tail' or 'all', got {design!r}, {average!r}.")
    l, truth, counts = problem._distinct(design)
    g, gaussian = np.asarray(step, dtype=np.float64)[..., None], design == "gaussian"
    kept = 1 - 2 * g * l + (2 * g**2 * l**2 if gaussian else g**2 * l)
    moments = np.broadcast_to(truth**2, kept.shape)
    start = n_samples // 2 if average == "tail" else 0
    crossed, total = np.zeros(kept.shape), np.zeros(kept.shape)
    for t in range(n_samples):
        if t >= start:  # crossed: sum over s <= t of E[e_s e_t]
            crossed = (1 - g * l) * crossed + moments
            total += 2 * crossed - moments
        spread = (counts * l * moments).sum(axis=-1, keepdims=True) if gaussian else 0.0
        moments = kept * moments + g**2 * l * (problem.noise + spread)
    return total @ (counts * l) / (n_samples - start) ** 2


def one_hot_ridge_risk(problem: LeastSquares, n_samples: int, penalty: ArrayLike) -> Float:
    """Exact excess risk of ridge on one-hot rows, of the shape of ``penalty``.

    ``sum_i l_i E[w*_i^2 (penalty / (n_i + penalty))^2 + sigma^2 n_i / (n_i + penalty)^2]``, ``n_i`` binomial. Without
    penalty a coordinate that was never seen is 0.

    Parameters
    ----------
    problem, n_samples, penalty : LeastSquares, int, float or ndarray
        The penalty is nonnegative.

    Examples
    --------
    >>> problem = LeastSquares(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    >>> one_hot_ridge_risk(problem, 1, [0.0, 1.0])  # one of two coordinates is seen, once
    array([0.75  , 0.4375])
    """
    shrink = np.asarray(penalty, dtype=np.float64)[..., None]
    risk = np.zeros(shrink.shape[:-1])
    for l, truth, count in zip(*problem._distinct("one_hot"), strict=True):
        seen, probability = _binomial(n_samples, l)
        total = seen + shrink
        inverse = np.divide(1, total, out=np.zeros_like(total), where=total > 0)
        bias = np.where(seen > 0, shrink * inverse, 1.0) ** 2
        risk = risk + count * l * ((truth**2 * bias + problem.noise * seen * inverse**2) @ probability)
    return risk


def _binomial(n: int, p: float) -> tuple[Float, Float]:
    """Counts of a binomial distribution whose probability float64 holds, and their probabilities."""
    if p in (0.0, 1.0):
        return np.array([n * p]), np.ones(1)
    count = np.arange(n + 1, dtype=np.float64)
    ratios = np.log((n - count[:-1]) / count[1:]) + np.log(p) - np.log1p(-p)
    logarithms = np.concatenate([[0.0], np.cumsum(ratios)])
    logarithms -= logarithms.max()
    kept = logarithms > _LEAST
    probability = np.exp(logarithms[kept])
    return count[kept], probability / probability.sum()


def gaussian_ridge_risk(
    problem: LeastSquares, n_samples: int, penalty: ArrayLike, rng: np.random.Generator, n_runs: int = 20
) -> Float:
    """Excess risk of ridge on drawn Gaussian rows, one row a run and one column a penalty.

    Parameters
    ----------
    problem, n_samples, penalty : LeastSquares, int, float or ndarray (p,)
        The penalty is positive.
    rng, n_runs : numpy.random.Generator, int

    Examples
    --------
    >>> problem = LeastSquares.power_law(1, 1, d=50)
    >>> gaussian_ridge_risk(problem, 100, [0.1, 10.0], np.random.default_rng(0)).mean(axis=0).round(2)
    array([0.67, 0.09])
    """
    penalties, risks = np.atleast_1d(np.asarray(penalty, dtype=np.float64)), []
    for _ in range(n_runs):
        rows = rng.standard_normal((n_samples, len(problem.optimum))) * np.sqrt(problem.eigenvalues)
        noise = np.sqrt(problem.noise) * rng.standard_normal(n_samples)
        values, vectors = np.linalg.eigh(rows.T @ rows)
        # (X'X + penalty) (w - w*) = X' noise - penalty w*
        right = vectors.T @ np.c_[rows.T @ noise, problem.optimum]
        inside = (right[:, :1] - penalties * right[:, 1:]) / (np.maximum(values, 0)[:, None] + penalties)
        risks.append(problem.eigenvalues @ (vectors @ inside) ** 2)
    return np.array(risks)


def sgd_rate(problem: LeastSquares, n_samples: int, step: float) -> float:
    """Rate of the risk of tail-averaged SGD: its upper bound without the constants, so not itself a bound.

    ``min_k sum_{i<=k} exp(-N step l_i) w*_i^2 / (l_i step^2 N^2) + sum_{i>k} l_i w*_i^2`` and, for another ``k``,
    ``(sigma^2 + ||w*||^2) (k / N + N step^2 sum_{i>k} l_i^2)``.

    Parameters
    ----------
    problem, n_samples, step
        As for ``sgd_risk``, with one step.

    Examples
    --------
    >>> round(sgd_rate(LeastSquares.power_law(1, 1), 100, 0.1), 3)
    0.508
    """
    l, truth = _in_order(problem)
    scaled = step * n_samples * l
    bias = _best_split(np.exp(-scaled) * truth**2 * l / scaled**2, l * truth**2)
    variance = _best_split(np.full(len(l), 1 / n_samples), n_samples * step**2 * l**2)
    return bias + (problem.noise + float(truth @ truth)) * variance


def ridge_rate(problem: LeastSquares, n_samples: int, penalty: float) -> float:
    """Rate of the risk of ridge on Gaussian rows: its lower bound without the constants, so not itself a bound.

    With ``p = penalty + sum_{i>k} l_i``, ``k`` the first for which ``N l_{k+1} <= p``: ``(p / N)^2 sum_{i<=k} w*_i^2 /
    l_i + sum_{i>k} l_i w*_i^2 + sigma^2 (k / N + N sum_{i>k} l_i^2 / p^2)``.

    Parameters
    ----------
    problem, n_samples, penalty
        As for ``one_hot_ridge_risk``, with one penalty.

    Examples
    --------
    >>> round(ridge_rate(LeastSquares.power_law(1, 1), 100, 1.0), 3)
    0.67
    """
    l, truth = _in_order(problem)
    p = np.r_[penalty + np.cumsum(l[::-1])[::-1], penalty]
    k = int(np.r_[n_samples * l <= p[:-1], True].argmax())
    bias = (p[k] / n_samples) ** 2 * np.sum(truth[:k] ** 2 / l[:k]) + l[k:] @ truth[k:] ** 2
    variance = k / n_samples + (n_samples * np.sum(l[k:] ** 2) / p[k] ** 2 if k < len(l) else 0.0)
    return float(bias + problem.noise * variance)


def _in_order(problem: LeastSquares) -> tuple[Float, Float]:
    """Positive eigenvalues from the largest, and the optimum in their order."""
    order = np.argsort(-problem.eigenvalues, kind="stable")
    order = order[problem.eigenvalues[order] > 0]
    return problem.eigenvalues[order], problem.optimum[order]


def _best_split(first: Float, rest: Float) -> float:
    """Least ``sum(first[:k]) + sum(rest[k:])`` over ``k``."""
    head, tail = np.r_[0.0, np.cumsum(first)], np.r_[np.cumsum(rest[::-1])[::-1], 0.0]
    return float((head + tail).min())


def tuned(risk: Callable[[Float], Float], low: float, high: float) -> tuple[float, float]:
    """Best argument of a risk and its value, by a logarithmic grid and finer ones around the best point.

    Parameters
    ----------
    risk, low, high : callable, float, float
        Risks of an array of arguments, and positive ends.

    Examples
    --------
    >>> best, risk = tuned(lambda x: (np.log(x) - 1) ** 2, 0.01, 100)
    >>> round(best, 2)
    2.72
    """
    for _ in range(4):
        grid = np.geomspace(low, high, 25)
        risks = np.where(np.isfinite(values := risk(grid)), values, np.inf)
        best = int(risks.argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(grid[best]), float(risks[best])


def samples_needed(risk: Callable[[int], float], target: float, start: int) -> int:
    """Fewest samples with a risk of at most ``target``, by bisection.

    Parameters
    ----------
    risk, target, start : callable, float, int
        The risk falls with the number of samples; ``start`` is the first guess.

    Examples
    --------
    >>> samples_needed(lambda n: 1 / n, 0.01, 8)
    100
    """
    low, high = 0, start
    while risk(high) > target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if risk(middle) <= target else (middle, high)
    return high
