import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.durable import digest
from batchrun.errors import CheckpointError, JobError
from batchrun.job.settings import Output
from batchrun.records import CompletionRecord, RowError, Status
from batchrun.run_summary import TotalsLine
from batchrun.tables import booked, files
from batchrun.tables.files import ROW_GROUP_BYTES, assemble, write_part
from batchrun.tables.rows import OWN_COLUMNS, USAGE_COLUMNS, joined, output_schema, own_table
from tests import prefork
from tests.endings import MODEL, answer_body, completion
from tests.unit.test_source_parquet import COLUMNS

Part = tuple[Path, str, int]

DEFAULT = Output()

COLUMN_TYPES: dict[str, pa.DataType] = {"id": pa.int64(), "text": pa.string()}
INPUT = pa.schema(COLUMN_TYPES)


def table_of(count: int, first: int = 0) -> pa.Table:
    ids = range(first, first + count)
    return pa.table({"id": ids, "text": [f"text {number}" for number in ids]}, schema=INPUT)


def batch_of(table: pa.Table, completions: Sequence[CompletionRecord], settings: Output = DEFAULT) -> pa.RecordBatch:
    schema = output_schema(table.schema, settings)
    own = own_table(completions, keep_raw=settings.raw == "always")
    return joined(table, own, schema)


def part_of(folder: Path, number: int, table: pa.Table, first: int, settings: Output = DEFAULT) -> Part:
    completions = [completion(first + place) for place in range(table.num_rows)]
    path = folder / f"{number:06d}.g1.parquet"
    batches = [batch_of(table.slice(start, 2), completions[start : start + 2]) for start in range(0, table.num_rows, 2)]
    schema = output_schema(table.schema, settings)
    return path, write_part(path, schema, batches, settings, table.num_rows), table.num_rows


def values(column: "pa.ChunkedArray[Any]") -> list[Any]:
    """Python's view of a column, with nanoseconds as integers: Python's own types can't hold them."""
    plain = column.cast(pa.int64()) if str(column.type).endswith("[ns]") else column
    return plain.to_pylist()


def own(settled: CompletionRecord, settings: Output = DEFAULT) -> dict[str, Any]:
    """What our columns say of one completion."""
    schema = output_schema(INPUT, settings)
    ours = own_table([settled], keep_raw=settings.raw == "always")
    batch = joined(table_of(1), ours, schema)
    row: dict[str, Any] = batch.to_pylist()[0]
    return row


# ── the schema ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_input_columns_come_first_as_they_are() -> None:
    schema = output_schema(INPUT, Output())
    assert schema == pa.schema([*INPUT, *OWN_COLUMNS])


def test_columns_chooses_and_orders_the_input_columns() -> None:
    assert output_schema(INPUT, Output(columns=["text"])).names == ["text", *OWN_COLUMNS.names]
    assert output_schema(INPUT, Output(columns=["text", "id"])).names == ["text", "id", *OWN_COLUMNS.names]
    assert output_schema(INPUT, Output(columns=[])) == OWN_COLUMNS
    batch = batch_of(table_of(2), [completion(0), completion(1)], Output(columns=["text"]))
    assert batch.column("text").to_pylist() == ["text 0", "text 1"]


def test_a_missing_column_is_named_with_others() -> None:
    with pytest.raises(JobError, match=r"output\.columns: 'body' is not an input column \(id, text\)"):
        output_schema(INPUT, Output(columns=["text", "body"]))


def test_a_column_named_twice_is_refused() -> None:
    with pytest.raises(JobError, match=r"output\.columns: 'text' is named twice"):
        output_schema(INPUT, Output(columns=["text", "id", "text"]))


@pytest.mark.parametrize("name", OWN_COLUMNS.names)
def test_a_reserved_input_name_is_refused(name: str) -> None:
    taken = pa.schema([(name, pa.string())])
    with pytest.raises(JobError, match=f"input column '{name}' .* set output.prefix"):
        output_schema(taken, Output())
    assert output_schema(taken, Output(columns=[])) == OWN_COLUMNS
    prefixed = output_schema(taken, Output(prefix="batchrun_"))
    assert prefixed.names == [name, *(f"batchrun_{own}" for own in OWN_COLUMNS.names)]
    with pytest.raises(JobError, match="has the name of an output column"):
        output_schema(pa.schema([(f"batchrun_{name}", pa.string())]), Output(prefix="batchrun_"))


