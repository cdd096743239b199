"""Small hostile fits: what ends otherwise than in an honest certificate or a refusal in words of ours.

Usage: python benchmarks/attack_crashes.py SEED0 SEED1

Fits the cases of the seeds SEED0 to SEED1 - 1, a few hundred a minute on one thread, and prints the number of each
outcome, then every fault with its seed; the exit code is the number of faults, at most 1. A case is a table of a few
rows with hostile features, targets and weights, and an estimator with any loss, solver, activation, gates and
parameters; a part are paths, cross-validations and convolutions. A fault is

- an exception that no ``raise`` of this package, or of scikit-learn's validation, made, or one without words,
- a warning that is not one of the documented kinds,
- a network with numbers that are not finite, or a certificate that contradicts its own status.
"""

import linecache
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor, ConvexBNRegressorCV, Convolution

HERE = Path(convexbn.__file__).parent
OWN_ERRORS = (ValueError, TypeError, NotFittedError, MemoryError)
DOCUMENTED = (UserWarning, ConvergenceWarning, DataConversionWarning)
REGRESSION, CLASSIFICATION = ("squared", "huber"), ("squared", "logistic", "cross_entropy", "squared_hinge")
FEATURES = (
    "normal", "normal", "normal", "integers", "binary", "copies", "collinear", "offset", "units", "cauchy",
    "one row far away", "repeated rows", "tiny", "huge", "float32", "float16",
)  # fmt: skip
WEIGHTS = ("none", "none", "some zero", "wide", "huge", "tiny", "one heavy", "all but two zero")
TARGETS = ("normal", "normal", "outlier", "outlier", "constant", "zero", "tiny", "huge", "wide", "denormal", "steps")


