"""The doors ``save`` and ``load``: an estimator becomes tensors and a header, and a file an estimator.

Nothing in a file is executed, and what ``save`` writes is first restored in memory, so that ``load`` reads it.
The certificate in a file is what was claimed when it was written; ``certify`` recomputes it from data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from convexbn.files import model_file
from convexbn.files.model_file import JSON, FormatError
from convexbn.storage import header as headers
from convexbn.storage import tensors
from convexbn.storage.restore import restore


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to a safetensors file, atomically.

    Parameters
    ----------
    model : ConvexBNClassifier or ConvexBNRegressor
        A fitted estimator. A ``callback`` is not saved, nor a ``random_state`` that is not an integer.
    path : path-like
        File to write; an existing one is replaced in one step.

    Raises
    ------
    ValueError
        When the estimator is not fitted, or was changed after the fit to one that `load` would refuse; nothing
        has been written.
    """
    check_is_fitted(model)
    model._validate_params()
    arrays, header = tensors.of_model(model), headers.of_model(model)
    _restore(arrays, header, f"{os.fspath(path)!r} is not written", "fit the model again and save it")
    model_file.write(path, arrays, header)


def load(path: str | os.PathLike[str]) -> Any:
    """Read an estimator that ``save`` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : path-like
        A file written by ``save``.

    Returns
    -------
    ConvexBNClassifier or ConvexBNRegressor
        Fitted; predictions equal those of the saved one bit for bit.

    Raises
    ------
    FormatError
        When the file is damaged, foreign, or its fields do not belong together.
    """
    arrays, header = model_file.read(path)
    return _restore(arrays, header, f"{os.fspath(path)!r} is not read", "use a file that save wrote, unchanged")


def _restore(arrays: Mapping[str, np.ndarray], header: Mapping[str, JSON], refused: str, remedy: str) -> Any:
    """Restore; a refusal says in one sentence what of which file was refused, why, and what to do."""
    try:
        return restore(arrays, header)
    except FormatError as error:
        raise FormatError(f"{refused}: {error}; {remedy}.") from None
