"""Rules for single fields: predicates of a value out of JSON, and the refusal when one does not hold.

A rule asks for the exact type, because in JSON ``true`` is not 1; it never raises, whatever the value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from convexbn.files.model_file import FormatError

Rule: TypeAlias = Callable[[Any], bool]

#: What a JSON number cannot be, by name.
NOT_FINITE = ("nan", "inf", "-inf")


def require(holds: object, field: str) -> None:
    """Refuse a field, by name, unless its rule holds."""
    if not holds:
        raise FormatError(f"the field '{field}' does not fit the rest")


def text(value: Any) -> bool:
    """Any string."""
    return type(value) is str


def flag(value: Any) -> bool:
    """True or false."""
    return type(value) is bool


def count(value: Any) -> bool:
    """A whole number from 0."""
    return type(value) is int and value >= 0


def number(value: Any) -> bool:
    """A finite number; a whole one without a point only as far as float64 counts."""
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) <= 2**53


def real(value: Any) -> bool:
    """A number, or the name of one that is not finite."""
    return number(value) or one_of(*NOT_FINITE)(value)


def not_negative(value: Any) -> bool:
    """A finite number from 0."""
    return number(value) and value >= 0


def positive(value: Any) -> bool:
    """A finite number above 0, not written as an integer."""
    return type(value) is float and 0 < value < math.inf


def share(value: Any) -> bool:
    """A number in [0, 1)."""
    return not_negative(value) and value < 1


def mapping(value: Any) -> bool:
    """Any JSON object."""
    return type(value) is dict


def names(value: Any) -> bool:
    """A list of distinct strings."""
    return type(value) is list and all(map(text, value)) and len(set(value)) == len(value)


def list_of(*types: type, least: int) -> Rule:
    """A list of at least so many values of these types."""
    return lambda value: type(value) is list and len(value) >= least and all(type(item) in types for item in value)


def one_of(*choices: str) -> Rule:
    """One of some strings."""
    return lambda value: type(value) is str and value in choices


def matching(pattern: str) -> Rule:
    """A string that a regular expression matches as a whole."""
    return lambda value: type(value) is str and re.fullmatch(pattern, value) is not None


def none_or(rule: Rule) -> Rule:
    """None, or what another rule allows."""
    return lambda value: value is None or rule(value)


def either(*rules: Rule) -> Rule:
    """What one of some rules allows."""
    return lambda value: any(rule(value) for rule in rules)


def record(**rules: Rule) -> Rule:
    """An object with exactly these fields, each under its own rule."""

    def holds(value: Any) -> bool:
        return type(value) is dict and same_names(value, rules) and all(rule(value[k]) for k, rule in rules.items())

    return holds


def same_names(one: Iterable[str], two: Iterable[str]) -> bool:
    """Whether two collections hold the same names, in whatever order."""
    return set(one) == set(two)
