import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from batchrun.errors import BatchrunError, CheckpointError, DiskError, ExitCode, RunLockedError
from batchrun.money import to_usd
from batchrun.records import CompletionRecord, Discarded, Ending, PossiblyBilled, RowError, Status
from batchrun.store import db_tables
from batchrun.store.booking import answer_line, fold, possibly_billed, with_possibly_billed
from batchrun.store.checkpoint import FORMAT, Checkpoint, read_finished
from batchrun.store.commits import MAX_GROUP
from batchrun.store.database import _sqlite_errors
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.totals import Totals
from batchrun.tables.rows import OWN_COLUMNS
from tests import checkpoint_writer, level
from tests.endings import completion, discarded, stored_attempt
from tests.money import pico
from tests.random_endings import ENDINGS
from tests.unit.test_memory import resident_mb

pytestmark = pytest.mark.sampled(12)

SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=level.amount(6, 40)
)
WHOLE = Chunk(chunk=0, first_row=0, rows=100_000, end_position="{}", input_digest="")


@contextmanager
def opened(path: Path, *, finished: bool = False) -> Iterator[Checkpoint]:
    checkpoint = Checkpoint(path, free_reserve=lambda: False)
    try:
        yield checkpoint
    finally:
        checkpoint.close(finished=finished)


def put(checkpoint: Checkpoint, endings: Sequence[Ending]) -> None:
    for ending in endings:
        checkpoint.put(ending)
    assert checkpoint.flushed()


def everything(path: Path) -> tuple[object, ...]:
    """All that a checkpoint tells."""
    with opened(path) as checkpoint:
        return (
            checkpoint.manifest_entries(),
            checkpoint.chunks(),
            checkpoint.completions(0, 100_000),
            checkpoint.discarded(WHOLE),
            checkpoint.settled_rows(WHOLE),
            checkpoint.last_lost_attempts(WHOLE),
            checkpoint.totals,
        )


def filled(path: Path) -> Path:
    """A checkpoint with records in every table, closed."""
    with opened(path) as checkpoint:
        checkpoint.write_manifest({"manifest": '{"run_id":"1"}', "prices": "{}"})
        checkpoint.start_invocation(1_795_000_000.5, 4711, "here", "0.1.0")
        put(checkpoint, [completion(3)])
        checkpoint.seal_chunk(Chunk(0, 0, 50, '{"file":0}', "ab" * 16, 1, "cd" * 16, open=0), keep=[3])
        checkpoint.open_chunk(Chunk(1, 50, 50, '{"file":0}', "ef" * 16))
        error = RowError("bad_request", 400, "too_long", "the context is too long")
        endings: list[Ending] = [completion(row) for row in range(50, 70)]
        endings.append(completion(70, error=error, time_to_first_token_s=0.25, variant=1))
        endings += [discarded(row, 1, cost_pico_usd=None) for row in range(40, 60)]
        put(checkpoint, [*endings, discarded(71, maybe_billed=True, possibly_billed_pico_usd=pico("0.5"))])
        again = Chunk(0, 0, 50, '{"file":0}', "ab" * 16, 1, "cd" * 16)
        checkpoint.reopen_chunks([again], [reopened(3, 2, "ok")], {})
    return path


def reopened(row: int, attempts: int, status: str) -> Reopened:
    """A row that `completion` settled with this status, sent again by variant 1."""
    answer = answer_line(completion(row, status=Status(status)), 0)
    return Reopened(row, 1, attempts, status, None, msgspec.json.encode(answer).decode())


def unexpected(error: BatchrunError) -> None:
    raise error


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_columns_need_another_format_number() -> None:
    """A run that was started without a column has parts without it, which this version can't join with its own."""
    columns = "\n".join(f"{field.name} {field.type}" for field in OWN_COLUMNS)
    assert (FORMAT, sha256(columns.encode()).hexdigest()[:16]) == (9, "624c9c26a21ac12e")


@SHARED
@given(ENDINGS)
def test_every_field_of_a_result_round_trips(tmp_path: Path, endings: list[Ending]) -> None:
    path = tmp_path / "checkpoint.db"
    path.unlink(missing_ok=True)
    with opened(path) as checkpoint:
        put(checkpoint, endings)
        spent = checkpoint.totals
    with opened(path) as checkpoint:
        assert checkpoint.completions(0, 100) == [e for e in endings if isinstance(e, CompletionRecord)]
        assert checkpoint.discarded(WHOLE) == [stored_attempt(e) for e in endings if isinstance(e, Discarded)]
        assert checkpoint.settled_rows(WHOLE) == {e.row for e in endings if isinstance(e, CompletionRecord)}
        assert checkpoint.totals == spent
    doubts = [possibly_billed(ending, 0) for ending in endings if ending.maybe_billed]
    assert spent == with_possibly_billed(fold(Totals(), endings, 0), doubts)


