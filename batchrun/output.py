"""Completions → Parquet: parts of sealed chunks, the final file, the usage table. The schemas are constants.

Parts are contiguous and ordered, so the final file is their concatenation: no sort, ever. Every file gets a temp name,
page checksums, fsync, its footer and row count read back, a digest, and only then its name.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, cast

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun import answer as answers
from batchrun import packed
from batchrun.durable import digest, fsync, replace, told
from batchrun.errors import CheckpointError, JobError
from batchrun.job import Output
from batchrun.records import Answer, Completion, RowError, Status, TotalsLine
from batchrun.schema_columns import JSON, Column, array_of

BATCH_ROWS = 1000
ROW_GROUP_BYTES = 4_000_000  # what one reader must hold, and what we do, about twice, while writing
ROW_GROUP_ROWS = 65_536

UTC_MICROSECONDS = pa.timestamp("us", tz="UTC")
USD = pa.decimal128(20, 12)

_CHOICE = pa.struct([("index", pa.int32()), ("content", pa.large_string()), ("finish_reason", pa.string())])

_OWN: list[tuple[str, pa.DataType]] = [
    ("row", pa.int64()),
    ("status", pa.string()),
    ("content", pa.large_string()),
    ("parsed", pa.large_string()),
    ("function_call", pa.struct([("name", pa.string()), ("arguments", pa.large_string())])),
    ("tool_calls", pa.large_string()),
    ("finish_reason", pa.string()),
    ("choices", pa.list_(pa.field("element", _CHOICE))),
    ("model", pa.string()),
    ("completion_id", pa.string()),
    ("request_id", pa.string()),
    ("created", UTC_MICROSECONDS),
    ("finished_at", UTC_MICROSECONDS),
    ("prompt_tokens", pa.int64()),
    ("cached_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("reasoning_tokens", pa.int64()),
    ("total_tokens", pa.int64()),
    ("cost_usd", USD),
    ("attempts", pa.int32()),
    ("latency_s", pa.float64()),
    ("time_to_first_token_s", pa.float64()),
    (
        "error",
        pa.struct(
            [("kind", pa.string()), ("http_status", pa.int32()), ("code", pa.string()), ("message", pa.string())]
        ),
    ),
    ("request_key", pa.binary(16)),
    ("reused", pa.bool_()),
    ("variant", pa.int32()),
    ("raw", pa.large_binary()),
]
OWN_COLUMNS = pa.schema(_OWN)
"""Our columns, after the input's; docs/output.md explains each. Fixed whatever the data, but for `parsed`: it is JSON
text here, and gets the type that the job's schema gives it where rows are written into a file (`joined`).
"""

NOT_IN_PARSED = "not_in_parsed"
"""The `error.kind` of a good answer of which `parsed` can't hold everything: the rest is in `content` only."""

