"""The other convex methods: accelerated proximal gradient, CVXPY with Clarabel, pyscnn.

pyscnn asks for packages that nothing here uses, so it lives in an environment of its own:

    python -m venv ENV
    ENV/bin/pip install --no-deps -r benchmarks/requirements.txt

``ENV/bin/python`` is then the interpreter to pass to `pyscnn`. Take torch from an index of CPU builds: the
one for GPUs fails to import without the libraries that ``--no-deps`` leaves out.
"""

import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cvxpy as cp
import numpy as np

from convexbn_studies.peers import pyscnn_driver

DRIVER = pyscnn_driver.__file__


@dataclass(frozen=True)
class Trajectory:
    """What a method had reached after how much work of its own.

    Attributes
    ----------
    seconds : ndarray of shape (m,)
        CPU seconds (user and system) spent in the method so far.
    objectives : ndarray of shape (m,)
        Objective of the program at these moments, as the method itself reports it.
    blocks : ndarray of shape (P, q, K)
        The last coefficients.
    """

    seconds: np.ndarray
    objectives: np.ndarray
    blocks: np.ndarray


def fista_float32(instance, max_iter, callback):
    """Minimise by FISTA with restart and growing steps, in float32, from zero.

    Parameters
    ----------
    instance : GatedInstance
        The program.
    max_iter : int
        Largest number of iterations.
    callback : callable
        Receives the blocks, shape (P, q, K), after every iteration; something true ends the run.

    Returns
    -------
    ndarray of float32, shape (P, q, K)

    Notes
    -----
    The blocks are kept as a matrix of P rows. With M the patterns, ``sum_i D_i A S_i`` is the sum over q of
    ``A o (M S)`` and the gradient is ``M' (A o R)``: one product each way and nothing else of size n P.
    The momentum is dropped when it points uphill (O'Donoghue and Candès, 2015).
    """
    A, M, Y = (np.asarray(array, dtype=np.float32) for array in (instance.A, instance.patterns, instance.Y))
    x = z = np.zeros((M.shape[1], Y.shape[1] * A.shape[1]), dtype=np.float32)
    fit_x = fit_z = np.zeros_like(Y)
    safe = step = 1 / largest_curvature(A, M)
    t = 1.0
    for _ in range(max_iter):
        previous, fit_previous = x, fit_x
        gradient = adjoint(A, M, fit_z - Y)
        x, fit_x, step = proximal_step(A, M, z, fit_z, gradient, instance.weight_decay, step, safe)
        if callback(blocks_of(x, A)):
            break
        t, momentum = next_momentum(t, np.vdot(z - x, x - previous) > 0)
        z, fit_z = x + momentum * (x - previous), fit_x + momentum * (fit_x - fit_previous)
    return blocks_of(x, A)


def proximal_step(A, M, z, fit_z, gradient, weight_decay, step, safe):
    """Return the next point, its fit and the step to try next.

    The loss is quadratic, so a step is short enough exactly when ``step ||F(x - z)||^2 <= ||x - z||^2``; it
    always is at `safe`. One far shorter than it could be is lengthened for the next time.
    """
    while True:
        x = shrink(z - np.float32(step) * gradient, np.float32(step * weight_decay))
        fit_x = forward(A, M, x)
        bend, length = step * np.sum((fit_x - fit_z) ** 2), np.sum((x - z) ** 2)
        if bend <= length or step == safe:
            return x, fit_x, step * 1.25 if 5 * bend < length else step
        step = max(0.8 * step, safe)


def forward(A, M, S):
    """Return ``sum_i D_i A S_i``, shape (n, K), for blocks of shape (P, K q)."""
    return np.einsum("nkq,nq->nk", (M @ S).reshape(len(A), -1, A.shape[1]), A)


def adjoint(A, M, R):
    """Return every ``A' D_i R``, shape (P, K q), for R of shape (n, K)."""
    return M.T @ np.einsum("nk,nq->nkq", R, A).reshape(len(A), -1)


def shrink(S, threshold):
    """Return the proximal point of ``threshold * sum_i ||S_i||``."""
    norms = np.sqrt(np.einsum("ij,ij->i", S, S))
    return S * (1 - threshold / np.maximum(norms, threshold))[:, None]


def next_momentum(t, restart):
    """Return Nesterov's next t and the factor of the momentum, from the beginning after a restart."""
    if restart:
        return 1.0, np.float32(0)
    following = (1 + np.sqrt(1 + 4 * t**2)) / 2
    return following, np.float32((t - 1) / following)


