"""Bounds of the ReLU program: never below the maximum, exact where they say so, obedient to their budgets."""

import numpy as np
import pytest

from convexbn import bounds
from convexbn._types import now
from convexbn.bounds import cones
from convexbn.bounds.dual_point import dual_value
from convexbn.bounds.lifted_set import Blocks, LiftedSet
from convexbn.bounds.local_search import hidden_norms, normalise
from convexbn.bounds.node_queue import Frontier, Nodes
from convexbn.bounds.relaxation import bound_at

UPPER = {
    "orthant": lambda V, A: bounds.orthant(V)[0],
    "every_cell": lambda V, A: bounds.EveryCell(A).maxima(V).value,
    "branch_and_bound": lambda V, A: bounds.branch_and_bound(V, A, tol=0.05, max_nodes=2000).value,
    "relaxation": lambda V, A: bounds.relaxation(V, A, steps=30).value,
    "lifted": lambda V, A: bounds.lifted(V, A, iterations=30).value,
}


def instance(n, q, K=1, seed=0):
    """Orthonormal columns with the constant among them, as whitening gives, and a Gaussian dual point."""
    rng = np.random.default_rng(seed)
    columns = np.column_stack([np.ones(n), rng.standard_normal((n, q - 1))])
    return rng.standard_normal((n, K)), np.linalg.qr(columns)[0]


def sphere(points):
    """Fibonacci points."""
    height = 1 - (2 * np.arange(points) + 1) / points
    turn = np.pi * (1 + np.sqrt(5)) * np.arange(points)
    radius = np.sqrt(1 - height**2)
    return np.column_stack([radius * np.cos(turn), radius * np.sin(turn), height])


def dense_maximum(V, A, points=40_000):
    """Largest value on a fine grid of the circle or the sphere."""
    angles = np.linspace(0, 2 * np.pi, points)
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    directions = {1: np.array([[1.0], [-1.0]]), 2: circle, 3: sphere(points)}[A.shape[1]]
    return hidden_norms(directions, V, A).max()


def methods(K):
    return [name for name in UPPER if K == 1 or name not in ("every_cell", "relaxation")]


