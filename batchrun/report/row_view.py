"""Rows of a result for people: the question beside the answer or the error. PURE, except that it reads rows."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa

from batchrun import compute as pc
from batchrun.errors import InputError, JobError, quoted
from batchrun.records import RowError
from batchrun.report import run_rows
from batchrun.report.row_filter import RowFilter
from batchrun.report.run_rows import Result
from batchrun.report.wording import plural
from batchrun.store.rundir import RunDirectory
from batchrun.tables.rows import OWN_COLUMNS

MOST_SHOWN = 2_000
"""Characters shown of one value; --json has all of it."""


class Selection(msgspec.Struct, frozen=True):
    """Which rows to show: at most `most` (0: all) that match every condition, with their `columns` (none: all)."""

    statuses: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    where: str | None = None
    most: int = 10
    columns: tuple[str, ...] = ()


def result_at(place: RunDirectory) -> Result:
    """The result in the directory, or the file itself.

    Raises:
        InputError: there is none yet.
    """
    given = place.path
    if (found := run_rows.result_of(given)) is not None:
        return found
    if place.checkpoint.exists():
        raise InputError(f"{given}: no result yet; batchrun export {quoted(given)} writes the rows so far")
    raise InputError(f"{given}: no rows here; name a run directory or a completions file")


def row_numbers(text: str) -> tuple[int, ...]:
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


def rows(result: Result, selection: Selection) -> Iterator[dict[str, Any]]:
    """The selected rows in order, with the chosen columns and those of the headline. Reads no further than needed."""
    inputs, own = _columns(result, selection)
    fields = []  # with the names and types in which `tables` reads them
    for field in result.schema:
        name = field.name.removeprefix(result.prefix)
        if field.name in result.inputs or name not in run_rows.OWN:
            fields.append(field)
        else:
            fields.append(field.with_name(name) if name == "parsed" else OWN_COLUMNS.field(name))
    schema = pa.schema(fields)
    where = None if selection.where is None else RowFilter(selection.where, schema)
    needed = dict.fromkeys([*own, "row", "status", *(where.columns if where else ())])
    extra = [name for name in needed if name not in run_rows.OWN and name not in inputs]
    left = selection.most or None
    for table in run_rows.tables(result, [name for name in needed if name in run_rows.OWN], [*inputs, *extra]):
        if selection.statuses:
            table = table.filter(pc.is_in(table["status"], pa.array(selection.statuses, pa.string())))
        if selection.rows:
            table = table.filter(pc.is_in(table["row"], pa.array(selection.rows, pa.int64())))
        if where is not None:
            try:
                table = table.filter(where.expression)
            except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise JobError(f"--where {selection.where}: {str(error).splitlines()[0]}") from error
        if left is not None:
            table = table.slice(0, left)
            left -= table.num_rows
        shown = table.select([*inputs, *own, *(name for name in ("row", "status") if name not in own)])
        yield from shown.to_pylist()
        if left == 0:
            return


def _columns(result: Result, selection: Selection) -> tuple[list[str], list[str]]:
    """The columns to show: of the input, and ours."""
    if not selection.columns:
        return result.inputs, [
            name for name in run_rows.OWN if name != "raw" and result.prefix + name in result.schema.names
        ]
    inputs = [name for name in selection.columns if name in result.inputs]
    own = [name for name in selection.columns if name in run_rows.OWN and name not in inputs]
    if unknown := set(selection.columns) - {*inputs, *own}:
        raise JobError(f"--columns {min(unknown)}: expected some of {', '.join([*result.inputs, *run_rows.OWN])}")
    return inputs, own


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
    """A row for people: headline, question, answer. A text's further lines start with `|`, unlike ours."""
    headline = [f"row {row['row']:,}" if "row" in row else "row"]
    if "status" in row:
        headline.append(str(row["status"]))
    if "cost_usd" in row:
        headline.append("cost unknown" if row["cost_usd"] is None else f"${row['cost_usd']:,.6f}")
    if row.get("latency_s") is not None:
        headline.append(f"{row['latency_s']:.2f} s")
    if (attempts := row.get("attempts")) is not None:
        headline.append(plural(attempts, "attempt"))
    if row.get("requested_model"):
        headline.append(str(row["requested_model"]))
    yield " · ".join(headline)
    shown = chosen or [*inputs, "content", "refusal", "function_call", "tool_calls", "error"]
    width = max((len(name) for name in shown), default=0)
    for name in shown:
        if (value := row.get(name)) is None and not chosen:
            continue
        first, *more = _text(value, name).split("\n")
        yield f"  {name.ljust(width)}  {first}"
        yield from (f"  {' ' * width}| {line}" for line in more)
    yield ""


def _text(value: Any, name: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict) and value.keys() == set(RowError.__struct_fields__):
        error = RowError(**value)
        return error.text if error.message is None else f"{error.kind}: {error.text}"
    text = value if isinstance(value, str) else msgspec.json.encode(_in_json(value, name)).decode().strip('"')
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters; --json has all)"
