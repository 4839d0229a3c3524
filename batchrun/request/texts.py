"""A row's values as the text that a prompt holds: as JSON writes them, whichever file they came from. PURE."""

import math
from decimal import Decimal
from typing import Any

import msgspec

_encode = msgspec.json.Encoder(decimal_format="number").encode


class NoTextError(Exception):
    """A value that must not reach a paid prompt; the message says what it is."""


class NullError(NoTextError):
    """The value is null, and would be the word "None"."""


def text_of(value: Any) -> Any:
    """What a text gets for the value: the value itself, where Python writes it as JSON does.

    A whole double is written as the integer it is: Parquet makes doubles of integers beside nulls, JSON lines do not.

    Raises:
        NoTextError: it is null, not a number, or bytes.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise NullError
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | bytes):
        return _checked(value)
    return json_of(value) if isinstance(value, dict | list | tuple | Decimal) else value


def json_of(value: Any, indent: int = 0) -> str:
    """The value as JSON, in one line unless `indent` says how far each level goes in. A null is a null here.

    Raises:
        NoTextError: it holds bytes, or what is not a number.
    """
    return msgspec.json.format(_encode(_checked(value)), indent=indent).decode()


def _checked(value: Any) -> Any:
    """The value as `_encode` writes it the same from any file; what has no text is refused."""
    if isinstance(value, dict):
        return {str(name): _checked(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(item) for item in value]
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise NoTextError(f"a value is {value}, which is not a number")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:  # from there on Python writes exponents
        return int(value)
    if isinstance(value, Decimal):
        return msgspec.Raw(format(value, "f").encode())  # never 0E-10, with which a prompt would read as something else
    if isinstance(value, bytes):
        raise NoTextError(f"a value is bytes ({value[:20]!r}), which are not text")
    return value
