"""The intercept: an output bias without penalty, in every program and everywhere a network goes."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNRegressor, Convolution
from convexbn.program.losses import LOSSES
from convexbn.program.output_bias import WithOutputBias
from convexbn.program.targets import class_targets
from convexbn.training.fit import SOLVERS, fit_gated, fit_relu
from convexbn.training.training_set import TrainingSet

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 4))
Y = X[:, 0] + np.abs(X[:, 1]) + 0.1 * RNG.standard_normal(60)
LABELS = (X[:, 0] > 0.8).astype(int) + (X[:, 1] ** 2 > 0.3)
CASES = [
    ("squared", 1), ("squared", 3), ("huber", 2), ("logistic", 1), ("cross_entropy", 3), ("squared_hinge", 1),
    ("squared_hinge", 3),
]  # fmt: skip


def training_set(loss, n_outputs, *, fit_intercept=True, **settings):
    """The rows above with targets of a loss."""
    if "regression" in LOSSES[loss].tasks:
        targets = np.column_stack([100 + Y, Y**2, X[:, 2]])[:, :n_outputs]
    else:
        targets = class_targets(LABELS if n_outputs > 1 else np.minimum(LABELS, 1), n_outputs, loss)
    weights = 1 + np.arange(len(X)) % 3.0
    return TrainingSet.prepare(X, targets, weights, loss=LOSSES[loss], fit_intercept=fit_intercept, **settings)


def program_of(data, share=0.05):
    gates, offsets, program = data.draw_gates("whitened", 20, np.random.RandomState(0), linear=True)
    return (gates, offsets), program.with_weight_decay(share * program.max_weight_decay())


@pytest.mark.parametrize(("loss", "n_outputs"), CASES)
@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_every_solver_reaches_the_same_certified_optimum(loss, n_outputs, solver):
    data = training_set(loss, n_outputs)
    gates, program = program_of(data)
    if solver in ("conic", "group_newton") and loss != "squared":
        pytest.skip("for the squared loss")
    fit = fit_gated(data, program, gates, solver=solver, tol=1e-7)
    assert fit.certificate.status.value == "CERTIFIED"
    reference = fit_gated(data, program, gates, solver="proximal", tol=1e-9).certificate
    assert fit.certificate.lower_bound <= reference.objective * (1 + 1e-12)
    assert reference.lower_bound <= fit.certificate.objective * (1 + 1e-12)


@pytest.mark.parametrize(("loss", "n_outputs"), CASES)
def test_an_intercept_only_lowers_the_optimum(loss, n_outputs):
    data, without = (training_set(loss, n_outputs, fit_intercept=fit) for fit in (True, False))
    gates, program = program_of(data)
    proofs = [
        fit_gated(one, one.gated_program(*gates, program.weight_decay), gates, tol=1e-8).certificate
        for one in (data, without)
    ]
    assert proofs[0].objective < proofs[1].lower_bound


@pytest.mark.parametrize(("loss", "n_outputs"), CASES)
def test_the_bias_of_the_network_is_the_best_one(loss, n_outputs):
    data = training_set(loss, n_outputs)
    gates, program = program_of(data)
    network = fit_gated(data, program, gates, tol=1e-8).network
    outputs = network.predict(data.X) - data.target_offset
    inner = data.loss.without_bias
    values = [
        inner.value(outputs + 1e-3 * sign * np.eye(n_outputs)[k]) for k in range(n_outputs) for sign in (-1, 0, 1)
    ]
    assert min(values) == values[1]


@pytest.mark.parametrize(("loss", "n_outputs"), CASES)
def test_relu_networks_over_all_patterns(loss, n_outputs):
    data = training_set(loss, n_outputs, rank=2)
    top, _ = data.max_weight_decay_relu(proved=False)
    proof = fit_relu(data, 0.3 * top, proof_time=np.inf).certificate
    assert proof.relative_gap < 1e-4
    assert fit_relu(data, 1.001 * top, proof_time=np.inf).certificate.status.value == "TRIVIAL"


def test_the_trivial_network_predicts_the_mean():
    model = ConvexBNRegressor(weight_decay=1e6, n_gates=5, random_state=0).fit(X, 7 + Y)
    assert model.certificate_.status.value == "TRIVIAL"
    assert model.network_.n_neurons == 0
    np.testing.assert_allclose(model.predict(X), np.mean(7 + Y), rtol=1e-14)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-1e6, 1e6), seed=st.integers(0, 100), huber=st.booleans())
def test_a_shift_of_y_shifts_predictions_and_no_certificate(shift, seed, huber):
    rng = np.random.default_rng(seed)
    rows, y = rng.standard_normal((30, 3)), rng.standard_normal(30)
    # whitened gates: those of a training in float32 may differ after rounding
    shared = {"random_state": 0, "n_gates": 10, "gates": "whitened", "tol": 1e-9}
    shared["loss"] = "huber" if huber else "squared"
    one, other = (ConvexBNRegressor(weight_decay=0.7, **shared).fit(rows, y + b) for b in (0.0, shift))
    rounding = 1e-9 * (1 + abs(shift))  # of the targets, and what a solver makes of it
    # both losses are strongly convex in outputs near the optimum: a gap bounds the distance to it
    apart = sum(np.sqrt(2 * max(model.certificate_.gap, 0)) for model in (one, other)) + 100 * rounding
    np.testing.assert_allclose(other.predict(rows) - shift, one.predict(rows), atol=apart)
    assert abs(other.certificate_.objective - one.certificate_.objective) <= rounding
    assert other.certificate_.status == one.certificate_.status


@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_relu_programs_do_not_see_a_shift_of_y(loss):
    whole = np.round(10 * Y)  # so that shifted targets are not rounded
    losses = [
        TrainingSet.prepare(X, (whole + b)[:, None], np.ones(60), loss=LOSSES[loss], fit_intercept=True).loss
        for b in (0.0, 2.0**20)
    ]
    np.testing.assert_allclose(losses[0].targets, losses[1].targets, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_target_far_from_zero_is_fitted(scale):
    y = scale * (1000 + X[:, 0] + 0.3 * np.random.default_rng(1).standard_normal(60))
    assert ConvexBNRegressor(random_state=0).fit(X, y).score(X, y) > 0.8


@pytest.mark.parametrize("loss", ["squared", "huber", "squared_hinge"])
def test_formulas_at_full_rank(loss):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 20))
    targets = 3 + rng.standard_normal(12) if loss != "squared_hinge" else np.sign(rng.standard_normal(12) + 0.5)
    weights = rng.uniform(0.5, 2, 12)
    data = TrainingSet.prepare(rows, targets[:, None], weights, loss=LOSSES[loss], fit_intercept=True)
    for share in (0.05, 0.3, 0.8):
        fit = fit_relu(data, share * data.max_weight_decay_relu()[0])
        assert fit.certificate.stopped_by == "formula"
        assert fit.certificate.status.value == "CERTIFIED"


def test_the_formula_of_several_classes_and_its_limit():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 20))
    balanced, rare = np.arange(12) % 3, np.r_[np.zeros(10, int), 1, 2]
    for loss, labels, formula in (
        ("squared", balanced, True), ("cross_entropy", balanced, True), ("squared", rare, None),
        ("cross_entropy", rare, False),
    ):  # fmt: skip
        data = TrainingSet.prepare(
            rows, class_targets(labels, 3, loss), np.ones(12), loss=LOSSES[loss], fit_intercept=True
        )
        proof = fit_relu(data, 0.2 * data.max_weight_decay_relu(proved=False)[0]).certificate
        assert proof.relative_gap < 1e-4
        assert formula is None or (proof.stopped_by == "formula") == formula


@pytest.mark.parametrize("activation", ["gated", "relu"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_convolutions(activation, loss):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((30, 4, 4, 1))
    labels = (images[:, 0, 0, 0] > 0.3).astype(int) + (images[:, 1, 1, 0] > 1)
    layer = Convolution(2, regions=2)
    limits = {"max_iter": 3, "proof_time": 0} if activation == "relu" else {}
    model = ConvexBNClassifier(activation=activation, loss=loss, convolution=layer, n_gates=8, random_state=0, **limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(images, labels)
    assert model.network_.output_bias.any()
    assert activation == "relu" or model.certificate_.status.value == "CERTIFIED"
    assert model.certify(images, labels, time_limit=0).relative_gap <= model.certificate_.relative_gap + 1e-9


def test_a_changed_bias_is_seen_by_the_judge():
    model = ConvexBNRegressor(random_state=0, n_gates=10, weight_decay=0.5).fit(X, 5 + Y)
    honest = model.certify(X, 5 + Y)
    assert honest.status.value == "CERTIFIED"
    model.network_.output_bias[:] += 0.05
    assert model.certify(X, 5 + Y).objective > honest.objective + 0.9 * 60 * 0.05**2 / 2
    assert model.certify(X, 5 + Y).status.value != "CERTIFIED"


def test_files_keep_the_bias(tmp_path):
    model = ConvexBNRegressor(random_state=0, n_gates=10).fit(X, 5 + Y)
    model.save(tmp_path / "model.safetensors")
    loaded = convexbn.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.network_.output_bias, model.network_.output_bias)
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    model.fit_intercept = False
    with pytest.raises(ValueError, match="output_bias"):
        model.save(tmp_path / "other.safetensors")


@pytest.mark.parametrize("activation", ["gated", "relu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_and_onnx_have_the_bias(tmp_path, activation, dtype):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch = pytest.importorskip("torch")
    from convexbn.nn import from_module, to_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ConvexBNRegressor(activation=activation, random_state=0, n_gates=10, max_iter=5).fit(X[:, :2], 5 + Y)
    rows, tol = X[:, :2].astype(dtype), 1e-5 if dtype == "float32" else 1e-12
    convexbn.onnx.export(model.network_, tmp_path / "model.onnx", dtype=dtype, X=rows)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"X": rows})[0][:, 0], model.predict(rows), rtol=tol)
    module = to_module(model.network_, dtype=getattr(torch, dtype), X=rows)
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.tensor(rows)).numpy()[:, 0], model.predict(rows), rtol=tol)
    if activation == "relu":
        again = from_module(module, rows)
        np.testing.assert_allclose(again.output_bias, model.network_.output_bias, rtol=tol)


def test_a_program_without_intercept_refuses_a_network_with_one():
    model = ConvexBNRegressor(random_state=0, n_gates=10).fit(X, 5 + Y)
    model.fit_intercept = False
    with pytest.raises(ValueError, match="intercept"):
        model.certify(X, 5 + Y)


@pytest.mark.parametrize("loss", ["logistic", "cross_entropy", "huber", "squared_hinge"])
def test_the_best_bias_of_a_loss(loss):
    rng = np.random.default_rng(0)
    K = {"logistic": 1, "cross_entropy": 3}.get(loss, 2)
    targets = 3 * rng.standard_normal((40, K)) if loss == "huber" else class_targets(np.arange(40) % max(K, 2), K, loss)
    bound = WithOutputBias.with_decay(LOSSES[loss](targets, rng.uniform(0.5, 2, 40)), 0.0)
    outputs = 2 * rng.standard_normal((40, K))
    dual = bound.inner.negative_gradient(outputs + bound.best_bias(outputs))
    assert np.abs(dual.sum(axis=0)).max() <= 1e-11 * np.abs(dual).sum()
    assert np.isfinite(bound.dual_value(0.9 * bound.negative_gradient(outputs)))
    lopsided = bound.negative_gradient(outputs)
    lopsided[np.unravel_index(np.abs(lopsided).argmax(), lopsided.shape)] *= 1 + 1e-6
    assert bound.dual_value(0.9 * lopsided) == -np.inf
