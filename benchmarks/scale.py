"""Real data sizes, whole jobs: load, whiten, fit, certify, test. Time, peak memory, accuracy and gap over time.

Usage: python benchmarks/scale.py [gated ...] [--seeds 0 1 2] [--threads 2] [--folder FASHION_MNIST] [--json FILE]

CIFAR-10 is read from the folder that the environment variable CIFAR10_HOME names. Every run is a process of its own,
so that its peak memory and its clock, imports included, are its own. Objective and gaps are those of the certificate
and of the solver's history, all in float64.
"""

import argparse
import itertools
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

#: Share of the largest weight decay of gated networks on Fashion-MNIST.
FRACTION = 0.005


def gated(seed, folder):
    """Fashion-MNIST, 150 filtered directions, 250 trained gates, squared loss, certified to 1e-3."""
    return gated_fit(seed, folder, loss="squared", tol=1e-3)


def gated_now(seed, folder):
    """The same network when the solver has 20 seconds; its certificate says what is open."""
    return gated_fit(seed, folder, loss="squared", tol=1e-3, time_limit=20)


def gated_whitened(seed, folder):
    """The same with isotropic gates."""
    return gated_fit(seed, folder, loss="squared", tol=1e-3, gates="whitened")


def gated_whitened_more(seed, folder):
    """Isotropic gates, as many as take the time of the trained ones."""
    return gated_fit(seed, folder, loss="squared", tol=1e-3, gates="whitened", n_gates=450)


def gated_data(seed, folder):
    """The same with gates on the raw features."""
    return gated_fit(seed, folder, loss="squared", tol=1e-3, gates="data")


def gated_cross_entropy(seed, folder):
    """The same with softmax cross-entropy, certified to 1e-2."""
    return gated_fit(seed, folder, loss="cross_entropy", tol=1e-2)


def gated_cifar(seed, folder, gates="trained", n_gates=500):
    """CIFAR-10, 200 directions, 500 trained gates, softmax cross-entropy, certified to 1e-2; decay by validation."""
    return fit(
        cifar(), seed, loss="cross_entropy", decay=0.016, rank=200, gates=gates, n_gates=n_gates, tol=1e-2,
    )  # fmt: skip


def gated_cifar_whitened(seed, folder):
    """The same with isotropic gates, as many as take the time of the trained ones."""
    return gated_cifar(seed, folder, gates="whitened", n_gates=520)


def gated_squared_hinge(seed, folder):
    """The same with the squared hinge, one class against the others, certified to 1e-3."""
    return gated_fit(seed, folder, loss="squared_hinge", tol=1e-3)


def relu(seed, folder):
    """Fashion-MNIST, two ReLU networks on 200 filtered directions; decay, rank, filter and epochs by validation."""
    settings = {"rank": 200, "spectral_filter": 0.15, "width": 1000, "n_starts": 2, "max_iter": 20}
    return relu_fit(fashion_mnist_in(folder), seed, decay=4e-4, **settings)


def relu_cifar(seed, folder):
    """CIFAR-10, two ReLU networks on 200 filtered directions; decay, rank, filter, width and number by validation."""
    settings = {"rank": 200, "spectral_filter": 0.03, "width": 1250, "n_starts": 2, "max_iter": 8}
    return relu_fit(cifar(), seed, decay=3e-3, **settings)


def relu_cifar_whole(seed, folder):
    """One ReLU network of width 2000 on 800 directions without a filter: what truncation is good for."""
    return relu_fit(cifar(), seed, decay=3e-3, rank=800, width=2000, max_iter=15)


def sgd_cifar(seed, folder):
    """CIFAR-10, a batch-normalised network of torch, of width 1000, on raw pixels; see sgd-cifar-tuning."""
    data = cifar()
    before = time.perf_counter()
    accuracy = sgd(scaled(data.X), data.y, [(scaled(data.X_test), data.y_test)], seed, **SGD_CIFAR)[0]
    return {
        "seconds": seconds(),
        "training seconds": time.perf_counter() - before,
        "test accuracy": accuracy,
        "trace": [],
    }


