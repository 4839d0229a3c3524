"""Rows → a hive directory: one Parquet file for each combination of the keys' values, `lang=de/part-000000.parquet`.

The keys are in the folders' names and not in the files, as Hive, Spark, DuckDB and pyarrow write it. Rows are gathered
in blocks, each block is sorted by partition and its pieces are appended to one file per partition; then the files are
written one after the other. So memory is that of a block, and one Parquet file is open, for any number of partitions.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa

from batchrun import arrow_files
from batchrun import compute as pc
from batchrun.durable import digest, disk_errors, fsync
from batchrun.errors import JobError
from batchrun.job.settings import Output
from batchrun.source import unify
from batchrun.source.hive import NULL
from batchrun.tables.files import Compression, ParquetFile, part_in, require_rows
from batchrun.tables.rows import OWN_COLUMNS

BLOCK_BYTES = 8_000_000  # what is held in memory, and sorted by partition, at a time
LONGEST_NAME = 255
"""Bytes of a folder's name, as Linux file systems allow."""

OWN_KEYS = ("status", "model", "requested_model", "finish_reason", "service_tier", "reused", "variant", "invocation")
"""Our columns that have few values."""


def require_keys(schema: pa.Schema, output: Output) -> None:
    """Returns if the columns of `output.partition_by` are there and make names of folders. `schema`: the output's.

    Raises:
        JobError: a column is unknown, chosen twice, or of a type that no folder is named by.
    """
    own = {output.prefix + name for name in OWN_COLUMNS.names}
    own_keys = [output.prefix + name for name in OWN_KEYS]
    inputs = [name for name in schema.names if name not in own]
    for place, name in enumerate(output.partition_by):
        if name in own and name not in own_keys:
            raise JobError(f"output.partition_by: {name!r} differs in every row; choose from {', '.join(own_keys)}")
        if name not in schema.names:
            raise JobError(
                f"output.partition_by: {name!r} is not a column of the output ({', '.join(inputs + own_keys)})"
            )
        if name in output.partition_by[:place]:
            raise JobError(f"output.partition_by: {name!r} is named twice")
        plain = _plain_type(schema.field(name).type)
        is_text = pa.types.is_string(plain) or pa.types.is_large_string(plain)
        if not (is_text or pa.types.is_integer(plain) or pa.types.is_boolean(plain) or pa.types.is_date(plain)):
            raise JobError(
                f"output.partition_by: {name!r} is of type {schema.field(name).type}; "
                "text, integers, booleans and dates name folders"
            )


def folder_of(values: Mapping[str, object]) -> str:
    """The partition of a row with these keys: `lang=de/day=2026-11-28`, encoded as pyarrow, DuckDB and Hive do.

    Raises:
        JobError: a value is too long for a folder's name.
    """
    names: list[str] = []
    for column, value in values.items():
        if value is None:
            text = NULL
        elif isinstance(value, bool):
            text = str(value).lower()
        else:
            text = quote(value.isoformat() if isinstance(value, date) else str(value), safe="")
        name = f"{escaped(column)}={text}"
        names.append(name)
        if len(name) > LONGEST_NAME:
            raise JobError(
                f"output.partition_by: the folder {name[:60]}… would have a name of {len(name):,} bytes, "
                f"{LONGEST_NAME} are possible; choose another column"
            )
    return "/".join(names)


def escaped(name: str) -> str:
    """A column's name, with no more encoded than must be: readers take it as it is."""
    return name.replace("%", "%25").replace("/", "%2F").replace("=", "%3D")


class PartitionLimit:
    """Counts the partitions of records as they are checked, so that no run is paid for and can't be written."""

    def __init__(self, output: Output) -> None:
        self._keys = output.partition_by
        self._most = output.max_partitions
        self._own = {output.prefix + name for name in OWN_COLUMNS.names}
        self._found: set[tuple[object, ...]] = set()

    def observe(self, record: Mapping[str, object]) -> None:
        """Counts the record's partition. Our own columns have few values, and none yet.

        Raises:
            JobError: there are too many, or a value is too long.
        """
        if not self._keys:
            return
        values = {name: record.get(name) for name in self._keys if name not in self._own}
        key = tuple(str(value) for value in values.values())
        if key in self._found:
            return
        folder_of(values)
        self._found.add(key)
        if len(self._found) > self._most:
            raise JobError(
                f"output.partition_by: more than {self._most:,} partitions by {', '.join(self._keys)}; "
                "choose other columns, or raise output.max_partitions"
            )


