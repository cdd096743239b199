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

from convexbn._types import Bool, Float, Index, is_over
from convexbn.data.blocks import BlockSize

#: Distance up to which a unit direction lies on the hyperplane of a unit normal: ten times its rounding.
_ON = 1e-14
#: Size, relative to the largest row, up to which a row is zero.
_ZERO = 1e-14
#: Products of directions and normals that are held at once.
_BLOCK_ENTRIES = 1 << 20


class Cells(NamedTuple):
    """Cells of an arrangement.

    ``patterns`` (P, n) holds ``1[A s >= 0]`` of every cell once; its second half are the complements of the first.
    ``directions`` (P, q) holds a unit vector inside every cell.
    """

    patterns: Bool
    directions: Float


def count_bound(n: int, q: int) -> int:
    """Number of cells of ``n`` hyperplanes through the origin of R^q in general position, the largest possible.

    Examples
    --------
    >>> count_bound(60, 3)
    3542
    """
    return 2 * sum(math.comb(n - 1, k) for k in range(min(q, n)))


def enumerate_patterns(
    rows: Float, *, max_bytes: int = 1 << 30, tolerance: float = 1e-12, deadline: float | None = None
) -> Cells:
    """Enumerate the patterns ``1[A s >= 0]`` of all directions ``s`` that lie on no hyperplane.

    Directions on hyperplanes need no pattern of their own: such an ``s`` is in the closure of a cell, and the gates of
    that cell give the same ``(A s)_+ = D A s``. A row of zeros is open in every pattern.

    ``O(n^q)`` operations: at most ``C(n, q - 2)`` sorts of lines in a plane, and ``O(n q)`` per cell and dimension.
    Memory is about three times the answer.

    Parameters
    ----------
    rows : ndarray (n, q)
        The data ``A``; only the directions of its rows and its column space matter.
    max_bytes : int, default=2**30
        Raise ``MemoryError`` early if so many different hyperplanes could have a larger answer.
    tolerance : float, default=1e-12
        Angle between normals up to which hyperplanes are one, with the columns of ``A`` made orthonormal. On a flat
        where normals are nearly dependent it grows with their rounding.
    deadline : float, optional
        ``now()`` after which a ``TimeoutError`` ends the enumeration.

    Examples
    --------
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
    left, values, right = np.linalg.svd(units, full_matrices=False)
    r = int(np.count_nonzero(values > tolerance * values[0]))
    normals, back = _unit(left[:, :r]), right[:r].T / values[:r]  # coordinates of the column space, and the way back
    _check_budget(n, q, normals, max_bytes)
    leader, sign = _coincident(normals, np.full(len(normals), 0.5 * tolerance))
    first = np.flatnonzero(leader == np.arange(len(leader)))
    points = _cells(normals[first], np.full(len(first), 0.5 * tolerance), deadline)
    patterns = np.ones((2 * len(points), n), dtype=bool)
    half, opposite = np.split(patterns, 2)
    for part in BlockSize(n, _BLOCK_ENTRIES).slices(len(points)):
        opened = points[part] @ normals[first].T > 0
        half[part, live] = opened[:, np.searchsorted(first, leader)] ^ (sign < 0)
    opposite[:, live] = ~half[:, live]
    directions = _unit(points @ back.T)
    return Cells(patterns, np.vstack([directions, -directions]))


class MaxRegions(NamedTuple):
    """Regions on which ``(max over k of a_ik's)_+`` is linear for every group ``i`` of rows.

    ``members`` (P, n) holds the largest row of every group, or -1 if no row is positive. ``directions`` (P, q) holds a
    unit vector inside every region.
    """

    members: Index
    directions: Float

    def walls(self, groups: Float) -> tuple[Index, Float]:
        """Inequalities ``b's >= 0`` that bound the regions: the region of each (m,), and ``b`` (m, q)."""
        found: list[tuple[int, Float]] = []
        for region, members in enumerate(self.members):
            for group, member in zip(groups, members, strict=True):
                inward = -group if member < 0 else np.vstack([group[member] - group, group[member]])
                found += [(region, row) for row in inward if row.any()]
        return np.array([region for region, _ in found]), np.array([row for _, row in found])


def enumerate_max_regions(groups: Float, *, max_bytes: int = 1 << 30) -> MaxRegions:
    """Enumerate the regions of max pooling over groups of rows (n, G, q).

    Rows and differences of rows within a group are the normals of their hyperplanes. ``max_bytes`` is that of
    ``enumerate_patterns``.

    Examples
    --------
    Of two rows on a line, the second is the larger on one side, and both are negative on the other:

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
    """Whether each row bounds each cell, one row a hyperplane, for all patterns (P, n) of an arrangement: (P, n).

    Crossing a facet leads to another cell. The cone ``{s : (2 D - I) A s >= 0}`` of a cell needs the inequalities of
    these rows only.
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
    """Keys of rows of signs, equal if and only if the rows are: (P, n) -> (P,)."""
    packed = np.packbits(signs, axis=1)
    return np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()


def _check_budget(n: int, q: int, normals: Float, max_bytes: int) -> None:
    """Raise MemoryError if the answer may be too large; hyperplanes are counted by their rounded normals."""
    generic = np.cos(np.arange(1.0, normals.shape[1] + 1) ** 2)  # on no hyperplane of ordinary data
    oriented = np.round(normals * np.where(normals @ generic < 0, -1.0, 1.0)[:, None], 9)
    hyperplanes = len(np.unique(oriented + 0.0, axis=0))
    count = count_bound(hyperplanes, normals.shape[1])
    size = count * (n + 8 * q)
    if size > max_bytes:
        raise MemoryError(
            f"{hyperplanes} hyperplanes in {normals.shape[1]} dimensions may have {Decimal(count):.3g} activation "
            f"patterns, {Decimal(size):.3g} bytes, more than max_bytes={max_bytes}: find the patterns that matter "
            "by pricing, keep fewer directions of the data (rank=), or raise max_bytes."
        )


def _unit(vectors: Float) -> Float:
    scaled = vectors / np.abs(vectors).max(axis=1, keepdims=True)
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)