def batch_noise(seed, folder):
    """CIFAR-10, a network on whitened rows with the statistics of each batch, by torch, and with those of all rows."""
    import numpy as np
    import torch

    from convexbn.data.whitening import whiten

    data = cifar()
    directions = {"rank": 200, "spectral_filter": 0.03}
    without = relu_fit(data, seed, decay=3e-3, width=2000, max_iter=15, **directions)
    before = time.perf_counter()
    whitening = whiten(data.X, np.ones(len(data.X)), **directions)
    root = len(data.X) ** 0.5
    X, X_test = (
        torch.tensor(root * whitening.transform(Z)[:, :-1], dtype=torch.float32) for Z in (data.X, data.X_test)
    )
    settings = {"width": 2000, "decay": 3e-3, "rate": 0.1, "epochs": 15, "batch": 250}
    accuracy = sgd(X, data.y, [(X_test, data.y_test)], seed, **settings)[0]
    return {
        "seconds": seconds(),
        "training seconds": time.perf_counter() - before,
        "test accuracy": accuracy,
        "test accuracy without": without["test accuracy"],
        "training seconds without": without["training seconds"],
        "trace": [],
    }


def sgd_cifar_tuning(seed, folder):
    """Rates and decays of sgd-cifar, nine settings at five epochs, on 5,000 validation rows."""
    return sgd_cifar_tries(seed, rates=(0.05, 0.1, 0.2), decays=(1e-3, 2e-3, 4e-3), epochs=5)


def sgd_cifar_tuning_long(seed, folder):
    """The best two of sgd-cifar-tuning at ten epochs."""
    return sgd_cifar_tries(seed, rates=(0.2,), decays=(1e-3, 2e-3), epochs=10)


def sgd_cifar_tries(seed, rates, decays, epochs):
    """Validation accuracy of some settings of sgd-cifar."""
    import numpy as np

    data = cifar()
    order = np.random.default_rng(seed).permutation(len(data.X))
    rest, held_out = order[5000:], order[:5000]
    X, parts, found = scaled(data.X[rest]), [(scaled(data.X[held_out]), data.y[held_out])], {}
    for rate, decay in itertools.product(rates, decays):
        settings = SGD_CIFAR | {"rate": rate, "decay": decay, "epochs": epochs}
        found[f"rate {rate:g}, decay {decay:g}"] = sgd(X, data.y[rest], parts, seed, **settings)[0]
    return {"seconds": seconds(), "validation accuracy": found, "trace": []}


#: Of the network that SGD trains on raw pixels.
SGD_CIFAR = {"width": 1000, "decay": 1e-3, "rate": 0.2, "epochs": 20, "batch": 500}


#: Gates, and neurons of the network that SGD trains, on few rows.
FEW_WIDTH = 1000


def few_600(seed, folder):
    """Fashion-MNIST, 600 rows: gated, truncated and not, against SGD on X; 18 tries each, by 2,000 validation rows."""
    return few(folder, seed, 600)


def few_2000(seed, folder):
    """The same with 2,000 rows."""
    return few(folder, seed, 2000)


def path(seed, folder):
    """A certified path of 20 weight decays with validation, Fashion-MNIST 10,000 rows, relative to one fit."""
    from convexbn import ConvexBNClassifier, fit_path, max_weight_decay
    from convexbn_studies.study import PAPER

    data = fashion_mnist_in(folder)
    X, y, validation = data.X[:10_000], data.y[:10_000], (data.X[-2000:], data.y[-2000:])
    program = PAPER | {"rank": 100, "gates": "data", "n_gates": 100, "random_state": seed}
    model = ConvexBNClassifier(weight_decay=0.02 * max_weight_decay(X, y, **program), tol=1e-3, **program)
    before = time.process_time()
    fitted = model.fit(X, y)
    alone = time.process_time() - before
    found = fit_path(model, X, y, validation=validation)
    points = list(found)
    together = time.process_time() - before - alone
    return {
        "cpu seconds of a fit": alone,
        "cpu seconds of the path": together,
        "path / fit": together / alone,
        "iterations of the fit": fitted.n_iter_,
        "iterations": sum(point.model.n_iter_ for point in points),
        "relative gap": max(point.certificate.relative_gap for point in points),
        "validation accuracy": found.best.score,
        "trace": [],
    }


