"""Turns stored windows into Python rows for dispatch. PURE."""

import re
from datetime import timedelta
from functools import cache
from typing import Any, cast

import msgspec
import pyarrow as pa

from batchrun import compute as pc
from batchrun.source.unify import has_views, is_view, shortest
from batchrun.source.window import LINES

_decode = msgspec.json.Decoder(dict[str, object]).decode


def rows_of(batch: pa.RecordBatch) -> list[dict[str, object]]:
    """The rows of a window's batch as dicts: decoded lines, or Arrow's Python values with three exceptions.

    A time with nanoseconds is text of full precision, a float of less than double precision is the shortest decimal
    that rounds to it, and a map is a dict.
    0.7 µs for a JSONL row of 350 bytes and for a Parquet row of 5 columns (measured).

    Raises:
        ValueError: Python has no value for a Parquet value, such as a date after year 9999; names the column.
    """
    if batch.schema.metadata == LINES.metadata:
        return [_decode(line) for line in cast(list[bytes], batch.column(0).to_pylist())]
    names = batch.schema.names
    columns = [_values(name, column) for name, column in zip(names, batch.columns, strict=True)]
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(name: str, column: "pa.Array[Any]") -> list[object]:
    converts = _needs_conversion(column.type)
    if not converts or not has_views(column.type):  # Arrow's cast loses the elements of views within lists
        column = shortest(column)
    try:
        try:
            values = column.to_pylist()
        except (ValueError, OverflowError):  # one by one, so that a value's form does not depend on other values
            values = [_value(scalar) for scalar in column]
        return [_converted(value, column.type) for value in values] if converts else values
    except ValueError as error:
        raise ValueError(f"column '{name}' of type {column.type}: {error}") from error


def _value(scalar: "pa.Scalar[Any]") -> object:
    """A value that Arrow's own conversion refuses: nanoseconds as text, members one by one."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        match scalar:
            case pa.StructScalar():
                return {name: _value(member) for name, member in scalar.items()}
            case pa.ListScalar():  # all kinds of lists and views; a map is a list of structs
                elements = [_value(element) for element in cast("pa.Array[Any]", scalar.values)]
                if pa.types.is_map(scalar.type):
                    return [tuple(cast(dict[str, object], entry).values()) for entry in elements]
                return elements
        if getattr(scalar.type, "unit", None) != "ns":
            raise ValueError(_conversion_problem(error)) from error
        if pa.types.is_duration(scalar.type):
            whole, rest = divmod(pc.cast(scalar, pa.int64()).as_py(), 1000)
            text = str(timedelta(microseconds=whole))
            return (text if "." in text else text + ".000000") + f"{rest:03}"
        return _OFFSET.sub(r"\1:\2", pc.cast(scalar, pa.string()).as_py())


_OFFSET = re.compile(r"([+-]\d\d)(\d\d)$")  # Arrow writes +0100, Python +01:00


def _conversion_problem(error: Exception) -> str:
    """Why Python's types can't hold a value, and what to do."""
    if "zoneinfo" in str(error) or "pytz" in str(error):
        return "its time zone is not known here; install tzdata, or cast the column to UTC"
    if isinstance(error, UnicodeDecodeError):
        return f"a text is not UTF-8 ({error.reason} at byte {error.start + 1}); write the column as UTF-8"
    return f"a value is out of the range of Python's type ({error}); cast the column to text or integers"


@cache
def _needs_conversion(type_: pa.DataType) -> bool:
    """True if `_converted` would change a value of that type: it has maps, or floats that `shortest` can't reach."""
    if pa.types.is_map(type_):
        return True
    if isinstance(type_, pa.DictionaryType | pa.BaseExtensionType) or is_view(type_):
        return _needs_conversion(inner := _inner(type_)) or _has_short_floats(inner)
    return pa.types.is_nested(type_) and any(_needs_conversion(type_.field(n).type) for n in range(type_.num_fields))


def _has_short_floats(type_: pa.DataType) -> bool:
    if pa.types.is_nested(type_):
        return any(_has_short_floats(type_.field(n).type) for n in range(type_.num_fields))
    return pa.types.is_float32(type_) or pa.types.is_float16(type_)


def _inner(type_: pa.DataType) -> pa.DataType:
    if isinstance(type_, pa.BaseExtensionType):
        return type_.storage_type
    inner: pa.DataType = type_.value_type  # type: ignore[attr-defined]  # a dictionary's, or a list's
    return inner


def _converted(value: Any, type_: pa.DataType) -> Any:
    """The value with maps as dicts and each float as the shortest decimal that rounds to it.

    Raises:
        ValueError: a map has a key twice.
    """
    if isinstance(type_, pa.DictionaryType | pa.BaseExtensionType) and isinstance(value, float | list | dict):
        return _converted(value, _inner(type_))
    if value is None:
        return None
    if isinstance(type_, pa.MapType):
        entries = [(_converted(key, type_.key_type), _converted(item, type_.item_type)) for key, item in value]
        keys = [str(key) if isinstance(key, dict | list) else key for key, _ in entries]
        if len(set(keys)) < len(keys):
            raise ValueError("a map has the key twice: " + repr(max(keys, key=keys.count)))
        return dict(zip(keys, (item for _, item in entries), strict=True))
    if pa.types.is_struct(type_):
        return {field.name: _converted(value[field.name], field.type) for field in type_.fields}
    if isinstance(value, list):
        inner = _inner(type_)
        return [_converted(item, inner) for item in value]
    if isinstance(value, float) and (pa.types.is_float32(type_) or pa.types.is_float16(type_)):
        return float(pc.cast(pa.scalar(value, pa.float32()), pa.string()).as_py())
    return value
