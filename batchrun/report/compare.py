"""Compares two runs over the same questions, row by row: for a new prompt or model before it goes to the whole input.

Memory does not grow with the results: both are divided by a hash of the id (or by position) into pieces on disk, and
then compared piece by piece. (A piece is larger only if one id is in very many rows.)
"""

import heapq
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute

from batchrun import arrow_files
from batchrun.errors import InputError
from batchrun.report import run_rows
from batchrun.report.run_rows import Result
from batchrun.report.wording import plural

pc: Any = pyarrow.compute  # its stubs know less than it does

MOST_EXAMPLES = 20  # as many as one screen shows

PIECE_BYTES, PIECE_ROWS = 16_000_000, 20_000
"""About how much of both results is compared at once, by its size in the files."""

MOST_PIECES = 400
"""Files that are open at once; results beyond 6 GB or 8 million rows have larger pieces."""


class Example(msgspec.Struct, frozen=True):
    """A row whose answer changed."""

    id: str
    before: str | None
    after: str | None


class Comparison(msgspec.Struct):
    """How many of the rows in both (`both`) changed, by field; and what both cost over the rows with two known costs.

    `by` is the column that identifies a row; `repeated` counts rows left out because their id is null or not unique.
    """

    by: str
    both: int = 0
    only_before: int = 0
    only_after: int = 0
    repeated: int = 0
    changed: dict[str, int] = {}
    statuses: dict[str, int] = {}
    before_usd: Decimal = Decimal(0)
    after_usd: Decimal = Decimal(0)
    priced: int = 0
    examples: tuple[Example, ...] = ()


