"""``convexbn fit``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from convexbn.cli.options import auto_or_float, estimator_from, network_parser, rank
from convexbn.cli.output import check_model_name, measure_of, number, quiet, verdict


def add_parser(commands: Any) -> None:
    """Options of ``fit``."""
    train = commands.add_parser(
        "fit", parents=[network_parser()], help="train a network to a certified optimum and save it"
    )
    train.set_defaults(command=fit)
    train.add_argument("--out", metavar="FILE", required=True, help="model to write, .safetensors")
    train.add_argument("--weight-decay", type=auto_or_float, default="auto", metavar="BETA", help="or auto")
    train.add_argument("--rank", type=rank, metavar="K", help="directions to keep, or a share such as 0.95")
    train.add_argument("--test-size", type=float, metavar="SHARE", help="share of the rows to hold out")
    train.add_argument("--json", action="store_true", help="print one JSON object last")


def fit(options: argparse.Namespace) -> int:
    """Train, judge and save a network."""
    from convexbn.cli.data_sources import read_columns, split
    from convexbn.cli.progress_bar import reporter

    check_model_name(options.out)
    data = read_columns(options)
    rows = split(data, options.test_size, options.seed, task=options.task)
    started = time.perf_counter()
    with reporter(sys.stderr) as report:
        model = estimator_from(options, rows.task, data.image_shape, callback=report)
        with quiet():
            model.fit(rows.X_train, rows.y_train)
    seconds = time.perf_counter() - started
    rows.describe(model)
    model.save(options.out)
    proof, network, held_out = model.certificate_, model.network_, rows.X_test is not None
    result = verdict(proof) | {
        "train_score": number(model.score(rows.X_train, rows.y_train)),
        "test_score": number(model.score(rows.X_test, rows.y_test)) if held_out else None,
        "n_iter": model.n_iter_, "seconds": round(seconds, 4), "n_neurons": network.n_neurons,
        "n_gates_active": None if network.gate_index is None else len(set(network.gate_index.tolist())),
        "rank": model.rank_, "task": rows.task, "measure": measure_of(rows.task),
    }  # fmt: skip
    told = f"{rows.told}: "
    print(
        json.dumps(result) if options.json else _summary(result, proof.sentence, options.out, told, held_out=held_out)
    )
    return 0


def _summary(result: dict[str, Any], sentence: str, out: str, told: str = "", *, held_out: bool = False) -> str:
    test = _format(result["test_score"], ".4f") if held_out else "none held out"
    return (
        f"{result['status']} ({result['scope']}): {sentence}\n"
        f"objective {_format(result['objective'], '.9g')}   lower bound {_format(result['lower_bound'], '.9g')}   "
        f"relative gap {_format(result['relative_gap'], '.2g')}\n"
        f"{told}train score {_format(result['train_score'], '.4f')}   test score {test}\n"
        f"{result['n_iter']} iterations in {result['seconds']:.2f} s   {result['n_neurons']} neurons   "
        f"rank {result['rank']}\n"
        f"saved to {out}"
    )


def _format(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
