"""Quadratic programs over a box and the second derivatives of the losses: what Newton's methods stand on."""

import numpy as np
import pytest
import scipy.optimize

from convexbn.program.losses import CrossEntropyLoss, LogisticLoss, SquaredLoss
from convexbn.program.output_bias import WithOutputBias
from convexbn.solvers import box_qp
from convexbn.solvers.box_qp import minimise_nonnegative, minimise_over_box


def residual(Q, b, upper, x):
    """Distance of ``x`` to its projected gradient step, relative to the size of the gradient at 0."""
    return np.abs(np.clip(x - (Q @ x - b), 0, upper) - x).max() / np.abs(b).max()


def quadratic(p, rank, seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((p, rank)) / np.sqrt(p)
    return factor @ factor.T, rng.standard_normal(p), rng.uniform(0.1, 2, p)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("p", "rank"), [(1, 1), (40, 60), (40, 40), (40, 10)])
@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_the_minimiser_is_stationary_from_any_start(p, rank, seed, start):
    Q, b, upper = quadratic(p, rank, seed)
    x = minimise_over_box(Q, b, upper, start * upper)
    assert x.min() >= 0 and (upper - x).min() >= 0
    assert residual(Q, b, upper, x) < 1e-6


@pytest.mark.parametrize("rank", [10, 60])
def test_the_interior_point_alone_gets_there(rank, monkeypatch):
    monkeypatch.setattr(box_qp, "_active_set", lambda *_: None)
    Q, b, upper = quadratic(40, rank, 0)
    assert residual(Q, b, upper, minimise_over_box(Q, b, upper, 0 * upper)) < 1e-6


def test_a_solution_as_the_start_needs_no_interior_point(monkeypatch):
    Q, b, upper = quadratic(40, 60, 0)
    x = minimise_over_box(Q, b, upper, 0 * upper)
    monkeypatch.setattr(box_qp, "_interior_point", None)
    np.testing.assert_allclose(minimise_over_box(Q, b, upper, x), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("p", "rank"), [(1, 1), (40, 60), (40, 40), (40, 10)])
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_nonnegative_least_squares_are_those_of_scipy(p, rank, seed, start):
    rng = np.random.default_rng(seed)
    A, y = rng.standard_normal((rank, p)), rng.standard_normal(rank)
    x = minimise_nonnegative(A.T @ A, A.T @ y, start * rng.random(p))
    assert x.min() >= 0
    assert np.linalg.norm(A @ x - y) <= scipy.optimize.nnls(A, y)[1] + 1e-7 * np.linalg.norm(y)


def test_what_is_not_finite_is_an_error():
    with pytest.raises(np.linalg.LinAlgError, match="not positive semidefinite"):
        minimise_nonnegative(np.full((2, 2), np.nan), np.ones(2), np.ones(2))


@pytest.mark.parametrize("same", [1.0, 1.0 + 1e-15, 1.0 - 1e-12])
def test_equal_columns_are_no_obstacle(same):
    rng = np.random.default_rng(0)
    A, y = rng.standard_normal((30, 8)), rng.standard_normal(30)
    A = np.hstack([A, same * A, -A])
    x = minimise_nonnegative(A.T @ A, A.T @ y, np.ones(24))
    assert x.min() >= 0 and x.max() < 1e6
    assert np.linalg.norm(A @ x - y) <= scipy.optimize.nnls(A, y)[1] + 1e-7 * np.linalg.norm(y)


def test_the_interior_point_alone_reaches_nonnegative_least_squares(monkeypatch):
    monkeypatch.setattr(box_qp, "_active_set", lambda *_: None)
    test_nonnegative_least_squares_are_those_of_scipy(40, 10, 0, 1.0)


@pytest.mark.parametrize("kind", ["squared", "logistic", "soft logistic", "cross_entropy", "soft cross_entropy"])
def test_half_hessians_are_the_second_derivative(kind):
    rng = np.random.default_rng(0)
    weights, outputs = rng.uniform(0.5, 2, 6), rng.standard_normal((6, 1 if "logistic" in kind else 3))
    if kind == "squared":
        loss = SquaredLoss(rng.standard_normal((6, 3)), weights)
    elif "logistic" in kind:
        loss = LogisticLoss(rng.choice([-1.0, 1.0], (6, 1)) * (0.6 if "soft" in kind else 1), weights)
    else:
        soft = rng.dirichlet(np.ones(3), 6)
        loss = CrossEntropyLoss(soft if "soft" in kind else np.eye(3)[rng.integers(0, 3, 6)], weights)
    half = loss.hessian_root(outputs)
    for k in range(outputs.shape[1]):
        step = 1e-5 * np.eye(outputs.shape[1])[k]
        slope = (loss.negative_gradient(outputs - step) - loss.negative_gradient(outputs + step)) / 2e-5
        np.testing.assert_allclose((half @ half.transpose(0, 2, 1))[:, k], slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("kind", [SquaredLoss, CrossEntropyLoss])
def test_the_best_output_bias_is_in_the_second_derivative(kind, decay):
    """In the norms of fixed functions, against differences of the gradient."""
    rng = np.random.default_rng(0)
    loss = WithOutputBias.with_decay(kind(np.eye(3)[rng.integers(0, 3, 30)], rng.uniform(0.5, 2, 30)), decay)
    functions, norms = rng.standard_normal((30, 3, 4)), rng.standard_normal(4)

    def gradient(norms):
        return -np.einsum("nkj,nk->j", functions, loss.negative_gradient(functions @ norms))

    def derivative(half, part):
        return half.transpose(0, 2, 1) @ functions[part]

    found = loss.gauss_newton(functions @ norms, derivative, 4)
    for j, step in enumerate(1e-5 * np.eye(4)):
        slope = (gradient(norms + step) - gradient(norms - step)) / 2e-5
        np.testing.assert_allclose(found[j], slope, rtol=0, atol=1e-7)
