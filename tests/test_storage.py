"""Saved models: exact round trips, tampering refused by field, nothing executed, the same certificate again."""

import copy
import dataclasses
import functools
import gzip
import os
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNRegressor, FormatError, Status
from convexbn.files import model_file
from convexbn.training import fit

RNG = np.random.default_rng(2)
X = RNG.standard_normal((60, 4))
Y = X[:, 0] ** 2 + np.sin(X[:, 1]) - 1
THREE = np.arange(60) % 3
GATES = RNG.standard_normal((5, 9))


def classifier(**changes):
    return ConvexBNClassifier(**{"n_gates": 20, "random_state": 0, **changes})


def regressor(**changes):
    return ConvexBNRegressor(**{"n_gates": 20, "random_state": 0, **changes})


def names(*labels):
    return np.array(labels)[np.arange(60) % len(labels)]


MODELS = {
    "strings": lambda: classifier().fit(X, names("no", "yes", "Ä ß")),
    "objects": lambda: classifier().fit(X, names("no", "yes").astype(object)),
    "integers": lambda: classifier().fit(X, names(-7, 0, 900)),
    "int16": lambda: classifier().fit(X, names(1, 2).astype("i2")),
    "big endian": lambda: classifier().fit(X, names(1, 2, 3).astype(">i4")),
    "uint64": lambda: classifier().fit(X, names(2**63, 2**63 + 1, 2**64 - 1).astype("u8")),
    "booleans": lambda: classifier().fit(X, names(False, True)),
    "floats": lambda: classifier().fit(X, names(-1.0, 0.0, 2.0)),
    "float32 labels": lambda: classifier().fit(X, names(-1, 4).astype("f4")),
    "one target": lambda: regressor().fit(X, Y),
    "a column": lambda: regressor().fit(X, Y[:, None]),
    "several targets": lambda: regressor().fit(X, np.c_[Y, -Y, Y**2]),
    "weighted": lambda: regressor().fit(X, Y, np.linspace(0, 2, 60)),
    "whitened": lambda: regressor(gates="whitened").fit(X, Y),
    "given gates": lambda: regressor(gates=GATES).fit(X, Y),
    "given lists": lambda: regressor(gates=GATES.tolist()).fit(X, Y),
    "rank": lambda: regressor(rank=2).fit(X, Y),
    "share": lambda: regressor(rank=0.7).fit(X, Y),
    "relu": lambda: classifier(activation="relu").fit(X[:5], [0, 1, 2, 0, 1]),
    "relu one": lambda: regressor(activation="relu").fit(X[:5], Y[:5]),
    "relu soft": lambda: classifier(activation="relu", loss="logistic").fit(X[[0, 1, 2, 2, 2]], [0, 1, 1, 0, 1]),
    "logistic": lambda: classifier(loss="logistic").fit(X, names("a", "b")),
    "hinge": lambda: classifier(loss="squared_hinge").fit(X, names("a", "b")),
    "hinge, three": lambda: classifier(loss="squared_hinge").fit(X, THREE),
    "huber": lambda: regressor(loss="huber", huber_delta=0.5).fit(X, Y),
    "huber relu": lambda: regressor(loss="huber", activation="relu").fit(X[:5], Y[:5]),
    "cross-entropy": lambda: classifier(loss="cross_entropy").fit(X, THREE),
    "trivial": lambda: classifier(weight_decay=1e6).fit(X, THREE),
    "cut short": lambda: regressor(solver="proximal", max_iter=2).fit(X, Y),
    "interrupted": lambda: regressor(callback=lambda progress: True).fit(X, Y),
    "conic": lambda: regressor(solver="conic").fit(X, Y),
    "frame": lambda: regressor().fit(pd.DataFrame(X, columns=["a", "b c", "Ä", "d"]), Y),
    "numpy settings": lambda: classifier(
        n_gates=np.int64(20),
        rank=np.int32(3),
        random_state=np.uint32(7),
        weight_decay=np.float32(1),
        tol=np.float32(0.1),
    ).fit(X, THREE),
    "random state": lambda: regressor(random_state=np.random.RandomState(0)).fit(X, Y),
    "zero targets": lambda: regressor().fit(X, 0 * Y),
}


