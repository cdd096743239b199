"""Neural collapse: the features of a deep network move to where the formula of its last two layers puts them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from convexbn._types import Float
from convexbn_studies import drawing
from convexbn_studies.data import draw
from convexbn_studies.drawing import BLUE, ORANGE, chosen, column
from convexbn_studies.study import PAPER, Cell, Finding, Picture, Row, Study

if TYPE_CHECKING:
    from torch import nn

_WIDTH, _HIDDEN = 256, 50

#: Weight decay of the last batch norm and Linear in the optimiser, for the mean loss.
_DECAY = 0.02

#: Distance of a measure from that of the optimum which counts as arrived.
_NEAR = 0.05

#: The measures: name on the page, key, the picture's scale.
_MEASURES = {
    "NC1": ("variation within classes / between", "within_class", "log"),
    "NC2": ("variation of the norms of class means", "norm_variation", "linear"),
    "NC3": ("classifier against class means, 0 to 2", "duality_centred", "linear"),
    "NC4": ("samples nearer to another class mean", "disagreement", "linear"),
}
_LOSS_NAMES = {"squared": "squared loss", "cross_entropy": "cross-entropy"}


def cells(quick: bool) -> list[Cell]:
    """One training a loss, with equal classes and, in full, with unequal ones."""
    data, n, epochs = ("digits", 100, 400) if quick else ("fashion-mnist", 200, 800)
    return [
        {"data": data, "n": n, "epochs": epochs, "loss": loss, "classes": classes, "seed": 0}
        for loss in _LOSS_NAMES
        for classes in (("equal",) if quick else ("equal", "unequal"))
    ]


def run(cell: Cell) -> list[Row]:
    """Objective and measures over the epochs, of the optimum by formula, and of the re-optimised network."""
    given: Any = cell
    X, labels = _rows(given["data"], given["n"], given["classes"])
    weight_decay = _DECAY * float(np.sqrt(len(X)))
    module = _module(X.shape[1], given["seed"])
    settings = {key: cell[key] for key in ("data", "n", "loss", "classes")}
    rows = [_optimum(labels, given["loss"], weight_decay)]
    rows += _training(module, X, labels, given["loss"], weight_decay, given["epochs"])
    rows.append(_reoptimised(module, X, labels, given["loss"], weight_decay))
    return [settings | row for row in rows]


def findings(rows: list[Row]) -> list[Finding]:
    """The formula is the optimum of the whole network, training approaches it, and so do the features."""
    found = [_findings_of(part) for part in _parts(rows)]
    return [finding for kind in zip(*found, strict=True) for finding in kind]


def pictures(rows: list[Row]) -> list[Picture]:
    """The measures over the epochs, and the objective."""
    return [_picture(measure, rows) for measure in _MEASURES] + [_excess(rows)]


def _rows(name: str, n: int, classes: str) -> tuple[Float, np.ndarray]:
    """Images of ten classes: ``n / 10`` of each, or from a fifth to nine fifths of that."""
    ((X, y),) = draw(name, (1700,), seed=0)
    shares = np.ones(10) if classes == "equal" else np.linspace(0.2, 1.8, 10)
    counts = np.round(n / 10 * shares).astype(int)
    kept = np.concatenate([np.flatnonzero(y == label)[:count] for label, count in enumerate(counts)])
    return X[kept], y[kept]


def _module(d: int, seed: int) -> nn.Sequential:
    """Four layers, float64."""
    import torch
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        earlier = [nn.Linear(d, _WIDTH), nn.BatchNorm1d(_WIDTH), nn.ReLU()]
        earlier += [nn.Linear(_WIDTH, _WIDTH), nn.BatchNorm1d(_WIDTH), nn.ReLU()]
        tail = [nn.Linear(_WIDTH, _HIDDEN), nn.BatchNorm1d(_HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10, bias=False)]
        return nn.Sequential(*earlier, *tail).double()


def _optimum(labels: np.ndarray, loss: str, weight_decay: float) -> Row:
    """What the formula gives for any features of rank n - 1, such as the unit vectors."""
    from convexbn import ConvexBNClassifier
    from convexbn.training.neural_collapse import optimal_collapse

    model = ConvexBNClassifier(activation="relu", loss=loss, weight_decay=weight_decay, **PAPER)
    proof = model.fit(np.eye(len(labels)), labels).certificate_
    measures = asdict(optimal_collapse(np.bincount(labels).tolist(), weight_decay, loss=loss))
    return {
        "what": "formula", "epoch": None, "objective": proof.objective, "lower_bound": proof.lower_bound,
        "status": proof.status.value, **measures,
    }  # fmt: skip


def _training(
    module: nn.Sequential, X: Float, labels: np.ndarray, loss: str, weight_decay: float, epochs: int
) -> list[Row]:
    """Adam on all layers, one full batch an epoch, cosine schedule."""
    import torch

    rows, targets = torch.tensor(X), torch.tensor(labels)
    decayed: list[torch.Tensor] = [*list(module)[7].parameters(), *list(module)[9].parameters()]
    others: list[torch.Tensor] = [p for p in module.parameters() if all(p is not q for q in decayed)]
    groups: list[Any] = [{"params": others}, {"params": decayed, "weight_decay": _DECAY}]
    optimiser = torch.optim.Adam(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    record = set(np.unique(np.geomspace(1, epochs, 25).astype(int)).tolist()) | {0}
    told: list[Row] = []
    for epoch in range(epochs + 1):
        if epoch in record:
            place: Row = {"what": "Adam", "epoch": epoch}
            told.append(place | _measured(module, rows, labels, loss, weight_decay))
        optimiser.zero_grad()
        _mean_loss(loss, module(rows), targets).backward()
        optimiser.step()
        schedule.step()
    return told


def _mean_loss(loss: str, outputs: Any, targets: Any) -> Any:
    from torch.nn import functional

    if loss == "cross_entropy":
        return functional.cross_entropy(outputs, targets)
    return 0.5 * (outputs - functional.one_hot(targets, 10)).square().sum() / len(targets)


def _measured(module: nn.Sequential, rows: Any, labels: np.ndarray, loss: str, weight_decay: float) -> Row:
    """Collapse of the last features, and the objective of the last two layers on what they are given."""
    import torch
    from torch import nn

    from convexbn.nn import certify
    from convexbn.training.neural_collapse import collapse_metrics

    with torch.no_grad():
        inputs = nn.Sequential(*list(module)[:6])(rows)
        features = nn.Sequential(*list(module)[6:9])(inputs).numpy()
    classifier: Any = list(module)[9].weight
    metrics = collapse_metrics(features, labels, classifier.detach().numpy().T)
    targets = np.eye(10)[labels] if loss == "squared" else labels
    tail = nn.Sequential(*list(module)[6:])
    found = certify(tail, inputs.numpy(), targets, loss=loss, weight_decay=weight_decay, time_limit=0)
    return {"objective": found.balanced_objective, **asdict(metrics)}


def _reoptimised(module: nn.Sequential, X: Float, labels: np.ndarray, loss: str, weight_decay: float) -> Row:
    """The last two layers of the trained network, replaced by the formula."""
    from convexbn.nn import reoptimise

    found = reoptimise(module, X, labels, loss=loss, weight_decay=weight_decay)
    status = None if found.certificate is None else found.certificate.status.value
    return {"what": "re-optimised", "epoch": None, "objective": found.after.objective, "status": status}


def _parts(rows: list[Row]) -> list[list[Row]]:
    keys = list(dict.fromkeys((row["loss"], row["classes"]) for row in rows))
    return [chosen(rows, loss=loss, classes=classes) for loss, classes in keys]


def _name(rows: list[Row]) -> str:
    return f"{_LOSS_NAMES[str(rows[0]['loss'])]}, {rows[0]['classes']} classes"


def _findings_of(rows: list[Row]) -> list[Finding]:
    optimum: Any = chosen(rows, what="formula")[0]
    last: Any = chosen(rows, what="Adam")[-1]
    again: Any = chosen(rows, what="re-optimised")[0]
    lowest = float(np.min(column(chosen(rows, what="Adam"), "objective")))
    off = {name: last[key] - optimum[key] for name, (_, key, _) in _MEASURES.items()}
    told = ", ".join(f"{name} {last[key]:.2g} ({_shown(optimum[key])})" for name, (_, key, _) in _MEASURES.items())
    return [
        Finding(
            f"The features of the trained network have the measures of the formula ({_name(rows)}).",
            f"After {last['epoch']} epochs, in brackets the formula: {told}; near means within {_NEAR}.",
            all(abs(value) <= _NEAR for value in off.values()),
        ),
        Finding(
            f"The formula is the least objective of the whole deep network, and training stays above ({_name(rows)}).",
            f"Formula {optimum['objective']:.9g}, {optimum['status']}; Adam ends at {last['objective']:.9g}, "
            f"{last['objective'] / optimum['objective'] - 1:+.1e} relative, and is at no time below {lowest:.9g}.",
            lowest >= optimum["lower_bound"] and optimum["status"] == "CERTIFIED",
        ),
        Finding(
            f"It is attained on the features that training found ({_name(rows)}).",
            f"With its last two layers re-optimised the trained network reaches {again['objective']:.9g}, "
            f"{abs(again['objective'] / optimum['objective'] - 1):.0e} from the formula, relative ({again['status']}).",
            bool(abs(again["objective"] / optimum["objective"] - 1) <= 1e-6),
        ),
    ]


def _shown(value: float) -> str:
    """A measure of the formula, without what rounding leaves of 0."""
    return f"{value:.2g}" if value > 1e-12 else "0"


def _lines(rows: list[Row]) -> list[tuple[list[Row], str, str, str]]:
    """Each training: rows, colour (loss), style (classes), name."""
    colours, styles = {"squared": BLUE, "cross_entropy": ORANGE}, {"equal": "-", "unequal": "--"}
    return [
        (part, colours[str(part[0]["loss"])], styles[str(part[0]["classes"])], _name(part)) for part in _parts(rows)
    ]


def _picture(measure: str, rows: list[Row]) -> Picture:
    ylabel, key, scale = _MEASURES[measure]
    picture, axes = drawing.chart(
        f"{measure}: {ylabel.split(',')[0]}, over the training (dots at the right: the formula)",
        "epoch", ylabel, xscale="symlog", yscale=scale,
    )  # fmt: skip
    for part, colour, style, name in _lines(rows):
        training, optimum = chosen(part, what="Adam"), chosen(part, what="formula")[0]
        epochs, values = column(training, "epoch"), column(training, key)
        axes.plot(epochs, np.maximum(values, 1e-14) if scale == "log" else values, style, color=colour, label=name)
        if scale == "linear":
            axes.plot(1.25 * epochs[-1], optimum[key], "o", color=colour, mfc=colour if style == "-" else "none", ms=6)
    if scale == "log":
        axes.set_title("the formula: 0", fontsize=10, loc="right", y=0.02)
    drawing.legend(axes)
    return picture


def _excess(rows: list[Row]) -> Picture:
    picture, axes = drawing.chart(
        "Training approaches the optimum of the deep network from above",
        "epoch", "objective above the formula (relative)", xscale="symlog", yscale="log",
    )  # fmt: skip
    for part, colour, style, name in _lines(rows):
        training, optimum = chosen(part, what="Adam"), chosen(part, what="formula")[0]
        excess = column(training, "objective") / float(str(optimum["objective"])) - 1
        axes.plot(column(training, "epoch"), excess, style, color=colour, label=name)
    drawing.legend(axes)
    return picture


STUDY = Study(
    name="neural-collapse",
    title="The features of a deep network collapse to where the formula of its last two layers puts them",
    source="Ergen et al., Demystifying Batch Normalization in ReLU Networks, ICLR 2022, arXiv 2103.01499: deep "
    "networks; measures of Papyan, Han and Donoho, PNAS 2020",
    departures=(
        "The paper states the closed form of the last two layers for one-hot targets and the squared loss and notes "
        "that it implies neural collapse. Here four layers are trained jointly by Adam on 200 images with full "
        "batches, for the squared loss and for cross-entropy, with equal and with unequal classes, and without output"
        " bias. Without it the squared loss aligns the classifier with the class means as they are and not with the "
        "centred ones, so that NC3 is not 0 at its optimum; with unequal classes NC2 and NC3 are not 0 either. The "
        "comparison is with the formula's own values."
    ),
    needs=("torch",),
    minutes=(0.8, 3),
    cells=cells,
    run=run,
    findings=findings,
    pictures=pictures,
    needs_in_full=("fashion-mnist",),
)  # fmt: skip
