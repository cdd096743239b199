"""Losses: Fenchel-Young, gradients, duals in 50 digits, merging, and outputs of every size."""

import warnings

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convexbn.program.losses import (
    LOSSES,
    CrossEntropyLoss,
    HuberLoss,
    LogisticLoss,
    SquaredHingeLoss,
    SquaredLoss,
    softmax,
)
from instances import (
    EPS,
    LOSS_NAMES,
    THRESHOLD,
    digits,
    dual_in_digits,
    gradient_in_digits,
    residual,
    targets_for,
    value_in_digits,
)

SEEDS = st.integers(0, 10**6)
NAMES = st.sampled_from(LOSS_NAMES)
PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.fixture(autouse=True)
def fifty_digits():
    with mp.workdps(50):
        yield


def draw(name, seed, n=7, K=3, soft=False, **options):
    rng = np.random.default_rng(seed)
    loss = LOSSES[name](targets_for(name, n, K, rng, soft), rng.uniform(0.1, 4, n), **options)
    return loss, rng


def confident(loss, size):
    """Outputs that fit the targets with margins near ``size``: gradients near ``exp(-size)``."""
    rng = np.random.default_rng(1)
    return size * loss.targets * (1 + 0.1 * rng.uniform(size=(len(loss.weights), 1)))


def relative(found, exact):
    return float(abs((mp.mpf(float(found)) - exact) / exact))


# --- Fenchel-Young ---


@PROPERTY
@given(NAMES, SEEDS, st.floats(-3, 1), st.booleans())
def test_fenchel_young_equality(name, seed, magnitude, soft):
    loss, rng = draw(name, seed, soft=soft)
    outputs = 10.0**magnitude * rng.standard_normal((7, 3))
    dual = loss.negative_gradient(outputs)
    value = loss.value(outputs)
    terms = abs(value) + np.abs(dual * outputs).sum() + np.abs(dual * loss.targets).sum()
    assert abs(value - (loss.dual_value(dual) - np.vdot(dual, outputs))) <= 1e-13 * terms


@PROPERTY
@given(NAMES, SEEDS, st.floats(-2, 2), st.booleans())
def test_fenchel_young_inequality(name, seed, magnitude, soft):
    """``L(F) >= D(V) - <V, F>`` for every dual point, whatever outputs it belongs to."""
    loss, rng = draw(name, seed, soft=soft)
    here, there = 10.0**magnitude * rng.standard_normal((2, 7, 3))
    dual = rng.uniform(0, 1) * loss.negative_gradient(there)
    value, bound = loss.value(here), loss.dual_value(dual) - np.vdot(dual, here)
    assert np.isfinite(bound)
    assert bound <= value + THRESHOLD * EPS * (abs(value) + np.abs(dual * here).sum() + np.abs(dual).sum())


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_dual_value_is_concave_along_the_ray_and_zero_is_feasible(name):
    loss, rng = draw(name, 0)
    dual = loss.negative_gradient(rng.standard_normal((7, 3)))
    along = np.array([loss.dual_value(t * dual) for t in np.linspace(0, 1, 21)])
    assert np.all(np.diff(along, 2) <= THRESHOLD * EPS * np.abs(along).max())
    assert loss.dual_value(0 * dual) == pytest.approx(0, abs=1e-13)


# --- gradients and curvature ---


@PROPERTY
@given(NAMES, SEEDS, st.booleans())
def test_gradient_against_central_differences(name, seed, soft):
    loss, rng = draw(name, seed, soft=soft)
    outputs, direction = rng.standard_normal((2, 7, 3))
    step = EPS ** (1 / 3)
    ahead, behind = loss.value(outputs + step * direction), loss.value(outputs - step * direction)
    slope = -np.vdot(loss.negative_gradient(outputs), direction)
    third = loss.weights.max() * np.abs(direction).sum() ** 3  # bounds the third derivative of every loss
    rounding = THRESHOLD * EPS * abs(loss.value(outputs)) / step
    assert abs((ahead - behind) / (2 * step) - slope) <= step**2 * third / 6 + rounding


