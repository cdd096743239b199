"""Rules for fields of a JSON header: predicates of one value, and the refusal of a value that breaks its rule.

A rule asks for the exact type, because in JSON ``true`` is not 1. It never raises, whatever the value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from convexbn.files.model_file import FormatError

Rule: TypeAlias = Callable[[Any], bool]

#: Names of the numbers that JSON does not have.
NOT_FINITE = ("nan", "inf", "-inf")


def require(holds: object, field: str) -> None:
    """Refuse a field unless its rule holds."""
    if not holds:
        raise FormatError(f"the field '{field}' does not fit the rest")


def _exactly(kind: type) -> Rule:
    return lambda value: type(value) is kind


#: Any string, boolean or JSON object.
text, flag, mapping = _exactly(str), _exactly(bool), _exactly(dict)


def count(value: Any) -> bool:
    """A whole number from 0."""
    return type(value) is int and value >= 0


def number(value: Any) -> bool:
    """A finite number; an integer must be exact in float64."""
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) <= 2**53


def real(value: Any) -> bool:
    """A number, or the name of an infinite or undefined one."""
    return number(value) or one_of(*NOT_FINITE)(value)


def not_negative(value: Any) -> bool:
    """A finite number from 0."""
    return number(value) and value >= 0


def positive(value: Any) -> bool:
    """A finite float above 0."""
    return type(value) is float and 0 < value < math.inf


def share(value: Any) -> bool:
    """A number in [0, 1)."""
    return not_negative(value) and value < 1


def names(value: Any) -> bool:
    """A list of distinct strings."""
    return type(value) is list and all(map(text, value)) and len(set(value)) == len(value)


def list_of(*types: type, least: int) -> Rule:
    """A list of at least ``least`` values, each of one of the types."""
    return lambda value: type(value) is list and len(value) >= least and all(type(item) in types for item in value)


def each(rule: Rule) -> Rule:
    """A list of values that satisfy a rule."""
    return lambda value: type(value) is list and all(map(rule, value))


def one_of(*choices: str) -> Rule:
    """One of the strings."""
    return lambda value: type(value) is str and value in choices


def matching(pattern: str) -> Rule:
    """A string that the regular expression matches entirely."""
    return lambda value: type(value) is str and re.fullmatch(pattern, value) is not None


def none_or(rule: Rule) -> Rule:
    """None, or a value that satisfies the rule."""
    return lambda value: value is None or rule(value)


def either(*rules: Rule) -> Rule:
    """A value that satisfies one of the rules."""
    return lambda value: any(rule(value) for rule in rules)


def record(**rules: Rule) -> Rule:
    """An object with exactly these fields, each of which satisfies its rule."""
    return lambda value: (
        type(value) is dict and same_names(value, rules) and all(rule(value[name]) for name, rule in rules.items())
    )


def same_names(one: Iterable[str], two: Iterable[str]) -> bool:
    """Whether two collections hold the same names, in any order."""
    return set(one) == set(two)
