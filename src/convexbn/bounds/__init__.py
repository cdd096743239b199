"""Upper bounds of ``max over ||u|| <= 1 of ||V'(A u)_+||``: what a certificate over all patterns rests on.

Every bound is a number that is never below the true maximum, rounding included; ``local_search`` gives a lower
estimate. ``A`` (n, q) has orthonormal columns (weighted data: rows times ``sqrt(w)``, ``V / sqrt(w)``).
"""

from convexbn.bounds.local_search import local_maxima, local_search
from convexbn.bounds.orthant import group_directions, orthant

__all__ = ["group_directions", "local_maxima", "local_search", "orthant"]