@PROPERTY
@given(NAMES, SEEDS, st.floats(-2, 1))
def test_curvature_bounds_the_second_derivative(name, seed, magnitude):
    loss, rng = draw(name, seed)
    outputs, direction = 10.0**magnitude * rng.standard_normal((2, 7, 3))
    change = np.vdot(loss.negative_gradient(outputs) - loss.negative_gradient(outputs + direction), direction)
    largest = loss.curvature * loss.weights @ np.square(direction).sum(axis=1)
    assert -THRESHOLD * EPS * largest <= change <= largest * (1 + THRESHOLD * EPS)


@pytest.mark.parametrize("name", ["squared", "huber", "squared_hinge", "logistic"])
def test_curvature_is_attained(name):
    """A bound twice as large would halve the steps of the proximal solver."""
    loss = LOSSES[name](np.zeros((1, 1)), np.ones(1))
    change = loss.negative_gradient(np.array([[-1e-4]])) - loss.negative_gradient(np.array([[1e-4]]))
    assert change[0, 0] / 2e-4 == pytest.approx(loss.curvature, rel=1e-7)


# --- against 50 digits ---


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0, 5.0])
def test_value_and_gradient_in_fifty_digits(name, soft, size):
    loss, rng = draw(name, 3, soft=soft)
    outputs = size * rng.standard_normal((7, 3))
    assert relative(loss.value(outputs), value_in_digits(loss, outputs)) <= THRESHOLD * EPS
    exact = np.array(gradient_in_digits(loss, outputs))
    error = np.array((digits(loss.negative_gradient(outputs)) - exact) / loss.weights[:, None], dtype=float)
    assert np.abs(error).max() <= THRESHOLD * EPS * max(1.0, size)


@pytest.mark.parametrize("name", ["logistic", "cross_entropy"])
@pytest.mark.parametrize("size", [10.0, 20.0, 30.0, 40.0, 300.0])
def test_confident_outputs_keep_their_relative_accuracy(name, size):
    """Small weight decays end here: the loss is tiny, and so is every dual variable."""
    loss, _ = draw(name, 3)
    outputs = confident(loss, size)
    with mp.workdps(400):
        value, exact = value_in_digits(loss, outputs), np.array(gradient_in_digits(loss, outputs))
        errors = np.array((digits(loss.negative_gradient(outputs)) - exact) / exact, dtype=float)
    assert relative(loss.value(outputs), value) <= THRESHOLD * size * EPS
    assert np.abs(errors).max() <= THRESHOLD * size * EPS


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [0.1, 3.0, 10.0, 20.0, 30.0])
def test_dual_value_is_never_above_the_exact_one(name, soft, size):
    """It is a lower bound of the training objective: rounding may only lower it, and only by rounding."""
    loss, _ = draw(name, 5, soft=soft)
    gradient = loss.negative_gradient(confident(loss, size))
    for multiple in (1.0, 0.9999, 0.7, 1e-3):
        dual = multiple * gradient
        found, exact = mp.mpf(loss.dual_value(dual)), dual_in_digits(loss, dual)
        terms = np.abs(dual * loss.targets).sum() + np.sum(dual**2 / loss.weights[:, None])
        assert found <= exact
        size = 0 if name in ("squared", "huber") else 3 * loss.weights.sum()
        size += 0 if name in ("logistic", "cross_entropy") else terms
        assert found >= exact - 4 * THRESHOLD * EPS * size