_USAGE: list[tuple[str, pa.DataType]] = [
    ("invocation", pa.int32()),
    ("model", pa.string()),
    ("status", pa.string()),
    ("rows", pa.int64()),
    ("attempts", pa.int64()),
    ("prompt_tokens", pa.int64()),
    ("cached_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("reasoning_tokens", pa.int64()),
    ("total_tokens", pa.int64()),
    ("cost_usd", USD),
    ("unpriced", pa.int64()),
    ("without_usage", pa.int64()),
    ("offline_prompt_tokens", pa.int64()),
    ("offline_completion_tokens", pa.int64()),
]
USAGE_COLUMNS = pa.schema(_USAGE)
"""The columns of usage.parquet: the fields of `TotalsLine`."""

Compression = Literal["zstd", "snappy", "gzip", "none"]

FOOTER_KEY = "batchrun"
"""The footer's key-value entry that holds the run's totals as JSON: a file that was moved still knows its bill."""


def output_schema(input_schema: pa.Schema, output: Output, parsed: Column = JSON) -> pa.Schema:
    """The input's chosen columns as they are, then ours, with `parsed` in its type.

    Raises:
        JobError: a chosen column is not there or chosen twice, or bears a name of ours.
    """
    chosen = input_schema.names if output.columns == "all" else list(output.columns)
    if missing := [name for name in chosen if name not in input_schema.names]:
        raise JobError(f"output.columns: {missing[0]!r} is no input column ({', '.join(input_schema.names)})")
    if twice := [name for place, name in enumerate(chosen) if name in chosen[:place]]:
        raise JobError(f"output.columns: {twice[0]!r} is named twice")
    own = own_schema(output.prefix, parsed)
    if clash := [name for name in chosen if name in own.names]:
        raise JobError(
            f"input column {clash[0]!r} bears a name of the output's own; set output.prefix, for example "
            '"batchrun_", or leave it out by output.columns'
        )
    fields = [input_schema.field(name) for name in chosen]
    return pa.schema([*fields, *own])


def own_schema(prefix: str, parsed: Column = JSON) -> pa.Schema:
    """Our columns under the names they get in the file."""
    typed = OWN_COLUMNS.set(OWN_COLUMNS.get_field_index("parsed"), pa.field("parsed", parsed.type()))
    return pa.schema([field.with_name(prefix + field.name) for field in typed])


def own_table(completions: Sequence[Completion], *, keep_raw: bool) -> pa.Table:
    """The completions as our columns, `OWN_COLUMNS`. Answers are read from `raw` here."""
    read = [answers.read(completion.raw) if completion.raw else Answer() for completion in completions]
    pairs = list(zip(completions, read, strict=True))
    usages = [answer.usage for answer in read]

    def tokens(name: str) -> list[int | None]:
        return [None if usage is None else getattr(usage, name) for usage in usages]

    values: dict[str, list[object]] = {
        "row": [c.row for c in completions],
        "status": [str(c.status) for c in completions],
        "content": [a.content for a in read],
        "parsed": [a.content if c.in_json else None for c, a in pairs],
        "function_call": [None if a.function_call is None else msgspec.to_builtins(a.function_call) for a in read],
        "tool_calls": [a.tool_calls for a in read],
        "finish_reason": [a.finish_reason for a in read],
        "choices": [msgspec.to_builtins(a.choices) if a.choices else None for a in read],
        "model": [a.model or c.model for c, a in pairs],
        "completion_id": [a.completion_id for a in read],
        "request_id": [c.request_id for c in completions],
        "created": [None if a.created is None else a.created * 1_000_000 for a in read],
        "finished_at": [int(c.finished_at * 1_000_000) for c in completions],
        **{name: list(tokens(name)) for name in OWN_COLUMNS.names if name.endswith("_tokens")},
        "cost_usd": [c.cost_usd for c in completions],
        "attempts": [c.attempts for c in completions],
        "latency_s": [c.latency_s for c in completions],
        "time_to_first_token_s": [c.time_to_first_token_s for c in completions],
        "error": [None if c.error is None else msgspec.to_builtins(c.error) for c in completions],
        "request_key": [c.key for c in completions],
        "reused": [False] * len(completions),
        "variant": [c.variant for c in completions],
        "raw": [packed.plain(c.raw) if keep_raw or c.status is not Status.OK or a.flagged else None for c, a in pairs],
    }
    return pa.Table.from_arrays([pa.array(values[field.name], field.type) for field in OWN_COLUMNS], schema=OWN_COLUMNS)


def joined(table: pa.Table, own: pa.Table, schema: pa.Schema, parsed: Column = JSON) -> pa.RecordBatch:
    """The rows of `table` with our columns beside them, in the schema of the output."""
    chosen = [table.column(name) for name in schema.names[: len(schema) - own.num_columns]]
    ours = own.columns if parsed.kind == "json" else _typed(own, parsed).columns
    arrays = [column.combine_chunks() for column in (*chosen, *ours)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _typed(own: pa.Table, parsed: Column) -> pa.Table:
    """Our columns with `parsed` in its type; rows of which it can't hold everything say so in `error`."""
    texts = cast(list[str | None], own.column("parsed").to_pylist())
    array, problems = array_of(parsed, texts)
    errors = own.column("error").to_pylist()
    for row, message in problems.items():
        errors[row] = errors[row] or msgspec.to_builtins(RowError(NOT_IN_PARSED, None, None, message))
    place = own.schema.get_field_index("parsed")
    typed = own.set_column(place, pa.field("parsed", parsed.type()), array)
    if not problems:
        return typed
    error = own.schema.field("error")
    return typed.set_column(own.schema.get_field_index("error"), error, pa.array(errors, error.type))


def as_own(ours: pa.Table) -> pa.Table:
    """Our columns as a file has them, as `OWN_COLUMNS` has them: what was parsed is the text that `content` is."""
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


class ParquetFile:
    """A Parquet file that is being written batch by batch. Leave the block to have it complete."""

    def __init__(self, path: Path, schema: pa.Schema, compression: Compression) -> None:
        self._schema = schema
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = self._pending_rows = 0
        self.rows = 0
        path.touch(mode=0o600)
        self._writer = pq.ParquetWriter(path, schema, compression=compression, write_page_checksum=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """The batch is in the file, or in the row group that is being gathered."""
        for piece in _pieces(batch):
            size = _size_of(piece)
            full = self._pending_bytes + size > ROW_GROUP_BYTES or self._pending_rows + piece.num_rows > ROW_GROUP_ROWS
            if full and self._pending:
                self._flush()
            self._pending.append(piece)
            self._pending_bytes += size
            self._pending_rows += piece.num_rows

    def write_metadata(self, metadata: Mapping[str, str]) -> None:
        """The footer will hold these."""
        self._writer.add_key_value_metadata(dict(metadata))

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending, self._schema), row_group_size=ROW_GROUP_ROWS)
        self.rows += self._pending_rows
        self._pending, self._pending_bytes, self._pending_rows = [], 0, 0


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in halves of halves, until each fits into a row group or is a single row."""
    if batch.num_rows < 2 or _size_of(batch) <= ROW_GROUP_BYTES:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _pieces(batch.slice(0, half))
    yield from _pieces(batch.slice(half))


def _size_of(batch: pa.RecordBatch) -> int:
    """Bytes of the rows themselves: a dictionary does not get smaller with its rows."""
    return sum((c.indices if isinstance(c, pa.DictionaryArray) else c).nbytes for c in batch.columns)


def write_part(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], output: Output, rows: int) -> str:
    """The part is on disk, whole and read back; returns its digest."""

    def write(temporary: Path) -> None:
        with ParquetFile(temporary, schema, output.compression) as file:
            for batch in batches:
                file.write(batch)
        _read_back(temporary, rows)

    replace(path, write)
    return digest(path)


def assemble(
    parts: Sequence[tuple[Path, str, int]],
    to: Path,
    schema: pa.Schema,
    compression: Compression,
    metadata: Mapping[str, str],
) -> str:
    """The final file is on disk: the parts (path, digest, rows) one after another; returns its digest.

    Raises:
        CheckpointError: a part is not what was sealed.
    """

    def write(temporary: Path) -> None:
        with ParquetFile(temporary, schema, compression) as file:
            for path, expected, rows in parts:
                for batch in _part_batches(path, expected, rows):
                    file.write(batch)
            file.write_metadata(metadata)
        _read_back(temporary, sum(rows for _, _, rows in parts))

    replace(to, write)
    return digest(to)


def move_parts(parts: Sequence[tuple[Path, str, int]], folder: Path) -> None:
    """The parts are the result: `folder/part-000000.parquet` and on. Safe to repeat after a crash in the middle."""
    with told(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        for number, (path, expected, _) in enumerate(parts):
            target = part_in(folder, number)
            found = path if path.exists() else target
            require_digest(found, expected)
            found.rename(target)
        fsync(folder)


def part_in(folder: Path, number: int) -> Path:
    """Where a part is when the parts themselves are the result."""
    return folder / f"part-{number:06d}.parquet"


def copy_part(source: Path, to: Path, expected_digest: str) -> None:
    """`to` holds the part, byte for byte."""
    require_digest(source, expected_digest)

    def write(temporary: Path) -> None:
        temporary.touch(mode=0o600)
        shutil.copyfile(source, temporary)

    replace(to, write)


def schema_of(path: Path) -> pa.Schema:
    """The columns of a completions file."""
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: no readable Parquet file: {error}") from error


def cut(path: Path, expected_digest: str, rows: Sequence[int]) -> Iterator[Iterator[pa.RecordBatch]]:
    """The file's rows in consecutive pieces of so many rows; take each piece whole before the next.

    Raises:
        CheckpointError: the file is not the one that was written.
    """
    batches = _part_batches(path, expected_digest, sum(rows))
    left: list[pa.RecordBatch] = []

    def piece(wanted: int) -> Iterator[pa.RecordBatch]:
        while wanted:
            batch = left.pop() if left else next(batches)
            if batch.num_rows > wanted:
                left.append(batch.slice(wanted))
                batch = batch.slice(0, wanted)
            wanted -= batch.num_rows
            yield batch

    return (piece(wanted) for wanted in rows)


def write_usage(path: Path, lines: Iterable[TotalsLine]) -> None:
    """usage.parquet: one line for each invocation, model and status."""
    rows = [msgspec.structs.asdict(line) for line in lines]

    def write(temporary: Path) -> None:
        with ParquetFile(temporary, USAGE_COLUMNS, "zstd") as file:
            file.write(pa.RecordBatch.from_pylist(rows, USAGE_COLUMNS))

    replace(path, write)


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a part or result in order; pages are held against their checksums."""
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        yield from _batches(file)


def read_footer(path: Path) -> dict[str, object] | None:
    """The totals in the footer of a completions file; None where it holds none of ours."""
    try:
        entry = (pq.read_metadata(path).metadata or {}).get(FOOTER_KEY.encode())
        return None if entry is None else msgspec.json.decode(entry, type=dict[str, object])
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: no readable Parquet file: {error}") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: its totals can't be read: {error}") from error


def _part_batches(path: Path, expected: str, rows: int) -> Iterator[pa.RecordBatch]:
    require_digest(path, expected)
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        if file.metadata.num_rows != rows:
            raise CheckpointError(f"{path}: holds {file.metadata.num_rows:,} rows, {rows:,} were sealed")
        yield from _batches(file)


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The file's rows in order. One thread decodes: with two, 10 MB more are held, and it takes no less time."""
    for group in range(file.num_row_groups):  # one by one: nested dictionaries can't be read across two
        yield from file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], use_threads=False)


def require_digest(path: Path, expected: str) -> None:
    """Nothing, if the part is what was sealed.

    Raises:
        CheckpointError: it is not, or can't be read.
    """
    try:
        found = digest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: a sealed part can't be read: {error.strerror}") from error
    if found != expected:
        raise CheckpointError(f"{path}: damaged: its digest is not the one it was sealed with")


def _read_back(path: Path, rows: int) -> None:
    found = pq.read_metadata(path).num_rows
    if found != rows:
        raise CheckpointError(f"{path}: {found:,} rows written where {rows:,} were due")
