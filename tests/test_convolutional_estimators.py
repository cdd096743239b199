"""Convolutional networks through the doors: fit, predict, certify, save, path, command line."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from threadpoolctl import threadpool_limits

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNRegressor, Convolution
from convexbn.cli import main
from convexbn.data import moments, qr, row_matrix
from convexbn.data.patches import PatchMatrix
from convexbn.estimators.display import SpectrumDisplay
from convexbn.files.datasets import digits
from convexbn.solvers.relu.large_scale import LargeScale
from convexbn.solvers.relu.sgd import SGD
from convexbn.training import fit, training_set

LAYER = Convolution(3, regions=2, input_shape=(8, 8, 1))


@pytest.fixture(scope="module")
def images():
    data = digits()
    return data.X[:120].reshape(-1, 8, 8, 1), data.y[:120], data.X[120:400], data.y[120:400]


def fitted(images, layer=LAYER, **settings):
    settings = {"n_gates": 12, "weight_decay": 0.02, "random_state": 0, "tol": 1e-3, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ConvexBNClassifier(convolution=layer, **settings).fit(*images[:2])


@pytest.fixture(scope="module")
def gated(images):
    return fitted(images)


def by_hand(model, X):
    """Outputs of a convolutional network, image by image and place by place."""
    network, layer = model.network_, model.network_.convolution
    geometry, pool = layer.geometry, layer.pool
    kernel, (down, across) = geometry.kernel, geometry.locations
    outputs = []
    for image in X.reshape(-1, *geometry.image):
        padded = np.pad(image, [(p, p) for p in geometry.padding] + [(0, 0)])
        rows = []
        for y, x in np.ndindex(down, across):
            top, left = y * geometry.stride[0], x * geometry.stride[1]
            patch = padded[top : top + kernel[0], left : left + kernel[1]].transpose(2, 0, 1).ravel() - network.mean
            response = (network.gamma * (patch @ network.weight) + network.shift) / np.sqrt(network.n_effective)
            opened = response > 0 if network.gates is None else patch @ network.gates + network.gate_offsets >= 0
            rows.append(opened * response)
        hidden = np.array(rows)
        pooled = [(hidden[m].mean(0) if layer.pooling == "average" else hidden[m].max(0)) for m in pool.members]
        weights = network.output.reshape(network.n_neurons, pool.n_regions, network.n_outputs)
        outputs.append(np.einsum("rm,mrk->k", np.array(pooled), weights) + network.output_bias)
    return np.array(outputs)


def test_a_gated_network_is_certified_and_predicts_what_it_says(gated, images):
    X, y, X_test, y_test = images
    proof = gated.certificate_
    assert proof.status == "CERTIFIED" and "nuclear norm per gate) with this convolution" in proof.sentence
    assert proof.objective == pytest.approx(proof.weight_decay_objective, rel=1e-9)  # the nuclear norm is its neurons'
    assert gated.score(X, y) == 1.0 and gated.score(X_test, y_test) > 0.8
    np.testing.assert_allclose(gated.decision_function(X_test[:20]), by_hand(gated, X_test[:20]), atol=1e-12)
    assert gated.transform(X_test[:3]).shape == (3, 4 * gated.network_.n_neurons)
    assert len(gated.get_feature_names_out()) == 4 * gated.network_.n_neurons
    again = gated.certify(X.reshape(len(X), -1), y)
    assert again.objective == proof.objective and again.lower_bound == proof.lower_bound


RELU = {
    "average": Convolution(3, stride=2, padding=1),
    "flattened": Convolution(4, stride=4, regions="all"),
    "max": Convolution(3, stride=2, pooling="max", regions=2),
}


def test_no_images_have_no_outputs(gated):
    geometry = gated.network_.convolution.geometry
    assert gated.network_.predict(np.zeros((0, geometry.n_features))).shape == (0, gated.network_.n_outputs)


@pytest.mark.parametrize("name", RELU)
def test_a_relu_network_predicts_what_it_says_and_is_bounded(name, images):
    model = fitted((images[0][:40], images[1][:40]), RELU[name], activation="relu", width=10, max_iter=1, time_limit=2)
    proof = model.certificate_
    assert proof.scope == "all patterns" and 0 < proof.lower_bound <= proof.objective
    np.testing.assert_allclose(model.decision_function(images[0][:9]), by_hand(model, images[0][:9]), atol=1e-12)


@pytest.mark.parametrize("gates", ["data", "trained"])
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_the_objective_is_that_of_the_network_by_hand(images, monkeypatch, loss, gates):
    monkeypatch.setattr(training_set, "GATES_STEPS", 10)
    X, y = images[0][:40], (images[1][:40] > 4).astype(float)
    model = ConvexBNRegressor(
        loss=loss, huber_delta=0.2, gates=gates, convolution=Convolution(3, stride=2), n_gates=6, weight_decay=0.02,
        random_state=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, y)
    size, network = np.abs(by_hand(model, X)[:, 0] - y), model.network_
    near = np.minimum(size, 0.2 if loss == "huber" else np.inf)
    value = np.sum(near * (size - 0.5 * near))
    squares = sum(float(np.sum(part**2)) for part in (network.gamma, network.shift, network.output))
    assert model.certificate_.weight_decay_objective == pytest.approx(value + 0.5 * 0.02 * squares, rel=1e-9)
    assert model.predict(X).shape == (40,)


def test_sample_weights_are_repetition_and_the_order_does_not_matter(images):
    X, y = images[0][:30], images[1][:30]
    weights = np.random.default_rng(0).integers(1, 3, 30)
    order = np.random.default_rng(1).permutation(int(weights.sum()))
    settings = {"convolution": Convolution(3, stride=2), "n_gates": 5, "random_state": 0, "max_iter": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = ConvexBNClassifier(**settings).fit(X, y, weights)
        other = ConvexBNClassifier(**settings).fit(np.repeat(X, weights, 0)[order], np.repeat(y, weights)[order])
    assert one.fingerprint_ == other.fingerprint_
    np.testing.assert_array_equal(one.network_.weight, other.network_.weight)


def test_shapes_layouts_and_clones(gated, images):
    X, y = images[:2]
    assert clone(gated).convolution == gated.convolution
    first = fitted((np.moveaxis(X, 3, 1), y), Convolution(3, regions=2, channels="first"))
    np.testing.assert_array_equal(first.network_.weight, gated.network_.weight)
    assert first.network_.convolution.input_shape == (1, 8, 8) and first.n_features_in_ == 64
    flat = X.reshape(len(X), -1)
    np.testing.assert_array_equal(first.predict(flat), gated.predict(X))
    with pytest.raises(ValueError, match="give Convolution an input_shape"):
        ConvexBNClassifier(convolution=Convolution(3)).fit(flat, y)
    with pytest.raises(ValueError, match=r"X must have shape \(n, 8, 8, 1\)"):
        gated.predict(X[:, :7])
    with pytest.raises(ValueError, match="to_relu is for dense data"):
        gated.to_relu(X, y)
    with pytest.raises(ValueError, match="use 'proximal' with a convolution"):
        fitted(images, solver="group_newton")
    with pytest.raises(ValueError, match="use pooling='average'"):
        fitted(images, Convolution(3, pooling="max"))
    pytest.importorskip("onnx")
    with pytest.raises(TypeError, match="not exported to ONNX"):
        convexbn.onnx.export(gated.network_, "nowhere.onnx")


def test_files_give_the_same_model_and_refuse_another_layer(gated, images, tmp_path):
    gated.save(tmp_path / "model.safetensors")
    loaded = convexbn.load(tmp_path / "model.safetensors")
    assert loaded.network_.convolution == loaded.convolution == LAYER
    np.testing.assert_array_equal(loaded.decision_function(images[2]), gated.decision_function(images[2]))
    assert loaded.certify(*images[:2]) == gated.certify(*images[:2])
    wrong = fitted((images[0][:30], images[1][:30]), max_iter=3)
    wrong.network_ = replace(wrong.network_, convolution=Convolution(4, input_shape=(8, 8, 1)))
    with pytest.raises(ValueError, match="'convolution' does not fit"):
        wrong.save(tmp_path / "wrong.safetensors")


def test_paths_and_displays_take_images(images, tmp_path):
    X, y = images[0][:60], images[1][:60]
    model = ConvexBNClassifier(convolution=Convolution(3, stride=2), n_gates=5, random_state=0, max_iter=30, tol=1e-2)
    path = convexbn.fit_path(model, X, y, ranks=[4, None], weight_decays=[0.5, 0.1], checkpoint=tmp_path / "p")
    assert [point.model.rank_ for point in path] == [4, 4, 9, 9]
    display = SpectrumDisplay.from_estimator(path.points[0].model, X)
    assert len(display.singular_values) == 9 and display.energies[4:].sum() < 1e-12


def test_the_command_line_fits_predicts_and_certifies(tmp_path, capsys):
    out = str(tmp_path / "digits.safetensors")
    settings = ["--filter", "3", "--stride", "2", "--pool", "avg", "--regions", "3", "--n-gates", "4"]
    assert main(["fit", "digits", *settings, "--test-size", "0.9", "--tol", "1e-2", "--out", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "CERTIFIED" and result["test_score"] > 0.7
    assert main(["certify", out, "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == result["objective"]
    assert main(["predict", out, "digits", "--out", str(tmp_path / "p.csv")]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1798
    table = tmp_path / "t.csv"
    table.write_text("a,b,c,d,y\n1,2,3,4,0\n4,3,2,1,1\n1,3,2,4,0\n4,2,3,1,1\n2,4,1,3,0\n")
    file = ["fit", str(table), "--target", "y", "--filter", "2", "--out", out]
    assert main(file) == 1 and "--image" in capsys.readouterr().err
    assert main([*file, "--image", "2x2x1", "--n-gates", "3", "--task", "classification"]) == 0


@pytest.fixture
def two_threads():
    """Threads of ours are as many as BLAS had."""
    with threadpool_limits(2, user_api="blas"):
        yield


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_many_patches_take_the_path_of_many_rows(images, monkeypatch, pooling, dtype):
    """Rows that are made when they are read, mini-batches, blocked statistics: the same network and certificate."""
    layer = Convolution(3, regions=2, pooling=pooling, input_shape=(8, 8, 1))
    noise = np.random.default_rng(0).standard_normal((40, 8, 8, 1))
    X, y = np.abs(10 * (images[0][:40] + noise)).astype(dtype), images[1][:40]
    monkeypatch.setattr(qr, "BLOCK_ROWS", 256)
    settings = {"activation": "relu", "loss": "cross_entropy", "weight_decay": 3.0, "rank": 9, "width": 16}
    models = []
    for entries in (row_matrix._KEPT_ENTRIES, 1000):
        monkeypatch.setattr(row_matrix, "_KEPT_ENTRIES", entries)
        monkeypatch.setattr(fit, "PRICING_ENTRIES", 1000)
        models.append(fitted((X, y), layer, max_iter=3, **settings))
    kept, mapped = (model.certificate_ for model in models)
    assert len(models[0].history_) == 3 and kept.bound == mapped.bound == "orthant"
    assert mapped.objective == pytest.approx(kept.objective, rel=1e-2)  # other whitened directions, by rotation
    assert mapped.lower_bound == pytest.approx(kept.lower_bound, rel=1e-1)
    again = models[1].certify(X, y)
    assert again.objective == pytest.approx(mapped.objective, rel=1e-12)
    monkeypatch.setattr(row_matrix, "_KEPT_ENTRIES", 1 << 26)
    assert models[1].certify(X, y).objective == pytest.approx(mapped.objective, rel=1e-8)


@pytest.mark.parametrize("intercept", [False, True])
def test_bytes_are_read_once_for_the_whitening_and_twice_for_the_certificate(images, monkeypatch, intercept):
    X, y, reads = images[0].astype(np.uint8), images[1], []
    read = PatchMatrix.of_cases
    monkeypatch.setattr(
        PatchMatrix, "of_cases", lambda self, *i: (reads.append(len(found := read(self, *i))), found)[1]
    )
    monkeypatch.setattr(moments, "BLOCK_BYTES", 1)  # what a first mean is taken of
    monkeypatch.setattr(qr, "BLOCK_ROWS", 256)
    monkeypatch.setattr(row_matrix, "_KEPT_ENTRIES", 1000)
    monkeypatch.setattr(fit, "PRICING_ENTRIES", 1000)
    epochs, settings = 3, {"activation": "relu", "loss": "cross_entropy", "width": 5, "fit_intercept": intercept}
    model = fitted((X, y), **settings, weight_decay=1.0, max_iter=epochs)
    data = model._prepare(X, y, None)[0]
    assert isinstance(data.whitening.rows, row_matrix.ProjectedRows) and data.whitening.departure < 1e-11
    reads.clear()
    model.fit(X, y)
    passes = 1 + epochs + 2 + intercept  # the best output bias is read off the outputs of all images
    assert sum(reads) / len(data.inputs) == pytest.approx(passes, rel=0.05)  # and a few single rows


def test_a_gated_network_on_mapped_rows_is_the_same(images, monkeypatch):
    X, y = images[0][:40] + np.random.default_rng(0).standard_normal((40, 8, 8, 1)), images[1][:40]
    monkeypatch.setattr(qr, "BLOCK_ROWS", 256)
    settings = {"layer": Convolution(3, regions=2), "n_gates": 4, "rank": 5, "gates": "data", "max_iter": 30}
    kept = fitted((X, y), **settings)
    monkeypatch.setattr(row_matrix, "_KEPT_ENTRIES", 1000)
    mapped = fitted((X, y), **settings)
    assert isinstance(mapped._prepare(X, y, None)[0].whitening.rows, row_matrix.ProjectedRows)
    assert mapped.certificate_.objective == pytest.approx(kept.certificate_.objective, rel=1e-6)
    assert mapped.certificate_.lower_bound == pytest.approx(kept.certificate_.lower_bound, rel=1e-5)


def test_mini_batches_end_near_the_descent_on_all_rows(images):
    data = fitted((images[0][:60], images[1][:60]), max_iter=1)._prepare(images[0][:60], images[1][:60], None)[0]
    rng = np.random.default_rng(0)
    few = LargeScale(width=20, polish=0, descent=SGD(epochs=60, batch_size=20))
    many = LargeScale(width=20, polish=300, descent=SGD(epochs=1))
    found, best = (solver.solve(data.relu_program(5.0), rng=rng).history[-1].objective for solver in (few, many))
    assert best <= found <= 1.1 * best


@pytest.mark.parametrize("given", [LAYER, Convolution(3, regions=2)])
def test_a_path_is_scored_on_validation_images_and_resumes(images, given, tmp_path):
    X, y, others, answers = images
    model = ConvexBNClassifier(convolution=given, n_gates=6, rank=5, random_state=0, tol=1e-3)
    question = {"weight_decays": [20.0, 5.0], "validation": (others, answers), "checkpoint": tmp_path / "path"}
    path = convexbn.fit_path(model, X, y, **question)
    first = next(path)
    assert first.score == first.model.score(others, answers)
    again = list(convexbn.fit_path(model, X, y, **question))
    assert len(again) == 2 and again[0].score == first.score
    np.testing.assert_array_equal(again[0].model.predict(others), first.model.predict(others))
    with pytest.raises(ValueError, match="class"):
        convexbn.fit_path(model, X, y, validation=(others, answers + 100))
    with pytest.raises(ValueError, match="pair"):
        convexbn.fit_path(model, X, y, validation=others)


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("settings", [{"gates": "trained"}, {"activation": "relu", "width": 8, "max_iter": 4}])
def test_one_location_is_dense_data(images, monkeypatch, pooling, settings):
    """A filter of the size of the image sees rows: descent takes its one patch an image."""
    monkeypatch.setattr(fit, "PRICING_ENTRIES", 1000)
    model = fitted(images, Convolution(8, pooling=pooling), rank=5, weight_decay=1.0, time_limit=2, **settings)
    assert model.network_.convolution.geometry.n_locations == 1
    np.testing.assert_allclose(model.decision_function(images[2][:5]), by_hand(model, images[2][:5]), rtol=1e-9)
    assert model.certificate_.lower_bound <= model.certificate_.objective


def test_a_report_tells_of_filters(tmp_path):
    file = tmp_path / "model.safetensors"
    line = ["--filter", "3", "--regions", "2", "--rank", "5", "--n-gates", "5", "--tol", "1e-2"]
    line += ["--weight-decay", "1", "--out", str(file)]
    assert main(["fit", "digits", *line]) == 0
    assert main(["report", str(file), "digits", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "filters of 3 x 3" in page and "of channel 0" in page


@pytest.mark.parametrize("option", [["--pool", "max"], ["--regions", "3"], ["--stride", "2"], ["--image", "8x8x1"]])
def test_options_of_filters_need_one(option, tmp_path, capsys):
    assert main(["fit", "digits", *option, "--out", str(tmp_path / "model")]) == 1
    assert "give --filter SIZE" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_archives_of_images_know_their_shape(images, tmp_path):
    file, out = tmp_path / "images.npz", tmp_path / "model.safetensors"
    np.savez(file, X=images[0], y=images[1])
    shared = [str(file), "--target", "y", "--n-gates", "5", "--rank", "5", "--tol", "1e-2", "--task", "classification"]
    assert main(["fit", *shared, "--filter", "3", "--out", str(out)]) == 0
    model = convexbn.load(out)
    assert model.network_.convolution.input_shape == (8, 8, 1)
    assert model.score(images[0].reshape(len(images[0]), -1), images[1]) == model.score(images[0], images[1])


def test_what_is_no_image_is_told_in_a_sentence(images):
    X, y = images[0][:40], images[1][:40]
    layer = Convolution(3, input_shape=[8, 8, 1])
    assert fitted((X, y), layer, rank=3).network_.convolution.input_shape == (8, 8, 1)
    wrong = X.copy()
    wrong[2, 3, 4, 0] = np.nan
    model = ConvexBNClassifier(convolution=layer, n_gates=3)
    for rows, match in ((wrong, r"index \[2, 3, 4, 0\]"), (None, "shape"), (X[:0], "0 sample")):
        with pytest.raises(ValueError, match=match):
            clone(model).fit(rows, y[: 0 if rows is not None and not len(rows) else None])
    for shape in (36, (8.0, 8.0, 1), "8x8", (8, 8, 0)):
        with pytest.raises(ValueError, match="input_shape must have"):
            Convolution(3, input_shape=shape)
    with pytest.raises(ValueError, match="kernel_size must be an integer"):
        Convolution(True)


def test_the_largest_weight_decay_of_a_convolution(images):
    X, y = images[0][:60], images[1][:60]
    largest = convexbn.max_weight_decay(X, y, convolution=LAYER, n_gates=5, random_state=0)
    below, at = (fitted((X, y), n_gates=5, weight_decay=share * largest) for share in (0.99, 1.0))
    assert below.network_.n_neurons and not at.network_.n_neurons
