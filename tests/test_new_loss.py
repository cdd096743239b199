"""A loss is one class: written here, it is fitted, certified, offered by the command line and listed by the guide."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status, load
from convexbn.cli import main
from convexbn.program.losses import LOSSES, Loss, loss_table

X = np.random.default_rng(0).standard_normal((40, 3))
Y = X[:, 0] ** 2 + 0.1 * np.random.default_rng(1).standard_normal(40)
GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


@dataclass(frozen=True)
class SumOfSquares(Loss):
    """``sum_i w_i ||f_i - y_i||^2``, twice the squared loss."""

    name: ClassVar[str] = "sum_of_squares"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "regression"})
    curvature: ClassVar[float] = 2.0

    def value(self, outputs):
        return float(self.weights @ ((outputs - self.targets) ** 2).sum(axis=1)) + self.constant

    def negative_gradient(self, outputs):
        return 2 * self.weights[:, None] * (self.targets - outputs)

    def dual_value(self, dual):
        terms = dual * self.targets - dual**2 / (4 * self.weights[:, None])
        return float(terms.sum() - 1e-13 * np.abs(terms).sum()) + self.constant

    def _root(self, outputs):
        return np.sqrt(2) * np.eye(outputs.shape[1])

    def _left_behind(self, means):
        return float(self.weights @ ((self.targets - means) ** 2).sum(axis=1))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(LOSSES, SumOfSquares.name, SumOfSquares)


@pytest.mark.parametrize("solver", ["auto", "subspace", "proximal"])
def test_gated_fits_are_those_of_half_the_weight_decay(solver):
    settings = {"n_gates": 20, "gates": "whitened", "random_state": 0, "tol": 1e-8}
    half = ConvexBNRegressor(weight_decay=0.1, **settings).fit(X, Y)
    model = ConvexBNRegressor(loss="sum_of_squares", weight_decay=0.2, solver=solver, **settings).fit(X, Y)
    assert model.certificate_.status is Status.CERTIFIED
    assert model.certificate_.objective == pytest.approx(2 * half.certificate_.objective, rel=1e-7)


def test_relu_fits_and_classes():
    settings = {"activation": "relu", "random_state": 0}
    half = ConvexBNRegressor(weight_decay=0.2, **settings).fit(X, Y)
    model = ConvexBNRegressor(loss="sum_of_squares", weight_decay=0.4, **settings).fit(X, Y)
    assert model.certificate_.objective == pytest.approx(2 * half.certificate_.objective, rel=1e-5)
    assert model.certificate_.lower_bound <= 2 * half.certificate_.objective
    classes = ConvexBNClassifier(loss="sum_of_squares", random_state=0, n_gates=10).fit(X, np.arange(40) % 3)
    assert classes.certificate_.status is Status.CERTIFIED and classes.predict_proba(X).shape == (40, 3)


def test_it_is_saved_and_loaded(tmp_path):
    model = ConvexBNRegressor(loss="sum_of_squares", random_state=0, n_gates=10).fit(X, Y)
    model.save(tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").certify(X, Y) == model.certify(X, Y)


def test_the_command_line_offers_it(tmp_path, capsys):
    table = tmp_path / "rows.csv"
    np.savetxt(table, np.c_[X, Y], delimiter=",", header="a,b,c,y", comments="")
    arguments = [str(table), "--target", "y", "--loss", "sum_of_squares", "--n-gates", "10"]
    assert main(["fit", *arguments, "--out", str(tmp_path / "m.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "CERTIFIED"
    for command in ("fit", "certify"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "sum_of_squares" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", *arguments[:3], "--loss", "nonsense", "--out", str(tmp_path / "n")])
    assert "sum_of_squares" in capsys.readouterr().err


def test_the_guide_lists_the_losses(monkeypatch):
    assert "| `sum_of_squares` | classification, regression |" in loss_table()
    monkeypatch.delitem(LOSSES, SumOfSquares.name)
    if GUIDE.exists():
        assert loss_table() in GUIDE.read_text(), "put the output of losses.loss_table() into the guide"
