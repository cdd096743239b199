"""ConvexLayer: gradients against torch's own check, central differences and cvxpylayers; its manners and refusals."""

import copy
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from convexbn.data.whitening import whiten
from convexbn.nn import ConvexLayer, gated_outputs
from convexbn.solvers.gated.group_newton import GroupNewton
from planted import planted
from test_sensitivity import program_of


def tensors(program, dtype=torch.float64):
    """Rows, targets and weight decay of a program as leaves."""
    numbers = (program.operator.rows, program.loss.targets, np.array(program.weight_decay))
    return [torch.tensor(array, dtype=dtype, requires_grad=True) for array in numbers]


def unit_weights(program):
    """A program with sample weights of 1, which is what the layer takes."""
    loss = type(program.loss)(program.loss.targets, np.ones(len(program.operator.rows)))
    return replace(program, loss=loss)


def paper_layer(program):
    """The layer of the paper's program, which has no output bias."""
    return ConvexLayer(program.operator.patterns, fit_intercept=False)


def draw(name="squared", K=1, **settings):
    return unit_weights(program_of(name, K, **settings))


# --- gradients ---


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("name", ["squared", "logistic"])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_gradcheck(name, K, fit_intercept):
    program = draw(name, K, n=12, d=2, P=5, seed=2)
    layer = ConvexLayer(program.operator.patterns, name, fit_intercept=fit_intercept)
    assert torch.autograd.gradcheck(layer, tensors(program), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_gradcheck_of_cross_entropy(fit_intercept):
    """In logits of the targets, which stay in the simplex."""
    program = draw("cross_entropy", 3, n=12, d=2, P=5, seed=2)
    layer = ConvexLayer(program.operator.patterns, "cross_entropy", fit_intercept=fit_intercept)
    rows, targets, weight_decay = tensors(program)
    logits = targets.detach().log().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda A, Z, b: layer(A, Z.softmax(dim=1), b), (rows, logits, weight_decay), rtol=1e-5, atol=1e-7
    )


def central(function, x, h):
    with torch.no_grad():
        return (function(x + h) - function(x - h)) / (2 * h)


def test_the_spectral_filter_by_the_chain_rule():
    """Validation loss as a function of ``log tau``, on validation rows with the same filter."""
    rng = np.random.default_rng(0)
    X, X_val = (rng.standard_normal((m, 6)) * np.geomspace(1, 0.05, 6) for m in (50, 40))
    y, y_val = (torch.tensor(np.sin(2 * Z[:, 0]) + Z[:, 1] ** 2) for Z in (X, X_val))
    whitening = whiten(X, rank=6)
    A, A_val = torch.tensor(whitening.rows), torch.tensor(whitening.transform(X_val))
    values = torch.tensor(whitening.singular_values)
    gates = rng.standard_normal((6, 20))
    layer, opened_val = ConvexLayer(X @ gates >= 0), torch.tensor(X_val @ gates >= 0)

    def validation_loss(log_tau):
        phi = values / (values**2 + (log_tau.exp() * values[0]) ** 2).sqrt()
        phi = torch.cat([phi, torch.ones(1, dtype=torch.float64)])
        _, weights = layer(A * phi, y, 0.1)
        return (gated_outputs(A_val * phi, opened_val, weights)[:, 0] - y_val).square().mean()

    log_tau = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    validation_loss(log_tau).backward()
    assert float(log_tau.grad) == pytest.approx(float(central(validation_loss, log_tau, 1e-5)), rel=1e-6)


def test_raw_data_through_whitening_in_torch():
    """A triangular whitening is the same network, and QR is differentiable whatever the singular values."""
    rng = np.random.default_rng(1)
    X, along = (
        torch.tensor(rng.standard_normal((30, 3)), requires_grad=True),
        torch.tensor(rng.standard_normal((30, 3))),
    )
    y = X.detach()[:, 0] ** 2
    patterns = X.detach() @ torch.tensor(rng.standard_normal((3, 9))) >= 0
    layer = ConvexLayer(patterns)

    def loss(X):
        basis, _ = torch.linalg.qr(X - X.mean(dim=0))
        constant = torch.full((30, 1), 30**-0.5, dtype=torch.float64)
        return (layer(torch.cat([basis, constant], dim=1), y, 0.3)[0] - 2 * y).square().sum()

    loss(X).backward()
    expected = central(lambda t: loss(X + t * along), torch.tensor(0.0, dtype=torch.float64), 1e-6)
    assert float((X.grad * along).sum()) == pytest.approx(float(expected), rel=1e-6)
    outputs, _ = layer(torch.tensor(whiten(X.detach().numpy()).rows), y, 0.3)
    assert float((outputs - 2 * y).square().sum()) == pytest.approx(float(loss(X).detach()), rel=1e-10)


