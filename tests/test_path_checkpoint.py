"""Checkpoints of paths: resuming, refusals, killed processes, two writers, full disks."""

import os
import random
import resource
import signal
import sys
import time

import numpy as np
import pandas as pd
import pytest

from convexbn import ConvexBNClassifier, ConvexBNRegressor, FormatError, fit_path, load
from convexbn.estimators import KINDS, path_checkpoint
from convexbn.estimators.path import load_path
from convexbn.files import model_file

RNG = np.random.default_rng(3)
X = RNG.standard_normal((60, 5))
Y = np.tanh(X[:, 0]) + 0.2 * RNG.standard_normal(60)
LABELS = np.array(["no", "yes"])[np.greater(X[:, 0] * X[:, 1], 0).astype(int)]
FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def classifier(**changes):
    options = {"loss": "squared", "n_gates": 30, "random_state": 0, "gates": "data", "linear": False}
    return ConvexBNClassifier(**options | changes)


def start(file, model=None, **changes):
    options = {"weight_decays": [3, 1, 0.3, 0.1], "ranks": [2, None], "validation": (X[:20], LABELS[:20]), **changes}
    return fit_path(model or classifier(), X, LABELS, checkpoint=file, **options)


def assert_same(one, other):
    """Equal bit for bit: parameters, fitted attributes, certificates and scores."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        left, right = dict(vars(a.model)), dict(vars(b.model))
        for fitted in (left, right):
            fitted.update(vars(fitted.pop("network_")))
        assert left.keys() == right.keys() and a.score == b.score
        for name in left:
            assert np.array_equal(left[name], right[name]) and np.shape(left[name]) == np.shape(right[name]), name


# -- resuming --


@pytest.mark.parametrize(
    "model",
    [classifier(), classifier(gates="whitened"), classifier(gates=RNG.standard_normal((5, 9)), loss="logistic")],
    ids=["data", "whitened", "given"],
)
@pytest.mark.parametrize("finished", [0, 1, 4, 8])
def test_a_resumed_path_is_the_uninterrupted_one_bit_for_bit(model, finished, tmp_path):
    expected = list(start(None, model))
    broken = start(tmp_path / "path", model)
    for _ in range(finished):
        next(broken)
    assert_same(load_path(tmp_path / "path"), expected[:finished])
    resumed = start(tmp_path / "path", model)
    assert len(resumed.points) == finished
    assert_same(list(resumed), expected)
    assert_same(load_path(tmp_path / "path"), expected)


def test_a_resumed_relu_path_is_the_uninterrupted_one(tmp_path):
    def started(file):
        model = ConvexBNRegressor(activation="relu", random_state=0)
        return fit_path(model, X[:20, :2], Y[:20], weight_decays=[0.5, 0.2], checkpoint=file)

    expected = list(started(None))
    next(started(tmp_path / "path"))
    assert_same(list(started(tmp_path / "path")), expected)


def test_the_grid_of_the_data_is_kept(tmp_path):
    """It is computed from the data, whose last digit may depend on threads: the file's own goes on."""
    first = start(tmp_path / "path", weight_decays=None)
    next(first)
    stored = path_checkpoint.read(tmp_path / "path", KINDS)
    assert (
        stored.weight_decays == [decay for decay, rank in first.grid if rank == 2] and len(stored.weight_decays) == 20
    )
    assert start(tmp_path / "path", weight_decays=None).grid == first.grid


def test_points_can_be_used_without_the_data(tmp_path):
    points = list(start(tmp_path / "path"))
    loaded = load_path(tmp_path / "path")[5]
    assert (loaded.weight_decay, loaded.rank, loaded.score) == (points[5].weight_decay, None, points[5].score)
    assert np.array_equal(loaded.model.predict(X), points[5].model.predict(X))
    loaded.model.save(tmp_path / "model")
    assert load(tmp_path / "model").certificate_ == points[5].certificate


def test_gates_are_stored_once(tmp_path):
    for count in (1, 8):
        path_of = start(tmp_path / f"{count}")
        for _ in range(count):
            next(path_of)
    (one, _), (eight, _) = (model_file.read(tmp_path / name) for name in ("1", "8"))
    assert one.keys() == eight.keys() and one["gates"].shape == eight["gates"].shape == (150,)
    assert one["history"].size < eight["history"].size


