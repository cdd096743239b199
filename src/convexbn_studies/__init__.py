"""The experiments of the papers, one file each: what ``convexbn reproduce`` runs."""

from __future__ import annotations

from importlib import import_module

from convexbn_studies.study import Cell, Finding, Picture, Row, Study

__all__ = ["NAMES", "Cell", "Finding", "Picture", "Row", "Study", "study"]

#: Studies by name, in the order of the list, and the module that holds each as ``STUDY``.
NAMES: dict[str, str] = {
    "equivalence": "convexbn_studies.equivalence",
    "closed-form": "convexbn_studies.closed_form",
    "neural-collapse": "convexbn_studies.neural_collapse",
    "gd-bias": "convexbn_studies.gd_bias",
    "certificate": "convexbn_studies.certificate",
    "truncation": "convexbn_studies.truncation",
    "speed": "convexbn_studies.speed",
    "differentiable-layer": "convexbn_studies.differentiable_layer",
    "sgd-vs-ridge": "convexbn_studies.sgd_vs_ridge",
    "understanding-bn": "convexbn_studies.understanding_bn",
    "cross-iteration-bn": "convexbn_studies.cross_iteration_bn",
    "weight-rescaling": "convexbn_studies.weight_rescaling",
}


def study(name: str) -> Study:
    """Study of a name.

    Raises
    ------
    ValueError
        When there is none; the sentence lists the names.
    """
    if name not in NAMES:
        raise ValueError(f"there is no study {name!r}; there are {', '.join(NAMES)}.")
    return import_module(NAMES[name]).STUDY