# ── a row ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answers_fields_stand_in_their_columns() -> None:
    call = {"name": "f", "arguments": '{"a":1}'}
    body = answer_body(
        choices=[{"message": {"content": "hi", "function_call": call}, "finish_reason": "stop"}],
        usage={
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
        model="answered-as",
    )
    row = own(completion(0, raw=body, time_to_first_token_s=0.25, attempts=3, variant=2))
    assert row["content"] == "hi"
    assert row["function_call"] == call
    assert row["model"] == "answered-as"
    assert (row["finish_reason"], row["completion_id"], row["request_id"]) == ("stop", "chatcmpl-1", "req-0")
    assert row["created"].timestamp() == 1_795_000_000
    assert row["finished_at"].timestamp() == 1_795_000_000.25
    counts = [row[name] for name in OWN_COLUMNS.names if name.endswith("_tokens")]
    assert counts == [5, 3, None, 7, 2, 12]
    assert row["cost_usd"] == Decimal("0.0000455")
    assert (row["attempts"], row["variant"], row["reused"]) == (3, 2, False)
    assert (row["latency_s"], row["time_to_first_token_s"]) == (0.5, 0.25)
    assert row["request_key"] == bytes(16)
    assert row["error"] is None
    assert row["raw"] is None


def test_tool_calls_and_choices_have_columns() -> None:
    """Unknown fields are in `raw`."""
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    body = answer_body(
        choices=[
            {"index": 0, "message": {"content": "a", "tool_calls": calls, "refusal": None}, "finish_reason": "stop"},
            {"index": 1, "message": {"content": None}, "finish_reason": "length", "logprobs": {"odd": [1]}},
        ],
        service_tier="odd",
    )
    row = own(completion(0, raw=body), Output(raw="always"))
    assert msgspec.json.decode(row["tool_calls"]) == calls
    assert row["choices"] == [
        {"index": 0, "content": "a", "finish_reason": "stop"},
        {"index": 1, "content": None, "finish_reason": "length"},
    ]
    assert msgspec.json.decode(row["raw"])["service_tier"] == "odd"
    usual = own(completion(0))
    assert (usual["tool_calls"], usual["choices"], usual["raw"]) == (None, None, None)


def test_an_unanswered_row_has_error_and_nulls() -> None:
    error = RowError("bad_request", 400, "too_long", "the context is too long")
    row = own(completion(0, status=Status.ERROR, error=error, raw=b"", cost_pico_usd=None))
    assert row["error"] == msgspec.to_builtins(error)
    assert row["model"] == MODEL
    unknown = ["content", "parsed", "function_call", "finish_reason", "created", "prompt_tokens", "cost_usd"]
    assert [row[name] for name in unknown] == [None] * len(unknown)


@pytest.mark.parametrize(
    "body",
    [b"\xff\xfe", b"<html>", b'{"choices": [{"message": {"content": "\\ud800"}}]}', b"[" * 100_000, b"{}", b"null"],
)
def test_any_answer_is_written_with_its_bytes(tmp_path: Path, body: bytes) -> None:
    batch = batch_of(table_of(1), [completion(0, raw=body, status=Status.ERROR, error=RowError("unreadable"))])
    write_part(tmp_path / "part", batch.schema, [batch], Output(), 1)
    assert pq.read_table(tmp_path / "part").column("raw").to_pylist() == [body]


def test_raw_is_kept_for_failures_or_always() -> None:
    good = completion(0)
    assert own(good)["raw"] is None
    assert own(good, Output(raw="always"))["raw"] == good.raw
    assert own(completion(0, status=Status.TRUNCATED))["raw"] == good.raw


def test_parsed_holds_the_requested_json() -> None:
    body = answer_body('{"a": 1}')
    assert own(completion(0, raw=body, in_json=True))["parsed"] == '{"a": 1}'
    assert own(completion(0, raw=body))["parsed"] is None


# ── parts and the final file ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_every_type_reach_the_result(tmp_path: Path, name: str) -> None:
    whole = pa.table({"c": COLUMNS[name]})
    pq.write_table(whole, tmp_path / "input.parquet")
    table = pq.read_table(tmp_path / "input.parquet")  # as the source gives it
    parts = [
        part_of(tmp_path, 0, table.slice(0, 2), 0),
        part_of(tmp_path, 1, table.slice(2, 2), 2),
        part_of(tmp_path, 2, table.slice(4, 1), 4),
    ]
    schema = output_schema(table.schema, Output())
    assemble(parts, tmp_path / "completions.parquet", schema, "zstd", {})
    result = pq.read_table(tmp_path / "completions.parquet", page_checksum_verification=True)
    assert result.schema.equals(schema)
    assert values(result.column("c")) == values(table.column("c"))
    assert result.column("row").to_pylist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_every_compression_is_what_the_file_has(tmp_path: Path, compression: files.Compression) -> None:
    settings = Output(compression=compression)
    part = part_of(tmp_path, 0, table_of(4), 0, settings)
    assemble([part], tmp_path / "final", output_schema(INPUT, settings), compression, {})
    for path in (part[0], tmp_path / "final"):
        found = pq.read_metadata(path).row_group(0).column(1).compression
        assert found == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())


