"""Input validation: dense finite numbers; all else is refused in one sentence that names the place."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from sklearn.utils.validation import _check_sample_weight, validate_data

from convexbn._types import Float, FloatMatrix
from convexbn.estimators.plain_values import plain_targets, refuse_columns


def checked_data(
    estimator: Any, X: Any, y: Any, sample_weight: Any, *, numeric_targets: bool, reset: bool
) -> tuple[FloatMatrix, Any, Float]:
    """Rows (float64 or a smaller type), targets and weights.

    Parameters
    ----------
    estimator, X, y, sample_weight : BaseEstimator, array-like
    numeric_targets : bool
        Whether ``y`` holds numbers, in one column or several.
    reset : bool
        Whether to set the number and names of the features, or check them.
    """
    for name, array in (("X", X), ("y", y), ("sample_weight", sample_weight)):
        refuse_containers(name, array)
    y = plain_targets(y, numeric=numeric_targets)
    for name, array in (("y", y), ("sample_weight", sample_weight)):
        check_finite(name, array)
    targets = {"multi_output": numeric_targets, "y_numeric": numeric_targets}
    X, y = _validate(estimator, X, y, reset=reset, ensure_min_samples=2, **targets)
    X = _at_most_float64(X)
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if not np.any(weights > 0):
        raise ValueError("All sample weights are zero: give at least two rows a positive weight.")
    with np.errstate(over="ignore"):
        if not np.isfinite(weights.sum()):
            raise ValueError("The sum of sample_weight overflows: divide the weights by a common factor.")
    return X, y, weights


def checked_rows(estimator: Any, X: Any) -> FloatMatrix:
    """Rows to predict, of float64 or a smaller type."""
    refuse_containers("X", X)
    return _at_most_float64(_validate(estimator, X, reset=False))


def _at_most_float64(X: FloatMatrix) -> FloatMatrix:
    """Convert to float64, except for smaller types, which are converted block by block: images take an eighth."""
    return X if X.dtype.itemsize < 8 else np.asarray(X, dtype=np.float64)


def check_finite(name: str, array: Any) -> None:
    """Refuse NaN and infinity in numeric data, with the place of the first."""
    try:
        values = np.asarray(array)
    except (ValueError, TypeError, RuntimeError):
        return  # scikit-learn reports it
    if values.dtype.kind not in "fc" or values.ndim == 0:
        return
    with np.errstate(all="ignore"):
        if np.isfinite(values.sum()):  # one pass decides, unless finite values overflow the sum
            return
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        place = wrong[0].tolist()
        where = f"index {place}" if len(place) > 2 else f"row {place[0]}" + "".join(f", column {c}" for c in place[1:])
        cause = "NaN" if np.isnan(values[tuple(place)]) else "infinity or a value too large for dtype('float64')"
        raise ValueError(f"Input {name} contains {cause}; first at {where}.")


def _validate(estimator: Any, X: Any, *y: Any, **options: Any) -> Any:
    """Validate by scikit-learn, for numbers alone; a refusal names the column."""
    refuse_columns(X)
    try:
        result = validate_data(estimator, X, *y, ensure_all_finite=False, **options)
    except RuntimeError as error:  # tensors that require gradients
        raise TypeError(f"X cannot be read as an array: {error}") from error
    rows = result[0] if y else result
    if rows.dtype.kind not in "fiub":
        raise TypeError(f"X must hold numbers; its type is {rows.dtype}.")
    check_finite("X", rows)
    return result


def refuse_containers(name: str, array: Any) -> None:
    """Refuse sparse and masked data."""
    if scipy.sparse.issparse(array):
        raise TypeError(
            f"Sparse data was passed for {name}, but dense data is required: batch norm centres the columns. "
            f"Use '.toarray()' to densify; that takes {8 * np.prod(array.shape):.3g} bytes."
        )
    if np.ma.isMaskedArray(array) and np.ma.getmaskarray(array).any():
        raise ValueError(f"{name} has masked values: fill them or leave their rows out.")
