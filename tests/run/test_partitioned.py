"""`output.partition_by`: a hive directory of one file per partition, and every command over it."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchrun.errors import JobError
from batchrun.job.settings import Output
from batchrun.simulator import SimulatorConfig
from batchrun.source import find_files, open_source
from batchrun.tables.partitioned import PartitionLimit, folder_of, require_keys, write
from batchrun.tables.rows import own_schema
from tests.cli_process import batchrun, read_summary, write_job
from tests.run.test_tables import values
from tests.simulator_process import RunningSimulator, running_simulator
from tests.unit.test_source_parquet import COLUMNS

VALUES: tuple[Any, ...] = ("de", "pt BR", "", None, "a/b=c%", "..", "é'", "007", "~._-")


def batches(table: pa.Table, rows: int = 3) -> Iterator[pa.RecordBatch]:
    return iter(table.combine_chunks().to_batches(max_chunksize=rows))


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folders_are_named_as_pyarrow_names_them(tmp_path: Path) -> None:
    days = [date(2026, 11, 1 + place) for place in range(len(VALUES))]
    table = pa.table({"k": VALUES, "day": days, "flag": [place % 2 == 0 for place in range(9)], "n": range(9)})
    (tmp_path / "ours").mkdir()
    keys = ["k", "day", "flag"]
    written = write(batches(table), table.schema, keys, tmp_path / "ours", "zstd")
    ds.write_dataset(table, tmp_path / "theirs", format="parquet", partitioning=keys, partitioning_flavor="hive")
    names = {str(file.parent.relative_to(tmp_path / "theirs")) for file in (tmp_path / "theirs").rglob("*.parquet")}
    assert {str(path.parent.relative_to(tmp_path / "ours")) for path, _, _ in written} == names
    back = ds.dataset(tmp_path / "ours", partitioning=ds.partitioning(flavor="hive")).to_table().sort_by("n")
    assert back.column("k").to_pylist() == list(VALUES)
    read = open_source(find_files(str(tmp_path / "ours")))  # as an input of batchrun's own
    assert sorted(str(record.columns["k"]) for record in read.records()) == sorted(map(str, VALUES))


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_every_type_reach_the_partitions(tmp_path: Path, name: str) -> None:
    column: Any = COLUMNS[name]
    table = pa.table({"k": [row % 2 for row in range(len(column))], "c": column})
    written = write(batches(table, 1), table.schema, ["k"], tmp_path, "zstd", block_bytes=1)
    for path, _, _ in written:
        key = int(path.parent.name.removeprefix("k="))
        kept = pq.ParquetFile(path, page_checksum_verification=True)
        found = pa.concat_tables(kept.read_row_group(group) for group in range(kept.num_row_groups))
        assert values(found.column("c")) == values(table.column("c"))[key::2]
        assert kept.schema_arrow.names == ["c"]


def test_dictionaries_keep_their_type_at_any_depth(tmp_path: Path) -> None:
    word = pa.dictionary(pa.int32(), pa.string())
    parsed = pa.struct([("label", word), ("all", pa.list_(pa.field("element", word)))])
    schema = pa.schema({"k": word, "parsed": parsed})
    plain = pa.table({"k": list("abab"), "parsed": [{"label": each, "all": [each]} for each in ("x", "y", None, "x")]})
    pieces = [plain.slice(first, 1).cast(schema).to_batches()[0] for first in range(4)]  # each with words of its own
    written = write(iter(pieces), schema, ["k"], tmp_path, "zstd", block_bytes=1)
    found = {path.parent.name: pq.ParquetFile(path) for path, _, _ in written}
    assert found["k=a"].schema_arrow.field("parsed").type == schema.field("parsed").type
    assert [row["parsed"]["label"] for row in found["k=a"].read_row_group(0).to_pylist()] == ["x", None]


@pytest.mark.heavy
def test_partitioning_keeps_order_in_bounded_memory(tmp_path: Path) -> None:
    """Rows keep their order within a partition; memory is that of a block of rows."""
    types: dict[str, pa.DataType] = {"k": pa.int64(), "n": pa.int64(), "text": pa.string()}
    schema = pa.schema(types)

    def many() -> Iterator[pa.RecordBatch]:
        for first in range(0, 60_000, 1000):
            rows = range(first, first + 1000)
            yield pa.RecordBatch.from_pylist([{"k": n % 40, "n": n, "text": f"{n} " * 200} for n in rows], schema)

    for _ in zip(range(3), many(), strict=False):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written = write(many(), schema, ["k"], tmp_path, "zstd", block_bytes=2_000_000)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 60, "of 70 MB of rows"
    assert len(written) == 40
    for path, _, rows in written:
        numbers: list[Any] = pq.read_table(path, partitioning=None).column("n").to_pylist()
        assert (len(numbers), numbers) == (rows, sorted(numbers))
    assert not list(tmp_path.glob("*.tmp"))


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────

INPUT: dict[str, pa.DataType] = {
    **{"id": pa.int64(), "lang": pa.string(), "price": pa.float64()},
    "tags": pa.list_(pa.string()),
}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["lng"], "'lng' is not a column of the output (id, lang, price, tags, b_status, b_model,"),
        (["lang", "lang"], "'lang' is named twice"),
        (["price"], "'price' is of type double; text, integers, booleans and dates name folders"),
        (["tags"], "'tags' is of type list<item: string>"),
        (["b_row"], "'b_row' differs in every row; choose from b_status, b_model"),
    ],
)
def test_keys_that_name_no_folders_are_refused(keys: list[str], line: str) -> None:
    schema = pa.schema([*pa.schema(INPUT), *own_schema("b_")])
    with pytest.raises(JobError) as error:
        require_keys(schema, Output(partition_by=keys, prefix="b_"))
    assert str(error.value).startswith(f"output.partition_by: {line}")
    require_keys(schema, Output(partition_by=["lang", "id", "b_status"], prefix="b_"))


def test_impossible_partitions_are_refused_before_sending() -> None:
    """Too many of them, or names too long for a file system."""
    limit = PartitionLimit(Output(partition_by=["lang", "status"], max_partitions=2))
    for lang in ("de", "en", "de", "en"):
        limit.observe({"lang": lang})
    with pytest.raises(JobError, match="more than 2 partitions by lang, status; choose other columns"):
        limit.observe({})
    assert folder_of({"a=b": "x y"}) == "a%3Db=x%20y"
    with pytest.raises(JobError, match="would have a name of 905 bytes"):
        PartitionLimit(Output(partition_by=["lang"])).observe({"lang": "ä" * 150})


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

MORE = """[output]
partition_by = ["lang", "status"]
chunk_rows = 16
max_failures = 100
"""
LANGS = ("de", "en", None, "pt BR")


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.005)) as running:
        yield running


@pytest.fixture(scope="module")
def done(simulator: RunningSimulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job, its input and its complete run `out`."""
    folder = tmp_path_factory.mktemp("partitioned")
    write_input(folder / "in.jsonl", 60)
    write_job(folder / "job.toml", simulator.url, folder / "in.jsonl", MORE)
    ended = batchrun("run", folder / "job.toml", "-o", folder / "out")
    assert ended.exit_code == 0, ended.stderr
    return folder


