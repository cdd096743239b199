"""Probe rows, on which a converted network is compared with its origin before it is handed out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from convexbn._types import Float, FloatMatrix
from convexbn.program.layers import rounded, row_scale
from convexbn.program.network import BatchNormNetwork

#: Largest allowed difference of outputs, relative to the largest output, by type.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}

#: Number of probes, and the smallest relative singular value that they invert; float32 cannot convert smaller ones.
_N_PROBES, _RCOND = 64, 1e-6


def probe_rows(weight: Float, mean: Float) -> Float:
    """Random rows (64, d) about ``mean`` whose responses ``(x - mean)'weight`` have root mean square 1.

    They are the least rows with Gaussian responses: like the data that whitened weights come from, they are large in
    directions in which the weights are small. Equal weights give equal rows.
    """
    scale = row_scale(weight)
    inverse = np.linalg.pinv(weight / scale, rcond=_RCOND)
    deviations = np.random.default_rng(0).standard_normal((_N_PROBES, weight.shape[1])) @ inverse
    size = np.sqrt(np.mean((deviations @ (weight / scale)) ** 2))
    return mean + deviations / (size if size > 0 else 1.0) / scale[:, 0]


def output_error(expected: Float, found: Float) -> float:
    """Largest difference relative to the largest expected output; infinite if an output is not finite."""
    if not np.isfinite(found).all():
        return np.inf
    error, scale = np.abs(found - expected).max(initial=0.0), np.abs(expected).max(initial=0.0)
    return float(error / scale) if scale > 0 else (0.0 if error == 0 else np.inf)


@np.errstate(all="ignore")
def check_conversion(
    network: BatchNormNetwork,
    converted: Callable[[FloatMatrix], FloatMatrix],
    dtype: DTypeLike,
    rows: Float | None,
    tol: float | None,
    probes: Float | None = None,
    expected: Callable[[Float], Float] | None = None,
) -> None:
    """Compare a converted network with its origin on probe rows and on ``rows``; raise a ValueError if they differ.

    Parameters
    ----------
    network, converted : BatchNormNetwork, callable
        ``converted`` takes rows of ``dtype`` and returns the outputs of the converted network.
    dtype : dtype
        float32 or float64. Probe rows are numbers of it; ``rows`` need not be: then their rounding is measured too.
    rows, probes : ndarray (n, d), optional
        ``probes`` replace ``probe_rows``.
    tol : float or None
        Allowed difference relative to the largest output; ``TOLERANCES`` by default.
    expected : callable, optional
        Gives the outputs of the origin, if it is more than its network.
    """
    d = network.n_features
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != d):
        raise ValueError(f"X must have shape (n, {d}), got {rows.shape}.")
    name = np.dtype(dtype).name
    allowed = TOLERANCES[name] if tol is None else tol
    probes = probe_rows(network.weight, network.mean) if probes is None else probes
    outputs = network.predict if expected is None else expected
    for kind, points in [("probe rows", rounded(probes, dtype))] + ([] if rows is None else [("the rows of X", rows)]):
        error = output_error(outputs(points), np.asarray(converted(points.astype(dtype)), dtype=np.float64))
        if not error <= allowed:
            wider = "" if name == "float64" else "convert to float64, "
            raise ValueError(
                f"in {name} the outputs on {kind} differ by {error:.1e} of their scale, more than {allowed:.1e}: "
                f"{wider}train on centred features or with a lower rank, or allow more with tol."
            )
