import random
import signal
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import CheckpointError, ExitCode
from batchrun.store import wal
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.wal import commits_dropped
from tests import checkpoint_writer, level


class Left(NamedTuple):
    """What a killed process left: the database, its log, and how many rows they hold together."""

    database: bytes
    log: bytes
    rows: int


def rows_of(folder: Path, database: bytes, log: bytes) -> int:
    """How many rows a start finds."""
    path = folder / "checkpoint.db"
    path.write_bytes(database)
    path.with_name("checkpoint.db-wal").write_bytes(log)
    checkpoint = Checkpoint(path, free_reserve=lambda: False)
    checkpoint.close()
    return checkpoint.totals.settled()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("killed")
    path = folder / "checkpoint.db"
    with checkpoint_writer.start(path) as process:
        assert process.stdout is not None
        for _ in range(6):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    database, log = path.read_bytes(), path.with_name("checkpoint.db-wal").read_bytes()
    return Left(database, log, rows_of(folder, database, log))


def test_what_a_kill_leaves_has_every_commit(left: Left) -> None:
    assert left.rows >= 6
    assert commits_dropped(left.log) == 0
    assert commits_dropped(b"") == commits_dropped(left.log[:32]) == commits_dropped(left.log[:40]) == 0


def test_a_damaged_log_never_hides_lost_rows(tmp_path: Path, left: Left) -> None:
    places = level.seeded("test_a_damaged_log_never_hides_lost_rows")
    last_commit = max(end for end in range(32, len(left.log), 4120) if any(left.log[end + 4 : end + 8]))
    reported = 0
    for place in [*range(32), *range(32, 56), *(places.randrange(last_commit) for _ in range(60))]:
        log = bytearray(left.log)
        log[place] ^= 1 << places.randrange(8)
        try:
            found = rows_of(tmp_path, left.database, bytes(log))
        except CheckpointError as error:
            reported += error.exit_code == ExitCode.DAMAGED
        else:  # only the last commit may be taken for one that a power cut tore: 64 rows at most were in flight
            assert left.rows - found <= 64, f"byte {place}, {level.replay()}"
    assert reported > 50, f"{level.replay()}"


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_an_early_log_end_is_a_power_cut(left: Left, kept: float) -> None:
    assert commits_dropped(left.log[: int(len(left.log) * kept)]) == 0


def test_a_torn_last_commit_is_no_damage(tmp_path: Path, left: Left) -> None:
    frames = range(32, len(left.log) - 4119, 4120)
    commits = [start for start in frames if any(left.log[start + 4 : start + 8])]
    torn = bytearray(left.log[: commits[-1] + 4120])
    torn[commits[-2] + 4120 + 24 : commits[-2] + 4120 + 4120] = bytes(4096)  # its first page never reached the disk
    assert commits_dropped(bytes(torn)) == 1
    assert 0 <= left.rows - rows_of(tmp_path, left.database, bytes(torn)) <= 64


@pytest.mark.heavy
def test_frames_of_an_earlier_round_are_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.db"
    for _ in range(4):
        with checkpoint_writer.start(path) as process:
            assert process.stdout is not None
            for _ in range(random.randrange(20, 60)):
                process.stdout.readline()  # a commit that was reported
            process.send_signal(signal.SIGKILL)
        assert commits_dropped(path.with_name("checkpoint.db-wal").read_bytes()) == 0


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=40), st.data())
def test_the_sums_are_those_that_the_format_describes(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    first, second = before = data.draw(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))
    for even, odd in pairs:  # sqlite.org, "WAL-mode File Format", section 4.2
        first = (first + even + second) % 2**32
        second = (second + odd + first) % 2**32
    content = b"".join(struct.pack("<II", *pair) for pair in pairs)
    assert wal._summed("<", content, before) == (first, second)
