"""The convex layer at work: weight decay and spectral filter chosen by gradient, and training data poisoned by it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convexbn.data.whitening import whiten
from convexbn.program.gated import gated_operator
from convexbn_studies import drawing
from convexbn_studies.data import draw
from convexbn_studies.drawing import BLUE, ORANGE, chosen, column, distinct
from convexbn_studies.study import Cell, Finding, Picture, Row, Study

if TYPE_CHECKING:
    import torch

_SEEDS = 3
_CLASSES = 10

#: Where the descent starts, and what the attacks are given: weight decay as a share of the largest, and tau / s_1.
_START = (0.1, 0.01)

#: Ends of the grid.
_SHARES, _FILTERS = (0.003, 0.3), (0.003, 3.0)

#: Length of a poisoning step, relative to what it is added to, and directions drawn beside it.
_POISON, _DRAWS = 0.02, 8

#: Directions of the inputs that are attacked.
_COORDINATES = 30


def cells(quick: bool) -> list[Cell]:
    """For each seed: derivatives, the choice by gradient and on a grid, and the attacks."""
    sizes: Cell = {"data": "digits", "n": 150, "held_out": 500, "gates": 40, "solves": 20, "side": 5}
    if not quick:
        sizes = {"data": "fashion-mnist", "n": 500, "held_out": 2000, "gates": 60, "solves": 30, "side": 8}
    parts = ("derivatives", "gradient", "grid", "attacks")
    return [{"part": part, "seed": seed, **sizes} for seed in range(_SEEDS) for part in parts]


def run(cell: Cell) -> list[Row]:
    """Lines of a part."""
    parts: Any = {"derivatives": _derivatives, "gradient": _descend, "grid": _search, "attacks": _attack}
    problem = _Problem.of(cell)
    lines: list[Row] = parts[cell["part"]](problem, cell)
    return [{"part": cell["part"], "data": cell["data"], "seed": cell["seed"]} | line for line in lines]


def findings(rows: list[Row]) -> list[Finding]:
    """Derivatives, choice, attacks."""
    return [_exact(rows), _chosen_well(rows), _one_step(rows), _poisoned(rows, "targets"), _poisoned(rows, "inputs")]


def pictures(rows: list[Row]) -> list[Picture]:
    """The descent on the map of the grid, and the attacks beside random steps."""
    return [_map(rows), _attacks(rows)]


@dataclass
class _Problem:
    """Training, validation and test rows in the singular directions of the training rows, one-hot, in float64."""

    Z: list[torch.Tensor]  # centred rows of the three parts in the singular directions
    Y: list[torch.Tensor]
    patterns: list[torch.Tensor]
    values: torch.Tensor  # singular values
    largest: float  # weight decay of the zero network, without a filter

    @classmethod
    def of(cls, cell: Cell) -> _Problem:
        import torch

        from convexbn.program.gated import GatedProgram
        from convexbn.program.losses import SquaredLoss

        given: Any = cell
        parts = draw(given["data"], (given["n"], given["held_out"], given["held_out"]), given["seed"])
        whitening = whiten(parts[0][0], rank=min(given["n"] // 2, 200))
        gates = np.random.default_rng(given["seed"]).standard_normal((parts[0][0].shape[1], given["gates"]))
        values = whitening.singular_values[: whitening.rank]
        Y = [np.eye(_CLASSES)[labels] for _, labels in parts]
        opened = [(X - whitening.mean) @ gates >= 0 for X, _ in parts]
        program = GatedProgram(gated_operator(whitening.rows, opened[0]), SquaredLoss(Y[0], np.ones(given["n"])), 1.0)
        return cls(
            Z=[torch.tensor(whitening.transform(X)[:, :-1] * values) for X, _ in parts],
            Y=[torch.tensor(y) for y in Y],
            patterns=[torch.tensor(gate) for gate in opened],
            values=torch.tensor(values),
            largest=program.max_weight_decay(),
        )

    def rows(self, part: int, log_tau: torch.Tensor) -> torch.Tensor:
        """``A Phi`` of a part."""
        filtered = self.Z[part] / (self.values**2 + (log_tau.exp() * self.values[0]) ** 2).sqrt()
        return _with_constant(filtered, len(self.Z[0]))

    def judged(self, rows: torch.Tensor, weights: torch.Tensor, part: int) -> tuple[torch.Tensor, float]:
        """Mean loss on a part that is not trained on, from its whitened rows, and accuracy."""
        from convexbn.nn import gated_outputs

        outputs = gated_outputs(rows, self.patterns[part], weights)
        hits = outputs.argmax(dim=1) == self.Y[part].argmax(dim=1)
        return 0.5 * (outputs - self.Y[part]).square().sum(dim=1).mean(), float(hits.double().mean())


def _layer(problem: _Problem) -> Any:
    from convexbn.nn import ConvexLayer

    return ConvexLayer(problem.patterns[0], fit_intercept=False)


def _with_constant(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Rows with the constant column of ``n`` training rows."""
    import torch

    return torch.cat([rows, torch.full_like(rows[:, :1], n**-0.5)], dim=1)


