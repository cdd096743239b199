"""Studies of the paper: what their lines decide, said as it is; and the quick forms, run."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

import convexbn_studies
from convexbn import cli
from convexbn_studies import certificate, closed_form, equivalence, gd_bias, neural_collapse, speed, truncation
from convexbn_studies.data import draw, leading, planted, split

OWN = ["equivalence", "closed-form", "neural-collapse", "gd-bias", "certificate", "truncation", "speed"]


def holds(found, start):
    """Verdicts of the claims that begin with these words."""
    verdicts = [finding.holds for finding in found if finding.claim.startswith(start)]
    assert verdicts, [finding.claim for finding in found]
    return verdicts


def changed(rows, where, **changes):
    """The lines with some values changed in those that a predicate chooses."""
    return [row | changes if where(row) else row for row in rows]


def is_method(*names):
    return lambda row: row.get("method") in names


# -- every study --


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("quick", [True, False])
def test_cells_are_settings_that_json_holds(name, quick):
    known = convexbn_studies.study(name)
    cells = known.cells(quick)
    assert cells and len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    for text in (known.title, known.source, known.departures):
        assert text and text == text.strip()
    assert 0 < known.minutes[0] < 3 and sum(convexbn_studies.study(other).minutes[1] for other in OWN) < 180


@pytest.mark.parametrize("name", OWN)
def test_the_quick_form_needs_no_data_set(name):
    assert not set(convexbn_studies.study(name).needs) & {"fashion-mnist", "cifar-10"}
    sets = {cell.get("data") for cell in convexbn_studies.study(name).cells(True)}
    assert sets <= {"digits", None}


# -- the data --


def test_parts_are_disjoint_and_follow_from_the_seed():
    parts = draw("digits", (100, 200), seed=1)
    again = draw("digits", (100, 200), seed=1)
    assert all(
        np.array_equal(a, b) for one, two in zip(parts, again, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert [len(X) for X, _ in parts] == [100, 200] and parts[0][0].max() <= 1
    rows = np.vstack([X for X, _ in parts])
    assert len(np.unique(rows, axis=0)) == 300
    training, validation, test = split("digits", 0, 500, seed=0)
    assert [len(X) for X, _ in (training, validation, test)] == [797, 500, 500]
    with pytest.raises(ValueError, match="fewer than 2000"):
        draw("digits", (2000,), seed=0)


def test_planted_targets_are_those_of_a_network_and_noise():
    X, Y = planted(400, 3, seed=0, neurons=4, outputs=2)
    assert X.shape == (400, 3) and Y.shape == (400, 2) and np.allclose(Y.std(axis=0), 1)
    assert np.array_equal(planted(400, 3, seed=0, neurons=4, outputs=2)[1], Y)
    assert leading(np.ones(600)) == (50, pytest.approx(50 / 600)) and leading(np.ones(60))[0] == 10


# -- equivalence --


def equivalence_rows():
    optimum = {"problem": "planted", "method": "convex", "objective": 4.0, "lower_bound": 3.99999, "neurons": 5}
    runs = [
        {"problem": "planted", "method": method, "rate": 0.1, "width": width, "seed": seed, "objective": value + seed}
        for method in ("adam", "sgd")
        for width, value in ((2, 5.0), (50, 4.0001))
        for seed in (0, 1)
    ]
    return [optimum | {"status": "CERTIFIED", "title": "made up"}, *runs]


def test_equivalence_is_decided_by_the_runs():
    rows = equivalence_rows()
    assert [finding.holds for finding in equivalence.findings(rows)] == [True, True, True]
    below = changed(rows, lambda row: row.get("width") == 50, objective=3.9)
    assert holds(equivalence.findings(below), "No training ends below") == [False]
    far = changed(rows, lambda row: row.get("width") == 50, objective=4.1)
    assert holds(equivalence.findings(far), "Wide networks touch") == [False]
    reached = changed(rows, lambda row: row.get("width") == 2, objective=4.0)
    assert holds(equivalence.findings(reached), "Narrow networks stay above") == [False]
    without = [row for row in rows if row.get("width") != 2]
    assert holds(equivalence.findings(without), "Narrow networks") == [None]
    diverged = changed(rows, lambda row: row.get("seed") == 1, objective=None)
    assert [finding.holds for finding in equivalence.findings(diverged)] == [True, True, True]


# -- closed form --


def closed_form_rows():
    shared = {"data": "digits", "n": 50}
    formula = shared | {
        "method": "formula", "rank": 49, "neurons": 10, "seconds": 0.1, "objective": 2.0, "lower_bound": 2.0,
        "status": "CERTIFIED",
    }  # fmt: skip
    runs = [
        shared | {"method": method, "rate": rate, "seed": 0, "step": step, "seconds": 1.0, "objective": 2 + 1 / step}
        for method, rates in {"adam": (0.001, 0.01, 0.1), "sgd": (0.01, 0.1, 0.5)}.items()
        for rate in rates
        for step in (1, 1000)
    ]  # fmt: skip
    return [formula, *runs]


def test_the_closed_form_is_decided_by_its_certificate_and_the_runs():
    rows = closed_form_rows()
    assert [finding.holds for finding in closed_form.findings(rows)] == [True, True, True]
    unproved = changed(rows, is_method("formula"), status="GAP_OPEN", lower_bound=1.0)
    assert holds(closed_form.findings(unproved), "The formula gives") == [False]
    below = changed(rows, lambda row: row.get("step") == 1, objective=1.9)
    assert holds(closed_form.findings(below), "Training never goes below") == [False]
    far = changed(rows, lambda row: row.get("step") == 1000, objective=2.5)
    assert holds(closed_form.findings(far), "Training approaches") == [False]


# -- neural collapse --


def neural_collapse_rows():
    shared = {"data": "digits", "n": 100, "loss": "squared", "classes": "equal"}
    measures = {
        "within_class": 0.0, "norm_variation": 0.0, "angle_deviation": 0.0, "duality_centred": 0.3,
        "duality_uncentred": 0.0, "disagreement": 0.0,
    }  # fmt: skip
    formula = {"what": "formula", "epoch": None, "objective": 7.0, "lower_bound": 7.0, "status": "CERTIFIED"}
    training = [
        {"what": "Adam", "epoch": epoch, "objective": 7 + 1 / epoch, **measures, "within_class": 0.1 / epoch}
        for epoch in (1, 100)
    ]
    again = {"what": "re-optimised", "epoch": None, "objective": 7.0, "status": "CERTIFIED"}
    return [shared | row for row in (formula | measures, *training, again)]


def test_neural_collapse_is_decided_by_the_distance_from_the_formula():
    rows = neural_collapse_rows()
    assert [finding.holds for finding in neural_collapse.findings(rows)] == [True, True, True]
    for measure in ("within_class", "norm_variation", "duality_centred", "disagreement"):
        off = changed(rows, lambda row: row["epoch"] == 100, **{measure: 0.9})
        assert holds(neural_collapse.findings(off), "The features") == [False]
    below = changed(rows, lambda row: row["what"] == "Adam", objective=6.9)
    assert holds(neural_collapse.findings(below), "The formula is the least") == [False]
    missed = changed(rows, lambda row: row["what"] == "re-optimised", objective=7.1)
    assert holds(neural_collapse.findings(missed), "It is attained") == [False]


# -- implicit bias --


def gd_bias_rows(**tests):
    tests = {"start and speed": 0.9, "start": 0.7, "speed": 0.6, "neither": 0.3} | tests
    identity = [{"part": "identity", "seed": seed, "error": 1e-15, "slope": 2.05} for seed in range(2)]
    ways = [
        {
            "part": "ablation", "way": way, "rate": rate, "seed": seed, "validation": test - rate, "test": test - rate,
            "top": 50, "top_share": 0.1 if way == "neither" else 0.9, "slope": 1.8,
        }
        for way, test in tests.items()
        for rate in (0.01, 0.1)
        for seed in (0, 1)
    ]  # fmt: skip
    return identity + ways


def test_the_bias_is_decided_by_the_four_ways():
    assert [finding.holds for finding in gd_bias.findings(gd_bias_rows())] == [True] * 5
    assert holds(gd_bias.findings(gd_bias_rows(neither=0.95)), "Without either effect") == [False]
    assert holds(gd_bias.findings(gd_bias_rows(start=0.95)), "Either effect alone") == [False]
    assert holds(gd_bias.findings(gd_bias_rows(speed=0.2)), "Either effect alone") == [False]
    wrong = changed(gd_bias_rows(), lambda row: row.get("part") == "identity", error=1e-3, slope=1.0)
    assert holds(gd_bias.findings(wrong), "Gradient descent on w") == [False]
    assert holds(gd_bias.findings(wrong), "A step moves") == [False]
    spread = changed(gd_bias_rows(), lambda row: row.get("way") == "start and speed", top_share=0.05)
    assert holds(gd_bias.findings(spread), "The first layer's energy") == [False]


def test_the_learning_rate_is_chosen_on_validation_rows_alone():
    rows = changed(gd_bias_rows(), lambda row: row.get("rate") == 0.1, test=0.99)
    assert "both (SGD on X) 89.0," in gd_bias.findings(rows)[0].figure


# -- certificate --


def certificate_rows():
    optimum = {"problem": "images", "title": "made up", "method": "convex", "objective": 2.0, "lower_bound": 2.0}
    runs = [
        {
            "problem": "images", "method": method, "decay": decay, "width": width, "seed": 0, "step": step,
            "objective": 2 + gap, "lower_bound": 2 - gap, "gap": gap,
        }
        for method in ("adam", "sgd")
        for decay in (True, False)
        for width in (5, 50)
        for step in (10, 100)
        for gap in [0.5 if step == 10 or width == 5 or not decay else 1e-3]
    ]  # fmt: skip
    return [optimum | {"gap": 0.0, "neurons": 10}, *runs]


def test_the_certificate_is_decided_by_the_gaps():
    rows = certificate_rows()
    assert [finding.holds for finding in certificate.findings(rows)] == [True] * 4
    invalid = changed(rows, lambda row: row.get("step") == 10, lower_bound=2.1)
    assert holds(certificate.findings(invalid), "No bound") == [False]
    still = changed(rows, lambda row: row.get("step") == 100, gap=0.4)
    assert holds(certificate.findings(still), "The gap of a wide network") == [False]
    closed = changed(rows, lambda row: row.get("step") == 100, gap=1e-4)
    assert holds(certificate.findings(closed), "The gap of narrow networks") == [False]
    assert holds(certificate.findings(closed), "Networks trained without") == [False]


# -- truncation --


def truncation_rows(n=600, data="digits", **tests):
    tests = {"sgd": 0.8, "sgd-whitened": 0.3, "convex": 0.5, "truncated": 0.82, "filtered": 0.81} | tests
    rows = []
    for method, test in tests.items():
        shared = {"data": data, "n": n, "method": method, "seed": 0}
        tries = [(test, test, True), (test - 0.1, 0.99, False)]
        rows += [shared | {"validation": v, "test": t, "chosen": kept, "setting": "s"} for v, t, kept in tries]
        rows.append(shared | {"top": 50, "top_share": 0.2 if method == "convex" else 0.9})
        rows += [shared | {"direction": i, "energy": 1.0 / i} for i in (1.0, 10.0)]
    return rows


def test_truncation_is_decided_by_the_chosen_tries():
    found = truncation.findings(truncation_rows())
    assert [finding.holds for finding in found] == [True] * 5 and "digits, 600 rows: +50.0" in found[0].figure
    assert holds(truncation.findings(truncation_rows(**{"sgd-whitened": 0.9})), "The same network class") == [False]
    assert holds(truncation.findings(truncation_rows(truncated=0.4)), "Truncation improves") == [False]
    assert holds(truncation.findings(truncation_rows(filtered=0.4)), "A smooth filter") == [False]
    assert holds(truncation.findings(truncation_rows(sgd=0.9)), "The truncated convex program") == [False]
    mixed = truncation_rows() + truncation_rows(n=2000, sgd=0.9)
    assert holds(truncation.findings(mixed), "The truncated convex program") == [False]
    part = [row for row in truncation_rows() if row["method"] in ("sgd", "convex")]
    assert [finding.claim[:10] for finding in truncation.findings(part)] == ["SGD keeps "]


# -- speed --


def speed_rows():
    ours = [(0.1, 10.0), (0.2, 8.0)]
    rows = [{"method": "ours", "seconds": s, "objective": v, "lower_bound": 7.99999999999} for s, v in ours]
    rows += [{"method": "Clarabel", "seconds": 9.0, "objective": 8.0}]
    rows += [
        {"method": "Adam", "seed": seed, "seconds": s, "objective": 8 + 1 / s} for seed in (0, 1) for s in (1.0, 9.0)
    ]
    return [{"program": "small G", **row} for row in rows]


def test_speed_is_decided_by_the_seconds_to_one_error():
    (found,) = speed.findings(speed_rows())
    assert found.holds and "Clarabel 9 s" in found.figure and "Adam never" in found.figure
    (slower,) = speed.findings(changed(speed_rows(), is_method("ours"), seconds=20.0))
    assert slower.holds is False
    (lower,) = speed.findings(changed(speed_rows(), is_method("Adam"), objective=7.0))
    assert "-1e-01 relative to ours" in lower.figure


# -- pictures --


ROWS = {
    "equivalence": equivalence_rows, "closed-form": closed_form_rows, "neural-collapse": neural_collapse_rows,
    "gd-bias": gd_bias_rows, "certificate": certificate_rows, "truncation": truncation_rows, "speed": speed_rows,
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_pictures_have_titles_and_named_axes(name):
    drawn = convexbn_studies.study(name).pictures(ROWS[name]())
    assert drawn
    for picture in drawn:
        assert picture.title and isinstance(picture.figure, Figure)
        for axes in picture.figure.axes:
            assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_xticklabels())


# -- the quick forms --


@pytest.mark.parametrize("name", ["equivalence", "closed-form", "gd-bias"])
def test_the_quick_form_runs_and_writes_its_page(name, tmp_path, capsys):
    assert cli.main(["reproduce", name, "--quick", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    page = (tmp_path / f"{name}-quick.html").read_text()
    assert "quick form" in page and page.count("<svg") >= 1 and "HOLDS HERE" in told
    first = told.index("HOLDS HERE")
    assert "DOES NOT" not in told[first - 9 : first], told[first - 100 :]
    if name == "equivalence":
        assert told.count("HOLDS HERE: No training ends below") == 2


def test_a_network_trained_by_torch_is_read_as_it_is():
    """The objective of the networks that are read is that of torch's own batch norm."""
    torch = pytest.importorskip("torch")
    from convexbn.program.losses import SquaredLoss
    from convexbn_studies.descent import Descent, balanced_objective

    X, Y = planted(40, 3, seed=0)
    loss = SquaredLoss(Y, np.ones(40))
    for seed, network in enumerate(Descent("adam", 0.05, 30, 7, range(2)).last(X, loss, 0.1)):
        (alone,) = Descent("adam", 0.05, 30, 7, [seed]).last(X, loss, 0.1)
        assert np.allclose(network.predict(X), alone.predict(X), atol=1e-10)
        weight, root = torch.tensor(network.weight), np.sqrt(40)
        scale, shift = torch.tensor(network.gamma / root), torch.tensor(network.shift / root)
        hidden = torch.nn.functional.batch_norm(torch.tensor(X) @ weight, None, None, scale, shift, True, 0.0, 1e-14)
        outputs = (torch.relu(hidden) @ torch.tensor(network.output)).numpy()
        norms = np.hypot(network.gamma, network.shift) * np.abs(network.output[:, 0])
        value = 0.5 * np.sum((outputs - Y) ** 2) + 0.1 * norms.sum()
        assert balanced_objective(network, X, loss, 0.1) == pytest.approx(value, rel=1e-10)
    assert balanced_objective(None, X, loss, 0.1) == np.inf


