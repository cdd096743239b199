"""Array types in signatures, and the machine epsilon of float64."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float: TypeAlias = NDArray[np.float64]
FloatMatrix: TypeAlias = NDArray[Any]
Bool: TypeAlias = NDArray[np.bool_]
Index: TypeAlias = NDArray[np.intp]

EPS = float(np.finfo(np.float64).eps)
