import gzip
import os
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.durable import digest
from batchrun.errors import CheckpointError, ExitCode, InputError
from batchrun.job.job import Job
from batchrun.records import Answer, CompletionRecord, PossiblyBilled
from batchrun.response import answer as answers
from batchrun.response.packed import Packer
from batchrun.source import START, JsonlSource, TableSource, rows_of
from batchrun.startup import resume
from batchrun.startup.run_options import RunOptions
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.open_chunk import OVERHEAD_BYTES, Kept, OpenChunk
from batchrun.store.rundir import RunDirectory
from batchrun.store.stored_window import StoredWindow, write
from batchrun.tables.json_columns import ColumnTypes
from tests import level, prefork
from tests.chunk_starts import NOW, Start, ask, assembled, finish, small_chunks, started
from tests.endings import completion, discarded
from tests.jobs import job_over, texts, write_lines
from tests.unit.test_source_parquet import COLUMNS

# ── the stored window ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_window_returns_its_lines(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": n, "text": "ä" * (n % 7), "tags": ["x"] * (n % 3), "more": {"a": n} if n % 2 else None}
        for n in range(2500)
    ]
    source = JsonlSource((write_lines(tmp_path / "in.jsonl", rows),))
    types = ColumnTypes()
    for row in rows:
        types.observe(row)
    (window,) = source.windows(START, 10_000, 1 << 30)
    stored = StoredWindow(tmp_path / "input.arrow", write(tmp_path / "input.arrow", window.table), 100)
    batches = list(stored.rows())
    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    assert [(row.row, row.columns) for batch in batches for row in batch] == list(enumerate(rows, 100))
    columns = pa.concat_tables(stored.tables(types))
    assert columns.schema == types.schema()
    assert columns.to_pylist() == rows


@pytest.mark.parametrize("name", COLUMNS)
def test_a_stored_window_returns_every_type(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"c": COLUMNS[name]}), tmp_path / "in.parquet")
    source = TableSource((tmp_path / "in.parquet",))
    (window,) = source.windows(START, 10, 1 << 20)
    stored = StoredWindow(tmp_path / "input.arrow", write(tmp_path / "input.arrow", window.table), 0)
    (table,) = stored.tables(None)
    assert table.equals(window.table)
    (batch,) = stored.rows()
    assert [row.columns for row in batch] == rows_of(window.table.to_batches()[0])


def test_a_stored_window_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "input.arrow", pa.table({"a": [1]}))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


def test_a_changed_stored_window_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "input.arrow"
    written = write(path, pa.table({"a": list(range(100))}))
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"input\.arrow: the input of an open chunk is damaged") as error:
            StoredWindow(path, written, 0)
        assert error.value.exit_code == ExitCode.DAMAGED
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        StoredWindow(path, written, 0)


# ── the life of chunks ────────────────────────────────────────────────────────────────────────────────────────────────


def lines_of(tmp_path: Path, count: int) -> Path:
    return write_lines(tmp_path / "in.jsonl", texts(count))


FORMATS = ["jsonl", "jsonl.gz", "parquet"]


def input_as(tmp_path: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        write_lines(path, rows)
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_all_rows_come_once_in_order(tmp_path: Path, kind: str) -> None:
    rows = texts(35)
    table, requested = finish(tmp_path / "run", small_chunks(input_as(tmp_path, kind, rows)))
    assert requested == list(range(35))
    assert table.select(["id", "text"]).to_pylist() == rows
    assert table.column("row").to_pylist() == list(range(35))
    assert table.column("content").to_pylist() == [f"answer to {row['text']}" for row in rows]
    assert list((tmp_path / "run" / "parts").glob("*.arrow")) == []


SIZES = [(10, 1 << 20, [10, 10, 5]), (100, 150, [5] * 5), (1, 1, [1] * 25)]


@pytest.mark.parametrize(("rows", "size", "expected"), SIZES)
def test_a_chunk_ends_at_rows_or_bytes(tmp_path: Path, rows: int, size: int, expected: list[int]) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": f"{number:016d}"} for number in range(25)])  # 27 bytes a line
    with started(tmp_path / "run", job_over(path, output={"chunk_rows": rows, "chunk_bytes": size})) as start:
        while start.chunks.open_next() is not None:
            pass
        found = start.checkpoint.chunks()
    assert [chunk.rows for chunk in found] == expected
    assert [chunk.first_row for chunk in found] == [sum(expected[:n]) for n in range(len(expected))]


@pytest.mark.parametrize("rows", [[{}] * 25, [{"other": None}] * 25])
def test_rows_without_a_value_are_rows(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    path = write_lines(tmp_path / "in.jsonl", rows)
    job = job_over(path, request={"prompt": "Tell a joke."}, output={"chunk_rows": 10})
    table, _ = finish(tmp_path / "run", job)
    assert table.column("row").to_pylist() == list(range(25))


def test_rejected_rows_are_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"bad": 1}, *texts(9), {"bad": 2}, {"bad": 3}, *texts(9, 9), {"bad": 4}]
    path, run = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "run"
    directory = RunDirectory(run)
    directory.create()
    checkpoint = Checkpoint(directory.checkpoint, free_reserve=lambda: False)
    resume.plan_start(small_chunks(path), directory, checkpoint, RunOptions(skip_invalid=True), NOW)
    checkpoint.close()
    table, _ = finish(run, small_chunks(path))
    assert table.column("text").to_pylist() == [f"text {number}" for number in range(18)]
    assert table.column("row").to_pylist() == list(range(18))


