import csv
import doctest
import io
import json
import math
import pickle
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from convexbn.files import tables
from convexbn.files.dataset import Dataset
from convexbn.files.tables import TableError, read_table

FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Names and labels as people write them: not only blanks, and nothing that a table means otherwise.
WORD = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=8).filter(
    lambda text: text == text.strip() and not re.fullmatch(r"[+-]?(nan|inf|infinity|[\d.].*)", text, re.I)
)
MATRIX = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(FINITE, min_size=width, max_size=width), min_size=1, max_size=6)
)


def text_file(folder, content, name="table.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, *args, **kwargs):
    """Return the sentence that refuses a file, without the path that it must begin with."""
    with pytest.raises(TableError) as caught:
        read_table(path, *args, **kwargs)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ") and sentence.count(str(path)) == 1
    assert "\n" not in sentence
    return sentence.removeprefix(f"{path}: ")


def test_docstrings():
    assert doctest.testmod(tables.read).failed == 0


# -- text --


def test_a_table_without_target(tmp_path):
    table = read_table(text_file(tmp_path, "a,b\n1,2\n-3.5,4e2\n"))
    assert isinstance(table, Dataset)
    assert table.X.dtype == np.float64 and table.X.tolist() == [[1, 2], [-3.5, 400]]
    assert table.feature_names == ("a", "b")
    assert table.y is None and table.target is None


@pytest.mark.parametrize(
    ("cells", "dtype", "values"),
    [
        (["1", "-2", "+3"], np.int64, [1, -2, 3]),
        (["1", "2.0", "3e0"], np.float64, [1, 2, 3]),
        (["1", "two", "3.5"], np.str_, ["1", "two", "3.5"]),
        (["1_000", "2", "3"], np.str_, ["1_000", "2", "3"]),
        (["True", "False", "True"], np.str_, ["True", "False", "True"]),
        ([" 7 ", "8", "9223372036854775807"], np.int64, [7, 8, 2**63 - 1]),
        ([" 007 ", "7", "0"], np.str_, ["007", "7", "0"]),
        (["1.5", "9223372036854775808", "0"], np.float64, [1.5, 2.0**63, 0]),
    ],
)
def test_the_cells_decide_the_type_of_the_target(tmp_path, cells, dtype, values):
    path = text_file(tmp_path, "x,y\n" + "".join(f"0,{cell}\n" for cell in cells))
    table = read_table(path, target="y")
    assert np.issubdtype(table.y.dtype, dtype) and table.y.tolist() == values
    assert table.target == "y" and table.feature_names == ("x",)


@given(matrix=MATRIX, data=st.data(), separator=st.sampled_from(",;\t"), crlf=st.booleans(), quote=st.booleans())
def test_round_trip_of_text(tmp_path_factory, matrix, data, separator, crlf, quote):
    width = len(matrix[0])
    names = data.draw(st.lists(WORD, min_size=width + 1, max_size=width + 1, unique=True))
    labels = data.draw(st.lists(WORD, min_size=len(matrix), max_size=len(matrix)))
    target = data.draw(st.integers(0, width))
    out = io.StringIO()
    writer = csv.writer(
        out,
        delimiter=separator,
        lineterminator="\r\n" if crlf else "\n",
        quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL,
    )
    writer.writerow(names)
    for row, label in zip(matrix, labels, strict=True):
        cells = list(map(repr, row))
        writer.writerow([*cells[:target], label, *cells[target:]])
    path = text_file(tmp_path_factory.mktemp("round"), out.getvalue())
    # A name that holds more separators of another kind than the header has is ambiguous to anybody.
    assume(quote or all(mark not in "".join(names) for mark in ',;\t"'))
    table = read_table(path, target=names[target])
    assert np.array_equal(table.X, np.array(matrix))
    assert table.feature_names == tuple(names[:target] + names[target + 1 :])
    assert table.y.tolist() == labels


@given(cell=st.one_of(st.text(max_size=8), st.from_regex(r"[+-]?[0-9_.]{1,6}([eE][+-]?[0-9]{1,4})?", fullmatch=True)))
def test_the_fast_way_and_the_careful_way_agree(cell):
    fast = tables.text._numbers([cell])
    try:
        careful = tables.text._number(1, "x", cell.strip())
    except TableError:
        careful = None
    if fast is None:
        assert careful is None or not cell.isascii()  # a wide blank around a number
    else:
        assert fast == [careful] and math.isfinite(careful)


def test_a_row_whose_sum_overflows_is_finite(tmp_path):
    path = text_file(tmp_path, "a,b\n1.5e308,1.5e308\n")
    assert read_table(path).X.tolist() == [[1.5e308, 1.5e308]]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "T.CSV"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_separator_and_byte_order_mark(tmp_path, name, separator, bom):
    path = text_file(tmp_path, bom + separator.join(["größe", '"b,c"', "y"]).encode() + b"\r\n", name)
    with path.open("ab") as stream:
        stream.write(separator.join(["1", '"2"', "x\r\n"]).encode())
    table = read_table(path, target="y")
    assert table.feature_names == ("größe", "b,c")
    assert table.X.tolist() == [[1, 2]] and table.y.tolist() == ["x"]


def test_separators_inside_quotes_do_not_count(tmp_path):
    path = text_file(tmp_path, '"a;b;c;""d"";e",y\n1,2\n')
    assert read_table(path).feature_names == ('a;b;c;"d";e', "y")


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\r\n\r\n"])
def test_blank_lines_at_the_end_and_a_missing_newline(tmp_path, end):
    assert read_table(text_file(tmp_path, "a\n1\n2" + end)).X.tolist() == [[1], [2]]


def test_features_by_name_and_order(tmp_path):
    path = text_file(tmp_path, "a,note,b,y\n1,hello,2,0\n3,,4,1\n")
    table = read_table(path, features=["b", "a"])
    assert table.X.tolist() == [[2, 1], [4, 3]]
    assert table.feature_names == ("b", "a") and table.y is None
    assert read_table(path, "y", ["a"]).y.tolist() == [0, 1]


def test_a_quoted_cell_over_several_lines_keeps_the_line_numbers(tmp_path):
    content = 'a,note\n1,"two\nlines, ""quoted"""\n2,x\n'
    assert read_table(text_file(tmp_path, content), "note").y.tolist() == ['two\nlines, "quoted"', "x"]
    assert refusal(text_file(tmp_path, content + "?,x\n"), "note").startswith("line 5: column 'a'")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,y\n1,0\n,1\n", r"line 3: column 'a' is empty; .*"),
        ("a,y\n1,0\n2,\n", r"line 3: column 'y' is empty; .*"),
        ("a,y\n1,0\n2, \n", r"line 3: column 'y' is empty; .*"),
        ("a,y\n1,0\n2\n", r"line 3: 1 cells, and the header has 2; .*"),
        ("a,y\n1,0\n2,1,\n", r"line 3: 3 cells, and the header has 2; .*"),
        ("a,y\n1,0\na,y\n", r"line 3: repeats the header; .*"),
        ("1,y\n1,0\n1,y\n", r"line 3: repeats the header; .*"),  # numbers, and a label of its own
        ("a,b,a,y\n1,2,3,0\n", r"several columns are called 'a'; .*"),
        (",a,y\n0,1,0\n", r"column 1 has no name; .*"),
        ("a,y\n1,0\n1e400,1\n", r"line 3: column 'a' holds '1e400', not a finite number.*"),
        ("a,y\n1,0\n-inf,1\n", r"line 3: column 'a' holds '-inf', not a finite number.*"),
        ("a,y\n1,0\nNaN,1\n", r"line 3: column 'a' holds 'NaN', not a finite number.*"),
        ("a,y\n1,0\n2,nan\n", r"line 3: column 'y' holds 'nan', not a finite number.*"),
        ("a,y\n1,red\n2,1e999\n", r"line 3: column 'y' holds '1e999', not a finite number.*"),
        ("a,y\n1,0\nred,1\n", r"line 3: column 'a' holds the text 'red', not a number; encode .*"),
        ("a,y\n1_0,0\n", r"line 2: column 'a' holds the text '1_0', not a number; .*"),
        ("a,y\n٣,0\n", r"line 2: column 'a' holds the text '٣', not a number; .*"),
        (
            "a;y\n1,5;0\n",
            r"line 2: column 'a' holds the text '1,5', not a number; write decimals with a point",
        ),
        ("1,2\n3,4\n", r"line 1: all cells are numbers, so the header is missing; .*"),
        ("5\n", r"line 1: all cells are numbers, so the header is missing; .*"),
        ("", r"the file is empty; .*"),
        ("\n\n", r"the file is empty; .*"),
        ("a,y\n", r"has a header but no rows; .*"),
        ("a,y\n1,0\n\n2,1\n", r"line 3: is blank; .*"),
        ("\na,y\n1,0\n", r"line 1: is blank; .*"),
        ("y\n0\n", r"no feature column is left; .*"),
        ("a,b\n1,0\n", r"has no column 'y'; its columns are 'a', 'b'"),
        ('a,y\n1,"0\n2,1\n', r"line 2: cannot be cut into cells \(unexpected end of data\); .*"),
        ('a,y\n1,0\n"1"2,0\n', r"line 3: cannot be cut into cells .*"),
        ('a,y\n1,"' + "x" * 200_000 + '"\n', r"line 2: cannot be cut into cells \(field larger .*"),
        (b"a,y\n1,0\n2,\xff\n", r"line 3: not UTF-8 text; .*"),
        ("a,y\n1,0\n".encode("utf-16"), r"line 1: not UTF-8 text; .*"),
        (b"a,y\n1\x002,0\n", r"line 2: column 'a' holds the text '1\\x002', not a number; .*"),
        ("a,y\n1,9223372036854775808\n", r"the target holds an integer beyond int64; .*"),
        ("a,y\n1," + "x" * 257 + "\n", r"the target holds 'x+\.\.\.x+' of 257 characters, .*"),
    ],
)
def test_text_that_is_refused(tmp_path, content, sentence):
    assert re.fullmatch(sentence, refusal(text_file(tmp_path, content), "y"))