def _coincident(normals: Float, doubt: Float) -> tuple[Index, Float]:
    """Index of the first unit normal of the same hyperplane (m,), and its sign relative to it, 1 or -1 (m,)."""
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


def _cells(normals: Float, doubt: Float, deadline: float | None) -> Float:
    """Unit vectors inside one of each pair of opposite cells, (P / 2, q); ``doubt`` (m,) bounds the normals' errors."""
    q = normals.shape[1]
    if q == 1:
        return np.ones((1, 1))
    if q == 2:  # the middle of every sector between neighbouring lines
        angles = np.sort(np.mod(np.arctan2(normals[:, 1], normals[:, 0]), np.pi))
        middles = angles + 0.5 * (np.pi + np.diff(angles, append=angles[0] + np.pi))
        return np.column_stack([np.cos(middles), np.sin(middles)])
    found = [normals[:1]]
    for i in range(1, len(normals)):
        if is_over(deadline):
            raise TimeoutError("the time was over before all cells were found.")
        # all columns but the first of the normal's Householder reflector: a basis of its hyperplane
        mirror = normals[i] + np.where(normals[i, 0] < 0, -1.0, 1.0) * np.eye(1, q)[0]
        basis = (np.eye(q) - np.outer(mirror, mirror) * (2 / (mirror @ mirror)))[:, 1:]
        traces = normals[:i] @ basis
        lengths = np.linalg.norm(traces, axis=1)
        traces, uncertain = traces / lengths[:, None], (doubt[:i] + doubt[i]) / lengths
        leader, _ = _coincident(traces, uncertain)
        first = np.flatnonzero(leader == np.arange(i))
        cut = _cells(traces[first], uncertain[first], deadline) @ basis.T
        found.append(_both_sides(cut, normals[:i], normals[i]))
    return _one_a_cell(np.vstack(found), normals)


def _both_sides(points: Float, normals: Float, normal: Float) -> Float:
    """Unit vectors next to points of a hyperplane, on both of its sides, that cross no other hyperplane."""
    with np.errstate(divide="ignore"):
        reach = np.abs(points @ normals.T) / np.abs(normals @ normal)
    step = np.minimum(1.0, 0.5 * reach.min(axis=1))[:, None] * normal
    return _unit(np.vstack([points + step, points - step]))


def _one_a_cell(points: Float, normals: Float) -> Float:
    """Most interior of the points in each pair of opposite cells, without points on a hyperplane.

    A hyperplane through a point cuts its cell, so both sides have points of their own.
    """
    margins, signs = np.empty(len(points)), np.empty((len(points), len(normals)), dtype=bool)
    for part in BlockSize(len(normals), _BLOCK_ENTRIES).slices(len(points)):
        response = points[part] @ normals.T
        margins[part] = np.abs(response).min(axis=1)
        signs[part] = (response > 0) ^ (response[:, :1] > 0)
    order = np.argsort(-margins, kind="stable")
    order = order[margins[order] > _ON]
    return points[order[np.sort(np.unique(row_keys(signs[order]), return_index=True)[1])]]
