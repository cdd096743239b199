"""``convexbn certify``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from convexbn.cli.options import Names, data_parser, file_parser
from convexbn.cli.output import feature_names, number, quiet

#: Options of ``certify`` for what the file of a model holds itself.
_QUESTION = ("loss", "huber_delta", "weight_decay", "optimizer_decay", "eps", "tol")


def add_parser(commands: Any) -> None:
    """Options of ``certify``."""
    judge = commands.add_parser(
        "certify",
        help="recompute objective, bound and gap of a saved network",
        parents=[file_parser(), data_parser()],
    )
    judge.set_defaults(command=certify)
    judge.add_argument("--target", metavar="NAME", help="target column, by default that of the training")
    judge.add_argument("--time-limit", type=float, metavar="SECONDS", help="for the bounds over all patterns (relu)")
    judge.add_argument(
        "--without-filter", action="store_true", help="judge as a plain network, without the model's spectral filter"
    )
    judge.add_argument("--json", action="store_true", help="print one JSON object last")
    trained = judge.add_argument_group("for networks that torch trained (.pt2, state dicts in .pt or .safetensors)")
    losses = Names("convexbn.training.trained_objective", "loss_names")
    trained.add_argument(
        "--loss", choices=losses, metavar="LOSS", help="summed over rows, or torch's own with its mean: %(choices)s"
    )
    trained.add_argument("--huber-delta", type=float, metavar="DELTA", help="of huber and HuberLoss, by default 1")
    trained.add_argument("--weight-decay", type=float, metavar="BETA", help="against the sum of the losses")
    trained.add_argument("--optimizer-decay", type=float, metavar="LAM", help="weight_decay of SGD or Adam")
    trained.add_argument("--eps", type=float, help="of the batch norm of a state dict, by default 1e-5")
    trained.add_argument("--tol", type=float, help="relative gap that counts as optimal, by default 1e-6")


def certify(options: argparse.Namespace) -> int:
    """``convexbn certify``: a model of ``fit``, or a network that torch trained."""
    from convexbn.files.torch import is_checkpoint

    return _certify_checkpoint(options) if is_checkpoint(options.file) else _certify_model(options)


def _certify_model(options: argparse.Namespace) -> int:
    """Take the question from the file, recompute every answer from the data."""
    from convexbn.cli.data_sources import read_data, training_rows
    from convexbn.estimators import load

    model = load(options.file)
    given = [f"--{name.replace('_', '-')}" for name in _QUESTION if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{given[0]} is for networks that torch trained: the file of a model holds its own.")
    made = dict(getattr(model, "source_", {}))
    target = options.target or made.get("target")
    data = read_data(options.data, target, data_home=options.data_home, features=feature_names(model), need_target=True)
    X, y = training_rows(data, made)
    model.time_limit = options.time_limit
    trained_with = model.spectral_filter
    if options.without_filter:
        model.spectral_filter = None
    with quiet():
        proof = model.certify(X, y)
        same = model.fingerprint(X, y) == model.fingerprint_
    rows = "the rows it was trained on" if same else "OTHER rows than it was trained on (statistics from these)"
    result = {
        "objective": number(proof.objective),
        "lower_bound": number(proof.lower_bound),
        "relative_gap": number(proof.relative_gap),
        "status": proof.status.value,
        "scope": proof.scope,
        "weight_decay_objective": number(proof.weight_decay_objective),
        "training_rows": same,
        "spectral_filter": model.spectral_filter,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{proof.status.value}, recomputed on {len(X)} rows: {rows}.\n{proof.sentence}")
        print(_filter_note(trained_with, without=options.without_filter), end="")
        print(f"objective {proof.objective:.12g}   lower bound {proof.lower_bound:.12g}   ", end="")
        print(f"weight-decay objective of the plain network of neurons {proof.weight_decay_objective:.12g}")
    return 0


def _filter_note(spectral_filter: float | None, *, without: bool) -> str:
    """A line on the spectral filter of the training; empty if there was none."""
    if spectral_filter is None:
        return ""
    judged = "Judged as a plain network, without" if without else "Judged with"
    return f"{judged} the spectral filter of its training, {spectral_filter:g} of the largest singular value.\n"


def _certify_checkpoint(options: argparse.Namespace) -> int:
    """Take the layers from the file, the question from the options."""
    import numpy as np

    from convexbn.cli.data_sources import read_data
    from convexbn.files.torch import read_checkpoint
    from convexbn.training.audit import audit
    from convexbn.training.trained_objective import Objective, TrainedLoss, targets_of_labels

    if options.loss is None or (options.weight_decay is None) == (options.optimizer_decay is None):
        raise ValueError(
            "a file of torch does not hold its objective: give --loss, and --weight-decay or --optimizer-decay."
        )
    layers, assumed = read_checkpoint(options.file, eps=options.eps)
    data = read_data(options.data, options.target, data_home=options.data_home, need_target=True)
    assert data.y is not None
    n_outputs = layers.output.shape[1]
    targets = targets_of_labels(options.loss, data.y, n_outputs)
    huber_delta = 1.0 if options.huber_delta is None else options.huber_delta
    loss = TrainedLoss.from_name(options.loss, targets, n_outputs, huber_delta=huber_delta)
    if options.weight_decay is not None:
        objective = Objective.with_weight_decay(loss, options.weight_decay)
    else:
        objective = Objective.with_optimizer_decay(loss, options.optimizer_decay)
    found = audit(
        layers, np.asarray(data.X, dtype=np.float64), objective,
        tol=1e-6 if options.tol is None else options.tol,
        time_limit=60.0 if options.time_limit is None else options.time_limit,
    )  # fmt: skip
    told = f"{found.status.value}, on {len(data.X)} rows: {found.explanation} {assumed}".rstrip()
    print(json.dumps(_audit(found) | {"assumed": assumed}) if options.json else told)
    return 0


def _audit(found: Any) -> dict[str, Any]:
    numbers = ("objective", "balanced_objective", "lower_bound", "relative_gap", "best_known", "loss", "stored_loss")
    return {name: number(getattr(found, name)) for name in numbers} | {
        "status": found.status.value,
        "cause": found.cause.value,
        "scope": found.scope,
        "weight_decay": found.weight_decay,
        "n_neurons": found.n_neurons,
        "best_n_neurons": found.best_n_neurons,
    }