def test_missing_features_are_named(tmp_path):
    path = text_file(tmp_path, "a,b,y\n1,2,0\n")
    assert refusal(path, features=["c", "a", "d"]) == "has no column 'c', 'd'; its columns are 'a', 'b', 'y'"
    assert "name it once" in refusal(path, "y", ["a", "y"])


def test_a_long_list_of_names_is_cut(tmp_path):
    path = text_file(tmp_path, ",".join(f"c{index}" for index in range(5_000)) + "\n")
    assert refusal(path, "y").endswith("'c18', 'c19' and 4,980 more")


def test_a_header_wider_than_the_csv_module_allows_a_cell(tmp_path):
    names = [f"a_rather_long_name_{index}" for index in range(10_000)]
    content = ",".join(names) + "\n" + ",".join(["1"] * len(names)) + "\n"
    assert len(names[0]) * len(names) > csv.field_size_limit()
    assert read_table(text_file(tmp_path, content)).X.sum() == len(names)


@pytest.mark.parametrize("name", ["table", "table.xlsx", "table.csv.gz", "table.pkl"])
def test_other_kinds_of_files(tmp_path, name):
    assert refusal(text_file(tmp_path, "a\n1\n", name)).endswith("must end in .csv, .tsv, .txt, .parquet, .npz")


