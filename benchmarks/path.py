"""Cost of a certified path of 20 weight decays, with validation, relative to one fit, on Fashion-MNIST rows.

    python benchmarks/path.py [--rows 10000] [--rank 100] [--gates 100] [--tol 1e-3] [--checkpoint FILE]

CPU seconds of this process: set ``OMP_NUM_THREADS`` to the threads that you want to count. The fit is that of
``weight_decay="auto"``, 0.02 of the largest; the path goes from the largest to 0.01 of it.
"""

import argparse
import time

from convexbn import ConvexBNClassifier, fit_path
from convexbn.datasets import fashion_mnist


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rank", type=int, default=100)
    parser.add_argument("--gates", type=int, default=100)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--checkpoint")
    options = parser.parse_args()
    data = fashion_mnist()
    X, y, validation = data.X[: options.rows], data.y[: options.rows], (data.X[-2000:], data.y[-2000:])
    model = ConvexBNClassifier(rank=options.rank, n_gates=options.gates, tol=options.tol, random_state=0)
    started = time.process_time()
    fitted = model.fit(X, y)
    one = time.process_time() - started
    print(f"one fit      {one:7.2f} s   {fitted.n_iter_} iterations   gap {fitted.certificate_.relative_gap:.1e}")
    started = time.process_time()
    path = fit_path(model, X, y, validation=validation, checkpoint=options.checkpoint)
    points = list(path)
    seconds = time.process_time() - started
    worst = max(point.certificate.relative_gap for point in points)
    iterations = sum(point.model.n_iter_ for point in points)
    print(f"{len(points)} points   {seconds:7.2f} s   {iterations} iterations   largest gap {worst:.1e}")
    print(f"path / fit   {seconds / one:7.2f}     best validation score {path.best.score:.4f}")


if __name__ == "__main__":
    main()