# -- refusals --


def changed(array):
    array = np.array(array)
    array[3] = array[4]
    return array


CHANGES = {
    "X": lambda file: fit_path(classifier(), changed(X), LABELS, weight_decays=[1.0], checkpoint=file),
    "y": lambda file: fit_path(classifier(), X, changed(LABELS), weight_decays=[1.0], checkpoint=file),
    "sample_weight": lambda file: fit_path(
        classifier(), X, LABELS, weight_decays=[1.0], sample_weight=np.ones(60), checkpoint=file
    ),
    "validation rows": lambda file: fit_path(
        classifier(), X, LABELS, weight_decays=[1.0], validation=(X, LABELS), checkpoint=file
    ),
    "weight_decays": lambda file: fit_path(classifier(), X, LABELS, weight_decays=[2.0], checkpoint=file),
    "ranks": lambda file: fit_path(classifier(), X, LABELS, weight_decays=[1.0], ranks=[2], checkpoint=file),
    "n_gates": lambda file: fit_path(classifier(n_gates=31), X, LABELS, weight_decays=[1.0], checkpoint=file),
    "random_state": lambda file: fit_path(classifier(random_state=1), X, LABELS, weight_decays=[1.0], checkpoint=file),
    "tol": lambda file: fit_path(classifier(tol=1e-7), X, LABELS, weight_decays=[1.0], checkpoint=file),
    "feature names": lambda file: fit_path(
        classifier(), pd.DataFrame(X, columns=list("abcde")), LABELS, weight_decays=[1.0], checkpoint=file
    ),
    "estimator": lambda file: fit_path(
        ConvexBNRegressor(n_gates=30, random_state=0), X, Y, weight_decays=[1.0], checkpoint=file
    ),
    "gates": lambda file: fit_path(classifier(gates=np.eye(5)), X, LABELS, weight_decays=[1.0], checkpoint=file),
}