@pytest.mark.parametrize("name", ["logistic", "cross_entropy"])
@pytest.mark.parametrize("size", [10.0, 20.0, 30.0, 40.0])
def test_dual_value_of_confident_outputs_keeps_its_relative_accuracy(name, size):
    """Hard labels: ``1 - p`` is the dual variable itself, and every entropy is positive, so no digits need be lost."""
    loss, _ = draw(name, 3)
    gradient = loss.negative_gradient(confident(loss, size))
    for multiple in (1.0, 0.9999, 0.7, 1e-3):
        exact = dual_in_digits(loss, multiple * gradient)
        assert relative(loss.dual_value(multiple * gradient), exact) <= 4 * THRESHOLD * EPS


# --- domain ---


@pytest.mark.parametrize("name", ["logistic", "cross_entropy"])
def test_dual_value_outside_the_domain_is_minus_infinity(name):
    loss, rng = draw(name, 0)
    dual = loss.negative_gradient(rng.standard_normal((7, 3)))
    assert np.isfinite(loss.dual_value(dual))
    at_edge = loss.weights[:, None] * loss.targets
    for wrong in (-dual, 1e3 * dual, at_edge * (1 + 1e-9)):
        assert loss.dual_value(wrong) == -np.inf
    if name == "logistic":
        assert -THRESHOLD * EPS * 3 * loss.weights.sum() < loss.dual_value(at_edge) <= 0  # the boundary belongs to it


def test_cross_entropy_dual_rows_must_sum_to_zero():
    loss, rng = draw("cross_entropy", 0)
    dual = loss.negative_gradient(rng.standard_normal((7, 3)))
    dual[2, 1] += 1e-9 * loss.weights[2]
    assert loss.dual_value(dual) == -np.inf


def test_dual_of_the_huber_loss_is_bounded_by_delta():
    loss, rng = draw("huber", 0, delta=0.7)
    far = loss.negative_gradient(loss.targets + np.sign(rng.standard_normal((7, 3))) * 2)
    assert np.array_equal(np.abs(far), np.broadcast_to(0.7 * loss.weights[:, None], (7, 3)))
    assert np.isfinite(loss.dual_value(far)) and loss.dual_value((1 + 1e-9) * far) == -np.inf


def test_dual_of_the_squared_hinge_has_the_signs_of_the_labels():
    loss, rng = draw("squared_hinge", 0)
    dual = loss.targets * rng.uniform(0, 10, (7, 3))
    assert np.isfinite(loss.dual_value(dual))
    dual[2, 1] *= -1e-9
    assert loss.dual_value(dual) == -np.inf


@pytest.mark.parametrize("delta", [1e-3, 0.3, 1e3])
def test_huber_loss_of_other_deltas_in_fifty_digits(delta):
    loss, rng = draw("huber", 3, delta=delta)
    outputs = rng.standard_normal((7, 3))
    dual = 0.7 * loss.negative_gradient(outputs)
    assert relative(loss.value(outputs), value_in_digits(loss, outputs)) <= THRESHOLD * EPS
    assert dual_in_digits(loss, dual) >= loss.dual_value(dual) >= dual_in_digits(loss, dual) * (1 - 1e-12)


def test_soft_labels_of_the_squared_hinge_are_shares_of_rows():
    rng = np.random.default_rng(0)
    outputs = rng.uniform(-3, 3, (50, 1))
    soft = SquaredHingeLoss(np.full((50, 1), 0.2), np.full(50, 5.0))
    both = [SquaredHingeLoss(np.full((50, 1), sign), np.full(50, count)) for sign, count in ((1.0, 3.0), (-1.0, 2.0))]
    assert soft.value(outputs) == pytest.approx(sum(loss.value(outputs) for loss in both), rel=1e-14)
    dual = sum(loss.negative_gradient(outputs) for loss in both)
    assert residual(soft.negative_gradient(outputs) - dual, 50) < THRESHOLD


