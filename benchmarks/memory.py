"""Peak memory of a fit of G2b's size through the estimator, imports included: python benchmarks/memory.py."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are loaded, below

import resource

from convexbn import ConvexBNRegressor, max_weight_decay
from convexbn_studies.study import PAPER
from instances import planted


def peak():
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    """Fit at 0.01 of the largest weight decay with 1,000 gates, and print the peaks."""
    X, y = planted(2000, 100, seed=0)
    options = PAPER | {"gates": "whitened", "n_gates": 1000, "random_state": 0}
    largest = max_weight_decay(X, y.ravel(), **options)
    before = peak()
    model = ConvexBNRegressor(weight_decay=0.01 * largest, **options).fit(X, y.ravel())
    print(f"{model.certificate_.status}: {peak():.0f} MB at the peak, {before:.0f} MB before the fit")


if __name__ == "__main__":
    main()
