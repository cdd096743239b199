"""CSV and Parquet files as people have them: text, missing cells, decimal commas, old line ends, compressed."""

import bz2
import gzip
import json
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import convexbn
from convexbn.cli import main
from convexbn.estimators import table_columns
from convexbn.estimators.table_columns import TableColumns
from convexbn.files.model_file import FormatError
from convexbn.files.tables import Reading, TableError, read_table

RNG = np.random.default_rng(0)
N = 80


def frame():
    """Numbers, two and four categories, names, an empty column and a constant one; cells are missing."""
    age, town = RNG.normal(40, 12, N).round(2), RNG.choice(["Ulm", "Köln", "Bern, CH", "01"], N)
    sex = RNG.choice(["f", "m"], N)
    price = (200 + 3 * age + 50 * (town == "Ulm") + 20 * (sex == "m")).round(2) + 0.5
    table = pd.DataFrame({"name": [f"N{i} x" for i in range(N)], "age": age, "town": town, "sex": sex, "void": None})
    table = table.assign(one="k", price=price)
    return table.assign(town=table.town.where(RNG.random(N) > 0.1), age=table.age.where(RNG.random(N) > 0.1))


TABLE = frame()
FIT = ["--target", "price", "--n-gates", "5", "--weight-decay", "30"]


def run(capsys, *arguments, code=0):
    """Standard output and the lines of standard error that tell what was done to the data."""
    assert main(list(map(str, arguments))) == code
    captured = capsys.readouterr()
    return captured.out, [line for line in captured.err.splitlines() if line.startswith("convexbn: ")]


def csv(path, table=TABLE, **settings):
    path.write_bytes(table.to_csv(index=False, **settings).encode())
    return path


def lenient(path, *arguments, **reading):
    return read_table(path, *arguments, reading=Reading(strict=False, **reading))


def assert_equal_tables(one, other):
    assert set(one.names) == set(other.names) and set(one.texts) == set(other.texts)
    for name in (*one.names, *one.texts):
        np.testing.assert_array_equal(one[name], other[name])


# -- reading --


def test_every_dialect_gives_the_same_table(tmp_path):
    plain = lenient(csv(tmp_path / "t.csv"), "price")
    assert plain.X.names == ("age", "void") and list(plain.X.texts) == ["name", "town", "sex", "one"]
    assert plain.X["town"].tolist() == [None if pd.isna(cell) else cell for cell in TABLE.town]
    np.testing.assert_array_equal(plain.X["age"], TABLE.age)
    assert plain.notes == ()
    data = (tmp_path / "t.csv").read_bytes()
    mac = data.replace(b"\n", b"\r")
    for ending, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (tmp_path / f"t.csv{ending}").write_bytes(pack(data))
        (tmp_path / f"mac.csv{ending}").write_bytes(pack(mac))
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("folder/t.csv", data)
    (tmp_path / "mac.csv").write_bytes(mac)
    (tmp_path / "sep.csv").write_bytes(b"\xef\xbb\xbfsep=;\r\n" + TABLE.to_csv(index=False, sep=";").encode())
    for path in tmp_path.iterdir():
        found = lenient(path, "price")
        assert_equal_tables(found.X, plain.X)
        np.testing.assert_array_equal(found.y, plain.y)
    csv(tmp_path / "eu.csv", sep=";", decimal=",", lineterminator="\r\n")
    european = lenient(tmp_path / "eu.csv", "price")
    assert_equal_tables(european.X, plain.X)
    np.testing.assert_array_equal(european.y, plain.y)
    assert european.notes == ("read with decimal commas: 'age', 'price'",)
    TABLE.to_csv(tmp_path / "index.csv")
    found = lenient(tmp_path / "index.csv", "price")
    assert_equal_tables(found.X, plain.X)
    assert found.notes == ("left out: column 1, which has no name",)