def test_between_the_margins_the_squared_hinge_is_the_squared_loss():
    loss, rng = draw("squared_hinge", 1)
    squared, outputs = SquaredLoss(loss.targets, loss.weights), rng.uniform(-1, 1, (7, 3))
    assert loss.value(outputs) == pytest.approx(squared.value(outputs), rel=1e-14)
    dual = squared.negative_gradient(outputs)
    assert residual(loss.negative_gradient(outputs) - dual, 7) < THRESHOLD
    assert loss.dual_value(dual) == pytest.approx(squared.dual_value(dual), rel=1e-13)


def test_every_dual_point_is_feasible_for_the_squared_loss():
    loss, rng = draw("squared", 0)
    dual = 1e6 * rng.standard_normal((7, 3))
    expected = np.vdot(dual, loss.targets) - 0.5 * np.sum(dual**2 / loss.weights[:, None])
    assert loss.dual_value(dual) == pytest.approx(expected, rel=1e-12)


# --- weights, soft labels, merging ---


@PROPERTY
@given(NAMES, SEEDS, st.lists(st.integers(1, 4), min_size=5, max_size=5), st.booleans())
def test_weights_are_repetition(name, seed, counts, soft):
    rng = np.random.default_rng(seed)
    targets, outputs = targets_for(name, 5, 3, rng, soft), rng.standard_normal((5, 3))
    weighted = LOSSES[name](targets, np.array(counts, dtype=float))
    repeated = LOSSES[name](np.repeat(targets, counts, axis=0), np.ones(sum(counts)))
    dual = repeated.negative_gradient(np.repeat(outputs, counts, axis=0))
    summed = np.add.reduceat(dual, np.r_[0, np.cumsum(counts)[:-1]])
    assert residual(weighted.value(outputs) - repeated.value(np.repeat(outputs, counts, axis=0)), 20, 20) < THRESHOLD
    assert residual(weighted.negative_gradient(outputs) - summed, 20, 5) < THRESHOLD
    assert residual(weighted.dual_value(summed) - repeated.dual_value(dual), 20, 100) < THRESHOLD


@PROPERTY
@given(
    st.sampled_from([name for name in LOSS_NAMES if LOSSES[name].depends_on_means]),
    SEEDS,
    st.lists(st.integers(0, 3), min_size=9, max_size=9),
    st.booleans(),
)
def test_merged_loss_is_the_same_function_of_one_row_a_group(name, seed, groups, soft):
    loss, rng = draw(name, seed, n=9, soft=soft, constant=0.75)
    groups = np.unique(groups, return_inverse=True)[1]
    merged = loss.merged(groups, groups.max() + 1)
    outputs = rng.standard_normal((groups.max() + 1, 3))
    value = loss.value(outputs[groups])
    assert residual(merged.value(outputs) - value, 9, 10 + abs(value)) < THRESHOLD
    dual = np.zeros_like(outputs)
    np.add.at(dual, groups, loss.negative_gradient(outputs[groups]))
    assert residual(merged.negative_gradient(outputs) - dual, 9, 10 * np.abs(loss.targets).max()) < THRESHOLD
    assert merged.weights.sum() == pytest.approx(loss.weights.sum(), rel=1e-14)
    bound = merged.dual_value(dual) - np.vdot(dual, outputs)
    assert abs(bound - value) <= 1e-13 * (10 + abs(value) + np.abs(dual).sum())


def test_rows_of_the_huber_loss_are_not_merged():
    """Targets 0 and 4 at one output: near 2 the loss is that of their mean, far away it is not."""
    loss = HuberLoss(np.array([[0.0], [4.0]]), np.ones(2))
    mean = HuberLoss(np.array([[2.0]]), np.array([2.0]))
    differences = [loss.value(np.full((2, 1), f)) - mean.value(np.array([[f]])) for f in (2.0, 9.0)]
    assert differences[0] == 3.0 and differences[1] == pytest.approx(0)
    with pytest.raises(TypeError, match="cannot be merged"):
        loss.merged(np.array([0, 0]), 1)


