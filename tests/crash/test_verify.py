"""A flipped bit of a run directory is named or harmless; salvage keeps what is intact, and the rest is sent again."""

import csv
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.durable import digest
from batchrun.errors import CheckpointError, ExitCode, InputError, JobError
from batchrun.integrity import damaged_db, db_records, readable_groups
from batchrun.integrity.findings import Findings, in_words
from batchrun.integrity.salvage import LOST, NAME, salvage
from batchrun.integrity.verify import verify
from batchrun.run_summary import Summary
from batchrun.simulator import Fault, SimulatorConfig, parse_faults
from batchrun.store import db_tables, in_flight, spill
from batchrun.store.at_rest import wal_of
from batchrun.store.checkpoint import FORMAT
from batchrun.store.database import Database
from batchrun.store.rundir import RunDirectory
from tests import level, structure
from tests.cli_process import (
    Ended,
    batchrun,
    kill_when,
    read_summary,
    snapshot,
    start,
    write_job,
    write_rows,
)
from tests.run_copies import Runs
from tests.simulator_process import RunningSimulator, running_simulator

ROWS = 320
SAME = ["id", "text", "score", "row", "request_key", "status", "content", "finish_reason"]
"""The columns in which a disturbed run equals an undisturbed one."""

MORE = """
[limits]
max_in_flight = 16

[output]
chunk_rows = 40
layout = "{layout}"
"""

PAGE_ROWS = 16
"""More records of this run than fit into one page."""

NO_SECOND_SOURCE = (
    *("updated_at", "limits", "command", "requests_per_minute", "elapsed_s", "rows_per_minute", "tokens_per_minute"),
    "last_answer_at",
)
"""Fields of summary.json that nothing else can vouch for, but for two rates to their rounding."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A finished run, one killed, one killed in its retry, and one in parts."""
    folder = tmp_path_factory.mktemp("runs")
    source = write_rows(folder / "in.jsonl", ROWS)
    faults = (
        Fault(kind="status", status=500, share=0.03, times=1, per_question=True),
        *parse_faults("content_policy=0.02"),
    )
    with running_simulator(SimulatorConfig(latency_s=0.01, faults=faults, ledger=str(folder / "ledger"))) as simulator:
        for layout in ("file", "parts"):
            write_job(folder / f"{layout}.toml", simulator.url, source, MORE.format(layout=layout))
        for name, layout in (("done", "file"), ("in-parts", "parts")):
            ended = batchrun("run", folder / f"{layout}.toml", "-o", folder / name)
            assert ended.exit_code == 0, ended.stderr
        shutil.copytree(folder / "done", folder / "retried")
        retry = ["--retry-failed", "--status", "truncated", "--set", "request.max_tokens=41"]
        for wanted in itertools.count(2):  # until a kill finds requests in flight: on a busy machine all had just ended
            _kill(folder, "killed", functools.partial(_has_parts, folder / "killed", wanted))
            flying = {(entry.row, entry.n) for entry in in_flight.read(folder / "killed" / "inflight.bin")}
            known = db_records.read(folder / "killed" / "checkpoint.db")
            if flying - {(row.row, row.attempts) for row in known.rows.values()}:
                break
        before = len(simulator.ledger())
        _kill(folder, "retried", lambda: len(simulator.ledger()) >= before + 40, *retry)
        undisturbed = pq.read_table(folder / "done" / "completions.parquet")
        _come_to_rest(simulator)
        yield Runs(folder, simulator, undisturbed)


def _come_to_rest(simulator: RunningSimulator) -> None:
    """What the killed processes had sent has been served: the ledger grows no more."""
    served = -1
    while served != (served := len(simulator.ledger())):
        time.sleep(0.3)


def _has_parts(out: Path, count: int) -> bool:
    return len(list((out / "parts").glob("*.g1.parquet"))) >= count


def _kill(folder: Path, name: str, condition: Callable[[], bool], *flags: str) -> None:
    process = start("run", folder / "file.toml", "-o", folder / name, *flags)
    kill_when(process, condition)
    process.communicate()
    (folder / name / "reserve.bin").unlink()