def test_no_file(tmp_path):
    assert refusal(tmp_path / "no such.csv") == "no such file; check the path"
    (tmp_path / "folder.csv").mkdir()
    assert refusal(tmp_path / "folder.csv") == "not a regular file; give the path of a file"


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    path = text_file(tmp_path, "a\n1\n")

    def denied(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(path) == "cannot be read (Permission denied); check the file"


# -- memory --


def test_a_sparse_file_of_ten_gigabytes_is_refused_before_reading(tmp_path, monkeypatch):
    path = text_file(tmp_path, "a,b,y\n" + "1,2,3\n" * 200_000)
    with path.open("r+b") as stream:
        stream.truncate(10_000_000_000)
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 8 << 30)
    monkeypatch.setattr(tables.text, "_parse", None)
    needed = int(re.search(r"about ([\d,]+) bytes", refusal(path, "y"))[1].replace(",", ""))
    assert needed == pytest.approx(10e9 / 6 * (16 + 80), rel=1e-4)


def test_the_budget_holds_where_the_first_lines_mislead(tmp_path, monkeypatch):
    path = text_file(tmp_path, "a,b\n" + f"{'0' * 1000}1,{'0' * 1000}2\n" * 600 + "3,4\n" * 100_000)
    assert read_table(path).X.shape == (100_600, 2)
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 1_000_000)
    assert "bytes" in refusal(path)


