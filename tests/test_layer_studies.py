"""The studies of the differentiable layer and of SGD against ridge: quick forms, and findings that can fail."""

import pytest

from convexbn_studies import study

pytestmark = pytest.mark.xdist_group("layer studies")  # one process runs each study once


def rows_of(name, change):
    """Lines of the cells of the quick form, each changed, or left out where the change is None."""
    cells = [change(cell) for cell in study(name).cells(True)]
    return [row for cell in cells if cell is not None for row in study(name).run(cell)]


@pytest.fixture(scope="module")
def layer_rows():
    """One seed of three, smaller."""
    smaller = {"n": 100, "held_out": 300, "solves": 15, "side": 3}
    return rows_of("differentiable-layer", lambda cell: cell | smaller if cell["seed"] == 0 else None)


@pytest.fixture(scope="module")
def ridge_rows():
    """Few draws of ridge, which leave the directions."""
    return rows_of("sgd-vs-ridge", lambda cell: cell | {"runs": 3} if "runs" in cell else cell)


def verdicts(name, rows):
    return [finding.holds for finding in study(name).findings(rows)]


def test_the_layer_study_holds(layer_rows):
    assert verdicts("differentiable-layer", layer_rows) == [True] * 5
    assert len(study("differentiable-layer").pictures(layer_rows)) == 2


@pytest.mark.parametrize(
    ("place", "where", "changes"),
    [
        (0, {"part": "derivatives", "what": "filter"}, {"error": 2e-4}),
        (1, {"part": "gradient"}, {"loss": 9.0}),
        (2, {"part": "attacks", "what": "weight decay"}, {"after": 9.0}),
        (3, {"part": "attacks", "what": "targets"}, {"after": 0.0}),
        (4, {"part": "attacks", "what": "inputs"}, {"after_random": 9.0}),
    ],
)
def test_findings_of_the_layer_study_can_fail(layer_rows, place, where, changes):
    rows = [row | changes if where.items() <= row.items() else row for row in layer_rows]
    assert verdicts("differentiable-layer", rows) == [i != place for i in range(5)]


def test_the_ridge_study_holds(ridge_rows):
    separated, _, everywhere, undecided, averaged = verdicts("sgd-vs-ridge", ridge_rows)
    assert separated and everywhere and averaged and undecided is None
    assert len(study("sgd-vs-ridge").pictures(ridge_rows)) == 3


@pytest.mark.parametrize(
    ("place", "where", "column", "factor"),
    [
        (0, {"design": "one_hot", "n": 1024}, "ridge_rows", 0.3),
        (1, {"method": "ridge", "truth": 10}, "risk", 0.4),
        (2, {"method": "ridge", "truth": 0}, "risk", 3.0),
        (4, {"method": "sgd", "truth": 10}, "risk_of_all", 0.1),
    ],
)
def test_findings_of_the_ridge_study_can_fail(ridge_rows, place, where, column, factor):
    rows = [row | {column: row[column] * factor} if where.items() <= row.items() else row for row in ridge_rows]
    assert verdicts("sgd-vs-ridge", rows)[place] is False


def test_ridge_that_is_never_reached_decides_nothing(ridge_rows):
    rows = [row | {"risk": 1e-9 * row["risk"]} if row.get("method") == "ridge" else row for row in ridge_rows]
    assert verdicts("sgd-vs-ridge", rows)[1:3] == [None, None]


@pytest.mark.parametrize("name", ["differentiable-layer", "sgd-vs-ridge"])
def test_the_full_form_has_every_seed_and_case(name):
    cells = study(name).cells(False)
    assert {cell["seed"] for cell in cells if "seed" in cell} == {0, 1, 2}
    if name == "sgd-vs-ridge":
        assert len({(cell["decay"], cell["truth"]) for cell in cells if cell["design"] == "gaussian"}) == 6
