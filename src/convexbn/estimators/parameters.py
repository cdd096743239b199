"""Parameters of the estimators, declared once as fields, with scikit-learn's constraints."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints

from convexbn._types import FloatMatrix
from convexbn.data.convolution import Convolution
from convexbn.program.losses import losses_for
from convexbn.training.fit import SOLVERS

#: Parameters of one activation, whose values for the other are a mistake; ``n_gates`` is a number that searches set for
#: both.
ONLY_FOR = {"gated": ("gates", "solver"), "relu": ("width", "n_starts")}

#: Most columns of a table for which ``loss="auto"`` is the cross-entropy.
AUTO_LOSS_COLUMNS = 60

#: Dataclass decorator: fields are the keywords of an estimator; scikit-learn prints and compares it.
parameters = dataclass(kw_only=True, eq=False, repr=False)


class Choices(StrOptions):
    """Strings to choose from, in the order of the alphabet in messages."""

    def __str__(self) -> str:
        return f"a str among {{{', '.join(map(repr, sorted(self.options)))}}}"


def loss_names(task: str | None = None) -> list[str]:
    """Values of the parameter ``loss`` for ``"classification"`` or ``"regression"``, or of both.

    Examples
    --------
    >>> loss_names("regression"), loss_names("classification")[0]
    (['squared', 'huber'], 'auto')
    """
    return ([] if task == "regression" else ["auto"]) + losses_for(task)


def trained_loss(values: Mapping[str, Any]) -> str:
    """Name of the loss that parameters and fitted attributes stand for."""
    if values["loss"] != "auto":
        return str(values["loss"])
    many = values["convolution"] is not None or values["n_features_in_"] > AUTO_LOSS_COLUMNS
    return "squared" if many else "cross_entropy"


@parameters
class NetworkParameters(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Parameters that a single fit and a cross-validation share; ``ConvexBNClassifier`` describes them."""

    activation: str = "gated"
    loss: str = "squared"
    gates: str | FloatMatrix = "trained"
    linear: bool = True
    fit_intercept: bool = True
    standardize: bool = True
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
        "activation": [Choices({"gated", "relu"})],
        "loss": [str],
        "gates": [Choices({"data", "whitened", "trained"}), "array-like"],
        "linear": ["boolean"],
        "fit_intercept": ["boolean"],
        "standardize": ["boolean"],
        "width": [Interval(Integral, 1, None, closed="left"), None],
        "n_starts": [Interval(Integral, 1, None, closed="left")],
        "convolution": [Convolution, None],
        "solver": [Choices({"auto", *SOLVERS})],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left"), None],
        "time_limit": [Interval(Real, 0, None, closed="left"), None],
        "proof_time": [Interval(Real, 0, None, closed="left"), None],
        "random_state": ["random_state"],
        "huber_delta": [Interval(Real, 0, None, closed="neither")],  # of regression alone
        "class_weight": [dict, Choices({"balanced"}), None],  # of classification alone
    }

    @property
    def loss_(self) -> str:
        """Name of the loss that is trained: the parameter, or what ``"auto"`` is for the columns of the data."""
        return trained_loss(self.__dict__)

    def _validate_params(self) -> None:
        constraints = self._parameter_constraints | {"loss": [Choices(set(loss_names(self._task)))]}
        values = self.get_params(deep=False)
        validate_parameter_constraints(constraints, values, caller_name=type(self).__name__)
        for name, value in values.items():
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise ValueError(f"{name} is an integer beyond the largest float, {sys.float_info.max:.3g}: lower it.")

    @property
    def _unused(self) -> list[str]:
        """Parameters that are not at their defaults and that the activation does not use."""
        (others,) = (names for activation, names in ONLY_FOR.items() if activation != self.activation)
        return [name for name in others if not np.array_equal(getattr(self, name), getattr(type(self), name))]

    def _warn_of_unused(self) -> None:
        """Warn, as scikit-learn does, of parameters that are set and not used."""
        if unused := self._unused:
            warnings.warn(
                f"activation={self.activation!r} does not use {', '.join(unused)}: leave the default.",
                UserWarning, stacklevel=3,
            )  # fmt: skip


@parameters
class ClassificationParameters(NetworkParameters):
    """Parameters of classification."""

    loss: str = "auto"
    class_weight: dict[Any, float] | str | None = None

    _task: ClassVar[str] = "classification"


@parameters
class RegressionParameters(NetworkParameters):
    """Parameters of regression, and its tag for several targets."""

    huber_delta: float = 1.0

    _task: ClassVar[str] = "regression"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
