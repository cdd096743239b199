"""Every activation pattern of a data matrix: the cells of a central hyperplane arrangement.

The hyperplanes ``{s : a_i's = 0}`` of the rows of ``A`` (n, q) cut R^q into open cones, the cells, on each of which
``1[A s >= 0]`` is constant. In general position there are ``2 sum_{k < q} C(n - 1, k)`` of them (Cover 1965); rows on
one hyperplane, and hyperplanes that share a flat, make fewer.

Hyperplanes are added one at a time. The cells that a hyperplane cuts are the cells of the arrangement that the others
leave on it, of one dimension less (deletion and restriction, Zaslavsky 1975), down to lines in a plane.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from convexbn._types import Bool, Float, Index
from convexbn.data.blocks import BlockSize

#: A unit direction nearer to a unit normal's hyperplane than this lies on it: rounding is a tenth of it.
_ON = 1e-14

#: Rows below this multiple of the largest are zero.
_ZERO = 1e-14

_BLOCK_ENTRIES = 1 << 20


class Cells(NamedTuple):
    """Cells of an arrangement.

    Attributes
    ----------
    patterns : ndarray (P, n) of bool
        ``1[A s >= 0]`` of every cell, each once; the second half are the complements of the first.
    directions : ndarray (P, q)
        A unit vector inside of every cell.
    """

    patterns: Bool
    directions: Float


def count_bound(n: int, q: int) -> int:
    """Largest number of cells of ``n`` hyperplanes through the origin of R^q, met in general position.

    Examples
    --------
    >>> count_bound(60, 3)
    3542
    """
    return 2 * sum(math.comb(n - 1, k) for k in range(min(q, n)))


def enumerate_patterns(rows: Float, *, max_bytes: int = 1 << 30, tolerance: float = 1e-12) -> Cells:
    """Every pattern ``1[A s >= 0]`` of directions ``s`` that lie on no hyperplane.

    The directions on hyperplanes need no pattern of their own: such an ``s`` is in the closure of a cell, and the
    gates of that cell give the same ``(A s)_+ = D A s``. A row of zeros is open in every pattern.

    Parameters
    ----------
    rows : ndarray (n, q)
        The data ``A``; only the directions of its rows and its column space matter.
    max_bytes : int, default=2**30
        Largest size of the answer, for the number of different hyperplanes there are.
    tolerance : float, default=1e-12
        Angle between normals up to which hyperplanes are one, with the columns of ``A`` made orthonormal. On a flat
        where normals are nearly dependent it grows as their rounding does.

    Returns
    -------
    Cells

    Raises
    ------
    MemoryError
        When the answer could be larger than ``max_bytes``, before anything of its size is made.

    Notes
    -----
    ``O(n^q)`` operations: at most ``C(n, q - 2)`` sorts of lines in a plane, and ``O(n q)`` a cell and dimension.
    About three times the answer is held on the way.

    Examples
    --------
    >>> import numpy as np
    >>> enumerate_patterns(np.array([[1.0, 1.0], [0.0, 1.0], [-1.0, 1.0]])).patterns.astype(int)
    array([[0, 1, 1],
           [1, 1, 1],
           [1, 1, 0],
           [1, 0, 0],
           [0, 0, 0],
           [0, 0, 1]])
    """
    n, q = rows.shape
    peak = np.abs(rows).max(initial=0.0)
    live = np.flatnonzero(np.abs(rows).max(axis=1, initial=0.0) > _ZERO * peak)
    if len(live) == 0:
        return Cells(np.ones((1, n), dtype=bool), np.eye(1, q))
    units = _unit(rows[live])
    normals, back = _orthonormal_columns(units, tolerance)
    _check_budget(n, q, normals, max_bytes)
    leader, sign = _coincident(normals, np.full(len(normals), 0.5 * tolerance))
    first = np.flatnonzero(leader == np.arange(len(leader)))
    points = _cells(normals[first], np.full(len(first), 0.5 * tolerance))
    patterns = np.ones((2 * len(points), n), dtype=bool)
    half, opposite = np.split(patterns, 2)
    for part in BlockSize(n, _BLOCK_ENTRIES).slices(len(points)):
        opened = points[part] @ normals[first].T > 0
        half[part, live] = opened[:, np.searchsorted(first, leader)] ^ (sign < 0)
    opposite[:, live] = ~half[:, live]
    directions = _unit(points @ back.T)
    return Cells(patterns, np.vstack([directions, -directions]))


class MaxRegions(NamedTuple):
    """Regions of ``(max over k of a_ik's)_+`` for groups of rows: on each it is linear in every group.

    Attributes
    ----------
    members : ndarray (P, n) of int
        The largest row of every group, -1 where none is positive.
    directions : ndarray (P, q)
        A unit vector inside of every region.
    """

    members: Index
    directions: Float

    def walls(self, groups: Float) -> tuple[Index, Float]:
        """Inequalities ``b's >= 0`` of the regions: the region of each, and ``b`` (m, q)."""
        found: list[tuple[int, Float]] = []
        for region, members in enumerate(self.members):
            for group, member in zip(groups, members, strict=True):
                inward = -group if member < 0 else np.vstack([group[member] - group, group[member]])
                found += [(region, row) for row in inward if row.any()]
        return np.array([region for region, _ in found]), np.array([row for _, row in found])


def enumerate_max_regions(groups: Float, *, max_bytes: int = 1 << 30) -> MaxRegions:
    """Every region of max pooling: of the hyperplanes of the rows and of their differences within a group.

    Parameters
    ----------
    groups : ndarray (n, G, q)
    max_bytes : int
        As in ``enumerate_patterns``.

    Examples
    --------
    Of two rows on a line the larger one changes once, and is negative on one side:

    >>> enumerate_max_regions(np.array([[[1.0], [2.0]]])).members.ravel()
    array([-1,  1])
    """
    q = groups.shape[2]
    first, second = np.triu_indices(groups.shape[1], 1)
    differences = (groups[:, first] - groups[:, second]).reshape(-1, q)
    cells = enumerate_patterns(np.vstack([groups.reshape(-1, q), differences]), max_bytes=max_bytes)
    response = np.tensordot(cells.directions, groups, (1, 2))
    members = np.where(response.max(axis=2) > 0, response.argmax(axis=2), -1)
    members, index = np.unique(members, axis=0, return_index=True)
    return MaxRegions(members, cells.directions[index])


def facets(patterns: Bool) -> Bool:
    """Which rows bound which cells, one row a hyperplane: crossing such a facet leads to another of the cells.

    The cone ``{s : (2 D - I) A s >= 0}`` of a cell needs the inequalities of these rows only.

    Parameters
    ----------
    patterns : ndarray (P, n) of bool
        All patterns of an arrangement.

    Returns
    -------
    ndarray (P, n) of bool

    Examples
    --------
    >>> import numpy as np
    >>> facets(enumerate_patterns(np.array([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])).patterns).sum()
    np.int64(8)
    """
    relative = patterns ^ patterns[0]
    _, first = np.unique(relative, axis=1, return_index=True)
    signs = relative[:, first]
    known, walls = row_keys(signs), np.zeros_like(patterns)
    for j, row in enumerate(first):
        across = signs.copy()
        across[:, j] ^= True
        walls[:, row] = np.isin(row_keys(across), known)
    return walls


def row_keys(signs: Bool) -> np.ndarray:
    """One value a row of signs, (P, n) -> (P,): equal where the rows are."""
    packed = np.packbits(signs, axis=1)
    return np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()


def _check_budget(n: int, q: int, normals: Float, max_bytes: int) -> None:
    """Refuse an answer that may be too large; the count of hyperplanes is by rounded normals."""
    oriented = np.round(normals * np.where(normals @ _generic(normals.shape[1]) < 0, -1.0, 1.0)[:, None], 9)
    hyperplanes = len(np.unique(oriented + 0.0, axis=0))
    count = count_bound(hyperplanes, normals.shape[1])
    size = count * (n + 8 * q)
    if size > max_bytes:
        raise MemoryError(
            f"{hyperplanes} hyperplanes in {normals.shape[1]} dimensions may have {Decimal(count):.3g} activation "
            f"patterns, {Decimal(size):.3g} bytes, more than max_bytes={max_bytes}: find the patterns that matter "
            "by pricing, keep fewer directions of the data (rank=), or raise max_bytes."
        )


def _generic(q: int) -> Float:
    """A vector that no hyperplane of ordinary data contains."""
    return np.cos(np.arange(1.0, q + 1) ** 2)


def _unit(vectors: Float) -> Float:
    scaled = vectors / np.abs(vectors).max(axis=1, keepdims=True)
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)


