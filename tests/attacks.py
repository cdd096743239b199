"""Attacks on lower bounds: explicit networks on data whose directions are hard to tell from rounding.

The judge knows the mathematics and no code of the package: it whitens the stored numbers in 50 digits, and searches the
networks of the certificate's scope by descent. Whatever it finds is a network, so none may be below a bound. Directions
within the rounding of the stored numbers (half a unit in the last place of every entry) are no directions of the data.
"""

from dataclasses import dataclass

import mpmath as mp
import numpy as np

#: Relative amount by which a network must be below a bound: the judge's own rounding.
BEATEN = 1e-9
_DIGITS = 50


# --- data ---


def _pair(rng, n, distance):
    """Two columns that differ by a multiple of a sign, and the sign."""
    sign, column = np.sign(rng.standard_normal(n)), rng.standard_normal(n)
    return np.c_[column, column + distance * sign], sign


def _offset(rng, n):
    X, sign = _pair(rng, n, 10.0 ** rng.uniform(-12, -4))
    return np.c_[10.0 ** rng.uniform(3, 9) + rng.standard_normal(n), X], sign


def _shifted(rng, n):
    d = int(rng.integers(1, 5))
    X = rng.standard_normal((n, d)) + 10.0 ** rng.uniform(0, 9) * rng.standard_normal(d)
    return X, rng.standard_normal(n)


def _float32(rng, n):
    sign, column = np.sign(rng.standard_normal(n)), rng.integers(2**22, 2**23, n).astype(float)
    others = rng.standard_normal((n, int(rng.integers(1, 3)))) * 1e3 + 3e6
    return np.c_[column, column + (sign > 0), others].astype(np.float32), sign


def _weather(rng, n):
    sign, column = np.sign(rng.standard_normal(n)), 290 + 8 * rng.standard_normal(n)
    near = column + 10.0 ** rng.uniform(-3, -1) * sign
    return np.c_[101325 + 100 * rng.standard_normal(n), column, near].astype(np.float32), sign


def _float16(rng, n):
    X, sign = _pair(rng, n, 0.01)
    return np.c_[X, rng.standard_normal((n, 1)) + 30].astype(np.float16), sign


def _collinear(rng, n):
    X = rng.standard_normal((n, int(rng.integers(1, 4))))
    noise = rng.standard_normal(n)
    return np.c_[X, X @ rng.standard_normal(X.shape[1]) + 10.0 ** rng.uniform(-16, -2) * noise], noise


def _sums(rng, n):
    X = rng.standard_normal((n, 3)) + 10.0 ** rng.uniform(-1, 9) * rng.integers(2)
    return np.c_[X, X[:, 0] + X[:, 1], 2 * X[:, 2]], np.sign(rng.standard_normal(n))


def _dummies(rng, n):
    codes = [np.eye(k)[rng.permutation(np.arange(n) % k)] for k in (2, 3)]
    return np.hstack([*codes, rng.standard_normal((n, 1))]), np.sign(rng.standard_normal(n))


def _nearly_constant(rng, n):
    sign = np.sign(rng.standard_normal(n))
    return np.c_[10.0 ** rng.uniform(5, 9) * (1 + 10.0 ** rng.uniform(-16, -8) * sign), rng.standard_normal(n)], sign


#: Data by name: (generator, number of rows) -> features and targets.
KINDS = {
    "offset": _offset, "shifted": _shifted, "float32": _float32, "weather": _weather, "float16": _float16,
    "collinear": _collinear, "sums": _sums, "dummies": _dummies, "nearly constant": _nearly_constant,
}  # fmt: skip


# --- the judge ---


@dataclass(frozen=True)
class Directions:
    """Whitened rows ``[U Phi, 1 / sqrt(W)]`` (n, q), without the roots of the weights, rounded once from 50 digits."""

    rows: np.ndarray

    @classmethod
    def of(cls, X, weights, spectral_filter=None):
        """Directions of stored numbers that are more than their rounding, of standardised columns if filtered."""
        with mp.workdps(_DIGITS):
            data, w = _exact(X), _exact(weights)
            total = w.sum()
            mean = w @ data / total
            root = np.array([mp.sqrt(x) for x in w])
            centred = (data - mean) * root[:, None]
            varies = np.ptp(np.asarray(X, dtype=float), axis=0) > 0
            centred, mean = centred[:, varies], mean[varies]
            norms = np.array([mp.sqrt(column @ column) for column in centred.T])
            rounding = mp.mpf(2) ** -52 * (1 + abs(mean) * mp.sqrt(total) / norms)
            U, s = _singular_directions(centred / norms, rounding)
            rows = (U / root[:, None]).astype(float)
            constant = np.full((len(rows), 1), float(1 / mp.sqrt(total)))
        phi = np.ones(len(s))
        if spectral_filter is not None:
            phi = s / s.max() / np.hypot(s / s.max(), spectral_filter)
        return cls(np.hstack([(rows * phi)[:, phi >= 2.0**-26], constant]))


def _exact(array):
    return np.frompyfunc(lambda x: mp.mpf(float(x)), 1, 1)(np.asarray(array, dtype=float))


def _singular_directions(columns, rounding):
    """``U`` and ``s`` of exact columns, by their Gram matrix; twice the digits are left for it."""
    with mp.workdps(2 * _DIGITS):
        values, vectors = mp.eigsy(mp.matrix((columns.T @ columns).tolist()))
        V = np.array(vectors.tolist())
        s = np.array([mp.sqrt(max(value, 0)) for value in values])
        hidden = np.array([mp.sqrt(sum((rounding * v) ** 2)) for v in V.T])
        kept = s > hidden
        return columns @ V[:, kept] / s[kept], s[kept].astype(float)


