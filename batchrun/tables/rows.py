"""Settled rows as an Arrow table: the input's columns, then ours. The schemas are constants. PURE."""

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from operator import attrgetter
from typing import Annotated, Any, TypeVar, cast

import msgspec
import pyarrow as pa

from batchrun import compute as pc
from batchrun.errors import JobError
from batchrun.job.settings import Output
from batchrun.records import Answer, Choice, CompletionRecord, FunctionCall, RowError, SetAside, Status, Usage
from batchrun.response import answer as answers
from batchrun.response import packed
from batchrun.run_summary import TotalsLine
from batchrun.tables.arrow_types import JSON, Column, array_of

T = TypeVar("T")

UTC_MICROSECONDS = pa.timestamp("us", tz="UTC")
USD = pa.decimal128(20, 12)

_CHOICE = pa.struct([("index", pa.int32()), ("content", pa.large_string()), ("finish_reason", pa.string())])

_SET_ASIDE = pa.struct(
    [("attempt", pa.int32()), ("kind", pa.string()), ("message", pa.string()), ("content", pa.large_string())]
)

Text = Annotated[str | None, pa.string()]
LongText = Annotated[str | None, pa.large_string()]  # with 64-bit offsets: a chunk's answers may exceed 2 GB
Tokens = Annotated[int | None, pa.int64()]
Usd = Annotated[Decimal | None, USD]
Time = Annotated[datetime | None, UTC_MICROSECONDS]

_ERROR = [("kind", pa.string()), ("http_status", pa.int32()), ("code", pa.string()), ("message", pa.string())]


class Completion(msgspec.Struct, frozen=True):
    """The final record of a row: an answer, or why there is none. The fields are the output's columns, each with its
    Arrow type, except `input`.

    `input` holds the input's columns as the output has them. `parsed` is the answer as Python values where
    the request wanted JSON and got it; so are `tool_calls`. `choices` has the answers if there are several, `set_aside`
    those that were replaced. A field is None where the server did not say; `cost_usd`, where the price is unknown.
    """

    row: Annotated[int, pa.int64()]
    status: Annotated[Status, pa.string()]
    content: LongText
    refusal: LongText
    parsed: Annotated[Any, pa.large_string()]
    function_call: Annotated[FunctionCall | None, pa.struct([("name", pa.string()), ("arguments", pa.large_string())])]
    tool_calls: Annotated[Any, pa.large_string()]
    finish_reason: Text
    choices: Annotated[tuple[Choice, ...], pa.list_(pa.field("element", _CHOICE))]
    model: Text
    requested_model: Annotated[str, pa.string()]
    service_tier: Text
    completion_id: Text
    request_id: Text
    created: Time
    finished_at: Time
    prompt_tokens: Tokens
    cached_tokens: Tokens
    cache_write_tokens: Tokens
    completion_tokens: Tokens
    reasoning_tokens: Tokens
    total_tokens: Tokens
    cost_usd: Usd
    reported_cost_usd: Usd
    answer_cost_usd: Usd
    attempts: Annotated[int, pa.int32()]
    set_aside: Annotated[tuple[SetAside, ...], pa.list_(pa.field("element", _SET_ASIDE))]
    latency_s: Annotated[float | None, pa.float64()]
    time_to_first_token_s: Annotated[float | None, pa.float64()]
    error: Annotated[RowError | None, pa.struct(_ERROR)]
    request_key: Annotated[bytes, pa.binary(16)]
    reused: Annotated[bool, pa.bool_()]
    reused_from: Text
    reused_cost_usd: Usd
    duplicate_of: Annotated[int | None, pa.int64()]
    variant: Annotated[int, pa.int32()]
    invocation: Annotated[int, pa.int32()]
    raw: Annotated[bytes | None, pa.large_binary()]
    input: dict[str, Any]

    def parse(self, type: type[T]) -> T:
        """The answer as a `type`: a msgspec Struct, dataclass or TypedDict, or a Pydantic model.

        Raises:
            ValueError: there is no answer, or it is not of that type.
        """
        content = self.content or ""
        if (validate := getattr(type, "model_validate_json", None)) is not None:
            model: T = validate(content)
            return model
        return msgspec.json.decode(content, type=type)


OWN_COLUMNS = pa.schema(
    [(name, hint.__metadata__[0]) for name, hint in Completion.__annotations__.items() if name != "input"]
)
"""Our columns, after the input's; docs/output.md explains each. The same for all data, except `parsed`: it is
JSON text here, and gets the type that the job's schema gives it when rows are written into a file (`joined`).
"""

TOKENS = tuple(name for name in OWN_COLUMNS.names if name.endswith("_tokens"))