def test_a_thousand_sparse_results_are_one_commit(tmp_path: Path) -> None:
    optional = {f.name: None for f in msgspec.structs.fields(CompletionRecord) if "None" in str(f.type)}
    endings = [completion(row, **optional, raw=b"", maybe_billed=True) for row in range(MAX_GROUP)]
    commits: list[int] = []
    gathered = threading.Event()

    def durable(endings: Sequence[Ending]) -> None:
        commits.append(len(endings))
        gathered.wait(10)

    with opened(tmp_path / "checkpoint.db") as checkpoint:
        checkpoint.listen(durable, unexpected)
        checkpoint.put(discarded(0))
        while not commits:
            time.sleep(0.001)
        for ending in endings:
            checkpoint.put(ending)
        gathered.set()
        assert checkpoint.flushed()
        assert checkpoint.completions(0, MAX_GROUP) == endings
        assert checkpoint.totals.possibly_billed_count == MAX_GROUP
    assert commits == [1, MAX_GROUP]


def test_endings_of_one_turn_share_a_commit(tmp_path: Path) -> None:
    commits: list[list[int]] = []
    later: list[Callable[[], None]] = []
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        checkpoint.listen(lambda endings: commits.append([each.row for each in endings]), unexpected, later.append)
        while not checkpoint._commits._idle:
            time.sleep(0.001)
        for row in range(3):
            checkpoint.put(completion(row))
            time.sleep(0.01)  # a thread that was woken by now has committed the first row alone
        (wake,) = later
        wake()
        assert checkpoint.flushed()
    assert commits == [[0, 1, 2]]


def test_any_number_of_totals_fits_one_commit(tmp_path: Path) -> None:
    many = 12_000  # SQLite takes 32,766 parameters in one statement
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        checkpoint.add_possibly_billed([PossiblyBilled(row, 1, "", None, 9, "crash", 1) for row in range(many)])
        put(checkpoint, [completion(row, answered_model=f"model-{row}") for row in range(many)])
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        assert checkpoint.totals.possibly_billed_count == many
        assert len(checkpoint.totals.answered_as) == many


def test_half_surrogates_cost_no_paid_row(tmp_path: Path) -> None:
    """They come from headers and error texts."""
    error = RowError("reset", None, "\udcff", "\ud800 came")
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        put(checkpoint, [completion(0, request_id="a\udcff", error=error), discarded(1, message="\udfff")])
        (kept,) = checkpoint.completions(0, 1)
        assert (kept.request_id, kept.error) == ("a\ufffd", RowError("reset", None, "\ufffd", "\ufffd came"))
        assert [attempt.message for attempt in checkpoint.discarded(WHOLE)] == ["\ufffd"]


def test_an_unstorable_value_stops_the_run(tmp_path: Path) -> None:
    """Nothing hangs."""
    failures: list[BatchrunError] = []
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        checkpoint.listen(lambda endings: pytest.fail("nothing is durable"), failures.append)
        checkpoint.put(completion(0, attempts=2**63))
        assert not checkpoint.flushed()
        assert checkpoint.broken
    assert "OverflowError" in str(failures[0])
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        assert checkpoint.totals == Totals()


def test_reads_see_all_earlier_writes(tmp_path: Path) -> None:
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        for row in range(2500):
            checkpoint.put(completion(row))
            if row % 500 == 499:
                assert checkpoint.settled_rows(WHOLE) == set(range(row + 1))


def test_the_manifest_keeps_the_last_value(tmp_path: Path) -> None:
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        checkpoint.write_manifest({"a": "1", "b": "2"})
        checkpoint.write_manifest({"b": "3"})
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        assert checkpoint.manifest_entries() == {"a": "1", "b": "3"}


