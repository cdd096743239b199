"""Study ``weight-rescaling``: weights in front of batch norm rescaled after each step, against weight decay."""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn_studies.drawing import chart, chosen, legend
from convexbn_studies.images import accuracy, descend, images, of_finished_seeds, seeded
from convexbn_studies.study import Cell, Finding, Picture, Row, Study

_SEEDS = (0, 1, 2)
_DECAYS = (0.0, 5e-4, 5e-3, 2e-2)
_RATE, _EPOCHS = 0.1, 6

#: Schemes: what they are called, and the settings of ``WeightRescaling``.
_SCHEMES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "none": ("weight decay alone", None),
    "filter": ("rescaling, each filter to 1", {"granularity": "filter"}),
    "layer": ("rescaling, each layer to 1", {"granularity": "layer"}),
    "layer-initial": ("rescaling, each layer to its initial norm", {"granularity": "layer", "norm": "initial"}),
}


def cells(quick: bool) -> list[Cell]:
    """Schemes by weight decay and seed; rescaled layers at one weight decay alone."""
    data = "digits" if quick else "fashion-mnist"
    grid: list[tuple[str, float]] = [("none", decay) for decay in _DECAYS] + [("filter", decay) for decay in _DECAYS]
    grid += [("layer", 0.0), ("layer-initial", 0.0)]
    return [
        {"data": data, "scheme": scheme, "weight_decay": decay, "seed": seed}
        for seed in (_SEEDS[:1] if quick else _SEEDS)
        for scheme, decay in grid
    ]


def run(cell: Cell) -> list[Row]:
    """Norms and effective rate after each epoch, and the test accuracy after the last."""
    import torch

    from convexbn.companions import WeightRescaling

    settings: Any = cell
    quick, seed = settings["data"] == "digits", settings["seed"]
    (X, y), (X_test, y_test) = images(settings["data"], (1400, 397) if quick else (3000, 2000), seed)
    module = _network(8 if quick else 16, seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=_RATE, momentum=0.9, weight_decay=settings["weight_decay"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
    rescaling = _SCHEMES[settings["scheme"]][1]
    if rescaling is not None:
        WeightRescaling(module, optimizer, **rescaling)
    rows: list[Row] = []

    def look(epoch: int) -> None:
        norms = torch.cat([layer.weight.detach().flatten(1).norm(dim=1) for layer in _convolutions(module)])
        found = {"epoch": epoch + 1, "norm": float(norms.mean()), "rate": float((_RATE / norms.square()).mean())}
        rows.append({**cell, **found, "test_accuracy": accuracy(module, X_test, y_test)})
        module.train()
        schedule.step()

    loss = descend(module, optimizer, X, y, batch=64, epochs=_EPOCHS, seed=seed, after_epoch=look)
    rows[-1]["training_loss"] = loss
    return rows


def _network(width: int, seed: int) -> Any:
    """Three convolutions with batch norm and a Linear."""
    from torch import nn

    layers: list[Any] = []
    with seeded(seed):
        for inputs, outputs, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10))


def _convolutions(module: Any) -> list[Any]:
    return [layer for layer in module if type(layer).__name__ == "Conv2d"]


def _final(rows: list[Row], scheme: str) -> dict[float, list[float]]:
    """Accuracies after the last epoch, by weight decay, one a seed."""
    last: Any = max(row["epoch"] for row in rows)  # type: ignore[type-var]
    found: dict[float, list[float]] = {}
    lines: list[Any] = chosen(rows, scheme=scheme, epoch=last)
    for row in lines:
        found.setdefault(row["weight_decay"], []).append(row["test_accuracy"])
    return found


def findings(rows: list[Row]) -> list[Finding]:
    """Accuracy against tuned weight decay, sensitivity, effective rates, and the unit of rescaling."""
    rows = of_finished_seeds(rows, scheme="layer-initial")
    if not rows:
        return []
    return [_as_accurate(rows), _sensitivity(rows), _effective_rate(rows), _unit(rows)]


def _means(rows: list[Row], scheme: str) -> dict[float, float]:
    return {decay: float(np.mean(values)) for decay, values in _final(rows, scheme).items()}


def _as_accurate(rows: list[Row]) -> Finding:
    decayed, rescaled = _means(rows, "none"), _means(rows, "filter")
    best = max(decayed, key=lambda decay: decayed[decay])
    return Finding(
        "Rescaling each filter without weight decay is as accurate as tuned weight decay, within one point.",
        f"Mean test accuracy {rescaled[0.0]:.4f} against {decayed[best]:.4f} at the best weight decay of the grid, "
        f"{best:g}, and {decayed[0.0]:.4f} with neither.",
        rescaled[0.0] > decayed[best] - 0.01,
    )


