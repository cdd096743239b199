"""The PyTorch door: networks as plain modules, and modules as networks."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("convexbn.nn needs PyTorch: pip install 'convexbn[torch]'.") from error

from convexbn.nn.certify import certify
from convexbn.nn.convex_layer import ConvexLayer, gated_outputs
from convexbn.nn.from_module import from_module
from convexbn.nn.last_layers import LastLayers, read_last_layers
from convexbn.nn.reoptimise import Reoptimisation, reoptimise
from convexbn.nn.to_module import GatedModule, to_module

__all__ = [
    "ConvexLayer", "GatedModule", "LastLayers", "Reoptimisation", "certify", "from_module", "gated_outputs",
    "read_last_layers", "reoptimise", "to_module",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
