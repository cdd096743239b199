"""Small tables as people have them go through fit, path and cross-validation; run as a script for 200 of them."""

import sys
import warnings

import numpy as np
import pytest

from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor, ConvexBNRegressorCV, fit_path

PROVED = {"CERTIFIED", "TRIVIAL"}


def table(seed):
    """20 to 500 rows of 1 to 40 columns: numbers in mixed units, categories one-hot, constant, repeated, collinear."""
    rng = np.random.default_rng(seed)
    n, d = int(np.exp(rng.uniform(np.log(20), np.log(500)))), int(rng.integers(1, 41))
    columns = [rng.standard_normal(n)]
    while len(columns) < d:
        kind = rng.choice(["number", "unit", "offset", "count", "one-hot", "constant", "repeated", "collinear"])
        some = columns[rng.integers(len(columns))]
        if kind == "one-hot":
            levels = int(rng.integers(2, 6))
            columns += list(np.eye(levels)[rng.integers(0, levels, n)].T)  # all levels, as scikit-learn codes them
            continue
        number = rng.standard_normal(n)
        columns.append({
            "number": number, "unit": number * 10.0 ** rng.integers(-6, 7),
            "offset": number + 10.0 ** rng.integers(0, 5), "count": rng.poisson(3, n).astype(float),
            "constant": np.full(n, rng.integers(-3, 4) * 1.0), "repeated": some.copy(),
            "collinear": 2 * some - columns[-1],
        }[kind])  # fmt: skip
    X = np.column_stack(columns[:d])
    hidden = X[:, rng.integers(0, d, 3)]
    hidden = (hidden - hidden.mean(axis=0)) / np.maximum(
        hidden.std(axis=0), 1e-12 + np.abs(hidden.mean(axis=0)) * 1e-12
    )
    y = np.maximum(hidden, 0) @ rng.standard_normal(3) + 0.5 * rng.standard_normal(n)
    return X, y, int(rng.integers(2, 6))


def go_through(seed, task):
    """Statuses of a fit and of the points of a path, and the cross-validated estimator."""
    X, y, n_classes = table(seed)
    if task == "classification":
        y = np.searchsorted(np.quantile(y, np.arange(1, n_classes) / n_classes), y)
        alone, selected = ConvexBNClassifier, ConvexBNClassifierCV
    else:
        y, alone, selected = (y - y.mean()) / y.std(), ConvexBNRegressor, ConvexBNRegressorCV
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = alone(random_state=seed).fit(X, y)
        points = list(fit_path(alone(random_state=seed), X, y))
        chosen = selected(random_state=seed).fit(X, y)
    assert not [w for w in caught if "rank cut" in str(w.message)], [str(w.message) for w in caught]
    return [model.certificate_.status, *(point.certificate.status for point in points)], chosen


@pytest.mark.parametrize("seed", range(20))
def test_a_random_table_goes_through(seed):
    statuses, chosen = go_through(seed, "regression" if seed % 2 else "classification")
    assert len(statuses) == 21 and set(statuses) <= PROVED
    assert np.isfinite(chosen.best_score_) and chosen.certificate_.status in PROVED and chosen.failures_ == []


if __name__ == "__main__":
    broken, unproved, failed = 0, 0, 0
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        for task in ("classification", "regression"):
            try:
                statuses, chosen = go_through(seed, task)
            except Exception as error:
                broken += 1
                print(seed, task, repr(error), flush=True)
                continue
            odd = [status.value for status in [*statuses, chosen.certificate_.status] if status not in PROVED]
            unproved, failed = unproved + len(odd), failed + len(chosen.failures_)
            if odd or chosen.failures_:
                print(seed, task, odd, chosen.failures_, flush=True)
    print(f"{broken} broken, {unproved} points not proved, {failed} folds or candidates failed")
