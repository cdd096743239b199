"""Speed: objective error over CPU time, of our solvers and of their peers on the same programs.

The gated programs G and the ReLU programs E are planted networks. A point is what a method had reached after how much
of its own work.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convexbn._types import Bool, Float
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.losses import SquaredLoss
from convexbn.solvers.base import Budget, Progress
from convexbn.training.training_set import TrainingSet
from convexbn_studies import drawing
from convexbn_studies.data import planted
from convexbn_studies.drawing import BLUE, GREEN, ORANGE, PINK, chosen, column, distinct
from convexbn_studies.peers import pyscnn_driver
from convexbn_studies.study import PAPER, Cell, Finding, Picture, Row, Study

#: Environment variable with the interpreter of an environment that has pyscnn.
PYSCNN = "CONVEXBN_PYSCNN"

#: Relative error at which methods are compared.
TARGET = 1e-4

#: n, d, gates (0: the ReLU program over all patterns), weight decay as a share of the largest.
_PROGRAMS = {
    "G1": (500, 20, 500, 0.05),
    "G2": (2000, 100, 1000, 0.05),
    "E1": (60, 2, 0, 0.1),
    "E2": (200, 5, 0, 0.1),
    "E3": (500, 20, 0, 0.1),
    "small G": (200, 10, 100, 0.05),
    "small E": (40, 2, 0, 0.1),
}
_METHODS = {"ours": BLUE, "Clarabel": GREEN, "pyscnn": PINK, "Adam": ORANGE}
_SMALLEST = 1e-9


class _Instance(NamedTuple):
    """Raw rows, and the program on the whitened ones."""

    X: Float
    Y: Float
    rows: Float
    gates: Float
    patterns: Bool
    weight_decay: float

    @property
    def loss(self) -> SquaredLoss:
        return SquaredLoss(self.Y, np.ones(len(self.Y)))

    @property
    def program(self) -> GatedProgram:
        return GatedProgram(gated_operator(self.rows, self.patterns), self.loss, self.weight_decay)


def cells(quick: bool) -> list[Cell]:
    """Each program with each method that can solve it; Clarabel where it is not out of memory."""
    names = ("small G", "small E") if quick else ("G1", "G2", "E1", "E2", "E3")
    clarabel = ("small G", "small E", "G1", "E1")
    found: list[Cell] = []
    for name in names:
        gated = _PROGRAMS[name][2] > 0
        found.append({"program": name, "method": "ours"})
        found += [{"program": name, "method": "Clarabel"}] * (name in clarabel)
        found += [{"program": name, "method": "pyscnn"}] * (gated and bool(os.environ.get(PYSCNN)))
        rate, steps = (0.2, 600) if gated else (0.1, 2000)
        found.append({"program": name, "method": "Adam", "rate": rate, "steps": steps, "seeds": 2})
    return found


def run(cell: Cell) -> list[Row]:
    """CPU seconds and objectives of one method on one program."""
    given: Any = cell
    name = given["program"]
    gated = _PROGRAMS[name][2] > 0
    instance = _instance(name)
    method = {
        ("ours", True): _ours_gated, ("ours", False): _ours_relu, ("Clarabel", True): _clarabel_gated,
        ("Clarabel", False): _clarabel_relu, ("pyscnn", True): _pyscnn, ("Adam", True): _adam_gated,
        ("Adam", False): _adam_relu,
    }[given["method"], gated]  # fmt: skip
    shared: Row = {"program": name, "method": given["method"]}
    return [shared | row for row in method(instance, given)]


def findings(rows: list[Row]) -> list[Finding]:
    """For each program how long each method needs, and whether anything ends below ours."""
    return [finding for name in distinct(rows, "program") for finding in _findings_of(name, chosen(rows, program=name))]


def pictures(rows: list[Row]) -> list[Picture]:
    """Error over CPU seconds, one picture a program."""
    return [_picture(name, chosen(rows, program=name)) for name in distinct(rows, "program")]


def _instance(name: str) -> _Instance:
    n, d, count, fraction = _PROGRAMS[name]
    X, Y = planted(n, d, seed=0, neurons=10 if count or d > 2 else 5)
    data = TrainingSet.prepare(X, Y, np.ones(n), loss=SquaredLoss)
    X, Y, rows = np.asarray(data.X), data.loss.targets, data.whitening.rows[:]
    gates = np.random.default_rng(1).standard_normal((rows.shape[1], max(count, 1)))
    instance = _Instance(X, Y, rows, gates, rows @ gates >= 0, 1.0)
    largest = instance.program.max_weight_decay() if count else data.max_weight_decay_relu(proved=False)[0]
    return instance._replace(weight_decay=float(f"{fraction * largest:.4g}"))


def _line(seconds: float, objective: float, **more: Any) -> Row:
    return {"seconds": seconds, "objective": objective, **more}


def _ours_gated(instance: _Instance, given: Any) -> list[Row]:
    from convexbn.solvers.gated.group_newton import GroupNewton

    started, told = time.process_time(), list[Row]()

    def report(progress: Progress) -> None:
        told.append(_line(time.process_time() - started, progress.objective, lower_bound=progress.lower_bound))

    GroupNewton(tol=_SMALLEST).solve(instance.program, None, Budget(callback=report))
    return told


def _ours_relu(instance: _Instance, given: Any) -> list[Row]:
    """The solver's reports, then the end of the proof."""
    from convexbn import ConvexBNRegressor

    started, told = time.process_time(), list[Row]()

    def report(progress: Progress) -> None:
        told.append(_line(time.process_time() - started, progress.objective))

    model = ConvexBNRegressor(
        activation="relu", weight_decay=instance.weight_decay, time_limit=20, random_state=0, callback=report, **PAPER
    )
    proof = model.fit(instance.X, instance.Y[:, 0]).certificate_
    return [*told, _line(time.process_time() - started, proof.objective, lower_bound=proof.lower_bound)]


