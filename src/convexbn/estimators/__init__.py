"""The scikit-learn door: estimators, cross-validation, paths, saved models, displays."""

from __future__ import annotations

import os
from typing import Any

from convexbn.estimators import persistence
from convexbn.estimators.classifier import ConvexBNClassifier
from convexbn.estimators.regressor import ConvexBNRegressor

#: The estimators that files hold.
KINDS = (ConvexBNClassifier, ConvexBNRegressor)


def load(path: str | os.PathLike[str]) -> Any:
    """Read an estimator that ``save`` wrote; nothing in the file is executed.

    Returns
    -------
    ConvexBNClassifier or ConvexBNRegressor
        Fitted; predictions equal those of the saved one bit for bit.

    Raises
    ------
    FormatError
        When the file is damaged, foreign, or its fields do not belong together.

    Examples
    --------
    >>> import tempfile, convexbn
    >>> model = convexbn.ConvexBNRegressor(n_gates=5, random_state=0).fit([[0.0], [1], [2]], [0.0, 1, 4])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/model")
    ...     bool((convexbn.load(f"{folder}/model").predict([[3.0]]) == model.predict([[3.0]])).all())
    True
    """
    return persistence.load(path, KINDS)
