"""The studies of the differentiable layer and of SGD against ridge, in their quick forms or a part of them."""

import pytest

from convexbn.studies import study


def rows_of(name, change):
    """Lines of the cells of the quick form, each changed, or left out where the change is None."""
    cells = [change(cell) for cell in study(name).cells(True)]
    return [row for cell in cells if cell is not None for row in study(name).run(cell)]


def test_the_layer_study_holds():
    """One seed of its three, smaller."""
    smaller = {"n": 100, "held_out": 300, "solves": 15, "side": 3}
    rows = rows_of("differentiable-layer", lambda cell: cell | smaller if cell["seed"] == 0 else None)
    findings = study("differentiable-layer").findings(rows)
    assert len(findings) == 5 and all(finding.holds for finding in findings), findings
    assert len(study("differentiable-layer").pictures(rows)) == 2


def test_the_ridge_study_holds():
    """Fewer draws of ridge, which leave the direction."""
    rows = rows_of("sgd-vs-ridge", lambda cell: cell | {"runs": 3} if "runs" in cell else cell)
    separated, _, everywhere, open_question, averaged = study("sgd-vs-ridge").findings(rows)
    assert separated.holds and everywhere.holds and averaged.holds and open_question.holds is None
    assert len(study("sgd-vs-ridge").pictures(rows)) == 3


@pytest.mark.parametrize("name", ["differentiable-layer", "sgd-vs-ridge"])
def test_the_full_form_has_every_seed_and_case(name):
    cells = study(name).cells(False)
    assert {cell["seed"] for cell in cells if "seed" in cell} == {0, 1, 2}
    if name == "sgd-vs-ridge":
        assert len({(cell["decay"], cell["truth"]) for cell in cells if cell["design"] == "gaussian"}) == 6