def write(
    batches: Iterator[pa.RecordBatch],
    schema: pa.Schema,
    keys: Sequence[str],
    to: Path,
    compression: Compression,
    block_bytes: int = BLOCK_BYTES,
) -> list[tuple[Path, str, int]]:
    """The rows in files below `to`, on disk and read back: (path, digest, rows) by path. `to` is an empty folder.

    Rows keep their order within a file.
    """
    # Pieces of nested dictionaries can't be joined, and Arrow can't take rows of views.
    plain = pa.schema([field.with_type(_plain_type(field.type)) for field in schema])
    gathered = _Gathered(to / "pieces.tmp", plain, keys)
    with disk_errors(to):
        gathered.folder.mkdir(mode=0o700)
        for block in _blocks(batches, block_bytes):
            gathered.add(block)
        inside = pa.schema([field for field in schema if field.name not in keys])
        written = []
        for name in sorted(gathered.partitions):
            folder = to / name
            folder.mkdir(mode=0o700, parents=True)
            path, rows = part_in(folder, 0), 0
            with ParquetFile(path, inside, compression) as file:
                for batch in gathered.pop(name):
                    file.write(pa.Table.from_batches([batch]).cast(inside).combine_chunks().to_batches()[0])
                    rows += batch.num_rows
            require_rows(path, rows)
            fsync(path)
            written.append((path, digest(path), rows))
        gathered.folder.rmdir()
        for folder in {parent for path, _, _ in written for parent in path.parents if parent.is_relative_to(to)}:
            fsync(folder)
    return written


class _Gathered:
    """The rows of each partition in a separate file: Arrow streams, one after the other."""

    def __init__(self, folder: Path, schema: pa.Schema, keys: Sequence[str]) -> None:
        self.folder = folder
        self.partitions: dict[str, Path] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        self._names: list[str] = []
        self._schema = schema
        self._keys = keys
        self._options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))  # lz4 takes a third more disk

    def add(self, block: Sequence[pa.RecordBatch]) -> None:
        """The block's rows are in the files of their partitions."""
        table = pa.concat_tables(pa.Table.from_batches([batch]).cast(self._schema) for batch in block)
        numbers: list[int] = []
        for key in zip(*(table.column(name).to_pylist() for name in self._keys), strict=True):
            if key not in self._numbers:
                self._numbers[key] = len(self._names)
                self._names.append(folder_of(dict(zip(self._keys, key, strict=True))))
            numbers.append(self._numbers[key])
        order = pc.sort_indices(pa.array(numbers, pa.int64()))  # stable: rows keep their order
        inside = table.drop_columns(list(self._keys)).take(order)
        first = 0
        for number, rows in sorted(Counter(numbers).items()):
            path = self.partitions.setdefault(self._names[number], self.folder / f"{len(self.partitions)}.arrows")
            with path.open("ab") as file, pa.ipc.new_stream(file, inside.schema, options=self._options) as stream:
                stream.write_table(inside.slice(first, rows))
            first += rows

    def pop(self, name: str) -> Iterator[pa.RecordBatch]:
        """The partition's rows; its file is deleted."""
        path = self.partitions[name]
        with arrow_files.opened(path) as file:
            while file.tell() < file.size():
                with pa.ipc.open_stream(file) as stream:
                    yield from stream
        path.unlink()


def _blocks(batches: Iterator[pa.RecordBatch], block_bytes: int) -> Iterator[list[pa.RecordBatch]]:
    block: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        block.append(batch)
        size += batch.nbytes
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def _plain_type(type_: pa.DataType) -> pa.DataType:
    """The type without dictionaries, text views and byte views, at any depth. Lists that are views stay: cast
    to a list and back, one had negative offsets (pyarrow 26).
    """
    if isinstance(type_, pa.DictionaryType):
        return _plain_type(type_.value_type)
    if pa.types.is_string_view(type_):
        return pa.large_string()
    if pa.types.is_binary_view(type_):
        return pa.large_binary()
    if isinstance(type_, pa.MapType):
        return pa.map_(_plain_type(type_.key_type), _plain_type(type_.item_type))
    return unify.with_members(type_, _plain_type)
