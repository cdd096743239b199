"""Where ``solver="auto"`` changes from Newton to descent in subspaces: either on made-up and real data, to 1e-6.

Usage: python benchmarks/choice.py [--folder FASHION_MNIST] [--json FILE]

Seconds of a whole fit by the clock, with the threads that BLAS is given (OMP_NUM_THREADS). For the squared loss Newton
on the group scales, for cross-entropy accelerated proximal gradients, each beside descent in subspaces; ``*`` marks
what "auto" takes.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, make_classification

from convexbn import ConvexBNClassifier, max_weight_decay
from convexbn.files.datasets import fashion_mnist
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.losses import LOSSES
from convexbn.training.fit import choose_solver
from convexbn_studies.study import PAPER

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
GATES = 100
FRACTION = 0.02  # of the largest weight decay


def made_up(n, d, classes):
    """Rows of two clusters a class, a tenth of the labels wrong."""
    return make_classification(
        n, d, n_informative=min(d, 10), n_redundant=0, n_classes=classes, flip_y=0.1, random_state=0
    )


def data_sets(folder):
    """Name, rows, labels and rank."""
    for n, d, classes in (
        (500, 20, 2), (2000, 20, 2), (3000, 20, 2), (3000, 20, 5), (5000, 20, 2), (5000, 20, 5), (5000, 100, 2),
        (1500, 5, 2), (4000, 5, 2),
    ):  # fmt: skip
        yield f"{n} x {d}, {classes} classes", *made_up(n, d, classes), None
    yield "digits", *load_digits(return_X_y=True), None
    images = fashion_mnist(folder)
    for n in (3000, 5000):
        yield f"Fashion-MNIST {n}, 100 directions", images.X[:n], images.y[:n], 100


def choice_for(loss, X, y, rank):
    """What "auto" takes for such data."""
    n, outputs = len(X), len(np.unique(y)) if len(np.unique(y)) > 2 or loss == "cross_entropy" else 1
    q = 1 + (rank or np.linalg.matrix_rank(X - X.mean(axis=0)))
    bound = LOSSES[loss](np.zeros((n, outputs)), np.ones(n))
    return choose_solver(
        "auto", GatedProgram(gated_operator(np.zeros((n, q)), np.zeros((n, GATES), dtype=bool)), bound, 1.0)
    )


def fitted(solver, loss, X, y, rank):
    """Seconds, iterations and status of a fit."""
    program = PAPER | {"loss": loss, "rank": rank, "gates": "data", "n_gates": GATES, "random_state": 0}
    weight_decay = FRACTION * max_weight_decay(X, y, **program)
    before = time.perf_counter()
    model = ConvexBNClassifier(solver=solver, weight_decay=weight_decay, **program).fit(X, y)
    return {
        "seconds": time.perf_counter() - before,
        "iterations": model.n_iter_,
        "status": model.certificate_.status.value,
        "relative gap": model.certificate_.relative_gap,
    }


def main():
    """Print a line a data set and loss, and write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FASHION_MNIST, help="idx files of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    for name, X, y, rank in data_sets(asked.folder):
        for loss, other in (("squared", "group_newton"), ("cross_entropy", "proximal")):
            chosen = choice_for(loss, X, y, rank)
            runs = {solver: fitted(solver, loss, X, y, rank) for solver in (other, "subspace")}
            results.append({"data": name, "loss": loss, "auto": chosen, "fits": runs})
            shown = "   ".join(
                f"{'*' if solver == chosen else ' '}{solver} {run['seconds']:6.2f} s {run['status']}"
                for solver, run in runs.items()
            )
            print(f"{name:34} {loss:14} {shown}", flush=True)
    if asked.json:
        figures = {
            "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')} python benchmarks/choice.py",
            "results": results,
        }
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
