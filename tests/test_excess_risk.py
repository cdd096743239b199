"""Excess risks against enumeration, closed formulas, simulation, scikit-learn and the figures of an independent run."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from convexbn.companions.excess_risk import (
    LeastSquares,
    gaussian_ridge_risk,
    one_hot_ridge_risk,
    ridge_rate,
    samples_needed,
    sgd_rate,
    sgd_risk,
    tuned,
)

SMALL = LeastSquares(np.array([0.5, 0.3, 0.2]), np.array([1.0, -2.0, 0.5]), noise=0.7)


def sgd(rows, targets, step, start):
    """One pass by its definition, and the average of ``w_start, ..., w_{N-1}``."""
    w, iterates = np.zeros(rows.shape[1]), []
    for x, y in zip(rows, targets, strict=True):
        iterates.append(w)
        w = w + step * (y - x @ w) * x
    return np.mean(iterates[start:], axis=0)


def ridge(rows, targets, penalty):
    """With the pseudo-inverse at penalty 0."""
    gram = rows.T @ rows + penalty * np.eye(rows.shape[1])
    return np.linalg.pinv(gram, hermitian=True) @ rows.T @ targets


def risk_of(problem, w):
    return problem.eigenvalues @ (w - problem.optimum) ** 2


def enumerated(problem, n, method):
    """Expected risk over all sequences of one-hot rows and all signs of a noise of two values."""
    d, total = len(problem.optimum), 0.0
    for places in itertools.product(range(d), repeat=n):
        rows = np.eye(d)[list(places)]
        probability = np.prod(problem.eigenvalues[list(places)])
        for signs in itertools.product((-1, 1), repeat=n):
            targets = rows @ problem.optimum + np.sqrt(problem.noise) * np.array(signs)
            total += probability * 2.0**-n * risk_of(problem, method(rows, targets))
    return total


# --- exact ---


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("step", [0.3, 1.0])
@pytest.mark.parametrize("average", ["tail", "all"])
def test_one_hot_sgd_against_enumeration(n, step, average):
    start = n // 2 if average == "tail" else 0
    expected = enumerated(SMALL, n, lambda rows, targets: sgd(rows, targets, step, start))
    assert sgd_risk(SMALL, n, step, design="one_hot", average=average) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("penalty", [0.0, 0.5, 3.0])
def test_one_hot_ridge_against_enumeration(n, penalty):
    expected = enumerated(SMALL, n, lambda rows, targets: ridge(rows, targets, penalty))
    assert one_hot_ridge_risk(SMALL, n, penalty) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("average", ["tail", "all"])
@pytest.mark.parametrize("step", [1e-9, 0.01, 0.5, 1.0])
def test_one_hot_sgd_against_the_closed_formula(step, average):
    """Geometric sums instead of the recursion: ``rho = 1 - 2 g l + g^2 l``, ``a = 1 - g l``."""
    n, problem = 40, SMALL
    l, w2 = problem.eigenvalues, problem.optimum**2
    start = n // 2 if average == "tail" else 0
    rho, a = 1 - 2 * step * l + step**2 * l, 1 - step * l
    total = 0.0
    for s in range(start, n):
        m = rho**s * w2 + problem.noise * step**2 * l * sum(rho**j for j in range(s))
        total += l @ (m * (1 + 2 * sum(a**j for j in range(1, n - s))))
    expected = total / (n - start) ** 2
    assert sgd_risk(problem, n, step, design="one_hot", average=average) == pytest.approx(expected, rel=1e-12)


def test_one_coordinate_and_a_full_step():
    """``l = g = 1``: every iterate but the first is the last target, ``rho = a = 0``."""
    problem = LeastSquares(np.ones(1), np.array([3.0]), noise=2.0)
    assert sgd_risk(problem, 10, 1.0, design="one_hot") == pytest.approx(2.0 / 5)
    assert sgd_risk(problem, 1, 1.0, design="one_hot") == pytest.approx(9.0)
    assert one_hot_ridge_risk(problem, 10, 0.0) == pytest.approx(2.0 / 10)


def test_without_a_step_or_below_a_probability_nothing_is_learned():
    problem = LeastSquares(np.array([1.0, 0.0]), np.array([3.0, 5.0]))
    for design in ("one_hot", "gaussian"):
        assert sgd_risk(problem, 7, 0.0, design=design) == pytest.approx(9.0)
    assert one_hot_ridge_risk(problem, 7, 1e12) == pytest.approx(9.0)


def test_equal_coordinates_are_counted():
    once = LeastSquares(np.array([0.4, 0.2, 0.2, 0.2]), np.array([1.0, 2.0, 2.0, 3.0]))
    split = LeastSquares(np.array([0.4, 0.2, 0.2 * (1 + 1e-13), 0.2]), once.optimum)  # told apart by rounding alone
    for design in ("gaussian", "one_hot"):
        assert sgd_risk(once, 30, 0.3, design=design) == pytest.approx(
            sgd_risk(split, 30, 0.3, design=design), rel=1e-10
        )
    assert one_hot_ridge_risk(once, 30, 0.5) == pytest.approx(one_hot_ridge_risk(split, 30, 0.5), rel=1e-10)


def test_arrays_of_steps_and_penalties():
    steps, penalties = np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([0.1, 1.0, 10.0])
    for design in ("gaussian", "one_hot"):
        each = [sgd_risk(SMALL, 9, g, design=design) for g in steps.ravel()]
        assert np.allclose(sgd_risk(SMALL, 9, steps, design=design).ravel(), each, rtol=1e-14)
    assert np.allclose(one_hot_ridge_risk(SMALL, 9, penalties), [one_hot_ridge_risk(SMALL, 9, p) for p in penalties])


# --- simulation ---


@pytest.mark.parametrize("design", ["gaussian", "one_hot"])
@pytest.mark.parametrize("average", ["tail", "all"])
def test_sgd_against_simulation(design, average):
    rng, n, runs, step = np.random.default_rng(0), 12, 2500, 0.4
    start = n // 2 if average == "tail" else 0
    risks = []
    for _ in range(runs):
        if design == "gaussian":
            rows = rng.standard_normal((n, 3)) * np.sqrt(SMALL.eigenvalues)
        else:
            rows = np.eye(3)[rng.choice(3, n, p=SMALL.eigenvalues)]
        targets = rows @ SMALL.optimum + np.sqrt(SMALL.noise) * rng.standard_normal(n)
        risks.append(risk_of(SMALL, sgd(rows, targets, step, start)))
    error = np.std(risks) / np.sqrt(runs)
    exact = sgd_risk(SMALL, n, step, design=design, average=average)
    assert abs(np.mean(risks) - exact) < 4 * error < 0.1 * exact


def test_gaussian_ridge_against_scikit_learn():
    problem, n, penalty = LeastSquares.power_law(1, 0, d=30), 50, 2.5
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((n, 30)) * np.sqrt(problem.eigenvalues)
    targets = rows @ problem.optimum + rng.standard_normal(n)
    theirs = Ridge(alpha=penalty, fit_intercept=False).fit(rows, targets).coef_
    ours = gaussian_ridge_risk(problem, n, penalty, np.random.default_rng(3), n_runs=1)
    assert ours[0, 0] == pytest.approx(risk_of(problem, theirs), rel=1e-9)


def test_one_hot_ridge_against_scikit_learn():
    """The mean over drawn data, whose weights are scikit-learn's."""
    rng, runs, n = np.random.default_rng(0), 400, 20
    risks = []
    for _ in range(runs):
        rows = np.eye(3)[rng.choice(3, n, p=SMALL.eigenvalues)]
        targets = rows @ SMALL.optimum + np.sqrt(SMALL.noise) * rng.standard_normal(n)
        risks.append(risk_of(SMALL, Ridge(alpha=1.5, fit_intercept=False).fit(rows, targets).coef_))
    assert abs(np.mean(risks) - one_hot_ridge_risk(SMALL, n, 1.5)) < 4 * np.std(risks) / np.sqrt(runs)