def features(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Rows (n, d) of a hostile kind."""
    X, kind = rng.standard_normal((n, d)), rng.choice(FEATURES)
    if kind == "integers":
        X = rng.integers(-2, 3, (n, d)).astype(float)
    elif kind == "binary":
        X = rng.integers(0, 2, (n, d))
    elif kind == "copies":
        X[:, -1] = X[:, 0]
    elif kind == "collinear":
        X[:, -1] = X[:, 0] + 10.0 ** rng.uniform(-17, -3) * X[:, -1]
    elif kind == "offset":
        X[:, 0] += 10.0 ** rng.uniform(0, 17)
    elif kind == "units":
        X *= 10.0 ** rng.uniform(-40, 40, d)
    elif kind == "cauchy":
        X = rng.standard_cauchy((n, d)) ** 3
    elif kind == "one row far away":
        X[0] *= 10.0 ** rng.uniform(0, 16)
    elif kind == "repeated rows":
        X = X[rng.integers(0, max(2, n // 3), n)]
    elif kind in ("tiny", "huge"):
        X *= 10.0 ** (rng.uniform(50, 300) * (-1 if kind == "tiny" else 1))
    elif kind in ("float32", "float16"):
        X = X.astype(kind)
    return X


def numbers(rng: np.random.Generator, n: int, K: int) -> np.ndarray:
    """Targets (n,) or (n, K) of a regression."""
    y, kind = rng.standard_normal((n, K)), rng.choice(TARGETS)
    if kind == "outlier":
        y[rng.integers(n), rng.integers(K)] = rng.choice([-1, 1]) * 10.0 ** rng.uniform(1, 150)
    elif kind in ("constant", "zero"):
        y[:] = rng.standard_normal() if kind == "constant" else 0.0
    elif kind in ("tiny", "huge"):
        y *= 10.0 ** (rng.uniform(5, 145) * (-1 if kind == "tiny" else 1))
    elif kind == "wide":
        y *= 10.0 ** rng.uniform(-30, 30, y.shape)
    elif kind == "denormal":
        y *= 1e-310
    elif kind == "steps":
        y = np.round(y)
    return y[:, 0] if K == 1 else y


def labels(rng: np.random.Generator, X: np.ndarray, classes: int) -> np.ndarray:
    """Classes (n,): random, separable, or all but one row of one class."""
    n, kind = len(X), rng.integers(4)
    y = rng.integers(0, classes, n)
    if kind == 0:
        y = (X[:, 0] > np.median(X[:, 0])).astype(int) + (y == 2)
    elif kind == 1:
        y[:] = 0
    y[:classes] = np.arange(classes)
    return np.array(["a", "b", "c", "d"])[y] if rng.random() < 0.1 else y


def weights(rng: np.random.Generator, n: int) -> np.ndarray | None:
    """Sample weights (n,) or None."""
    kind, w = rng.choice(WEIGHTS), np.ones(n)
    if kind == "none":
        return None
    if kind == "some zero":
        w = rng.integers(0, 3, n).astype(float)
        w[:2] = 1
    elif kind == "wide":
        w = 10.0 ** rng.uniform(-12, 12, n)
    elif kind in ("huge", "tiny"):
        w *= 10.0 ** (rng.uniform(5, 150) * (-1 if kind == "tiny" else 1))
    elif kind == "one heavy":
        w[rng.integers(n)] = 10.0 ** rng.uniform(1, 20)
    elif kind == "all but two zero":
        w[2:] = 0
    return w


def settings(rng: np.random.Generator, regression: bool) -> dict[str, object]:
    """Parameters of an estimator; some are at their defaults."""
    loss = str(rng.choice(REGRESSION if regression else CLASSIFICATION))
    given: dict[str, object] = {"loss": loss, "n_gates": int(rng.integers(1, 13)), "random_state": 0}
    if loss == "huber":
        given["huber_delta"] = 10.0 ** rng.uniform(-3, 12)
    if not regression and rng.random() < 0.1:
        given["class_weight"] = "balanced"
    choices: dict[str, tuple[object, ...]] = {
        "gates": ("data", "data", "whitened", "trained"),
        "linear": (True, False), "fit_intercept": (True, False), "standardize": (True, False),
        "spectral_filter": ("auto", None, None, 1e-8, 1e8), "rank": (None, None, None, 1, 0.5),
        "solver": ("auto", "auto", "auto", "subspace", "proximal"), "max_iter": (*[30] * 12, 0, 1, 5, None),
        "tol": (1e-6, 1e-6, 1e-2, 1e-12, 0.0),
    }  # fmt: skip
    given |= {name: values[rng.integers(len(values))] for name, values in choices.items()}
    if given["gates"] == "trained" and rng.random() < 0.9:
        given["gates"] = "data"
    if given["solver"] in ("auto", "subspace") and loss == "squared" and regression and rng.random() < 0.3:
        given["solver"] = "group_newton"
    given["weight_decay"] = 10.0 ** rng.uniform(-10, 4)
    if (chance := rng.random()) < 0.1:
        given["weight_decay"] = 10.0 ** rng.uniform(-300, 300)
    elif chance < 0.14:  # takes ten times as long, as trained gates do
        given["weight_decay"] = "auto"
    return given


def case(seed: int):
    """Estimator, rows, targets, weights and kind of the case of a seed."""
    rng = np.random.default_rng(seed)
    n, d, K = int(rng.integers(2, 21)), int(rng.integers(1, 6)), int(rng.choice([1, 1, 1, 2, 3]))
    regression, kind = (
        bool(rng.random() < 0.5),
        str(rng.choice(["gated"] * 15 + ["relu"] * 3 + ["path", "convolution"])),
    )
    if rng.random() < 0.01:
        kind, n = "cross-validation", 20
    if kind == "convolution":
        d = 12
    X, given = features(rng, n, d), settings(rng, regression)
    y = numbers(rng, n, K) if regression else labels(rng, X, min(n, int(rng.integers(2, 4))))
    w = weights(rng, n)
    if given["loss"] == "logistic" and len(np.unique(y)) > 2:
        given["loss"] = "cross_entropy"
    if kind == "relu":
        unused = ("gates", "solver")
        given |= {"activation": "relu", "proof_time": 0.0, "max_iter": int(rng.integers(0, 3))}
        given = {name: value for name, value in given.items() if name not in unused}
    elif kind == "convolution":
        regions, pooling = [(1, "average"), ("all", "average"), (1, "max"), (2, "max")][rng.integers(4)]
        layer = Convolution(2, pooling=pooling, regions=regions, input_shape=(3, 4, 1))
        given |= {"convolution": layer, "gates": "data", "solver": "auto"}
    elif kind == "cross-validation":
        of_a_search = ("weight_decay", "rank", "spectral_filter")
        given = {name: value for name, value in given.items() if name not in of_a_search}
        given |= {"cv": 3, "gates": "data"}
        return (ConvexBNRegressorCV if regression else ConvexBNClassifierCV)(**given), X, y, w, kind
    return (ConvexBNRegressor if regression else ConvexBNClassifier)(**given), X, y, w, kind


def is_ours(error: Exception) -> bool:
    """Whether a ``raise`` of the package or of scikit-learn's validation made the error, with words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = HERE in Path(last.filename).parents and "raise" in "".join(
        linecache.getline(last.filename, line) for line in range(last.lineno - 1, last.lineno + 1)
    )
    return isinstance(error, OWN_ERRORS) and bool(str(error)) and (ours or "sklearn" in last.filename)