@pytest.mark.parametrize(("n", "d", "P"), [(20, 2, 10), (50, 5, 20)])
def test_against_cvxpylayers(n, d, P):
    cvxpy, cvxpylayers = pytest.importorskip("cvxpy"), pytest.importorskip("cvxpylayers.torch")
    program = draw(n=n, d=d, P=P, fraction=0.2)
    blocks = [cvxpy.Variable(d + 1) for _ in range(program.n_gates)]
    rows, y, beta = cvxpy.Parameter((n, d + 1)), cvxpy.Parameter(n), cvxpy.Parameter(nonneg=True)
    opened = program.operator.patterns.T.astype(float)
    outputs = sum(cvxpy.multiply(gate, rows @ block) for gate, block in zip(opened, blocks, strict=True))
    objective = 0.5 * cvxpy.sum_squares(outputs - y) + beta * sum(map(cvxpy.norm, blocks))
    theirs = cvxpylayers.CvxpyLayer(cvxpy.Problem(cvxpy.Minimize(objective)), [rows, y, beta], blocks)
    exact = {"solve_method": "Clarabel", "mode": "dense"} | dict.fromkeys(
        ("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12
    )
    gradients = []
    for layer in (lambda *leaves: torch.stack(theirs(*leaves, solver_args=exact)),
                  lambda A, y, b: paper_layer(program)(A, y, b)[1][:, :, 0]):  # fmt: skip
        A, Y, b = tensors(program)
        y = Y.detach()[:, 0].requires_grad_()
        layer(A, y, b).square().sum().backward()
        gradients.append(torch.cat([A.grad.ravel(), y.grad, b.grad[None]]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


# --- what it gives ---


@pytest.mark.parametrize("K", [1, 3])
def test_outputs_are_those_of_the_weights(K):
    program = draw(K=K)
    rows, targets, _ = tensors(program)
    for layer in (paper_layer(program), ConvexLayer(program.operator.patterns)):
        outputs, weights = layer(rows, targets, program.weight_decay)
        assert weights.shape == (program.n_gates, 5, K)
        expected = gated_outputs(rows, layer.patterns, weights) + torch.tensor(layer.optimum.bias)
        assert torch.allclose(expected, outputs, rtol=0, atol=1e-12)
        assert layer.optimum.bias.any() == layer.fit_intercept


@pytest.mark.parametrize("K", [1, 3])
def test_the_bias_takes_shifts_of_the_targets(K):
    """And the residuals sum to zero: no bias is better."""
    program = draw(K=K)
    layer, (rows, targets, weight_decay) = ConvexLayer(program.operator.patterns), tensors(program)
    outputs, weights = layer(rows, targets, weight_decay)
    shift = torch.arange(1.0, K + 1, dtype=torch.float64)
    moved, same = layer(rows, targets + shift, weight_decay)
    assert torch.allclose(moved, outputs + shift, rtol=0, atol=1e-11)
    assert torch.allclose(same, weights, rtol=0, atol=1e-11)
    assert float((targets - outputs).detach().sum(dim=0).abs().max()) < 1e-11


def test_a_planted_optimum():
    truth = planted(K=2, n_active=3, seed=1)
    rows, targets, weight_decay = tensors(truth.program)
    _, weights = paper_layer(truth.program)(rows, targets, weight_decay)
    assert np.allclose(weights.detach().numpy()[truth.gate_index], truth.blocks, rtol=1e-10)


def test_one_column_of_targets_is_a_vector():
    program = draw()
    rows, targets, weight_decay = tensors(program)
    layer = ConvexLayer(program.operator.patterns)
    vector = targets.detach()[:, 0].requires_grad_()
    outputs = layer(rows, vector, weight_decay)[0]
    assert outputs.shape == (30,)
    outputs.sum().backward()
    layer(rows, targets, weight_decay)[0].sum().backward()
    assert torch.allclose(vector.grad, targets.grad[:, 0])


def test_float32_is_rounded_last():
    program = draw(K=2)
    layer = ConvexLayer(program.operator.patterns)
    wide = [leaf.detach().float().double().requires_grad_() for leaf in tensors(program)]
    narrow = [leaf.detach().float().requires_grad_() for leaf in wide]
    for leaves in (wide, narrow):
        layer(*leaves)[1].square().sum().backward()
    for a, b in zip(wide, narrow, strict=True):
        assert b.grad.dtype == torch.float32
        assert float((a.grad - b.grad).norm() / a.grad.norm()) < 1e-6


def test_above_the_largest_weight_decay_nothing_moves():
    program = draw(fraction=1.2)
    leaves = tensors(program)
    outputs, weights = paper_layer(program)(*leaves)
    (outputs.sum() + weights.sum()).backward()
    assert not weights.any() and not any(leaf.grad.any() for leaf in leaves)


def test_above_the_largest_weight_decay_the_bias_alone_follows_the_targets():
    """Every output is the mean of the targets."""
    leaves = tensors(draw(fraction=1.2))
    outputs, weights = ConvexLayer(draw().operator.patterns)(*leaves)
    (outputs.sum() + weights.sum()).backward()
    assert not weights.any() and torch.allclose(outputs, leaves[1].mean(dim=0), rtol=0, atol=1e-14)
    assert torch.allclose(leaves[1].grad, torch.ones_like(leaves[1])) and not leaves[0].grad.any()
    assert leaves[2].grad == 0


def test_only_what_is_asked_for_has_a_gradient():
    program = draw()
    rows, targets, weight_decay = tensors(program)
    layer = ConvexLayer(program.operator.patterns)
    layer(rows.detach(), targets.detach(), weight_decay)[0].sum().backward()
    assert weight_decay.grad is not None and rows.grad is None
    with torch.no_grad():
        assert not layer(rows, targets, weight_decay)[0].requires_grad


def test_the_next_call_starts_from_the_last(monkeypatch):
    program = draw()
    layer, leaves = ConvexLayer(program.operator.patterns), tensors(program)
    with torch.no_grad():
        layer(*leaves)
        near = layer(*leaves[:2], 1.01 * leaves[2])
        layer.optimum = None
        afresh = layer(*leaves[:2], 1.01 * leaves[2])
        monkeypatch.setattr(GroupNewton, "solve", None)  # not needed any more
        layer(*leaves)
    for a, b in zip(near, afresh, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_data_of_another_shape_start_afresh():
    program, wider = draw(K=1), draw(K=3)
    layer = ConvexLayer(program.operator.patterns)
    layer(*tensors(program))
    assert layer(*tensors(wider))[1].shape == (program.n_gates, 5, 3)


def test_copies_pickles_and_state_dicts():
    program = draw()
    layer, leaves = ConvexLayer(program.operator.patterns), tensors(program)
    outputs = layer(*leaves)[0]
    assert list(layer.state_dict()) == ["patterns"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.allclose(other(*leaves)[0], outputs, rtol=0, atol=1e-12)


def test_the_arguments_are_left_as_they_are():
    program = draw()
    leaves = tensors(program)
    before = [leaf.detach().clone() for leaf in leaves]
    ConvexLayer(program.operator.patterns)(*leaves)[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


# --- edges and refusals ---


def test_an_ordinary_point_gives_no_warning():
    program = draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConvexLayer(program.operator.patterns)(*tensors(program))[1].sum().backward()


def test_a_group_on_the_edge_is_told():
    truth = planted(n_active=2, seed=1)
    leaving = truth.program.outputs(truth.gate_index[1:], truth.blocks[1:])
    rows, targets, weight_decay = tensors(truth.program)
    outputs, _ = paper_layer(truth.program)(rows, targets - torch.tensor(leaving), weight_decay)
    with pytest.warns(RuntimeWarning, match="that of one side"):
        outputs.sum().backward()


def test_weights_that_are_not_unique_are_told():
    """A row of zeros does not tell apart two gates that differ there alone."""
    program = draw()
    rows, targets, weight_decay = tensors(program)
    patterns = np.hstack([program.operator.patterns, program.operator.patterns])
    patterns[0, program.n_gates :] ^= True
    kept = torch.ones(30, 1, dtype=torch.float64)
    kept[0] = 0
    outputs, _ = ConvexLayer(patterns)(rows * kept, targets, weight_decay)
    with pytest.warns(RuntimeWarning, match="not unique"):
        outputs.sum().backward()


def test_gradients_of_gradients_are_refused():
    program = draw()
    rows, targets, weight_decay = tensors(program)
    value = ConvexLayer(program.operator.patterns)(rows, targets, weight_decay)[0].square().sum()
    (slope,) = torch.autograd.grad(value, weight_decay, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda A, Y, b: (A[:5], Y, b), "must have 30 rows"),
        (lambda A, Y, b: (A, Y[:5], b), "must have 30 rows"),
        (lambda A, Y, b: (A[0], Y, b), "must have 30 rows"),
        (lambda A, Y, b: (A, Y[None], b), "must have 30 rows"),
        (lambda A, Y, b: (A * np.nan, Y, b), "must be finite"),
        (lambda A, Y, b: (A, Y, 0.0), "one positive number, got 0.0"),
        (lambda A, Y, b: (A, Y, -b), "one positive number"),
        (lambda A, Y, b: (A, Y, b * np.nan), "one positive number"),
        (lambda A, Y, b: (A, Y, torch.ones(2)), "one positive number"),
    ],
)
def test_questions_that_make_no_sense(change, words):
    program = draw()
    with pytest.raises(ValueError, match=re.escape(words)):
        ConvexLayer(program.operator.patterns)(*change(*(leaf.detach() for leaf in tensors(program))))


def test_layers_that_make_no_sense():
    patterns = draw().operator.patterns
    with pytest.raises(ValueError, match="must be one of squared, logistic"):
        ConvexLayer(patterns, loss="hinge")
    with pytest.raises(ValueError, match="rows x gates, got shape"):
        ConvexLayer(patterns[0])
    with pytest.raises(ValueError, match="first_of_each_pattern"):
        ConvexLayer(np.hstack([patterns, patterns[:, :1]]))
    rows, targets, weight_decay = tensors(draw(K=2))
    with pytest.raises(ValueError, match="between -1 and 1"):
        ConvexLayer(patterns, "logistic")(rows, targets, weight_decay)
    with pytest.raises(ValueError, match="rows of probabilities"):
        ConvexLayer(patterns, "cross_entropy")(rows, targets, weight_decay)
