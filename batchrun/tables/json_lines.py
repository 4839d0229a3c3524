"""Rows → JSON lines, plain or compressed: an object a row with all columns of the Parquet result, in their order.

JSON knows fewer types. Integers and floats are numbers with all their digits; decimals are text, so that no digit is
lost; times are text in ISO 8601; bytes are base64, but `request_key` is hexadecimal and `raw` is text. NaN and infinity
are null. `parsed` is an object where the job's schema types it; else it is JSON text, as in Parquet.
"""

import gzip
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import msgspec
import pyarrow as pa

from batchrun.durable import READ_BYTES, digest, replacing
from batchrun.errors import CheckpointError
from batchrun.tables.rows import OWN_COLUMNS


def packing_of(path: Path) -> str | None:
    """How JSON lines of that name are packed: "", "gz" or "zst"; None: the name means something else."""
    name = path.name.lower()
    packing = next((ending for ending in ("gz", "zst") if name.endswith(f".{ending}")), "")
    return packing if name.removesuffix(f".{packing}").endswith((".jsonl", ".ndjson")) else None


class JsonLinesFile:
    """A file of JSON lines that is being written batch by batch. Leave the block to have it complete."""

    def __init__(self, path: Path, schema: pa.Schema, packing: str) -> None:
        self.rows = 0
        self._schema = pa.schema([field.with_type(_in_json(field.type)) for field in schema])
        # The last columns are ours, with any prefix.
        ours = dict(zip(OWN_COLUMNS.names, schema.names[-len(OWN_COLUMNS) :], strict=True))
        self._key, self._raw = ours["request_key"], ours["raw"]
        self._stack = ExitStack()
        path.touch(mode=0o600)
        plain = self._stack.enter_context(path.open("wb"))
        self._file: Any = plain
        if packing == "gz":
            self._file = self._stack.enter_context(gzip.GzipFile("", "wb", 6, plain, mtime=0))
        elif packing == "zst":
            self._file = self._stack.enter_context(pa.CompressedOutputStream(plain, "zstd"))
        self._encoder = msgspec.json.Encoder()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """The batch's rows are lines of the file."""
        table = pa.Table.from_batches([batch]).cast(self._schema)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        columns[self._key] = [None if key is None else key.hex() for key in columns[self._key]]
        raws = columns[self._raw]
        columns[self._raw] = [None if raw is None else raw.decode("utf-8", "backslashreplace") for raw in raws]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._file.write(self._encoder.encode_lines(rows))
        self.rows += len(rows)


def _in_json(type_: Any) -> pa.DataType:
    """The type to cast to, so that msgspec writes the values as the module's text says."""
    if pa.types.is_timestamp(type_) and type_ == pa.timestamp("us", tz="UTC"):
        return cast(pa.DataType, type_)
    if pa.types.is_decimal(type_) or pa.types.is_timestamp(type_) or pa.types.is_date(type_) or pa.types.is_time(type_):
        return pa.string()
    if pa.types.is_duration(type_):
        return pa.int64()
    if pa.types.is_dictionary(type_):
        return _in_json(type_.value_type)
    if pa.types.is_struct(type_):
        fields = [type_.field(place) for place in range(type_.num_fields)]
        return pa.struct([field.with_type(_in_json(field.type)) for field in fields])
    if pa.types.is_map(type_):
        return pa.map_(_in_json(type_.key_type), _in_json(type_.item_type))
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return pa.large_list(type_.value_field.with_type(_in_json(type_.value_type)))
    return cast(pa.DataType, type_)


def write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], rows: int) -> str:
    """The rows are lines of the file, on disk and read back; returns its digest. The name says how it is packed.

    Raises:
        CheckpointError: there is another number of rows.
    """
    packing = packing_of(path) or ""
    with replacing(path) as temporary:
        with JsonLinesFile(temporary, schema, packing) as file:
            for batch in batches:
                file.write(batch)
        require_rows(temporary, packing, rows)
    return digest(path)


def require_rows(path: Path, packing: str, rows: int) -> None:
    """Returns if the file that was just written has so many lines.

    Raises:
        CheckpointError: it has not.
    """
    found = 0
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        if packing == "gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif packing == "zst":
            file = stack.enter_context(pa.CompressedInputStream(file, "zstd"))
        while block := file.read(READ_BYTES):
            found += block.count(b"\n")
    if found != rows:
        raise CheckpointError(f"{path}: {found:,} lines written where {rows:,} were due")
