"""The PyTorch door: networks as plain modules, and modules as networks."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("convexbn.nn needs PyTorch: pip install 'convexbn[torch]'.") from error

from convexbn.nn.gated import GatedModule
from convexbn.nn.judging import certify
from convexbn.nn.layer import ConvexLayer, gated_outputs
from convexbn.nn.module import to_module
from convexbn.nn.reading import from_module
from convexbn.nn.reoptimisation import Reoptimisation, reoptimise
from convexbn.nn.tail import Tail, read_tail

__all__ = [
    "ConvexLayer",
    "GatedModule",
    "Reoptimisation",
    "Tail",
    "certify",
    "from_module",
    "gated_outputs",
    "read_tail",
    "reoptimise",
    "to_module",
]
