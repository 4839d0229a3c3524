"""Rows of the output as values of a program: what `async for` over a Runner hands out. PURE."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
import pyarrow as pa

from batchrun.records import Choice, FunctionCall, RowError, SetAside, Status
from batchrun.records import Completion as Record
from batchrun.tables.arrow_types import Column, array_of
from batchrun.tables.rows import OWN_COLUMNS, USD, own_values, with_problems

T = TypeVar("T")


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The final record of a row: an answer, or why there is none. The fields are the output's columns, except `input`.

    `input` holds the input's columns as the output has them. `parsed` is the answer as Python values where
    the request wanted JSON and got it; so are `tool_calls`. `choices` has the answers if there are several, `set_aside`
    those that were replaced. A field is None where the server did not say; `cost_usd`, where the price is unknown.
    """

    row: int
    status: Status
    content: str | None
    refusal: str | None
    parsed: Any
    function_call: FunctionCall | None
    tool_calls: Any
    finish_reason: str | None
    choices: tuple[Choice, ...]
    model: str | None
    requested_model: str
    service_tier: str | None
    completion_id: str | None
    request_id: str | None
    created: datetime | None
    finished_at: datetime | None
    prompt_tokens: int | None
    cached_tokens: int | None
    cache_write_tokens: int | None
    completion_tokens: int | None
    reasoning_tokens: int | None
    total_tokens: int | None
    cost_usd: Decimal | None
    reported_cost_usd: Decimal | None
    answer_cost_usd: Decimal | None
    attempts: int
    set_aside: tuple[SetAside, ...]
    latency_s: float | None
    time_to_first_token_s: float | None
    error: RowError | None
    request_key: bytes
    reused: bool
    reused_from: str | None
    reused_cost_usd: Decimal | None
    duplicate_of: int | None
    variant: int
    invocation: int
    raw: bytes | None
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


OWN = tuple(name for name in Completion.__struct_fields__ if name != "input")

_EPOCH = datetime.fromtimestamp(0, UTC)
_USD = Decimal(1).scaleb(-USD.scale)


def read(rows: pa.RecordBatch) -> Iterator[Completion]:
    """The completions that rows of the output are: its own columns are the last ones, with any prefix."""
    inputs = len(rows.schema) - len(OWN_COLUMNS)
    own = zip(OWN_COLUMNS.names, rows.columns[inputs:], strict=True)
    return _made({name: column.to_pylist() for name, column in own}, rows.select(range(inputs)).to_pylist())


def settled(
    records: Sequence[Record], inputs: Sequence[dict[str, Any]], parsed: Column, *, keep_raw: bool
) -> Iterator[Completion]:
    """The completions that these records are, equal to what `read` gives once they are in the output. `inputs` are the
    rows' columns that the output has.

    Without 40 Arrow columns between, since a reader gets a few rows at a time.
    """
    values = own_values(records, keep_raw=keep_raw)
    for name in ("created", "finished_at"):
        values[name] = [None if us is None else _EPOCH + timedelta(microseconds=us) for us in values[name]]
    for name in ("cost_usd", "reported_cost_usd", "answer_cost_usd"):
        values[name] = [None if usd is None else usd.quantize(_USD) for usd in values[name]]
    if parsed.kind != "json":
        array, problems = array_of(parsed, values["parsed"])
        values["parsed"] = array.to_pylist()
        values["error"] = with_problems(values["error"], problems)
    return _made(values, inputs)


def _made(columns: Mapping[str, Sequence[Any]], inputs: Sequence[dict[str, Any]]) -> Iterator[Completion]:
    for *own, row in zip(*(columns[name] for name in OWN), inputs, strict=True):
        values = dict(zip(OWN, own, strict=True))
        values["status"] = Status(values["status"])
        if values["parsed"] is not None:  # the column may hold less than the answer, such as no unknown fields
            values["parsed"] = msgspec.json.decode(values["content"])
        if values["error"] is not None:
            values["error"] = RowError(**values["error"])
        if values["function_call"] is not None:
            values["function_call"] = FunctionCall(**values["function_call"])
        if values["tool_calls"] is not None:
            values["tool_calls"] = msgspec.json.decode(values["tool_calls"])
        values["set_aside"] = tuple(SetAside(**answer) for answer in values["set_aside"] or ())
        values["choices"] = tuple(Choice(**choice) for choice in values["choices"] or ())
        yield Completion(**values, input=row)