TASKS = {
    "gated": gated, "gated-now": gated_now, "gated-whitened": gated_whitened,
    "gated-whitened-more": gated_whitened_more, "gated-data": gated_data,
    "gated-cross-entropy": gated_cross_entropy, "gated-squared-hinge": gated_squared_hinge, "gated-cifar": gated_cifar,
    "gated-cifar-whitened": gated_cifar_whitened,
    "relu": relu, "relu-cifar": relu_cifar, "relu-cifar-whole": relu_cifar_whole, "batch-noise": batch_noise,
    "sgd-cifar": sgd_cifar, "sgd-cifar-tuning": sgd_cifar_tuning, "sgd-cifar-tuning-long": sgd_cifar_tuning_long,
    "few-600": few_600, "few-2000": few_2000, "path": path,
}  # fmt: skip


def fashion_mnist_in(folder):
    """Fashion-MNIST."""
    from convexbn.files.datasets import fashion_mnist

    return fashion_mnist(folder)


def cifar():
    """CIFAR-10 from the folder that CIFAR10_HOME names."""
    from convexbn.files.datasets import cifar10

    return cifar10()


def relu_fit(data, seed, decay, **settings):
    """Train a ReLU network on the cross-entropy; return the figures."""
    return fit(data, seed, activation="relu", loss="cross_entropy", decay=decay, **settings)


def gated_fit(seed, folder, loss, **settings):
    """Fit gates on some directions of Fashion-MNIST at a share of the largest decay; return the figures."""
    from convexbn import max_weight_decay
    from convexbn_studies.study import PAPER

    data = fashion_mnist_in(folder)
    program = {"loss": loss, "gates": "trained", "n_gates": 250, "rank": 150, "spectral_filter": 0.05} | settings
    asked = {name: program[name] for name in ("loss", "gates", "n_gates", "rank", "spectral_filter")}
    before = time.perf_counter()
    weight_decay = FRACTION * max_weight_decay(data.X, data.y, random_state=seed, **PAPER | asked)
    outside = time.perf_counter() - before  # given to the job as a number
    return fit(data, seed, decay=weight_decay / len(data.X) ** 0.5, outside=outside, **program)


def fit(data, seed, decay, outside=0.0, **settings):
    """Train a classifier at a decay of the mean loss; return the figures, without some seconds before."""
    from convexbn import ConvexBNClassifier
    from convexbn_studies.study import PAPER

    started, trace = time.perf_counter(), []

    def record(report):
        trace.append((seconds() - outside, report.objective, report.relative_gap))

    model = ConvexBNClassifier(
        weight_decay=decay * len(data.X) ** 0.5, random_state=seed, callback=record, **PAPER | settings
    ).fit(data.X, data.y)  # fmt: skip
    fitted, proof = time.perf_counter(), model.certificate_
    accuracy = model.score(data.X_test, data.y_test)
    return {
        "training seconds": trace[-1][0] - (started - STARTED - outside),
        "fit seconds": fitted - started,
        "test accuracy": accuracy,
        "seconds": seconds() - outside,
        "relative gap": proof.relative_gap,
        "estimated gap": proof.estimated_gap,
        "objective": proof.objective,
        "weight decay": model.weight_decay_,
        "status": proof.status.value,
        "iterations": model.n_iter_,
        "trace": trace,
    }


