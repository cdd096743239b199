"""A convolution with batch norm and pooling as the dense network on patches.

The convolution of an image with a filter is the product of its patches with a vector, batch norm takes its statistics
over all patches of all images, and pooling is a map of the rows of one image: a network on ``N = n Kp`` rows of which
``Kp`` share a term of the loss (mathematics, section 3).
"""

from convexbn.convolution.geometry import Geometry
from convexbn.convolution.layer import Convolution
from convexbn.convolution.patches import PatchMatrix
from convexbn.convolution.pooling import Pooling

__all__ = ["Convolution", "Geometry", "PatchMatrix", "Pooling"]