def _orthonormal_columns(units: Float, tolerance: float) -> tuple[Float, Float]:
    """Unit normals (n, r) in coordinates of the column space, ``r`` its rank, and the map (q, r) back to directions."""
    left, values, right = np.linalg.svd(units, full_matrices=False)
    r = int(np.count_nonzero(values > tolerance * values[0]))
    return _unit(left[:, :r]), right[:r].T / values[:r]


def _coincident(normals: Float, doubt: Float) -> tuple[Index, Float]:
    """For every unit normal the first one of the same hyperplane, and whether it points the same way (1 or -1)."""
    leader, sign = np.arange(len(normals)), np.ones(len(normals))
    for part in BlockSize(len(normals), _BLOCK_ENTRIES).slices(len(normals)):
        cosines = normals[part] @ normals.T
        allowed = doubt[part, None] + doubt
        near = 1 - np.abs(cosines) <= 0.5 * allowed**2 + _ON
        i, j = np.nonzero(np.tril(near, part.start - 1))
        ways = np.where(cosines[i, j] < 0, -1.0, 1.0)
        # a cosine cannot tell angles below 1e-8 from 0, a difference can
        gaps = np.linalg.norm(normals[part][i] - ways[:, None] * normals[j], axis=1)
        same = np.flatnonzero(gaps <= allowed[i, j])
        i, place = np.unique(i[same], return_index=True)
        leader[part][i], sign[part][i] = j[same][place], ways[same][place]
    while (leader[leader] < leader).any():
        leader, sign = leader[leader], sign * sign[leader]
    return leader, sign


