"""Regularisation paths over weight decay and rank: one whitening, warm starts, every point a certified model."""

from convexbn.path.regularisation import PathPoint, RegularisationPath, fit_path, load_path

__all__ = ["PathPoint", "RegularisationPath", "fit_path", "load_path"]