def test_an_empty_run_has_a_valid_file(tmp_path: Path) -> None:
    schema = output_schema(INPUT, Output())
    assemble([], tmp_path / "final", schema, "zstd", {"batchrun": "{}"})
    table = pq.read_table(tmp_path / "final")
    assert (table.num_rows, table.schema.remove_metadata()) == (0, schema)


def test_the_bill_is_in_the_footer(tmp_path: Path) -> None:
    bill = {"rows": 4, "cost_usd": "0.5"}
    metadata = {files.FOOTER_KEY: msgspec.json.encode(bill).decode()}
    part = part_of(tmp_path, 0, table_of(4), 0)
    assemble([part], tmp_path / "final", output_schema(INPUT, Output()), "zstd", metadata)
    assert files.read_footer(tmp_path / "final") == bill
    assert files.read_footer(part[0]) is None


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1" + bytes(50) + b"PAR1"])
def test_a_footer_that_cant_be_read_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "final").write_bytes(content)
    with pytest.raises(CheckpointError, match="can't be read as Parquet"):
        files.read_footer(tmp_path / "final")


def test_a_footer_entry_of_another_hand_is_said(tmp_path: Path) -> None:
    metadata = {files.FOOTER_KEY: "{"}
    assemble([], tmp_path / "final", OWN_COLUMNS, "zstd", metadata)
    with pytest.raises(CheckpointError, match="final"):
        files.read_footer(tmp_path / "final")


def test_pages_carry_checksums_that_are_checked(tmp_path: Path) -> None:
    path, _, _ = part_of(tmp_path, 0, table_of(1000), 0, Output(compression="none"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text 500", b"text 5OO"))
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "other"])
def test_a_replaced_part_is_named(tmp_path: Path, harm: str) -> None:
    """The old file stays."""
    parts = [part_of(tmp_path, number, table_of(4, 4 * number), 4 * number) for number in range(3)]
    path = parts[1][0]
    match harm:
        case "flip":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "cut":
            os.truncate(path, path.stat().st_size - 1)
        case "missing":
            path.unlink()
        case _:
            path.write_bytes(parts[0][0].read_bytes())
    (tmp_path / "final").write_bytes(b"old")
    with pytest.raises(CheckpointError, match=path.name):
        assemble(parts, tmp_path / "final", output_schema(INPUT, Output()), "zstd", {})
    assert (tmp_path / "final").read_bytes() == b"old"


def test_a_part_must_have_all_its_rows(tmp_path: Path) -> None:
    batch = batch_of(table_of(2), [completion(0), completion(1)])
    with pytest.raises(CheckpointError, match="2 rows written where 3 were due"):
        write_part(tmp_path / "part", batch.schema, [batch], Output(), 3)
    assert list(tmp_path.iterdir()) == []


