"""The smallest weight decay at which the zero network is optimal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from convexbn._types import FloatMatrix
from convexbn.data.convolution import Convolution
from convexbn.estimators.classifier import ConvexBNClassifier
from convexbn.estimators.regressor import ConvexBNRegressor

if TYPE_CHECKING:
    pass


def max_weight_decay(
    X: Any,
    y: Any,
    *,
    activation: str = "gated",
    loss: str = "squared",
    huber_delta: float = 1.0,
    gates: str | FloatMatrix = "data",
    n_gates: int = 100,
    rank: int | float | None = None,
    spectral_filter: float | None = None,
    convolution: Convolution | None = None,
    sample_weight: Any = None,
    random_state: Any = None,
) -> float | tuple[float, float]:
    """Smallest weight decay at which the zero network is optimal.

    Parameters
    ----------
    X : array-like (n, d), or images of several axes with a convolution
        Features.
    y : array-like (n,) or (n, K)
        Integers, booleans and strings are class labels, encoded as ``ConvexBNClassifier`` does; floats
        and matrices are targets.
    activation, loss, huber_delta, gates, n_gates, rank, spectral_filter, convolution, sample_weight, random_state
        As in the estimators.

    Returns
    -------
    float
        Gated: ``max_i ||A' D_i V0||_F`` with ``V0 = -grad L(0)``, exact.
    (float, float)
        ReLU: value of a local search for ``max over ||u|| <= 1 of ||V0'(A u)_+||``, and a valid upper bound. Equal
        where it has a formula (rank n - 1: the largest norm of a ray of ``V0``).

    Examples
    --------
    >>> import numpy as np
    >>> value, upper = max_weight_decay(np.eye(5), [0, 0, 0, 1, 2], activation="relu")
    >>> round(value, 6), round(upper, 6)
    (1.732051, 1.732051)
    """
    is_class = np.asarray(y).ndim == 1 and np.asarray(y).dtype.kind != "f"
    model = ConvexBNClassifier() if is_class else ConvexBNRegressor(huber_delta=huber_delta)
    model.set_params(
        activation=activation, loss=loss, gates=gates, n_gates=n_gates, rank=rank, spectral_filter=spectral_filter,
        convolution=convolution, random_state=random_state,
    )  # fmt: skip
    model._validate_params()
    data, _ = model._prepared(X, y, sample_weight)
    return model._max_weight_decay(data, proved=True)
