"""Recorded optima: what ``fit`` found before stays within the certified gaps, whatever the kernels.

``python tests/test_golden.py`` records the values of this machine in golden.json, beside those of others.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Convolution
from instances import PAPER

RECORD = Path(__file__).with_name("golden.json")
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")


def digits(n, images=False):
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return (X.reshape(-1, 8, 8, 1) if images else X)[:n], y[:n]


def diabetes(n, d):
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    return X[:n, :d], (y[:n] - y.mean()) / y.std()


def iris(d):
    from sklearn.datasets import load_iris

    X, y = load_iris(return_X_y=True)
    return X[::2, :d], y[::2]


def models():
    """Name, estimator and data of every model, one of each solver and kind of program: the paper's."""
    gated = {**PAPER, "random_state": 0}
    relu = {"activation": "relu", "loss": "squared", "random_state": 0, "fit_intercept": False}
    classify, regress, conv = ConvexBNClassifier, ConvexBNRegressor, Convolution(4, stride=2, regions=1)
    return {
        "group newton": (classify(**gated, n_gates=60), digits(600)),
        "subspace": (classify(**gated, n_gates=40, loss="cross_entropy", weight_decay=1.0), digits(500)),
        "proximal": (regress(**gated, n_gates=40, solver="proximal", weight_decay=3.0, tol=1e-5), diabetes(442, 10)),
        "huber": (regress(**gated, n_gates=40, loss="huber"), diabetes(442, 10)),
        "rank, filter": (
            classify(**gated | {"n_gates": 60, "rank": 20, "spectral_filter": 0.1, "gates": "whitened"}),
            digits(600),
        ),
        "formula": (classify(**relu), digits(40)),
        "pricing": (classify(**relu), iris(2)),
        "every cell": (regress(**relu, weight_decay=0.5), diabetes(30, 2)),
        "convolution": (classify(**gated, n_gates=10, convolution=conv), digits(60, images=True)),
        "regions": (
            classify(**gated, n_gates=6, convolution=Convolution(4, stride=2, regions=2), tol=1e-4),
            digits(60, images=True),
        ),
    }


def measured(names):
    """Objective and certified bound of every model."""
    known, found = models(), {}
    for name in names:
        model, (X, y) = known[name]
        if model.weight_decay == "auto":
            largest = model._max_weight_decay(model._prepare(X, y, None)[0], proved=False)
            model.weight_decay = 0.02 * np.atleast_1d(largest)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(X, y)
        found[name] = [model.certificate_.objective, model.certificate_.lower_bound]
    return found


def machine():
    """Kernels that decide the last bits."""
    import scipy
    from threadpoolctl import threadpool_info

    kernels = sorted({library["architecture"] for library in threadpool_info() if library["user_api"] == "blas"})
    return f"{'+'.join(kernels)}, numpy {np.__version__}, scipy {scipy.__version__}"


def in_one_thread():
    done = subprocess.run(
        [sys.executable, __file__, "--print"], env=os.environ | ONE_THREAD, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def now():
    return in_one_thread()


@pytest.mark.parametrize("name", models())
def test_the_recorded_optimum_is_within_the_certified_gap(now, name):
    record = json.loads(RECORD.read_text())
    objective, lower = now["models"][name]
    for _machine, values in record.items():
        recorded, recorded_lower = values[name]
        assert lower <= recorded * (1 + 1e-12) and recorded_lower <= objective * (1 + 1e-12)
        assert abs(objective - recorded) <= max(objective - lower, recorded - recorded_lower) + 1e-12 * recorded


if __name__ == "__main__":
    result = {"machine": machine(), "models": measured(models())}
    if sys.argv[1:] == ["--print"]:
        print(json.dumps(result))
    else:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(record | {result["machine"]: result["models"]}, indent=1) + "\n")
