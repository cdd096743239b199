"""Studies of the companion systems: parts of their quick forms on digits, and what they decide."""

import pytest
import torch

from convexbn_studies import study
from convexbn_studies.page import study_page
from convexbn_studies.runner import Run

torch.set_num_threads(1)

#: Cells of the quick form that are run, and claims that hold on them: by their first words.
PARTS = {
    "understanding-bn": (
        lambda cell: cell["part"] != "rate" or cell["rate"] == 0.01,
        [
            "At the best rate", "Channel moments of residual", "A gradient step after which", "Gradients of middle",
            "At initialisation a deep network", "The noise of a step", "Squared singular values",
        ],
    ),
    "cross-iteration-bn": (
        lambda cell: cell.get("network") != "convolutions",
        ["The correction makes means", "Corrected statistics over a window", "At small batches"],
    ),
    "weight-rescaling": (
        lambda cell: cell["weight_decay"] in (0.0, 2e-2),
        ["Rescaling each filter", "Without weight decay the effective rate"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_the_directions_come_out_on_digits(name, tmp_path, monkeypatch):
    wanted, claims = PARTS[name]
    chosen = study(name)
    monkeypatch.setattr(Run, "missing", lambda run: (cell for cell in run.cells if wanted(cell)))
    state = torch.get_rng_state()
    run = Run(chosen, quick=True, folder=tmp_path)
    run.go_on()
    assert torch.equal(torch.get_rng_state(), state)
    decided = {finding.claim: finding for finding in run.findings}
    for words in claims:
        (finding,) = [finding for claim, finding in decided.items() if claim.startswith(words)]
        assert finding.holds, finding
    assert b"<svg" in study_page(run)


@pytest.mark.parametrize("name", PARTS)
def test_without_a_finished_seed_nothing_is_decided(name):
    row = {**study(name).cells(True)[0], "test_accuracy": 0.5, "epoch": 1}
    assert study(name).findings([row]) == [] and study(name).pictures([row]) == []


@pytest.mark.parametrize("name", PARTS)
def test_the_full_form_has_the_same_parts_on_three_seeds(name):
    full, quick = study(name).cells(False), study(name).cells(True)
    assert {cell["seed"] for cell in full} == {0, 1, 2} and {cell["seed"] for cell in quick} == {0}
    assert {cell.get("part") for cell in full} == {cell.get("part") for cell in quick}
    assert all(cell.get("data") in (None, "digits") for cell in quick) and study(name).needs_in_full == (
        "fashion-mnist",
    )
