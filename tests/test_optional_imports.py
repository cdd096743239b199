"""Without torch or onnx all else works, and what needs them says how to install them."""

import subprocess
import sys

import pytest

import convexbn

BLOCKED = """
import importlib, importlib.abc, pkgutil, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocked = sys.argv[1]
sys.meta_path.insert(0, Blocker())

def expect_instructions(function):
    try:
        function()
    except ImportError as error:
        assert f"pip install 'convexbn[{blocked}]'" in str(error), error
    else:
        raise AssertionError("worked without " + blocked)

import numpy as np
import convexbn

modules = [module.name for module in pkgutil.walk_packages(convexbn.__path__, "convexbn.", onerror=lambda name: None)]
torch_alone = ("convexbn.nn", "convexbn.companions.")
for name in modules:
    with_torch = name.startswith(torch_alone) and not name.endswith("excess_risk")
    if not name.startswith("convexbn.__main__") and not (blocked == "torch" and with_torch):
        importlib.import_module(name)

X = np.random.default_rng(0).standard_normal((12, 15))
for activation in ("relu", "gated"):
    model = convexbn.ConvexBNRegressor(activation=activation, n_gates=10, random_state=0).fit(X, X[:, 0] ** 2)
    assert model.certificate_.status == "CERTIFIED" and model.predict(X).shape == (12,)
model.save("m.cbn")
network = convexbn.load("m.cbn").network_
if blocked == "torch":
    expect_instructions(lambda: importlib.import_module("convexbn.nn"))
    expect_instructions(lambda: convexbn.nn)
    expect_instructions(lambda: convexbn.companions.WeightRescaling)
    expect_instructions(lambda: convexbn.companions.diagnostics)
    convexbn.onnx.export(network, "m.onnx")
else:
    expect_instructions(lambda: convexbn.onnx.export(network, "m.onnx"))
    convexbn.nn.to_module(network)
assert blocked not in sys.modules
print("worked without", blocked)
"""


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_the_rest_works_without(tmp_path, package):
    command = [sys.executable, "-c", BLOCKED, package]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"worked without {package}\n", done.stderr[-1500:]
    assert (tmp_path / "m.onnx").exists() == (package == "torch")


def test_torch_and_onnx_are_not_imported_unasked():
    script = f"""
import sys, convexbn, convexbn.cli, convexbn.files.onnx
for name in {convexbn.__all__}:
    getattr(convexbn, name)
print(*{{"torch", "onnx"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["collapse.collapse_metrics", "nn.certify", "onnx.export", "path.fit_path"])
def test_modules_come_with_their_first_use(name):
    script = f"import convexbn; print(callable(convexbn.{name}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