def test_long_labels_count(tmp_path, monkeypatch):
    path = text_file(tmp_path, "a,y\n" + f"1,{'x' * 250}\n" * 1_000)
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 1_000_000)
    assert read_table(path, "y").y.nbytes == 1_000_000
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 999_999)
    assert "needs about 1,000,000 bytes" in refusal(path, "y")


def test_a_file_without_line_ends(tmp_path):
    path = text_file(tmp_path, "a\n" + "1" * ((1 << 24) + 1))
    assert refusal(path).startswith("line 2: longer than 16,777,216 bytes")


def test_memory_is_bounded_by_the_array(tmp_path):
    line = "0.1234567890123456789," * 7 + "1\n"
    path = text_file(tmp_path, "a,b,c,d,e,f,g,h\n" + line * 40_000)
    tracemalloc.start()
    try:
        table = read_table(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert table.X.nbytes == 2_560_000
    assert peak < 1.2 * table.X.nbytes


def test_an_interrupt_passes_through(tmp_path, monkeypatch):
    path = text_file(tmp_path, "a\n" + "1\n" * 1_000)
    rows = []

    def interrupted(cells):
        rows.append(cells)
        if len(rows) == 500:
            raise KeyboardInterrupt
        return [0.0]

    monkeypatch.setattr(tables.text, "_numbers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_table(path)
    assert len(rows) == 500


# -- Parquet --


def parquet_file(folder, columns, **settings):
    path = folder / "table.parquet"
    pq.write_table(pa.table(columns), path, **settings)
    return path


NUMBERS = [
    pa.bool_(),
    pa.int8(),
    pa.int64(),
    pa.uint8(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
]


@pytest.mark.parametrize("kind", NUMBERS, ids=str)
def test_parquet_numbers(tmp_path, kind):
    column = pa.array(np.array([0, 1, 1])).cast(pa.float32()).cast(kind)
    table = read_table(parquet_file(tmp_path, {"a": column, "y": column}), "y")
    assert table.X.dtype == np.float64 and table.X.tolist() == [[0], [1], [1]]
    assert table.y.dtype == (np.float64 if pa.types.is_floating(kind) else np.int64)
    assert table.y.tolist() == [0, 1, 1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_parquet_text_is_a_target_and_no_feature(tmp_path, kind):
    path = parquet_file(tmp_path, {"a": [1, 2, 3], "y": pa.array(["1", "ü", "1"]).cast(kind)})
    assert read_table(path, "y").y.tolist() == ["1", "ü", "1"]  # declared as text, so text it stays
    assert re.fullmatch(r"column 'y' is .*string.*, and numbers are needed; .*", refusal(path))


def test_parquet_dictionary_of_integers(tmp_path):
    path = parquet_file(tmp_path, {"a": [1.0, 2.0, 3.0], "y": pa.array([7, 3, 7]).dictionary_encode()})
    target = read_table(path, "y").y
    assert target.dtype == np.int64 and target.tolist() == [7, 3, 7]


def test_parquet_of_pandas(tmp_path):
    frame = pd.DataFrame({"a.b": [1.5, 2.5], "y": pd.Categorical(["u", "v"]), "c": [True, False]})
    path = tmp_path / "table.parquet"
    frame.to_parquet(path)
    table = read_table(path, "y")
    assert table.feature_names == ("a.b", "c") and table.X.tolist() == [[1.5, 1], [2.5, 0]]
    assert table.y.tolist() == ["u", "v"]
    frame.set_axis(["p", "q"]).iloc[::-1].to_parquet(path)  # the index becomes a column
    assert refusal(path, "y").startswith("column 4 has no name")
    assert read_table(path, features=["c", "a.b"]).X.tolist() == [[0, 2.5], [1, 1.5]]


@given(matrix=MATRIX, rows=st.integers(1, 4), data=st.data())
def test_round_trip_of_parquet(tmp_path_factory, matrix, rows, data):
    names = data.draw(st.lists(WORD, min_size=len(matrix[0]), max_size=len(matrix[0]), unique=True))
    values = np.array(matrix)
    columns = dict(zip(names, values.T, strict=True))
    path = parquet_file(tmp_path_factory.mktemp("round"), columns, row_group_size=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.parquet, "_BATCH_CELLS", 2 * len(names))  # three rows a batch
        table = read_table(path)
    assert np.array_equal(table.X, values) and table.feature_names == tuple(names)


@pytest.mark.parametrize("cells", [1, 1 << 22])
def test_parquet_rows_are_counted_over_batches(tmp_path, monkeypatch, cells):
    monkeypatch.setattr(tables.parquet, "_BATCH_CELLS", cells)
    good, labels = np.arange(9.0), list("abcdefghi")
    bad = good.copy()
    bad[6] = np.inf
    null = [*labels[:6], None, *labels[7:]]
    y = parquet_file(tmp_path, {"a": good, "y": labels}, row_group_size=2)
    assert read_table(y, "y").y.tolist() == labels
    sentence = refusal(parquet_file(tmp_path, {"a": bad, "y": labels}, row_group_size=2), "y")
    assert sentence.startswith("row 7: column 'a' holds inf, not a finite number")
    sentence = refusal(parquet_file(tmp_path, {"a": labels, "y": bad}, row_group_size=2), "y", [])
    assert "no feature" in sentence
    sentence = refusal(parquet_file(tmp_path, {"a": good, "y": bad}, row_group_size=2), "y")
    assert sentence.startswith("row 7: column 'y' holds inf, not a finite number")
    sentence = refusal(parquet_file(tmp_path, {"a": good, "y": null}, row_group_size=2), "y")
    assert sentence.startswith("row 7: column 'y' is null")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"a": pa.array([1, None, None]), "y": [0, 1, 2]}, r"row 2: column 'a' is null; .*"),
        ({"a": pa.array([True, None, False]), "y": [0, 1, 2]}, r"row 2: column 'a' is null; .*"),
        ({"a": pa.array(["u"]), "y": [0]}, r"column 'a' is string, and numbers are needed; .*"),
        ({"a": pa.array([0]).cast(pa.timestamp("s")), "y": [0]}, r"column 'a' is timestamp.*"),
        ({"a": pa.array([{"b": 1}]), "y": [0]}, r"column 'a' is struct.*"),
        ({"a": [1.0], "y": pa.array([[1]])}, r"column 'y' is list.*numbers or text are needed; .*"),
        ({"a": [1.0], "y": pa.nulls(1)}, r"column 'y' is null, and .*"),
        ({"a": [1.0], "y": pa.array([2**63], pa.uint64())}, r"the target 'y' holds 9223372036854775808, .*"),
        ({"a": [1.0], "y": ["x" * 257]}, r"the target holds .* of 257 characters, .*"),
        ({"a": [1.0]}, r"has no column 'y'; its columns are 'a'"),
        ({"a": pa.array([], pa.float64()), "y": pa.array([], pa.string())}, r"has columns but no rows; .*"),
    ],
)
def test_parquet_that_is_refused(tmp_path, columns, sentence):
    assert re.fullmatch(sentence, refusal(parquet_file(tmp_path, columns), "y"))


