"""Weights of classes: sample weights by another name, in fits, paths, selections, certificates, files and commands."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import check_class_weight_balanced_classifiers

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, fit_path, max_weight_decay
from convexbn.cli import main
from convexbn.files.model_file import FormatError
from instances import neuron_arrays

NAMED = {"b": 3.0, "a": 0.5, "c": 1.0}


def rows(n_classes=3, n=60, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 4))
    y = np.array(list("abc"))[np.minimum(rng.geometric(0.6, n) - 1, n_classes - 1)]
    return X, y


def classifier(**changes):
    return ConvexBNClassifier(**{"n_gates": 20, "random_state": 0, **changes})


def same(one, two):
    arrays = neuron_arrays(one.network_)
    return one.fingerprint_ == two.fingerprint_ and all(
        np.array_equal(array, neuron_arrays(two.network_)[name]) for name, array in arrays.items()
    )


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("class_weight", ["balanced", NAMED, {"b": 2.5}])
def test_class_weights_are_the_sample_weights_of_scikit_learn(n_classes, class_weight):
    X, y = rows(n_classes)
    plain = classifier().fit(X, y)
    weighted = classifier(class_weight=class_weight).fit(X, y)
    weights = compute_sample_weight(class_weight, y)
    by_samples = classifier().fit(X, y, weights)
    assert same(weighted, by_samples) and weighted.weight_decay_ == by_samples.weight_decay_
    assert weighted.temperature_ == by_samples.temperature_
    assert not same(weighted, plain)
    largest = max_weight_decay(X, y, n_gates=20, random_state=0, class_weight=class_weight)
    assert largest == max_weight_decay(X, y, n_gates=20, random_state=0, sample_weight=weights)


@pytest.mark.parametrize("class_weight", ["balanced", NAMED])
def test_repetition_equals_weights_and_order_changes_no_bit(class_weight):
    X, y = rows()
    times = np.random.default_rng(1).integers(1, 4, len(y))
    weighted = classifier(class_weight=class_weight).fit(X, y, times)
    order = np.random.default_rng(2).permutation(times.sum())
    again = np.repeat(np.arange(len(y)), times)[order]
    repeated = classifier(class_weight=class_weight).fit(X[again], y[again])
    assert same(weighted, repeated)
    balanced = compute_sample_weight(class_weight, np.repeat(y, times))
    assert weighted.network_.n_effective == pytest.approx(balanced.sum(), rel=1e-12)


def test_a_certificate_answers_the_weighted_question():
    X, y = rows()
    model = classifier(class_weight="balanced").fit(X, y)
    proof = model.certify(X[::-1], y[::-1])
    assert proof.status == "CERTIFIED" and proof.objective == pytest.approx(model.certificate_.objective, rel=1e-12)
    assert model.fingerprint(X[::-1], y[::-1]) == model.fingerprint_
    assert model.set_params(class_weight=None).fingerprint(X, y) != model.fingerprint_


def test_paths_and_selections_pass_them_on():
    X, y = rows()
    (point,) = fit_path(classifier(class_weight=NAMED), X, y, weight_decays=[0.5])
    alone = classifier(class_weight=NAMED, weight_decay=0.5).fit(X, y)
    assert point.certificate.objective == pytest.approx(alone.certificate_.objective, rel=1e-6)
    assert point.model.fingerprint_ == alone.fingerprint_
    model = ConvexBNClassifierCV(weight_decays=[0.5], n_gates=20, cv=2, random_state=0, class_weight=NAMED).fit(X, y)
    assert same(model.best_estimator_, alone)
    plain = ConvexBNClassifierCV(weight_decays=[0.5], n_gates=20, cv=2, random_state=0).fit(X, y)
    assert plain.best_estimator_.fingerprint_ != alone.fingerprint_


@pytest.mark.parametrize("class_weight", [None, "balanced", NAMED, {np.str_("b"): np.float32(2)}])
def test_they_are_saved(class_weight, tmp_path):
    X, y = rows()
    model = classifier(class_weight=class_weight).fit(X, y)
    model.save(tmp_path / "m.safetensors")
    again = convexbn.load(tmp_path / "m.safetensors")
    assert again.class_weight == class_weight and again.certify(X, y).status == "CERTIFIED"
    assert again.fingerprint(X, y) == model.fingerprint_


def test_labels_keep_their_types_in_files(tmp_path):
    X, y = rows()
    labels = {1: 2.0, 0: 1.0}
    model = classifier(class_weight=labels).fit(X, (y == "a").astype(int))
    model.save(tmp_path / "m.safetensors")
    assert convexbn.load(tmp_path / "m.safetensors").class_weight == labels
    model.class_weight = {("a", "b"): 1.0}
    with pytest.raises(FormatError, match="class_weight"):
        model.save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("class_weight", "words"),
    [
        ({"a": -1.0}, "finite numbers from 0 on; class 'a' has -1.0"),
        ({"a": np.nan}, "class 'a' has nan"),
        ({"a": "2"}, "class 'a' has '2'"),
        ({"z": 2.0}, r"names 'z', which is no class of y; they are \['a', 'b', 'c'\]"),
        ({"a": 0, "b": 0, "c": 0}, "no positive finite total"),
        ({"a": 1e308, "b": 1e308}, "no positive finite total"),
        ("even", "class_weight"),
        (3, "class_weight"),
    ],
)
def test_wrong_weights_are_refused(class_weight, words):
    X, y = rows()
    with pytest.raises(ValueError, match=words):
        classifier(class_weight=class_weight).fit(X, y)


def test_more_classes_than_occur_may_have_weights_and_a_weight_of_zero_leaves_rows_out():
    X, y = rows()
    assert same(classifier(class_weight=NAMED | {"z": 9.0}).fit(X, y), classifier(class_weight=NAMED).fit(X, y))
    without = classifier(class_weight={"c": 0}).fit(X, y)
    assert len(without.classes_) == 3 and without.network_.n_effective == np.sum(y != "c")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_check_of_scikit_learn_for_balanced_classes():
    X, y = load_breast_cancer(return_X_y=True)
    rare = np.r_[np.flatnonzero(y == 1), np.flatnonzero(y == 0)[:20]]
    X_train, X_test, y_train, y_test = train_test_split(
        X[rare], y[rare], test_size=0.5, stratify=y[rare], random_state=0
    )
    model = ConvexBNClassifier(random_state=0, gates="whitened", rank=5, weight_decay=4.0)
    check_class_weight_balanced_classifiers("ConvexBNClassifier", model, X_train, y_train, X_test, y_test, None)


def test_the_command_line_balances_classes(tmp_path, capsys):
    X, y = rows()
    table = tmp_path / "t.csv"
    table.write_text(
        "p,q,r,s,y\n" + "".join(f"{','.join(map(repr, x.tolist()))},{c}\n" for x, c in zip(X, y, strict=True))
    )
    out = str(tmp_path / "m.safetensors")
    fit = ["fit", str(table), "--target", "y", "--out", out, "--json", "--class-weight", "balanced"]
    assert main(fit) == 0
    assert convexbn.load(out).class_weight == "balanced"
    capsys.readouterr()
    assert main(["certify", out, str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training_rows"] is True
    assert main(["fit", "digits", "--task", "regression", "--class-weight", "balanced", "--out", out]) == 1
    assert "--class-weight is for classification, and this is regression" in capsys.readouterr().err
