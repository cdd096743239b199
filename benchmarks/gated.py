"""How many times faster than its peers the gated solver is: one run, one thread, CPU seconds, ratios.

Usage: python benchmarks/gated.py --pyscnn ENV/bin/python [--seed 0] [--folder FASHION_MNIST] [--json FILE]

The head of peers.py says how to make ENV. Objectives and gaps are recomputed in float64 by judge.py from
the blocks; the error of a method is ``(objective - optimum) / optimum``, where the optimum is the objective
of a solution certified to `REFERENCE_GAP`. Takes about five minutes.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are loaded, below
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAYON_NUM_THREADS"] = "1"  # Clarabel's

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from convexbn.certificate.certificate import Found, judge
from convexbn.certificate.dual_bounds import GateDualBounds
from convexbn.certificate.status import Scope
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.losses import SquaredLoss
from convexbn.solvers.gated.group_newton import GroupNewton
from instances import FASHION_MNIST, SHAPES, gated_instance, largest_weight_decay
from judge import Certifier, objective, relative_gap
from peers import clarabel_cvxpy, fista_float32, pyscnn, pyscnn_versions

REFERENCE_GAP = 1e-9
REPEATS = 3
PATH = np.geomspace(0.9, 0.01, 20)  # weight decays of the path, as fractions of the largest
MOST_FACTORISATIONS = 6  # a point of the path


@dataclass(frozen=True)
class Run:
    """One run of our solver.

    Attributes
    ----------
    seconds : float
        CPU seconds of the solve, certificate included.
    blocks : ndarray of shape (P, q, K)
        The coefficients found.
    factorisations : int
        Cholesky factorisations of size n.
    """

    seconds: float
    blocks: np.ndarray
    factorisations: int


@dataclass(frozen=True)
class Row:
    """One comparison: the CPU seconds of both to the same accuracy, and the ratio that is asked for.

    Attributes
    ----------
    instance, peer, measure : str
        What was solved, by whom else, and what the accuracy measures.
    accuracy : float
        What the peer reached in its seconds.
    gap : float
        The certified relative gap that ours reached in its seconds.
    seconds, peer_seconds, ratio, at_least : float
        The comparison.
    """

    instance: str
    peer: str
    measure: str
    accuracy: float
    gap: float
    seconds: float
    peer_seconds: float
    at_least: float

    @property
    def ratio(self):
        """How many times faster ours was."""
        return self.peer_seconds / self.seconds


def program_of(instance):
    """Return an instance as a program of the package."""
    loss = SquaredLoss(instance.Y, np.ones(len(instance.Y)))
    return GatedProgram(gated_operator(instance.A, instance.patterns), loss, instance.weight_decay)


def run_of(instance, solution, seconds):
    """Return a solution as a Run: its blocks on all gates, the figures beside them."""
    blocks = np.zeros((instance.patterns.shape[1], instance.A.shape[1], instance.Y.shape[1]))
    blocks[solution.weights.gate_index] = solution.weights.values
    return Run(seconds, blocks, solution.n_factorizations)


def certified(program, solution, gap):
    """Judge a solution as a fit does."""
    norms = float(program.norm.of(solution.weights.values).sum())
    found, bounds = Found(program.outputs(*solution.weights), norms, norms), GateDualBounds(program)
    return judge(program.loss, found, program.weight_decay, bounds, Scope("these gates"), gap, solution.stopped_by)


def ours(instance, gap):
    """Solve to a certified relative gap with convexbn, and certify; return a Run."""
    started = time.process_time()
    program = program_of(instance)
    solution = GroupNewton(tol=gap).solve(program)
    certified(program, solution, gap)
    return run_of(instance, solution, time.process_time() - started)


def ours_path(instance, weight_decays, gap):
    """Solve a path of weight decays, each to a certified relative gap; return a Run for each."""
    runs, solution = [], None
    for weight_decay in weight_decays:
        started = time.process_time()
        program = program_of(instance).with_weight_decay(weight_decay)
        solution = GroupNewton(tol=gap).solve(program, start=solution and solution.weights)
        certified(program, solution, gap)
        runs.append(run_of(instance, solution, time.process_time() - started))
    return runs


def median_run(instance, gap):
    """Return the run of median CPU seconds out of `REPEATS`, and the gap that the judge finds in it."""
    runs = sorted((ours(instance, gap) for _ in range(REPEATS)), key=lambda run: run.seconds)
    middle = runs[REPEATS // 2]
    return middle, relative_gap(instance, middle.blocks)


def optimum(instance):
    """Return the optimal objective, from a solution that the judge certifies to `REFERENCE_GAP`."""
    blocks = ours(instance, REFERENCE_GAP).blocks
    gap = relative_gap(instance, blocks)
    if not gap <= REFERENCE_GAP:
        raise RuntimeError(f"the reference has a relative gap of {gap:.1e}")
    return objective(instance, blocks)


def against_clarabel(name, instance, at_least):
    """Compare at a certified gap of 1e-6 with CVXPY and Clarabel at their default accuracy."""
    run, gap = median_run(instance, 1e-6)
    peer = clarabel_cvxpy(instance)
    accuracy = relative_gap(instance, peer.blocks)
    return Row(name, "CVXPY + Clarabel", "gap", accuracy, gap, run.seconds, peer.seconds[-1], at_least)


def against_pyscnn(name, instance, at_least, best, interpreter):
    """Compare at a certified gap of 1e-6 with pyscnn's way to that error, or to the smallest it reaches."""
    run, gap = median_run(instance, 1e-6)
    peer = pyscnn(instance, interpreter)
    check_scale(instance, peer)
    errors = peer.objectives / best - 1
    reached = np.flatnonzero(errors <= max(1e-6, errors.min()))[0]
    return Row(name, "pyscnn", "error", errors[reached], gap, run.seconds, peer.seconds[reached], at_least)


