"""Study ``cross-iteration-bn``: how exact statistics over several batches are, and what they do at small batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from convexbn_studies.cross_iteration_bn_claims import findings, pictures
from convexbn_studies.images import accuracy, descend, images, seeded
from convexbn_studies.study import Cell, Row, Study

_SEEDS = (0, 1, 2)
_WINDOW, _BATCH = 8, 4
_SPAN = 60

#: Networks whose accuracy is compared: images in a batch, learning rate, and norms.
_NETWORKS: dict[str, tuple[int, float, tuple[str, ...]]] = {
    "convolutions": (4, 0.02, ("batch norm", "group norm", "linear", "linear, no burn-in")),
    "perceptron": (2, 0.01, ("batch norm", "group norm", "linear")),
}


def cells(quick: bool) -> list[Cell]:
    """Errors of the statistics by learning rate, and accuracies by network and norm, for each seed."""
    data = "digits" if quick else "fashion-mnist"
    found: list[Cell] = []
    for seed in _SEEDS[:1] if quick else _SEEDS:
        rates = (0.05,) if quick else (0.01, 0.05)
        found += [{"part": "statistics", "data": data, "seed": seed, "rate": rate} for rate in rates]
        for network, (_, _, norms) in _NETWORKS.items():
            chosen = ("batch norm", "linear") if quick else norms
            found += [{"part": "accuracy", "data": data, "seed": seed, "network": network, "norm": n} for n in chosen]
    return found


def run(cell: Cell) -> list[Row]:
    """Lines of one part."""
    settings: Any = {key: value for key, value in cell.items() if key != "part"}
    rows = _statistics(**settings) if cell["part"] == "statistics" else _accuracy(**settings)
    return [{**cell, **row} for row in rows]


def _convolutions() -> Any:
    """Three convolutions with batch norm and a Linear."""
    from torch import nn

    layers: list[Any] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _perceptron(inputs: int) -> Any:
    """Two hidden layers with batch norm: one value a channel and image, so that small batches say little."""
    from torch import nn

    hidden: list[Any] = [nn.Flatten()]
    for size in (inputs, 100):
        hidden += [nn.Linear(size, 100, bias=False), nn.BatchNorm1d(100), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(100, 10))


def _statistics(data: str, seed: int, rate: float) -> list[Row]:
    """Errors of the statistics in a run with ordinary batch norm, over 60 steps early and 60 late."""
    import torch

    training, held_out, steps = (1200, 500, 300) if data == "digits" else (5000, 1024, 800)
    (X, y), (truth, _) = images(data, (training, held_out), seed)
    with seeded(seed):
        module = _convolutions()
    watch = _Watch(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    generator, rows = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        batch = torch.randint(len(X), (_BATCH,), generator=generator)
        phase, recording = _phase(step, steps)
        watch.record(recording)
        loss = torch.nn.functional.cross_entropy(watch.forward(X[batch]), y[batch])
        if phase and step % 6 == 0:
            rows += [{"phase": phase, "step": step, **row} for row in watch.errors(truth)]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _averaged(rows)


def _phase(step: int, steps: int) -> tuple[str, bool]:
    """Whether errors are taken at a step, and whether the history is kept, which begins a window before."""
    for name, start in (("early", 100), ("late", steps - _SPAN)):
        if start - _WINDOW < step < start + _SPAN:
            return name if step >= start else "", True
    return "", False


class _Watch:
    """Statistics of several kinds of the outputs of each convolution, while a network trains with batch norm."""

    def __init__(self, module: Any) -> None:
        from convexbn.companions import CrossIterationBatchNorm2d

        self.module = module
        layers = [layer for layer in module if type(layer).__name__ == "Conv2d"]
        self.norms = {
            order: [CrossIterationBatchNorm2d(layer, window=_WINDOW, second_moment=order) for layer in layers]
            for order in ("linear", "exact")
        }
        self.history: deque[tuple[Any, list[Any]]] = deque(maxlen=_WINDOW)
        self.seen: list[Any] = [None] * len(layers)
        for k, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, inputs, outputs, k=k: self._see(k, outputs))

    def record(self, on: bool) -> None:
        """Whether the passes that follow enter the histories."""
        for norms in self.norms.values():
            for norm in norms:
                norm.train(on)

    def forward(self, X: Any) -> Any:
        """Outputs of a training batch, whose moments go into the history."""
        outputs = self.module(X)
        self.history.append((X, list(self.seen)))
        return outputs

    def errors(self, truth: Any) -> Iterator[Row]:
        """Errors of each statistic of the present step, against many images with the present weights."""
        true = self._moments(truth)
        again = [self._moments(X) for X, _ in self.history]
        for k, (true_mean, true_variance) in enumerate(true):
            kinds = {
                "one batch": self.history[-1][1][k],
                "naive": _union([moments[k] for _, moments in self.history]),
                **{order: (norms[k].mean, norms[k].variance) for order, norms in self.norms.items()},
                "recomputed": _union([moments[k] for moments in again]),
            }
            for kind, (mean, variance) in kinds.items():
                off = float(((mean - true_mean).square() / true_variance).mean())
                ratio = float((variance.clamp(min=1e-12) / true_variance).log().square().mean())
                yield {"layer": k + 1, "statistic": kind, "mean_error": off, "variance_error": ratio}

    def _moments(self, X: Any) -> list[Any]:
        """Moments of a pass with the present weights, off the record."""
        import torch

        self.record(False)
        with torch.no_grad():
            self.module(X)
        return list(self.seen)

    def _see(self, k: int, outputs: Any) -> None:
        import torch

        variance, mean = torch.var_mean(outputs.detach(), [0, 2, 3], correction=0)
        self.seen[k] = mean, variance
        for norms in self.norms.values():
            if norms[k].training:
                norms[k](outputs)


def _union(moments: list[Any]) -> tuple[Any, Any]:
    """Mean and variance of all batches together, of equal size."""
    import torch

    means, variances = (torch.stack(part) for part in zip(*moments, strict=True))
    return means.mean(dim=0), (variances + (means - means.mean(dim=0)).square()).mean(dim=0)


def _averaged(rows: list[Row]) -> list[Row]:
    """Means over the steps of a phase."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault((row["phase"], row["layer"], row["statistic"]), []).append(row)
    return [
        {"phase": phase, "layer": layer, "statistic": statistic}
        | {name: sum(row[name] for row in found) / len(found) for name in ("mean_error", "variance_error")}
        for (phase, layer, statistic), found in groups.items()
    ]