def fault_of(model, X: np.ndarray) -> str | None:
    """What is wrong with a fitted model, in words; None if nothing is."""
    proof, predictions = model.certificate_, model.predict(X)
    if predictions.dtype.kind == "f" and not np.isfinite(predictions).all():
        return f"predictions are not finite, {proof.status.value}"
    if proof.status.value in ("CERTIFIED", "TRIVIAL") and not 0 <= proof.gap <= proof.tolerance * abs(proof.objective):
        return f"{proof.status.value} with a gap of {proof.gap}"
    if proof.status.value != "NUMERICAL" and not np.isfinite([proof.objective, proof.lower_bound]).all():
        return f"{proof.status.value} with objective {proof.objective} and bound {proof.lower_bound}"
    return None


def outcome(seed: int) -> tuple[str, str | None]:
    """Outcome of the case of a seed in a few words, and what is wrong with it."""
    model, X, y, w, kind = case(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with np.errstate(all="raise" if seed % 5 == 0 else "warn"):
                if kind == "path":
                    points = list(convexbn.fit_path(model, X, y, sample_weight=w, weight_decays=[1e2, 1.0, 1e-3, 1e-9]))
                    return f"{kind} {len(points)} points", None
                model.fit(X, y, sample_weight=w)
                wrong = fault_of(model, X)
            result = f"{kind} {model.certificate_.status.value}"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}: {str(error)[:90]}"
            result = f"refused: {words[:60]}"
            wrong = None if is_ours(error) else f"{words} at {Path(last.filename).name}:{last.lineno}"
    for warning in caught:
        if not issubclass(warning.category, DOCUMENTED) or issubclass(warning.category, RuntimeWarning):
            wrong = wrong or f"{warning.category.__name__}: {warning.message}"
    return result, wrong


def main(first: int, end: int) -> int:
    """Print the outcomes of the seeds, then the faults; 1 if there are any."""
    outcomes, faults = Counter[str](), list[str]()
    for seed in range(first, end):
        result, wrong = outcome(seed)
        outcomes[result] += 1
        if wrong is not None:
            faults.append(f"seed {seed}, {result.split()[0]}: {wrong}")
            print(faults[-1], flush=True)
        if (seed + 1 - first) % 250 == 0:
            print(f"{seed + 1 - first} fits, {len(faults)} faults so far", flush=True)
    for result, count in sorted(outcomes.items()):
        print(f"{count:6d}  {result}")
    print(f"{end - first} fits, {len(faults)} faults")
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