# ── a start that ended early ──────────────────────────────────────────────────────────────────────────────────────────

Crash = Callable[[Start], None]


def next_chunk(start: Start) -> OpenChunk:
    chunk = start.chunks.open_next()
    assert chunk is not None
    return chunk


def unrecorded(start: Start) -> int:
    """The number of the first chunk that was never opened."""
    return len(start.checkpoint.chunks())


def input_half_stored(start: Start) -> None:
    (start.directory.parts / f"{unrecorded(start):06d}.input.arrow.tmp").write_bytes(b"half a window")


def input_stored_but_not_recorded(start: Start) -> None:
    next_chunk(start)
    write(start.directory.input_of(unrecorded(start)), pa.table({"line": [b'{"text": "wrong"}']}))


def some_rows_settled(start: Start) -> None:
    for most in (10, 3, 0):
        ask(start, next_chunk(start), most)


def all_rows_settled_but_not_sealed(start: Start) -> None:
    ask(start, next_chunk(start))
    ask(start, next_chunk(start))


def part_written_but_not_sealed(start: Start) -> None:
    chunk = next_chunk(start)
    ask(start, chunk)
    part = start.directory.part_of(chunk.chunk.chunk, 1)
    part.write_bytes(b"a part without a record")
    part.with_name(part.name + ".tmp").write_bytes(b"half a part")


def sealed_but_input_not_removed(start: Start) -> None:
    chunk = next_chunk(start)
    stored = start.directory.input_of(chunk.chunk.chunk)
    content = stored.read_bytes()
    ask(start, chunk)
    start.chunks.seal(chunk)
    stored.write_bytes(content)


def final_file_half_written(start: Start) -> None:
    sealed_but_input_not_removed(start)
    (start.directory.path / "completions.parquet.tmp").write_bytes(b"half a file")


