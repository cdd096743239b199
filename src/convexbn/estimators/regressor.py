"""ConvexBNRegressor: numbers learned by the programs."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from sklearn.base import (
    RegressorMixin,
)
from sklearn.utils._param_validation import Interval, StrOptions

from convexbn._types import Float, FloatMatrix
from convexbn.data.convolution import Convolution
from convexbn.estimators.base import BaseConvexBN
from convexbn.program.losses import LossKind, loss_kind
from convexbn.solvers.base import Progress

if TYPE_CHECKING:
    pass


class ConvexBNRegressor(RegressorMixin, BaseConvexBN):
    """Batch-normalised two-layer network trained to a certified optimum, for regression.

    There is no output intercept: the constant is fitted through batch norm's shift, and penalised like
    everything else. Centre y when its mean is large.

    Parameters
    ----------
    activation, weight_decay, n_gates, gates, width, n_starts, rank, spectral_filter, convolution, solver
        As in :class:`ConvexBNClassifier`.
    tol, max_iter, time_limit, random_state, callback
        As in :class:`ConvexBNClassifier`.
    loss : {"squared", "huber"}, default="squared"
        Half the sum of squared errors, or of Huber's: linear beyond ``huber_delta``, so that outliers pull no harder.
    huber_delta : float, default=1.0
        Error from which on ``loss="huber"`` is linear, in the units of y.

    Attributes
    ----------
    certificate_, network_, gates_, gate_offsets_, weight_decay_, rank_, history_, n_iter_, fingerprint_
        As in :class:`ConvexBNClassifier`.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ConvexBNRegressor(random_state=0, weight_decay=200.0).fit(X, y - y.mean())
    >>> model.certificate_.status.value
    'CERTIFIED'
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseConvexBN._parameter_constraints,
        "loss": [StrOptions({"squared", "huber"})],
        "huber_delta": [Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        *,
        activation: str = "gated",
        loss: str = "squared",
        huber_delta: float = 1.0,
        weight_decay: float | str = "auto",
        n_gates: int = 100,
        gates: str | FloatMatrix = "data",
        width: int | None = None,
        n_starts: int = 1,
        rank: int | float | None = None,
        spectral_filter: float | None = None,
        convolution: Convolution | None = None,
        solver: str = "auto",
        tol: float = 1e-6,
        max_iter: int | None = None,
        time_limit: float | None = None,
        random_state: Any = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> None:
        super().__init__(
            activation=activation, loss=loss, weight_decay=weight_decay, n_gates=n_gates, gates=gates, width=width,
            n_starts=n_starts, rank=rank, spectral_filter=spectral_filter, convolution=convolution, solver=solver,
            tol=tol, max_iter=max_iter, time_limit=time_limit, random_state=random_state, callback=callback,
        )  # fmt: skip
        self.huber_delta = huber_delta

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train to a certified optimum.

        Parameters
        ----------
        X : array-like (n, d)
            Features.
        y : array-like (n,) or (n, K)
            Targets.
        sample_weight : array-like (n,), optional
            Equal to repeating rows.
        """
        return self._fit(X, y, sample_weight)

    def predict(self, X: Any) -> Float:
        """Outputs of the network: (n,) or (n, K) as the targets were."""
        fitted = self.__dict__
        outputs = self._outputs(X, fitted)
        return outputs[:, 0] if fitted["_single_output"] else outputs

    def _loss_kind(self, Y: Float) -> LossKind:
        return loss_kind(self.loss, huber_delta=self.huber_delta)

    def _encode_new(self, y: Any) -> tuple[Float, dict[str, Any]]:
        return self._encode_known(y), {"_single_output": np.ndim(y) == 1}

    def _encode_known(self, y: Any) -> Float:
        targets = np.asarray(y, dtype=np.float64)
        return targets[:, None] if targets.ndim == 1 else targets

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
