"""What re-optimising the last two layers does for a network that Adam trained on Fashion-MNIST.

Usage: python benchmarks/reoptimise.py [--tune] [--json FILE]

A network of three layers, 784 - 128 - 64 - 10 with batch norm, is trained on 55,000 images by Adam, once with the
constant rate that Adam is often left with and once with cosine decay of the rate, both tuned (`TRAININGS`). Its last
two layers are re-optimised for each of `WEIGHT_DECAYS` with the 5,000 validation images, which choose the point on the
way to the optimum, and among the weight decays that of the highest accuracy, of equal ones the largest. Objectives are
those of that weight decay; "rescaled" is that of the trained layers times the best number, which predict the same
classes. Accuracies: of the network as trained, with the statistics of all rows in its batch norms, and re-optimised.
Test images choose nothing: theirs are the honest ones.

Prints a markdown table of three seeds; one thread. The seconds cover all that a re-optimisation does: features,
layers, accuracies. No proof is asked for: at this many rows its bound says little (a gap of .96 on the first seed, in
150 s). ``--tune`` prints the grids from which `TRAININGS` were chosen. Takes about ten minutes on one core.
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

import scipy.optimize
import torch
from torch import nn

from convexbn.files.datasets import fashion_mnist
from convexbn.nn import reoptimise
from convexbn.nn.batch_statistics import with_full_batch_statistics

SEEDS = (0, 1, 2)
N_VALIDATION = 5_000
BATCH = 128
WEIGHT_DECAYS = (0.5, 1.0)  # against the sum of the losses
MAX_ITER = 40


@dataclass(frozen=True)
class Training:
    """Settings of Adam.

    Attributes
    ----------
    schedule : {"constant", "cosine"}
        Of the rate.
    rate, weight_decay : float
    epochs : int
    """

    schedule: str
    rate: float
    weight_decay: float
    epochs: int


# Of each schedule the best validation accuracy in the grid, the mean of all seeds; the constant rate is at its edge.
TRAININGS = (
    Training("constant", rate=1e-4, weight_decay=1e-3, epochs=15),
    Training("cosine", rate=1e-3, weight_decay=1e-4, epochs=15),
)
GRID = [
    *(Training("constant", *values, 15) for values in product((3e-4, 1e-3), (1e-4, 1e-3))),
    Training("constant", 1e-4, 1e-3, 15),
    *(Training("cosine", 1e-3, decay, 15) for decay in (1e-4, 3e-4, 1e-3, 3e-3)),
    *(
        Training("cosine", *values)
        for values in ((3e-3, 3e-4, 15), (3e-3, 1e-3, 15), (1e-3, 3e-4, 30), (1e-3, 1e-3, 30))
    ),
]


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
    end = {"constant": training.rate, "cosine": 0.0}[training.schedule]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.epochs * n_batches, eta_min=end)
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


def with_all_rows(module, learning):
    """The module with the statistics of all rows in its batch norms."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm1d)]
    return with_full_batch_statistics(module, names, learning.X.double())


def timed(module, learning, validation, weight_decay):
    """Re-optimise; the result and CPU seconds."""
    started = time.process_time()
    result = reoptimise(
        module, learning.X, learning.y,
        loss="cross_entropy", weight_decay=weight_decay, X_val=validation.X, y_val=validation.y,
        max_iter=MAX_ITER, time_limit=None, certify=False,
    )  # fmt: skip
    return result, time.process_time() - started


def rescaled_objective(runs, weight_decay, module, learning):
    """Least objective of the trained layers times a number, which predict the same classes."""
    objectives = {beta: run.before.objective for beta, (run, _) in runs.items()}
    first, *_, last = sorted(objectives)
    penalty = (objectives[last] - objectives[first]) / (last - first)
    with torch.no_grad():
        logits = module(learning.X).double()

    def objective(scale):
        loss = nn.functional.cross_entropy(scale * logits, learning.y, reduction="sum").item()
        return loss + weight_decay * scale * penalty

    return float(scipy.optimize.minimize_scalar(objective, bounds=(0.0, 2.0), method="bounded").fun)


def measure(training, seed):
    """The figures of one training and seed."""
    learning, validation, test = splits(seed)
    module, training_seconds = train(learning, training, seed)
    runs = {beta: timed(module, learning, validation, beta) for beta in WEIGHT_DECAYS}
    chosen = max(runs, key=lambda beta: (runs[beta][0].after.validation_accuracy, beta))
    result, seconds = runs[chosen]
    exact = with_all_rows(module, learning)
    scaled = rescaled_objective(runs, chosen, module if result.statistics == "stored" else exact, learning)
    stages = {"trained": module, "statistics": exact, "re-optimised": result.module}
    parts = {"train": learning, "validation": validation, "test": test}
    return {
        "training": asdict(training),
        "seed": seed,
        "weight_decay": chosen,
        "step": result.step,
        "statistics": result.statistics,
        "objectives": {"trained": result.before.objective, "rescaled": scaled, "re-optimised": result.after.objective},
        "accuracies": {
            stage: {name: accuracy(network, part) for name, part in parts.items()} for stage, network in stages.items()
        },
        "cpu_seconds": {"training": training_seconds, "reoptimise": seconds},
        "grid": {
            str(beta): {
                "step": run.step,
                "statistics": run.statistics,
                "objectives": [run.before.objective, run.after.objective],
                "validation_accuracy": run.after.validation_accuracy,
                "test_accuracy": accuracy(run.module, test),
                "cpu_seconds": cpu,
            }
            for beta, (run, cpu) in runs.items()
        },
    }


def print_row(row):
    """Print one line of the table."""
    stages = row["accuracies"].values()
    cells = [row["training"]["schedule"], str(row["seed"]), f"{row['weight_decay']:g}"]
    cells += [f"{row['step']:.2f}, {row['statistics']}"]
    cells += [" → ".join(f"{value:.0f}" for value in row["objectives"].values())]
    cells += [" → ".join(f"{stage[part]:.4f}" for stage in stages) for part in ("train", "validation", "test")]
    cells += [f"{row['cpu_seconds'][name]:.0f}" for name in ("training", "reoptimise")]
    print(f"| {' | '.join(cells)} |", flush=True)


def circumstances():
    """What the figures depend on."""
    return {
        "command": "python benchmarks/reoptimise.py --json benchmarks/reoptimise.json",
        "trainings": {"batch": BATCH, "layers": str(network()), "tuned by": "--tune"},
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
        "| rate | seed | weight decay | step, statistics | objective: trained → rescaled → re-optimised "
        "| train accuracy: trained → statistics → re-optimised | validation | test "
        "| training, CPU s | re-optimising, CPU s |"
    )
    print("|" + "---|" * 10)
    rows = []
    for training, seed in product(TRAININGS, SEEDS):
        rows.append(measure(training, seed))
        print_row(rows[-1])
        if asked.json:
            asked.json.write_text(json.dumps(circumstances() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