def test_merging_twice_is_merging_once():
    loss, rng = draw("squared", 2, n=8, constant=2.0)
    first, second = np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 0, 1, 1])
    twice, once = loss.merged(first, 4).merged(second, 2), loss.merged(second[first], 2)
    outputs = rng.standard_normal((2, 3))
    assert twice.value(outputs) == pytest.approx(once.value(outputs), rel=1e-13)
    assert twice.constant == pytest.approx(once.constant, rel=1e-13)


def test_constant_of_merging_is_the_scatter_within_groups():
    loss = SquaredLoss(np.array([[1.0], [3.0], [5.0]]), np.array([1.0, 3.0, 2.0]))
    merged = loss.merged(np.array([0, 0, 1]), 2)
    assert merged.targets.tolist() == [[2.5], [5.0]] and merged.weights.tolist() == [4.0, 2.0]
    assert merged.constant == 0.5 * (1.5**2 + 3 * 0.5**2)
    assert merged.value(merged.targets) == merged.constant and merged.dual_value(np.zeros((2, 1))) == merged.constant


def test_two_classes_of_cross_entropy_are_the_logistic_loss():
    rng = np.random.default_rng(0)
    signs, weights, f = np.sign(rng.standard_normal((9, 1))), rng.uniform(0.2, 2, 9), rng.standard_normal((9, 1))
    logistic = LogisticLoss(signs, weights)
    both = CrossEntropyLoss(np.hstack([1 + signs, 1 - signs]) / 2, weights)
    outputs = np.hstack([f, np.zeros((9, 1))])
    assert both.value(outputs) == pytest.approx(logistic.value(f), rel=1e-14)
    assert residual(both.negative_gradient(outputs)[:, :1] - logistic.negative_gradient(f), 9, 2) < THRESHOLD
    dual = logistic.negative_gradient(f)
    assert both.dual_value(np.hstack([dual, -dual])) == pytest.approx(logistic.dual_value(dual), rel=1e-13)


# --- extreme outputs ---


@pytest.mark.parametrize("name", ["logistic", "cross_entropy"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [1e3, 1e8, 1e150, 1e300])
def test_extreme_outputs_without_warnings(name, soft, size):
    loss, rng = draw(name, 0, soft=soft)
    outputs = size * rng.standard_normal((7, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, dual = loss.value(outputs), loss.negative_gradient(outputs)
        bound = loss.dual_value(dual)
    exact = value_in_digits(loss, outputs)
    assert relative(value, exact) <= THRESHOLD * EPS
    assert np.isfinite(dual).all() and np.all(np.abs(dual) <= loss.weights[:, None] * (1 + 4 * EPS))
    assert np.isfinite(bound)


@pytest.mark.parametrize("size", [1e3, 1e8, 1e150, 1e300])
@pytest.mark.parametrize("name", ["squared_hinge", "logistic", "cross_entropy"])
def test_extreme_outputs_on_the_right_side_cost_nothing(name, size):
    loss, _ = draw(name, 0)
    assert loss.value(size * loss.targets) == 0
    assert not loss.negative_gradient(size * loss.targets).any()


@pytest.mark.parametrize("name", ["squared", "huber", "squared_hinge"])
def test_polynomial_losses_of_extreme_outputs(name):
    loss, rng = draw(name, 0)
    for size in (1e3, 1e8, 1e150):
        outputs = size * rng.standard_normal((7, 3))
        assert relative(loss.value(outputs), value_in_digits(loss, outputs)) <= THRESHOLD * EPS


def test_softmax_of_extreme_outputs():
    outputs = np.array([[1e300, 0.0, -1e300], [-1e300, -1e300, -1e300], [700.0, 710.0, 0.0], [1e-300, 0.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = softmax(outputs)
    assert p[0].tolist() == [1.0, 0.0, 0.0] and residual(p[[1, 3]] - 1 / 3, 3) < THRESHOLD
    assert residual(p.sum(axis=1) - 1, 3) < THRESHOLD and p[2, 2] > 0