_NO_USAGE = msgspec.structs.replace(Usage(0, 0, 0), **dict.fromkeys(Usage.__struct_fields__))

NOT_IN_PARSED = "not_in_parsed"
"""The `error.kind` of a good answer of which `parsed` can't hold everything: the rest is in `content` only."""

_USAGE_TYPES: Mapping[Any, pa.DataType] = {int: pa.int64(), int | None: pa.int64(), str: pa.string(), Decimal: USD}
_OTHER_TYPES: Mapping[str, pa.DataType] = {"invocation": pa.int32(), "day": pa.date32()}
USAGE_COLUMNS = pa.schema(
    [(name, _OTHER_TYPES.get(name, _USAGE_TYPES[hint])) for name, hint in TotalsLine.__annotations__.items()]
)
"""The columns of usage.parquet: the fields of `TotalsLine`, with its day as a date."""


def prefix_in(names: Sequence[str]) -> str | None:
    """The prefix of our columns in a file, by that of its `request_key`; None: the file has none, so it is not ours."""
    found = [name for name in names if name.endswith("request_key")]
    return found[-1].removesuffix("request_key") if found else None


def output_schema(input_schema: pa.Schema, output: Output, parsed: Column = JSON) -> pa.Schema:
    """The input's chosen columns as they are, then ours, with `parsed` in its type.

    Raises:
        JobError: a chosen column is not there or chosen twice, or has a name of ours.
    """
    chosen = input_schema.names if output.columns == "all" else list(output.columns)
    if missing := [name for name in chosen if name not in input_schema.names]:
        raise JobError(f"output.columns: {missing[0]!r} is not an input column ({', '.join(input_schema.names)})")
    if twice := [name for place, name in enumerate(chosen) if name in chosen[:place]]:
        raise JobError(f"output.columns: {twice[0]!r} is named twice")
    own = own_schema(output.prefix, parsed)
    if clash := [name for name in chosen if name in own.names]:
        raise JobError(
            f"input column {clash[0]!r} has the name of an output column; set output.prefix, for example "
            '"batchrun_", or leave it out by output.columns'
        )
    fields = [input_schema.field(name) for name in chosen]
    return pa.schema([*fields, *own])


def own_schema(prefix: str, parsed: Column = JSON) -> pa.Schema:
    """Our columns under the names they get in the file."""
    typed = OWN_COLUMNS.set(OWN_COLUMNS.get_field_index("parsed"), pa.field("parsed", parsed.type()))
    return pa.schema([field.with_name(prefix + field.name) for field in typed])


def own_table(
    completions: Sequence[CompletionRecord], *, keep_raw: bool, read: Sequence[Answer] | None = None
) -> pa.Table:
    """The completions as our columns, `OWN_COLUMNS`. Answers are read from `raw`, unless they were `read` before."""
    values = own_values(completions, keep_raw=keep_raw, read=read)
    made: dict[str, Any] = {}
    for field in OWN_COLUMNS:
        of_rows = values[field.name]
        if of_rows and of_rows[0] is None and of_rows.count(None) == len(of_rows):
            # nearly always a third of the columns, and Arrow takes 200 instructions and more for each null of a list
            made[field.name] = pa.nulls(len(of_rows), field.type)
        elif field.type == USD:
            made[field.name] = usd_array(of_rows)
        else:
            made[field.name] = pa.array(of_rows, field.type)
    return pa.Table.from_arrays(list(made.values()), schema=OWN_COLUMNS)


def with_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """The table with these values in a column that it has; the column's type stays."""
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def own_columns(values: Mapping[str, Any], rows: int) -> pa.Table:
    """Our columns of so many rows: lists or columns by name; those without a value are null."""
    arrays: list[Any] = []
    for field in OWN_COLUMNS:
        value = values.get(field.name)
        if value is None:
            arrays.append(pa.nulls(rows, field.type))
        else:
            arrays.append(pa.array(value, field.type) if isinstance(value, list) else value)
    return pa.Table.from_arrays(arrays, schema=OWN_COLUMNS)