def possible(name, A):
    """Whether the rank allows a method."""
    return {"branch_and_bound": A.shape[1] <= bounds.MAX_RANK, "every_cell": bounds.few_cells(A)}.get(name, True)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("q", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_never_below_dense_enumeration(q, K, seed):
    V, A = instance(25, q, K, seed)
    truth = dense_maximum(V, A)
    assert bounds.local_maxima(V, A, 100, np.random.default_rng(0))[0][0] >= truth * (1 - 1e-3)
    for name in methods(K):
        assert UPPER[name](V, A) >= truth, name


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("q", [4, 6, 12])
def test_never_below_many_local_searches(q, K):
    for seed in range(3):
        V, A = instance(40, q, K, seed)
        value, u = (found[0] for found in bounds.local_maxima(V, A, 2000, np.random.default_rng(seed)))
        assert hidden_norms(u[None], V, A)[0] == pytest.approx(value, rel=1e-12)
        for name in methods(K):
            if possible(name, A):
                assert UPPER[name](V, A) >= value, name


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("q", [1, 2])
def test_exact_in_the_plane(q, K):
    for seed in range(5):
        V, A = instance(30, q, K, seed)
        found = bounds.branch_and_bound(V, A)
        assert found.value == pytest.approx(found.lower, rel=1e-12)
        assert found.lower == pytest.approx(hidden_norms(found.maximiser[None], V, A)[0], rel=1e-12)
        truth = dense_maximum(V, A, 200_000)
        assert truth <= found.value <= truth * (1 + 1e-4)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("q", [3, 4])
def test_branch_and_bound_closes_to_its_tolerance(q, K):
    V, A = instance(40, q, K, seed=q)
    for tolerance in (1e-1, 1e-3):
        found = bounds.branch_and_bound(V, A, tol=tolerance, max_nodes=50_000)
        assert found.stopped_by == "tolerance"
        assert found.lower <= found.value <= found.lower * (1 + 1.0001 * tolerance)
        assert hidden_norms(found.maximiser[None], V, A)[0] == pytest.approx(found.lower, rel=1e-12)


@pytest.mark.parametrize(("n", "q"), [(40, 2), (40, 3), (20, 4), (12, 6), (8, 8)])
def test_every_cell_is_exact(n, q):
    for seed in range(3):
        V, A = instance(n, q, seed=seed)
        value, u = (found[0] for found in bounds.local_maxima(V, A, 2000, np.random.default_rng(seed)))
        cells = bounds.EveryCell(A)
        assert value <= cells.maxima(V).value <= value * (1 + 1e-7)
        found = cells.maxima(V, target=0.9 * value)
        assert value <= found.value <= value * (1 + 1e-7)
        heights = hidden_norms(found.directions, V, A)
        assert heights.max() == pytest.approx(value, rel=1e-5)
        assert heights.min() > 0.9 * value
        assert found.directions[heights.argmax()] @ u == pytest.approx(1, abs=1e-4)


def test_every_cell_leaves_what_is_below_the_target():
    V, A = instance(40, 3)
    value = bounds.EveryCell(A).maxima(V).value
    found = bounds.EveryCell(A).maxima(V, target=2 * value)
    assert value <= found.value <= 2 * value * (1 + 1e-7)
    assert not len(found.directions)


def test_a_hidden_maximum_is_found():
    """One thin region holds the maximum: branch and bound finds it although it starts elsewhere."""
    _, A = instance(40, 3)
    u = A[0] / np.linalg.norm(A[0])
    active = A @ u > 0
    V = np.where(active, (A @ u), -20.0)[:, None]
    found = bounds.branch_and_bound(V, A, tol=1e-3, start=-u[None])
    truth = max(dense_maximum(V, A), hidden_norms(u[None], V, A)[0])
    assert found.lower >= 0.999 * truth
    assert bounds.EveryCell(A).maxima(V).value >= truth


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("exponent", [-150, -10, 10, 150])
def test_homogeneous_at_any_scale(K, exponent):
    V, A = instance(20, 3, K)
    factor = 10.0**exponent
    for name in methods(K):
        assert UPPER[name](factor * V, A) == pytest.approx(factor * UPPER[name](V, A), rel=2e-2), name
    value = bounds.local_maxima(factor * V, A, 50, np.random.default_rng(0))[0][0]
    assert value == pytest.approx(factor * bounds.local_maxima(V, A, 50, np.random.default_rng(0))[0][0], rel=1e-6)


@pytest.mark.parametrize("K", [1, 2])
def test_zero_duplicates_and_ties(K):
    V, A = instance(20, 3, K)
    for dual in (np.zeros_like(V), np.abs(V), -np.abs(V), np.sign(V), np.where(np.arange(20)[:, None] == 3, V, 0.0)):
        truth = dense_maximum(dual, A, 20_000)
        for name in methods(K):
            assert UPPER[name](dual, A) >= truth, name
    twice = np.vstack([A, A]) / np.sqrt(2)
    for name in methods(K):
        assert UPPER[name](np.vstack([V, V]), twice) >= dense_maximum(np.vstack([V, V]), twice, 20_000), name
    symmetric = np.linalg.qr(np.vstack([A[:10], -A[:10]]))[0]
    for name in methods(K):
        assert UPPER[name](V, symmetric) >= dense_maximum(V, symmetric, 20_000), name


def test_relaxation_is_valid_at_any_multipliers():
    rng = np.random.default_rng(0)
    for seed in range(20):
        V, A = instance(20, 3, seed=seed)
        truth = dense_maximum(V, A, 2000)
        for spread in (0.1, 3.0, 50.0):
            multipliers = spread * rng.standard_normal((20, 2))
            top = max(bound_at(sign * V[:, 0], A, multipliers)[0] for sign in (1, -1))
            assert top >= truth


@pytest.mark.parametrize("K", [1, 2])
def test_lifting_is_valid_at_any_multipliers(K):
    rng = np.random.default_rng(0)
    for seed in range(20):
        V, A = instance(12, 3, K, seed)
        relaxed = LiftedSet(A, homogenised=K == 1)
        n, zero = relaxed.size, Blocks.zeros(relaxed.size)
        objective = relaxed.weights(V[:, 0]) if K == 1 else Blocks(V @ V.T, zero.xx, zero.xx)
        for spread in (0.0, 0.1, 10.0):
            xx, zz, xz = spread * rng.standard_normal((3, n, n))
            top, _ = relaxed.bound(objective, Blocks(xx + xx.T, zz + zz.T, xz))
            signed = np.maximum(np.maximum(sphere(2000) @ A.T, 0) @ V, 0 if K == 1 else -np.inf)
            assert top >= np.linalg.norm(signed, axis=1).max() ** (1 if K == 1 else 2)


@pytest.mark.parametrize("block", ["xx", "zz", "xz"])
def test_lifting_makes_negative_multipliers_harmless(block):
    V, A = instance(12, 3, 2)
    relaxed = LiftedSet(A, homogenised=False)
    objective = Blocks.zeros(12)
    objective.xx[:] = V @ V.T
    harmful = Blocks.zeros(12)
    getattr(harmful, block)[:] = -100.0
    getattr(harmful, block)[np.eye(12, dtype=bool)] = 0.0
    plain, _ = relaxed.bound(objective, Blocks.zeros(12))
    assert relaxed.bound(objective, harmful)[0] == pytest.approx(plain)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("q", [2, 3, 5])
def test_cone_bounds_hold_on_their_cones(q, K):
    """Few rows, many cones of all widths: the bound of each is above every direction sampled in it."""
    rng = np.random.default_rng(q)
    for width in (1.0, 0.3, 0.03):
        V, A = instance(max(2 * q, 6), q, K, seed=K)
        generators = normalise(normalise(rng.standard_normal((300, 1, q))) + width * rng.standard_normal((300, q, q)))
        batch = cones.prepare(generators, A)
        if K == 1:
            found, _ = cones.one_output(batch, np.repeat(V.T, 300, axis=0))
        else:
            found, _, _ = cones.several_outputs(batch, V)
        inside = normalise(rng.dirichlet(np.full(q, 0.5), (300, 200)) @ generators)
        values = np.maximum(inside @ A.T, 0) @ V
        largest = values.max(axis=(1, 2)) if K == 1 else np.linalg.norm(values, axis=2).max(axis=1)
        assert np.all(found >= largest * (1 - 1e-14))
        if width < 0.1:
            assert np.median(found - np.maximum(largest, 0)) < 0.05 * np.abs(values).max()


def test_frontier_keeps_every_node():
    rng = np.random.default_rng(0)
    frontier, inside = Frontier(2), []
    for _ in range(200):
        size = int(rng.integers(0, 20))
        names = rng.random(size)
        frontier.add(
            Nodes(np.zeros((size, 2, 2)), np.zeros(size, np.intp), names, np.zeros((size, 2), np.intp), 2 * names)
        )
        inside = sorted([*inside, *names])
        count = min(int(rng.integers(1, 15)), len(inside))
        taken = frontier.pop(count)
        assert sorted(taken.bounds) == inside[len(inside) - count :]
        assert np.array_equal(taken.shares, 2 * taken.bounds)
        inside = inside[: len(inside) - count]
        assert frontier.largest() == max(inside, default=0.0)


def test_more_work_is_not_worse():
    V, A = instance(40, 4)
    assert bounds.lifted(V, A, iterations=200).value <= bounds.lifted(V, A, iterations=25).value * (1 + 1e-9)
    assert bounds.relaxation(V, A, steps=150).value <= bounds.relaxation(V, A, steps=3).value * (1 + 1e-9)
    wide, narrow = (bounds.branch_and_bound(V, A, tol=0, max_nodes=m).value for m in (500, 4000))
    assert narrow <= wide


@pytest.mark.parametrize("K", [1, 2])
def test_budgets_are_obeyed(K):
    V, A = instance(60, 7, K)
    for nodes in (1, 1000, 3000):
        found = bounds.branch_and_bound(V, A, tol=0, max_nodes=nodes)
        assert found.stopped_by == "nodes" and found.work <= max(nodes, 2 * 2**7) + 512
    past = now()
    assert bounds.branch_and_bound(V, A, tol=0, deadline=past).stopped_by == "deadline"
    assert bounds.lifted(V, A, iterations=10**6, deadline=past).work <= 6
    if K == 1:
        assert bounds.relaxation(V, A, steps=10**6, deadline=past).work < 100


def test_high_rank_is_refused():
    V, A = instance(30, 9)
    with pytest.raises(ValueError, match="relaxation"):
        bounds.branch_and_bound(V, A)


def test_a_target_ends_the_search_early():
    V, A = instance(60, 5)
    exact = bounds.branch_and_bound(V, A, tol=1e-2)
    early = bounds.branch_and_bound(V, A, tol=1e-2, target=1.2 * exact.value)
    assert early.work < exact.work and exact.lower <= early.value <= 1.2 * exact.value * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
@pytest.mark.parametrize("choose", [bounds.dual_point, bounds.lifted_dual_point])
def test_dual_point_is_feasible_and_better_than_scaling(choose, scale):
    V, A = instance(40, 4, seed=1)
    targets = V + A @ np.ones((4, 1))
    beta = 0.3 * bounds.local_maxima(targets, A, 200, np.random.default_rng(0))[0][0]
    scaled = V * min(1.0, beta / bounds.relaxation(V, A).value)
    found = choose(scale * targets, scale * V, A, scale * beta)
    dual = found.dual / scale * min(1.0, beta / (found.value / scale))
    y = targets[:, 0]
    assert dual_value(dual[:, 0], y) >= dual_value(scaled[:, 0], y) * (1 - 1e-9)
    assert found.value >= bounds.local_maxima(found.dual, A, 500, np.random.default_rng(0))[0][0]


def test_lifted_dual_point_approaches_the_optimum():
    """Rank n - 1, two rays: the optimum has a formula, and the relaxation is exact for it."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal((6, 1))
    A = np.linalg.qr(np.column_stack([np.ones(6), rng.standard_normal((6, 5))]))[0]
    norms = np.array([np.linalg.norm(np.maximum(y, 0)), np.linalg.norm(np.minimum(y, 0))])
    beta = 0.3 * norms.min()
    optimum = (beta * norms - beta**2 / 2).sum()
    found = bounds.lifted_dual_point(y, y, A, beta, iterations=400)
    value = dual_value(found.dual[:, 0] * min(1, beta / found.value), y[:, 0])
    assert optimum * (1 - 1e-4) <= value <= optimum * (1 + 1e-12)


def test_local_maxima_are_distinct_sorted_and_reproducible():
    V, A = instance(50, 5, K=2)
    values, directions = bounds.local_maxima(V, A, 200, np.random.default_rng(3))
    again, _ = bounds.local_maxima(V, A, 200, np.random.default_rng(3))
    assert np.array_equal(values, again) and np.all(np.diff(values) <= 0)
    gram = directions @ directions.T - 2 * np.eye(len(directions))
    assert gram.max() < 1 - 1e-5
