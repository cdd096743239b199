"""What re-optimising the last two layers does for a network that Adam trained on Fashion-MNIST.

Usage: python benchmarks/reoptimise.py [--tune] [--json FILE]

A network of three layers, 784 - 128 - 64 - 10 with batch norm, is trained on 55,000 images, and its last two layers
are re-optimised for each of `WEIGHT_DECAYS`; of these the one of the highest validation accuracy (5,000 images) is
taken, of equal ones the largest. Accuracies before are those of the network as trained. Prints a markdown table of
three seeds; one thread. The seconds of a re-optimisation cover everything: features, layers, accuracies; those of the
proof are apart. ``--tune`` prints the grid from which `TRAINING` was chosen.
Takes about a quarter of an hour on one core.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are loaded, below
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import nn

from convexbn.datasets import fashion_mnist
from convexbn.nn import reoptimise

SEEDS = (0, 1, 2)
N_VALIDATION = 5_000
BATCH = 128
WEIGHT_DECAYS = (0.1, 0.25, 0.5, 1.0, 2.0)  # against the sum of the losses
MAX_ITER = 60


@dataclass(frozen=True)
class Training:
    """Settings of Adam, with cosine decay of the rate.

    Attributes
    ----------
    rate, weight_decay : float
    epochs : int
    """

    rate: float
    weight_decay: float
    epochs: int


# The best validation accuracy in the grid, the mean of all seeds.
TRAINING = Training(rate=1e-3, weight_decay=1e-4, epochs=15)
GRID = [Training(*values) for values in product((1e-3, 3e-3), (0.0, 1e-4, 1e-3, 1e-2), (5, 15))]


@dataclass(frozen=True)
class Split:
    """Images in [0, 1] and their classes."""

    X: torch.Tensor
    y: torch.Tensor


def splits(seed):
    """Training, validation and test images; the seed draws the validation images."""
    data = fashion_mnist()
    images, labels = torch.tensor(data.X, dtype=torch.float32) / 255, torch.tensor(data.y)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order[N_VALIDATION:], order[:N_VALIDATION]
    test = Split(torch.tensor(data.X_test, dtype=torch.float32) / 255, torch.tensor(data.y_test))
    return *(Split(images[part], labels[part]) for part in parts), test


def network():
    """Three layers with batch norm."""
    layers = [nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def train(split, training, seed):
    """Minimise the mean cross-entropy; the network in eval mode, and CPU seconds."""
    started = time.process_time()
    torch.manual_seed(seed)
    module, n_batches = network(), len(split.y) // BATCH
    optimiser = torch.optim.Adam(module.parameters(), lr=training.rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.epochs * n_batches)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(split.y))[: n_batches * BATCH].split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(split.X[rows]), split.y[rows]).backward()
            optimiser.step()
            schedule.step()
    return module.eval(), time.process_time() - started


def accuracy(module, split):
    """Share of images whose class is found."""
    with torch.no_grad():
        return (module(split.X).argmax(dim=1) == split.y).double().mean().item()


def tune():
    """Print the validation accuracy for the settings of the grid, the mean of all seeds."""
    parts = [splits(seed) for seed in SEEDS]
    for training in GRID:
        runs = [train(learning, training, seed) for seed, (learning, _, _) in zip(SEEDS, parts, strict=True)]
        found = [accuracy(module, part[1]) for (module, _), part in zip(runs, parts, strict=True)]
        seconds = sum(run[1] for run in runs) / len(runs)
        print(f"{training}: {sum(found) / len(found):.4f} of {found}, {seconds:.0f} CPU s", flush=True)


def timed(module, learning, validation, weight_decay, **options):
    """Re-optimise; the result, wall seconds and CPU seconds."""
    started = time.perf_counter(), time.process_time()
    result = reoptimise(
        module, learning.X, learning.y,
        loss="cross_entropy", weight_decay=weight_decay, X_val=validation.X, y_val=validation.y,
        max_iter=MAX_ITER, time_limit=None, **options,
    )  # fmt: skip
    return result, time.perf_counter() - started[0], time.process_time() - started[1]


def measure(seed):
    """The figures of one seed."""
    learning, validation, test = splits(seed)
    module, training_seconds = train(learning, TRAINING, seed)
    runs = {beta: timed(module, learning, validation, beta, certify=False) for beta in WEIGHT_DECAYS}
    chosen = max(runs, key=lambda beta: (runs[beta][0].after.validation_accuracy, beta))
    result, _, seconds = runs[chosen]
    proof, _, with_proof = timed(module, learning, validation, chosen)
    return {
        "seed": seed,
        "weight_decay": chosen,
        "before": asdict(result.before) | {"test_accuracy": accuracy(module, test)},
        "after": asdict(result.after) | {"test_accuracy": accuracy(result.module, test)},
        "cpu_seconds": {"training": training_seconds, "reoptimise": seconds, "with proof": with_proof},
        "wall_seconds": {str(beta): wall for beta, (_, wall, _) in runs.items()},
        "certificate": {
            "status": str(proof.certificate.status),
            "relative_gap": proof.certificate.relative_gap,
            "estimated_gap": proof.certificate.estimated_gap,
            "sentence": proof.certificate.sentence,
        },
        "grid": {
            str(beta): {
                "objectives": [run.before.objective, run.after.objective],
                "validation_accuracies": [run.before.validation_accuracy, run.after.validation_accuracy],
                "test_accuracies": [accuracy(module, test), accuracy(run.module, test)],
                "cpu_seconds": cpu,
            }
            for beta, (run, _, cpu) in runs.items()
        },
    }


def print_row(row):
    """Print one line of the table."""
    before, after, seconds = row["before"], row["after"], row["cpu_seconds"]
    print(
        f"| {row['seed']} | {row['weight_decay']:g} | {before['objective']:.0f} | {after['objective']:.0f} "
        f"| {before['train_accuracy']:.4f} | {after['train_accuracy']:.4f} "
        f"| {before['validation_accuracy']:.4f} | {after['validation_accuracy']:.4f} "
        f"| {before['test_accuracy']:.4f} | {after['test_accuracy']:.4f} "
        f"| {seconds['training']:.0f} | {seconds['reoptimise']:.0f} "
        f"| {row['certificate']['estimated_gap']:.1e} | {row['certificate']['relative_gap']:.2f} |",
        flush=True,
    )


def circumstances():
    """What the figures depend on."""
    return {
        "command": "python benchmarks/reoptimise.py --json benchmarks/reoptimise.json",
        "training": asdict(TRAINING) | {"batch": BATCH, "layers": str(network()), "tuned by": "--tune"},
        "weight_decays": WEIGHT_DECAYS,
        "max_iter": MAX_ITER,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("convexbn", "torch")},
        "threads": 1,
    }


def main():
    """Measure, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="print the grid from which the training was chosen")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.tune:
        tune()
        return
    print(
        "| seed | weight decay | objective | after | train acc. | after | validation | after | test | after "
        "| training, CPU s | re-optimising, CPU s | estimated gap | proved gap |"
    )
    print("|" + "---|" * 14)
    rows = []
    for seed in SEEDS:
        rows.append(measure(seed))
        print_row(rows[-1])
        if asked.json:
            asked.json.write_text(json.dumps(circumstances() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
