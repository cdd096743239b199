"""The automatic choices: weight decay and temperature by held-out rows, and the loss by the columns."""

import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LogisticRegression

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Convolution
from convexbn.cli import main
from convexbn.program.losses import LOSSES, SquaredLoss
from convexbn.program.targets import class_targets
from convexbn.solvers.base import Budget
from convexbn.training.fit import CRUDE, SOLVERS
from convexbn.training.held_out import Choice, folds_of, held_out_choice
from convexbn.training.training_set import TrainingSet


def program_of(n, loss="squared", *, noise=0.3, seed=0):
    """A gated program on rows whose targets are piecewise linear and noisy."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 4))
    signal = X[:, 0] + np.abs(X[:, 1])
    targets = (signal + noise * signal.std() * rng.standard_normal(n))[:, None]
    if loss != "squared":
        targets = class_targets((targets[:, 0] > 1.5).astype(int), 1, loss)
    data = TrainingSet.prepare(X, targets, np.ones(n), loss=LOSSES[loss], fit_intercept=True, spectral_filter=0.3)
    return data, data.draw_gates("whitened", 15, np.random.RandomState(0), linear=True)[2]


@pytest.mark.parametrize(("n", "n_folds", "held_out"), [(60, 5, 12), (900, 2, 180), (1400, 1, 280), (10_000, 1, 1000)])
def test_folds_are_apart_and_alike(n, n_folds, held_out):
    _, program = program_of(n, "logistic")
    folds = folds_of(program)
    assert len(folds) == n_folds
    seen = np.concatenate([fold.held_out for fold in folds])
    assert len(np.unique(seen)) == len(seen) and (n_folds < 5 or len(seen) == n)
    positive = (program.loss.targets > 0).mean()
    for fold in folds:
        assert len(fold.held_out) == held_out and not np.intersect1d(fold.train, fold.held_out).size
        assert len(fold.train) == min(n - held_out, 1500)
        assert abs((program.loss.targets[fold.held_out] > 0).mean() - positive) < 1 / held_out


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_crude_solutions_choose_as_exact_ones_do(loss):
    _, program = program_of(120, loss)
    solver = "group_newton" if loss == "squared" else "subspace"
    crude, exact = (held_out_choice(program, SOLVERS[solver](tol=tol), Budget()) for tol in (CRUDE, 1e-8))
    assert crude.weight_decay == exact.weight_decay
    assert 0.001 * program.max_weight_decay() < exact.weight_decay < program.max_weight_decay()


def test_noise_raises_the_weight_decay_and_more_rows_do_not():
    decays = {
        (n, noise): held_out_choice((p := program_of(n, noise=noise)[1]), SOLVERS["group_newton"](tol=CRUDE), Budget())
        .weight_decay * p.loss.without_bias.output_scale**-0.5
        for n in (150, 1200) for noise in (0.1, 3.0)
    }  # fmt: skip
    assert decays[150, 3.0] > 2 * decays[150, 0.1] and decays[1200, 3.0] > 2 * decays[1200, 0.1]


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_temperature_is_that_of_a_regression_on_the_outputs(n_classes):
    """Rare classes, whose targets the intercept moves far: the coefficient of a logistic regression."""
    rng = np.random.default_rng(0)
    labels = rng.choice(n_classes, 400, p=[0.9, 0.1] if n_classes == 2 else [0.8, 0.15, 0.05])
    targets = class_targets(labels, 1 if n_classes == 2 else n_classes, "squared")
    outputs = targets + 0.5 * rng.standard_normal(targets.shape)
    offset = targets.mean(axis=0)
    choice = Choice(1.0, outputs - offset, np.arange(400))
    found = choice.temperature(SquaredLoss(targets - offset, np.ones(400)), offset)
    logits = np.hstack([np.zeros_like(outputs), outputs]) if n_classes == 2 else outputs

    def log_loss(size):
        scaled = size * logits
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(400), labels]).sum())

    expected = 1 / scipy.optimize.minimize_scalar(log_loss, bounds=(0.1, 50), method="bounded").x
    assert found == pytest.approx(expected, rel=1e-4)
    if n_classes == 2:
        plain = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(outputs, labels)
        assert found == pytest.approx(1 / plain.coef_[0, 0], rel=1e-4)


def test_rare_classes_keep_their_share_in_the_probabilities():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 3))
    y = (X[:, 0] > 1.3).astype(int)
    model = ConvexBNClassifier(loss="squared", random_state=0, gates="whitened", n_gates=20).fit(X, y)
    assert abs(model.predict_proba(X)[:, 1].mean() - y.mean()) < 0.03


@pytest.mark.parametrize(("d", "loss"), [(60, "cross_entropy"), (61, "squared")])
def test_the_loss_follows_the_columns(d, loss):
    X = np.random.default_rng(0).standard_normal((30, d))
    model = ConvexBNClassifier(n_gates=3, random_state=0, weight_decay=0.5).fit(X, X[:, 0] > 0)
    assert model.loss == "auto" and model.loss_ == loss
    named = ConvexBNClassifier(n_gates=3, random_state=0, weight_decay=0.5, loss=loss).fit(X, X[:, 0] > 0)
    np.testing.assert_array_equal(named.decision_function(X), model.decision_function(X))
    np.testing.assert_array_equal(named.predict_proba(X), model.predict_proba(X))
    assert model.certify(X, X[:, 0] > 0).status.value == "CERTIFIED"


def test_convolutions_have_the_squared_loss():
    images = np.random.default_rng(0).standard_normal((20, 4, 4, 1))
    model = ConvexBNClassifier(convolution=Convolution(2), n_gates=3, random_state=0, weight_decay=0.5)
    assert model.fit(images, np.arange(20) % 2).loss_ == "squared"
    assert ConvexBNRegressor(loss="huber").loss_ == "huber"
    with pytest.raises(ValueError, match="loss"):
        ConvexBNRegressor(loss="auto").fit(images[:, 0, 0], np.arange(20.0))


def test_the_command_line_names_the_automatic_loss(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    assert "one of auto, squared" in capsys.readouterr().out
