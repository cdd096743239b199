"""What the test files share: instances, references in 50 digits, and the measure that judges a residual."""

import itertools

import mpmath as mp
import numpy as np

from convexbn.certificate.certificate import Found, certify, judge
from convexbn.certificate.dual_bounds import NOTHING_KNOWN, DualBound, GateDualBounds
from convexbn.certificate.question import Question
from convexbn.certificate.status import Scope
from convexbn.data.whitening import whiten
from convexbn.program.losses import HuberLoss, LogisticLoss, SquaredHingeLoss, SquaredLoss
from convexbn.program.relu import ReluProgram

EPS = float(np.finfo(np.float64).eps)

#: LAPACK's threshold for a normalised residual.
THRESHOLD = 30.0

LOSS_NAMES = ("squared", "huber", "squared_hinge", "logistic", "cross_entropy")


def residual(error, n, scale=1.0):
    """Largest error in units of ``eps * n * scale``: below ``THRESHOLD`` it is rounding."""
    return float(np.abs(error).max(initial=0.0) / (EPS * n * scale))


def conditioned(n, d, condition, rng):
    """Centred data with singular values from 1 down to ``1 / condition``."""
    left = np.linalg.qr(np.c_[np.ones(n), rng.standard_normal((n, d))])[0][:, 1:]
    right = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return left * np.geomspace(1, 1 / condition, d) @ right.T


def labels(counts):
    """Class of every row, classes in turn: ``[0, ..., 0, 1, ...]``."""
    return np.repeat(np.arange(len(counts)), counts)


def targets_for(name, n, K, rng, soft=False):
    """Targets of a loss: numbers, signs or one-hot rows; soft ones in between."""
    if name in ("squared", "huber"):
        return rng.standard_normal((n, K))
    if name in ("squared_hinge", "logistic"):
        return rng.uniform(-1, 1, (n, K)) if soft else np.sign(rng.standard_normal((n, K)))
    return rng.dirichlet(np.ones(K), n) if soft else np.eye(K)[rng.integers(K, size=n)]


def proof_of_gates(program, X, network, tol, stopped_by="tolerance"):
    """Certificate of a gated network on raw rows."""
    return certify(Question(X, network.mean, program, tol), network, stopped_by=stopped_by)


def proof_of_relu(loss, X, weight_decay, network, tol, stopped_by="formula"):
    """Certificate of a ReLU network on raw rows by the orthant bound."""
    whitening = whiten(X, loss.weights)
    program = ReluProgram(whitening.rows, loss, weight_decay)
    # a deadline in the past: the orthant bound alone, exact at rank n - 1
    return certify(Question(X, whitening.mean, program, tol), network, stopped_by=stopped_by, deadline=0.0)


#: Parameters of the estimators that give the paper's gated program on all directions of the data.
PAPER = {"fit_intercept": False, "linear": False, "gates": "data", "spectral_filter": None, "standardize": False}


def proof_of_blocks(program, blocks, tol, stopped_by="tolerance"):
    """Certificate of blocks on the whitened data, before they become a network's weights."""
    index, values = blocks
    finite = bool(np.isfinite(values).all())
    plain = float(np.linalg.svd(values, compute_uv=False).sum()) if finite else np.nan
    outputs = program.outputs(index, values)
    bias = program.loss.best_bias(outputs) if finite else 0.0
    found = Found(outputs, float(program.norm.of(values).sum()), plain, bias)
    scope = Scope("these gates")
    return judge(program.loss, found, program.weight_decay, GateDualBounds(program), scope, tol, stopped_by)


class StatedBound:
    """A prover whose bound is what we say."""

    known, remark = NOTHING_KNOWN, ""

    def __init__(self, bound, rounding, estimate):
        self.bound, self.rounding, self.estimated = bound, rounding, estimate

    def bounded(self, dual):
        return [DualBound(dual, self.bound, self.rounding, "gates" if self.estimated is None else "stated")]

    def estimate(self, dual):
        return self.estimated


