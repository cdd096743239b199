"""Convolutional networks on images: test accuracy, time, certificates; whitening, truncation and pooling in one table.

Usage: python benchmarks/convolution.py TASK ... [--seeds 0] [--images N] [--threads 1] [--folder FASHION_MNIST]
                                        [--validate] [--json FILE]
       python benchmarks/convolution.py kernel

CIFAR-10 is read from the folder that the environment variable CIFAR10_HOME names. Every run is a process of its own.
``--images`` takes that many training images; ``--validate`` holds 5,000 of the rest (or of all) out and scores those
instead of the test images: what settings are chosen by. ``table`` runs the ablation; ``kernel`` measures one
mini-batch gradient beside the products that it consists of.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

STARTED = time.perf_counter()
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist

#: Images held out by --validate.
VALIDATION = 5000

FASHION = {"kernel_size": 7, "stride": 1, "padding": 3, "regions": 7}
CIFAR = {"kernel_size": 6, "stride": 2, "padding": 0, "regions": 3}

TASKS = {
    # a ReLU network on whitened patches
    "fashion": {"data": "fashion", "layer": FASHION, "decay": 3e-4, "width": 200, "epochs": 8, "filter": 0.07},
    "cifar": {"data": "cifar", "layer": CIFAR, "decay": 3e-4, "width": 300, "epochs": 10, "rank": 80, "filter": 0.02},
    # gated networks, certified for their gates
    "fashion-gated": {
        "data": "fashion",
        "layer": FASHION | {"stride": 4, "regions": 4},
        "decay": 1e-2,
        "gates": 20,
        "rank": 12,
        "time": 900,
    },
    "cifar-gated": {
        "data": "cifar",
        "layer": CIFAR | {"stride": 4},
        "decay": 3e-3,
        "gates": 20,
        "rank": 30,
        "time": 900,
    },
    # batch norm in torch on raw pixels, the same shape, for the CPU time of ours
    "fashion-torch": {"data": "fashion", "layer": FASHION, "decay": 5e-4, "width": 200, "rate": 0.05, "time": 550},
    "cifar-torch": {"data": "cifar", "layer": CIFAR, "decay": 5e-4, "width": 300, "rate": 0.2, "time": 330},
}

#: What whitening, truncation and pooling do, at the settings of the first tasks but for one.
TABLE = {
    "fashion": [
        {}, {"filter": 1.0}, {"filter": None}, {"rank": 12}, {"regions": 1}, {"regions": 4}, {"pooling": "max"},
    ],
    "cifar": [
        {}, {"filter": 1.0}, {"filter": None}, {"rank": 20}, {"regions": 1}, {"regions": 2}, {"regions": 4},
        {"pooling": "max"},
    ],
}  # fmt: skip


def images_of(name, folder, count, validate):
    """Training and scored images with their labels."""
    import numpy as np

    from convexbn.files.datasets import cifar10, fashion_mnist

    data = fashion_mnist(folder) if name == "fashion" else cifar10()
    order = np.random.default_rng(0).permutation(len(data.X))
    scored = order[:VALIDATION] if validate else None
    train = order[VALIDATION:] if validate else order
    train = train if count is None else train[:count]
    shape = (28, 28, 1) if name == "fashion" else (32, 32, 3)
    test = (data.X_test, data.y_test) if scored is None else (data.X[scored], data.y[scored])
    return shape, data.X[train], data.y[train], *test


def with_mirror_images(X, y, shape):
    """Every image and what a mirror shows, left and right exchanged."""
    import numpy as np

    mirrored = X.reshape(-1, *shape)[:, :, ::-1].reshape(X.shape)
    return np.concatenate([X, mirrored]), np.concatenate([y, y])


def run(settings, seed, folder, count, validate):
    """One run; the figures."""
    shape, X, y, X_test, y_test = images_of(settings["data"], folder, count, validate)
    if settings.get("mirror"):
        X, y = with_mirror_images(X, y, shape)
    fit = torch_fit if "rate" in settings else gated_fit if "gates" in settings else relu_fit
    found = fit(settings, shape, X, y, X_test, y_test, seed)
    return found | {
        "images": len(X),
        "scored": len(X_test),
        "seconds": time.perf_counter() - STARTED,
        "CPU seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def layer_of(settings, shape):
    from convexbn import Convolution

    return Convolution(**settings["layer"], input_shape=shape)


def fitted(settings, shape, X, y, X_test, y_test, **parameters):
    """Train one of our networks and score it.

    ``decay`` is that of an optimiser of the mean loss, ``beta = decay * n / sqrt(n Kp)``.
    """
    import warnings

    from convexbn import ConvexBNClassifier
    from convexbn_studies.study import PAPER

    warnings.simplefilter("ignore")
    trace, layer = [], layer_of(settings, shape)
    model = ConvexBNClassifier(
        convolution=layer, weight_decay=settings["decay"] * (len(X) / layer.geometry.n_locations) ** 0.5,
        rank=settings.get("rank"),
        callback=lambda report: trace.append((time.perf_counter() - STARTED, report.objective)),
        **PAPER | {"spectral_filter": settings.get("filter")} | parameters,
    )  # fmt: skip
    started = time.perf_counter()
    model.fit(X, y)
    proof = model.certificate_
    return {
        "fit seconds": time.perf_counter() - started,
        "training seconds": trace[-1][0] - (started - STARTED),
        "test accuracy": model.score(X_test, y_test),
        "status": proof.status.value,
        "relative gap": proof.relative_gap,
        "estimated gap": proof.estimated_gap,
        "objective": proof.objective,
        "rank": model.rank_,
        "iterations": model.n_iter_,
        "neurons": model.network_.n_neurons,
    }


def relu_fit(settings, shape, X, y, X_test, y_test, seed):
    """Cross-entropy."""
    return fitted(
        settings, shape, X, y, X_test, y_test, activation="relu", loss="cross_entropy", width=settings["width"],
        max_iter=settings["epochs"], random_state=seed,
    )  # fmt: skip


def gated_fit(settings, shape, X, y, X_test, y_test, seed):
    """Squared loss, trained gates."""
    return fitted(
        settings, shape, X, y, X_test, y_test, gates="trained", n_gates=settings["gates"], random_state=seed,
        tol=1e-2, time_limit=settings["time"],
    )  # fmt: skip


def torch_fit(settings, shape, X, y, X_test, y_test, seed):
    """Conv2d, BatchNorm2d, ReLU, pooling, Linear by SGD with momentum on raw pixels for ``time`` CPU seconds."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    layer = layer_of(settings, shape)
    geometry, m = layer.geometry, settings["width"]
    module = torch.nn.Sequential(
        torch.nn.Conv2d(shape[2], m, geometry.kernel, geometry.stride, geometry.padding, bias=False),
        torch.nn.BatchNorm2d(m), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(layer.pool.grid), torch.nn.Flatten(),
        torch.nn.Linear(m * layer.pool.n_regions, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=settings["decay"])
    started, limit, epochs, rng = time.process_time(), settings["time"], 0, np.random.default_rng(seed)

    def tensor(rows):
        return torch.tensor(rows.reshape(-1, *shape)).permute(0, 3, 1, 2).float() / 255

    while (spent := time.process_time() - started) < limit:
        for part in np.array_split(rng.permutation(len(X)), max(1, len(X) // 100)):
            done = min((time.process_time() - started) / limit, 1.0)
            rate = min(done / 0.25, 0.5 * (1 + np.cos(np.pi * max(done - 0.25, 0) / 0.75)))
            optimizer.param_groups[0]["lr"] = settings["rate"] * max(rate, 1e-3)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(tensor(X[part])), torch.tensor(y[part])).backward()
            optimizer.step()
        epochs += 1
    module.eval()
    with torch.no_grad():
        parts = [module(tensor(X_test[i : i + 500])).argmax(1).numpy() for i in range(0, len(X_test), 500)]
    return {
        "training CPU seconds": spent,
        "test accuracy": float(np.mean(np.concatenate(parts) == y_test)),
        "iterations": epochs,
    }


def best(work, count=5):
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def kernel():
    """Descent on images in float32 beside its products alone, on one thread."""
    import numpy as np

    square = np.ones((1500, 1500), dtype=np.float32)
    found = {"task": "kernel", "square product, GFLOP/s": 2 * 1500**3 / best(lambda: square @ square) / 1e9}
    return found | kernel_of("fashion", (28, 28, 1)) | kernel_of("cifar", (32, 32, 3))


def kernel_of(name, shape):
    """GFLOP/s of one epoch on 500 random images of a shape."""
    import numpy as np

    from convexbn.data.patches import PatchMatrix
    from convexbn.data.whitening import whiten
    from convexbn.program.losses import CrossEntropyLoss
    from convexbn.program.readout import readout_of
    from convexbn.program.relu import ReluProgram
    from convexbn.solvers.relu.sgd import random_start
    from convexbn.training.training_set import IMAGES_DESCENT

    rng, m, count = np.random.default_rng(0), TASKS[name]["width"], 500
    layer = layer_of(TASKS[name], shape)
    images = rng.integers(0, 256, (count, int(np.prod(shape)))).astype(np.uint8)
    loss, readout = CrossEntropyLoss(np.eye(10)[rng.integers(10, size=count)], np.ones(count)), readout_of(layer)
    rows = whiten(PatchMatrix(images, layer.geometry), readout.row_weights(loss.weights)).rows
    program, (N, q) = ReluProgram(rows, loss, 0.1, readout), rows.shape
    start = random_start(program, rng.standard_normal((q, m)), rng)
    epoch = best(lambda: next(IMAGES_DESCENT.run(program, start, rng)))
    A, W = rng.standard_normal((20_000, q)).astype(np.float32), rng.standard_normal((q, m)).astype(np.float32)
    H = A @ W
    products = best(lambda: (A @ W, A.T @ H))
    return {
        f"{name}: patches of an image x directions x filters": f"{N // count} x {q} x {m}",
        f"{name}: descent, GFLOP/s": 4 * N * q * m / epoch / 1e9,
        f"{name}: its two large products alone, GFLOP/s": 8e4 * q * m / products / 1e9,
    }


def child(arguments, settings, seed):
    """Run one task in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(settings), "--seeds", str(seed)]
    command += ["--folder", str(arguments.folder)]
    command += ["--validate"] * arguments.validate
    command += [] if arguments.images is None else ["--images", str(arguments.images)]
    threads = str(arguments.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def variants(names):
    """Name and settings of every run that was asked for."""
    for name in names:
        if name != "table":
            yield name, TASKS[name]
            continue
        for data, changes in TABLE.items():
            for change in changes:
                settings = TASKS[data] | {k: v for k, v in change.items() if k in ("rank", "filter")}
                parts = {k: v for k, v in change.items() if k in ("regions", "pooling")}
                yield f"{data} {change or 'as it is'}", settings | {"layer": settings["layer"] | parts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join([*TASKS, "table", "kernel"]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=FASHION_MNIST)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--change", type=json.loads, default={}, metavar="JSON", help="other settings, to tune")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        found = run(arguments.child, arguments.seeds[0], arguments.folder, arguments.images, arguments.validate)
        print(json.dumps(found))
        return
    results = []
    for name in arguments.tasks:
        if name == "kernel":
            results.append(kernel())
            print(json.dumps(results[-1], indent=1), flush=True)
            continue
        for label, settings in variants([name]):
            own = {k: v for k, v in arguments.change.items() if k in settings["layer"]}
            rest = {k: v for k, v in arguments.change.items() if k not in settings["layer"]}
            settings = settings | rest | {"layer": settings["layer"] | own}
            for seed in arguments.seeds:
                results.append({"task": label, "seed": seed} | child(arguments, settings, seed))
                print(results[-1], flush=True)
                if arguments.json is not None:
                    write(arguments.json, arguments, results)


def write(file, arguments, results):
    """Figures so far, with what they were measured on."""
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    machine |= {"numpy": version("numpy"), "threads": arguments.threads}
    file.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
