"""The companion systems: cross-iteration batch norm, weight rescaling, diagnostics of any module, exact excess risk.

They do not belong to the theory of this package and import nothing of it. All but ``excess_risk`` need PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CrossIterationBatchNorm1d": "cross_iteration", "CrossIterationBatchNorm2d": "cross_iteration",
    "convert_cross_iteration_batch_norm": "cross_iteration", "WeightRescaling": "weight_rescaling",
    "NormalisedLayer": "normalised_layer", "normalised_layers": "normalised_layer",
}  # fmt: skip

__all__ = [
    "CrossIterationBatchNorm1d", "CrossIterationBatchNorm2d", "NormalisedLayer", "WeightRescaling",
    "convert_cross_iteration_batch_norm", "diagnostics", "excess_risk", "normalised_layers",
]  # fmt: skip

if TYPE_CHECKING:
    from convexbn.companions import diagnostics, excess_risk
    from convexbn.companions.cross_iteration import (
        CrossIterationBatchNorm1d,
        CrossIterationBatchNorm2d,
        convert_cross_iteration_batch_norm,
    )
    from convexbn.companions.normalised_layer import NormalisedLayer, normalised_layers
    from convexbn.companions.weight_rescaling import WeightRescaling


def __getattr__(name: str) -> Any:
    """Load a system on first use, so that ``excess_risk`` works without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'convexbn.companions' has no attribute {name!r}")
    try:
        module = import_module(f"convexbn.companions.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"convexbn.companions.{name} needs PyTorch: pip install 'convexbn[torch]'.") from error
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return sorted(__all__)