def test_each_invocation_has_the_next_number(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with opened(tmp_path / "checkpoint.db") as checkpoint:
            assert checkpoint.start_invocation(0.0, os.getpid(), "here", "0") == number == checkpoint.invocation


def test_sealing_a_chunk_takes_only_its_rows(tmp_path: Path) -> None:
    chunk = Chunk(1, 10, 10, "{}", "ab")
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        put(checkpoint, [*(completion(row) for row in range(30)), discarded(12)])
        spent = checkpoint.totals
        checkpoint.open_chunk(chunk)
        checkpoint.seal_chunk(msgspec.structs.replace(chunk, generation=1, part_digest="cd"))
        assert checkpoint.settled_rows(WHOLE) == {*range(10), *range(20, 30)}
        assert len(checkpoint.discarded(WHOLE)) == 1  # the bill needs them for ever
        assert checkpoint.chunks() == [Chunk(1, 10, 10, "{}", "ab", 1, "cd")]
        assert checkpoint.totals == spent


def test_every_result_is_recognised_when_stored(tmp_path: Path) -> None:
    """By its row and attempt, as a possibly billed attempt, or by its sealed chunk."""
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        put(checkpoint, [completion(0, attempts=2), discarded(1, 3)])
        checkpoint.add_possibly_billed([PossiblyBilled(2, 4, "", None, 9, "crash", 1)])
        checkpoint.open_chunk(Chunk(0, 10, 5, "{}", "ab", 1, "cd", open=0))
        checkpoint.open_chunk(Chunk(1, 15, 5, "{}", "ab"))
        known = [(0, 1), (0, 2), (1, 3), (2, 4), (10, 1), (14, 9)]
        unknown = [(0, 3), (1, 2), (1, 4), (2, 5), (3, 1), (9, 1), (15, 1)]
        assert [checkpoint.has_end(*attempt) for attempt in known] == [True] * len(known)
        assert [checkpoint.has_end(*attempt) for attempt in unknown] == [False] * len(unknown)
        assert checkpoint.last_lost_attempts(WHOLE) == {2: 4}


def test_a_reopened_row_is_pending_until_resealed(tmp_path: Path) -> None:
    """The better of two results is kept."""
    path = tmp_path / "checkpoint.db"
    with opened(path) as checkpoint:
        chunk = Chunk(0, 0, 3, "{}", "ab")
        checkpoint.open_chunk(chunk)
        statuses = {0: Status.OK, 1: Status.TRUNCATED, 2: Status.ERROR}
        put(checkpoint, [completion(row, status=status) for row, status in statuses.items()])
        sealed = msgspec.structs.replace(chunk, generation=1, part_digest="cd", open=0)
        checkpoint.seal_chunk(sealed)
        assert checkpoint.totals.standing == {"ok": 1, "truncated": 1, "error": 1}
        rows = [reopened(1, 1, "truncated"), reopened(2, 4, "error")]
        checkpoint.write_manifest({"finished": "{}"})
        checkpoint.reopen_chunks([msgspec.structs.replace(sealed, open=1)], rows, {"variants": "[]"})
        assert checkpoint.manifest_entries() == {"variants": "[]"}
        assert checkpoint.totals.settled() == 1
        assert checkpoint.reopened(chunk) == {1: rows[0], 2: rows[1]}
        put(checkpoint, [completion(1, status=Status.ERROR, attempts=2), completion(2, status=Status.OK, attempts=5)])
        checkpoint.seal_chunk(msgspec.structs.replace(sealed, generation=2))
        assert checkpoint.reopened(chunk) == {}
        standing = {status: rows for status, rows in checkpoint.totals.standing.items() if rows}
        assert standing == {"ok": 2, "truncated": 1}
    with opened(path) as checkpoint:
        assert {status: rows for status, rows in checkpoint.totals.standing.items() if rows} == standing


def test_rows_that_are_reopened_are_not_in_memory(tmp_path: Path) -> None:
    """The failures of a large run: 30,000 of them would be some 30 MB."""
    rows, before = 30_000, resident_mb()
    template = reopened(0, 1, "error")
    with opened(tmp_path / "checkpoint.db") as checkpoint:
        again = Chunk(0, 0, rows, "{}", "ab", 1, "cd")
        one_by_one = (
            msgspec.structs.replace(template, row=row, answer=f"{template.answer}{' ' * 200}") for row in range(rows)
        )
        checkpoint.reopen_chunks([again], one_by_one, {})
        assert resident_mb() - before < 15
        assert checkpoint.totals.standing == {"error": -rows}
        assert checkpoint.has_reopened


# ── all or nothing ────────────────────────────────────────────────────────────────────────────────────────────────────


def require_consistent(path: Path, durable: set[int]) -> None:
    """Every row that was reported durable is there, no other is counted, and the totals are the sum of the rows."""
    with opened(path) as checkpoint:
        rows = checkpoint.completions(0, 10_000_000)
        assert durable <= {row.row for row in rows}
        lines = checkpoint.totals.booked.values()
        assert sum(line.rows for line in lines) == len(rows)
        assert checkpoint.totals.cost_usd() == to_usd(sum(row.cost_pico_usd or 0 for row in rows))


@pytest.mark.heavy
def test_durable_rows_survive_kill_9(tmp_path: Path) -> None:
    moments = level.seeded("test_durable_rows_survive_kill_9")
    durable: set[int] = set()
    for _ in range(6):
        with checkpoint_writer.start(tmp_path / "checkpoint.db") as process:
            assert process.stdout is not None
            durable |= {int(row) for row in process.stdout.readline().split()}
            time.sleep(moments.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            whole_lines = process.stdout.read().rpartition("\n")[0]  # the last one may be cut
        durable |= {int(row) for row in whole_lines.split()}
        require_consistent(tmp_path / "checkpoint.db", durable)
    assert len(durable) > 500, f"{level.replay()}"


def test_a_refused_write_is_reported(tmp_path: Path) -> None:
    """Nothing that was lost had been reported as durable."""
    path = tmp_path / "checkpoint.db"
    with checkpoint_writer.start(path, MAX_FILE_BYTES="300000") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.startswith(f"DiskError: {path}: has the largest size that this process may write; ")
    durable = {int(row) for row in out.split()}
    assert durable
    require_consistent(path, durable)


TINY_DISK = """
mount -t tmpfs -o size=2m tiny "$1" || exit 75
cd "$2" && "$3" -m tests.checkpoint_writer "$1/checkpoint.db"
cp "$1"/checkpoint.db* "$4"
"""


def test_a_full_disk_uses_the_reserve_first(tmp_path: Path) -> None:
    """Then the run ends."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    inside = ["sh", "-c", TINY_DISK, "sh", str(disk), str(Path.cwd()), sys.executable, str(copy)]
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    reserve = {"RESERVE": str(disk / "reserve.bin")}
    done = subprocess.run([*unshare, *inside], capture_output=True, text=True, env=os.environ | reserve, check=False)
    if done.returncode == 75 or "unshare" in done.stderr:
        pytest.skip(f"this kernel refuses to mount a small disk: {done.stderr.strip()}")
    full = f"DiskError: {disk}/checkpoint.db: the disk is full; make room and run the same command again"
    *freed, spilled = done.stderr.splitlines()
    assert freed == ["reserve freed", full, full]
    assert spilled.startswith(f"DiskError: {disk}/spill.bin: No space left on device")
    durable = {int(row) for row in done.stdout.split()}
    assert durable
    require_consistent(copy / "checkpoint.db", durable)


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def columns() -> list[tuple[str, str]]:
    """Every column of every table."""
    database = sqlite3.connect(":memory:")
    database.executescript(db_tables.TABLES)
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = [(name, info[1]) for name in names for info in database.execute(f"PRAGMA table_info({name})")]
    database.close()
    return found


@pytest.mark.parametrize(("table", "column"), columns())
def test_a_changed_field_of_any_table_is_named(tmp_path: Path, table: str, column: str) -> None:
    path = filled(tmp_path / "checkpoint.db")
    with sqlite3.connect(path) as database:
        (kind,) = database.execute(f"SELECT typeof({column}) FROM {table} LIMIT 1").fetchone()
        other = {
            "integer": f"{column} + 1000000",
            "real": f"{column} * 2",
            "null": "7",
            "blob": f"CAST({column} || 'x' AS BLOB)",
        }.get(kind, f"{column} || 'x'")
        one = f"SELECT {column} FROM {table} ORDER BY 1 DESC LIMIT 1"
        database.execute(f"UPDATE {table} SET {column} = {other} WHERE {column} IS ({one})")
    database.close()
    with pytest.raises(CheckpointError, match=f"damaged: table {table}") as error:
        everything(path)
    assert error.value.exit_code == ExitCode.DAMAGED


@pytest.mark.heavy
def test_a_flipped_bit_is_reported_or_harmless(tmp_path: Path) -> None:
    path = filled(tmp_path / "checkpoint.db")
    content, before = path.read_bytes(), everything(path)
    places = level.seeded("test_a_flipped_bit_is_reported_or_harmless")
    reported = silent = 0
    for place in [*range(100), *(places.randrange(len(content)) for _ in range(500))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << places.randrange(8)
        path.write_bytes(flipped)
        try:
            assert everything(path) == before, f"byte {place}, {level.replay()}"
        except CheckpointError as error:
            reported += error.exit_code == ExitCode.DAMAGED
        else:
            silent += 1
    assert reported + silent == 600, f"{level.replay()}"
    assert reported > 50


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_cut_file_is_reported(tmp_path: Path, kept: float) -> None:
    path = filled(tmp_path / "checkpoint.db")
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(CheckpointError) as error:
        everything(path)
    assert error.value.exit_code == ExitCode.DAMAGED


def test_another_versions_file_is_refused_with_its_number(tmp_path: Path) -> None:
    path = filled(tmp_path / "checkpoint.db")
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {FORMAT + 1}")
    database.close()
    for read in (everything, read_finished):
        with pytest.raises(CheckpointError, match=rf"another version of batchrun \(format {FORMAT + 1}, ") as error:
            read(path)
        assert error.value.exit_code == ExitCode.DAMAGED


@pytest.mark.parametrize("place", [18, 19])
def test_a_damaged_format_number_is_damage(place: int, tmp_path: Path) -> None:
    """SQLite opens a file of a newer format for reading only. That is no disk that refuses a write."""
    path = tmp_path / "checkpoint.db"
    with opened(path, finished=True) as checkpoint:
        put(checkpoint, [completion(0)])
    content = path.read_bytes()
    for bit in range(2, 8):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=": damaged") as raised, opened(path):
            pass
        assert not isinstance(raised.value, DiskError)


def test_a_deleted_database_is_the_disks_failure(tmp_path: Path) -> None:
    """SQLite calls it read-only, as it does a file of a newer format, and there is no header to read."""
    path = tmp_path / "checkpoint.db"
    with opened(path) as checkpoint:
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY_DBMOVED
        path.unlink()
        with pytest.raises(DiskError), _sqlite_errors(path):
            raise error
        assert checkpoint.chunks() == []


def test_a_file_without_database_is_damage(tmp_path: Path) -> None:
    """It is not reported as an error of the disk."""
    path = tmp_path / "checkpoint.db"
    path.write_text("dear diary, " * 1000)
    with pytest.raises(CheckpointError) as error:
        everything(path)
    assert error.value.exit_code == ExitCode.DAMAGED


def test_a_file_in_use_is_no_damage(tmp_path: Path) -> None:
    path = filled(tmp_path / "checkpoint.db")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunLockedError, match="another program has it open"):
        everything(path)
    other.close()
    everything(path)


def test_an_impossible_place_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="unable to open"):
        everything(tmp_path / "missing" / "checkpoint.db")


# ── a finished run ────────────────────────────────────────────────────────────────────────────────────────────────────


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in folder.iterdir()}


def test_reading_a_finished_run_touches_no_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.db"
    with opened(path, finished=True) as checkpoint:
        checkpoint.write_manifest({"manifest": "{}"})
        put(checkpoint, [completion(0)])
    before, folder = state_of(tmp_path), tmp_path.stat().st_mtime_ns
    assert list(before) == ["checkpoint.db"]
    assert read_finished(path) == {"manifest": "{}"}
    assert (state_of(tmp_path), tmp_path.stat().st_mtime_ns) == (before, folder)


def test_a_finished_run_is_readable_without_writing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.db"
    with opened(path, finished=True) as checkpoint:
        checkpoint.write_manifest({"manifest": "{}"})
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o400)
    assert read_finished(path) == {"manifest": "{}"}


def test_damage_in_a_finished_manifest_is_reported(tmp_path: Path) -> None:
    path = filled(tmp_path / "checkpoint.db")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE manifest SET value = '{}' WHERE name = 'manifest'")
    database.close()
    with pytest.raises(CheckpointError, match="table manifest, record 'manifest'"):
        read_finished(path)


def test_a_finished_run_can_be_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.db"
    with opened(path, finished=True) as checkpoint:
        put(checkpoint, [completion(0)])
    with opened(path) as checkpoint:
        put(checkpoint, [completion(1)])
    with opened(path) as checkpoint:
        assert checkpoint.settled_rows(WHOLE) == {0, 1}


def test_a_commit_is_visible_to_other_processes(tmp_path: Path) -> None:
    path, copy = tmp_path / "checkpoint.db", tmp_path / "copy.db"
    with opened(path) as checkpoint:

        def copied(endings: Sequence[Ending]) -> None:
            for name in ("checkpoint.db", "checkpoint.db-wal"):
                shutil.copy(tmp_path / name, tmp_path / name.replace("checkpoint", "copy"))

        checkpoint.listen(copied, unexpected)
        put(checkpoint, [completion(0)])
        with opened(copy) as other:
            assert other.completions(0, 1) == [completion(0)]
