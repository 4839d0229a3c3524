"""`output.format = "jsonl"`: an object a row, every type, and every command over such a run."""

import gzip
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import CheckpointError, DiskError
from batchrun.job.settings import Output
from batchrun.simulator import SimulatorConfig
from batchrun.source import find_files, open_source
from batchrun.tables.json_lines import packing_of, require_rows, write
from batchrun.tables.rows import OWN_COLUMNS, output_schema
from tests.cli_process import batchrun, read_summary, write_job
from tests.endings import completion
from tests.result_files import row
from tests.run.test_tables import INPUT, batch_of, table_of, values
from tests.simulator_process import RunningSimulator, running_simulator
from tests.unit.test_source_parquet import COLUMNS

NAMES = ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects, by what is not ours."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if path.suffix == ".zst":
        with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
            content = stream.read()
    return [json.loads(line) for line in content.decode().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_objects_with_all_columns(tmp_path: Path, name: str) -> None:
    batch = batch_of(table_of(5), [completion(number) for number in range(5)])
    schema = output_schema(INPUT, Output())
    write(tmp_path / name, schema, iter([batch.slice(0, 2), batch.slice(2)]), 5)
    rows = lines_of(tmp_path / name)
    assert [list(each) for each in rows] == [schema.names] * 5
    assert [each["row"] for each in rows] == list(range(5))
    assert not list(tmp_path.glob("*.tmp"))
    first = batch.to_pylist()[0]
    assert rows[0]["request_key"] == first["request_key"].hex()
    assert rows[0]["finished_at"] == first["finished_at"].isoformat().replace("+00:00", "Z")
    assert Decimal(rows[0]["cost_usd"]) == first["cost_usd"]
    assert rows[0]["content"] == first["content"]
    (file,) = find_files(str(tmp_path / name))  # as an input of batchrun's own
    assert [record.columns["text"] for record in open_source((file,)).records()] == [f"text {n}" for n in range(5)]


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_every_type_are_json(tmp_path: Path, name: str) -> None:
    column: Any = COLUMNS[name]
    ours = pa.Table.from_pylist([row(number) for number in range(len(column))]).select(OWN_COLUMNS.names)
    table = pa.table({"c": column}).append_column("x", pa.array(range(len(column))))
    for own in OWN_COLUMNS.names:
        table = table.append_column(own, ours.column(own).cast(OWN_COLUMNS.field(own).type))
    write(tmp_path / "rows.jsonl", table.schema, table.to_batches(), len(column))
    found = [each["c"] for each in lines_of(tmp_path / "rows.jsonl")]
    assert [value is None for value in found] == [value is None for value in values(table.column("c"))]


def test_numbers_keep_all_their_digits(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {
        "big": pa.array([2**63 - 1, -(2**63)], pa.int64()),
        "unsigned": pa.array([2**64 - 1, 0], pa.uint64()),
        "float": pa.array([0.1 + 0.2, 5e-324]),
        "odd": pa.array([float("nan"), float("inf")]),
        "money": pa.array([Decimal("12345678901234567890.123456789012345678"), None], pa.decimal128(38, 18)),
        "nested": pa.array([[{"m": Decimal("0.10"), "t": 1_000_000_001}], None], _NESTED),
        "bytes": pa.array([b"\xff\x00", b""], pa.binary()),
    }
    table = pa.table(inputs)
    batch = batch_of(table, [completion(0, raw=b"\xe4{}"), completion(1)], Output(raw="always"))
    write(tmp_path / "rows.jsonl", batch.schema, [batch], 2)
    text = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    one, other = (json.loads(line, parse_float=str) for line in text)
    assert (one["big"], other["big"], one["unsigned"]) == (2**63 - 1, -(2**63), 2**64 - 1)
    assert (one["float"], other["float"], one["odd"], other["odd"]) == ("0.30000000000000004", "5e-324", None, None)
    assert one["money"] == "12345678901234567890.123456789012345678"
    assert one["nested"] == [{"m": "0.10", "t": "1970-01-01 00:00:01.000000001"}]
    assert (one["bytes"], other["bytes"]) == ("/wA=", "")
    assert one["raw"] == "\\xe4{}"


_NESTED = pa.large_list(pa.struct([pa.field("m", pa.decimal128(5, 2)), pa.field("t", pa.timestamp("ns"))]))


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    batch = batch_of(table_of(2), [completion(number) for number in range(2)])
    write(tmp_path / "rows.jsonl", batch.schema, [batch], 2)
    before = (tmp_path / "rows.jsonl").read_bytes()

    def cut() -> Iterator[pa.RecordBatch]:
        yield batch
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match="make room"):
        write(tmp_path / "rows.jsonl", batch.schema, cut(), 4)
    with pytest.raises(CheckpointError, match="2 lines written where 3 were due"):
        write(tmp_path / "rows.jsonl", batch.schema, [batch], 3)
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    require_rows(tmp_path / "rows.jsonl", "", 2)


def test_a_name_says_how_it_is_packed() -> None:
    names = {"a.jsonl": "", "a.NDJSON": "", "a.jsonl.gz": "gz", "a.jsonl.zst": "zst", "a.parquet": None, "a.gz": None}
    assert {name: packing_of(Path(name)) for name in names} == names


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

MORE = """[output]
format = "jsonl.gz"
chunk_rows = 16
max_failures = 100
"""


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.005)) as running:
        yield running