def large_batches(rows: int, size: int) -> Iterator[pa.RecordBatch]:
    """Batches of 1,000 rows with incompressible answers of `size` bytes."""
    for first in range(0, rows, 1000):
        bodies = [answer_body(os.urandom(size // 2).hex()) for _ in range(1000)]
        yield batch_of(table_of(1000, first), [completion(first + at, raw=body) for at, body in enumerate(bodies)])


def largest_row_group(path: Path) -> int:
    metadata = pq.read_metadata(path)
    return max(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


@pytest.mark.heavy
def test_row_groups_stay_small_enough(tmp_path: Path) -> None:
    schema = output_schema(INPUT, Output())
    part = tmp_path / "part"
    sealed = write_part(part, schema, large_batches(3000, 30_000), Output(), 3000)
    assemble([(part, sealed, 3000)], tmp_path / "final", schema, "zstd", {})
    for path in (part, tmp_path / "final"):
        assert ROW_GROUP_BYTES / 2 < largest_row_group(path) <= ROW_GROUP_BYTES
        assert pq.read_metadata(path).num_row_groups <= 1.42 * 3000 * 30_000 / ROW_GROUP_BYTES
    assert pq.read_table(tmp_path / "final", columns=["row"]).column("row").to_pylist() == list(range(3000))


def test_a_huge_row_has_its_own_group(tmp_path: Path) -> None:
    bodies = ["a" * 10, "b" * (ROW_GROUP_BYTES + 1), "c" * 10]
    settled = [completion(row, raw=answer_body(text)) for row, text in enumerate(bodies)]
    batch = batch_of(table_of(3), settled)
    write_part(tmp_path / "part", batch.schema, [batch], Output(), 3)
    assert pq.read_table(tmp_path / "part", columns=["content"]).column("content").to_pylist() == bodies


def test_small_rows_share_few_row_groups(tmp_path: Path) -> None:
    schema = output_schema(INPUT, Output())
    parts = []
    for number in range(10):
        path = tmp_path / f"{number}"
        batch = batch_of(table_of(1000, number * 1000), [completion(number * 1000 + row) for row in range(1000)])
        parts.append((path, write_part(path, schema, [batch], Output(), 1000), 1000))
    assemble(parts, tmp_path / "final", schema, "zstd", {})
    assert pq.read_metadata(tmp_path / "final").num_row_groups == 1


def test_files_of_results_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        part = part_of(tmp_path, 0, table_of(1), 0)
        assemble([part], tmp_path / "final", output_schema(INPUT, Output()), "zstd", {})
        files.write_usage(tmp_path / "usage.parquet", [])
    finally:
        os.umask(before)
    for path in (part[0], tmp_path / "final", tmp_path / "usage.parquet"):
        assert path.stat().st_mode & 0o777 == 0o600


ASSEMBLE_FOR_EVER = """
import json
import sys
from pathlib import Path
import pyarrow as pa
from batchrun.job.settings import Output
from batchrun.tables.files import assemble
from batchrun.tables.rows import output_schema
folder, parts = Path(sys.argv[1]), [(Path(path), digest, rows) for path, digest, rows in json.loads(sys.argv[2])]
schema = output_schema(pa.schema({"id": pa.int64(), "text": pa.string()}), Output())
print("ready", flush=True)
while True:
    for metadata in ({"which": "a"}, {"which": "b"}):
        assemble(parts, folder / "final", schema, "zstd", metadata)
        print(metadata["which"], flush=True)
"""


@pytest.mark.heavy
def test_killed_finishing_leaves_one_whole_result(tmp_path: Path) -> None:
    """The old file or the new one."""
    parts = [part_of(tmp_path, number, table_of(500, 500 * number), 500 * number) for number in range(4)]
    written = json.dumps([(str(path), digest, rows) for path, digest, rows in parts])
    for number in range(4):
        with prefork.script(ASSEMBLE_FOR_EVER, tmp_path, written) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert process.stdout.readline() == "a\n"
            time.sleep(0.011 * number)
            process.send_signal(signal.SIGKILL)
        table = pq.read_table(tmp_path / "final", page_checksum_verification=True)
        assert table.column("row").to_pylist() == list(range(2000))
        metadata = pq.read_metadata(tmp_path / "final").metadata or {}
        assert metadata[b"which"] in (b"a", b"b")


# ── the other files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_usage_has_all_lines_of_totals(tmp_path: Path) -> None:
    """One for each invocation, model and status."""
    lines = [
        TotalsLine(1, MODEL, "ok", "2026-11-28", "flex", 10, 11, 100, 40, 20, 5, 120, Decimal("0.000123456789"), 1, 2),
        TotalsLine(2, MODEL, "discarded", attempts=3),
    ]
    files.write_usage(tmp_path / "usage.parquet", lines)
    table = pq.read_table(tmp_path / "usage.parquet", page_checksum_verification=True)
    assert table.schema.equals(USAGE_COLUMNS)
    assert booked.totals_of(table.to_pylist()) == lines
    files.write_usage(tmp_path / "usage.parquet", [])
    assert pq.read_table(tmp_path / "usage.parquet").schema.equals(USAGE_COLUMNS)


def test_a_parts_digest_is_of_the_file(tmp_path: Path) -> None:
    path, sealed, _ = part_of(tmp_path, 0, table_of(2), 0)
    assert digest(path) == sealed
