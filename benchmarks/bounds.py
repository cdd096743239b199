"""What each bound over all patterns reaches on planted one-output ReLU programs, and what it costs.

Usage: python benchmarks/bounds.py [--seed 0]

Prints a table: objective and estimated gap of `ColumnGeneration` within a minute, then for every bound the valid
relative gap and its CPU seconds, one thread. Data: Gaussian rows, a teacher of five ReLU neurons on the whitened data
plus 30 % noise; the weight decay is a fraction of the largest value that a local search finds. Takes about ten minutes.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are loaded, below

import argparse
import time

import numpy as np

from convexbn import bounds
from convexbn.certificate.certificate import lower_bound
from convexbn.data.whitening import whiten
from convexbn.program.losses import SquaredLoss
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget
from convexbn.solvers.relu.column_generation import ColumnGeneration

CASES = [(n, q, f) for n, q in ((60, 3), (200, 6), (200, 10), (500, 21), (500, 50)) for f in (0.3, 0.1, 0.02)]
COLUMNS = ("orthant", "every cell", "relaxation", "branch and bound, 10 s", "dual point", "lifted dual point")


def instance(n, q, seed):
    """Whitened rows (n, q) and targets (n, 1) of unit variance."""
    rng = np.random.default_rng(seed)
    rows = whiten(rng.standard_normal((n, q - 1))).rows
    teacher = np.maximum(rows @ rng.standard_normal((q, 5)), 0) @ rng.standard_normal((5, 1))
    targets = teacher / teacher.std() + 0.3 * rng.standard_normal((n, 1))
    return rows, targets / targets.std()


def residual_bounds(V, rows, beta):
    """Bounds of the scaled residual, by name: (dual, bound)."""
    yield "orthant", lambda: (V, bounds.orthant(V)[0])
    if bounds.few_cells(rows):
        yield "every cell", lambda: (V, bounds.EveryCell(rows).maxima(V, beta).value)
    yield "relaxation", lambda: (V, bounds.relaxation(V, rows).value)
    if rows.shape[1] <= bounds.MAX_RANK:
        yield "branch and bound, 10 s", lambda: (V, bounded(V, rows, beta))


def bounded(V, rows, beta):
    """Branch and bound for ten seconds."""
    deadline = time.monotonic() + 10
    return bounds.branch_and_bound(V, rows, tol=1e-6, target=beta, max_nodes=10_000_000, deadline=deadline).value


def chosen_points(targets, V, rows, beta):
    """Dual points chosen for a relaxation, by name: (dual, bound)."""
    for name, choose in (("dual point", bounds.dual_point), ("lifted dual point", bounds.lifted_dual_point)):

        def work(choose=choose):
            chosen = choose(targets, V, rows, beta)
            return chosen.dual, chosen.value

        yield name, work


def measure(n, q, fraction, seed):
    """Yield the cells of one row of the table."""
    rows, targets = instance(n, q, seed)
    rng = np.random.default_rng(seed)
    beta = fraction * bounds.local_maxima(targets, rows, 300, rng)[0][0]
    program = ReluProgram(rows, SquaredLoss(targets, np.ones(n)), beta)
    started = time.process_time()
    solution = ColumnGeneration().solve(program, rng=rng, budget=Budget(time_limit=60))
    seconds = time.process_time() - started
    objective = program.objective(solution.weights)
    yield f"{objective:.6g}, est. {solution.history[-1].estimated_gap:.0e} ({seconds:.1f})"
    V = targets - program.outputs(solution.weights)
    found = dict([*residual_bounds(V, rows, beta), *chosen_points(targets, V, rows, beta)])
    for name in COLUMNS:
        if name not in found:
            yield ""
            continue
        started = time.process_time()
        dual, bound = found[name]()
        seconds = time.process_time() - started
        gap = 1 - lower_bound(program.loss, dual, bound, beta) / objective
        yield f"{max(gap, 0):.2g} ({seconds:.1f})"


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    print(f"| n, q, decay | objective (s) | {' | '.join(COLUMNS)} |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for n, q, fraction in CASES:
        print(f"| {n}, {q}, {fraction} | " + " | ".join(measure(n, q, fraction, seed)) + " |", flush=True)


if __name__ == "__main__":
    main()
