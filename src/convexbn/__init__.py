"""Batch-normalised ReLU networks trained to a certified global optimum by convex programming."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from convexbn._version import __version__

_HOMES = {
    "BatchNormNetwork": "convexbn.program.network",
    "Certificate": "convexbn.certificate.certificate",
    "Convolution": "convexbn.data.convolution",
    "ConvexBNClassifier": "convexbn.estimators.classifier",
    "ConvexBNClassifierCV": "convexbn.estimators.cross_validation",
    "ConvexBNRegressor": "convexbn.estimators.regressor",
    "ConvexBNRegressorCV": "convexbn.estimators.cross_validation",
    "FormatError": "convexbn.files.model_file",
    "Status": "convexbn.certificate.status",
    "fit_path": "convexbn.estimators.path",
    "load": "convexbn.estimators",
    "max_weight_decay": "convexbn.estimators.max_weight_decay",
}

#: Public modules and their rooms, imported on first use: ``convexbn.nn`` imports torch, ``convexbn`` does not.
_MODULES = {
    "collapse": "convexbn.training.neural_collapse",
    "companions": "convexbn.companions",
    "datasets": "convexbn.files.datasets",
    "display": "convexbn.estimators.display",
    "nn": "convexbn.nn",
    "onnx": "convexbn.estimators.onnx",
    "path": "convexbn.estimators.path",
}

__all__ = [
    "BatchNormNetwork",
    "Certificate",
    "ConvexBNClassifier",
    "ConvexBNClassifierCV",
    "ConvexBNRegressor",
    "ConvexBNRegressorCV",
    "Convolution",
    "FormatError",
    "Status",
    "__version__",
    "fit_path",
    "load",
    "max_weight_decay",
]

if TYPE_CHECKING:
    from convexbn.certificate.certificate import Certificate
    from convexbn.certificate.status import Status
    from convexbn.data.convolution import Convolution
    from convexbn.estimators import load
    from convexbn.estimators.classifier import ConvexBNClassifier
    from convexbn.estimators.cross_validation import ConvexBNClassifierCV, ConvexBNRegressorCV
    from convexbn.estimators.max_weight_decay import max_weight_decay
    from convexbn.estimators.path import fit_path
    from convexbn.estimators.regressor import ConvexBNRegressor
    from convexbn.files.model_file import FormatError
    from convexbn.program.network import BatchNormNetwork


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import convexbn`` does not import scikit-learn."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'convexbn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _PublicModules:
    """Import finder for ``convexbn.path`` and the like: one module under its public name and that of its room."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Specification of a public module whose name differs from that in its room."""
        package, _, public = name.rpartition(".")
        known = package == __name__ and _MODULES.get(public, name) != name
        return ModuleSpec(name, _PublicModules) if known else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        """Import the module from its room."""
        module = import_module(_MODULES[spec.name.rpartition(".")[2]])
        spec.loader_state = module.__spec__
        return module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Restore the module's own specification; its code has run already."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_PublicModules)