def compare(
    before: Result, after: Result, by: str | None, examples: int = MOST_EXAMPLES, piece_rows: int = PIECE_ROWS
) -> Comparison:
    """The rows of both, aligned by the column `by`; None: by an id that both have, else by position.

    Raises:
        InputError: a result has no such column.
    """
    key = by or "row"
    if by is None:  # the first column of both that is called like an id
        for name in before.inputs:
            lower = name.lower()
            if name in after.inputs and (lower in ("id", "uuid", "key", "custom_id") or lower.endswith("_id")):
                key = name
                break
    sizes = [_size(result, key) for result in (before, after)]
    rows, size = max(rows for rows, _ in sizes), sum(size for _, size in sizes)
    count = min(MOST_PIECES, max(1, -(-rows // piece_rows), -(-size // PIECE_BYTES)))
    rows_each = max(1, -(-rows // count)) if key == "row" else None
    tally = _Tally(Comparison(key), examples)
    with tempfile.TemporaryDirectory(prefix="batchrun-") as folder:
        for side, result in (("before", before), ("after", after)):
            Path(folder, side).mkdir()
            _divide(_tables(result, key), Path(folder, side), count, rows_each)
        for name in sorted({path.name for path in Path(folder).glob("*/*")}):
            pieces: list[pa.Table | None] = []
            for side in ("before", "after"):
                pieces.append(None)
                if Path(folder, side, name).exists():
                    with pa.ipc.open_stream(Path(folder, side, name)) as reader:  # type: ignore[arg-type]
                        pieces[-1] = reader.read_all()
            tally.add(*pieces)
    return tally.finished()


class _Tally:
    """Adds up pieces. Of the changed rows it keeps those with the smallest hashes of their ids, a fair sample."""

    def __init__(self, sums: Comparison, examples: int) -> None:
        self._sums = sums
        self._most = examples
        self._statuses: Counter[str] = Counter()
        self._examples: list[tuple[int, int, Example]] = []

    def add(self, one: pa.Table | None, other: pa.Table | None) -> None:
        """Two pieces with the same ids; None: no rows."""
        (one, one_left), (other, other_left) = _unique(one), _unique(other)
        sums = self._sums
        sums.repeated += one_left + other_left
        if one is None or other is None:
            sums.only_before += 0 if one is None else one.num_rows
            sums.only_after += 0 if other is None else other.num_rows
            return
        places = pc.index_in(other["id"], value_set=one["id"].combine_chunks())
        after, before = other.filter(pc.is_valid(places)), one.take(pc.drop_null(places))
        sums.both += after.num_rows
        sums.only_before += one.num_rows - after.num_rows
        sums.only_after += other.num_rows - after.num_rows
        differs = pa.chunked_array([pa.array([False] * after.num_rows, pa.bool_())])
        for name in [name for name in one.column_names if name in other.column_names and name not in _NOT_COMPARED]:
            old, new = before[name], after[name]
            if old.type != new.type:
                old, new = pc.cast(old, pa.large_string()), pc.cast(new, pa.large_string())
            same = pc.or_(pc.fill_null(pc.equal(old, new), False), pc.and_(pc.is_null(old), pc.is_null(new)))
            sums.changed[name] = sums.changed.get(name, 0) + (pc.sum(pc.invert(same)).as_py() or 0)
            differs = pc.or_(differs, pc.invert(same))
        for pair in zip(before["status"].to_pylist(), after["status"].to_pylist(), strict=True):
            self._statuses[" → ".join(map(str, pair))] += 1
        priced = pc.and_(pc.is_valid(before["cost_usd"]), pc.is_valid(after["cost_usd"]))
        sums.priced += pc.sum(priced).as_py() or 0
        sums.before_usd += pc.sum(before["cost_usd"].filter(priced)).as_py() or 0
        sums.after_usd += pc.sum(after["cost_usd"].filter(priced)).as_py() or 0
        self._keep(before.filter(differs), after.filter(differs))

    def _keep(self, before: pa.Table, after: pa.Table) -> None:
        ids: list[Any] = after["id"].to_pylist()
        hashes = [(zlib.crc32(str(id_).encode()), place) for place, id_ in enumerate(ids)]
        chosen = heapq.nsmallest(self._most, hashes)
        places = pa.array([place for _, place in chosen], pa.int64())
        pairs = zip(before.take(places).to_pylist(), after.take(places).to_pylist(), strict=True)
        for (hash_, place), pair in zip(chosen, pairs, strict=True):
            # a row without text is shown by its status
            answers = [row["content"] or row["function_call"] or f"({row['status']})" for row in pair]
            self._examples.append((hash_, int(pair[1]["row"] or 0), Example(str(ids[place]), *answers)))
        self._examples = heapq.nsmallest(self._most, self._examples, key=lambda each: each[:2])

    def finished(self) -> Comparison:
        """The sums over all pieces, the commonest change of a status first, and examples in the order of their rows."""
        self._sums.statuses = dict(self._statuses.most_common())
        self._sums.examples = tuple(example for _, _, example in sorted(self._examples, key=lambda each: each[1]))
        return self._sums


_OWN = ["status", "content", "function_call", "parsed", "cost_usd", "row"]
_NOT_COMPARED = ("id", "row", "cost_usd")


def _size(result: Result, key: str) -> tuple[int, int]:
    """The rows of a result, and the uncompressed bytes of the columns that are compared.

    Raises:
        InputError: it has no column `key`.
    """
    if key != "row" and key not in result.inputs:
        raise InputError(f"{result.files[0]}: has no column {key} ({', '.join([*result.inputs, 'row'])})")
    names, rows, size = {key, *(result.prefix + name for name in _OWN)}, 0, 0
    for path in result.files:
        metadata = arrow_files.metadata_of(path)
        rows += metadata.num_rows
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in names)
    return rows, size


def _tables(result: Result, key: str) -> Iterator[pa.Table]:
    """The rows' id as text, and what is compared of them: a typed answer field by field."""
    for table in run_rows.tables(result, _OWN, [] if key == "row" else [key]):
        columns: dict[str, Any] = {"id": pc.cast(table[key], pa.large_string())}
        columns |= {"row": table["row"], "cost_usd": table["cost_usd"], "status": table["status"]}
        columns["content"] = table["content"]
        columns["function_call"] = pc.struct_field(table["function_call"], "arguments")
        type_ = table["parsed"].type
        if pa.types.is_struct(type_):
            for place in range(type_.num_fields):
                columns[f"parsed.{type_.field(place).name}"] = pc.struct_field(table["parsed"], [place])
        else:
            columns["parsed"] = table["parsed"]
        yield pa.table(
            {name: column if name in _NOT_COMPARED else _comparable(column) for name, column in columns.items()}
        )


def _divide(tables: Iterator[pa.Table], folder: Path, count: int, rows_each: int | None) -> None:
    """Writes each row to the file of its piece. A piece is `rows_each` consecutive rows; None: rows whose ids have one
    hash value in common.
    """
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    try:
        for table in tables:
            if rows_each is None:
                ids: list[Any] = table["id"].to_pylist()
                pieces = pa.array([0 if id_ is None else zlib.crc32(id_.encode()) % count for id_ in ids], pa.int64())
            else:
                pieces = pc.divide(pc.fill_null(table["row"], 0), rows_each)
            order = pc.sort_indices(pieces)
            ordered, first = table.take(order), 0
            for number, rows in sorted(run_rows.counts(pieces).items()):
                if number not in writers:
                    writers[number] = pa.ipc.new_stream(folder / str(number), table.schema, options=options)  # type: ignore[arg-type]
                writers[number].write_table(ordered.slice(first, rows))
                first += rows
    finally:
        for writer in writers.values():
            writer.close()


def _unique(table: pa.Table | None) -> tuple[pa.Table | None, int]:
    """The rows with a unique id that is not null, and the number of the others."""
    if table is None:
        return None, 0
    counts = pc.value_counts(table["id"].combine_chunks())
    once = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    kept = table.filter(pc.and_(pc.is_valid(table["id"]), pc.is_in(table["id"], value_set=once)))
    return kept, table.num_rows - kept.num_rows


def _comparable(column: Any) -> Any:
    """Numbers as float64, everything else as text."""
    type_ = column.type
    if pa.types.is_nested(type_):
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.large_string())])
    if pa.types.is_floating(type_) or pa.types.is_integer(type_):
        return pc.cast(column, pa.float64(), safe=False)
    return pc.cast(column, pa.large_string())


def in_words(comparison: Comparison) -> list[str]:
    both = comparison.both
    lines = [
        f"{plural(both, 'row')} in both, by {comparison.by}; {comparison.only_before:,} only in the first, "
        f"{comparison.only_after:,} only in the second"
    ]
    if comparison.repeated:
        lines.append(f"{plural(comparison.repeated, 'row')} left out: no id, or the id of another row, too")
    for name, count in comparison.changed.items():
        changed = f"{count / both:.1%}" if both else "–"
        lines.append(f"  {name}: {count:,} changed ({changed})")
    lines += [f"  {change}: {count:,}" for change, count in comparison.statuses.items()]
    if not comparison.priced:
        lines.append("cost: unknown in one of them or both")
    else:
        difference = comparison.after_usd - comparison.before_usd
        share = f" ({difference / comparison.before_usd:+.1%})" if comparison.before_usd else ""
        sign = "+" if difference >= 0 else "−"
        lines.append(
            f"cost: ${comparison.before_usd:,.6f} → ${comparison.after_usd:,.6f}, "
            f"{sign}${abs(difference):,.6f}{share}, over {plural(comparison.priced, 'row')} of known cost"
        )
    for example in comparison.examples:
        lines += [example.id, f"  − {_short(example.before)}", f"  + {_short(example.after)}"]
    return lines


def _short(text: str | None) -> str:
    shown = "–" if text is None else text.replace("\n", "⏎")
    return shown if len(shown) <= 200 else shown[:200] + "…"
