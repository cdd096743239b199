"""``convexbn certify``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from convexbn.cli.options import Names, model_parser
from convexbn.cli.output import numbers, verdict

#: Options that a model's own file answers.
_QUESTION = ("loss", "huber_delta", "weight_decay", "optimizer_decay", "eps", "tol")


def add_parser(commands: Any) -> None:
    """Options of ``certify``."""
    judge = commands.add_parser(
        "certify", parents=[model_parser()], help="recompute objective, bound and gap of a saved network"
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
    """Judge a model of ``fit``, or a network that torch trained."""
    from convexbn.files.torch import is_checkpoint

    return _certify_checkpoint(options) if is_checkpoint(options.file) else _certify_model(options)


def _certify_model(options: argparse.Namespace) -> int:
    """Judge a model: the question is in its file, every number is recomputed from the data."""
    from convexbn.cli.data_sources import judge_again, read_model

    model = read_model(options.file)
    given = [f"--{name.replace('_', '-')}" for name in _QUESTION if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{given[0]} is for networks that torch trained: the file of a model holds its own.")
    trained_filter = model._tau
    if options.without_filter:
        model.spectral_filter = None
    rows, proof, same = judge_again(model, options)
    if options.json:
        result = verdict(proof) | numbers(proof, "weight_decay_objective")
        print(json.dumps(result | {"training_rows": same, "spectral_filter": model._tau}))
        return 0
    which = "the rows it was trained on" if same else "OTHER rows than it was trained on (statistics from these)"
    print(f"{proof.status.value}, recomputed on {len(rows.X_train)} rows: {which}.\n{proof.sentence}")
    if trained_filter is not None:
        judged = "Judged as a plain network, without" if options.without_filter else "Judged with"
        print(f"{judged} the spectral filter of its training, {trained_filter:g} of the largest singular value.")
    print(
        f"objective {proof.objective:.12g}   lower bound {proof.lower_bound:.12g}   "
        f"weight-decay objective of the plain network of neurons {proof.weight_decay_objective:.12g}"
    )
    return 0


def _certify_checkpoint(options: argparse.Namespace) -> int:
    """Judge a network that torch trained: the layers are in the file, the question in the options."""
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
    n_outputs, huber_delta = layers.output.shape[1], 1.0 if options.huber_delta is None else options.huber_delta
    targets = targets_of_labels(options.loss, data.y, n_outputs)
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
    if options.json:
        names = ("objective", "balanced_objective", "lower_bound", "relative_gap", "best_known", "loss", "stored_loss")
        others = ("scope", "weight_decay", "n_neurons", "best_n_neurons")
        result = numbers(found, *names) | {"status": found.status.value, "cause": found.cause.value}
        print(json.dumps(result | {name: getattr(found, name) for name in others} | {"assumed": assumed}))
    else:
        print(f"{found.status.value}, on {len(data.X)} rows: {found.explanation} {assumed}".rstrip())
    return 0