def proof_of_outputs(
    loss, outputs, weight_decay, *, bound, tol, rounding=1e-14, penalty=1.0, scope="these gates",
    stopped_by="tolerance", estimate=None,
):  # fmt: skip
    """Certificate of outputs whose dual norm is what we say."""
    prover = StatedBound(bound, rounding, estimate)
    found = Found(outputs, penalty, penalty)
    return judge(loss, found, weight_decay, prover, Scope(scope), tol, stopped_by)


def neuron_arrays(network):
    """The arrays of a network that belong to neurons, by name."""
    others = ("mean", "n_effective", "convolution", "output_bias")
    return {name: value for name, value in vars(network).items() if value is not None and name not in others}


def network_outputs(rows, neurons):
    """``(A first)_+ output``, in one product."""
    return np.maximum(rows @ neurons.first, 0) @ neurons.output


def digits(matrix):
    """Entries of an array as exact mpmath numbers, a list of rows."""
    return [[mp.mpf(float(x)) for x in row] for row in np.atleast_2d(matrix)]


def value_in_digits(loss, outputs):
    """``L(F)`` from its definition, at mpmath's precision."""
    rows = zip(digits(outputs), digits(loss.targets), digits(loss.weights)[0], strict=True)
    return mp.mpf(loss.constant) + mp.fsum(w * _row_value(loss, f, y) for f, y, w in rows)


def _row_value(loss, f, y):
    if isinstance(loss, SquaredLoss):
        return mp.fsum((a - b) ** 2 for a, b in zip(f, y, strict=True)) / 2
    if isinstance(loss, HuberLoss):
        return mp.fsum(_huber(abs(a - b), mp.mpf(loss.delta)) for a, b in zip(f, y, strict=True))
    if isinstance(loss, SquaredHingeLoss):  # a share (1 + y) / 2 of rows with label +1
        pairs = zip(f, y, strict=True)
        return mp.fsum((1 + b) * max(1 - a, 0) ** 2 + (1 - b) * max(1 + a, 0) ** 2 for a, b in pairs) / 4
    inner = mp.fsum(a * b for a, b in zip(f, y, strict=True))
    if isinstance(loss, LogisticLoss):  # log(1 + e^f) - (1 + y) f / 2
        return mp.fsum(mp.log1p(mp.exp(-abs(a))) + (abs(a) - a * b) / 2 for a, b in zip(f, y, strict=True))
    peak = max(f)
    return peak + mp.log(mp.fsum(mp.exp(a - peak) for a in f)) - inner


def _huber(size, delta):
    return size**2 / 2 if size <= delta else delta * (size - delta / 2)


def gradient_in_digits(loss, outputs):
    """``-grad L(F)`` at mpmath's precision, a list of rows."""
    rows = zip(digits(outputs), digits(loss.targets), digits(loss.weights)[0], strict=True)
    return [[w * v for v in _row_gradient(loss, f, y)] for f, y, w in rows]


def _row_gradient(loss, f, y):
    if isinstance(loss, SquaredLoss):
        return [b - a for a, b in zip(f, y, strict=True)]
    if isinstance(loss, HuberLoss):
        return [min(max(b - a, -loss.delta), loss.delta) for a, b in zip(f, y, strict=True)]
    if isinstance(loss, SquaredHingeLoss):
        return [((1 + b) * max(1 - a, 0) - (1 - b) * max(1 + a, 0)) / 2 for a, b in zip(f, y, strict=True)]
    if isinstance(loss, LogisticLoss):
        return [(b - mp.tanh(a / 2)) / 2 for a, b in zip(f, y, strict=True)]
    exponentials = [mp.exp(a - max(f)) for a in f]
    return [b - e / mp.fsum(exponentials) for b, e in zip(y, exponentials, strict=True)]


