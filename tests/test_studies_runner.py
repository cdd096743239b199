"""``convexbn reproduce``: cells are computed once, what is finished outlives every end, and a page tells it all."""

import csv
import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import convexbn_studies
from convexbn import cli
from convexbn.estimators.counter import counter
from convexbn.files import model_file
from convexbn_studies import Finding, Study, data
from convexbn_studies.page import study_page
from convexbn_studies.runner import Run, check_needs

TOY = """
import time
from pathlib import Path

from convexbn_studies import Finding, Picture, Study

LOG = Path("computed")


def cells(quick):
    return [{"seed": seed, "name": "<b>"} for seed in range(3 if quick else 6)]


def run(cell):
    with LOG.open("a") as log:
        print(cell["seed"], file=log)
    time.sleep(PAUSE if cell["seed"] > 1 else 0)  # the first cells always finish
    return [{"seed": cell["seed"], "line": line, "square": float(cell["seed"] ** 2)} for line in range(2)]


def findings(rows):
    return [Finding("Squares are below 3.", f"The largest is {max(row['square'] for row in rows)}.", len(rows) < 5)]


def pictures(rows):
    from matplotlib.figure import Figure

    axes = (figure := Figure()).subplots()
    axes.plot([row["square"] for row in rows])
    return [Picture("Squares rise", figure)]


STUDY = Study("toy", "A <toy>", "Nowhere, 2026", "All of it & more", (), (0.1, 1), cells, run, findings, pictures)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A study in its own module, which other processes find as well; returns how to set the pause of later cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(convexbn_studies.NAMES, "toy", "toy_study")
    sys.modules.pop("toy_study", None)

    def write(pause):
        (tmp_path / "toy_study.py").write_text(TOY + f"\n\nPAUSE = {pause}\n")

    write(0)
    return write


def computed(folder):
    return (folder / "computed").read_text().split()


def reproduce(*arguments):
    return cli.main(["reproduce", *map(str, arguments)])


def test_a_run_writes_page_table_and_results(toy, tmp_path, capsys):
    assert reproduce("toy", "--quick") == 0
    told = capsys.readouterr()
    assert "DOES NOT HOLD HERE: Squares are below 3. The largest is 4.0." in told.out
    assert [line for line in told.out.splitlines() if line.startswith("seed")] == ["seed  line  square"]
    assert told.err.splitlines()[0] == "0/3 finished   seed 0   name <b>" and "3/3" in told.err
    folder = tmp_path / "experiments"
    with (folder / "toy-quick.csv").open() as file:
        assert [row["square"] for row in csv.DictReader(file)] == ["0.0", "0.0", "1.0", "1.0", "4.0", "4.0"]
    results = json.loads((folder / "toy-quick.json").read_text())
    assert results["command"] == "convexbn reproduce toy --quick" and results["versions"]["numpy"] == np.__version__
    assert [cell["settings"]["seed"] for cell in results["cells"]] == [0, 1, 2]
    page = (folder / "toy-quick.html").read_text()
    order = [
        "A &lt;toy&gt;",
        "quick form",
        "does not hold here",
        "Squares are",
        "<svg",
        "All of it &amp; more",
        "<table",
    ]
    places = [page.index(part) for part in order]
    assert places == sorted(places) and "<toy>" not in page and "convexbn reproduce toy --quick" in page


def test_what_is_finished_is_not_computed_again(toy, tmp_path):
    for _ in range(2):
        assert reproduce("toy", "--quick", "--out", "there") == 0
    assert computed(tmp_path) == ["0", "1", "2"]
    assert reproduce("toy", "--out", "there") == 0  # the full form is another run
    assert computed(tmp_path) == ["0", "1", "2", *"012345"]


def test_a_changed_setting_is_another_cell(tmp_path):
    computed = []

    def going_on(settings):
        cells = [{"rate": rate} for rate in settings]
        chosen = study(cells=lambda quick: cells, run=lambda cell: computed.append(cell["rate"]) or [dict(cell)])
        run = Run(chosen, True, tmp_path)
        run.go_on()
        return [row["rate"] for row in run.rows]

    assert going_on([1, 2]) == [1, 2] and going_on([2, 3]) == [2, 3]
    assert computed == [1, 2, 3]


def start(tmp_path):
    script = (
        "import sys; sys.path.insert(0, '.'); import convexbn_studies; from convexbn import cli; "
        "convexbn_studies.NAMES['toy'] = 'toy_study'; sys.exit(cli.main(['reproduce', 'toy']))"
    )
    started = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "experiments" / "toy.json").exists():
        assert started.poll() is None
        time.sleep(0.02)
    return started


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGKILL, -9, "")],
)
def test_every_end_keeps_what_is_finished(toy, tmp_path, number, code, word):
    toy(60)
    started = start(tmp_path)
    started.send_signal(number)
    _, told = started.communicate(timeout=60)
    assert started.returncode == code and word in told and "Traceback" not in told
    finished = len(json.loads((tmp_path / "experiments" / "toy.json").read_text())["cells"])
    assert 1 <= finished < 6 and not (tmp_path / "experiments" / "toy.html").exists()
    if word:
        assert f"{finished} of 6 parts are finished" in told and "goes on from there" in told
    toy(0)
    before = len(computed(tmp_path))
    assert reproduce("toy") == 0
    assert computed(tmp_path)[before:] == [str(seed) for seed in range(finished, 6)]


def test_results_are_replaced_in_one_step(toy, tmp_path, monkeypatch):
    """A write that fails leaves the former file."""
    run = Run(convexbn_studies.study("toy"), True, tmp_path)
    run.go_on()
    before = run.path("json").read_bytes()
    monkeypatch.setattr(model_file.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"toy-quick\.json"):
        run.write()
    assert run.path("json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"study": "other", "cells": []}', b'{"study": "toy"}', b"\xff"]
)
def test_a_file_that_is_not_ours_is_refused(toy, tmp_path, capsys, content):
    (tmp_path / "toy.json").write_bytes(content)
    assert reproduce("toy", "--out", tmp_path) == 1
    assert "holds no results of the study toy" in capsys.readouterr().err
    assert (tmp_path / "toy.json").read_bytes() == content


def test_a_part_can_be_drawn_and_says_so(tmp_path):
    cells = [{"seed": seed} for seed in range(4)]
    Run(study(cells=lambda quick: cells[:1]), True, tmp_path).go_on()
    whole = Run(study(cells=lambda quick: cells), True, tmp_path)
    assert not whole.complete and [cell["seed"] for cell in whole.missing()] == [1, 2, 3]
    assert "This is a part of the study: 1 of 4 cells are finished." in study_page(whole).decode()
    with pytest.raises(ValueError, match="nothing of one is finished"):
        study_page(Run(study(), False, tmp_path))


def study(**changes):
    """A study of one line."""
    given = {
        "name": "one", "title": "One", "source": "", "departures": "", "needs": (), "minutes": (0, 0),
        "cells": lambda quick: [{"seed": 0}], "run": lambda cell: [{"value": np.float64(1.5)}],
        "findings": lambda rows: [Finding("It is said.", "1", None)], "pictures": lambda rows: [],
    }  # fmt: skip
    return Study(**given | changes)


def test_drawing_alone_computes_nothing(toy, tmp_path, capsys):
    assert reproduce("toy", "--quick", "--draw") == 1
    assert "nothing of toy is finished" in capsys.readouterr().err
    assert reproduce("toy", "--quick") == 0
    before = computed(tmp_path)
    (tmp_path / "experiments" / "toy-quick.html").unlink()
    assert reproduce("toy", "--quick", "--draw") == 0
    assert computed(tmp_path) == before and (tmp_path / "experiments" / "toy-quick.html").exists()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    for stream in (Terminal(), io.StringIO()):
        with counter(stream) as report:
            report(1, 4, "seed 7")
        assert "1/4" in stream.getvalue() and "seed 7" in stream.getvalue()


class Gone(io.StringIO):
    """A stream that nobody reads."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_went_away_does_not_end_the_work(tmp_path):
    with counter(Gone()) as report:
        Run(study(), True, tmp_path).go_on(report)
    assert (tmp_path / "one-quick.json").exists()


