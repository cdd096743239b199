"""Kernels of the programs: functions of one block of whitened or raw rows, written against its array namespace.

Flops per row of ``q`` numbers: ``open_gates`` takes ``2 q P`` for ``P`` gates, ``masked_outputs`` and
``masked_correlations`` ``2 q P K`` for ``K`` outputs, ``relu_outputs`` ``2 m (q + R K)`` for ``m`` neurons and
``loss_and_ascent`` three times that. All but the ties of gates are matrix products and run at their speed: the products
of rows and outputs that they read are formed in the cache.
"""

from __future__ import annotations

from typing import Any

from convexbn._types import EPS
from convexbn.data.kernels import cast, namespace, positive_part, scaled

#: Entries of gates and rows that are multiplied at once when responses are summed again.
_TIED_ENTRIES = 1 << 20


def open_gates(block: Any, mean: Any, gates: Any, thresholds: Any, lengths: Any, *factors: Any) -> Any:
    """Whether ``(x - mean)'g >= threshold`` for each scaled row and gate: (b, P).

    A response within rounding of zero is summed again in an order that does not depend on the block.

    Parameters
    ----------
    block, mean : array (b, d), (d,)
    gates, thresholds, lengths : array (d, P), (P,), (P,)
        ``lengths`` are the norms of the gates.
    *factors : array (d,)
        Scales of the columns, see ``data.kernels.scaled``.
    """
    xp = namespace(gates)
    centred = scaled(block, gates.dtype, *factors) - mean
    response = centred @ gates - thresholds
    if 0 in response.shape:
        return response >= 0
    reach = xp.max(xp.abs(centred), axis=1) * centred.shape[1] ** 0.5  # bounds the norm of the row
    doubtful = xp.abs(response) <= 8 * gates.shape[0] * EPS * (reach[:, None] * lengths + xp.abs(thresholds))
    rows, columns = xp.nonzero(doubtful)
    step = max(1, _TIED_ENTRIES // gates.shape[0])
    for start in range(0, rows.shape[0], step):
        i, j = rows[start : start + step], columns[start : start + step]
        response[i, j] = xp.sum(centred[i] * gates.T[j], axis=1) - thresholds[j]
    return response >= 0


def masked_outputs(block: Any, patterns: Any, stacked: Any, gate_index: Any = None) -> Any:
    """``sum_j D_j A S_j``: (b, K).

    Parameters
    ----------
    block, patterns, stacked : array (b, q), (b, P), (m, K, q)
        ``stacked`` holds the blocks ``S_j'``.
    gate_index : array (m,), optional
        Gates of the blocks; all by default.
    """
    m, K, q = stacked.shape
    xp = namespace(block)
    summed = _gate_values(patterns, gate_index, block) @ xp.reshape(stacked, (m, K * q))  # sum_j D_j S_j, row by row
    return xp.vecdot(xp.reshape(summed, (-1, K, q)), block[:, None, :])


def masked_correlations(block: Any, patterns: Any, dual: Any, gate_index: Any = None) -> tuple[Any]:
    """``V' D_i A`` for every gate: (P, K q).

    Parameters
    ----------
    block, patterns, dual : array (b, q), (b, P), (b, K)
    gate_index : array (m,), optional
        Gates ``i``; all by default.
    """
    xp = namespace(block)
    products = dual[:, :, None] * block[:, None, :]
    flat = xp.reshape(products, (products.shape[0], products.shape[1] * products.shape[2]))
    return (_gate_values(patterns, gate_index, block).T @ flat,)


def _gate_values(patterns: Any, gate_index: Any, block: Any) -> Any:
    """Patterns of the chosen gates in the precision of a block."""
    xp = namespace(block)
    chosen = patterns if gate_index is None else xp.take(patterns, gate_index, axis=1)
    return cast(chosen, block.dtype)


def relu_outputs(block: Any, first: Any, output: Any, readout: Any) -> Any:
    """Outputs of ``(A first)_+`` and an output layer: (cases, K).

    Parameters
    ----------
    block, first, output, readout : array (b, q), (q, m), (m, R K), Readout
    """
    return readout.outputs(positive_part(block @ first), output)


def relu_ascent(block: Any, hidden: Any, pooled: Any, dual: Any, regional: Any, readout: Any) -> tuple[Any, Any]:
    """Derivatives of ``<dual, outputs>`` by the first layer (q, m) and by the output layer (R m, K).

    Parameters
    ----------
    block, hidden, pooled : array (b, q), (b, m), (cases, R m)
        Rows, their hidden units, and these as the output layer sees them.
    dual, regional : array (cases, K), (R m, K)
        ``regional`` is the output layer, region by region.
    readout : Readout
    """
    outer = dual * regional.T if dual.shape[1] == 1 else dual @ regional.T  # BLAS is slow at a single column
    back = readout.unpool(outer, hidden)
    back *= hidden > 0
    return block.T @ back, pooled.T @ dual


def loss_and_ascent(
    block: Any, loss: Any, first: Any, output: Any, bias: Any, readout: Any
) -> tuple[float, Any, Any, Any]:
    """Loss of the cases of a block, and its negative gradient by both layers and the output bias, in float64.

    Parameters
    ----------
    block, loss : array (b, q), Loss
    first, output, bias, readout : array (q, m), (m, R K), (K,), Readout
    """
    xp = namespace(block)
    hidden, regional = positive_part(block @ first), readout.by_region(output)
    pooled = readout.pool(hidden)
    outputs = cast(pooled @ regional, xp.float64) + bias
    dual = loss.negative_gradient(outputs)
    by_first, by_regional = relu_ascent(block, hidden, pooled, cast(dual, block.dtype), regional, readout)
    ascents = cast(by_first, xp.float64), cast(readout.by_neuron(by_regional), xp.float64), xp.sum(dual, axis=0)
    return loss.value(outputs), *ascents