def test_parquet_with_two_columns_of_a_name(tmp_path):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    assert refusal(path) == "several columns are called 'a'; give each its own name"


def test_parquet_beyond_the_budget(tmp_path, monkeypatch):
    path = parquet_file(tmp_path, {"a": np.zeros(1_000), "b": np.zeros(1_000)})
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 16_000)
    assert read_table(path).X.shape == (1_000, 2)
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 15_999)
    assert "needs about 16,000 bytes" in refusal(path)


def test_parquet_with_a_wrong_checksum(tmp_path):
    values = np.arange(1_000.0)
    path = parquet_file(tmp_path, {"a": values}, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(values[500:].tobytes()[:64])] ^= 1
    path.write_bytes(data)
    assert refusal(path).startswith("cannot be read (")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = parquet_file(tmp_path, {"a": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(path) == "reading Parquet needs pyarrow; run: pip install convexbn[data]"


def test_import_is_light():
    script = "import sys, convexbn.files.tables, convexbn.files.datasets; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"pyarrow", "sklearn", "scipy", "pandas"} & set(done.stdout.split())


# -- NPZ --


def npz_file(folder, compressed=False, **arrays):
    path = folder / "table.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f2", "f4", "f8", ">f8", "g"])
def test_npz_numbers(tmp_path, dtype, compressed):
    path = npz_file(tmp_path, compressed, X=np.array([[0, 1], [1, 0], [1, 1]], dtype=dtype), y=[3, 4, 5])
    table = read_table(path, "y")
    assert table.X.dtype == np.float64 and table.X.tolist() == [[0, 1], [1, 0], [1, 1]]
    assert table.feature_names == ("x0", "x1")
    assert table.y.dtype == np.int64 and table.y.tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([1.0, 2.0]), np.float64),
        (np.array([1.0, 2.0], dtype=np.float32), np.float64),
        (np.array([True, False]), np.int64),
        (np.array([1, 2], dtype=">u2"), np.int64),
        (np.array(["1", "ü"]), np.dtype("<U1")),
    ],
)
def test_the_declared_type_decides_the_type_of_the_target(tmp_path, values, dtype):
    target = read_table(npz_file(tmp_path, X=np.eye(2), y=values), "y").y
    assert target.dtype == dtype and target.tolist() == values.tolist()


