"""ConvexBNRegressor: regression by the programs."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin

from convexbn._types import Float
from convexbn.estimators.base import BaseConvexBN
from convexbn.estimators.parameters import RegressionParameters, parameters
from convexbn.estimators.plain_values import ScoreOfPlainTargets
from convexbn.program.losses import LossKind, loss_kind


@parameters
class ConvexBNRegressor(ScoreOfPlainTargets, RegressorMixin, RegressionParameters, BaseConvexBN):
    """Batch-normalised two-layer network trained to a certified optimum, for regression.

    The default, ``activation="gated"``, is piecewise linear and jumps at its gates; ``activation="relu"`` is
    continuous: see :class:`ConvexBNClassifier`.

    Parameters
    ----------
    activation, weight_decay, n_gates, gates, linear, fit_intercept, standardize, width, n_starts
        As in :class:`ConvexBNClassifier`.
    rank, spectral_filter, convolution, solver
        As in :class:`ConvexBNClassifier`.
    tol, max_iter, time_limit, proof_time, random_state, callback
        As in :class:`ConvexBNClassifier`.
    loss : {"squared", "huber"}, default="squared"
        Half the sum of squared errors, or of Huber's: linear beyond ``huber_delta``, so that outliers pull no harder.
    huber_delta : float, default=1.0
        Error from which on ``loss="huber"`` is linear, in the units of y.

    Attributes
    ----------
    certificate_, network_, gates_, gate_offsets_, weight_decay_, rank_, history_, n_iter_, fingerprint_,
    feature_importances_
        As in :class:`ConvexBNClassifier`.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ConvexBNRegressor(random_state=0).fit(X, y)
    >>> model.certificate_.status.value
    'CERTIFIED'
    """

    def predict(self, X: Any) -> Float:
        """Outputs of the network: (n,) or (n, K), as the targets of the fit."""
        fitted = self.__dict__
        outputs = self._outputs(X, fitted)
        return outputs[:, 0] if fitted["_single_output"] else outputs

    def _loss_kind(self, Y: Float) -> LossKind:
        return loss_kind(self.loss, huber_delta=self.huber_delta)

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        return self._encode_known(y), {"_single_output": np.ndim(y) == 1}

    def _encode_known(self, y: Any) -> Float:
        return np.asarray(y, dtype=np.float64).reshape(len(y), -1)