def few(folder, seed, n):
    """Few rows, drawn by the seed: 18 tries of either method, chosen among on 2,000 further rows."""
    import numpy as np

    data = fashion_mnist_in(folder)
    order = np.random.default_rng(seed).permutation(len(data.X))
    training, validation = ((data.X[part], data.y[part]) for part in (order[:n], order[n : n + 2000]))
    test = data.X_test, data.y_test
    rows = training, validation, test, seed
    treatments = [{"rank": 50}, {"rank": 300, "spectral_filter": 0.1}, {"rank": 300, "spectral_filter": 0.2}]
    return (
        convex_of_few("spectrum", *rows, treatments)
        | convex_of_few("untruncated", *rows, [{}])
        | sgd_of_few(*rows)
        | {"seconds": seconds(), "trace": []}
    )


def convex_of_few(name, training, validation, test, seed, treatments):
    """Networks of 1,000 gates, six weight decays a treatment, certified to 1e-3; the best on the validation rows."""
    from convexbn import ConvexBNClassifier, fit_path, max_weight_decay
    from convexbn_studies.study import PAPER

    before, points = time.process_time(), []
    for treatment in treatments:
        treatment = PAPER | treatment | {"gates": "data", "n_gates": FEW_WIDTH, "random_state": seed}
        model, largest = ConvexBNClassifier(tol=1e-3, **treatment), max_weight_decay(*training, **treatment)
        decays = [share * largest for share in (0.3, 0.15, 0.08, 0.04, 0.02, 0.01)]
        points += list(fit_path(model, *training, weight_decays=decays, validation=validation))
    best = max(points, key=lambda point: point.score)
    return {
        f"{name}: test accuracy": best.model.score(*test),
        f"{name}: chosen": f"rank {best.rank}, filter {best.model.spectral_filter}, decay {best.weight_decay:.3g}",
        f"{name}: largest gap": max(point.certificate.relative_gap for point in points),
        f"{name}: cpu seconds": time.process_time() - before,
    }


def sgd_of_few(training, validation, test, seed):
    """Batch-normalised networks of width 1,000: rates, decays and epochs; the best on the validation rows."""
    before, tries = time.process_time(), []
    parts = [(scaled(X), y) for X, y in (validation, test)]
    for rate, decay, epochs in itertools.product((0.01, 0.03, 0.1), (0.0, 1e-3, 1e-2), (25, 50)):
        settings = {"rate": rate, "decay": decay, "epochs": epochs}
        batch = 100 if len(training[0]) < 1000 else 200
        scores = sgd(scaled(training[0]), training[1], parts, seed, width=FEW_WIDTH, batch=batch, **settings)
        tries.append((*scores, settings))
    best = max(tries, key=lambda one: one[0])
    return {
        "sgd: test accuracy": best[1],
        "sgd: chosen": ", ".join(f"{name} {value:g}" for name, value in best[2].items()),
        "sgd: cpu seconds": time.process_time() - before,
    }


def scaled(X):
    """Pixels from 0 to 1, for torch."""
    import torch

    return torch.tensor(X, dtype=torch.float32).mul_(1 / 255)


def sgd(X, y, parts, seed, *, width, decay, rate, epochs, batch):
    """Accuracies on some parts of Linear, BatchNorm1d, ReLU, Linear by SGD with momentum and one cycle of the rate."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    labels, place = np.unique(y, return_inverse=True)
    place = torch.tensor(place)
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
            torch.nn.functional.cross_entropy(module(X[part]), place[part]).backward()
            optimizer.step()
            schedule.step()
    module.eval()
    with torch.no_grad():
        return [float((labels[module(Z).argmax(1).numpy()] == answers).mean()) for Z, answers in parts]


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
    """Run the tasks, print medians over seeds, and write the figures as JSON if asked to."""
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
        if asked.json:  # after every task: what is finished is kept
            asked.json.write_text(json.dumps(circumstances(asked) | {"tasks": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