CRASHES: list[Crash] = [
    input_half_stored,
    input_stored_but_not_recorded,
    some_rows_settled,
    all_rows_settled_but_not_sealed,
    part_written_but_not_sealed,
    sealed_but_input_not_removed,
    final_file_half_written,
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("crash", CRASHES)
def test_any_interruption_gives_the_same_file(tmp_path: Path, kind: str, crash: Crash) -> None:
    job = small_chunks(input_as(tmp_path, kind, texts(45)))
    undisturbed, _ = finish(tmp_path / "undisturbed", job)
    run = tmp_path / "run"
    with started(run, job) as start:
        crash(start)
        settled = start.checkpoint.totals.settled()
    table, requested = finish(run, job)
    assert table.equals(undisturbed)
    assert len(requested) == len(set(requested)) == 45 - settled  # nothing settled is sent again
    assert sorted(path.name for path in (run / "parts").iterdir()) == [f"00000{n}.g1.parquet" for n in range(5)]


@pytest.mark.heavy
@pytest.mark.sampled(3)
@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_after_a_crash_changes_nothing_either(tmp_path: Path, crash: Crash) -> None:
    job = small_chunks(lines_of(tmp_path, 45))
    undisturbed, _ = finish(tmp_path / "undisturbed", job)
    for number, again in enumerate(CRASHES):
        run = tmp_path / f"run-{number}"
        with started(run, job) as start:
            crash(start)
        with started(run, job) as start:
            again(start)
        assert finish(run, job)[0].equals(undisturbed)


def test_a_resumed_row_knows_its_attempts(tmp_path: Path) -> None:
    job = small_chunks(lines_of(tmp_path, 25))
    with started(tmp_path / "run", job) as start:
        start.chunks.open_next()
        start.chunks.open_next()
        for attempt in (discarded(3, 1), discarded(3, 2), discarded(12, 1)):
            start.checkpoint.put(attempt)
        start.checkpoint.add_possibly_billed([entry for row in (3, 14) for entry in lost(row, 4)])
    with started(tmp_path / "run", job) as start:
        first, second = next_chunk(start), next_chunk(start)
        assert {row: [a.n for a in found] for row, found in first.earlier.discarded.items()} == {3: [1, 2]}
        assert {row: [a.n for a in found] for row, found in second.earlier.discarded.items()} == {12: [1]}
        assert (first.earlier.lost, second.earlier.lost) == ({3: 4}, {14: 4})


def lost(row: int, n: int) -> list[PossiblyBilled]:
    return [PossiblyBilled(row, each, "", None, 9, "crash", 1) for each in range(1, n + 1)]


def test_sealing_empties_the_database_of_rows(tmp_path: Path) -> None:
    job = small_chunks(lines_of(tmp_path, 25))
    with started(tmp_path / "run", job) as start:
        chunk = next_chunk(start)
        ask(start, chunk)
        start.chunks.seal(chunk)
        assert start.checkpoint.completions(0, 100) == []
        (sealed,) = start.checkpoint.chunks()
        assert sealed == start.chunks.sealed[0]
        assert (sealed.generation, sealed.part_digest) == (1, digest(start.directory.part_of(0, 1)))


@pytest.mark.heavy
def test_long_streams_are_sealed_as_events(tmp_path: Path) -> None:
    """In bounded memory."""
    streamed = b'data: {"choices":[{"delta":{"content":"Fine."},"finish_reason":"stop"}]}\n\n: %s\n\n' % (
        b"x" * 3_000_000
    )
    packer = Packer()
    packer.feed(streamed)
    raw = packer.finish()
    job = job_over(lines_of(tmp_path, 24), output={"raw": "always"})
    with started(tmp_path / "run", job) as start:
        chunk = next_chunk(start)
        for row in range(24):
            start.checkpoint.put(completion(row, raw=raw))
        assert start.checkpoint.flushed()
        tracemalloc.start()
        start.chunks.seal(chunk)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        table = assembled(start)
    assert table.column("content").to_pylist() == ["Fine."] * 24
    assert table.column("raw").to_pylist() == [streamed] * 24
    assert peak_bytes < 40_000_000 < 24 * len(streamed)


def test_a_chunk_missing_rows_is_never_sealed(tmp_path: Path) -> None:
    with started(tmp_path / "run", small_chunks(lines_of(tmp_path, 25))) as start:
        chunk = next_chunk(start)
        ask(start, chunk, 9)
        with pytest.raises(CheckpointError, match="rows are missing"):
            start.chunks.seal(chunk)
        assert [path.name for path in start.directory.parts.iterdir()] == ["000000.input.arrow"]
        assert start.checkpoint.chunks() == [chunk.chunk]


# ── answers that stay in memory until their chunk is sealed ───────────────────────────────────────────────────────────


def part_of(path: Path, job: Job, keep: Callable[[Kept, CompletionRecord, Answer], None]) -> str:
    """The digest of the part of a chunk whose answers were given to `keep`."""
    with started(path, job) as start:
        chunk = next_chunk(start)
        ask(start, chunk)
        for record in start.checkpoint.completions(0, 100):
            keep(chunk.kept, record, answers.parse(record.raw))
        start.chunks.seal(chunk)
        return str(start.chunks.sealed[0].part_digest)


def test_kept_answers_make_the_same_part(tmp_path: Path) -> None:
    """All of them, some of them or none in memory. What is in memory is not read again."""
    job = small_chunks(lines_of(tmp_path, 10))

    def but_one(kept: Kept, record: CompletionRecord, answer: Answer) -> None:
        if record.row != 3:
            kept.add(record, answer)

    def another(kept: Kept, record: CompletionRecord, answer: Answer) -> None:
        kept.add(record, msgspec.structs.replace(answer, content="from memory"))

    none = part_of(tmp_path / "none", job, lambda *_: None)
    assert part_of(tmp_path / "all", job, Kept.add) == part_of(tmp_path / "some", job, but_one) == none
    assert part_of(tmp_path / "other", job, another) != none


def test_kept_answers_never_replace_durable_ones(tmp_path: Path) -> None:
    """A chunk isn't sealed if a row's answer is in memory but not in the database."""
    with started(tmp_path / "run", small_chunks(lines_of(tmp_path, 10))) as start:
        chunk = next_chunk(start)
        ask(start, chunk, 9)
        for row in range(10):
            chunk.kept.add(completion(row), answers.parse(completion(row).raw))
        with pytest.raises(CheckpointError, match="rows are missing"):
            start.chunks.seal(chunk)
        assert start.checkpoint.chunks() == [chunk.chunk]
        assert len(start.checkpoint.completions(0, 10)) == 9


def test_kept_answers_take_bounded_memory(tmp_path: Path) -> None:
    """Those that do not fit are read from the database; so are those of a fourth chunk that is open."""
    record, answer = completion(0), answers.parse(completion(0).raw)
    size = len(record.raw) + len(answer.content or "") + OVERHEAD_BYTES
    kept = Kept(2 * size)
    for row in range(3):
        kept.add(msgspec.structs.replace(record, row=row), answer)
    assert [kept.all_of(0, end) is not None for end in (1, 2, 3)] == [True, True, False]
    kept.clear()
    kept.add(record, answer)
    assert kept.all_of(0, 1) is None
    with started(tmp_path / "run", small_chunks(lines_of(tmp_path, 50))) as start:
        chunks = [next_chunk(start) for _ in range(5)]
        for chunk in chunks:
            chunk.kept.add(msgspec.structs.replace(record, row=chunk.chunk.first_row), answer)
        first = [chunk.kept.all_of(chunk.chunk.first_row, chunk.chunk.first_row + 1) for chunk in chunks]
        assert [each is not None for each in first] == [True, True, True, False, False]


@pytest.mark.parametrize("harm", ["flip", "missing"])
def test_a_damaged_open_chunk_ends_the_start(tmp_path: Path, harm: str) -> None:
    job = small_chunks(lines_of(tmp_path, 25))
    with started(tmp_path / "run", job) as start:
        start.chunks.open_next()
        path = start.directory.input_of(0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content) if harm == "flip" else path.unlink()
    with (
        started(tmp_path / "run", job) as start,
        pytest.raises(CheckpointError, match=r"000000\.input\.arrow") as error,
    ):
        start.chunks.open_next()
    assert error.value.exit_code == ExitCode.DAMAGED


# ── an input that changes meanwhile ───────────────────────────────────────────────────────────────────────────────────


def edited(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"text", b"TEXT"))


def appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"text": "more"}\n')


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


@pytest.mark.parametrize("change", [edited, appended, replaced, Path.unlink])
def test_an_input_changed_midway_ends_the_run(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = lines_of(tmp_path, 45)
    with started(tmp_path / "run", small_chunks(path)) as start:
        assert start.chunks.open_next() is not None
        time.sleep(0.01)  # file systems keep times to a few milliseconds
        change(path)
        with pytest.raises(InputError, match="the input changed while the run works"):
            start.chunks.open_next()
        assert len(start.checkpoint.chunks()) == 1


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_random_kills_give_the_same_file(tmp_path: Path, kind: str) -> None:
    path = input_as(tmp_path, kind, texts(150))
    undisturbed, _ = finish(tmp_path / "undisturbed", small_chunks(path))
    moments, patience_s = level.seeded("test_random_kills_give_the_same_file"), 0.1
    for _ in range(40):
        with prefork.start("tests.chunk_starts", [str(tmp_path / "run"), str(path)], os.environ) as process:
            try:
                process.wait(moments.uniform(0, patience_s))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                patience_s *= 1.1  # a busy machine needs more
        if process.returncode == 0:
            break
    table, sent = finish(tmp_path / "run", small_chunks(path))
    assert table.equals(undisturbed), f"{level.replay()}"
    assert sent == [] or process.returncode != 0
