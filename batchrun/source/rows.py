"""Stored windows back to Python rows, for dispatch. PURE."""

from typing import Any, cast

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from batchrun.source.unify import shortest
from batchrun.source.window import LINES

_decode = msgspec.json.Decoder(dict[str, object]).decode


def rows_of(batch: pa.RecordBatch) -> list[dict[str, object]]:
    """The rows of a window's batch as dicts: decoded lines, or Arrow's own Python values.

    A time with nanoseconds that Python's types can't hold comes as text of full precision, a float of less than double
    precision as the shortest number that it is.
    0.7 µs for a JSONL row of 350 bytes and for a Parquet row of 5 columns (measured).

    Raises:
        ValueError: a Parquet value has no Python form, such as a date beyond year 9999.
    """
    if batch.schema.metadata == LINES.metadata:
        return [_decode(line) for line in cast(list[bytes], batch.column(0).to_pylist())]
    names = batch.schema.names
    columns = [_values(column) for column in batch.columns]
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: "pa.Array[Any]") -> list[object]:
    column = shortest(column)
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # value by value, so that a value's form does not depend on its neighbours
        return [_value(scalar) for scalar in column]


def _value(scalar: "pa.Scalar[Any]") -> object:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        match scalar:
            case pa.StructScalar():
                return {name: _value(member) for name, member in scalar.items()}
            case pa.ListScalar():  # of every width, views too; a map is one, of structs
                elements = [_value(element) for element in cast("pa.Array[Any]", scalar.values)]
                if pa.types.is_map(scalar.type):
                    return [tuple(cast(dict[str, object], entry).values()) for entry in elements]
                return elements
        if getattr(scalar.type, "unit", None) != "ns":
            raise ValueError(f"{scalar.type} value without a form in Python: {error}") from error
        return pc.cast(scalar, pa.string()).as_py()
