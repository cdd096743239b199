"""Upper bounds of ``max over ||u|| <= 1 of ||V'(A u)_+||``, on which a certificate over all patterns rests.

``A`` (n, q) has orthonormal columns, or orthogonal ones of at most unit norm (a spectral filter). For weighted data
rows are multiplied by ``sqrt(w)`` and ``V`` is divided by it. A bound is never below the maximum, rounding included;
``local_maxima`` gives lower estimates. At a ``deadline``, a ``now()``, the best so far is returned.

===================== ============== ==================================================================
``orthant``           K outputs      ignores A; exact at rank n - 1
``EveryCell``         one output     exact, where ``few_cells`` of the rows exist
``relaxation``        one output     ``O(n q^2 + q^3)`` a step
``lifted``            K outputs      tighter; ``O((n + q)^3)`` a step
``branch_and_bound``  K outputs      to any tolerance, ``q <= 8``; also returns a violator
``dual_point``        one output     a dual point chosen for ``relaxation``, squared loss
``lifted_dual_point`` one output     a dual point chosen for ``lifted``, squared loss
===================== ============== ==================================================================
"""

from convexbn.bounds.bound import Bound
from convexbn.bounds.branch_and_bound import MAX_RANK, Enclosure, branch_and_bound
from convexbn.bounds.dual_point import DualPoint, dual_point
from convexbn.bounds.enumeration import EveryCell, few_cells
from convexbn.bounds.lifted import lifted
from convexbn.bounds.lifted_dual_point import lifted_dual_point
from convexbn.bounds.local_search import local_maxima
from convexbn.bounds.orthant import orthant
from convexbn.bounds.relaxation import Relaxed, relaxation

__all__ = [
    "MAX_RANK", "Bound", "DualPoint", "Enclosure", "EveryCell", "Relaxed", "branch_and_bound", "dual_point",
    "few_cells", "lifted", "lifted_dual_point", "local_maxima", "orthant", "relaxation",
]  # fmt: skip
