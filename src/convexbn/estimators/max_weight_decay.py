"""The smallest weight decay at which the zero network is optimal."""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn.estimators.classifier import ConvexBNClassifier
from convexbn.estimators.regressor import ConvexBNRegressor


def max_weight_decay(X: Any, y: Any, *, sample_weight: Any = None, **parameters: Any) -> float | tuple[float, float]:
    """Smallest weight decay at which the zero network is optimal.

    Parameters
    ----------
    X : array-like (n, d), or images of several axes with a convolution
        Features.
    y : array-like (n,) or (n, K)
        Integers, booleans and strings are class labels, encoded as ``ConvexBNClassifier`` does; floats and matrices
        are targets.
    sample_weight : array-like (n,), optional
        Equal to repeating rows.
    **parameters
        Of the estimator, such as ``activation``, ``loss``, ``gates``, ``n_gates``, ``rank``, ``convolution`` and
        ``random_state``.

    Returns
    -------
    float
        Gated: ``max_i ||A' D_i V0||_F`` with ``V0 = -grad L(0)``, exact.
    (float, float)
        ReLU: value of a local search for ``max over ||u|| <= 1 of ||V0'(A u)_+||``, and a valid upper bound. They are
        equal if there is a formula (rank n - 1: the largest norm of a ray of ``V0``).

    Examples
    --------
    >>> import numpy as np
    >>> value, upper = max_weight_decay(np.eye(5), [0, 0, 0, 1, 2], activation="relu")
    >>> round(value, 6), round(upper, 6)
    (1.03923, 1.03923)
    """
    is_class = np.asarray(y).ndim == 1 and np.asarray(y).dtype.kind != "f"
    model: Any = ConvexBNClassifier(**parameters) if is_class else ConvexBNRegressor(**parameters)
    model._validate_params()
    return model._max_weight_decay(model._prepare(X, y, sample_weight)[0], proved=True)