def flip(path: Path, place: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def middle_of(path: Path) -> int:
    return path.stat().st_size // 2


def last_of_a_page(path: Path) -> int:
    """The place of a byte that its page's checksum covers: the last of the first row group's answers. The file's middle
    may as well be of an input column, whose damage costs no row.
    """
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(number) for number in range(group.num_columns)]
    content = next(chunk for chunk in chunks if chunk.path_in_schema == "content")
    start: int = content.dictionary_page_offset or content.data_page_offset
    return start + content.total_compressed_size - 1


def damaged_files(findings: Findings) -> set[str]:
    return {damage.file for damage in findings.damages}


# ── what is sound ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["done", "killed", "retried", "in-parts"])
def test_a_sound_run_is_reported_and_untouched(runs: Runs, name: str) -> None:
    before, folder = snapshot(runs.folder / name), (runs.folder / name).stat().st_mtime_ns
    served = len(runs.simulator.ledger())
    ended = batchrun("verify", runs.folder / name)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "nothing is damaged" in ended.stdout
    assert (snapshot(runs.folder / name), (runs.folder / name).stat().st_mtime_ns) == (before, folder)
    assert len(runs.simulator.ledger()) == served


def test_the_killed_run_has_every_kind_of_file(runs: Runs) -> None:
    names = {path.name for path in (runs.folder / "killed").rglob("*")}
    assert {"checkpoint.db", "checkpoint.db-wal", "inflight.bin", "000000.g1.parquet"} <= names
    assert any(name.endswith(".input.arrow") for name in names)
    known = db_records.read(runs.folder / "killed" / "checkpoint.db")
    assert known.rows
    assert db_records.read(runs.folder / "retried" / "checkpoint.db").reopened


def test_a_run_at_work_is_left_alone(runs: Runs) -> None:
    directory = RunDirectory(runs.folder / "done")
    with directory.lock():
        assert batchrun("verify", directory.path).exit_code == ExitCode.LOCKED


def test_where_no_run_is_that_is_said(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="no run here"):
            verify(RunDirectory(place))


# ── flipped bits ──────────────────────────────────────────────────────────────────────────────────────────────────────


def files_of(directory: RunDirectory) -> list[Path]:
    """What must not change unnoticed: all but the log, which is for people, and what the next start removes (parts and
    inputs that no record names, files half written) or replaces (the result of before).
    """
    known = db_records.read(directory.checkpoint)
    named = {directory.part_of(chunk.chunk, chunk.generation) for chunk in known.chunks}
    named |= {directory.input_of(chunk.chunk) for chunk in known.chunks if chunk.open}
    aside = {directory.log, *((directory.completions, directory.usage) if directory.inflight.exists() else ())}
    files = (
        path for path in directory.path.rglob("*") if path.is_file() and path not in aside and path.suffix != ".tmp"
    )
    return sorted(path for path in files if path in named or path.parent != directory.parts)


def state_of(directory: RunDirectory) -> tuple[object, ...]:
    """All that a start would work by, and every output."""
    finished = not directory.inflight.exists()
    digests = {path.name: digest(path) for path in files_of(directory) if path.suffix in (".parquet", ".arrow")}
    summary: object = None
    if finished:  # elsewhere the next start writes it again
        reported = msgspec.json.decode(directory.summary.read_bytes(), type=Summary)
        summary = {name: getattr(reported, name) for name in Summary.__struct_fields__ if name not in NO_SECOND_SOURCE}
    return db_records.read(directory.checkpoint), in_flight.read(directory.inflight), digests, summary


def settled(state: tuple[object, ...]) -> int:
    known = state[0]
    assert isinstance(known, db_records.DbRecords)
    return known.totals.settled()