@functools.cache
def fitted(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS[name]()


def same(one, two):
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and one.dtype == two.dtype and np.array_equal(one, two)
    if dataclasses.is_dataclass(one):
        return type(one) is type(two) and all(same(a, getattr(two, k)) for k, a in vars(one).items())
    if isinstance(one, float) and np.isnan(one):
        return isinstance(two, float) and np.isnan(two)
    return one == two


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_comes_back_exactly(name, tmp_path):
    model = fitted(name)
    model.save(tmp_path / "model.safetensors")
    loaded = convexbn.load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    before, after = vars(model), vars(loaded)
    unsaved = {"callback", "gates", "random_state"}
    assert set(before) == set(after)
    different = [key for key in set(before) - unsaved if not same(before[key], after[key])]
    assert not different, different
    np.testing.assert_array_equal(np.asarray(loaded.gates), np.asarray(model.gates))
    rows = pd.DataFrame(X, columns=model.feature_names_in_) if hasattr(model, "feature_names_in_") else X
    for method in ("predict", "transform", "predict_proba"):
        if hasattr(model, method):
            one, two = getattr(model, method)(rows), getattr(loaded, method)(rows)
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["strings", "booleans", "several targets", "given gates", "relu", "trivial", "rank"])
def test_the_loaded_model_certifies_to_the_same_numbers(name, tmp_path):
    model = fitted(name)
    model.save(tmp_path / "model")
    loaded = convexbn.load(tmp_path / "model")
    data = {
        "strings": (X, names("no", "yes", "Ä ß")),
        "booleans": (X, names(False, True)),
        "several targets": (X, np.c_[Y, -Y, Y**2]),
        "relu": (X[:5], np.array([0, 1, 2, 0, 1])),
        "trivial": (X, THREE),
    }
    rows, y = data.get(name, (X, Y))
    assert loaded.certify(rows, y) == model.certify(rows, y)
    assert loaded.certify(rows, y).status is model.certificate_.status
    assert loaded.fingerprint(rows, y) == model.fingerprint_


def test_a_loaded_model_can_be_fitted_and_saved_again(tmp_path):
    model = fitted("given gates")
    model.save(tmp_path / "one")
    loaded = convexbn.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    np.testing.assert_array_equal(loaded.fit(X, Y).predict(X), model.predict(X))


class Broken:
    """A solver whose answer is not a number."""

    def __init__(self, **settings):
        self.settings = settings

    def solve(self, program, start=None, budget=None, rng=None):
        solution = fit.GroupNewton(**self.settings).solve(program, budget=budget)
        return dataclasses.replace(solution, weights=solution.weights._replace(values=np.nan * solution.weights.values))


def test_a_numerical_certificate_is_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(fit.SOLVERS, "group_newton", Broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = regressor().fit(X, Y)
    assert model.certificate_.status is Status.NUMERICAL
    model.save(tmp_path / "model")
    loaded = convexbn.load(tmp_path / "model")
    assert same(loaded.certificate_, model.certificate_)
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


def test_numbers_of_a_certificate_that_are_not_finite_come_back(tmp_path):
    model = copy.deepcopy(fitted("cut short"))
    model.certificate_ = dataclasses.replace(
        model.certificate_,
        objective=np.nan,
        lower_bound=-np.inf,
        status=Status.NUMERICAL,
        weight_decay_objective=np.nan,
    )
    model.save(tmp_path / "model")
    assert same(convexbn.load(tmp_path / "model").certificate_, model.certificate_)


def test_an_unfitted_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        regressor().save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"activation": "relu"}, {"tol": np.nan}, {"weight_decay": -1.0}, {"rank": "all"}])
def test_what_save_writes_load_reads(change, tmp_path):
    """Parameters changed after the fit: refused by save, with nothing written, or read back."""
    model = copy.deepcopy(fitted("one target")).set_params(**change)
    try:
        model.save(tmp_path / "model")
    except ValueError:
        assert not list(tmp_path.iterdir())
    else:
        np.testing.assert_array_equal(convexbn.load(tmp_path / "model").predict(X), model.predict(X))


@pytest.mark.parametrize("place", ["missing/model", ".", "/dev/full"])
def test_a_place_that_cannot_be_written_is_named_and_the_fit_kept(place, tmp_path):
    model = fitted("one target")
    target = os.path.join(tmp_path, place)
    with pytest.raises(OSError, match=os.path.basename(place).replace(".", r"\.")):
        model.save(target)
    assert not list(tmp_path.iterdir()) and np.isfinite(model.predict(X)).all()


# -- tampering: the file is sound and sealed, and its fields do not belong together --


@functools.cache
def parts(name="integers"):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        fitted(name).save(os.path.join(folder, "model"))
        return model_file.read(os.path.join(folder, "model"))


def forge(folder, change, name="integers"):
    """A resealed file in which ``change(arrays, header)`` has been at work."""
    arrays, header = copy.deepcopy(parts(name))
    change(arrays, header)
    model_file.write(folder / "forged", arrays, header)
    return folder / "forged"


