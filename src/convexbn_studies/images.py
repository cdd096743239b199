"""Mini-batch training of torch modules on images of the data sets; torch is imported inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

from convexbn_studies.data import draw
from convexbn_studies.study import Row

#: Side of images, in pixels, above which two by two pixels are averaged.
_LARGE = 16


def images(name: str, counts: tuple[int, ...], seed: int) -> list[tuple[Any, Any]]:
    """Disjoint random parts of a data set: images (n, 1, side, side), standardised by the first part, and labels.

    Parameters
    ----------
    name : {"digits", "fashion-mnist"}
        8 x 8 pixels, and 28 x 28 averaged to 14 x 14.
    counts : tuple of int
        Images of each part.
    seed : int
    """
    import torch

    parts = []
    for X, y in draw(name, counts, seed):
        side = isqrt(X.shape[1])
        pictures = torch.tensor(X, dtype=torch.float32).reshape(-1, 1, side, side)
        pictures = torch.nn.functional.avg_pool2d(pictures, 2) if side > _LARGE else pictures
        parts.append((pictures, torch.tensor(y)))
    deviation, mean = torch.std_mean(parts[0][0])
    return [((pictures - mean) / deviation, y) for pictures, y in parts]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from a seed; the global state is restored."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def descend(
    module: Any, optimizer: Any, X: Any, y: Any, *, batch: int, epochs: int, seed: int,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> float:  # fmt: skip
    """Train on the cross-entropy, batches in random order, the last incomplete one left out.

    Returns
    -------
    float
        Mean loss over the last epoch; infinite when it stopped for one that was not finite.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    mean = 0.0
    for epoch in range(epochs):
        rows = torch.randperm(len(X), generator=generator)
        batches = list(torch.split(rows[: len(X) // batch * batch], batch))
        total = 0.0
        for part in batches:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(module(X[part]), y[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach())
            if not torch.isfinite(loss):
                return float("inf")
        mean = total / len(batches)
        after_epoch(epoch)
    return mean


def accuracy(module: Any, X: Any, y: Any) -> float:
    """Share of rows whose largest output in eval mode is that of their class; it ends in eval mode."""
    import torch

    module.eval()
    with torch.no_grad():
        hits = [(module(rows).argmax(dim=1) == labels) for rows, labels in zip(X.split(500), y.split(500), strict=True)]
    return float(torch.cat(hits).float().mean())


def of_finished_seeds(rows: list[Row], **last: Any) -> list[Row]:
    """Lines of the seeds that have one with these values, which the last cell of a seed gives."""
    finished = {row["seed"] for row in rows if all(row.get(key) == value for key, value in last.items())}
    return [row for row in rows if row["seed"] in finished]
