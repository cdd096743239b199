"""Public names: import paths, options of the command line and the format of saved files are pinned here."""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from convexbn.path import load_path
from sklearn.datasets import load_iris

import convexbn
from convexbn import fit_path
from convexbn.cli import _parser
from instances import PAPER

#: Models and a path, written by the first format.
SAVED = Path(__file__).with_name("saved")

TOP = [
    "BatchNormNetwork", "Certificate", "ConvexBNClassifier", "ConvexBNClassifierCV", "ConvexBNRegressor",
    "ConvexBNRegressorCV", "Convolution", "FormatError", "Status", "__version__", "fit_path", "load",
    "max_weight_decay",
]  # fmt: skip
MODULES = {
    "collapse": ["CollapseMetrics", "collapse_metrics", "optimal_collapse"],
    "datasets": ["cifar10", "digits", "fashion_mnist"],
    "display": ["CertificateDisplay", "PathDisplay", "SpectrumDisplay"],
    "onnx": ["export"],
    "path": ["PathPoint", "RegularisationPath", "fit_path", "load_path"],
    "nn": [
        "ConvexLayer", "GatedModule", "LastLayers", "Reoptimisation", "certify", "from_module", "gated_outputs",
        "read_last_layers", "reoptimise", "to_module",
    ],
    "companions": [
        "CrossIterationBatchNorm1d", "CrossIterationBatchNorm2d", "NormalisedLayer", "WeightRescaling",
        "convert_cross_iteration_batch_norm", "diagnostics", "excess_risk", "normalised_layers",
    ],
}  # fmt: skip
DATA = "--data-home --decimal --target"
NETWORK = (
    "--columns --drop --strict --activation --loss --class-weight --huber-delta --n-gates --width --n-starts --gates "
    "--no-linear --no-intercept --no-standardize --spectral-filter --filter --stride --padding --pool --regions "
    "--image --tol --max-iter --time-limit "
    "--proof-time --task --seed"
)
OPTIONS = {
    "fit": f"{DATA} {NETWORK} --out --weight-decay --rank --test-size --json",
    "predict": "--data-home --decimal --out --id --strict --proba --digits",
    "certify": f"{DATA} --time-limit --without-filter --json --loss --huber-delta --weight-decay --optimizer-decay "
    "--eps --tol",
    "path": f"{DATA} {NETWORK} --weight-decays --ranks --validation-size --checkpoint --out --plot --plot-spectrum "
    "--json",
    "reproduce": "--list --quick --out --draw",
    "report": f"{DATA} --out --path --time-limit",
}


def test_top_level_names():
    assert sorted(convexbn.__all__) == TOP


@pytest.mark.parametrize("module", MODULES)
def test_names_of_modules(module):
    found = getattr(convexbn, module)
    assert [name for name in MODULES[module] if not hasattr(found, name)] == []
    if module in ("nn", "companions"):
        assert sorted(found.__all__) == MODULES[module]
    if module == "companions":
        assert dir(found) == MODULES[module]


@pytest.mark.parametrize("module", MODULES)
def test_public_modules_are_imported_by_their_names(module):
    script = (
        f"import convexbn.{module} as found; from convexbn.{module} import {MODULES[module][0]}; import convexbn\n"
        f"assert found is convexbn.{module} and found.__spec__.name == found.__name__"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_other_modules_are_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"convexbn\.nonsense"):
        importlib.import_module("convexbn.nonsense")


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_the_command_line(command):
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(commands.choices) == set(OPTIONS)
    flags = {flag for action in commands.choices[command]._actions for flag in action.option_strings}
    assert flags - {"-h", "--help"} == set(OPTIONS[command].split())


def test_saved_files_have_the_same_header(tmp_path):
    X, y = load_iris(return_X_y=True)
    convexbn.ConvexBNClassifier(n_gates=5, random_state=0).fit(X, y).save(tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    (text,) = table["__metadata__"].values()
    seal = json.loads(text)
    assert seal["format"] == "2" and sorted(seal) == ["format", "header", "sha256"]
    assert sorted(json.loads(seal["header"])) == [
        "certificate", "classes", "estimator", "feature_names", "fingerprint", "n_effective", "n_iter", "parameters",
        "rank", "single_output", "source", "temperature", "version", "weight_decay",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gated", "relu", "filtered", "convolution"])
def test_files_of_the_first_format_are_read_and_written_again(name, tmp_path):
    model = convexbn.load(SAVED / f"{name}.safetensors")
    assert model.certificate_.status is convexbn.Status.CERTIFIED
    model.save(tmp_path / "model")
    again = convexbn.load(tmp_path / "model")
    assert again.certificate_ == model.certificate_ and again.fingerprint_ == model.fingerprint_
    X = np.random.default_rng(1).standard_normal((5, model.n_features_in_))
    assert np.array_equal(again.network_.predict(X), model.network_.predict(X))


def test_a_path_of_the_first_format_goes_on(tmp_path):
    file, X = tmp_path / "path", np.random.default_rng(0).standard_normal((30, 3))
    shutil.copy(SAVED / "path.safetensors", file)
    labels, model = (
        np.array(["a", "b", "c"])[np.arange(30) % 3],
        convexbn.ConvexBNClassifier(loss="squared", n_gates=6, **PAPER),
    )
    model.random_state = 0
    found = fit_path(model, X, labels, weight_decays=[2.0, 1.0], checkpoint=file)
    assert len(found.points) == 2
    for before, now in zip(load_path(SAVED / "path.safetensors"), found, strict=True):
        assert now.certificate == before.certificate and now.score == before.score
        assert np.array_equal(now.model.predict(X), before.model.predict(X))