def check_scale(instance, trajectory):
    """Raise if the objective that a peer reports at its end is not the one that it should minimise."""
    value = objective(instance, trajectory.blocks)
    if abs(trajectory.objectives[-1] - value) > 1e-9 * value:
        raise RuntimeError("the peer minimised another objective")


def against_fista(name, instance, at_least, gap=1e-4):
    """Compare with float32 FISTA, both stopped by the same certificate."""
    run, found = median_run(instance, gap)
    certifier = Certifier(instance, gap)
    fista_float32(instance, 10_000, certifier)
    accuracy, seconds = certifier.relative_gap, certifier.seconds
    return Row(name, "FISTA float32", "gap", accuracy, found, run.seconds, seconds, at_least)


def compare(instances, optima, interpreter):
    """Yield the rows of the table, each as soon as it is measured."""
    yield against_clarabel("G1", instances["G1"], at_least=100)
    for name, at_least in {"G1": 8, "G2a": 12, "G2b": 12}.items():
        yield against_pyscnn(name, instances[name], at_least, optima[name], interpreter)
    yield against_fista("G3", instances["G3"], at_least=2)


def measure_path(instance):
    """Solve the path on the data of an instance; return its figures point by point."""
    weight_decays = PATH * largest_weight_decay(instance.A, instance.patterns, instance.Y)
    runs = ours_path(instance, weight_decays, 1e-6)
    points = [replace(instance, weight_decay=weight_decay) for weight_decay in weight_decays]
    return {
        "weight_decays": list(weight_decays),
        "gaps": [relative_gap(point, run.blocks) for point, run in zip(points, runs, strict=True)],
        "factorisations": [run.factorisations for run in runs],
        "seconds": sum(run.seconds for run in runs),
    }


def describe(instance, best):
    """Return the shape, the weight decay and the optimum of an instance."""
    (n, q), P, K = instance.A.shape, instance.patterns.shape[1], instance.Y.shape[1]
    return {"n": n, "q": q, "P": P, "K": K, "weight_decay": instance.weight_decay, "optimum": best}


def print_row(row):
    """Print one line of the table."""
    reached = f"{row.measure} {row.accuracy:.1e}"
    print(
        f"| {row.instance:3} | {row.peer:16} | {reached:13} | {row.peer_seconds:8.2f} | gap {row.gap:.1e} "
        f"| {row.seconds:7.3f} | {row.ratio:6.1f} | {row.at_least:8} |",
        flush=True,
    )


def print_path(path):
    """Print the line of the path."""
    counts, gap = path["factorisations"], max(path["gaps"])
    print(
        f"\nPath of {len(counts)} weight decays on G2, each to a gap of {gap:.1e} or less: "
        f"{np.mean(counts):.1f} factorisations a point, at most {max(counts)} "
        f"(asked: {MOST_FACTORISATIONS}), {path['seconds']:.2f} CPU s in all."
    )


def circumstances(seed, interpreter):
    """Return what the figures depend on: command, seed, versions, processor."""
    names = ("convexbn", "numpy", "scipy", "cvxpy", "clarabel")
    return {
        "command": f"python benchmarks/gated.py --seed {seed} --pyscnn ENV/bin/python",
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "versions beside pyscnn": pyscnn_versions(interpreter),
        "processor": processor(),
        "threads": 1,
    }


def processor():
    """Return the model of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pyscnn", required=True, help="python of pyscnn's environment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FASHION_MNIST, help="idx files of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def main():
    """Measure, print the table, and write it as JSON if asked to."""
    asked = arguments()
    instances = {name: gated_instance(name, asked.seed, asked.folder) for name in SHAPES}
    optima = {name: optimum(instance) for name, instance in instances.items()}
    print("| on  | peer             | reached       | CPU s    | ours        | CPU s   | ratio  | at least |")
    print("|-----|------------------|---------------|----------|-------------|---------|--------|----------|")
    rows = []
    for row in compare(instances, optima, asked.pyscnn):
        print_row(row)
        rows.append(asdict(row) | {"ratio": row.ratio})
    path = measure_path(instances["G2a"])
    print_path(path)
    if asked.json:
        described = {name: describe(instances[name], optima[name]) for name in SHAPES}
        figures = circumstances(asked.seed, asked.pyscnn) | {"instances": described}
        asked.json.write_text(json.dumps(figures | {"rows": rows, "path": path}, indent=1) + "\n")


if __name__ == "__main__":
    main()
