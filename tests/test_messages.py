"""What a user is told: parameters that are not used, names of tasks and scores, refusals that say what is valid."""

import json
import warnings

import numpy as np
import pytest

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor
from convexbn.cli import main

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 3)).round(4)
COUNTS = np.round(np.exp(1 + X[:, 0])).astype(int)
WORDS = np.where(X[:, 1] > 0, "red", "blue, dark")


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    cells = zip(X.tolist(), COUNTS, WORDS, range(60), strict=True)
    lines = [f'{",".join(map(str, row))},{count},"{word}",row {i}' for row, count, word, i in cells]
    path.write_text("\n".join(["a,b,c,count,word,id", *lines]) + "\n")
    return path


@pytest.fixture
def data(tmp_path):
    """Files of one target and of another."""

    def write(name, y):
        path = tmp_path / f"{name}.csv"
        quoted = [f'"{value}"' if isinstance(value, str) else str(value) for value in y.tolist()]
        lines = [f"{','.join(map(str, row))},{value}" for row, value in zip(X.tolist(), quoted, strict=True)]
        path.write_text("\n".join([f"a,b,c,{name}", *lines]) + "\n")
        return str(path)

    return write


def refused(capsys, *arguments):
    assert main(list(map(str, arguments))) == 1
    return capsys.readouterr().err


# -- estimators --


@pytest.mark.parametrize(
    ("activation", "settings", "told"),
    [
        ("relu", {"gates": "data"}, "'relu' does not use gates: leave the default"),
        ("relu", {"gates": np.eye(3)}, "'relu' does not use gates:"),
        ("relu", {"gates": "whitened", "solver": "conic"}, "'relu' does not use gates, solver:"),
        ("gated", {"width": 5, "n_starts": 2}, "'gated' does not use width, n_starts:"),
        ("relu", {"n_gates": 7}, None),
        ("relu", {"width": 5, "n_starts": 2}, None),
        ("gated", {"gates": np.eye(3), "solver": "proximal"}, None),
    ],
)
def test_parameters_that_are_not_used_are_one_warning(activation, settings, told):
    few = X[:4] if activation == "relu" else X
    model = ConvexBNRegressor(activation=activation, tol=1e-2, weight_decay=1.0, **settings)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(few, few[:, 0])
    messages = [str(warning.message) for warning in found]
    assert len(messages) == (told is not None) and all(told in message for message in messages)
    assert all(warning.filename == __file__ for warning in found)


def test_messages_of_parameters_are_sorted():
    with pytest.raises(ValueError, match=r"\{'auto', 'conic', 'group_newton', 'proximal', 'subspace'\}"):
        ConvexBNClassifier(solver="best").fit(X, WORDS)
    with pytest.raises(ValueError, match=r"\{'auto', 'cross_entropy', 'logistic', 'squared', 'squared_hinge'\}"):
        ConvexBNClassifierCV(loss="huber").fit(X, WORDS)


@pytest.mark.parametrize("kind", [ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor])
def test_an_unknown_keyword_names_the_public_class(kind):
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\.__init__\(\) got an unexpected keyword argument 'alpha'"):
        kind(alpha=1)


@pytest.mark.parametrize("name", ["m.pkl", "m.JOBLIB", "m.pt", "m.onnx", "m.csv"])
def test_a_name_of_another_kind_of_file_is_refused(name, tmp_path):
    model = ConvexBNRegressor(n_gates=5, random_state=0).fit(X, X[:, 0])
    with pytest.raises(ValueError, match=r"is not written: models are safetensors files.*end in \.safetensors"):
        model.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    for other in ("m", "m.safetensors", "m.v2"):
        model.save(tmp_path / other)
        assert convexbn.load(tmp_path / other).score(X, X[:, 0]) == model.score(X, X[:, 0])


def test_public_names_of_nn_alone_are_completed():
    assert dir(convexbn.nn) == sorted(convexbn.nn.__all__)


# -- command line --