def _sensitivity(rows: list[Row]) -> Finding:
    decayed, rescaled = _means(rows, "none"), _means(rows, "filter")
    spread = [max(found.values()) - min(found.values()) for found in (decayed, rescaled)]
    told = "; ".join(f"{decay:g}: {decayed[decay]:.4f} and {rescaled[decay]:.4f}" for decay in decayed)
    return Finding(
        "With rescaled filters the accuracy depends less on the weight decay than without.",
        f"Over the grid it varies by {spread[0]:.4f} without and by {spread[1]:.4f} with rescaling. Weight decay, "
        f"accuracies without and with: {told}.",
        spread[1] < spread[0],
    )


def _effective_rate(rows: list[Row]) -> Finding:
    ratios = {decay: _change(rows, decay) for decay in _final(rows, "none")}
    told = ", ".join(f"{ratio:.2f} at {decay:g}" for decay, ratio in ratios.items())
    return Finding(
        "Without weight decay the effective rate, first rate / norm^2, falls; much weight decay makes it rise.",
        f"Mean over the filters after the last epoch, relative to that after the first, by weight decay: {told}; "
        "with rescaled filters it is constant.",
        ratios[0.0] < 1 < ratios[max(ratios)],
    )


def _change(rows: list[Row], decay: float) -> float:
    """Effective rate after the last epoch over that after the first."""
    lines: list[Any] = chosen(rows, scheme="none", weight_decay=decay)
    return _mean_rate(lines, max(row["epoch"] for row in lines)) / _mean_rate(lines, 1)


def _mean_rate(lines: list[Any], epoch: int) -> float:
    """Mean over the seeds of the effective rate after an epoch."""
    return float(np.mean([row["rate"] for row in lines if row["epoch"] == epoch]))


def _unit(rows: list[Row]) -> Finding:
    by_filter, by_layer, initial = (_means(rows, scheme)[0.0] for scheme in ("filter", "layer", "layer-initial"))
    return Finding(
        "Rescaling layers to norm 1, which multiplies the effective rate by the number of filters, costs accuracy.",
        f"Mean test accuracy {by_layer:.4f} with layers of norm 1, {initial:.4f} with layers of their initial norm, "
        f"{by_filter:.4f} with filters of norm 1, all at rate {_RATE}.",
        by_layer < by_filter - 0.01,
    )


def pictures(rows: list[Row]) -> list[Picture]:
    """Accuracy over the weight decay, and effective rates over the epochs."""
    rows = of_finished_seeds(rows, scheme="layer-initial")
    if not rows:
        return []
    return [_draw_accuracy(rows), _draw_rates(rows)]


def _draw_accuracy(rows: list[Row]) -> Picture:
    picture, axes = chart(
        "Rescaled filters, without weight decay, against weight decay: accuracies (small points: seeds)",
        "weight decay of SGD, on all parameters", "test accuracy",
    )  # fmt: skip
    for k, (scheme, (name, _)) in enumerate(_SCHEMES.items()):
        found = _final(rows, scheme)
        places = [_DECAYS.index(decay) for decay in found]
        axes.plot(places, [np.mean(values) for values in found.values()], "o-", color=f"C{k}", label=name)
        for place, values in zip(places, found.values(), strict=True):
            axes.plot([place] * len(values), values, ".", color=f"C{k}", alpha=0.5)
    axes.set_xticks(range(len(_DECAYS)), [f"{decay:g}" for decay in _DECAYS])
    legend(axes, ncols=1)
    return picture


def _draw_rates(rows: list[Row]) -> Picture:
    picture, axes = chart(
        "The effective learning rate falls without weight decay, rises with much, and stays if rescaled",
        "epoch", "effective rate: first rate / norm^2", yscale="log",
    )  # fmt: skip
    epochs: Any = sorted({row["epoch"] for row in rows})
    for scheme, style in (("none", "o-"), ("filter", "s--")):
        for k, decay in enumerate(_final(rows, "none") if scheme == "none" else [0.0]):
            lines = chosen(rows, scheme=scheme, weight_decay=decay)
            rates = [_mean_rate(lines, epoch) for epoch in epochs]
            label = f"weight decay {decay:g}" if scheme == "none" else "rescaled filters"
            axes.plot(epochs, rates, style, ms=4, color=f"C{k}" if scheme == "none" else "C6", label=label)
    legend(axes)
    return picture


STUDY = Study(
    name="weight-rescaling",
    title="Rescaling the weights in front of batch norm replaces their weight decay",
    source="Liu, Cui, Wan, Mao, Chan, Weight Rescaling, 2022 (arXiv 2102.03497)",
    departures=(
        "Three convolutions (16, 32, 32 filters) on 3,000 Fashion-MNIST images of 14 x 14 pixels, 6 epochs of SGD, "
        "momentum .9, rate .1 with cosine decay, batches of 64, tested on 2,000 images of the training part; the paper "
        "has VGG and residual networks on CIFAR, and detection and counting. Weight decay is on all parameters, so "
        "that with rescaling it acts on the others alone. The paper's text was not at hand for the unit of rescaling: "
        "the filter is the reading of its first version. Three seeds. The quick form: digits, half the filters, one "
        "seed."
    ),
    needs=("torch",),
    minutes=(0.3, 2),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)