def _cells(normals: Float, doubt: Float) -> Float:
    """A unit vector inside of every cell, one of each pair of opposite cells: (P / 2, q).

    Parameters
    ----------
    normals : ndarray (m, q)
        Unit normals of different hyperplanes.
    doubt : ndarray (m,)
        Angle by which each may be wrong.
    """
    q = normals.shape[1]
    if q == 1:
        return np.ones((1, 1))
    if q == 2:
        return _between_lines(normals)
    found = [normals[:1]]
    for i in range(1, len(normals)):
        basis = _complement(normals[i])
        traces = normals[:i] @ basis
        lengths = np.linalg.norm(traces, axis=1)
        traces, uncertain = traces / lengths[:, None], (doubt[:i] + doubt[i]) / lengths
        leader, _ = _coincident(traces, uncertain)
        first = np.flatnonzero(leader == np.arange(i))
        cut = _cells(traces[first], uncertain[first]) @ basis.T
        found.append(_both_sides(cut, normals[:i], normals[i]))
    return _one_a_cell(np.vstack(found), normals)


def _between_lines(normals: Float) -> Float:
    """The middle of every sector between neighbouring lines through the origin of a plane."""
    angles = np.sort(np.mod(np.arctan2(normals[:, 1], normals[:, 0]), np.pi))
    middles = angles + 0.5 * (np.pi + np.diff(angles, append=angles[0] + np.pi))
    return np.column_stack([np.cos(middles), np.sin(middles)])


def _complement(normal: Float) -> Float:
    """Orthonormal basis (q, q - 1) of the hyperplane of a unit normal: columns of its Householder reflector."""
    mirror = normal + np.where(normal[0] < 0, -1.0, 1.0) * np.eye(1, len(normal))[0]
    reflector: Float = np.eye(len(normal)) - np.outer(mirror, mirror) * (2 / (mirror @ mirror))
    return reflector[:, 1:]


def _both_sides(points: Float, normals: Float, normal: Float) -> Float:
    """Unit vectors on both sides of a hyperplane that hold the points, across none of the other hyperplanes."""
    with np.errstate(divide="ignore"):
        reach = np.abs(points @ normals.T) / np.abs(normals @ normal)
    step = np.minimum(1.0, 0.5 * reach.min(axis=1))[:, None] * normal
    return _unit(np.vstack([points + step, points - step]))


def _one_a_cell(points: Float, normals: Float) -> Float:
    """The most interior of the points of each cell or its opposite; points on a hyperplane are left out.

    A cell that holds such a point is cut by that hyperplane, so both of its sides have points of their own.
    """
    margins, signs = np.empty(len(points)), np.empty((len(points), len(normals)), dtype=bool)
    for part in BlockSize(len(normals), _BLOCK_ENTRIES).slices(len(points)):
        response = points[part] @ normals.T
        margins[part] = np.abs(response).min(axis=1)
        signs[part] = (response > 0) ^ (response[:, :1] > 0)
    order = np.argsort(-margins, kind="stable")
    order = order[margins[order] > _ON]
    return points[order[np.sort(np.unique(row_keys(signs[order]), return_index=True)[1])]]