def put(*path):
    """A change that sets a field: keys, then the value (a function of the old one, or a constant)."""
    *keys, last, value = path

    def change(arrays, header):
        place = arrays if keys == ["arrays"] else header
        for key in keys if place is header else ():
            place = place[key]
        place[last] = value(place[last]) if callable(value) else value

    return change


def drop(last):
    return lambda arrays, header: arrays.pop(last)


TAMPERED = [
    ("version", put("version", 7)),
    ("estimator", put("estimator", "os.system")),
    ("estimator", put("estimator", ["ConvexBNRegressor"])),
    ("parameters|classes|single_output", put("estimator", "ConvexBNRegressor")),
    ("header", put("surprise", 1)),
    ("header", lambda arrays, header: header.pop("rank")),
    ("parameters", put("parameters", None)),
    ("parameters", put("parameters", "tol", -1)),
    ("parameters", put("parameters", "surprise", 1)),
    ("parameters", put("parameters", "callback", None)),
    ("parameters", put("parameters", "loss", [["squared"]])),
    ("parameters", put("parameters", "solver", {"a": 1})),
    ("parameters", put("parameters", "random_state", "a")),
    ("parameters", put("parameters", "rank", "a")),
    ("list of tensors", put("parameters", "activation", "relu")),
    ("list of tensors", put("arrays", "surprise", np.ones(3))),
    ("list of tensors", drop("mean")),
    ("list of tensors", drop("history")),
    ("list of tensors", drop("gates")),
    ("n_effective", put("n_effective", 0.0)),
    ("n_effective", put("n_effective", -3.5)),
    ("n_effective", put("n_effective", "1")),
    ("weight_decay", put("weight_decay", 0.0)),
    ("certificate|weight_decay", put("weight_decay", 1e9)),
    ("rank", put("rank", -1)),
    ("rank", put("rank", 2.0)),
    ("rank", put("rank", 10**9)),
    ("n_iter", put("n_iter", -1)),
    ("fingerprint", put("fingerprint", "0" * 63)),
    ("fingerprint", put("fingerprint", None)),
    ("feature_names", put("feature_names", ["a"])),
    ("feature_names", put("feature_names", [1, 2, 3, 4])),
    ("feature_names", put("feature_names", list("aaaa"))),
    ("classes", put("classes", None)),
    ("classes", put("classes", "labels", [0, 1])),
    ("classes", put("classes", "labels", [0, 0, 1])),
    ("classes", put("classes", "labels", [900, 0, -7])),
    ("classes", put("classes", "labels", [0.1, 0.2, 0.3])),
    ("classes", put("classes", "labels", [0, 1, None])),
    ("classes", put("classes", "labels", [0, 1, [2]])),
    ("classes", put("classes", "dtype", "|b1")),
    ("classes", put("classes", "dtype", "<f3")),
    ("classes", put("classes", "dtype", "O8,O8")),
    ("classes", put("classes", {"dtype": "<U1", "labels": ["aa", "ab", "b"]})),
    ("classes", put("classes", {"dtype": "|O", "labels": ["aa", 1, 2.0]})),
    ("single_output|header", put("single_output", 3)),
    ("source", put("source", "digits")),
    ("source", put("source", {"data": "digits", "test_size": 0.2})),
    ("source", put("source", {"data": 3, "test_size": "a", "seed": [], "task": {}, "target": 1, "feature_names": 2})),
    ("certificate", put("certificate", "status", "PROVED")),
    ("certificate", put("certificate", "status", ["CERTIFIED"])),
    ("certificate", put("certificate", "stopped_by", "luck")),
    ("certificate", put("certificate", "stopped_by", [])),
    ("certificate", put("certificate", "scope", "everything")),
    ("certificate", put("certificate", "scope", "all patterns")),
    ("certificate", put("certificate", "sentence", None)),
    ("certificate", put("certificate", "objective", lambda old: 0.5 * old)),
    ("certificate", put("certificate", "objective", "1")),
    ("certificate", put("certificate", "objective", None)),
    ("certificate", put("certificate", "lower_bound", lambda old: 0.9 * old)),
    ("certificate", put("certificate", "lower_bound", 1e9)),
    ("certificate", put("certificate", "lower_bound", None)),
    ("certificate", put("certificate", "tolerance", None)),
    ("certificate", put("certificate", "tolerance", True)),
    ("certificate", put("certificate", "weight_decay_objective", lambda old: 0.1 * old)),
    ("certificate", put("certificate", "surprise", 1)),
    ("certificate", put("certificate", [])),
    ("weight|gamma", put("arrays", "weight", lambda old: old[:, :-1])),
    ("weight", put("arrays", "weight", np.float64(1).reshape(()))),
    ("mean", put("arrays", "mean", lambda old: old[:2])),
    ("mean", put("arrays", "mean", lambda old: old.astype("f4"))),
    ("gamma", put("arrays", "gamma", lambda old: old[:-1])),
    ("gamma", put("arrays", "gamma", lambda old: -old)),
    ("gamma|output|certificate", put("arrays", "gamma", lambda old: 1.2 * old)),
    ("gamma|output|certificate", put("arrays", "gamma", lambda old: 0 * old)),
    ("gamma|output|certificate", put("arrays", "output", lambda old: 0.5 * old)),
    ("shift|gamma|output|certificate", put("arrays", "shift", lambda old: old + 0.1)),
    ("output|output_bias|classes", put("arrays", "output", lambda old: old[:, :2])),
    ("output|output_bias|classes", put("arrays", "output", lambda old: old[:, :0])),
    ("gates|gate_offsets|gate_index", put("arrays", "gates", lambda old: old[:, :2])),
    ("gate_offsets|gates|gate_index", put("arrays", "gate_offsets", lambda old: old[:-1])),
    ("gate_index", put("arrays", "gate_index", lambda old: old + 100)),
    ("gate_index", put("arrays", "gate_index", lambda old: old - 100)),
    ("gate_index", put("arrays", "gate_index", lambda old: old.astype(float))),
    ("history", put("arrays", "history", lambda old: old[:, :3])),
    ("history", put("arrays", "history", lambda old: old.astype(np.int64))),
    ("history", put("arrays", "history", lambda old: -old)),
]