def test_values_are_those_of_json(tmp_path):
    run = Run(study(run=lambda cell: [{"a": np.float64("nan"), "b": np.int64(3), "c": np.bool_(True)}]), True, tmp_path)
    run.go_on()
    assert json.loads(run.path("json").read_text())["cells"][0]["rows"] == [{"a": None, "b": 3, "c": True}]
    with pytest.raises(TypeError, match="a value of a table is"):
        Run(study(run=lambda cell: [{"a": [1]}]), False, tmp_path).go_on()


def test_two_cells_with_the_same_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two cells of one have the same settings"):
        Run(study(cells=lambda quick: [{"a": 1}, {"a": 1}]), True, tmp_path)


def test_what_is_missing_is_told_before_any_work(monkeypatch):
    with pytest.raises(ImportError, match="needs nonsense_package: pip install nonsense_package"):
        check_needs(study(needs=("nonsense_package",)), quick=True)
    check_needs(study(needs_in_full=("nonsense_package",)), quick=True)
    with pytest.raises(ImportError, match="needs nonsense_package"):
        check_needs(study(needs_in_full=("nonsense_package",)), quick=False)
    monkeypatch.delenv("CIFAR10_HOME", raising=False)
    data.load.cache_clear()
    with pytest.raises(FileNotFoundError, match="CIFAR-10"):
        check_needs(study(needs_in_full=("cifar-10",)), quick=False)


def test_the_list_and_wrong_names(capsys):
    assert reproduce("--list") == 0
    told = capsys.readouterr().out
    for name in convexbn_studies.NAMES:
        known = convexbn_studies.study(name)
        assert known.name == name and name in told and known.title in told
    assert reproduce("nonsense") == 1
    assert "there is no study 'nonsense'" in capsys.readouterr().err
    assert reproduce() == 1
    assert "name a study" in capsys.readouterr().err


def test_an_undecided_claim_is_said_to_be(tmp_path):
    run = Run(study(), True, tmp_path)
    run.go_on()
    page = study_page(run).decode()
    assert "not decided here" in page and "1.5" in page


def test_a_folder_that_cannot_be_written_is_refused(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert reproduce("toy", "--out", tmp_path / "file") == 1
    assert capsys.readouterr().err.startswith("convexbn: error: ")
    assert not (tmp_path / "computed").exists()