@pytest.mark.heavy
@pytest.mark.campaign
@pytest.mark.parametrize(("name", "most"), [("done", 300), ("killed", 200), ("retried", 100)])
def test_a_flipped_bit_is_named_or_harmless(runs: Runs, tmp_path: Path, name: str, most: int) -> None:
    flips = level.amount(most // 5, most)
    directory = runs.copy(name, tmp_path / "run")
    files, before = files_of(directory), state_of(directory)
    chance = level.seeded("test_a_flipped_bit_is_named_or_harmless")
    named = 0
    for path, place in structure.chosen(files, chance, flips):
        bit, content = chance.randrange(8), path.read_bytes()
        flip(path, place, bit)
        if verify(directory).damages:
            named += 1
        else:
            after = state_of(directory)
            what = f"{path.name}, byte {place}, bit {bit}, {level.replay()}"
            if path.name.endswith("-wal"):  # the last commit may be taken for one that a power cut tore
                assert settled(before) - settled(after) <= 16, what
            else:
                assert after == before, what
        path.write_bytes(content)
    assert named > flips // 3
    assert not verify(directory).damages


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["done", "killed"])
def test_a_start_over_a_flipped_bit_is_safe(runs: Runs, tmp_path: Path, name: str) -> None:
    """It exits with 7 or as if nothing had happened."""
    chance = level.seeded("test_a_start_over_a_flipped_bit_is_safe")
    for number in range(6):
        directory = runs.copy(name, tmp_path / str(number))
        ((path, place),) = structure.chosen(files_of(directory), chance, 1)
        flip(path, place)
        damages, what = verify(directory).damages, f"{path.name}, byte {place}, {level.replay()}"
        try:
            assert runs.resume(directory).complete, what
        except CheckpointError:  # exit 7
            assert damages, what
            continue
        if name == "done" and path == directory.completions:  # a finished run is not read again
            assert damages, what
            continue
        output = pq.read_table(directory.completions, columns=SAME)
        assert output.equals(runs.undisturbed.select(SAME)), what


@pytest.mark.parametrize(
    ("name", "file", "place_in"),
    [
        ("done", "completions.parquet", last_of_a_page),
        ("killed", "checkpoint.db-wal", middle_of),
        ("killed", "parts/000000.g1.parquet", last_of_a_page),
    ],
)
def test_verify_names_file_rows_and_cost(
    runs: Runs, tmp_path: Path, name: str, file: str, place_in: Callable[[Path], int]
) -> None:
    """It exits with 7 and shows no traceback."""
    directory = runs.copy(name, tmp_path / "run")
    flip(directory.path / file, place_in(directory.path / file))
    before = snapshot(directory.path)
    ended = batchrun("verify", directory.path)
    assert (ended.exit_code, ended.stderr) == (7, "")
    assert f"damaged  {file}: " in ended.stdout
    assert " of $0." in ended.stdout.splitlines()[-1]
    if file.endswith(".parquet"):
        assert "rows 0 to " in ended.stdout
    assert snapshot(directory.path) == before


# ── other damage ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["done", "killed", "in-parts"])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.99])
def test_a_file_that_was_cut_is_named(runs: Runs, tmp_path: Path, name: str, kept: float) -> None:
    directory = runs.copy(name, tmp_path / "run")
    before = state_of(directory)
    for path in files_of(directory):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        if path.name.endswith("-wal"):  # a power cut may leave a log of any length
            verify(directory)
        elif path.name == "inflight.bin" and kept and not int(len(content) * kept) % in_flight.SLOT_BYTES:
            pass
        elif not verify(directory).damages:  # a database whose pages are all in its log, or free
            assert state_of(directory) == before, path.name
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["done", "killed", "in-parts"])
def test_a_missing_file_is_named(runs: Runs, tmp_path: Path, name: str) -> None:
    directory = runs.copy(name, tmp_path / "run")
    for path in files_of(directory):
        if path.name.endswith("-wal"):
            continue  # a run without a log looks like one that lost it
        aside = path.rename(tmp_path / "aside")
        assert path.name in {Path(file).name for file in damaged_files(verify(directory))}
        aside.rename(path)


def test_a_lost_checkpoint_leaves_the_bill(runs: Runs, tmp_path: Path) -> None:
    """The result or the summary still has it."""
    directory = runs.copy("done", tmp_path / "run")
    bill = Decimal(read_summary(directory.path)["cost_usd"])
    directory.checkpoint.unlink()
    for place in ("completions.parquet", "summary.json"):
        found = verify(directory)
        assert f"{place}: {ROWS} rows, ${bill:,.6f}, with no other record to check it" in found.sound
        assert list(in_words(found))[-1] == f"1 damage: 0 rows and $0.000000 of ${bill:,.6f} can't be read"
        directory.completions.unlink(missing_ok=True)


