"""Neural collapse: how far the features of a layer and their classifier have collapsed to one point a class.

The four measures are those of Papyan, Han, Donoho, "Prevalence of neural collapse during the terminal phase of deep
learning training", PNAS 2020. Every class counts the same, whatever its number of samples: the global mean is the mean
of the class means. That matters, because the optimum of a batch-normalised network by formula has *orthogonal* class
means (mathematics, section 4). With equal class sizes they form a simplex after centring; with unequal sizes their
norms differ, and the second and third measure are not 0 at the global optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from convexbn._types import EPS, Float, FloatMatrix, Index
from convexbn.program.losses import LOSSES
from convexbn.program.relu import ReluProgram
from convexbn.solvers.closed_form import ClosedForm


@dataclass(frozen=True)
class CollapseMetrics:
    """The four measures of neural collapse: 0 after a collapse, ``nan`` if class means coincide.

    Attributes
    ----------
    within_class : float
        NC1: ``trace(S_W pinv(S_B)) / K``, the variation within the classes relative to that between their means.
    norm_variation : float
        NC2: standard deviation over mean of the norms of the centred class means.
    angle_deviation : float
        NC2: largest deviation of a cosine between two centred class means from ``-1 / (K - 1)``.
    duality_centred : float
        NC3: ``|| W / ||W||_F - M / ||M||_F ||_F`` of the classifier and the centred class means, from 0 to 2.
    duality_uncentred : float
        NC3 with the class means as they are: 0 at the optimum for the squared loss without an output bias.
    disagreement : float
        NC4: share of the samples whose largest output is not that of the nearest class mean.
    """

    within_class: float
    norm_variation: float
    angle_deviation: float
    duality_centred: float
    duality_uncentred: float
    disagreement: float


def collapse_metrics(
    features: FloatMatrix, labels: np.ndarray, classifier: FloatMatrix, bias: FloatMatrix | None = None
) -> CollapseMetrics:
    """Neural collapse of the last hidden layer's features.

    Parameters
    ----------
    features : ndarray (n, p)
        Inputs of the classifier, such as ``model.transform(X)``.
    labels : ndarray (n,) of int
        Classes 0 to K - 1; every class at least once.
    classifier : ndarray (p, K)
        Weights of the last layer, such as ``model.network_.output``; of a torch ``Linear`` the transpose of its weight.
    bias : ndarray (K,), optional
        Bias of the last layer.

    Raises
    ------
    ValueError
        For shapes that do not belong together, fewer than two classes, or a class without a sample.

    Notes
    -----
    ``S_W`` and ``S_B`` are means over the classes. If the features of a class are 0 (its neuron is dead), its outputs
    are equal, and the first counts as the largest.

    Examples
    --------
    Two classes of one point each, with the classifier along their means:

    >>> collapse_metrics(np.eye(2)[[0, 0, 1]], np.array([0, 0, 1]), np.eye(2)).duality_uncentred
    0.0
    """
    features, classifier = np.asarray(features, dtype=np.float64), np.asarray(classifier, dtype=np.float64)
    labels, K = _checked_labels(features, np.asarray(labels), classifier), classifier.shape[1]
    counts = np.bincount(labels, minlength=K)
    sums = np.zeros((K, features.shape[1]))
    np.add.at(sums, labels, features)
    means = sums / counts[:, None]
    centred = means - means.mean(axis=0)
    outputs = features @ classifier + (0.0 if bias is None else np.asarray(bias, dtype=np.float64))
    variation, deviation = _distance_to_simplex(centred)
    return CollapseMetrics(
        within_class=_within_class((features - means[labels]) / np.sqrt(K * counts[labels])[:, None], centred),
        norm_variation=variation,
        angle_deviation=deviation,
        duality_centred=_distance_of_directions(classifier.T, centred),
        duality_uncentred=_distance_of_directions(classifier.T, means),
        disagreement=float(np.mean(outputs.argmax(axis=1) != cdist(features, means, "sqeuclidean").argmin(axis=1))),
    )


def optimal_collapse(counts: Sequence[int], weight_decay: float, *, loss: str) -> CollapseMetrics:
    """Neural collapse at the global optimum of any deep network whose last features reach rank n - 1, by formula.

    Parameters
    ----------
    counts : sequence of int
        Number of samples of each class.
    weight_decay : float
        Strength against the sum of the losses, as in the estimators.
    loss : {"squared", "cross_entropy"}
        With one-hot targets; no output bias.

    Raises
    ------
    ValueError
        For another loss.

    Examples
    --------
    Four equal classes of 8: the squared loss aligns the classifier with the means, cross-entropy with the centred ones.

    >>> squared, entropy = (optimal_collapse([8] * 4, 0.5, loss=loss) for loss in ("squared", "cross_entropy"))
    >>> round(squared.duality_centred, 4), round(entropy.duality_uncentred, 4)
    (0.5176, 0.5176)
    """
    if loss not in ("squared", "cross_entropy"):
        raise ValueError(f"loss must be 'squared' or 'cross_entropy', whose targets are one-hot; got {loss!r}.")
    weights, K = np.asarray(counts, dtype=np.float64), len(counts)
    # the rows of a class have equal hidden activations at the optimum: one row of their total weight stands for them
    rows = np.diag(1 / np.sqrt(weights))
    program = ReluProgram(rows, LOSSES[loss](np.eye(K), weights), weight_decay)
    neurons, labels = ClosedForm().solve(program).weights, np.repeat(np.arange(K), counts)
    root = np.sqrt(np.linalg.norm(neurons.output, axis=1))  # the first layer has unit norms
    hidden = np.maximum(rows @ neurons.first, 0) * root
    return collapse_metrics(hidden[labels], labels, neurons.output / root[:, None])


def _checked_labels(features: Float, labels: np.ndarray, classifier: Float) -> Index:
    n, p, K = *features.shape, classifier.shape[1]
    if classifier.shape[0] != p or K < 2:
        raise ValueError(
            f"classifier must have shape ({p}, K) with one column for each of K >= 2 classes, got {classifier.shape}; "
            "write one output for two classes as the columns -w and w."
        )
    if labels.shape != (n,) or labels.dtype.kind not in "iub":
        raise ValueError(f"labels must be {n} integers, got shape {labels.shape} of type {labels.dtype}.")
    if not np.array_equal(np.unique(labels), np.arange(K)):
        raise ValueError(f"labels must be 0 to {K - 1}, each at least once: one for each column of the classifier.")
    return labels.astype(np.intp)


def _within_class(deviations: Float, centred: Float) -> float:
    """``trace(S_W pinv(S_B)) / K`` with ``S_W = deviations' deviations`` and ``S_B = centred' centred / K``."""
    left, values, right = np.linalg.svd(centred / np.sqrt(len(centred)), full_matrices=False)
    live = values > len(centred) * EPS * values.max(initial=0.0)
    if not live.any():
        return float("nan")
    return float(np.sum((deviations @ right[live].T / values[live]) ** 2) / len(left))


def _distance_to_simplex(centred: Float) -> tuple[float, float]:
    """Coefficient of variation of the norms, and largest deviation of a cosine from that of a regular simplex."""
    norms, K = np.linalg.norm(centred, axis=1), len(centred)
    if not norms.all():
        return float("nan"), float("nan")
    cosines = centred @ centred.T / np.outer(norms, norms)
    apart = ~np.eye(K, dtype=bool)
    return float(norms.std() / norms.mean()), float(np.abs(cosines[apart] + 1 / (K - 1)).max())


def _distance_of_directions(one: Float, other: Float) -> float:
    lengths = np.linalg.norm(one), np.linalg.norm(other)
    return float(np.linalg.norm(one / lengths[0] - other / lengths[1])) if all(lengths) else float("nan")