def test_task_and_score_are_named(data, tmp_path, capsys):
    counts, words, out = data("count", COUNTS), data("word", WORDS), str(tmp_path / "m.safetensors")
    for file, target, task, told in (
        (counts, "count", "regression", "regression of count (R^2)"),
        (words, "word", "classification", "classification of word, 2 classes (accuracy)"),
    ):
        fit = ["fit", file, "--target", target, "--task", task, "--out", out]
        assert main(fit) == 0 and f"\n{told}: train score " in capsys.readouterr().out
        assert main([*fit, "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["task"] == task
        assert result["measure"] == told[told.index("(") + 1 : -1]
        assert main(["report", out, file, "--out", str(tmp_path / "page.html")]) == 0
        assert told in (tmp_path / "page.html").read_text()
        capsys.readouterr()
        assert main(["path", file, "--target", target, "--task", task, "--weight-decays", "5,1"]) == 0
        assert f"best: {told}   the first" in capsys.readouterr().out
        assert main(["path", file, "--target", target, "--task", task, "--weight-decays", "5", "--json"]) == 0
        point = json.loads(capsys.readouterr().out)
        assert (point["task"], point["measure"]) == (task, result["measure"])


def test_few_members_of_a_class_name_the_task(data, tmp_path, capsys):
    skewed = np.where(np.arange(60) == 7, 9, np.arange(60) % 5)
    fit = ["fit", data("count", skewed), "--target", "count", "--out", tmp_path / "m", "--test-size", "0.25"]
    sentence = refused(capsys, *fit)
    assert "the smallest of which, 9, has 1: give --task regression if the target is a number" in sentence
    assert main(list(map(str, [*fit, "--task", "regression"]))) == 0
    fit[1], fit[3] = data("word", np.where(np.arange(60) == 7, "one", WORDS)), "word"
    capsys.readouterr()
    sentence = refused(capsys, *fit)
    assert "'one', has 1: hold out another share or none" in sentence and "--task" not in sentence


def test_options_that_do_not_fit(data, tmp_path, capsys):
    counts, words, out = data("count", COUNTS), data("word", WORDS), ["--out", tmp_path / "m"]
    of_words = ["fit", words, "--target", "word", *out]
    for arguments, told in (
        ([*of_words, "--activation", "relu", "--gates", "data"], "--gates is for --activation gated"),
        ([*of_words, "--width", "5"], "--width is for --activation relu"),
        ([*of_words, "--loss", "huber"], "--loss huber is for regression, and this is classification: choose among"),
        (
            ["fit", counts, "--target", "count", "--task", "regression", "--loss", "logistic", *out],
            "is for classification",
        ),
        ([*of_words, "--task", "regression"], "regression is of numbers, and the target holds text such as"),
        (["fit", words, "--target", "word", "--out", tmp_path / "m.pkl"], "let the name end in .safetensors"),
        (["report", tmp_path / "no.safetensors", words], "there is no model"),
        (["predict", tmp_path / "no.safetensors", words], "name the file that fit or path wrote"),
    ):
        assert told in refused(capsys, *arguments)
    for option, value, told in (
        ("--rank", "abc", "'abc' is not a number of directions such as 50, or a share such as 0.95"),
        ("--weight-decay", "high", "'high' is not a number or auto"),
        ("--regions", "some", "'some' is not a number of regions or all"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", words, "--out", "m", option, value])
        assert told in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv", ".csv"]


def test_columns_are_chosen_or_dropped_and_the_model_knows_them(table, tmp_path, capsys):
    out = str(tmp_path / "m.safetensors")
    fit = ["fit", str(table), "--target", "count", "--task", "regression", "--out", out]
    assert "column 'word' holds the text" in (sentence := refused(capsys, *fit, "--strict")) and "(--drop)" in sentence
    for options, names in (
        (["--drop", "word,id"], ["a", "b", "c"]),
        (["--columns", "c,a"], ["c", "a"]),
        (["--columns", "c,a,b", "--drop", "a"], ["c", "b"]),
    ):
        assert main([*fit, *options]) == 0
        assert convexbn.load(out).source_["feature_names"] == names
        capsys.readouterr()
        assert main(["predict", out, str(table)]) == 0
        found = [float(line) for line in capsys.readouterr().out.splitlines()[1:]]
        assert np.array_equal(found, convexbn.load(out).predict(X[:, ["abc".index(name) for name in names]]))
        assert main(["certify", out, str(table), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["training_rows"] is True
    assert "has no column 'z'" in refused(capsys, *fit, "--drop", "z")
    assert "no feature column is left" in refused(capsys, *fit, "--columns", "a", "--drop", "a")
    for option in ("--columns", "--drop"):
        assert f"{option} is for files" in refused(capsys, "fit", "digits", "--out", out, option, "a")
    archive = tmp_path / "t.npz"
    np.savez(archive, X=X, y=COUNTS.astype(float))
    assert main(["fit", str(archive), "--target", "y", "--out", out, "--drop", "x1"]) == 0
    assert convexbn.load(out).source_["feature_names"] == ["x0", "x2"]
    assert main(["path", str(table), "--target", "word", "--drop", "id", "--weight-decays", "5"]) == 0


def test_predictions_with_names_probabilities_and_digits(table, data, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert main(["fit", data("word", WORDS), "--target", "word", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["predict", str(out), str(table), "--id", "id", "--proba", "--digits", "4"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == 'id,prediction,"probability of blue, dark",probability of red'
    model = convexbn.load(out)
    for i, (line, label, p) in enumerate(zip(lines, model.predict(X), model.predict_proba(X), strict=True)):
        name = '"blue, dark"' if label == "blue, dark" else label
        assert line == f"row {i},{name},{p[0]:.4g},{p[1]:.4g}"
    assert main(["fit", data("count", COUNTS), "--target", "count", "--task", "regression", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["predict", str(out), str(table), "--digits", "3"]) == 0
    found = capsys.readouterr().out.splitlines()[1:]
    assert found == [f"{value:.3g}" for value in convexbn.load(out).predict(X)]
    for options, told in (
        (["--proba"], "--proba is for classes, and this model is of regression"),
        (["--digits", "0"], "--digits must be at least 1"),
        (["--id", "name"], "has no column 'name'"),
    ):
        assert told in refused(capsys, "predict", out, table, *options)
    assert "--id is for files, and digits is none" in refused(capsys, "predict", out, "digits", "--id", "id")