def own_values(
    completions: Sequence[CompletionRecord], *, keep_raw: bool, read: Sequence[Answer] | None = None
) -> dict[str, list[Any]]:
    """The same as lists of Python values by the columns' names; times are microseconds, money is 10⁻¹² USD."""
    if read is None:
        read = [answers.parse(completion.raw) if completion.raw else Answer() for completion in completions]
    pairs = list(zip(completions, read, strict=True))
    usages = [answer.usage or _NO_USAGE for answer in read]
    return {
        "row": [c.row for c in completions],
        "status": [c.status for c in completions],
        "content": [a.content for a in read],
        "refusal": [a.refusal for a in read],
        "parsed": [a.content if c.in_json else None for c, a in pairs],
        "function_call": [None if a.function_call is None else msgspec.to_builtins(a.function_call) for a in read],
        "tool_calls": [a.tool_calls for a in read],
        "finish_reason": [a.finish_reason for a in read],
        "choices": [msgspec.to_builtins(a.choices) if a.choices else None for a in read],
        "model": [a.model or c.model for c, a in pairs],
        "requested_model": [c.model for c in completions],
        "service_tier": [c.service_tier or None for c in completions],
        "completion_id": [a.completion_id for a in read],
        "request_id": [c.request_id for c in completions],
        "created": [None if a.created is None else a.created * 1_000_000 for a in read],
        "finished_at": [int(c.finished_at * 1_000_000) for c in completions],
        **{name: list(map(attrgetter(name), usages)) for name in TOKENS},
        "cost_usd": [c.cost_pico_usd for c in completions],
        "reported_cost_usd": [c.reported_cost_pico_usd for c in completions],
        "answer_cost_usd": [c.answer_cost_pico_usd for c in completions],
        "attempts": [c.attempts for c in completions],
        "set_aside": [msgspec.to_builtins(c.set_aside) if c.set_aside else None for c in completions],
        "latency_s": [c.latency_s for c in completions],
        "time_to_first_token_s": [c.time_to_first_token_s for c in completions],
        "error": [None if c.error is None else msgspec.to_builtins(c.error) for c in completions],
        "request_key": [c.key for c in completions],
        "reused": [False] * len(completions),
        **{name: [None] * len(completions) for name in ("reused_from", "reused_cost_usd", "duplicate_of")},
        "variant": [c.variant for c in completions],
        "invocation": [c.invocation for c in completions],
        "raw": [packed.plain(c.raw) if keep_raw or c.status is not Status.OK or a.flagged else None for c, a in pairs],
    }


def usd_array(pico_usd: Sequence[int | None]) -> Any:
    """Amounts of 10⁻¹² USD as a column of `USD`."""
    nulls = pa.array(pico_usd, pa.int64()).buffers()[0]
    # the 128-bit integers of such a column: Arrow takes 1,500 instructions for each Decimal, and a cast imports
    # pyarrow.compute
    amounts = b"".join([(each or 0).to_bytes(16, sys.byteorder, signed=True) for each in pico_usd])
    return pa.Array.from_buffers(USD, len(pico_usd), [nulls, pa.py_buffer(amounts)])


def joined(table: pa.Table, own: pa.Table, schema: pa.Schema, parsed: Column = JSON) -> pa.RecordBatch:
    """The rows of `table` with our columns beside them, in the schema of the output."""
    chosen = [table.column(name) for name in schema.names[: len(schema) - own.num_columns]]
    ours = own.columns if parsed.kind == "json" else _typed(own, parsed).columns
    arrays = [column.combine_chunks() for column in (*chosen, *ours)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _typed(own: pa.Table, parsed: Column) -> pa.Table:
    """Our columns with `parsed` in its type; a row whose value does not fit has an `error`."""
    texts = cast(list[str | None], own.column("parsed").to_pylist())
    array, problems = array_of(parsed, texts)
    errors = with_problems(own.column("error").to_pylist(), problems)
    place = own.schema.get_field_index("parsed")
    typed = own.set_column(place, pa.field("parsed", parsed.type()), array)
    return with_column(typed, "error", errors) if problems else typed


def with_problems(errors: list[Any], problems: Mapping[int, str]) -> list[Any]:
    """The `error` of each row; where a row has none, what `array_of` says of its place."""
    for row, message in problems.items():
        errors[row] = errors[row] or msgspec.to_builtins(RowError(NOT_IN_PARSED, None, None, message))
    return errors


def as_own(ours: pa.Table) -> pa.Table:
    """Converts our columns from a file's types to `OWN_COLUMNS`: `parsed` is again the text of `content`."""
    named = ours.rename_columns(OWN_COLUMNS.names)
    if named.schema.field("parsed").type == OWN_COLUMNS.field("parsed").type:
        return named.cast(OWN_COLUMNS)
    error = named.column("error")
    kinds = pc.struct_field(error, "kind")
    noted = pc.is_in(kinds, pa.array([NOT_IN_PARSED]))
    was_parsed = pc.or_(pc.is_valid(named.column("parsed")), noted)
    texts = pc.if_else(was_parsed, named.column("content"), pa.scalar(None, pa.large_string()))
    errors = pc.if_else(noted, pa.scalar(None, error.type), error)
    place = named.schema.get_field_index
    return (
        named.set_column(place("parsed"), "parsed", texts).set_column(place("error"), "error", errors).cast(OWN_COLUMNS)
    )
