"""Parameters of the estimators, declared once as fields, with scikit-learn's constraints."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints

from convexbn._types import FloatMatrix
from convexbn.data.convolution import Convolution
from convexbn.program.losses import losses_for
from convexbn.training.fit import SOLVERS

#: Dataclass decorator: fields are the keywords of an estimator; scikit-learn prints and compares it.
parameters = dataclass(kw_only=True, eq=False, repr=False)


@parameters
class NetworkParameters(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Parameters that a single fit and a cross-validation share; ``ConvexBNClassifier`` describes them."""

    activation: str = "gated"
    loss: str = "squared"
    gates: str | FloatMatrix = "data"
    width: int | None = None
    n_starts: int = 1
    convolution: Convolution | None = None
    solver: str = "auto"
    tol: float = 1e-6
    max_iter: int | None = None
    time_limit: float | None = None
    proof_time: float | None = None
    random_state: Any = None

    _task: ClassVar[str]  # "classification" or "regression": selects the losses
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "activation": [StrOptions({"gated", "relu"})],
        "loss": [str],
        "gates": [StrOptions({"data", "whitened", "trained"}), "array-like"],
        "width": [Interval(Integral, 1, None, closed="left"), None],
        "n_starts": [Interval(Integral, 1, None, closed="left")],
        "convolution": [Convolution, None],
        "solver": [StrOptions({"auto", *SOLVERS})],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left"), None],
        "time_limit": [Interval(Real, 0, None, closed="left"), None],
        "proof_time": [Interval(Real, 0, None, closed="left"), None],
        "random_state": ["random_state"],
        "huber_delta": [Interval(Real, 0, None, closed="neither")],  # of regression alone
    }

    def _validate_params(self) -> None:
        constraints = self._parameter_constraints | {"loss": [StrOptions(set(losses_for(self._task)))]}
        validate_parameter_constraints(constraints, self.get_params(deep=False), caller_name=type(self).__name__)


@parameters
class RegressionParameters(NetworkParameters):
    """Parameters of regression, and its tag for several targets."""

    huber_delta: float = 1.0

    _task: ClassVar[str] = "regression"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
