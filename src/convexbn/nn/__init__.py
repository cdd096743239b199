"""The PyTorch door: networks as plain modules, and modules as networks."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("convexbn.nn needs PyTorch: pip install 'convexbn[torch]'.") from error

from convexbn.nn import diagnostics
from convexbn.nn.cross_iteration import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    convert_cross_iteration_batch_norm,
)
from convexbn.nn.gated import GatedModule
from convexbn.nn.judging import certify
from convexbn.nn.layer import ConvexLayer, gated_outputs
from convexbn.nn.module import to_module
from convexbn.nn.normalised_layers import NormalisedLayer, normalised_layers
from convexbn.nn.reading import from_module
from convexbn.nn.reoptimisation import Reoptimisation, reoptimise
from convexbn.nn.tail import Tail, read_tail
from convexbn.nn.weight_rescaling import WeightRescaling

__all__ = [
    "ConvexLayer",
    "CrossIterationBatchNorm1d",
    "CrossIterationBatchNorm2d",
    "GatedModule",
    "NormalisedLayer",
    "Reoptimisation",
    "Tail",
    "WeightRescaling",
    "certify",
    "convert_cross_iteration_batch_norm",
    "diagnostics",
    "from_module",
    "gated_outputs",
    "normalised_layers",
    "read_tail",
    "reoptimise",
    "to_module",
]
