"""Saved models: a fitted estimator to a checked container file, and back."""

from convexbn.files.model_file import FormatError
from convexbn.storage.files import load, save

__all__ = ["FormatError", "load", "save"]
