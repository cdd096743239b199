"""How many times faster ConvexLayer is than cvxpylayers on the same gated program: CPU seconds, one thread, ratios.

Usage: python benchmarks/layer.py [--seed 0] [--json FILE]

Needs cvxpylayers 1.2.0, which installs beside the versions of requirements.lock: pip install cvxpylayers==1.2.0

Both differentiate the sum of squares of the weights in rows, targets and weight decay. A call is a forward and a
backward pass; building cvxpylayers' problem is not counted. Errors are relative, of the whole gradient: ours along a
random direction against a central difference, the peer's against ours. Its default backward pass is LSQR at a tolerance
that leaves these errors; `accurate` is Clarabel at 1e-12 and a dense factorisation, the faster of its ways to an error
below 1e-4 here. A warm call of ours starts from the optimum at a weight decay one per cent away, as in a training loop.
Takes about two minutes.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are loaded, below
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAYON_NUM_THREADS"] = "1"  # Clarabel's

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import cvxpy as cp
import numpy as np
import torch
from cvxpylayers.torch import CvxpyLayer

import convexbn
from convexbn.data.whitening import whiten
from convexbn.nn import ConvexLayer
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.gates import first_of_each_pattern
from convexbn.program.losses import SquaredLoss

SHAPES = ((20, 2, 10), (50, 5, 20), (100, 10, 50))  # rows, features, gates
FRACTIONS = (0.1, 0.02)  # of the largest weight decay
REPEATS, CALLS = 5, 20  # calls of ours between two readings of the clock
TIGHT = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
SETTINGS = {
    "default": {"solve_method": "Clarabel", "n_jobs_forward": 1, "n_jobs_backward": 1},
    "accurate": {"solve_method": "Clarabel", "mode": "dense", "n_jobs_forward": 1, "n_jobs_backward": 1} | TIGHT,
}


@dataclass(frozen=True)
class Row:
    """One comparison; seconds a call are medians of `REPEATS` measurements.

    Attributes
    ----------
    n, d, P : int
        Rows, features and gates.
    fraction : float
        Weight decay as a fraction of the largest.
    active : int
        Active groups.
    setting : str
        Of the peer.
    peer_error, error : float
        Of the gradients.
    peer_forward, peer_backward : float
        CPU seconds.
    forward, backward : float
        Ours, from nothing.
    warm : float
        Ours, forward and backward, from a neighbour.
    """

    n: int
    d: int
    P: int
    fraction: float
    active: int
    setting: str
    peer_error: float
    error: float
    peer_forward: float
    peer_backward: float
    forward: float
    backward: float
    warm: float

    @property
    def ratio(self):
        """How many times faster ours is from nothing."""
        return (self.peer_forward + self.peer_backward) / (self.forward + self.backward)

    @property
    def warm_ratio(self):
        """How many times faster ours is from a neighbour."""
        return (self.peer_forward + self.peer_backward) / self.warm


def instance(n, d, P, fraction, seed):
    """A gated program on whitened Gaussian rows, with a planted network's outputs and noise as targets."""
    rng = np.random.default_rng(seed)
    rows = whiten(rng.standard_normal((n, d))).rows
    patterns = rows @ rng.standard_normal((d + 1, P)) >= 0
    patterns = patterns[:, first_of_each_pattern(patterns)]
    outputs = np.maximum(rows @ rng.standard_normal((d + 1, 3)), 0) @ rng.standard_normal((3, 1))
    targets = outputs / outputs.std() + 0.3 * rng.standard_normal((n, 1))
    program = GatedProgram(gated_operator(rows, patterns), SquaredLoss(targets, np.ones(n)), 1.0)
    return program.with_weight_decay(fraction * program.max_weight_decay())


def peer_layer(program):
    """The program in CVXPY, rows, targets and weight decay as parameters."""
    n, q = program.operator.rows.shape
    blocks = [cp.Variable(q) for _ in range(program.n_gates)]
    rows, targets, weight_decay = cp.Parameter((n, q)), cp.Parameter(n), cp.Parameter(nonneg=True)
    gates = program.operator.patterns.T.astype(float)
    outputs = sum(cp.multiply(gate, rows @ block) for gate, block in zip(gates, blocks, strict=True))
    objective = 0.5 * cp.sum_squares(outputs - targets) + weight_decay * sum(map(cp.norm, blocks))
    return CvxpyLayer(cp.Problem(cp.Minimize(objective)), [rows, targets, weight_decay], blocks)