def largest_curvature(A, M, tolerance=1e-4, margin=1.01):
    """Return the largest eigenvalue of ``sum_i D_i A A' D_i`` by power iteration, with a margin."""
    v = np.random.default_rng(0).standard_normal((len(A), 1)).astype(np.float32)
    previous, value = 0.0, 1.0
    while abs(value - previous) > tolerance * value:
        v = forward(A, M, adjoint(A, M, v / np.linalg.norm(v)))
        previous, value = value, float(np.linalg.norm(v))
    return margin * value


def blocks_of(S, A):
    """View a matrix of shape (P, K q) as blocks of shape (P, q, K)."""
    return S.reshape(len(S), -1, A.shape[1]).transpose(0, 2, 1)


def clarabel_cvxpy(instance):
    """Minimise with CVXPY and Clarabel at their default accuracy; one output.

    Returns
    -------
    Trajectory
        One moment: the end. Its seconds are those of stating, compiling and solving the program.
    """
    start = time.process_time()
    n, q = instance.A.shape
    features = (instance.patterns[:, :, None] * instance.A[:, None, :]).reshape(n, -1)
    S, residual = cp.Variable((q, instance.patterns.shape[1])), cp.Variable(n)
    loss = 0.5 * cp.sum_squares(residual)
    penalty = instance.weight_decay * cp.sum(cp.norm(S, axis=0))
    fit = features @ cp.vec(S, order="F")
    problem = cp.Problem(cp.Minimize(loss + penalty), [residual == fit - instance.Y[:, 0]])
    problem.solve(solver=cp.CLARABEL)
    seconds = time.process_time() - start
    return Trajectory(np.array([seconds]), np.array([problem.value]), S.value.T[:, :, None])


def clarabel_relu(instance, patterns, signs):
    """Minimise the ReLU program over neurons of given patterns and signs with CVXPY and Clarabel.

    Parameters
    ----------
    instance : ReluInstance
        The program.
    patterns : ndarray of bool, shape (n, P)
        Where each neuron is open: ``(2 D_i - 1) A s_i >= 0``.
    signs : ndarray of shape (P,)
        Its output, 1 or -1.

    Returns
    -------
    first : ndarray of shape (q, P)
        The neurons ``s_i``; their outputs are the signs.
    seconds : float
        CPU seconds of stating, compiling and solving the program at the default accuracy.
    """
    start = time.process_time()
    n, q = instance.A.shape
    features = ((patterns * signs)[:, :, None] * instance.A[:, None, :]).reshape(n, -1)
    S, residual = cp.Variable((q, patterns.shape[1])), cp.Variable(n)
    penalty = instance.weight_decay * cp.sum(cp.norm(S, axis=0))
    fit = features @ cp.vec(S, order="F")
    cones = cp.multiply(2.0 * patterns - 1, instance.A @ S) >= 0
    problem = cp.Problem(
        cp.Minimize(0.5 * cp.sum_squares(residual) + penalty), [residual == fit - instance.Y[:, 0], cones]
    )
    problem.solve(solver=cp.CLARABEL)
    return S.value, time.process_time() - start


def pyscnn(instance, interpreter, max_iter=10_000, tolerance=1e-14):
    """Minimise with pyscnn's R-FISTA in float64; one output.

    Parameters
    ----------
    instance : GatedInstance
        The program; pyscnn receives the whitened A as its data, without a bias, and the gates.
    interpreter : str
        Python of pyscnn's environment.
    max_iter : int
        Largest number of iterations.
    tolerance : float
        On the squared norm of the subgradient of the objective divided by n.

    Returns
    -------
    Trajectory
        One moment an iteration. Its seconds leave out process start, imports and preparation of the data.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "program.npz"), Path(folder, "solution.npz")
        program = {name: getattr(instance, name) for name in ("A", "Y", "gates", "weight_decay")}
        np.savez(source, **program, max_iter=max_iter, tolerance=tolerance)
        subprocess.run([interpreter, DRIVER, source, target], check=True)
        with np.load(target) as found:
            found = dict(found)
    blocks = in_our_order(instance.gates, found["gates"], found["weights"])
    return Trajectory(found["seconds"], found["objectives"], blocks)


def in_our_order(gates, their_gates, their_weights):
    """Place pyscnn's weights, which follow its own sorted and pruned gates, at the gates they belong to."""
    order = np.argsort(gates[0])
    places = order[np.searchsorted(gates[0], their_gates[0], sorter=order)]
    if not np.array_equal(gates[:, places], their_gates):
        raise ValueError("pyscnn returned gates that it was not given")
    blocks = np.zeros((gates.shape[1], gates.shape[0], 1))
    blocks[places] = their_weights[:, :, None]
    return blocks


def pyscnn_versions(interpreter):
    """Return the versions of pyscnn and of the arrays it computes with, as installed beside it."""
    names = ("pyscnn", "linalg_backends", "numpy")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    printed = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(zip(names, printed.split(), strict=True))