@given(matrix=MATRIX, fortran=st.booleans(), compressed=st.booleans(), data=st.data())
def test_round_trip_of_npz(tmp_path_factory, matrix, fortran, compressed, data):
    values = np.array(matrix, order="F" if fortran else "C")
    path = npz_file(tmp_path_factory.mktemp("round"), compressed, X=values, other=np.eye(9))
    order = data.draw(st.lists(st.integers(0, len(matrix[0]) - 1), min_size=1, unique=True))
    table = read_table(path, features=[f"x{index}" for index in order])
    assert np.array_equal(table.X, values[:, order])


def test_npz_with_one_matrix_of_another_name(tmp_path):
    path = npz_file(tmp_path, data=np.eye(3), y=np.arange(3), note=np.array("text"))
    assert np.array_equal(read_table(path, "y").X, np.eye(3))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            {"A": np.eye(2), "B": np.eye(2)},
            r"has 2 two-dimensional arrays, none called 'X'; .* are 'A', 'B'\)",
        ),
        ({"y": np.arange(2)}, r"has 0 two-dimensional arrays, .*"),
        ({"X": np.arange(2), "y": np.arange(2)}, r"has 0 two-dimensional arrays, .*"),
        ({"X": np.eye(2)}, r"has no array 'y' of shape \(2,\) for the target; its arrays are 'X' \(2, 2\)"),
        ({"X": np.eye(2), "y": np.arange(3)}, r"has no array 'y' of shape \(2,\) for the target; .*"),
        ({"X": np.eye(2), "y": np.eye(2)}, r"has no array 'y' of shape \(2,\) for the target; .*"),
        ({"X": np.empty((0, 3)), "y": np.empty(0)}, r"array 'X' has no rows; .*"),
        ({"X": np.empty((3, 0)), "y": np.empty(3)}, r"no feature column is left; .*"),
        ({"X": np.eye(2) * 1j, "y": np.arange(2)}, r"array 'X' is complex128; .*"),
        ({"X": np.array([["a"]]), "y": np.arange(1)}, r"array 'X' is <U1; .*"),
        ({"X": np.eye(1), "y": np.array([1j])}, r"the target 'y' is complex128; .*"),
        ({"X": np.eye(1), "y": np.array([2**63], "u8")}, r"the target 'y' holds 9223372036854775808, .*"),
        ({"X": np.array([[0, 1], [2, np.nan]]), "y": np.arange(2)}, r"row 2: column 'x1' holds nan, .*"),
        (
            {"X": np.full((1, 1), np.longdouble("1e400")), "y": np.arange(1)},
            r"row 1: column 'x0' holds inf, .*",
        ),
        ({"X": np.eye(2), "y": np.array([0, -np.inf])}, r"row 2: column 'y' holds -inf, .*"),
    ],
)
def test_npz_that_is_refused(tmp_path, arrays, sentence):
    assert re.fullmatch(sentence, refusal(npz_file(tmp_path, **arrays), "y"))