def _validation(problem: _Problem, layer: Any, logs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Validation loss at logarithms of the share of the weight decay and of the filter, and the weights."""
    _, weights = layer(problem.rows(0, logs[1]), problem.Y[0], logs[0].exp() * problem.largest)
    return problem.judged(problem.rows(1, logs[1]), weights, 1)[0], weights


def _logs(share: float, tau: float) -> torch.Tensor:
    import torch

    return torch.tensor([np.log(share), np.log(tau)], dtype=torch.float64, requires_grad=True)


def _described(problem: _Problem, logs: torch.Tensor, loss: torch.Tensor, weights: torch.Tensor, started: float) -> Row:
    """A point of the descent or of the grid."""
    seconds = time.process_time() - started
    accuracies = [problem.judged(problem.rows(part, logs[1]), weights, part)[1] for part in (1, 2)]
    share, tau = (float(value) for value in logs.detach().exp())
    return {
        "seconds": seconds, "share": share, "tau": tau, "loss": float(loss.detach()),
        "accuracy": accuracies[0], "test_accuracy": accuracies[1],
    }  # fmt: skip


def _descend(problem: _Problem, cell: Cell) -> list[Row]:
    """Adam on the logarithms of weight decay and filter."""
    import torch

    layer, logs, lines = _layer(problem), _logs(*_START), []
    adam = torch.optim.Adam([logs], lr=0.3, betas=(0.7, 0.9))
    started = time.process_time()
    for _ in range(int(str(cell["solves"]))):
        adam.zero_grad()
        loss, weights = _validation(problem, layer, logs)
        loss.backward()  # type: ignore[no-untyped-call]
        lines.append(_described(problem, logs, loss, weights, started))
        adam.step()
    return lines


def _search(problem: _Problem, cell: Cell) -> list[Row]:
    """The same loss on a grid, each column of it a path from the largest weight decay."""
    import torch

    side, lines = int(str(cell["side"])), []
    started = time.process_time()
    for tau in np.geomspace(*_FILTERS, side):
        layer = _layer(problem)
        for share in np.geomspace(*_SHARES, side)[::-1]:
            with torch.no_grad():
                logs = _logs(share, tau)
                loss, weights = _validation(problem, layer, logs)
            lines.append(_described(problem, logs, loss, weights, started))
    return lines


def _derivatives(problem: _Problem, cell: Cell) -> list[Row]:
    """Derivatives of the validation loss along random directions, against central differences."""
    import torch

    layer, logs = _layer(problem), _logs(*_START).detach()
    random = torch.Generator().manual_seed(int(str(cell["seed"])))
    leaves = {"targets": problem.Y[0], "rows": problem.rows(0, logs[1]), "weight decay": logs[0], "filter": logs[1]}
    lines: list[Row] = []
    for what, leaf in leaves.items():
        along = torch.randn(leaf.shape, generator=random, dtype=torch.float64)

        def loss(t: torch.Tensor, what: str = what, along: torch.Tensor = along) -> torch.Tensor:
            moved = {name: value + t * along if name == what else value for name, value in leaves.items()}
            rows = problem.rows(0, moved["filter"]) if what == "filter" else moved["rows"]
            _, weights = layer(rows, moved["targets"], moved["weight decay"].exp() * problem.largest)
            return problem.judged(problem.rows(1, moved["filter"]), weights, 1)[0]

        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss(t).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            h = 1e-5 * float(leaf.norm() / along.norm())
            difference = float(loss(t + h) - loss(t - h)) / (2 * h)
        lines.append({"what": what, "error": abs(float(t.grad) / difference - 1)})  # type: ignore[arg-type]
    return lines


def _attack(problem: _Problem, cell: Cell) -> list[Row]:
    """One step along a gradient, and the worst of random ones of the same length."""
    import torch

    random = torch.Generator().manual_seed(int(str(cell["seed"])))
    layer, share = _layer(problem), _START[0] * problem.largest
    logs = _logs(*_START)
    loss, _ = _validation(problem, layer, logs)
    (slope,) = torch.autograd.grad(loss, logs)
    moved = logs.detach() - torch.tensor([0.1, 0.0]) * slope.sign()
    lines: list[Row] = [
        {"what": "weight decay", "before": float(loss.detach()), "after": float(_validation(problem, layer, moved)[0])}
    ]

    def test_loss(targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Whitened in torch, by QR, so that the statistics follow the inputs."""
        k = inputs.shape[1]
        mean = inputs.mean(dim=0)
        basis, R = torch.linalg.qr(inputs - mean)
        test = torch.linalg.solve_triangular(R, problem.Z[2][:, :k] - mean, upper=True, left=False)
        _, weights = layer(_with_constant(basis, len(basis)), targets, share)
        return problem.judged(_with_constant(test, len(basis)), weights, 2)[0]

    clean = {"targets": problem.Y[0], "inputs": problem.Z[0][:, :_COORDINATES]}
    for what in clean:
        given = {name: value.clone().requires_grad_(name == what) for name, value in clean.items()}
        before = test_loss(**given)
        (gradient,) = torch.autograd.grad(before, given[what])
        noises = [torch.randn(gradient.shape, generator=random, dtype=torch.float64) for _ in range(_DRAWS)]
        with torch.no_grad():
            steps = [_POISON * clean[what].norm() * step / step.norm() for step in (gradient, *noises)]
            after = [float(test_loss(**{**clean, what: clean[what] + step})) for step in steps]
        lines.append(
            {"what": what, "before": float(before.detach()), "after": after[0], "after_random": max(after[1:])}
        )
    return lines


def _exact(rows: list[Row]) -> Finding:
    found = chosen(rows, part="derivatives")
    largest = {what: column(chosen(found, what=what), "error").max() for what in distinct(found, "what")}
    figures = ", ".join(f"{what} {error:.0e}" for what, error in largest.items())
    return Finding(
        "Derivatives of the optimum agree with central differences to 1e-4.",
        f"Largest relative errors over {_SEEDS} seeds, along random directions: {figures}.",
        bool(max(largest.values()) < 1e-4),
    )


def _chosen_well(rows: list[Row]) -> Finding:
    told, holds = [], True
    for seed in distinct(rows, "seed"):
        path, grid = (chosen(rows, part=part, seed=seed) for part in ("gradient", "grid"))
        ours, best = (min(lines, key=lambda row: float(str(row["loss"]))) for lines in (path, grid))
        holds &= float(str(ours["loss"])) <= 1.01 * float(str(best["loss"]))
        told.append(
            f"{ours['loss']:.4f} against {best['loss']:.4f} (test accuracy {ours['test_accuracy']:.3f} against "
            f"{best['test_accuracy']:.3f}, {path[-1]['seconds']:.1f} against {grid[-1]['seconds']:.1f} CPU s)"
        )
    return Finding(
        "Descent on weight decay and filter together finds the validation loss of a grid, to 1 %.",
        f"{len(path)} solves with gradients against {len(grid)} on the grid, by seed: {'; '.join(told)}.",
        holds,
    )


def _one_step(rows: list[Row]) -> Finding:
    steps = chosen(rows, part="attacks", what="weight decay")
    changes = column(steps, "after") / column(steps, "before") - 1
    return Finding(
        "One step of a tenth on the logarithm of the weight decay, by the sign of its derivative, lowers the "
        "validation loss.",
        f"It changes by {', '.join(f'{100 * change:+.2f} %' for change in changes)}.",
        bool((changes < 0).all()),
    )


def _poisoned(rows: list[Row], what: str) -> Finding:
    steps = chosen(rows, part="attacks", what=what)
    before = column(steps, "before")
    rise, random = (100 * (column(steps, key) / before - 1) for key in ("after", "after_random"))
    return Finding(
        f"One gradient step on the training {what}, of {100 * _POISON:.0f} % of their norm, raises the test loss more "
        "than random steps do.",
        f"By {', '.join(f'{value:.2f} %' for value in rise)}; the worst of {_DRAWS} random steps as long by "
        f"{', '.join(f'{value:+.2f} %' for value in random)}.",
        bool((rise > 0).all() and (rise > random).all()),
    )


def _map(rows: list[Row]) -> Picture:
    picture, axes = drawing.chart(
        "Descent on weight decay and filter, on the map of the validation loss (seed 0)",
        "weight decay, share of the largest", "filter, tau / s_1", xscale="log", yscale="log",
    )  # fmt: skip
    path, grid = (chosen(rows, part=part, seed=0) for part in ("gradient", "grid"))
    shares, taus = sorted(set(distinct(grid, "share"))), sorted(set(distinct(grid, "tau")))
    order = sorted(grid, key=lambda row: (float(str(row["tau"])), float(str(row["share"]))))
    losses = column(order, "loss").reshape(len(taus), len(shares))
    drawn = axes.contourf(shares, taus, np.log10(losses / losses.min()), levels=12, cmap="Blues")
    axes.figure.colorbar(drawn, ax=axes, label="log10 of loss over the grid's least")
    axes.plot(column(path, "share"), column(path, "tau"), ".-", color=ORANGE, lw=1, label="descent")
    axes.plot(path[0]["share"], path[0]["tau"], "o", color=ORANGE, mfc="white", label="start")
    drawing.legend(axes)
    return picture


def _attacks(rows: list[Row]) -> Picture:
    picture, axes = drawing.chart(
        f"What one step of {100 * _POISON:.0f} % on the training data does to the test loss",
        "what is changed, and seed", "change of the test loss (%)",
    )  # fmt: skip
    steps = [row for row in chosen(rows, part="attacks") if row["what"] in ("targets", "inputs")]
    steps.sort(key=lambda row: (str(row["what"]), int(str(row["seed"]))))
    for key, colour, marker, label in (
        ("after", ORANGE, "o", "along the gradient"),
        ("after_random", BLUE, "v", f"worst of {_DRAWS} random steps"),
    ):
        change = 100 * (column(steps, key) / column(steps, "before") - 1)
        axes.plot(range(len(steps)), change, marker, color=colour, label=label)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_xticks(range(len(steps)), [f"{row['what']}\n{row['seed']}" for row in steps])
    drawing.legend(axes)
    return picture


STUDY = Study(
    name="differentiable-layer",
    title="A network's optimum as a layer: its settings chosen by gradient, its training data poisoned by it",
    source=(
        "Agrawal, Amos, Barratt, Boyd, Diamond, Kolter, Differentiable Convex Optimization Layers, NeurIPS 2019: the "
        "data-poisoning example; the program is that of Ergen et al., ICLR 2022"
    ),
    departures=(
        "The paper poisons a logistic regression; here it is the gated batch-normalised network with squared loss and "
        "ten outputs. Its targets, or its inputs in their 30 leading singular directions and whitened anew in torch, "
        "are moved by an attacker who knows the test rows. Weight decay and filter are chosen on validation rows by "
        "Adam from a fixed start; the grid has no refinement."
    ),
    needs=("torch",),
    minutes=(0.5, 10),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)