def _clarabel_gated(instance: _Instance, given: Any) -> list[Row]:
    from convexbn.solvers.gated.conic import Conic

    started = time.process_time()
    solution = Conic(tol=1e-6).solve(instance.program)
    return [_line(time.process_time() - started, instance.program.objective(solution.weights))]


def _clarabel_relu(instance: _Instance, given: Any) -> list[Row]:
    from convexbn.program.relu import ReluProgram
    from convexbn_studies.peers.conic_relu import ConicRelu

    started = time.process_time()
    program = ReluProgram(instance.rows, instance.loss, instance.weight_decay)
    neurons = ConicRelu(tol=1e-8).solve(program).weights
    return [_line(time.process_time() - started, program.objective(neurons))]


def _pyscnn(instance: _Instance, given: Any) -> list[Row]:
    """Its own log, without the start of its process."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "program.npz"), Path(folder, "solution.npz")
        program: dict[str, Any] = {"A": instance.rows, "Y": instance.Y, "gates": instance.gates}
        program |= {"weight_decay": instance.weight_decay}
        np.savez(source, **program, max_iter=5000, tolerance=1e-14)
        subprocess.run([os.environ[PYSCNN], pyscnn_driver.__file__, str(source), str(target)], check=True)
        with np.load(target) as found:
            told = found["seconds"].tolist(), found["objectives"].tolist()
    kept = np.unique(np.geomspace(1, len(told[0]), 60).astype(int)) - 1
    return [_line(told[0][i], told[1][i]) for i in kept]


def _adam_gated(instance: _Instance, given: Any) -> list[Row]:
    """Adam on the gated network itself: a vector and an output weight for every gate, float32, coupled decay."""
    import torch

    rows, opened, targets = (
        torch.tensor(array, dtype=torch.float32) for array in (instance.rows, instance.patterns, instance.Y)
    )
    record = set(np.unique(np.geomspace(1, given["steps"], 25).astype(int)).tolist())
    told = []
    for seed in range(given["seeds"]):
        rng, (q, count) = np.random.default_rng(seed), instance.gates.shape
        first = torch.tensor(rng.standard_normal((q, count)) / np.sqrt(count), dtype=torch.float32, requires_grad=True)
        output = torch.tensor(rng.standard_normal((count, 1)) / np.sqrt(count), dtype=torch.float32, requires_grad=True)
        optimiser = torch.optim.Adam([first, output], lr=given["rate"], weight_decay=instance.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, given["steps"])
        seconds = 0.0
        for step in range(1, given["steps"] + 1):
            started = time.process_time()
            optimiser.zero_grad()
            loss = 0.5 * (((rows @ first) * opened) @ output - targets).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            seconds += time.process_time() - started
            if step in record:
                told.append(_line(seconds, _gated_objective(instance, first, output), seed=seed))
    return told


def _gated_objective(instance: _Instance, first: Any, output: Any) -> float:
    s, c = first.detach().double().numpy(), output.detach().double().numpy()
    outputs = ((instance.rows @ s) * instance.patterns) @ c
    masses = np.linalg.norm(s, axis=0) * np.abs(c[:, 0])
    return instance.loss.value(outputs) + instance.weight_decay * float(masses.sum())


def _adam_relu(instance: _Instance, given: Any) -> list[Row]:
    """Adam on the batch-normalised network, width 100, each seed by itself."""
    from convexbn_studies.descent import Descent, balanced_objective

    record = np.unique(np.geomspace(1, given["steps"], 25).astype(int)).tolist()
    return [
        _line(seconds, balanced_objective(network, instance.X, instance.loss, instance.weight_decay), seed=seed)
        for seed in range(given["seeds"])
        for _, seconds, (network,) in Descent("adam", given["rate"], given["steps"], 100, [seed]).train(
            instance.X, instance.loss, instance.weight_decay, record, dtype="float32"
        )
    ]


def _optimum(rows: list[Row]) -> float:
    """Our last lower bound where it is close, else the smallest objective of any method."""
    last: Any = chosen(rows, method="ours")[-1]
    close = last["objective"] - last["lower_bound"] <= 10 * _SMALLEST * last["objective"]
    return float(last["lower_bound"] if close else np.nanmin(column(rows, "objective")))


def _seconds_to(rows: list[Row], value: float) -> float:
    """CPU seconds of the fastest run until an objective, infinite if none came so low."""
    reached = column(rows, "objective") <= value
    return float(column(rows, "seconds")[reached].min(initial=np.inf))


def _findings_of(name: str, rows: list[Row]) -> list[Finding]:
    n, d, count, fraction = _PROGRAMS[name]
    goal = _optimum(rows) * (1 + TARGET)
    seconds = {method: _seconds_to(chosen(rows, method=method), goal) for method in distinct(rows, "method")}
    told = ", ".join(f"{m} {s:.2g} s" if np.isfinite(s) else f"{m} never" for m, s in seconds.items())
    others = min((s for method, s in seconds.items() if method != "ours"), default=np.inf)
    last: Any = chosen(rows, method="ours")[-1]
    gap = 1 - last["lower_bound"] / last["objective"]
    lowest = float(np.nanmin(column([row for row in rows if row["method"] != "ours"], "objective")))
    kind = f"{count} gates" if count else "ReLU over all patterns"
    return [
        Finding(
            f"{name} (n = {n}, d = {d}, {kind}, weight decay {fraction:g} of the largest): ours is the first within "
            f"{TARGET:g} of the optimum.",
            f"CPU seconds: {told}. Ours is certified to {gap:.0e} after {last['seconds']:.2g} s; the lowest end of the "
            f"others is {lowest / last['objective'] - 1:+.0e} relative to ours.",
            bool(seconds["ours"] <= others),
        )
    ]  # fmt: skip


def _picture(name: str, rows: list[Row]) -> Picture:
    optimum = _optimum(rows)
    n, d, count, _ = _PROGRAMS[name]
    picture, axes = drawing.chart(
        f"{name}: error over CPU time (n = {n}, d = {d}, {f'{count} gates' if count else 'ReLU, all patterns'})",
        "CPU seconds", "objective above the optimum (relative)", xscale="log", yscale="log",
    )  # fmt: skip
    for method in distinct(rows, "method"):
        for i, seed in enumerate(distinct(rows, "seed") if method == "Adam" else [None]):
            line = [row for row in rows if row["method"] == method and row.get("seed") == seed]
            error = np.maximum(column(line, "objective") / optimum - 1, _SMALLEST)
            label = None if i else method
            style = "o" if len(line) == 1 else "o-"
            axes.plot(column(line, "seconds"), error, style, color=_METHODS[method], ms=4, lw=1.3, label=label)
    axes.axhline(TARGET, color="0.6", ls=":", lw=1)
    drawing.legend(axes, ncols=4)
    return picture


STUDY = Study(
    name="speed",
    title="Objective error over CPU time: ours, Clarabel, pyscnn and Adam on the same programs",
    source="programs of Ergen et al., Demystifying Batch Normalization in ReLU Networks, ICLR 2022, arXiv 2103.01499",
    departures=(
        "The paper gives no timings of this kind. The programs are planted batch-normalised networks on correlated "
        "normal data. Clarabel gets the gated program directly, without CVXPY's compilation, and the ReLU program on "
        "every pattern through CVXPY; it is left out on G2, where its constraints would have some 10^8 entries, and "
        "on E2 and E3, whose patterns are too many to list. pyscnn, which solves gated programs alone, is run when "
        "CONVEXBN_PYSCNN names an interpreter that has it, and left out otherwise. Adam trains the network itself, in"
        " float32 and from two starts, with one learning rate a kind of program, the best of four. One thread. Errors"
        " are relative to our certified lower bound, or where that is not close to the lowest objective of all."
    ),
    needs=("torch", "clarabel", "cvxpy"),
    minutes=(0.5, 3),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
)
