"""Attacks on the lower bounds: runs and beaten bounds, by kind of data and model.

Usage: python benchmarks/attacks.py [--runs 5000] [--first 0] [--kinds offset float32 ...] [--models paper default relu]
                                     [--seconds 600]

Every run fits random data whose directions are hard to tell from rounding, and searches an explicit network below the
bound of the certificate (the judge is tests/attacks.py, in 50 digits). A seed reproduces a run. A bound counts as
beaten if its certificate claims it for the directions that the network uses: ``excepted`` are the runs whose scope
names directions that it does not speak of, and among these the networks that use them.
"""

import argparse
import collections
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from convexbn import ConvexBNClassifier, ConvexBNRegressor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from attacks import KINDS, attack
from instances import PAPER

#: Parameters of the models that are attacked, by name.
MODELS = {
    "paper": {**PAPER, "n_gates": 8},
    "default": {"n_gates": 8},
    "filtered": {"n_gates": 8, "gates": "whitened", "spectral_filter": 1e-3},
    "relu": {"activation": "relu", "proof_time": 0.2, "max_iter": 5},
}


def run(seed, kind, name):
    """Attack one model on one data set.

    Parameters
    ----------
    seed, kind, name : int, str, str
        A key of ``KINDS`` and one of ``MODELS``.
    """
    rng = np.random.default_rng(seed)
    X, y = KINDS[kind](rng, int(rng.integers(8, 40)))
    decay = "auto" if name == "default" and rng.random() < 0.5 else float(10.0 ** rng.uniform(-3, 0.5))
    weights = None if rng.random() < 0.7 else 10.0 ** rng.uniform(-2, 2, len(X))
    parameters = {**MODELS[name], "weight_decay": decay, "random_state": 0}
    if set(np.unique(y)) == {-1.0, 1.0} and rng.random() < 0.4:
        model = ConvexBNClassifier(loss="logistic", **parameters)
    else:
        model = ConvexBNRegressor(**parameters)
    return attack(model, X, y, rng, weights)


def main():
    """Run attacks in turn and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=np.inf, help="stop before the next run after so long")
    chosen, began = parser.parse_args(), time.monotonic()
    warnings.simplefilter("ignore")
    pairs = [(kind, name) for kind in chosen.kinds for name in chosen.models]
    counts = collections.defaultdict(collections.Counter)
    for seed in range(chosen.first, chosen.first + chosen.runs):
        if time.monotonic() - began > chosen.seconds:
            break
        kind, name = pairs[seed % len(pairs)]
        count = counts[kind, name]
        count["runs"] += 1
        try:
            found = run(seed, kind, name)
        except ValueError as error:
            count[f"refused: {str(error)[:40]}"] += 1
            continue
        count["no bound"] += not found.valid
        count["excepted"] += found.excepted
        if found.beats:
            count["excepted and beaten" if found.excepted else "BEATEN"] += 1
            print(f"seed {seed} {kind} {name}: network {found.value!r} bound {found.bound!r} {found.scope}", flush=True)
    for (kind, name), count in counts.items():
        print(f"{kind:16s} {name:9s}", dict(count))
    total = sum(counts.values(), collections.Counter())
    print("all", dict(total))


if __name__ == "__main__":
    main()