def test_npz_has_no_such_feature(tmp_path):
    assert refusal(npz_file(tmp_path, X=np.eye(2)), features=["x1", "x2"]).startswith("has no column 'x2'")


def crafted(folder, header, payload=b"", version=(1, 0)):
    """Write an archive whose array X has this header."""
    text = json.dumps(header).replace("false", "False").replace("[", "(").replace("]", ",)").encode() + b"\n"
    if isinstance(header, str):
        text = header.encode()
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    path = folder / "table.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY" + bytes(version) + length + text + payload)
    return path


def array_header(shape, descr="<f8"):
    return {"descr": descr, "fortran_order": False, "shape": list(shape)}


def test_a_crafted_archive_that_is_sound(tmp_path):
    path = crafted(tmp_path, array_header([1, 2]), np.array([3.0, 4.0]).tobytes(), version=(2, 0))
    assert read_table(path).X.tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("header", "size", "sentence"),
    [
        (array_header([10**9, 10**9]), 64, "X.npy is shorter than its header says"),
        (array_header([2**62, 2**62]), 64, "X.npy is shorter than its header says"),
        (array_header([-1, -8]), 64, "X.npy is shorter than its header says"),
        (array_header([0, 10**15]), 0, "array 'X' has no rows"),
        (array_header([10**15, 0]), 0, "no feature column is left"),
        (array_header([2, 2], "|V0"), 64, "array 'X' is |V0"),
        (array_header([10**12, 10**12], "<U0"), 64, "array 'X' is <U0"),
        (array_header([2, 3]), 49, "X.npy is longer than its header says"),
        (array_header([2, 3]), 47, "no sound .npz archive"),
        ("[" * 5_000, 0, "no sound .npz archive"),
        ("-" * 9_000 + "1", 0, "X.npy has no sound header"),
        ("__import__('os').getcwd()", 0, "no sound .npz archive"),
        ("{'descr': ('<f8',), 'fortran_order': False, 'shape': (1, 1)}", 0, "no sound .npz archive"),
        ("  1\n1", 0, "no sound .npz archive"),
        ("", 0, "no sound .npz archive"),
    ],
)
def test_npz_with_a_hostile_header(tmp_path, header, size, sentence):
    assert refusal(crafted(tmp_path, header, bytes(size))).startswith(sentence)


