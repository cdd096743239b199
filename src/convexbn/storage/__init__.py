"""Saved models: a fitted estimator to a checked container file, and back."""

from convexbn.container import FormatError
from convexbn.storage.files import load, save

__all__ = ["FormatError", "load", "save"]