def write_input(path: Path, rows: int, langs: tuple[str | None, ...] = LANGS) -> None:
    lines = ({"id": f"r{row}", "text": f"text {row}", "lang": langs[row % len(langs)]} for row in range(rows))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def rows_of(out: Path) -> list[dict[str, Any]]:
    table = ds.dataset(out / "completions", partitioning=ds.partitioning(flavor="hive")).to_table()
    return sorted(table.to_pylist(), key=lambda row: int(row["row"]))


def test_a_run_writes_the_partitions_with_a_manifest(done: Path) -> None:
    rows = rows_of(done / "out")
    assert [row["row"] for row in rows] == list(range(60))
    assert [row["lang"] for row in rows] == [LANGS[number % 4] for number in range(60)]
    manifest = json.loads((done / "out" / "completions" / "_manifest.json").read_bytes())
    assert manifest["rows"] == 60 == sum(file["rows"] for file in manifest["files"])
    assert {str(file["name"]).partition("/")[0] for file in manifest["files"]} == {
        "lang=de",
        "lang=en",
        "lang=pt%20BR",
        "lang=__HIVE_DEFAULT_PARTITION__",
    }
    assert read_summary(done / "out")["files"]["completions"] == str(done / "out" / "completions")


def test_the_same_command_again_sends_nothing(done: Path, simulator: RunningSimulator) -> None:
    served = len(simulator.ledger())
    assert batchrun("run", done / "job.toml", "-o", done / "out").exit_code == 0
    assert len(simulator.ledger()) == served