def test_npz_of_a_version_for_structures(tmp_path):
    path = crafted(tmp_path, array_header([1, 1]), bytes(8), version=(3, 0))
    assert refusal(path).startswith("X.npy has .npy version (3, 0)")


def test_npz_beyond_the_budget(tmp_path, monkeypatch):
    bomb = npz_file(tmp_path, True, X=np.zeros((1_000, 1_000), dtype=np.uint8))
    assert bomb.stat().st_size < 10_000
    monkeypatch.setattr(tables.npz, "_array", None)
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 7_999_999)
    assert "needs about 8,000,000 bytes" in refusal(bomb)
    monkeypatch.setattr(tables.table, "MEMORY_BUDGET", 999_999)
    monkeypatch.setattr(tables.npz, "_npy_header", None)
    assert "needs about 1,000,128 bytes" in refusal(bomb)


# -- damage, and pickles --


def sound_bytes(folder, kind):
    values, labels = np.arange(12.0).reshape(4, 3) / 7, list("abab")
    if kind == ".npz":
        return npz_file(folder, True, X=values, y=np.array(labels)).read_bytes()
    if kind == ".parquet":
        columns = {"a": values[:, 0], "b": values[:, 1], "c": values[:, 2], "y": labels}
        return parquet_file(folder, columns, write_page_checksum=True).read_bytes()
    rows = [",".join(map(repr, map(float, row))) + f',"{label}"\n' for row, label in zip(values, labels, strict=True)]
    return ("a,b,c,y\n" + "".join(rows)).encode()


@pytest.mark.parametrize("kind", [".npz", ".parquet"])
def test_truncated_at_every_byte(tmp_path, kind):
    data = sound_bytes(tmp_path, kind)
    path = tmp_path / f"cut{kind}"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refusal(path, "y")


@pytest.mark.parametrize("kind", [".csv", ".npz", ".parquet"])
def test_flipped_bits_are_found_or_harmless(tmp_path, kind):
    data = sound_bytes(tmp_path, kind)
    path = tmp_path / f"flip{kind}"
    path.write_bytes(data)
    sound = read_table(path, "y")
    rng = np.random.default_rng(0)
    refused = 0
    for at, bit in zip(rng.integers(len(data), size=300), rng.integers(8, size=300), strict=True):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(bit))]) + data[at + 1 :])
        try:
            table = read_table(path, "y")
        except TableError:
            refused += 1
            continue
        if kind != ".csv":  # text has no checksum
            assert np.array_equal(table.y, sound.y)
            assert np.array_equal(table.X, sound.X[:, : table.X.shape[1]])
    assert refused > 100


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".txt", ".parquet", ".npz"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_is_executed(tmp_path, kind, protocol):
    canary = tmp_path / "canary"
    path = tmp_path / f"table{kind}"
    path.write_bytes(pickle.dumps(Canary(canary), protocol))
    refusal(path)
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # the canary does sing
    assert canary.exists()


@pytest.mark.parametrize("name", ["X", "y"])
@pytest.mark.parametrize("compressed", [False, True])
def test_no_pickle_inside_an_archive_is_executed(tmp_path, name, compressed):
    canary = tmp_path / "canary"
    objects = np.full((2, 2) if name == "X" else 2, Canary(canary), dtype=object)
    path = npz_file(tmp_path, compressed, **{"X": np.eye(2), "y": np.arange(2), name: objects})
    assert refusal(path, "y") == f"{name}.npy holds a pickle, which is never loaded; store numbers or text"
    assert not canary.exists()
    np.load(path, allow_pickle=True)[name]
    assert canary.exists()


def test_no_pickle_that_calls_itself_an_array_is_executed(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "table.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", pickle.dumps(Canary(canary)))
    assert refusal(path).startswith("no sound .npz archive")
    assert not canary.exists()
