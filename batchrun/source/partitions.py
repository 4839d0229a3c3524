"""Chooses input files by the keys of their folders (`key=value`), before any of them is opened. PURE.

    {"lang": ["de", "en"], "day": ">=2026-11-01"}

A text or a number is that value, a list any of its values. A text that starts with `=`, `!=`, `<`, `<=`, `>` or `>=`
compares, and all comparisons of a list must hold. Two integers are compared as numbers (`month=01` is 1), all else as
text, in which dates of the form 2026-11-01 are in order. As in SQL, no comparison is true of a null key; its own name,
`__HIVE_DEFAULT_PARTITION__`, is equal to it.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from batchrun.errors import InputError
from batchrun.source.hive import NULL, texts_of
from batchrun.storage.objects import InputFile

Value = str | int
Filters = Mapping[str, Value | Sequence[Value]]

MAX_SHOWN = 10
"""Values of a key that a message names."""

_COMPARES: dict[str, Callable[[Any, Any], bool]] = {
    **{"==": operator.eq, "=": operator.eq, "!=": operator.ne},
    **{"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt},
}
_COMPARISON = re.compile(r"\s*(==|=|!=|<=|<|>=|>)\s*(.*)", re.DOTALL)
_INTEGER = re.compile(r"[+-]?\d{1,18}")


def chosen(files: Sequence[InputFile], filters: Filters, path: str) -> tuple[InputFile, ...]:
    """The files whose keys match every filter. `path` is the input's, for messages.

    Raises:
        InputError: a filter makes no sense, no file has a key of that name, or none matches.
    """
    for name, wanted in filters.items():
        compares = {_compares(value) for value in _values(wanted)}
        if len(compares) != 1:
            what = "mixes values and comparisons; a list has one kind" if compares else "is empty; name a value"
            raise InputError(f"input.partitions.{name}: {what}")
    keys = [texts_of(file) for file in files]
    names = list(dict.fromkeys(name for each in keys for name in each))
    for name in filters:
        if name not in names:
            known = f"its keys are {', '.join(names)}" if names else "it has no folders named key=value"
            raise InputError(f"input.partitions.{name}: {path} has no folder named {name}=…; {known}")
    matching = tuple(
        file
        for file, each in zip(files, keys, strict=True)
        if all(_holds(each.get(name), wanted) for name, wanted in filters.items())
    )
    if files and not matching:
        shown = "; ".join(f"{name} is {_shown({each.get(name) for each in keys})}" for name in filters)
        raise InputError(f"input.partitions: none of the files of {path} match ({len(files):,} in all); {shown}")
    return matching


def _values(wanted: Value | Sequence[Value]) -> Sequence[Value]:
    return (wanted,) if isinstance(wanted, str | int) else wanted


def _holds(found: str | None, wanted: Value | Sequence[Value]) -> bool:
    values = _values(wanted)
    holds: list[bool] = []
    for value in values:
        if _compares(value):
            match = _COMPARISON.fullmatch(str(value))
            assert match is not None
            holds.append(found is not None and _COMPARES[match[1]](*_comparable(found, match[2].strip())))
        elif found is None or value == NULL:
            holds.append((found is None) == (value == NULL))
        else:
            one, other = _comparable(found, value)
            holds.append(one == other)
    return all(holds) if _compares(values[0]) else any(holds)


def _compares(value: Value) -> bool:
    return isinstance(value, str) and _COMPARISON.fullmatch(value) is not None


def _comparable(found: str, value: Value) -> tuple[str | int, str | int]:
    if _INTEGER.fullmatch(found) and _INTEGER.fullmatch(str(value)):
        return int(found), int(value)
    return found, str(value)


def _shown(values: set[str | None]) -> str:
    """Some of a key's values: the first and the last ones in their order."""
    texts = sorted(NULL if value is None else value for value in values)
    if len(texts) > MAX_SHOWN:
        half = MAX_SHOWN // 2
        texts = [*texts[:half], "…", *texts[-half:]]
    return ", ".join(texts)
