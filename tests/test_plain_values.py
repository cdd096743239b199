"""Dates, text and missing values among numbers are refused by name at every door; what fit takes is saved."""

import datetime as dt

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import convexbn
import convexbn.nn
from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor, ConvexBNRegressorCV, fit_path
from convexbn.cli import main
from convexbn.estimators.plain_values import plain_targets

N = 40
X = np.random.default_rng(0).normal(size=(N, 2))
Y = X[:, 0]
DAYS = [dt.date(2024, 1, 1) + dt.timedelta(days=i) for i in range(N)]
SPANS = [dt.timedelta(hours=i) for i in range(N)]
FRAMES = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "pyarrow": pa.table}


def regressor():
    return ConvexBNRegressor(n_gates=5, gates="data", weight_decay=1.0, random_state=0)


def doors(model):
    """Every way in which rows come to an estimator and to a module."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    module(torch.randn(8, 3))
    return {
        "fit": lambda X: regressor().fit(X, Y),
        "fit_path": lambda X: fit_path(regressor(), X, Y, weight_decays=[1.0]),
        "CV": lambda X: ConvexBNRegressorCV(weight_decays=[1.0], n_gates=5, gates="data").fit(X, Y),
        "certify": lambda X: model.certify(X, Y),
        "predict": lambda X: model.predict(X),
        "score": lambda X: model.score(X, Y),
        "transform": lambda X: model.transform(X),
        "nn.certify": lambda X: convexbn.nn.certify(module, X, Y, loss="squared", weight_decay=1.0),
    }


@pytest.fixture(scope="module")
def model():
    return regressor().fit(pd.DataFrame(np.c_[X, Y], columns=["a", "b", "day"]), Y)


@pytest.mark.parametrize("door", ["fit", "fit_path", "CV", "certify", "predict", "score", "transform", "nn.certify"])
@pytest.mark.parametrize("kind", FRAMES)
def test_columns_that_are_no_numbers_are_refused_by_name(kind, door, model):
    columns = {"a": X[:, 0].tolist(), "b": X[:, 1].tolist()}
    for values in (DAYS, SPANS, [dt.datetime(2024, 1, 1)] * N, ["1.5"] * N):
        with pytest.raises((ValueError, TypeError), match="column 'day'"):
            doors(model)[door](FRAMES[kind]({**columns, "day": values}))


@pytest.mark.parametrize("door", ["fit", "fit_path", "CV", "predict", "nn.certify"])
@pytest.mark.parametrize("value", [None, pd.NA, DAYS[0], SPANS[0], "1.5", b"1"], ids=repr)
def test_arrays_and_lists_are_refused_with_the_place(value, door, model):
    values = np.c_[X, Y].astype(object)
    values[7, 1] = value
    for rows in (values, values.tolist()):
        with pytest.raises((ValueError, TypeError), match="X: row 7, column 1"):
            doors(model)[door](rows)
    with pytest.raises(TypeError, match="dates or durations"):
        doors(model)[door](np.full((N, 3), np.datetime64("2024-01-01")))
    with pytest.raises(TypeError, match=r"X\.collect\(\)"):
        doors(model)[door](pl.LazyFrame({"a": [1.0]}))


MISSING = {
    "list": lambda y: [None, *y[1:]],
    "nan": lambda y: [np.nan, *y[1:]],
    "object": lambda y: np.array([None, *y[1:]], dtype=object),
    "NA": lambda y: pd.Series([pd.NA, *y[1:]], dtype=object),
    "pandas": lambda y: pd.Series([None, *y[1:]]),
    "nullable": lambda y: pd.Series([None, *y[1:]]).convert_dtypes(),
    "polars": lambda y: pl.Series([None, *y[1:]]),
    "pyarrow": lambda y: pa.array([None, *y[1:]]),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_target_is_named_with_its_row(kind):
    labels = np.array(["n", "y"])[(Y > 0).astype(int)].tolist()
    for y, make in (
        (Y.tolist(), regressor),
        (labels, lambda: ConvexBNClassifier(n_gates=5, gates="data", weight_decay=1.0)),
    ):
        wrong = MISSING[kind](y)
        fitted = make().fit(X, y)
        for use in (make().fit, fitted.certify, fitted.score, fitted.fingerprint):
            with pytest.raises(ValueError, match="y: missing value at row 0"):
                use(X, wrong)
        with pytest.raises(ValueError, match="y: missing value at row 0"):
            fit_path(make(), X, y, weight_decays=[1.0], validation=(X, wrong))
    with pytest.raises(ValueError, match="y: missing value at row 0"):
        ConvexBNRegressorCV(weight_decays=[1.0]).fit(X, MISSING[kind](Y.tolist()))


@pytest.mark.parametrize("values", [DAYS, SPANS, ["1.5"] * N], ids=["dates", "durations", "text"])
@pytest.mark.parametrize("kind", [list, np.array, pd.Series, pl.Series, pa.array], ids=lambda kind: kind.__name__)
def test_regression_is_of_numbers(kind, values):
    for use in (regressor().fit, regressor().fit(X, Y).score):
        with pytest.raises(TypeError, match=r"^y"):
            use(X, kind(values))


WHICH = (Y > 0).astype(int)
LABELS = {
    "dates": np.array(["2024-01-01", "2025-01-01"], "M8[D]")[WHICH],
    "dates of pandas": pd.Series(pd.to_datetime(["2024-01-01", "2025-01-01"]))[WHICH],
    "dates as objects": [[dt.date(2024, 1, 1), dt.date(2025, 1, 1)][i] for i in WHICH],
    "dates of polars": pl.Series([[dt.date(2024, 1, 1), dt.date(2025, 1, 1)][i] for i in WHICH]),
    "durations": np.array([1, 2], "m8[s]")[WHICH],
    "nullable": pd.Series(WHICH, dtype="Int64"),
    "boolean": pd.Series(WHICH.astype(bool), dtype="boolean"),
    "beyond 2^53": pd.Series(WHICH + 2**53, dtype="Int64"),
    "objects": np.array([np.str_("ny"[i]) for i in WHICH], dtype=object),
    "arrow": pd.Series(np.array(["n", "y"])[WHICH], dtype="string[pyarrow]"),
    "category": pd.Series(np.array(["n", "y"])[WHICH]).astype("category"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_fit_takes_are_saved(kind, tmp_path):
    y = LABELS[kind]
    model = ConvexBNClassifier(n_gates=5, gates="data", weight_decay=1.0, random_state=0).fit(X, y)
    model.save(tmp_path / "m.safetensors")
    loaded = convexbn.load(tmp_path / "m.safetensors")
    assert len(model.classes_) == 2 and loaded.classes_.dtype == model.classes_.dtype
    assert loaded.predict(X).tolist() == model.predict(X).tolist()
    assert loaded.score(X, y) == np.mean(model.predict(X) == plain_targets(y, numeric=False)) > 0.9
    assert loaded.certify(X, y).objective == pytest.approx(model.certificate_.objective, rel=1e-9)
    chosen = ConvexBNClassifierCV(weight_decays=[1.0], n_gates=5, gates="data", cv=2, random_state=0).fit(X, y)
    assert chosen.score(X, y) > 0.9


@pytest.mark.parametrize("labels", [[(1, 2), 3], ["a", 1], [True, 2], [b"a", "b"]], ids=repr)
def test_labels_that_could_not_be_saved_are_refused_by_fit(labels):
    y = np.empty(N, dtype=object)
    y[:] = [labels[i] for i in WHICH]
    with pytest.raises(TypeError, match=r"^y"):
        ConvexBNClassifier().fit(X, y)


# -- files of torch --


def test_files_of_torch_are_read_alike_or_named(tmp_path, capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    rows = torch.randn(40, 2)
    net(rows)
    half = net.eval().to(torch.bfloat16)
    state = {name: value.contiguous() for name, value in half.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    save_file(state, tmp_path / "m.safetensors")
    torch.export.save(torch.export.export(half, (rows.bfloat16(),)), tmp_path / "m.pt2")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08\x12\x08convexbn" + bytes(100))
    table = tmp_path / "t.csv"
    table.write_text("a,b,y\n" + "".join(f"{a},{b},{a - b}\n" for a, b in rows.tolist()))
    question = [str(table), "--target", "y", "--loss", "MSELoss", "--optimizer-decay", "1e-3", "--time-limit", "1"]
    objectives = set()
    for name in ("m.pt", "m.safetensors", "m.pt2"):
        assert main(["certify", str(tmp_path / name), *question]) == 0
        objectives.add(capsys.readouterr().out.split("objective is ")[1].split(" (norms")[0])
    assert len(objectives) == 1
    for name, told in (("old.pt", "the format of torch before 1.6: save it again"), ("m.onnx", "an ONNX file")):
        assert main(["certify", str(tmp_path / name), *question]) == 1
        assert told in capsys.readouterr().err