def test_descent_without_momentum_in_q_is_the_one_in_w():
    row = gd_bias.run({"part": "identity", "seed": 0})[0]
    assert row["error"] < 1e-12 and abs(row["slope"] - 2) < 0.2


@pytest.mark.parametrize("method", ["ours", "Clarabel", "Adam"])
@pytest.mark.parametrize("program", ["small G", "small E"])
def test_each_method_of_the_speed_study_reaches_the_optimum(program, method):
    (cell,) = [c for c in speed.cells(True) if c["program"] == program and c["method"] == method]
    rows = speed.run(cell | {"seeds": 1} if method == "Adam" else cell)
    (best,) = speed.run({"program": program, "method": "ours"})[-1:]
    end = min(row["objective"] for row in rows)
    assert best["lower_bound"] * (1 - 1e-6) <= end <= best["objective"] * (1 + (0.02 if method == "Adam" else 1e-4))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_truncation_tunes_and_tells_every_try(monkeypatch):
    (cell,) = [cell for cell in truncation.cells(True) if cell["method"] == "truncated"]
    monkeypatch.setattr(truncation, "_tries", lambda given, first, second: [(10, 0.03), (20, 0.03)])
    rows = truncation.run(cell)
    tries = [row for row in rows if row.get("setting")]
    assert len(tries) == 2 and sum(row["chosen"] for row in tries) == 1 and "CERTIFIED" in tries[0]["setting"]
    best = max(tries, key=lambda row: row["validation"])
    assert best["chosen"] and best["test"] > 0.5
