"""Study ``understanding-bn``: what batch norm changes in a network, and the learning rates that it makes possible."""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn_studies.images import accuracy, descend, images, seeded
from convexbn_studies.study import Cell, Row, Study
from convexbn_studies.understanding_bn_claims import findings, pictures

_SEEDS = (0, 1, 2)
_RATES = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)
_STEPS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
_DEPTH, _BLOCKS = 20, 27
_FACTORS = (1, 2, 3, 5)
_BATCHES = (8, 32, 128, 512)


def cells(quick: bool) -> list[Cell]:
    """Parts of the study, for each seed."""
    size: Cell = {"data": "digits", "width": 64} if quick else {"data": "fashion-mnist", "width": 100}
    found: list[Cell] = []
    for seed in _SEEDS[:1] if quick else _SEEDS:
        for batch_norm in (False, True):
            network: Cell = {"seed": seed, "batch_norm": batch_norm, **size}
            found += [{"part": "rate", **network, "rate": rate} for rate in (_RATES[1:] if quick else _RATES)]
            found += [{"part": part, **network} for part in ("gradients", "depth", "noise")]
        found += [{"part": "spectrum", "seed": seed, "factors": factors, "size": 200} for factors in _FACTORS]
    return found


def run(cell: Cell) -> list[Row]:
    """Lines of one part."""
    settings: Any = dict(cell)
    part = settings.pop("part")
    parts: dict[str, Any] = {
        "rate": _rate, "gradients": _gradients, "depth": _depth, "noise": _noise, "spectrum": _spectrum
    }  # fmt: skip
    return [{**cell, **row} for row in parts[part](**settings)]


def _counts(data: str) -> tuple[int, int]:
    """Training and test rows."""
    return (1400, 397) if data == "digits" else (5000, 2000)


def _perceptron(inputs: int, width: int, batch_norm: bool, seed: int) -> Any:
    """Twenty hidden layers, He-initialised."""
    from torch import nn

    layers: list[Any] = [nn.Flatten()]
    with seeded(seed):
        for previous in (inputs, *[width] * (_DEPTH - 1)):
            linear = nn.Linear(previous, width)
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, *([nn.BatchNorm1d(width)] if batch_norm else []), nn.ReLU()]
        layers.append(nn.Linear(width, 10))
    return nn.Sequential(*layers)


def _rate(seed: int, batch_norm: bool, data: str, width: int, rate: float) -> list[Row]:
    """Training at one learning rate."""
    import torch

    (X, y), (X_test, y_test) = images(data, _counts(data), seed)
    module = _perceptron(X[0].numel(), width, batch_norm, seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    batch, epochs = (32, 10) if data == "digits" else (64, 4)
    loss = descend(module, optimizer, X, y, batch=batch, epochs=epochs, seed=seed)
    return [{"training_loss": loss, "test_accuracy": accuracy(module, X_test, y_test) if np.isfinite(loss) else None}]


def _gradients(seed: int, batch_norm: bool, data: str, width: int) -> list[Row]:
    """Tails and signs of the gradients at initialisation, and the loss along the gradient."""
    import torch

    from convexbn.companions import diagnostics

    X, y = images(data, (256,), seed)[0]
    module, loss = _perceptron(X[0].numel(), width, batch_norm, seed), torch.nn.CrossEntropyLoss()
    tails = diagnostics.gradient_kurtosis(module, X, y, loss)
    signs = diagnostics.sign_agreement(module, X, y, loss)
    with torch.no_grad():
        classes = module.train()(X).argmax(dim=1).bincount()
    rows: list[Row] = [{"commonest_class": float(classes.max()) / len(X)}]
    rows += [
        {"layer": k, "kurtosis": kurtosis, "sign_ratio": signs[name].ratio}
        for k, (name, kurtosis) in enumerate(tails.items())
    ]
    relative = diagnostics.relative_losses(module, X, y, loss, _STEPS)
    return rows + [{"step": step, "relative_loss": float(value)} for step, value in zip(_STEPS, relative, strict=True)]


def _depth(seed: int, batch_norm: bool, data: str, width: int) -> list[Row]:
    """Outputs of the branches of a residual network at initialisation."""
    from torch import nn

    from convexbn.companions import diagnostics

    class Block(nn.Module):
        """``x + branch(x)``."""

        def __init__(self) -> None:
            super().__init__()
            linear = nn.Linear(width, width)
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.branch = nn.Sequential(nn.ReLU(), linear, nn.BatchNorm1d(width) if batch_norm else nn.Identity())

        def forward(self, x: Any) -> Any:
            return x + self.branch(x)

    X, _ = images(data, (256,), seed)[0]
    with seeded(seed):
        module = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), width), *[Block() for _ in range(_BLOCKS)])
    branches = [moments for moments in diagnostics.channel_moments(module, X) if moments.layer.endswith("branch.2")]
    return [
        {"layer": k, "channel_mean": float(np.abs(found.mean).mean()), "channel_std": float(found.std.mean())}
        for k, found in enumerate(branches)
    ]