def test_parquet_gives_the_same_table(tmp_path):
    TABLE.drop(columns="void").assign(sex=TABLE.sex.astype("category")).to_parquet(tmp_path / "t.parquet")
    csv(tmp_path / "t.csv", TABLE.drop(columns="void"))
    one, other = (lenient(tmp_path / name, "price", verbatim=["name", "age"]) for name in ("t.parquet", "t.csv"))
    assert_equal_tables(one.X, other.X)
    np.testing.assert_array_equal(one.y, other.y)
    assert one.verbatim["name"] == other.verbatim["name"] == TABLE.name.tolist()
    assert other.verbatim["age"] == ["" if np.isnan(age) else str(age) for age in TABLE.age]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("sep=;\na;y\n1;2\n", "line 1: 'sep=;' names a separator and is no header"),
        ("a,y\r1,2\r", "line 1: lines end in carriage returns alone"),
        ("a,y\n9007199254740993,2\n", "line 2: column 'a' holds '9007199254740993', an integer beyond 2"),
        ('a,y\n1,"2,5"\n', "line 2: column 'y' holds '2,5', not a number; write decimals with a point"),
    ],
)
def test_strict_reading_refuses(content, match, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(content, newline="")
    with pytest.raises(TableError, match=match):
        read_table(path, "y")


TEN = "".join(f"{i}\n" for i in range(20))


@pytest.mark.parametrize(
    ("content", "reading", "match"),
    [
        ("a\n" + TEN + "1O\n", {}, "line 22: column 'a' holds '1O' among numbers; correct it or leave the column out"),
        ("a\n" + TEN + "1e999\n", {}, "line 22: column 'a' holds '1e999', not a finite number"),
        ("a\n" + TEN + "9007199254740993\n", {}, "line 22: .*an integer beyond 2"),
        ('a,b\n"1,234",1\n"2,345",2\n', {}, "line 2: column 'a' holds '1,234'; write it without separators of thou"),
        ('a,b\n"1,5",1\n2.5,2\n', {}, "line 2: column 'a' holds '1,5' beside decimals .* with a point"),
        ("a,b\n1,5\nx,6\n", {"texts": []}, "line 3: column 'a' holds 'x' among numbers"),
    ],
)
def test_numbers_are_read_exactly_or_refused(content, reading, match, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(TableError, match=match):
        lenient(tmp_path / "t.csv", **reading)


def test_a_decimal_mark_may_be_given(tmp_path):
    path = csv(tmp_path / "t.csv", pd.DataFrame({"a": ["1,234", "2,345"], "b": [1, 2]}))
    assert lenient(path, decimal=",").X["a"].tolist() == [1.234, 2.345]
    both = csv(tmp_path / "u.csv", pd.DataFrame({"a": ["1,234", "2,345"], "b": ["1,5", "2"]}))
    assert lenient(both).X["a"].tolist() == [1.234, 2.345]  # the other column tells
    with pytest.raises(TableError, match="write it without separators"):
        lenient(both, decimal=".")


def test_missing_numbers_have_many_names_and_text_is_kept_as_written(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,NA\n?,x\n,01\nN/A,1\nnull,\n2,NA\n")
    table = lenient(tmp_path / "t.csv").X
    np.testing.assert_array_equal(table["a"], [1, np.nan, np.nan, np.nan, np.nan, 2])
    assert table["b"].tolist() == ["NA", "x", "01", "1", None, "NA"]


def test_text_that_comes_late_is_found(tmp_path):
    cells = [*(f"0{i % 10}" for i in range(300)), *("ab" * 50)]
    assert lenient(csv(tmp_path / "t.csv", pd.DataFrame({"a": cells, "b": 1}))).X["a"].tolist() == cells


def test_a_damaged_archive_is_refused(tmp_path):
    data = gzip.compress(b"a,y\n" + b"1,2\n" * 1000)
    (tmp_path / "t.csv.gz").write_bytes(data[:-9])
    with pytest.raises(TableError, match=r"no sound \.gz file"):
        lenient(tmp_path / "t.csv.gz")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
        archive.writestr("b.csv", "a\n1\n")
    with pytest.raises(TableError, match="holds 2 files; pack one table"):
        lenient(tmp_path / "t.zip")


@pytest.mark.parametrize(
    ("cells", "kind", "labels"),
    [
        (["01", "1", "10"], "auto", ["01", "1", "10"]),
        (["1.10", "1.1", "2"], "label", ["1.10", "1.1", "2"]),
        (["2", "1", "1"], "text", ["2", "1", "1"]),
        (["01", "1", "10"], "number", [1, 1, 10]),
        (["9007199254740993", "9007199254740992", "1"], "auto", [9007199254740993, 9007199254740992, 1]),
    ],
)
def test_labels_stay_as_they_are_written(cells, kind, labels, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    for strict in (True, False):
        assert read_table(path, "y", reading=Reading(kind, strict)).y.tolist() == labels


def test_a_target_of_numbers_but_for_a_few_cells_is_refused_with_the_line(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(f"{i % 7},{'1O.5' if i == 11 else i / 2}\n" for i in range(40)))
    fit = ["fit", path, "--target", "y", "--out", tmp_path / "m"]
    for options in ([], ["--strict"], ["--task", "regression"], ["--loss", "huber"]):
        _, told = run(capsys, *fit, *options, code=1)
        assert "line 13: column 'y' holds '1O.5' among numbers; correct it" in told[-1]
    path.write_text("a,y\n" + "".join(f"{i % 7},{'NA' if i > 10 else i / 2}\n" for i in range(40)))
    assert "line 13: column 'y' holds 'NA' among numbers" in run(capsys, *fit, code=1)[1][-1]
    path.write_text("a,y\n" + "".join(f"{i % 7},word {i}\n" for i in range(200)))
    assert "the target 'y' holds 200 different texts in 200 rows" in run(capsys, *fit, code=1)[1][-1]


# -- what columns become --


def test_columns_become_what_scikit_learn_makes_of_them(tmp_path):
    table = lenient(csv(tmp_path / "t.csv"), "price").X
    columns = TableColumns.learn(table, ["name", "age", "town", "sex", "void", "one"])
    assert columns.inputs == ["age", "town = 01", "town = Bern, CH", "town = Köln", "town = Ulm", "sex = m"]
    words = make_pipeline(SimpleImputer(strategy="most_frequent", missing_values=None), OneHotEncoder(drop="if_binary"))
    reference = make_column_transformer(
        (SimpleImputer(strategy="median"), ["age"]), (words, ["town", "sex"]), sparse_threshold=0
    )
    data = TABLE[["age", "town", "sex"]].astype({"town": object, "sex": object})
    expected = reference.fit_transform(data.where(data.notna(), None).astype({"age": float}))
    np.testing.assert_array_equal(columns.encode(table), expected)
    np.testing.assert_array_equal(columns.encode(TABLE), expected)  # a frame, by the same names
    assert table_columns.from_json(json.loads(json.dumps(table_columns.to_json(columns)))) == columns
    assert columns.told_of_training(table) == [
        "text as indicators: 'town' (4 categories), 'sex' (2 categories)",
        f"left out: 'name' ({N} different texts), 'void' (empty), 'one' (one text)",
    ]
    other = TABLE.assign(town="Graz", age=1.0)
    replaced = columns.encode(other)
    assert (replaced[:, 1:5] == columns.encode(TABLE.assign(town=columns.columns[2].fill))[:, 1:5]).all()
    with pytest.raises(ValueError, match="column 'age' holds text, and in training it held numbers"):
        columns.encode(TABLE.assign(age="old"))


def test_many_categories_are_left_out(tmp_path):
    for rows, n_categories, kept in ((150, 20, True), (150, 21, False), (300, 30, True), (300, 31, False)):
        cells = [f"c{i % n_categories}" for i in range(rows)]
        table = lenient(csv(tmp_path / "t.csv", pd.DataFrame({"a": range(rows), "b": cells}))).X
        assert (len(TableColumns.learn(table, ["a", "b"]).used) == 2) is kept


# -- the command line --


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_a_real_table_goes_through_every_command(name, tmp_path, capsys):
    path, out = tmp_path / name, tmp_path / "m.safetensors"
    TABLE.to_parquet(path) if name == "t.parquet" else TABLE.to_csv(path, index=False)
    if name == "t.parquet":
        TABLE.drop(columns="void").to_parquet(path)
    printed, told = run(capsys, "fit", path, *FIT, "--out", out, "--test-size", 0.2, "--json")
    assert json.loads(printed)["task"] == "regression" and json.loads(printed)["measure"] == "R^2"
    assert told[0] == "convexbn: text as indicators: 'town' (4 categories), 'sex' (2 categories)"
    assert told[1].startswith("convexbn: left out: 'name' (64 different texts)")
    assert told[2].startswith("convexbn: missing cells filled in: 'age' (") and len(told) == 3
    model = convexbn.load(out)
    assert model.columns_.inputs[0] == "age" and len(model.columns_.inputs) == model.n_features_in_ == 6
    age = TABLE.age.to_numpy()
    printed, told = run(capsys, "predict", out, path, "--id", "name,town")
    header, *lines = printed.splitlines()
    assert header == "name,town,prediction" and len(lines) == N and len(told) == 1
    found = [float(line.rsplit(",", 1)[1]) for line in lines]
    assert found == model.predict(model.columns_.encode(TABLE)).tolist()
    assert "--strict refuses this table" in run(capsys, "predict", out, path, "--strict", code=1)[1][-1]
    assert json.loads(run(capsys, "certify", out, path, "--json")[0])["training_rows"] is True
    run(capsys, "report", out, path, "--out", tmp_path / "m.html")
    page = (tmp_path / "m.html").read_text()
    assert "town = Ulm" in page and "columns of text, an indicator a category" in page
    printed, _ = run(capsys, "path", path, "--target", "price", "--weight-decays", "30", "--out", out)
    assert "regression of price (R^2)" in printed
    # the median is that of the rows that the path trained on, not of those it was scored on
    assert convexbn.load(out).columns_.columns[1].fill != np.nanmedian(age)
    sentence = run(capsys, "fit", path, *FIT, "--out", out, "--strict", code=1)[1][-1]
    kinds = {"t.csv": "column 'name' holds the text 'N0 x'", "t.csv.gz": "unknown kind", "t.parquet": "'name' is "}
    assert kinds[name] in sentence


def test_predict_reads_the_columns_as_training_did(tmp_path, capsys):
    out, new = tmp_path / "m.safetensors", tmp_path / "new.csv"
    run(capsys, "fit", csv(tmp_path / "t.csv"), *FIT, "--out", out)
    model = convexbn.load(out)
    new.write_text("sex;town;age\nm;01;40,5\nf;Graz;\nm;1;30\n")
    printed, told = run(capsys, "predict", out, new)
    assert told == [
        "convexbn: read with decimal commas: 'age'",
        f"convexbn: missing cells filled in: 'age' (1 by median {model.columns_.columns[1].fill:.6g})",
        f"convexbn: categories unknown in training replaced: 'town' (2 by {model.columns_.columns[2].fill!r})",
    ]
    rows = pd.DataFrame({"age": [40.5, np.nan, 30], "town": ["01", "Graz", "1"], "sex": ["m", "f", "m"]})
    expected = model.predict(model.columns_.encode(rows))
    assert [float(line) for line in printed.splitlines()[1:]] == expected.tolist()
    new.write_text("sex,town,age\nm,Ulm,old\n")
    assert "line 2: column 'age' holds 'old' among numbers" in run(capsys, "predict", out, new, code=1)[1][-1]
    assert "features" in run(capsys, "predict", out, "digits", code=1)[1][-1]


def test_a_model_holds_its_columns_until_it_is_fitted_again(tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    run(capsys, "fit", csv(tmp_path / "t.csv"), *FIT, "--out", out)
    model = convexbn.load(out)
    model.columns_ = TableColumns(model.columns_.columns[:3])
    with pytest.raises(FormatError, match="'columns' does not fit"):
        model.save(out)
    X = RNG.normal(size=(30, 2))
    model.fit(X, X[:, 0]).save(out)
    assert not hasattr(convexbn.load(out), "columns_")


@pytest.mark.parametrize("wrong", [{"fill": None}, {"kind": "categories"}, {"fill": "x"}, {"kind": "left out"}])
def test_columns_that_contradict_themselves_are_refused(wrong):
    block = [{"name": "a", "kind": "number", "fill": 1.0, "categories": []} | wrong]
    assert table_columns.RULE(block)
    with pytest.raises(FormatError, match="'columns'"):
        table_columns.from_json(block)
