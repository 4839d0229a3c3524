"""Rows of the output as values of a program: what `async for` over a Runner hands out. PURE."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pyarrow as pa

from batchrun.money import usd_or_none
from batchrun.records import Choice, CompletionRecord, FunctionCall, RowError, SetAside, Status
from batchrun.tables.arrow_types import Column, array_of
from batchrun.tables.rows import OWN_COLUMNS, Completion, own_values, with_problems

_EPOCH = datetime.fromtimestamp(0, UTC)


def of_rows(rows: pa.RecordBatch) -> Iterator[Completion]:
    """The completions that rows of the output are: its own columns are the last ones, with any prefix."""
    inputs = len(rows.schema) - len(OWN_COLUMNS)
    own = zip(OWN_COLUMNS.names, rows.columns[inputs:], strict=True)
    return _made({name: column.to_pylist() for name, column in own}, rows.select(range(inputs)).to_pylist())


def settled(
    records: Sequence[CompletionRecord], inputs: Sequence[dict[str, Any]], parsed: Column, *, keep_raw: bool
) -> Iterator[Completion]:
    """The records as completions, equal to what `of_rows` makes of them in the output. `inputs` are the rows' columns
    that the output has.
    """
    # not by way of 40 Arrow columns: a reader gets only a few rows at a time
    values = own_values(records, keep_raw=keep_raw)
    for name in ("created", "finished_at"):
        values[name] = [None if us is None else _EPOCH + timedelta(microseconds=us) for us in values[name]]
    for name in ("cost_usd", "reported_cost_usd", "answer_cost_usd"):
        values[name] = [usd_or_none(pico_usd) for pico_usd in values[name]]
    if parsed.kind != "json":
        array, problems = array_of(parsed, values["parsed"])
        values["parsed"] = array.to_pylist()
        values["error"] = with_problems(values["error"], problems)
    return _made(values, inputs)


def _made(columns: Mapping[str, Sequence[Any]], inputs: Sequence[dict[str, Any]]) -> Iterator[Completion]:
    decode = msgspec.json.decode
    converted: dict[str, Iterable[Any]] = {
        "status": map(Status, columns["status"]),
        # decoded again, because the column may hold less than the answer, such as no unknown fields
        "parsed": [
            None if parsed is None else decode(content)
            for parsed, content in zip(columns["parsed"], columns["content"], strict=True)
        ],
        "function_call": [None if call is None else FunctionCall(**call) for call in columns["function_call"]],
        "tool_calls": [None if calls is None else decode(calls) for calls in columns["tool_calls"]],
        "choices": [tuple(Choice(**choice) for choice in found) if found else () for found in columns["choices"]],
        "set_aside": [tuple(SetAside(**answer) for answer in found) if found else () for found in columns["set_aside"]],
        "error": [None if error is None else RowError(**error) for error in columns["error"]],
    }
    return map(Completion, *(converted.get(name, columns[name]) for name in OWN_COLUMNS.names), inputs)
