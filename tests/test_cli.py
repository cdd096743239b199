"""The command line: fit, predict and certify on every kind of data, its errors, its signals and its manners."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import polars
import pytest

import convexbn
from convexbn import cli
from convexbn.cli import fit
from convexbn.files import model_file
from convexbn.files.datasets import fashion_mnist
from processes import ended_by

KEYS = ["objective", "lower_bound", "relative_gap", "status", "scope", "train_score", "test_score", "n_iter"]
KEYS += ["seconds", "n_neurons", "n_gates_active", "rank", "task", "measure"]
RNG = np.random.default_rng(5)
X = RNG.standard_normal((90, 3)).round(6)
NUMBERS = (X[:, 0] ** 2 + np.sin(X[:, 1]) - 1).round(6)
WORDS = np.array(["red", "green", "blue, dark"])[
    np.searchsorted(np.quantile(X[:, 0] * X[:, 1], [0.3, 0.6]), X[:, 0] * X[:, 1])
]
FASHION = "/usr/share/datasets/fashion-mnist"


def quoted(cell):
    return f'"{cell}"' if isinstance(cell, str) and "," in cell else str(cell)


def write_csv(path, **targets):
    columns = dict(zip(("a", "b c", "Ä"), X.T.tolist(), strict=True)) | {k: v.tolist() for k, v in targets.items()}
    lines = [",".join(columns), *(",".join(map(quoted, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fit_json(capsys, *arguments):
    assert run("fit", *arguments, "--n-gates", 20, "--json") == 0
    return last_json(capsys)


def refused(capsys, *arguments, match=""):
    """The command ends with code 1 and one sentence; nothing is written to stdout."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("convexbn: error: ")
    sentence = captured.err.removeprefix("convexbn: error: ")
    assert sentence.count("\n") == 1 and sentence.endswith("\n"), sentence
    assert re.search(match, sentence), sentence
    return sentence


def command(*arguments, environment=None, **options):
    options = {"capture_output": True, "text": True, "timeout": 120, **options}
    if options.get("stdout") is not None or options.get("stderr") is not None:
        options.pop("capture_output")
    environment = os.environ | (environment or {})
    return subprocess.run([sys.executable, "-m", "convexbn", *map(str, arguments)], env=environment, **options)