def _noise(seed: int, batch_norm: bool, data: str, width: int) -> list[Row]:
    """Noise of mini-batch gradients in eval mode over its bound, drawn without replacement."""
    import torch

    from convexbn.companions import diagnostics

    X, y = images(data, (1000,), seed)[0]
    module, loss = _perceptron(X[0].numel(), width, batch_norm, seed), torch.nn.CrossEntropyLoss()
    if batch_norm:
        _store_statistics(module, X)
    noise, rows = diagnostics.gradient_noise(module, X, y, loss), []
    for batch in _BATCHES:
        found = diagnostics.sampled_noise(module, X, y, loss, batch_size=batch, training=False, random_state=seed)
        row: Row = {"batch": batch, "over_bound": found / noise.bound(1.0, batch)}
        rows.append(row | {"factor": noise.expected(1.0, batch) / noise.bound(1.0, batch)})
    return rows


def _store_statistics(module: Any, X: Any) -> None:
    """Statistics of all rows in the batch norms, one after the other."""
    import torch
    from torch.optim.swa_utils import update_bn

    update_bn([X], module.train())
    torch.nn.Module.eval(module)


def _spectrum(seed: int, factors: int, size: int) -> list[Row]:
    """Squared singular values of a product against the law of Fuss and Catalan."""
    from convexbn.companions.diagnostics import FussCatalan, product_spectrum

    law, values = FussCatalan(factors), product_spectrum(factors, size, seed)
    rows: list[Row] = [
        {"largest": values[0], "edge": law.edge, "log10_condition": float(np.log10(values[0] / values[-1]) / 2)}
    ]
    edges = np.geomspace(1e-4, law.edge, 17)
    share = np.histogram(values, edges)[0] / size
    middles = np.sqrt(edges[1:] * edges[:-1])
    return rows + [
        {"value": middle, "density": density, "law": float(law.density(middle))}
        for middle, density in zip(middles, share / np.diff(edges), strict=True)
    ]


STUDY = Study(
    name="understanding-bn",
    title="What batch norm does to learning rates, activations and gradients",
    source="Bjorck, Gomes, Selman, Weinberger, Understanding Batch Normalization, NeurIPS 2018 (arXiv 1806.02375)",
    departures=(
        "A perceptron of 20 hidden layers of width 100 on 5,000 Fashion-MNIST images of 14 x 14 pixels, 4 epochs of "
        "SGD (momentum .9, weight decay 5e-4, batches of 64), not ResNet-110 on CIFAR-10 trained to a plateau. "
        "Depth is studied on a residual perceptron of 27 blocks, as a plain He-initialised one does not grow. Three "
        "seeds. The quick form: digits, width 64, 10 epochs of batches of 32, one seed."
    ),
    needs=("torch",),
    minutes=(1, 3),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)