def leaves(program, change=1.0):
    """Rows, targets and weight decay as tensors that take gradients."""
    arrays = program.operator.rows, program.loss.targets[:, 0], np.array(change * program.weight_decay)
    return [torch.tensor(array, requires_grad=True) for array in arrays]


def timed(weights_of, batch):
    """CPU seconds a call, forward and backward, and the gradient of the last call in one vector.

    The clock is read around all calls of a batch: reading it costs as much as a call of ours.
    """
    started = time.process_time()
    values = [weights_of(*inputs).square().sum() for inputs in batch]
    forward = time.process_time()
    for value in values:
        value.backward()
    backward = time.process_time()
    gradient = torch.cat([leaf.grad.ravel() for leaf in batch[-1]])
    return (forward - started) / len(batch), (backward - forward) / len(batch), gradient


def central_error(layer, program, gradient):
    """Relative error of a gradient along a random direction."""
    inputs = [leaf.detach() for leaf in leaves(program)]
    random = torch.Generator().manual_seed(0)
    along = [torch.randn(leaf.shape, generator=random, dtype=torch.float64) * leaf.norm() for leaf in inputs]

    def value(t):
        return float(layer(*(x + t * z for x, z in zip(inputs, along, strict=True)))[1].square().sum())

    difference = (value(1e-6) - value(-1e-6)) / 2e-6
    return abs(float(gradient @ torch.cat([z.ravel() for z in along])) / difference - 1)


def ours(program):
    """Layer, gradient, median seconds (forward, backward) from nothing, and in all from a neighbour."""
    layer = ConvexLayer(program.operator.patterns, fit_intercept=False)

    def afresh(*inputs):
        layer.optimum = None
        return layer(*inputs)[1]

    changes = np.tile([1.01, 1.0], CALLS // 2)
    cold = [timed(afresh, [leaves(program) for _ in range(CALLS)]) for _ in range(REPEATS)]
    warm = [timed(lambda *inputs: layer(*inputs)[1], [leaves(program, t) for t in changes]) for _ in range(REPEATS)]
    seconds = [statistics.median(run[i] for run in cold) for i in (0, 1)]
    return layer, cold[-1][2], seconds, statistics.median(run[0] + run[1] for run in warm)


def compare(n, d, P, fraction, seed):
    """Yield the rows of one program."""
    program = instance(n, d, P, fraction, seed)
    layer, gradient, (forward, backward), warm = ours(program)
    error, active = central_error(layer, program, gradient), len(layer.optimum.gate_index)
    peer = peer_layer(program)
    for setting, arguments in SETTINGS.items():
        runs = [
            timed(lambda *inputs: torch.stack(peer(*inputs, solver_args=dict(arguments))), [leaves(program)])  # noqa: B023
            for _ in range(REPEATS)
        ]
        seconds = [statistics.median(run[i] for run in runs) for i in (0, 1)]
        peer_error = float((runs[-1][2] - gradient).norm() / gradient.norm())
        yield Row(n, d, P, fraction, active, setting, peer_error, error, *seconds, forward, backward, warm)


def line_of(row):
    """Return one line of the table."""
    return (
        f"| {row.n}, {row.d}, {row.P}, {row.fraction} | {row.active} | {row.setting} | {row.peer_error:.0e} "
        f"| {row.peer_forward:.3f} + {row.peer_backward:.3f} | {row.error:.0e} "
        f"| {row.forward:.4f} + {row.backward:.4f} | {row.warm:.4f} | {row.ratio:.0f}, warm {row.warm_ratio:.0f} |"
    )


def circumstances(seed):
    """Return what the figures depend on: command, seed, versions, processor."""
    names = ("numpy", "scipy", "torch", "cvxpy", "cvxpylayers", "diffcp", "clarabel")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "command": f"python benchmarks/layer.py --seed {seed}",
        "seed": seed,
        "versions": {"python": platform.python_version(), "convexbn": convexbn._version.__version__}
        | {name: version(name) for name in names},
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "threads": 1,
    }


def main():
    """Measure, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| n, d, P, decay | active | cvxpylayers | error | forward + backward, s | ours: error | s | warm, s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for shape in SHAPES:
        for fraction in FRACTIONS:
            for row in compare(*shape, fraction, asked.seed):
                print(line_of(row), flush=True)
                found.append(asdict(row) | {"ratio": row.ratio, "warm_ratio": row.warm_ratio})
    if asked.json:
        asked.json.write_text(json.dumps(circumstances(asked.seed) | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
