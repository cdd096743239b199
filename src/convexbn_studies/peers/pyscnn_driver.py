"""Solve one gated program with pyscnn; a script for the interpreter of pyscnn's own environment.

Usage: python pyscnn_driver.py INPUT.npz OUTPUT.npz

INPUT holds A, Y, gates, weight_decay, max_iter and tolerance; OUTPUT receives the weights, the gates in
pyscnn's order, and for every iteration the CPU seconds spent in it so far and pyscnn's objective. Needs nothing of this
package.
"""

import sys
import time
import timeit
from typing import Any

import numpy as np


def solve(A: Any, Y: Any, gates: Any, weight_decay: float, max_iter: int, tolerance: float) -> tuple[Any, Any]:
    """Run R-FISTA in float64 on ``1/(2n) ||sum_i D_i A s_i - y||^2 + weight_decay / n * sum_i ||s_i||``.

    pyscnn's log leaves out its own bookkeeping; it reads the clock as ``timeit.default_timer``, which is
    made that of the CPU here.
    """
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    timeit.default_timer = time.process_time
    model = ConvexGatedReLU(gates)
    solver = RFISTA(model, max_iters=int(max_iter), tol=float(tolerance))
    penalty = NeuronGL1(float(weight_decay) / len(Y))
    options = {"return_convex": True, "unitize_data": False, "dtype": "float64"}
    return optimize_model(model, solver, Metrics(), A, Y, regularizer=penalty, **options)


def main(source: str, target: str) -> None:
    """Read the program, solve it, write the result in the units of the unscaled objective."""
    with np.load(source) as stored:
        program: dict[str, Any] = dict(stored)
    model, log = solve(**program)
    np.savez(
        target,
        weights=model.parameters[0][0],
        gates=model.G,
        seconds=log.time,
        objectives=len(program["Y"]) * log.objective,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