def dual_in_digits(loss, dual, multiple=1):
    """``D(t V)`` from the formulas of the mathematics, section 6, at mpmath's precision."""
    rows = zip(digits(dual), digits(loss.targets), digits(loss.weights)[0], strict=True)
    return mp.mpf(loss.constant) + mp.fsum(_row_dual(loss, [multiple * v for v in d], y, w) for d, y, w in rows)


def _row_dual(loss, v, y, w):
    pairs = list(zip(v, y, strict=True))
    if isinstance(loss, SquaredLoss):
        return mp.fsum(a * b - a * a / (2 * w) for a, b in pairs)
    if isinstance(loss, HuberLoss):
        inside = all(abs(a) <= w * mp.mpf(loss.delta) for a in v)
        return mp.fsum(a * b - a * a / (2 * w) for a, b in pairs) if inside else mp.mpf("-inf")
    if isinstance(loss, SquaredHingeLoss):
        return w * mp.fsum(_hinge_dual(a / w, b) for a, b in pairs)
    if isinstance(loss, LogisticLoss):
        return w * mp.fsum(_entropy((1 + b) / 2 - a / w) + _entropy((1 - b) / 2 + a / w) for a, b in pairs)
    return w * mp.fsum(_entropy(b - a / w) for a, b in pairs)


def _hinge_dual(v, y):
    """Minimum over ``f`` of the soft squared hinge plus ``v f``, by the cases of its stationary point."""
    if abs(y - v) <= 1:
        return (1 - y * y) / 2 + v * y - v * v / 2
    share = 1 + y if v > 0 else 1 - y
    return abs(v) - v * v / share if share > 0 else mp.mpf("-inf")


def _entropy(p):
    return -p * mp.log(p) if p > 0 else (mp.mpf(0) if p == 0 else mp.mpf("-inf"))


def best_multiple_in_digits(loss, dual, norm, weight_decay):
    """``max D(t V)`` over ``0 <= t <= weight_decay / norm``, ``D`` being concave: thirds of the interval."""
    low, high = mp.mpf(0), mp.mpf(weight_decay) / norm
    for _ in range(120):
        third = (high - low) / 3
        left, right = dual_in_digits(loss, dual, low + third), dual_in_digits(loss, dual, high - third)
        low, high = (low, high - third) if left >= right else (low + third, high)
    return dual_in_digits(loss, dual, (low + high) / 2)


def gate_norm_in_digits(program, dual):
    """``max_i ||A' D_i V||_F`` at mpmath's precision."""
    rows, V = digits(program.operator.rows), digits(dual)
    return max(_gated_norm(rows, V, gate) for gate in program.operator.patterns.T)


def _gated_norm(rows, V, gate):
    opened = np.flatnonzero(gate)
    sums = (mp.fsum(rows[i][a] * V[i][k] for i in opened) for a in range(len(rows[0])) for k in range(len(V[0])))
    return mp.sqrt(mp.fsum(s * s for s in sums))


def orthant_in_digits(dual):
    """``max ||V'u||`` over ``u >= 0, ||u|| <= 1``, exactly: the top eigenvector of some face is positive there."""
    V = digits(dual)
    gram = [[mp.fsum(a * b for a, b in zip(u, v, strict=True)) for v in V] for u in V]
    faces = (face for size in range(1, len(V) + 1) for face in itertools.combinations(range(len(V)), size))
    return mp.sqrt(max((_face_maximum(gram, face) for face in faces), default=mp.mpf(0)))


def _face_maximum(gram, face):
    values, vectors = mp.eigsy(mp.matrix([[gram[i][j] for j in face] for i in face]))
    top = [vectors[i, len(face) - 1] for i in range(len(face))]
    sign = mp.sign(max(top, key=abs))
    inside = all(sign * x >= -(mp.mpf(10) ** -40) for x in top)
    return max(values[len(face) - 1], mp.mpf(0)) if inside else mp.mpf(0)