def _accuracy(data: str, seed: int, network: str, norm: str) -> list[Row]:
    """Test accuracy after training in small batches; cross-iteration statistics after one epoch, unless said."""
    import torch

    (X, y), (X_test, y_test) = images(data, (600, 597) if data == "digits" else (1200, 2000), seed)
    batch, rate, _ = _NETWORKS[network]
    with seeded(seed):
        module = _normalised(network, norm, X, burn_in=len(X) // batch)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    loss = descend(module, optimizer, X, y, batch=batch, epochs=3, seed=seed)
    return [{"training_loss": loss, "test_accuracy": accuracy(module, X_test, y_test)}]


def _normalised(network: str, norm: str, X: Any, burn_in: int) -> Any:
    """A network with one of the norms."""
    from torch import nn

    from convexbn.companions import convert_cross_iteration_batch_norm

    module = _convolutions() if network == "convolutions" else _perceptron(X[0].numel())
    if norm == "batch norm":
        return module
    if norm == "group norm":
        return nn.Sequential(*(nn.GroupNorm(4, m.num_features) if hasattr(m, "num_features") else m for m in module))
    order, _, without = norm.partition(", ")
    return convert_cross_iteration_batch_norm(
        module, window=_WINDOW, burn_in=0 if without else burn_in, second_moment=order
    )


STUDY = Study(
    name="cross-iteration-bn",
    title="Statistics over several batches, corrected for the steps between them",
    source="Yao, Cao, Zheng, Huang, Lin, Cross-Iteration Batch Normalization, CVPR 2021 (arXiv 2002.05712)",
    departures=(
        "Three convolutions (16, 32, 32) and a perceptron (100, 100) on Fashion-MNIST of 14 x 14 pixels, SGD with "
        "momentum .9 and without weight decay, a window of 8 batches; the paper has ResNets on ImageNet and detectors "
        "on COCO. Errors of statistics: a network that trains with ordinary batch norm in batches of 4, over 60 steps "
        "from step 100 and the last 60 of 800, against 1,024 images. Accuracy: 1,200 images, 3 epochs, the window "
        "open after the first, tested on 2,000 images of the training part. Three seeds. The quick form: digits, one "
        "seed."
    ),
    needs=("torch",),
    minutes=(0.5, 5),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)
