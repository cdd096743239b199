"""Real data sizes, whole jobs: load, whiten, fit, certify, test. Time, peak memory, accuracy and gap over time.

Usage: python benchmarks/scale.py [gated ...] [--seeds 0 1 2] [--threads 2] [--folder FASHION_MNIST] [--json FILE]

CIFAR-10 is read from the folder that the environment variable CIFAR10_HOME names. Every run is a process of its own,
so that its peak memory and its clock, imports included, are its own. Objective and gaps are those of the certificate
and of the solver's history, all in float64.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

STARTED = time.perf_counter()
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist

#: Share of the largest weight decay.
FRACTION = 0.01


def gated(seed, folder):
    """Fashion-MNIST, 100 directions, 500 gates, squared loss, certified to 1e-3."""
    return gated_fit(seed, folder, loss="squared", tol=1e-3)


def gated_cross_entropy(seed, folder):
    """The same with softmax cross-entropy, certified to 1e-2."""
    return gated_fit(seed, folder, loss="cross_entropy", tol=1e-2)


def gated_squared_hinge(seed, folder):
    """The same with the squared hinge, one class against the others, certified to 1e-3."""
    return gated_fit(seed, folder, loss="squared_hinge", tol=1e-3)


def gated_now(seed, folder):
    """The gated network of the squared loss when the solver has 20 seconds; its certificate says what is open."""
    return gated_fit(seed, folder, loss="squared", tol=1e-3, time_limit=20)


def relu(seed, folder):
    """Fashion-MNIST, a ReLU network on 200 filtered directions; decay, rank, filter and epochs by validation."""
    return relu_fit(fashion_mnist_in(folder), seed, decay=1e-3, rank=200, spectral_filter=0.05, width=1000, max_iter=40)


def relu_cifar(seed, folder):
    """CIFAR-10, a ReLU network on 200 directions; decay, rank and learning rate by validation."""
    return relu_fit(cifar(), seed, decay=4e-3, rank=200, width=1000)


def relu_cifar_whole(seed, folder):
    """The same on 800 directions: what truncation is good for."""
    return relu_fit(cifar(), seed, decay=4e-3, rank=800, width=1000)


def sgd_cifar(seed, folder):
    """CIFAR-10, a batch-normalised network of torch of that width on raw pixels; decay 2e-3, not tuned further."""
    data = cifar()
    before = time.perf_counter()
    accuracy = sgd(data, seed, width=1000, decay=2e-3, rate=0.1, epochs=20, batch=500)
    return {
        "seconds": seconds(),
        "training seconds": time.perf_counter() - before,
        "test accuracy": accuracy,
        "trace": [],
    }


TASKS = {
    "gated": gated, "gated-cross-entropy": gated_cross_entropy, "gated-squared-hinge": gated_squared_hinge,
    "gated-now": gated_now, "relu": relu,
    "relu-cifar": relu_cifar, "relu-cifar-whole": relu_cifar_whole, "sgd-cifar": sgd_cifar,
}  # fmt: skip


def fashion_mnist_in(folder):
    """Fashion-MNIST."""
    from convexbn.datasets import fashion_mnist

    return fashion_mnist(folder)


def cifar():
    """CIFAR-10 from the folder that CIFAR10_HOME names."""
    from convexbn.datasets import cifar10

    return cifar10()


def relu_fit(data, seed, decay, **settings):
    """Train a ReLU network on the cross-entropy; return the figures."""
    from convexbn import ConvexBNClassifier

    started, trace = time.perf_counter(), []

    def record(report):
        trace.append((seconds(), report.objective, report.relative_gap))

    model = ConvexBNClassifier(
        activation="relu", loss="cross_entropy", weight_decay=decay * len(data.X) ** 0.5, random_state=seed,
        callback=record, **settings,
    ).fit(data.X, data.y)  # fmt: skip
    fitted, proof = time.perf_counter(), model.certificate_
    return {
        "training seconds": trace[-1][0] - (started - STARTED),
        "fit seconds": fitted - started,
        "test accuracy": model.score(data.X_test, data.y_test),
        "seconds": seconds(),
        "relative gap": proof.relative_gap,
        "estimated gap": proof.estimated_gap,
        "objective": proof.objective,
        "status": proof.status.value,
        "iterations": model.n_iter_,
        "trace": trace,
    }


def sgd(data, seed, width, decay, rate, epochs, batch):
    """Test accuracy of Linear, BatchNorm1d, ReLU, Linear by SGD with momentum and one cycle of the learning rate."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    scale = 1 / 255
    X = torch.tensor(data.X, dtype=torch.float32).mul_(scale)
    labels, place = np.unique(data.y, return_inverse=True)
    y = torch.tensor(place)
    module = torch.nn.Sequential(
        torch.nn.Linear(X.shape[1], width, bias=False), torch.nn.BatchNorm1d(width), torch.nn.ReLU(),
        torch.nn.Linear(width, len(labels)),
    )  # fmt: skip
    steps = epochs * -(-len(X) // batch)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(X)).split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(X[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    module.eval()
    with torch.no_grad():
        answers = module(torch.tensor(data.X_test, dtype=torch.float32).mul_(scale)).argmax(1).numpy()
    return float((labels[answers] == data.y_test).mean())


def gated_fit(seed, folder, **settings):
    """Fit 500 gates on 100 directions of Fashion-MNIST; return the figures."""
    from convexbn import ConvexBNClassifier, max_weight_decay

    data = fashion_mnist_in(folder)
    program = {"loss": settings["loss"], "gates": "whitened", "n_gates": 500, "rank": 100, "random_state": seed}
    before = time.perf_counter()
    weight_decay = FRACTION * max_weight_decay(data.X, data.y, **program)
    outside = time.perf_counter() - before  # given to the job as a number
    trace = []

    def record(report):
        trace.append((seconds() - outside, report.objective, report.relative_gap))

    model = ConvexBNClassifier(**program | settings, weight_decay=weight_decay, callback=record).fit(data.X, data.y)
    proof = model.certificate_
    return {
        "seconds": seconds() - outside,
        "test accuracy": model.score(data.X_test, data.y_test),
        "relative gap": proof.relative_gap,
        "objective": proof.objective,
        "status": proof.status.value,
        "iterations": model.n_iter_,
        "weight decay": weight_decay,
        "trace": trace,
    }


def seconds():
    """Seconds since this process began to run the script."""
    return time.perf_counter() - STARTED


def run(task, seed, asked):
    """Run a task in a process of its own; return its figures."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(asked.threads))
    command = [sys.executable, __file__, task, "--seeds", str(seed), "--folder", str(asked.folder), "--one"]
    done = subprocess.run(command, env=os.environ | threads, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def one(task, seed, folder):
    """Print the figures of one run of a task as JSON."""
    figures = TASKS[task](seed, folder)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures |= {"seed": seed, "cpu seconds": usage.ru_utime + usage.ru_stime, "peak GB": usage.ru_maxrss / 1e6}
    print(json.dumps(figures))


def print_trace(figures):
    """Print the gap over time of one run, a line for each new gap."""
    best = 1.0
    for at, objective, gap in figures["trace"]:
        if gap < 0.9 * best:
            best = gap
            print(f"    {at:7.1f} s   objective {objective:.2f}   gap {gap:.1e}")


def circumstances(asked):
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "command": "python benchmarks/scale.py " + " ".join([*asked.tasks, "--seeds", *map(str, asked.seeds)]),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("convexbn", "numpy", "scipy")},
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "threads": asked.threads,
    }


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=FASHION_MNIST, help="idx files of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := set(asked.tasks) - set(TASKS):
        parser.error(f"no task {unknown.pop()!r}; there are {', '.join(TASKS)}.")
    return asked


def main():
    """Run the tasks, print medians over seeds, and write all figures as JSON if asked to."""
    asked = arguments()
    if asked.one:
        one(asked.tasks[0], asked.seeds[0], asked.folder)
        return
    results = {}
    for task in asked.tasks:
        runs = results[task] = [run(task, seed, asked) for seed in asked.seeds]
        print(f"{task}: {TASKS[task].__doc__.splitlines()[0]}")
        for name, figure in runs[0].items():
            if isinstance(figure, int | float) and name != "seed":
                print(f"    {name:16} {statistics.median(figures[name] for figures in runs):.4g}")
        print_trace(runs[0])
    if asked.json:
        asked.json.write_text(json.dumps(circumstances(asked) | {"tasks": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
