"""Public names: import paths, options of the command line and the format of saved files are pinned here."""

import argparse

import pytest

import convexbn
from convexbn.cli import _parser

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
DATA = "--data-home --target"
NETWORK = (
    "--activation --loss --huber-delta --n-gates --width --n-starts --gates --spectral-filter --filter --stride "
    "--padding --pool --regions --image --tol --max-iter --time-limit --task --seed"
)
OPTIONS = {
    "fit": f"{DATA} {NETWORK} --out --weight-decay --rank --test-size --json",
    "predict": "--data-home --out",
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
    import convexbn.estimators.display
    import convexbn.files.datasets

    found = getattr(convexbn, module)
    assert [name for name in MODULES[module] if not hasattr(found, name)] == []
    if module in ("nn", "companions"):
        assert sorted(found.__all__) == MODULES[module]


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_the_command_line(command):
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(commands.choices) == set(OPTIONS)
    flags = {flag for action in commands.choices[command]._actions for flag in action.option_strings}
    assert flags - {"-h", "--help"} == set(OPTIONS[command].split())


def test_saved_files_have_the_same_format(tmp_path):
    import json

    from sklearn.datasets import load_iris

    convexbn.ConvexBNClassifier(n_gates=5, random_state=0).fit(*load_iris(return_X_y=True)).save(tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert table["__metadata__"]["format"] == "1"
    header = json.loads(table["__metadata__"]["convexbn"])
    assert sorted(header) == [
        "certificate", "classes", "estimator", "feature_names", "fingerprint", "n_effective", "n_iter", "parameters",
        "rank", "single_output", "source", "version", "weight_decay",
    ]  # fmt: skip