def test_every_command_reads_partitioned_results(done: Path, tmp_path: Path, simulator: RunningSimulator) -> None:
    out = done / "out"
    shown = batchrun("show", out, "--row", "3", "--json")
    assert json.loads(shown.stdout)["lang"] == "pt BR"
    assert batchrun("report", out, "--by", "status", "--format", "csv").exit_code == 0
    assert "60 rows in both" in batchrun("compare", out, out).stdout
    verified = batchrun("verify", out)
    assert "completions/lang=de/status=" in verified.stdout
    exported = batchrun("export", out, "-o", tmp_path / "rows.parquet")
    assert exported.exit_code == 0, exported.stderr
    assert pq.read_table(tmp_path / "rows.parquet").column("row").to_pylist() == list(range(60))
    served = len(simulator.ledger())
    good = ",".join(f'"{status}"' for status in ("ok", "truncated"))
    flags = ("--reuse", out, "--set", f"input.reuse_status=[{good}]")
    ended = batchrun("run", done / "job.toml", "-o", tmp_path / "again", *flags)
    assert (ended.exit_code, len(simulator.ledger())) == (0, served), ended.stderr


@pytest.mark.heavy
def test_a_moved_folder_is_still_a_result(done: Path, tmp_path: Path, simulator: RunningSimulator) -> None:
    """With its bill in the manifest; what is in the folders' names alone is there, too."""
    moved = tmp_path / "moved"
    shutil.copytree(done / "out" / "completions", moved)
    shown = batchrun("show", moved, "--where", "lang == 'pt BR' and row == 3", "--json")
    (row,) = map(json.loads, shown.stdout.splitlines())
    assert (row["row"], row["lang"], row["text"]) == (3, "pt BR", "text 3")
    assert "60 rows in both" in batchrun("compare", done / "out", moved).stdout
    bills = [batchrun("report", place, "--by", "run", "--format", "json") for place in (done / "out", moved)]
    costs = [json.loads(bill.stdout)["total"]["cost_usd"] for bill in bills]
    assert costs[0] == costs[1], (bills[0].stderr, bills[1].stderr)
    served = len(simulator.ledger())
    every = ("--reuse", moved, "--set", 'input.reuse_status=["ok", "truncated"]')
    ended = batchrun("run", done / "job.toml", "-o", tmp_path / "all", *every)
    assert (ended.exit_code, len(simulator.ledger())) == (0, served), ended.stderr
    statuses = {row["row"]: row["status"] for row in rows_of(done / "out")}
    assert {row["row"]: row["status"] for row in rows_of(tmp_path / "all")} == statuses
    good = sum(status == "ok" for status in statuses.values())
    ended = batchrun("run", done / "job.toml", "-o", tmp_path / "some", "--reuse", moved)
    assert (ended.exit_code, len(simulator.ledger()) - served) == (0, 60 - good), ended.stderr


@pytest.mark.parametrize("change", ["cut", "gone", "other bytes", "one more", "manifest"])
def test_a_changed_partition_file_is_noticed(done: Path, simulator: RunningSimulator, change: str) -> None:
    file = next((done / "out" / "completions").rglob("*.parquet"))
    if change == "manifest":
        file = done / "out" / "completions" / "_manifest.json"
    content, stat = file.read_bytes(), file.stat()
    more = file.with_name("part-000001.parquet")
    served = len(simulator.ledger())
    try:
        if change == "gone":
            file.unlink()
        elif change == "one more":
            more.write_bytes(content)
        else:
            file.write_bytes(content[:-9] if change == "cut" else content[:40] + b"?" + content[41:])
        ended = batchrun("run", done / "job.toml", "-o", done / "out")
        assert (ended.exit_code, len(ended.stderr.splitlines())) == (7, 1), ended.stderr
        named = str(more if change == "one more" else file)
        assert named in ended.stderr
        verified = batchrun("verify", done / "out")
        assert verified.exit_code == 7
        assert Path(named).name in verified.stdout
    finally:
        more.unlink(missing_ok=True)
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(simulator.ledger()) == served


