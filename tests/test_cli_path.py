"""``convexbn path``: a line a point, checkpoints, signals, pictures, and what is refused before any work."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import convexbn
from convexbn import cli
from convexbn.estimators.path import load_path
from processes import ended_by

RNG = np.random.default_rng(5)
X = RNG.standard_normal((90, 4))
GRID = ["--weight-decays", "5,1,0.2", "--ranks", "2,all", "--n-gates", "20"]


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", X=X, y=np.where(X[:, 0] * X[:, 1] > 0, "yes", "no"))
    return [str(tmp_path / "data.npz"), "--target", "y"]


def run(*arguments):
    return cli.main(["path", *map(str, arguments)])


def test_a_line_a_point_and_the_best_is_saved(data, tmp_path, capsys):
    assert run(*data, *GRID, "--out", tmp_path / "best") == 0
    *lines, best = capsys.readouterr().out.splitlines()
    pattern = r"(\d)/6   weight decay \S+   rank [24]   \w+   gap \S+   \d+ neurons   score ([01]\.\d{4})"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [int(match[1]) for match in found] == [1, 2, 3, 4, 5, 6]
    scores = [float(match[2]) for match in found]
    assert best.startswith("best: ") and best.endswith(f"saved to {tmp_path / 'best'}")
    assert float(re.search(r"score (\S+),", best)[1]) == max(scores)
    model = convexbn.load(tmp_path / "best")
    assert f"weight decay {model.weight_decay:g} " in lines[int(np.argmax(scores))]
    assert cli.main(["certify", str(tmp_path / "best"), data[0], "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["training_rows"] is True and result["status"] == "CERTIFIED"


def test_json_is_one_object_a_point(data, capsys):
    assert run(*data, *GRID, "--json", "--validation-size", "0") == 0
    points = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(p["weight_decay"], p["rank"]) for p in points] == [(w, 2) for w in (5, 1, 0.2)] + [
        (w, 4) for w in (0.2, 1, 5)
    ]
    assert {p["status"] for p in points} <= {"CERTIFIED", "TRIVIAL"} and {p["score"] for p in points} == {None}
    assert all(p["lower_bound"] <= p["objective"] and p["relative_gap"] <= 1e-6 for p in points)


def test_the_rows_to_score_on_are_never_the_test_part(monkeypatch, capsys):
    """The official test images of a data set choose nothing."""
    seen = {}

    def stop(*args, **options):
        seen.update(options)
        raise ZeroDivisionError

    monkeypatch.setattr("convexbn.estimators.path.fit_path", stop)
    with pytest.raises(ZeroDivisionError):
        run("digits", *GRID)
    assert len(seen["validation"][0]) == 360
    with pytest.raises(ZeroDivisionError):
        run("digits", *GRID, "--validation-size", "0")
    assert seen["validation"] is None


def test_the_same_command_goes_on_and_another_is_refused(data, tmp_path, capsys):
    arguments = [*data, *GRID, "--checkpoint", tmp_path / "points"]
    assert run(*arguments) == 0
    first, content = capsys.readouterr().out, (tmp_path / "points").read_bytes()
    assert run(*arguments) == 0 and capsys.readouterr().out == first
    assert (tmp_path / "points").read_bytes() == content and len(load_path(tmp_path / "points")) == 6
    assert run(*arguments, "--tol", "1e-7") == 1
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and "checkpoint of another path, which differs in tol (it was 1e-06 and is 1e-07)" in captured.err
    )


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures(ending, data, tmp_path):
    pictures = [tmp_path / f"path.{ending}", tmp_path / f"spectrum.{ending}"]
    assert run(*data, *GRID, "--plot", pictures[0], "--plot-spectrum", pictures[1]) == 0
    start = b"\x89PNG" if ending == "png" else b"<?xml"
    assert all(picture.read_bytes().startswith(start) for picture in pictures)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--plot", "path.bmp"], r"'path.bmp' is no name of a picture: let it end in .png, .svg, .pdf"),
        (["--out", "model", "--validation-size", "0"], "--out writes the best point"),
        (["--checkpoint", "missing/points"], "--checkpoint missing/points: the folder .* does not exist"),
        (["--plot", "missing/a.png"], "--plot missing/a.png: the folder"),
        (["--validation-size", "1.5"], r"must lie in \[0, 1\)"),
        (["--weight-decays", "1,-1"], "--weight-decays must be"),
        (["--ranks", "0"], "--ranks must be"),
    ],
)
def test_refusals(options, match, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*data, *options) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and re.search(match, captured.err) and captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def long_path(folder, *options):
    """A path whose first points take no time and whose third would take minutes."""
    rows = np.random.default_rng(0).standard_normal((7000, 30))
    np.savez(folder / "long.npz", X=rows, y=rows[:, 0] ** 2 + 3 * rows[:, 1])
    arguments = [folder / "long.npz", "--target", "y", "--weight-decays", "1e9,1e8,1e-6", "--tol", "0", *options]
    line = [sys.executable, "-m", "convexbn", "path", *map(str, arguments), "--max-iter", str(10**9)]
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # more threads than cores spin while others wait for them
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone)
    assert process.stdout.readline().startswith("1/3 ") and process.stdout.readline().startswith("2/3 ")
    return process


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_keeps_what_is_finished_and_says_how_to_go_on(number, code, word, tmp_path):
    file = tmp_path / "points"
    with long_path(tmp_path, "--checkpoint", file) as process:
        time.sleep(0.3)
        out, err, seconds = ended_by(process, number)
    assert seconds < 1
    assert process.returncode == code and out == "" and "Traceback" not in err
    assert f"convexbn: {word}: 2 of 3 points are finished and in {file}: the same command goes on from there." in err
    assert len(load_path(file)) == 2 and {path.name for path in tmp_path.iterdir()} == {"long.npz", "points"}


def test_without_a_checkpoint_a_signal_says_what_is_lost(tmp_path):
    with long_path(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "2 of 3 points are finished; with --checkpoint FILE they would have been kept." in err