@pytest.mark.parametrize("part", CHANGES)
def test_another_question_is_refused_by_the_parts_that_differ(part, tmp_path):
    file = tmp_path / "path"
    list(fit_path(classifier(), X, LABELS, weight_decays=[1.0], checkpoint=file))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"path' is the checkpoint of another path, which differs in (.*, )?{part}"):
        CHANGES[part](file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["path"]


def test_all_parts_that_differ_are_named(tmp_path):
    list(fit_path(classifier(), X, LABELS, weight_decays=[1.0], checkpoint=tmp_path / "path"))
    named = r"differs in X, random_state \(it was 0 and is 1\), validation rows\. Ask"
    with pytest.raises(ValueError, match=named):
        fit_path(
            classifier(random_state=1), changed(X), LABELS, weight_decays=[1.0], validation=(X, LABELS),
            checkpoint=tmp_path / "path",
        )  # fmt: skip


def test_another_version_is_refused(tmp_path, monkeypatch):
    next(start(tmp_path / "path"))
    monkeypatch.setattr(path_checkpoint, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"differs in version \(it was '.*' and is '9.9'\)\."):
        start(tmp_path / "path")


def test_a_seed_is_needed(tmp_path):
    with pytest.raises(ValueError, match="needs an integer random_state"):
        start(tmp_path / "path", classifier(random_state=None))


def test_foreign_and_damaged_files_are_refused_and_left_alone(tmp_path):
    file = tmp_path / "path"
    next(start(file))
    whole = file.read_bytes()
    classifier().fit(X, LABELS).save(tmp_path / "model")
    with pytest.raises(FormatError, match=r"model' is not read: the field 'header'.*checkpoint of a path"):
        load_path(tmp_path / "model")
    with pytest.raises(FormatError, match="header"):
        load(file)
    for content in (whole[:-1], whole[:100], b"", b"x,y\n" * 100, whole.replace(b"squared", b"Squared")):
        file.write_bytes(content)
        for attempt in (lambda: load_path(file), lambda: start(file)):
            with pytest.raises(FormatError, match="path"):
                attempt()
        assert file.read_bytes() == content


def test_points_that_contradict_themselves_are_refused(tmp_path):
    file = tmp_path / "path"
    list(start(file))
    arrays, header = model_file.read(file)
    swapped = dict(header, points=[dict(point, tensors=header["points"][-1]["tensors"]) for point in header["points"]])
    outside = dict(header["points"][0]["tensors"], mean=[10**12, 5])
    beyond = dict(header, points=[dict(header["points"][0], tensors=outside)])
    for wrong in (swapped, beyond, dict(header, points=[{}]), dict(header, weight_decays=[]), dict(header, more=1)):
        model_file.write(file, arrays, wrong)
        with pytest.raises(FormatError, match="does not fit"):
            load_path(file)


# -- processes that die, disks that are full --


def forked(work):
    """Run something in a child; return its process id."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        try:
            work()
        finally:
            os._exit(0)
    return child


def killed_until_finished(file, expected, chance):
    """Start the path again and again, each time killed at a random instant; return the number of kills.

    The instants come later where a machine is too slow to finish a point by then.
    """
    kills, known, longest = 0, 0, 0.1
    while True:
        child = forked(lambda: list(start(file)))
        time.sleep(chance.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if file.exists():
            points = load_path(file)
            assert len(points) >= known
            assert_same(points, expected[: len(points)])
            longest *= 1.0 if len(points) > known else 1.3
            known = len(points)
        if known == len(expected):
            return kills


@FORK
def test_kill_9_never_loses_a_finished_point_nor_changes_the_path(tmp_path):
    expected, chance = list(start(None)), random.Random(0)
    assert killed_until_finished(tmp_path / "path", expected, chance) >= 1
    (tmp_path / ".path.0123456789abcdef.tmp").write_bytes(b"half of a")  # as a killed process leaves it
    assert_same(list(start(tmp_path / "path")), expected)


@FORK
def test_two_writers_never_mix(tmp_path):
    file, settings = tmp_path / "path", {30: classifier(), 20: classifier(n_gates=20)}
    expected = {n_gates: list(start(None, model)) for n_gates, model in settings.items()}

    def rewrite(model):
        for _ in range(3):
            points = start(None, model)
            question = path_checkpoint.question_of(model, [3.0, 1.0, 0.3, 0.1], [2, None], {})
            for finished in points:
                stored = [(point.model, point.score) for point in points.points]
                path_checkpoint.write(file, path_checkpoint.StoredPath(question, [3.0, 1.0, 0.3, 0.1], stored))
                assert finished is points.points[-1]

    children, seen = [forked(lambda model=model: rewrite(model)) for model in settings.values()], set()
    while children:
        if file.exists():
            points = load_path(file)
            n_gates = points[0].model.n_gates
            assert_same(points, expected[n_gates][: len(points)])
            seen.add(n_gates)
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
    assert seen == set(settings) and os.listdir(tmp_path) == ["path"]


@FORK
def test_a_full_disk_is_an_error_with_the_path_and_the_points_stay_in_memory(tmp_path):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        finished = start(tmp_path / "path ä")
        next(finished)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            list(finished)
        except OSError as error:
            told = error.filename == str(tmp_path / "path ä")
            kept = len(finished.points) > len(load_path(tmp_path / "path ä")) >= 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            rest = len(list(finished)) + len(finished.points) - len(load_path(tmp_path / "path ä"))
            (tmp_path / "result").write_text(f"{told} {kept} {rest > 0} {len(finished.points)}")

    os.waitpid(forked(work), 0)
    assert (tmp_path / "result").read_text() == "True True True 8"
    assert sorted(os.listdir(tmp_path)) == ["path ä", "result"]


@pytest.mark.parametrize("place", ["missing/path", ""])
def test_places_that_cannot_be_written_are_refused_before_any_work(place, tmp_path):
    with pytest.raises(OSError) as caught:
        start(tmp_path / place)
    assert caught.value.filename == str(tmp_path / place)


if __name__ == "__main__":  # python tests/test_path_checkpoint.py 50: as many kills at random instants
    from pathlib import Path
    from tempfile import TemporaryDirectory

    wanted, kills, chance, expected = int(sys.argv[1]), 0, random.Random(1), list(start(None))
    while kills < wanted:
        with TemporaryDirectory() as folder:
            kills += killed_until_finished(Path(folder) / "path", expected, chance)
    print(f"{kills} kills: no finished point was lost, and every path equals the uninterrupted one bit for bit")