@pytest.mark.parametrize(("field", "change"), TAMPERED, ids=[f"{i}-{t[0]}" for i, t in enumerate(TAMPERED)])
def test_fields_that_do_not_belong_together_are_refused_by_name(field, change, tmp_path):
    path = forge(tmp_path, change)
    with pytest.raises(FormatError, match=rf"forged.*'({field})'"):
        convexbn.load(path)


def test_an_untouched_forgery_loads(tmp_path):
    loaded = convexbn.load(forge(tmp_path, lambda arrays, header: None))
    np.testing.assert_array_equal(loaded.predict(X), fitted("integers").predict(X))


def test_given_gates_of_an_impossible_shape_are_refused(tmp_path):
    path = forge(tmp_path, put("arrays", "given_gates", np.zeros((9, 1))), name="given gates")
    with pytest.raises(FormatError, match="given_gates"):
        convexbn.load(path)


def test_the_certificate_in_a_file_is_a_claim_and_certify_recomputes_it(tmp_path):
    """A network with another output layer and a consistent claim loads, and is not certified."""

    def lie(arrays, header):
        arrays["output"] = arrays["output"][:, [1, 2, 0]]

    loaded = convexbn.load(forge(tmp_path, lie))
    assert loaded.certificate_.status is Status.CERTIFIED
    assert loaded.certify(X, names(-7, 0, 900)).status is Status.GAP_OPEN


# -- files that are something else --


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("packed", [False, True])
def test_a_pickle_is_never_executed(protocol, packed, tmp_path):
    data = pickle.dumps(Canary(tmp_path / "canary"), protocol=protocol)
    (tmp_path / "model.safetensors").write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(FormatError, match=r"looks like a (pickle|compressed)"):
        convexbn.load(tmp_path / "model.safetensors")
    assert not (tmp_path / "canary").exists()
    pickle.loads(data)
    assert (tmp_path / "canary").exists()  # it would have been


def test_other_files_are_named_for_what_they_look_like(tmp_path):
    np.savez(tmp_path / "a.npz", X=X)
    (tmp_path / "a.html").write_text("<!doctype html><html></html>")
    (tmp_path / "a.empty").write_bytes(b"")
    pickle.dump(fitted("one target"), (tmp_path / "a.pkl").open("wb"))
    for name, looks in {"npz": "zip", "html": "HTML", "empty": "empty", "pkl": "pickle"}.items():
        with pytest.raises(FormatError, match=f"looks like an? {looks}"):
            convexbn.load(tmp_path / f"a.{name}")
    with pytest.raises(OSError, match="nowhere"):
        convexbn.load(tmp_path / "nowhere")
    with pytest.raises(OSError):
        convexbn.load(tmp_path)


def test_a_file_cut_or_flipped_anywhere_is_refused(tmp_path):
    fitted("relu one").save(tmp_path / "model")
    sound = (tmp_path / "model").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(sound), 150):
        flipped = bytearray(sound)
        flipped[place] ^= 1 << int(rng.integers(8))
        for damaged in (sound[:place], bytes(flipped)):
            (tmp_path / "damaged").write_bytes(damaged)
            with pytest.raises(FormatError):
                convexbn.load(tmp_path / "damaged")
