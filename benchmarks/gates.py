"""Test accuracy of gates on raw features, isotropic and trained ones: few images, and tables in mixed units.

Usage: python benchmarks/gates.py [--folder FASHION_MNIST] [--seeds 0 1 2] [--json FILE]

Few images: 60 gates, the better of two weight decays, scored on 10,000 others. Tables: ten splits in halves, columns in
their own units, 60 gates, .02 of the largest weight decay. All rows of Fashion-MNIST: tasks ``gated``,
``gated-whitened`` and ``gated-data`` of ``scale.py``.
"""

import argparse
import functools
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split

from convexbn import ConvexBNClassifier, max_weight_decay
from convexbn.files.datasets import fashion_mnist
from convexbn_studies.study import PAPER

KINDS = ("data", "whitened", "trained")
DIRECTIONS = {"50 directions": {"rank": 50}, "300, filter .2": {"rank": 300, "spectral_filter": 0.2}, "all": {}}
TABLES = {"wine": load_wine, "breast cancer": load_breast_cancer}


def of_images(X, y, n, settings, seed):
    """Accuracy on 10,000 images of the better of two weight decays on n others."""
    order = np.random.default_rng(seed).permutation(len(X))
    train, test = order[:n], order[n : n + 10_000]
    settings = PAPER | {"loss": "squared"} | settings | {"n_gates": 60, "random_state": seed}
    largest = max_weight_decay(X[train], y[train], **settings)
    models = (ConvexBNClassifier(weight_decay=share * largest, tol=1e-3, **settings) for share in (0.15, 0.04))
    return max(model.fit(X[train], y[train]).score(X[test], y[test]) for model in models)


def of_table(X, y, gates, seed):
    """Accuracy on half of the rows."""
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, random_state=seed, stratify=y)
    program = PAPER | {"loss": "squared", "gates": gates, "n_gates": 60, "random_state": seed}
    weight_decay = 0.02 * max_weight_decay(X, y, **program)
    return ConvexBNClassifier(weight_decay=weight_decay, tol=1e-3, **program).fit(X, y).score(X_test, y_test)


def figures(folder, seeds):
    """One line a case and kind of gates."""
    data = fashion_mnist(folder)
    for n in (600, 2000):
        for name, settings in DIRECTIONS.items():
            for gates in KINDS:
                given = settings | {"gates": gates}
                accuracy = functools.partial(of_images, data.X, data.y, n, given)
                yield timed(f"{n} images, {name}", gates, accuracy, seeds)
    for name, load in TABLES.items():
        X, y = load(return_X_y=True)
        for gates in KINDS:
            yield timed(name, gates, functools.partial(of_table, X, y, gates), range(10))


def timed(case, gates, accuracy, seeds):
    before = time.process_time()
    found = [accuracy(seed) for seed in seeds]
    spent = time.process_time() - before
    return {"case": case, "gates": gates, "accuracies": found, "mean": float(np.mean(found)), "CPU seconds": spent}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines = []
    for line in figures(arguments.folder, arguments.seeds):
        lines.append(line)
        print(f"{line['case']:24} {line['gates']:10} {line['mean']:.4f}   {line['CPU seconds']:.0f} CPU s", flush=True)
    if arguments.json:
        machine = {"processor": platform.machine(), "python": platform.python_version(), "numpy": version("numpy")}
        arguments.json.write_text(json.dumps({"machine": machine, "results": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