# --- the separation ---


def best_ridge(problem, n):
    return tuned(lambda penalty: one_hot_ridge_risk(problem, n, penalty), 1e-4, 1e6)[1]


@pytest.mark.parametrize(
    ("n", "risk", "same_n", "needed"),
    [(64, 0.0241, 0.0324, 111), (256, 0.00683, 0.0147, 1035), (1024, 0.00189, 0.0068, 12672)],
)
def test_the_separation_has_the_figures_of_an_independent_run(n, risk, same_n, needed):
    """That run had coarser grids of steps and penalties, and looked for rows on a grid of 15 %."""
    problem = LeastSquares.separation(n)
    assert problem.trace == pytest.approx(1)
    step, found = tuned(lambda g: sgd_risk(problem, n, g, design="one_hot"), 1e-4, 1.0)
    assert 1e-4 < step < 1 and 0.99 * risk < found < 1.003 * risk
    assert best_ridge(problem, n) == pytest.approx(same_n, rel=0.02)
    ours = samples_needed(lambda rows: best_ridge(problem, rows), found, n)
    assert ours <= needed <= 1.16 * ours


def test_one_hot_sgd_is_no_worse_with_a_few_times_the_rows():
    """Theorem for one-hot rows, which leaves a constant open; half of the rows are not averaged over."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        problem = LeastSquares(rng.dirichlet(np.full(12, 0.3)), rng.standard_normal(12) * rng.exponential(2))
        for n in (20, 200):
            ours = tuned(lambda g, p=problem, n=n: sgd_risk(p, 3 * n, g, design="one_hot"), 1e-4, 1.0)[1]
            assert ours < best_ridge(problem, n)


# --- rates ---


@pytest.mark.parametrize("decay", [1, 2])
@pytest.mark.parametrize("truth", [0, 1, 10])
def test_rates_bound_up_to_constants(decay, truth):
    """Upper bound of SGD and lower bound of ridge: the constants stay between fixed numbers as rows grow."""
    problem = LeastSquares.power_law(decay, truth)
    for n in (50, 200, 800):
        for step in (0.5, 0.05):
            g = step / problem.trace
            assert sgd_risk(problem, n, g) < 2 * sgd_rate(problem, n, g)
        for penalty in (0.1, 10.0):
            mean = gaussian_ridge_risk(problem, n, penalty, np.random.default_rng(0), n_runs=3).mean()
            assert mean > 0.1 * ridge_rate(problem, n, penalty)


# --- refusals ---


def test_questions_that_make_no_sense():
    gaussian = LeastSquares.power_law(1, 1)
    with pytest.raises(ValueError, match=r"sum to 5\.878"):
        sgd_risk(gaussian, 10, 0.1, design="one_hot")
    with pytest.raises(ValueError, match="probabilities"):
        one_hot_ridge_risk(LeastSquares(np.array([1.5, -0.5]), np.ones(2)), 10, 0.1)
    with pytest.raises(ValueError, match="got 'uniform', 'tail'"):
        sgd_risk(gaussian, 10, 0.1, design="uniform")
    with pytest.raises(ValueError, match="at least 10"):
        LeastSquares.separation(9)