@pytest.mark.heavy
def test_every_command_reads_a_run_in_json_lines(tmp_path: Path, simulator: RunningSimulator) -> None:
    lines = ({"id": f"r{number}", "text": f"text {number}", "score": number / 3} for number in range(40))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    job, out = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "in.jsonl", MORE), tmp_path / "out"
    assert batchrun("run", job, "-o", out, "--limit", "20").exit_code == 0
    assert len(lines_of(out / "completions.jsonl.gz")) == 20
    ended = batchrun("run", job, "-o", out)
    assert ended.exit_code == 0, ended.stderr
    result = out / "completions.jsonl.gz"
    rows, served = lines_of(result), len(simulator.ledger())
    assert [each["row"] for each in rows] == list(range(40))
    assert [each["score"] for each in rows] == [number / 3 for number in range(40)]
    assert read_summary(out)["files"]["completions"] == str(result)
    for arguments, wanted in (
        (("run", job, "-o", out), "40 of 40 done"),
        (("show", out, "--row", "3", "--json"), '"r3"'),
        (("compare", out, out), "40 rows in both"),
        (("verify", out), "completions.jsonl.gz: 40 rows"),
        (("report", out, "--by", "status"), "total"),
        (("export", out, "-o", tmp_path / "rows.parquet"), "40 rows"),
        (("export", out, "-o", tmp_path / "rows.jsonl"), "40 rows"),
    ):
        ended = batchrun(*arguments)
        assert (ended.exit_code, wanted in ended.stdout) == (0, True), (ended.stdout, ended.stderr)
    assert pq.read_table(tmp_path / "rows.parquet").column("row").to_pylist() == list(range(40))
    assert lines_of(tmp_path / "rows.jsonl") == rows
    flags = ("--reuse", out, "--set", 'input.reuse_status=["ok", "truncated"]')
    ended = batchrun("run", job, "-o", tmp_path / "again", *flags)
    assert (ended.exit_code, len(simulator.ledger())) == (0, served), ended.stderr
    named: tuple[tuple[str | Path, ...], ...] = (
        ("show", result),
        ("run", job, "-o", tmp_path / "b", "--reuse", result),
        ("report", result),
    )
    for each in named:
        ended = batchrun(*each)
        assert (ended.exit_code, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    result.write_bytes(result.read_bytes()[:-4])
    ended = batchrun("run", job, "-o", out)
    assert (ended.exit_code, str(result) in ended.stderr) == (7, True), ended.stderr
    assert batchrun("verify", out).exit_code == 7
    assert len(simulator.ledger()) == served


@pytest.mark.heavy
def test_rows_so_far_can_be_json_lines(tmp_path: Path, simulator: RunningSimulator) -> None:
    lines = ({"id": f"r{number}", "text": f"again {number}"} for number in range(30))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    job, out = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "in.jsonl"), tmp_path / "out"
    assert batchrun("run", job, "-o", out, "--set", "budget.max_requests=10").exit_code == 4
    ended = batchrun("export", out, "-o", tmp_path / "so-far.jsonl.zst")
    assert ended.exit_code == 0, ended.stderr
    statuses = [each["status"] for each in lines_of(tmp_path / "so-far.jsonl.zst")]
    assert (len(statuses), statuses.count("pending")) == (30, 20)
