"""Warm starts of a path: fitted points on the whitened rows of the next point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn.program.gated import GateBlocks
from convexbn.program.neurons import Neurons
from convexbn.solvers.base import nonzero
from convexbn.training.relu_conversion import blocks_of
from convexbn.training.training_set import TrainingSet

#: Largest distance of an extrapolation, relative to the distance of the points that it takes.
_FARTHEST = 2.0


@np.errstate(all="ignore")
def start_of(data: TrainingSet, model: Any, former: Sequence[Any]) -> GateBlocks | Neurons | None:
    """A point near the solution of an estimator; None if the former ones do not help.

    Parameters
    ----------
    data, model : TrainingSet, estimator
        The estimator is not yet fitted.
    former : sequence of estimators
        At most two, fitted at other points, the nearest last.
    """
    if not former or (draws_whitened(model) and model.rank != former[-1].rank):
        return None  # whitened gates of another rank are other gates
    if model.activation == "relu":
        return _neurons(data, former[-1])
    blocks = _blocks(data, former[-1])
    if len(former) == 2 and former[0].rank == former[1].rank == model.rank:
        before, last, now = former[0].weight_decay, former[1].weight_decay, model.weight_decay
        if 0 < abs(now - last) <= _FARTHEST * abs(last - before):  # nearly piecewise linear in the weight decay
            blocks += (now - last) / (last - before) * (blocks - _blocks(data, former[0]))
    return nonzero(blocks) if np.isfinite(blocks).all() else None


def _blocks(data: TrainingSet, fitted: Any) -> Float:
    """Blocks (P, q, K) of all gates on the whitened rows of ``data``."""
    network, neurons = fitted.network_, _neurons(data, fitted)
    first, blocks = blocks_of(neurons, network.gate_index)
    everywhere = np.zeros((len(fitted.gate_offsets_), *blocks.shape[1:]))
    everywhere[network.gate_index[first]] = blocks
    return everywhere


def _neurons(data: TrainingSet, fitted: Any) -> Neurons:
    """Both layers of a fitted network of any rank on the whitened rows of ``data``.

    Made of the weights alone: a start need not be accurate, and products with all rows cost as much as some iterations.
    """
    network, whitening = fitted.network_, data.whitening
    peaks = np.abs(whitening.projection).max(axis=0)  # squares of tiny entries would be zero
    lengths = peaks * np.linalg.norm(whitening.projection / peaks, axis=0)
    directions = whitening.projection / lengths
    if not np.isfinite(directions).all():
        raise np.linalg.LinAlgError("the units of the features are out of range for a warm start.")
    coordinates = np.linalg.lstsq(directions, network.weight)[0] / lengths[:, None]
    first = network.gamma * coordinates / np.sqrt(whitening.total_weight)
    return Neurons(np.vstack([first, network.shift]), network.output)


def draws_whitened(model: Any) -> bool:
    """Whether the gates depend on the directions that are kept."""
    return model.activation == "gated" and isinstance(model.gates, str) and model.gates != "data"