# -- digits --


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    done = command("fit", "digits", "--out", folder / "digits.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "digits.safetensors", done


def test_digits_are_certified_and_generalise(digits):
    path, done = digits
    result = json.loads(done.stdout)
    assert list(result) == KEYS and done.stdout.count("\n") == 1
    assert result["status"] == "CERTIFIED" and result["relative_gap"] <= 1e-6 and result["scope"] == "these gates"
    assert result["test_score"] >= 0.96 and result["train_score"] > result["test_score"] - 0.02
    model = convexbn.load(path)
    assert result["objective"] == model.certificate_.objective and result["n_neurons"] == model.network_.n_neurons
    assert result["rank"] == model.rank_ and result["n_gates_active"] == len(set(model.network_.gate_index))
    assert 0 < result["seconds"] < 60 and result["n_iter"] == model.n_iter_
    assert done.stderr.startswith("iteration 1 ") and "\r" not in done.stderr and "\x1b" not in done.stderr


def test_certify_rebuilds_the_training_rows_of_digits(digits, capsys):
    path, done = digits
    assert run("certify", path, "digits") == 0
    text = capsys.readouterr().out
    assert text.startswith("CERTIFIED, recomputed on 1437 rows: the rows it was trained on.\n")
    assert run("certify", path, "digits", "--json") == 0
    result, trained = last_json(capsys), json.loads(done.stdout)
    assert result["training_rows"] is True and result["status"] == "CERTIFIED"
    for name in ("objective", "lower_bound"):
        assert result[name] == pytest.approx(trained[name], rel=1e-12)


def test_the_split_is_stratified_and_seeded(digits, tmp_path, capsys):
    path, _ = digits
    source = convexbn.load(path).source_
    assert source["data"] == "digits" and source["test_size"] == 0.2 and source["seed"] == 0
    marks = []
    for seed in (0, 1):
        result = fit_json(capsys, "digits", "--out", tmp_path / "m", "--max-iter", 1, "--seed", seed)
        assert result["status"] == "GAP_OPEN" and result["test_score"] is not None
        marks.append(convexbn.load(tmp_path / "m").fingerprint_)
        assert run("certify", tmp_path / "m", "digits", "--json") == 0
        assert last_json(capsys)["training_rows"] is True
    assert marks[0] == convexbn.load(path).fingerprint_ != marks[1]


def test_predict_gives_a_line_a_row(digits, tmp_path, capsys):
    path, _ = digits
    assert run("predict", path, "digits") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "prediction" and len(lines) == 1798 and set(lines[1:]) == set("0123456789")
    assert run("predict", path, "digits", "--out", tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_text().splitlines() == lines and capsys.readouterr().out == ""


# -- files --


def test_csv_with_classes_of_text(tmp_path, capsys):
    data, out = write_csv(tmp_path / "some data.csv", colour=WORDS), tmp_path / "modèle ß.safetensors"
    result = fit_json(capsys, data, "--target", "colour", "--out", out)
    assert list(result) == KEYS and result["test_score"] is None and result["status"] == "CERTIFIED"
    model = convexbn.load(out)
    assert model.classes_.tolist() == sorted({*WORDS}) and model.score(X, WORDS) == result["train_score"]
    assert run("predict", out, data) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ['"blue, dark"' if word == "blue, dark" else word for word in model.predict(X)]
    assert run("certify", out, data, "--json") == 0
    assert last_json(capsys)["training_rows"] is True


def test_csv_with_integer_classes_and_a_test_share(tmp_path, capsys):
    labels = (WORDS == "red").astype(int)
    data = write_csv(tmp_path / "data.csv", label=labels)
    result = fit_json(capsys, data, "--target", "label", "--out", tmp_path / "m", "--test-size", 0.3)
    model = convexbn.load(tmp_path / "m")
    assert model.classes_.tolist() == [0, 1] and result["test_score"] is not None
    assert model.network_.n_effective == 63
    assert run("certify", tmp_path / "m", data, "--json") == 0
    found = last_json(capsys)
    assert found["training_rows"] is True
    assert found["objective"] == pytest.approx(result["objective"], rel=1e-12)


def test_csv_regression_and_other_rows(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    result = fit_json(capsys, data, "--target", "y", "--out", tmp_path / "m", "--gates", "whitened")
    assert isinstance(convexbn.load(tmp_path / "m"), convexbn.ConvexBNRegressor) and result["train_score"] > 0.5
    assert run("predict", tmp_path / "m", data, "--out", tmp_path / "p.csv") == 0
    found = [float(line) for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    np.testing.assert_array_equal(found, convexbn.load(tmp_path / "m").predict(X))
    capsys.readouterr()
    other = write_csv(tmp_path / "other.csv", y=NUMBERS + 1)
    assert run("certify", tmp_path / "m", other) == 0
    assert "OTHER rows than it was trained on" in capsys.readouterr().out
    assert run("certify", tmp_path / "m", other, "--json") == 0
    other_result = last_json(capsys)
    assert other_result["training_rows"] is False and other_result["status"] == "GAP_OPEN"


def test_task_may_be_forced(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", label=(WORDS == "red").astype(int))
    fit_json(capsys, data, "--target", "label", "--out", tmp_path / "m", "--task", "regression")
    assert isinstance(convexbn.load(tmp_path / "m"), convexbn.ConvexBNRegressor)
    refused(capsys, "fit", write_csv(tmp_path / "t.csv", t=WORDS), "--target", "t", "--out", tmp_path / "n", "--task",
            "regression", match="convert|number")  # fmt: skip
    assert not (tmp_path / "n").exists()


def test_columns_are_found_by_name(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    fit_json(capsys, data, "--target", "y", "--out", tmp_path / "m")
    table = polars.read_csv(data).select("Ä", "y", "b c", "a", extra=polars.lit(3))
    table.write_csv(tmp_path / "shuffled.csv")
    assert run("predict", tmp_path / "m", tmp_path / "shuffled.csv") == 0
    found = [float(line) for line in capsys.readouterr().out.splitlines()[1:]]
    np.testing.assert_array_equal(found, convexbn.load(tmp_path / "m").predict(X))
    table.drop("a").write_csv(tmp_path / "less.csv")
    refused(capsys, "predict", tmp_path / "m", tmp_path / "less.csv", match="no column 'a'")


def test_npz_and_parquet(tmp_path, capsys):
    np.savez(tmp_path / "data.npz", X=X, y=NUMBERS, words=WORDS)
    frame = polars.DataFrame(X, schema=["a", "b", "c"]).with_columns(y=polars.Series(NUMBERS), w=polars.Series(WORDS))
    frame.drop("w").write_parquet(tmp_path / "data.parquet")
    results = []
    for name in ("data.npz", "data.parquet"):
        results.append(fit_json(capsys, tmp_path / name, "--target", "y", "--out", tmp_path / "m"))
        assert run("certify", tmp_path / "m", tmp_path / name, "--json") == 0
        assert last_json(capsys)["training_rows"] is True
        assert run("predict", tmp_path / "m", tmp_path / name) == 0
        assert len(capsys.readouterr().out.splitlines()) == 91
    assert results[0]["objective"] == results[1]["objective"]
    fit_json(capsys, tmp_path / "data.npz", "--target", "words", "--out", tmp_path / "m")
    assert convexbn.load(tmp_path / "m").classes_.tolist() == sorted({*WORDS})
    frame.drop("y").write_parquet(tmp_path / "words.parquet")
    fit_json(capsys, tmp_path / "words.parquet", "--target", "w", "--out", tmp_path / "m")
    assert convexbn.load(tmp_path / "m").classes_.tolist() == sorted({*WORDS})


def test_relu_through_the_command_line(tmp_path, capsys):
    np.savez(tmp_path / "small.npz", X=RNG.standard_normal((8, 9)), y=np.array(list("abcabcab")))
    options = ("--target", "y", "--activation", "relu", "--loss", "cross_entropy")
    result = fit_json(capsys, tmp_path / "small.npz", *options, "--out", tmp_path / "m")
    assert list(result) == KEYS and result["scope"] == "all patterns" and result["n_gates_active"] is None
    assert run("certify", tmp_path / "m", tmp_path / "small.npz", "--json") == 0
    assert last_json(capsys)["status"] == "CERTIFIED"
    np.savez(tmp_path / "large.npz", X=X, y=WORDS)
    options += ("--weight-decay", 1, "--time-limit", 3)
    result = fit_json(capsys, tmp_path / "large.npz", *options, "--out", tmp_path / "n")
    assert result["scope"] == "all patterns" and result["status"] in ("CERTIFIED", "RESTRICTED", "GAP_OPEN")
    assert 0 <= result["relative_gap"] < 0.5
    assert run("certify", tmp_path / "n", tmp_path / "large.npz", "--json") == 0
    assert last_json(capsys)["objective"] == pytest.approx(result["objective"], rel=1e-9)


def test_losses_through_the_command_line(tmp_path, capsys):
    for target, options in ((NUMBERS, ("--loss", "huber", "--huber-delta", 0.3)), (WORDS, ("--loss", "squared_hinge"))):
        data = write_csv(tmp_path / "data.csv", y=target)
        result = fit_json(capsys, data, "--target", "y", *options, "--out", tmp_path / "m")
        model = convexbn.load(tmp_path / "m")
        assert model.loss == options[1] and getattr(model, "huber_delta", 0.3) == 0.3
        assert result["status"] == "CERTIFIED"
        assert run("certify", tmp_path / "m", data, "--json") == 0
        assert last_json(capsys)["objective"] == pytest.approx(result["objective"], rel=1e-12)
    wrong = ("--target", "y", "--loss", "huber", "--huber-delta", 1, "--out", tmp_path / "n")
    refused(capsys, "fit", data, *wrong, match="which is for regression")


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ([], {"linear": True, "fit_intercept": True, "standardize": True, "spectral_filter": "auto"}),
        (["--no-linear"], {"linear": False}),
        (["--no-intercept"], {"fit_intercept": False}),
        (["--no-standardize"], {"standardize": False}),
        (["--spectral-filter", "none"], {"spectral_filter": None}),
        (["--spectral-filter", "0.1"], {"spectral_filter": 0.1}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_program_is_chosen_by_options(options, parameters, tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    result = fit_json(capsys, data, "--target", "y", "--out", tmp_path / "m", "--weight-decay", 1, *options)
    assert result["status"] == "CERTIFIED"
    model = convexbn.load(tmp_path / "m")
    assert parameters.items() <= model.get_params().items()
    assert run("certify", tmp_path / "m", data, "--json") == 0
    found = last_json(capsys)
    assert found["training_rows"] is True and found["status"] == "CERTIFIED"
    assert found["spectral_filter"] == model._tau == (parameters["spectral_filter"] if len(options) == 2 else 0.3)


@pytest.mark.skipif(not os.path.isdir(FASHION), reason="the Fashion-MNIST files are not on this machine")
def test_fashion_mnist_with_its_official_test_set(tmp_path, capsys):
    options = ("--rank", 20, "--max-iter", 3, "--out", tmp_path / "m")
    result = fit_json(capsys, "fashion-mnist", *options)
    assert list(result) == KEYS and result["status"] == "GAP_OPEN" and result["rank"] == 20
    assert result["test_score"] > 0.5
    model = convexbn.load(tmp_path / "m")
    assert model.network_.n_effective == 60_000 and model.source_["test_size"] == 0
    test = fashion_mnist()
    assert model.score(test.X_test, test.y_test) == pytest.approx(result["test_score"])


def test_fashion_mnist_names_a_missing_folder(tmp_path, capsys):
    refused(capsys, "fit", "fashion-mnist", "--data-home", tmp_path, "--out", tmp_path / "m", match="data-home")
    assert not (tmp_path / "m").exists()


# -- output --


def test_the_summary_says_what_is_certified(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    assert run("fit", data, "--target", "y", "--out", tmp_path / "m", "--n-gates", 20) == 0
    out = capsys.readouterr().out
    assert out.startswith("CERTIFIED (these gates): Objective ") and "Frobenius norm per gate" in out
    assert f"saved to {tmp_path / 'm'}" in out and "test score none held out" in out


def test_an_unknown_gap_is_not_printed_as_zero():
    result = dict.fromkeys(KEYS) | {"status": "NUMERICAL", "scope": "these gates", "n_iter": 3, "seconds": 0.1}
    result |= {"n_neurons": 0, "rank": 2}
    for objective in (1.5, None):
        text = fit._summary(result | {"objective": objective, "train_score": objective}, "No valid bound.", "m")
        assert "none held out" in text and "test score unknown" in fit._summary(result, "", "m", held_out=True)
        assert "relative gap 0" not in text and text.startswith("NUMERICAL")


def test_an_open_gap_is_reported_and_saved(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    options = ("--target", "y", "--out", tmp_path / "m", "--max-iter", 1, "--weight-decay", 1e-3)
    assert run("fit", data, *options) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("GAP_OPEN") and "raise max_iter" in captured.out
    assert "Warning" not in captured.err and (tmp_path / "m").exists()


# -- errors: one sentence, code 1, nothing written --


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a,y\n1,2\n,3\n", "line 3.*'a'"),
        ("a,y\n1,2\n1,2,3\n", "line 3.*cells"),
        ("a,y\n1,2\na,y\n", "line 3.*header"),
        ("a,y\n1,2\n1e400,3\n", "line 3.*finite"),
        ("a,y\n1,2\nx,3\n", "line 3.*'x'"),
        ("a,y\n1,2\n1,nan\n", "line 3.*finite"),
        ("a,b\n1,2\n2,3\n", "no column 'y'"),
        ("", "empty"),
        ("a,y\n", "row|sample"),
        ("a,y\n1,2\n", "1 sample|minimum"),
        ("a,y\n1,2\n1,3\n1,4\n", "all features are constant"),
        ("y\n1\n2\n", "feature"),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(content, match, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text(content)
    fit = ["fit", tmp_path / "bad.csv", "--target", "y", "--out", tmp_path / "m"]
    refused(capsys, *fit, "--strict", match=match)
    if "'" not in match or "no column" in match:  # text and missing cells are not refused otherwise
        refused(capsys, *fit, match=match)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_good_tables_of_other_dialects(tmp_path, capsys):
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfa;b;y\r\n1;2;3\r\n2;1;4\r\n5;5;1\r\n")
    result = fit_json(capsys, tmp_path / "d.csv", "--target", "y", "--out", tmp_path / "m")
    assert result["rank"] == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--weight-decay", "-1"], "--weight-decay must be"),
        (["--weight-decay", "nan"], "--weight-decay must be"),
        (["--n-gates", "0"], "--n-gates must be"),
        (["--n-starts", "0"], "--n-starts must be"),
        (["--n-gates", "1000000000000"], "bytes"),
        (["--rank", "0"], "rank"),
        (["--rank", "1.5"], "rank"),
        (["--tol", "-1"], "tol"),
        (["--max-iter", "-1"], "--max-iter must be"),
        (["--time-limit", "-1"], "--time-limit must be"),
        (["--seed", "-1"], "seed|random_state"),
        (["--test-size", "1"], "test-size"),
        (["--test-size", "-0.1"], "test-size"),
        (["--test-size", "nan"], "test-size"),
        (["--loss", "logistic"], "loss"),
        (["--loss", "huber", "--huber-delta", "0"], "--huber-delta must be"),
        (["--huber-delta", "2"], "--huber-delta is for --loss huber"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_sentence(options, match, tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    refused(capsys, "fit", data, "--target", "y", "--out", tmp_path / "m", *options, match=match)
    assert not (tmp_path / "m").exists()


def test_classes_too_small_to_split_are_named(tmp_path, capsys):
    words = WORDS.copy()
    words[words == "green"] = "red"
    words[7] = "alone"
    data = write_csv(tmp_path / "data.csv", t=words)
    refused(capsys, "fit", data, "--target", "t", "--out", tmp_path / "m", "--test-size", 0.2, match="class")


def test_targets_and_names_are_checked(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    refused(capsys, "fit", data, "--out", tmp_path / "m", match="--target is required")
    refused(capsys, "fit", data, "--target", "z", "--out", tmp_path / "m", match="'z'")
    refused(capsys, "fit", "digits", "--target", "y", "--out", tmp_path / "m", match="--target is for files")
    refused(capsys, "fit", "didgits", "--out", tmp_path / "m", match="nor one of digits, fashion-mnist, cifar-10")
    refused(capsys, "fit", tmp_path, "--target", "y", "--out", tmp_path / "m", match="kind of file|regular")
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


@pytest.mark.parametrize("out", ["nowhere/m", ".", "data.csv/m"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(out, tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    refused(capsys, "fit", "no data", "--target", "y", "--out", tmp_path / out, match="--out")
    refused(capsys, "predict", "no model", data, "--out", tmp_path / out, match="--out")


def test_memory_that_ran_out_has_words(tmp_path, capsys, monkeypatch):
    def allocate(*_):
        raise MemoryError  # as Python's own, without an argument

    monkeypatch.setattr("convexbn.cli.data_sources.read_columns", allocate)
    refused(capsys, "fit", "data.csv", "--out", tmp_path / "m", match="out of memory: raise the limit")


def test_models_that_are_none_are_refused(digits, tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", y=NUMBERS)
    (tmp_path / "html").write_text("<!doctype html>")
    for verb in ("predict", "certify"):
        refused(capsys, verb, tmp_path / "nothing", data, match="nothing")
        refused(capsys, verb, tmp_path / "html", data, match="HTML")
        refused(capsys, verb, tmp_path, data, match=re.escape(str(tmp_path)))
        refused(capsys, verb, digits[0], data, *(["--target", "y"] if verb == "certify" else []), match="feature")
    refused(capsys, "certify", digits[0], data, match="--target is required")


def test_a_model_and_data_of_other_classes(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", t=WORDS)
    fit_json(capsys, data, "--target", "t", "--out", tmp_path / "m")
    other = write_csv(tmp_path / "other.csv", t=np.char.add(WORDS, "ish"))
    refused(capsys, "certify", tmp_path / "m", other, match="not seen in training")
    numbers = write_csv(tmp_path / "numbers.csv", t=NUMBERS)
    refused(capsys, "certify", tmp_path / "m", numbers, match="not seen in training|class")


@pytest.mark.parametrize(
    "source", [{"data": "digits", "test_size": 0.2}, {"data": "digits", "test_size": "a", "seed": [], "task": 3}]
)
def test_a_tampered_split_is_refused_and_no_traceback(source, digits, tmp_path, capsys):
    arrays, header = model_file.read(digits[0])
    model_file.write(tmp_path / "m", arrays, header | {"source": source})
    refused(capsys, "certify", tmp_path / "m", "digits", match="source")


def test_usage_errors_have_code_2(capsys):
    for arguments in ([], ["fit"], ["fit", "digits"], ["fit", "digits", "--out", "m", "--rank", "x"], ["train"]):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        run("--version")
    assert end.value.code == 0 and capsys.readouterr().out == f"convexbn {convexbn.__version__}\n"


# -- signals --


def long_fit(folder, **options):
    """A fit that goes on for minutes, after its first line of progress."""
    np.savez(folder / "long.npz", X=np.random.default_rng(0).standard_normal((7000, 30)), y=np.arange(7000.0) ** 0.5)
    arguments = ["fit", folder / "long.npz", "--target", "y", "--out", folder / "model", "--weight-decay", "1e-6"]
    arguments += ["--tol", "0", "--max-iter", str(10**9)]
    line = [sys.executable, "-m", "convexbn", *map(str, arguments)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    assert process.stderr.readline().startswith("iteration 1 ")
    return process


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_a_fit_within_a_second(number, code, word, tmp_path):
    with long_fit(tmp_path) as process:
        out, err, seconds = ended_by(process, number)
    assert seconds < 1
    assert process.returncode == code and out == ""
    assert f"convexbn: {word}: nothing was written." in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["long.npz"]


def test_the_handler_of_the_caller_is_back_afterwards(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    refused(capsys, "fit", "nothing", "--out", tmp_path / "m")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# -- streams and environments --


def small(folder):
    data = write_csv(folder / "data.csv", y=NUMBERS)
    return ["fit", data, "--target", "y", "--out", str(folder / "m"), "--n-gates", "20"]


def shell(redirection, arguments, **options):
    line = f'exec "$0" -m convexbn "$@" {redirection}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.parametrize("redirection", [">&-", "2>&-"])
def test_closed_streams_do_not_stop_a_fit(redirection, tmp_path):
    done = shell(redirection, small(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert convexbn.load(tmp_path / "m").certificate_.status == "CERTIFIED"


def test_a_full_device_is_an_error_in_one_sentence(digits):
    done = shell(">/dev/full", ["predict", str(digits[0]), "digits"])
    assert done.returncode == 1 and done.stderr.startswith("convexbn: error: ") and done.stderr.count("\n") == 1


def test_a_reader_that_has_enough_is_no_error(digits):
    done = subprocess.run(
        ["sh", "-c", '"$0" -m convexbn predict "$1" digits | head -n 1', sys.executable, str(digits[0])],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "prediction\n" and done.stderr == ""


def test_a_closed_pipe_of_progress_does_not_lose_the_fit(tmp_path):
    """Nobody reads the progress: the fit goes on, and code 0 means that the model is there."""
    reader, writer = os.pipe()
    os.close(reader)
    done = command(*small(tmp_path), stderr=writer, stdout=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode == 0) == (tmp_path / "m").exists()
    assert done.returncode == 0


@pytest.mark.parametrize(
    "environment",
    [{"LANG": "C", "LC_ALL": "C", "COLUMNS": "20"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}],
    ids=["C", "POSIX"],
)
def test_plain_text_in_every_environment(environment, tmp_path):
    arguments = small(tmp_path)
    arguments[arguments.index("--out") + 1] = str(tmp_path / "Modell ß ü.safetensors")
    done = command(*arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() or "ß ü" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "Modell ß ü.safetensors").exists()
    assert "usage: convexbn" in command("--help", environment=environment).stdout


def on_terminal(arguments, environment):
    """Run on a pseudo-terminal; returns the code and all that was drawn."""
    import pty

    primary, secondary = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "convexbn", *arguments],
        stdin=secondary, stdout=secondary, stderr=secondary, env=os.environ | environment,
    ) as process:  # fmt: skip
        os.close(secondary)
        drawn = b""
        while True:
            try:
                chunk = os.read(primary, 4096)
            except OSError:
                break
            drawn += chunk
        process.wait(timeout=60)
    os.close(primary)
    return process.returncode, drawn.decode()


@pytest.mark.parametrize(
    "environment", [{"TERM": "xterm"}, {"TERM": "xterm", "NO_COLOR": "1"}], ids=["xterm", "NO_COLOR"]
)
def test_on_a_terminal_the_last_line_is_the_object(environment, tmp_path):
    code, drawn = on_terminal([*small(tmp_path), "--json"], environment)
    assert code == 0 and "Traceback" not in drawn
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).strip().splitlines()[-1]
    assert list(json.loads(last)) == KEYS
    if "NO_COLOR" in environment:
        assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", drawn)


def test_the_installed_command_is_this_one():
    script = os.path.join(os.path.dirname(sys.executable), "convexbn")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"convexbn {convexbn.__version__}\n"