def test_an_unreadable_summary_is_damage(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("done", tmp_path / "run")
    for content in (b'{"job', b"", b"[]", b"\xff\xfe"):
        directory.summary.write_bytes(content)
        ended = batchrun("status", directory.path)
        assert ended.exit_code == 7
        assert f"{directory.summary}: damaged, or of another version of batchrun" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def result_and_start(runs: Runs, directory: RunDirectory, layout: str) -> tuple[Path, Callable[[], Ended]]:
    """A file of the complete run's result, and what starts the run's command once more."""
    result = directory.completions if layout == "file" else sorted(directory.completions_folder.glob("*.parquet"))[1]
    return result, lambda: batchrun("run", runs.folder / f"{layout}.toml", "-o", directory.path)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "layout"), [("done", "file"), ("in-parts", "parts")])
def test_a_partial_result_is_not_complete_again(runs: Runs, tmp_path: Path, name: str, layout: str) -> None:
    directory, served = runs.copy(name, tmp_path / "run"), len(runs.simulator.ledger())
    result, again = result_and_start(runs, directory, layout)
    assert again().exit_code == 0
    for path in (result, directory.usage):
        content = path.read_bytes()
        path.write_bytes(content[:-9])
        ended = again()
        assert (ended.exit_code, str(path) in ended.stderr, len(ended.stderr.splitlines())) == (7, True, 1)
        path.unlink()
        ended = again()
        assert (ended.exit_code, len(ended.stderr.splitlines())) == (7, 1)
        assert "is missing, though the run is complete; restore it" in ended.stderr or "the result has" in ended.stderr
        path.write_bytes(content)
    content = directory.checkpoint.read_bytes()
    for left in (b"", None):
        directory.checkpoint.unlink()
        if left is not None:
            directory.checkpoint.write_bytes(left)
        ended = again()
        assert (ended.exit_code, f"{directory.checkpoint}: missing or empty" in ended.stderr) == (7, True)
        directory.checkpoint.write_bytes(content)
    assert again().exit_code == 0
    assert len(runs.simulator.ledger()) == served


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "layout"), [("done", "file"), ("in-parts", "parts")])
def test_a_changed_result_is_noticed_by_stat(runs: Runs, tmp_path: Path, name: str, layout: str) -> None:
    """A start over a complete run compares its size and time."""
    directory, served = runs.copy(name, tmp_path / "run"), len(runs.simulator.ledger())
    result, again = result_and_start(runs, directory, layout)
    for path in (result, directory.usage):
        before, content = path.stat(), path.read_bytes()
        flip(path, len(content) // 3)
        ended = again()
        assert (ended.exit_code, len(ended.stderr.splitlines())) == (7, 1)
        assert f"{path} was changed after it was written; restore it" in ended.stderr
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # bits that rot change neither size nor time
        assert again().exit_code == 0
        assert batchrun("verify", directory.path).exit_code == 7
        path.write_bytes(content)  # a copy has another time, and the same bytes
        assert again().exit_code == 0
        path.write_bytes(content[:4] + content)
        ended = again()
        assert (ended.exit_code, len(ended.stderr.splitlines())) == (7, 1)
        path.write_bytes(content)
    assert len(runs.simulator.ledger()) == served


def test_another_versions_run_is_named_as_such(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("done", tmp_path / "run")
    flip(directory.checkpoint, 63)  # `PRAGMA user_version` is bytes 60 to 63
    (damage,) = verify(directory).damages
    assert "of another version of batchrun" in damage.what


def test_files_of_two_runs_are_not_confused(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("done", tmp_path / "run")
    shutil.copy(runs.folder / "in-parts" / "summary.json", directory.summary)
    assert damaged_files(verify(directory)) == {"summary.json"}


@pytest.mark.parametrize(
    ("field", "value"), [("cost_usd", "0.1"), ("rows", 7), ("complete", True), ("by_status", {"ok": 320}), ("pid", 1)]
)
def test_summary_and_checkpoint_agree_in_every_figure(runs: Runs, tmp_path: Path, field: str, value: object) -> None:
    directory = runs.copy("done", tmp_path / "run")
    reported: dict[str, Any] = msgspec.json.decode(directory.summary.read_bytes())
    reported[field] = value
    directory.summary.write_bytes(msgspec.json.format(msgspec.json.encode(reported), indent=2))
    expected = set() if field == "complete" else {"summary.json"}
    assert damaged_files(verify(directory)) == expected


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────────


def kept_rows(directory: RunDirectory) -> pa.Table:
    return pq.read_table(directory.path.with_name(directory.path.name + ".salvaged") / NAME)


def answered(known: db_records.DbRecords) -> set[int]:
    sealed = [row for chunk in known.chunks if not chunk.open for row in range(chunk.first_row, chunk.end_row)]
    return {*known.rows, *sealed}


def finishes_as_if_undisturbed(runs: Runs, directory: RunDirectory, expected: set[int]) -> None:
    """Resuming the salvaged run sends these rows only, and gives the output of an undisturbed run."""
    salvaged = RunDirectory(directory.path.with_name(directory.path.name + ".salvaged"))
    assert not verify(salvaged).damages
    before = len(runs.simulator.ledger())
    assert runs.resume(salvaged).complete
    assert pq.read_table(salvaged.completions, columns=SAME).equals(runs.undisturbed.select(SAME))
    assert {int(str(line.client_request_id).split("-")[1]) for line in runs.simulator.ledger()[before:]} == expected
    assert not verify(salvaged).damages


def test_of_a_sound_run_nothing_is_salvaged(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("done", tmp_path / "run")
    assert salvage(directory)[1] is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_part_costs_its_rows_only(runs: Runs, tmp_path: Path) -> None:
    """Only those are sent again."""
    directory = runs.copy("killed", tmp_path / "run")
    known = db_records.read(directory.checkpoint)
    part = next(chunk for chunk in known.chunks if not chunk.open)
    path = directory.part_of(part.chunk, part.generation)
    flip(path, last_of_a_page(path))
    before = snapshot(directory.path)
    findings, salvaged = salvage(directory)
    assert snapshot(directory.path) == before
    assert salvaged is not None
    span = range(part.first_row, part.end_row)
    assert [damage.rows for damage in findings.damages] == [((span.start, span.stop),)]
    assert findings.cost_usd is not None
    kept = kept_rows(directory)
    rows = set(kept.column("row").to_pylist())
    assert answered(known) - set(span) <= rows <= answered(known)  # the log may still have rows of the part
    assert equal_to_the_undisturbed(runs, kept)
    finishes_as_if_undisturbed(runs, directory, set(range(ROWS)) - rows)


def equal_to_the_undisturbed(runs: Runs, kept: pa.Table) -> bool:
    """Row by row, in the columns in which two runs are equal."""
    rows = kept.column("row").to_pylist()
    return kept.select(SAME).to_pylist() == runs.undisturbed.select(SAME).take(pa.array(rows)).to_pylist()


HARMS: dict[str, Callable[[Path], object]] = {
    "the header": lambda path: flip(path, 3),
    "the schema": lambda path: flip(path, 200),
    "the format": lambda path: flip(path, 62),
    "every fifth page": lambda path: path.write_bytes(scratched(path.read_bytes(), 5 * 4096)),
}


def scratched(content: bytes, every: int) -> bytes:
    """The content with eight bytes overwritten, again and again."""
    harmed = bytearray(content)
    for place in range(every // 2, len(harmed) - 8, every):
        harmed[place : place + 8] = b"scratch!"
    return bytes(harmed)


@pytest.mark.heavy
@pytest.mark.parametrize("harm", HARMS)
def test_salvage_keeps_every_whole_record(runs: Runs, tmp_path: Path, harm: str) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    known = db_records.read(directory.checkpoint)
    HARMS[harm](directory.checkpoint)
    HARMS[harm](wal_of(directory.checkpoint))
    findings, salvaged = salvage(directory)
    assert findings.damages
    assert salvaged is not None
    assert salvaged.problem is None
    kept = kept_rows(directory)
    rows = set(kept.column("row").to_pylist())
    if harm == "every fifth page":
        assert answered(known) - set(known.rows) <= rows <= answered(known)
    else:
        assert rows == answered(known)
    assert equal_to_the_undisturbed(runs, kept)
    finishes_as_if_undisturbed(runs, directory, set(range(ROWS)) - rows)


def test_a_damaged_log_costs_one_page(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    known, log = db_records.read(directory.checkpoint), wal_of(directory.checkpoint)
    content, chance = log.read_bytes(), level.seeded("test_a_damaged_log_costs_one_page")
    for _ in range(15):
        flip(log, place := chance.randrange(len(content)), chance.randrange(8))
        left = db_records.readable(directory.checkpoint)
        assert len(known.rows.keys() - left.rows.keys()) <= PAGE_ROWS, f"byte {place}, {level.replay()}"
        same = [row for row in known.rows.keys() & left.rows.keys() if known.rows[row] == left.rows[row]]
        assert len(same) == len(known.rows.keys() & left.rows.keys())
        log.write_bytes(content)


def test_damaged_pages_cost_only_their_records(tmp_path: Path) -> None:
    """A database of many pages: ranges of keys around the damage are read."""
    path, rows = tmp_path / "checkpoint.db", 3_000
    database = Database.open(path, db_tables.TABLES, FORMAT, lambda full: False)
    database.transaction(
        lambda: database.insert("rows", [(row, 1, bytes([row % 251]) * 700, 1) for row in range(rows)])
    )
    database.leave_wal()
    database.close()
    leaves = [place for place in range(12 * 4096, path.stat().st_size, 4096) if path.read_bytes()[place] == 0x0D]
    for place in leaves[:: len(leaves) // 20][:20]:
        flip(path, place, 7)
    found = {record[0] for _, record in damaged_db.records(path.read_bytes(), b"", db_tables.TABLES, FORMAT)}
    assert rows - 20 * 6 <= len(found) < rows


def test_a_lost_slot_file_costs_no_row(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    known = db_records.read(directory.checkpoint)
    directory.inflight.unlink()
    findings, salvaged = salvage(directory)
    assert damaged_files(findings) == {"inflight.bin"}
    assert salvaged is not None
    assert salvaged.rows == len(answered(known))
    finishes_as_if_undisturbed(runs, directory, set(range(ROWS)) - answered(known))


def test_salvage_names_requests_in_flight(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    known, flying = db_records.read(directory.checkpoint), in_flight.read(directory.inflight)
    flip(wal_of(directory.checkpoint), 5000)
    salvage(directory)
    ended = {(row.row, row.attempts) for row in known.rows.values()}
    doubts = db_records.read(tmp_path / "run.salvaged" / "checkpoint.db").possibly_billed
    named = {(doubt.row, doubt.n) for doubt in doubts if doubt.cause == "crash"}
    assert named
    assert named <= {(entry.row, entry.n) for entry in flying} - ended


def test_a_damaged_result_part_is_lost_alone(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("in-parts", tmp_path / "run")
    path = directory.completions_folder / "part-000003.parquet"
    flip(path, middle_of(path))
    findings, salvaged = salvage(directory)
    assert [damage.rows for damage in findings.damages] == [((120, 160),)]
    assert salvaged is not None
    kept = kept_rows(directory)
    assert kept.column("row").to_pylist() == [*range(120), *range(160, ROWS)]
    whole = pq.read_table(runs.folder / "in-parts" / "completions").sort_by("row").to_pylist()
    assert kept.to_pylist() == [row for row in whole if not 120 <= row["row"] < 160]
    with (tmp_path / "run.salvaged" / LOST).open() as file:
        (line,) = csv.DictReader(file)
    assert (line["first_row"], line["last_row"], line["rows"], line["answered"]) == ("120", "159", "40", "yes")
    summary = runs.resume(RunDirectory(tmp_path / "run.salvaged"), "parts")
    assert summary.complete
    assert summary.rows == ROWS


def test_a_lost_checkpoint_leaves_the_result(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("done", tmp_path / "run")
    directory.checkpoint.unlink()
    salvaged = salvage(directory)[1]
    assert salvaged is not None
    assert salvaged.problem is not None
    assert kept_rows(directory).to_pylist() == runs.undisturbed.to_pylist()


def test_a_run_without_input_keeps_its_rows(tmp_path: Path, runs: Runs) -> None:
    """It can't resume."""
    source = write_rows(tmp_path / "in.jsonl", 60)
    job = write_job(tmp_path / "job.toml", runs.simulator.url, source, MORE.format(layout="parts"))
    assert batchrun("run", job, "-o", tmp_path / "run").exit_code == 0
    source.write_text('{"text": "another"}\n')
    directory = RunDirectory(tmp_path / "run")
    directory.usage.unlink()
    ended = batchrun("verify", directory.path, "--salvage")
    assert (ended.exit_code, ended.stderr) == (7, "")
    assert "it can't be resumed (the input: " in ended.stdout
    assert kept_rows(directory).to_pylist() == pq.read_table(directory.completions_folder).to_pylist()


def test_salvage_keeps_a_retry_under_way(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("retried", tmp_path / "run")
    known = db_records.read(directory.checkpoint)
    directory.inflight.unlink()
    flip(directory.summary, 0)
    salvaged = salvage(directory)[1]
    assert salvaged is not None
    assert salvaged.rows == ROWS
    new = db_records.read(salvaged.path / "checkpoint.db")
    assert new.reopened.keys() == known.reopened.keys() - known.rows.keys()
    assert new.totals.settled() == known.totals.settled()
    assert new.totals.booked == known.totals.booked
    before = len(runs.simulator.ledger())
    assert runs.resume(RunDirectory(salvaged.path)).complete
    sent = {int(str(line.client_request_id).split("-")[1]) for line in runs.simulator.ledger()[before:]}
    assert sent == set(new.reopened)


def test_a_salvage_overwrites_no_directory(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("done", tmp_path / "run")
    directory.usage.unlink()
    salvage(directory)
    before = snapshot(tmp_path)
    with pytest.raises(JobError, match="already exists"):
        salvage(directory)
    assert snapshot(tmp_path) == before


@pytest.mark.heavy
def test_row_groups_are_kept_one_by_one(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "groups.parquet"
    pq.write_table(runs.undisturbed, path, row_group_size=32, write_page_checksum=True)
    schema, content = runs.undisturbed.schema.remove_metadata(), path.read_bytes()
    chance = level.seeded("test_row_groups_are_kept_one_by_one")
    some = 0
    for _ in range(60):
        flip(path, place := chance.randrange(len(content)), chance.randrange(8))
        groups = list(readable_groups.groups(path, schema, "", 0, ROWS))
        some += 0 < len(groups) < 10
        for group in groups:
            first = group.column("row")[0].as_py()
            own = [name for name in group.column_names if name not in ("id", "text", "score")]
            expected = runs.undisturbed.slice(first, group.num_rows)
            assert group.select(own).to_pylist() == expected.select(own).to_pylist(), f"byte {place}, {level.replay()}"
        path.write_bytes(content)
    assert some > 20


def test_a_part_with_other_questions_is_rejected(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    known = db_records.read(directory.checkpoint)
    part = next(chunk for chunk in known.chunks if not chunk.open)
    table = pq.read_table(directory.part_of(part.chunk, part.generation))
    moved = pa.array([int(row or 0) + ROWS - 2 * table.num_rows for row in table.column("row").to_pylist()], pa.int64())
    stale = table.set_column(table.column_names.index("row"), "row", moved)
    pq.write_table(stale, directory.part_of(ROWS // 40 - 1, 1), write_page_checksum=True)
    flip(wal_of(directory.checkpoint), 5000)
    salvaged = salvage(directory)[1]
    assert salvaged is not None
    assert set(kept_rows(directory).column("row").to_pylist()) <= answered(known)
    assert equal_to_the_undisturbed(runs, kept_rows(directory))


def test_salvage_keeps_what_was_spilled(runs: Runs, tmp_path: Path) -> None:
    """A damaged spill file is named."""
    directory = runs.copy("killed", tmp_path / "run")
    known = db_records.read(directory.checkpoint)
    arrived = next(iter(known.rows.values()))
    pending = min(row for row in range(ROWS) if row not in answered(known))
    spilled = msgspec.structs.replace(arrived, row=pending)
    path = directory.path / "spill.bin"
    for completion in (arrived, spilled):
        spill.append(path, [completion], 1)
    assert not verify(directory).damages
    directory.inflight.unlink()
    assert salvage(directory)[1] is not None
    frames = list(spill.read(tmp_path / "run.salvaged" / "spill.bin"))
    assert [row.row for frame in frames for row in frame.completions] == [pending]
    flip(path, 20)
    assert damaged_files(verify(directory)) == {"inflight.bin", "spill.bin"}