def relu_dictionary(rows, weights, first, rng, count=60):
    """Hidden units (n, m, 1) of ReLU neurons of norm 1 on the whitened rows: along their directions and between them.

    Parameters
    ----------
    rows, weights : ndarray (n, q), (n,)
    first : ndarray (q, m')
        More neurons, such as those of the network that is judged.
    rng, count : Generator, int
    """
    q = rows.shape[1]
    drawn = np.hstack([np.eye(q), -np.eye(q), rng.standard_normal((q, count)), first])
    drawn = drawn[:, np.linalg.norm(drawn, axis=0) > 0]
    return np.maximum(rows @ (drawn / np.linalg.norm(drawn, axis=0)), 0)[:, :, None]


def best_found(groups, loss, weights, weight_decay, *, intercept, steps=600):
    """Least objective of group lasso on ``groups`` (n, P, q), by accelerated descent: that of an explicit network.

    Parameters
    ----------
    groups : ndarray (n, P, q)
        ``D_i A`` of gates, or hidden units of single neurons.
    loss : (callable, float)
        Value and gradient of the losses at outputs (n, K), and their largest curvature.
    weights, weight_decay : ndarray (n,), float
    intercept : bool
        Whether outputs have a bias without penalty.
    """
    n, P, q = groups.shape
    Z, (evaluate, curvature) = groups.reshape(n, P * q), loss
    Z = np.hstack([Z, np.full((n, 1), float(intercept))])
    step = 1 / (curvature * np.linalg.norm(np.sqrt(weights)[:, None] * Z, 2) ** 2 * (1 + 1e-9))
    K = evaluate(np.zeros((n, 1)))[1].shape[1]

    def shrunk(blocks):
        parts = blocks[:-1].reshape(P, q, K)
        norms = np.linalg.norm(parts, axis=(1, 2), keepdims=True)
        parts *= np.maximum(1 - step * weight_decay / np.maximum(norms, 1e-300), 0)
        return blocks

    def objective(blocks):
        penalty = np.linalg.norm(blocks[:-1].reshape(P, q, K), axis=(1, 2)).sum()
        return float(weights @ evaluate(Z @ blocks)[0]) + weight_decay * penalty

    now = ahead = np.zeros((P * q + 1, K))
    best, momentum = objective(now), 1.0
    for _ in range(steps):
        gradient = Z.T @ (weights[:, None] * evaluate(Z @ ahead)[1])
        following = shrunk(ahead - step * gradient)
        if np.sum((ahead - following) * (following - now)) > 0:
            momentum = 1.0
        further = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead, now, momentum = following + (momentum - 1) / further * (following - now), following, further
        best = min(best, objective(now))
    return best


def squared(targets):
    """``1/2 ||F - Y||^2`` of every row with its gradient, and the curvature."""
    return lambda F: (0.5 * np.sum((F - targets) ** 2, axis=1), F - targets), 1.0


def logistic(signs):
    """``log(1 + e^{-y f})`` of every row with its gradient, and the curvature."""

    def evaluate(F):
        margin = signs * F
        return np.logaddexp(0, -margin)[:, 0], -signs * 0.5 * (1 - np.tanh(margin / 2))

    return evaluate, 0.25


@dataclass(frozen=True)
class Attack:
    """Outcome: a network of ``value`` against the ``bound`` of a certificate, and what its scope excepts."""

    value: float
    bound: float
    valid: bool
    scope: str

    @property
    def beats(self):
        """Whether a network is below a bound that claims to be one."""
        return self.valid and self.bound - self.value > BEATEN * abs(self.value)

    @property
    def excepted(self):
        """Whether the certificate names directions that it does not speak of."""
        return "except along" in self.scope


def attack(model, X, y, rng, sample_weight=None):
    """Fit a model of squared or logistic loss, and search a network below its bound.

    Parameters
    ----------
    model : ConvexBNRegressor or ConvexBNClassifier
    X, y : ndarray (n, d), (n,)
        Targets of a classifier are signs.
    rng : Generator
    sample_weight : ndarray (n,), optional
    """
    model.fit(X, y, sample_weight)
    proof, network = model.certificate_, model.network_
    weights = np.ones(len(X)) if sample_weight is None else sample_weight
    tau = model._tau
    rows = Directions.of(X, weights, tau).rows
    if model.activation == "relu":
        first = np.linalg.lstsq(np.sqrt(weights)[:, None] * rows, _first_layers(network, X, weights), rcond=None)[0]
        groups = relu_dictionary(rows, weights, first, rng)
    else:
        opened = (np.asarray(X, dtype=float) - network.mean) @ model.gates_ + model.gate_offsets_ > 0
        groups = opened[:, :, None] * rows[:, None, :]
    loss = squared(y[:, None]) if model.loss == "squared" else logistic(y[:, None])
    value = best_found(groups, loss, weights, model.weight_decay_, intercept=model.fit_intercept)
    return Attack(value, proof.lower_bound, proof.status.value != "NUMERICAL", proof.scope)


def _first_layers(network, X, weights):
    """Pre-activations of a network's neurons, times the roots of the weights, from its stored statistics."""
    centred = (np.asarray(X, dtype=float) - network.mean) @ network.weight
    total = network.n_effective
    return np.sqrt(weights)[:, None] * (network.gamma * centred + network.shift) / np.sqrt(total)
