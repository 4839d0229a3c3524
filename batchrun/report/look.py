"""Rows of a result for people: the question beside the answer, and why there is none. PURE but for reading."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from batchrun.errors import InputError, JobError
from batchrun.records import RowError
from batchrun.report import run_rows
from batchrun.report.run_rows import Result
from batchrun.report.summary import plural
from batchrun.report.where import Where
from batchrun.store.rundir import RunDirectory
from batchrun.tables.rows import OWN_COLUMNS

MOST_SHOWN = 2_000
"""Characters of one value on the terminal; --json has all of it."""


class Look(msgspec.Struct, frozen=True):
    """Which rows: all that is given must hold. `most` 0: all. `columns`: what is shown of them."""

    statuses: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    where: str | None = None
    most: int = 10
    columns: tuple[str, ...] = ()


def result_at(place: RunDirectory) -> Result:
    """The rows to look at.

    Raises:
        InputError: there are none yet.
    """
    given = place.path
    if (found := run_rows.result_of(given)) is not None:
        return found
    if place.checkpoint.exists():
        raise InputError(f"{given}: no result yet; batchrun export {given} writes the rows so far")
    raise InputError(f"{given}: no rows here; name a run directory or a completions file")


def rows_of(text: str) -> tuple[int, ...]:
    """`3` or `3,10-12`.

    Raises:
        JobError: something else.
    """
    rows: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise JobError(f"--row {text}: expected rows like 3 or 3,10-12")
        if dash and int(last) - int(first) > 100_000:
            raise JobError(f"--row {text}: too many at once")
        rows += range(int(first), int(last if dash else first) + 1)
    return tuple(rows)


def rows(result: Result, look: Look) -> Iterator[dict[str, Any]]:
    """The rows, in order, each as its columns and what its headline says; read no further than they are taken."""
    inputs, own = _columns(result, look)
    schema = pa.schema([_as_read(result, field) for field in result.schema])
    where = None if look.where is None else Where(look.where, schema)
    needed = dict.fromkeys([*own, "row", "status", *(where.columns if where else ())])
    extra = [name for name in needed if name not in run_rows.OWN and name not in inputs]
    left = look.most or None
    for table in run_rows.tables(result, [name for name in needed if name in run_rows.OWN], [*inputs, *extra]):
        if look.statuses:
            table = table.filter(pc.is_in(table["status"], pa.array(look.statuses, pa.string())))
        if look.rows:
            table = table.filter(pc.is_in(table["row"], pa.array(look.rows, pa.int64())))
        if where is not None:
            try:
                table = table.filter(where.expression)
            except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise JobError(f"--where {look.where}: {str(error).splitlines()[0]}") from error
        if left is not None:
            table = table.slice(0, left)
            left -= table.num_rows
        shown = table.select([*inputs, *own, *(name for name in ("row", "status") if name not in own)])
        yield from shown.to_pylist()
        if left == 0:
            return


def _columns(result: Result, look: Look) -> tuple[list[str], list[str]]:
    """Which of the input's columns and of ours."""
    if not look.columns:
        return result.inputs, [
            name for name in run_rows.OWN if name != "raw" and result.prefix + name in result.schema.names
        ]
    inputs = [name for name in look.columns if name in result.inputs]
    own = [name for name in look.columns if name in run_rows.OWN and name not in inputs]
    if unknown := set(look.columns) - {*inputs, *own}:
        raise JobError(f"--columns {min(unknown)}: expected some of {', '.join([*result.inputs, *run_rows.OWN])}")
    return inputs, own


def _as_read(result: Result, field: "pa.Field[Any]") -> "pa.Field[Any]":
    """A column under the name and in the type in which it is read."""
    own = field.name.removeprefix(result.prefix)
    if field.name in result.inputs or own not in run_rows.OWN:
        return field
    return field.with_name(own) if own == "parsed" else OWN_COLUMNS.field(own)


def as_json(row: dict[str, Any], chosen: Sequence[str]) -> str:
    """A row as one line of JSON: money as text, bytes as hexadecimal digits or, of `raw`, as text."""
    shown = {name: row[name] for name in chosen} if chosen else row
    return msgspec.json.encode({name: _in_json(value, name) for name, value in shown.items()}).decode()


def _in_json(value: Any, name: str = "") -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace") if name == "raw" else value.hex()
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, dict):
        return {str(key): _in_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_in_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | datetime | None) else str(value)


def lines(row: dict[str, Any], inputs: Sequence[str], chosen: Sequence[str]) -> Iterator[str]:
    """A row for people: headline, question, answer. Further lines of a text are marked: none reads as ours."""
    yield " · ".join(_headline(row))
    shown = chosen or [*inputs, "content", "refusal", "function_call", "tool_calls", "error"]
    width = max((len(name) for name in shown), default=0)
    for name in shown:
        if (value := row.get(name)) is None and not chosen:
            continue
        first, *more = _text(value, name).split("\n")
        yield f"  {name.ljust(width)}  {first}"
        yield from (f"  {' ' * width}| {line}" for line in more)
    yield ""


def _headline(row: dict[str, Any]) -> Iterator[str]:
    yield f"row {row['row']:,}" if "row" in row else "row"
    if "status" in row:
        yield str(row["status"])
    if "cost_usd" in row:
        yield "cost unknown" if row["cost_usd"] is None else f"${row['cost_usd']:,.6f}"
    if row.get("latency_s") is not None:
        yield f"{row['latency_s']:.2f} s"
    if (attempts := row.get("attempts")) is not None:
        yield plural(attempts, "attempt")
    if row.get("requested_model"):
        yield str(row["requested_model"])


def _text(value: Any, name: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict) and value.keys() == set(RowError.__struct_fields__):
        error = RowError(**value)
        return error.text if error.message is None else f"{error.kind}: {error.text}"
    text = value if isinstance(value, str) else msgspec.json.encode(_in_json(value, name)).decode().strip('"')
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters; --json has all)"