@pytest.mark.parametrize("command", ["run", "check", "estimate"])
def test_each_command_refuses_the_same(done: Path, tmp_path: Path, command: str) -> None:
    job = done / "job.toml"
    for setting, line in (
        (
            'output.partition_by=["lng"]',
            "output.partition_by: 'lng' is not a column of the output (id, text, lang,",
        ),
        ('output.partition_by=["text"]', "output.partition_by: more than 20 partitions by text"),
        ('output.layout="parts"', "output.partition_by: writes one file for each partition; leave out output.layout"),
    ):
        arguments = ("-o", tmp_path / "out") if command == "run" else ()
        ended = batchrun(command, job, *arguments, "--set", setting, "--set", "output.max_partitions=20")
        assert (ended.exit_code, line in ended.stderr) == (2, True), ended.stderr


@pytest.mark.heavy
def test_a_changed_input_gives_its_own_partitions(tmp_path: Path, simulator: RunningSimulator) -> None:
    """The rows of other partitions are gone; kept answers are not sent again; more rows after a pilot come in."""
    write_input(tmp_path / "in.jsonl", 30)
    job, out = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "in.jsonl", MORE), tmp_path / "out"
    assert batchrun("run", job, "-o", out, "--limit", "20").exit_code == 0
    assert len(rows_of(out)) == 20
    assert batchrun("run", job, "-o", out).exit_code == 0
    assert len(rows_of(out)) == 30
    served = len(simulator.ledger())
    write_input(tmp_path / "in.jsonl", 30, ("fr", "en", "de"))
    ended = batchrun("run", job, "-o", out, "--accept-changes")
    assert ended.exit_code == 0, ended.stderr
    assert {row["lang"] for row in rows_of(out)} == {"fr", "en", "de"}
    assert len(simulator.ledger()) == served  # the same questions
    assert not (out / "completions.tmp").exists()
    retried = batchrun("run", job, "-o", out, "--retry-failed", "--status", "truncated")
    assert retried.exit_code == 0, retried.stderr
    assert [row["row"] for row in rows_of(out)] == list(range(30))


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ['partition_by = ["lang"]', 'format = "jsonl.gz"'])
def test_a_damaged_result_is_rebuilt_from_parts(tmp_path: Path, simulator: RunningSimulator, layout: str) -> None:
    write_input(tmp_path / "in.jsonl", 12)
    more = f"[output]\n{layout}\nchunk_rows = 5\nmax_failures = 100\n"
    job, out = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "in.jsonl", more), tmp_path / "out"
    assert batchrun("run", job, "-o", out).exit_code == 0
    files = [*sorted(out.rglob("completions*/**/*.parquet")), *out.glob("*.jsonl.gz")]
    before = [path.read_bytes() for path in files]
    served = len(simulator.ledger())
    for damage in ("gone", "flip"):
        if damage == "gone":
            files[-1].unlink()
        else:
            files[0].write_bytes(before[0][:40] + b"?" + before[0][41:])
        ended = batchrun("run", job, "-o", out)
        assert (ended.exit_code, len(ended.stderr.splitlines())) == (7, 1), ended.stderr
        assert f"batchrun verify {out} --rebuild writes the result again" in ended.stderr
        ended = batchrun("verify", out, "--rebuild")
        assert (ended.exit_code, "nothing is damaged" in ended.stdout) == (0, True), ended.stdout + ended.stderr
        assert [path.read_bytes() for path in files] == before
        assert batchrun("run", job, "-o", out).exit_code == 0
    part = sorted((out / "parts").glob("*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:-9])
    files[0].unlink()
    ended = batchrun("verify", out, "--rebuild")
    assert (ended.exit_code, part.name in ended.stderr) == (7, True), ended.stderr
    assert [path.read_bytes() for path in files[1:]] == before[1:]
    assert len(simulator.ledger()) == served
