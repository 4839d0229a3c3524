import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.errors import DiskError
from batchrun.records import PossiblyBilled
from batchrun.store import in_flight
from batchrun.store.in_flight import SLOT_BYTES, UNREADABLE, InFlightFile, NamedRequest
from tests import prefork
from tests.money import pico

BOUNDS = st.none() | st.integers(0, 2**63 - 1)
KEYS = st.binary(min_size=16, max_size=16)
ENTRIES = st.builds(
    NamedRequest,
    *(st.integers(0, 2**63 - 1), st.integers(1, 1000), KEYS, BOUNDS, st.none() | st.integers(0, 10**9)),
    has_id=st.just(False),  # the file sets it
)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
KEY = bytes(range(16))


@contextmanager
def opened(path: Path, count: int, *, with_ids: bool = False) -> Iterator[InFlightFile]:
    flying = InFlightFile(path, count, with_ids=with_ids)
    try:
        yield flying
    finally:
        flying.close()


@SHARED
@given(st.dictionaries(st.integers(0, 15), ENTRIES), st.sets(st.integers(0, 15)), st.booleans())
def test_requests_in_flight_outlive_their_process(
    tmp_path: Path, taken: dict[int, NamedRequest], cleared: set[int], with_ids: bool
) -> None:
    path = tmp_path / "inflight.bin"
    with opened(path, 16, with_ids=with_ids) as flying:
        for slot, entry in taken.items():
            flying.occupy(slot, *entry[:5])
        for slot in cleared:
            flying.clear(slot)
        left = [entry._replace(has_id=with_ids) for slot, entry in sorted(taken.items()) if slot not in cleared]
        assert flying.occupied() == left
    assert in_flight.read(path) == left


def test_a_slot_has_64_preallocated_bytes(tmp_path: Path) -> None:
    with opened(tmp_path / "inflight.bin", 1000):
        status = (tmp_path / "inflight.bin").stat()
    assert (status.st_size, SLOT_BYTES) == (64_000, 64)
    assert status.st_blocks * 512 >= 64_000  # no hole: it would fail as a SIGBUS when the disk is full
    assert status.st_mode & 0o777 == 0o600


def test_a_new_start_clears_all_slots(tmp_path: Path) -> None:
    path = tmp_path / "inflight.bin"
    with opened(path, 64) as flying:
        flying.occupy(63, 1, 1, KEY, None, 9)
    with opened(path, 4) as flying:
        assert flying.occupied() == []
    assert path.stat().st_size == 4 * SLOT_BYTES


def test_clearing_all_leaves_no_request_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "inflight.bin"
    with opened(path, 8) as flying:
        for slot in range(8):
            flying.occupy(slot, slot, 1, KEY, pico(1), 9)
        flying.clear_all()
        assert flying.occupied() == []
    assert in_flight.read(path) == []


@SHARED
@given(st.lists(ENTRIES, min_size=1, max_size=4), st.integers(0, 4 * SLOT_BYTES * 8 - 1))
def test_a_flipped_bit_is_reported_or_changes_nothing(tmp_path: Path, entries: list[NamedRequest], bit: int) -> None:
    path = tmp_path / "inflight.bin"
    with opened(path, 4) as flying:
        for slot, entry in enumerate(entries):
            flying.occupy(slot, *entry[:5])
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    hit = bit // 8 // SLOT_BYTES
    found = in_flight.read(path)
    if found != entries:
        assert found == [*entries[:hit], UNREADABLE, *entries[hit + 1 :]]


@pytest.mark.parametrize("written", range(1, SLOT_BYTES))
def test_a_half_written_slot_counts_as_one(tmp_path: Path, written: int) -> None:
    path = tmp_path / "inflight.bin"
    with opened(path, 1) as flying:
        flying.occupy(0, 2**63 - 1, 2**31 - 1, b"\xff" * 16, pico(1), 9)
    content = path.read_bytes()
    path.write_bytes(content[:written] + bytes(SLOT_BYTES - written))
    (entry,) = in_flight.read(path)
    assert entry == UNREADABLE or written >= 49  # behind its fields and their CRC a slot is only padding


def test_a_cut_slot_counts_as_one(tmp_path: Path) -> None:
    path = tmp_path / "inflight.bin"
    with opened(path, 3) as flying:
        for slot in range(3):
            flying.occupy(slot, slot, 1, KEY, pico(1), 9)
    os.truncate(path, SLOT_BYTES + 10)
    assert in_flight.read(path) == [NamedRequest(0, 1, KEY, pico(1), 9), UNREADABLE]


def test_no_file_means_no_request_in_flight(tmp_path: Path) -> None:
    assert in_flight.read(tmp_path / "inflight.bin") == []


def test_lost_attempts_are_named_with_cause_and_invocation() -> None:
    known = NamedRequest(7, 2, KEY, pico("0.5"), 40)
    with_id = known._replace(n=3, has_id=True)
    assert in_flight.possibly_billed([known, with_id, UNREADABLE], 3, "crash", "run.1") == [
        PossiblyBilled(7, 2, KEY.hex(), Decimal("0.5"), 40, "crash", 3),
        PossiblyBilled(7, 3, KEY.hex(), Decimal("0.5"), 40, "crash", 3, "run.1-7-3"),
        PossiblyBilled(-1, 0, "", None, None, "crash", 3),
    ]


def test_a_place_without_room_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"inflight\.bin"):
        InFlightFile(tmp_path / "missing" / "inflight.bin", 4)


TAKE_AND_CLEAR = """
import sys
from pathlib import Path
from batchrun.store.in_flight import InFlightFile
flying, row = InFlightFile(Path(sys.argv[1]), 64), 0
for slot in range(64):
    flying.occupy(slot, slot, 1, bytes(16), None, 9)
print("taken", flush=True)
while True:
    row += 1
    flying.clear(row % 64)
    flying.occupy(row % 64, row + 63, 1, bytes(16), None, 9)
"""


def test_after_kill_9_requests_in_flight_are_counted(tmp_path: Path) -> None:
    """Each is named or counted."""
    path = tmp_path / "inflight.bin"
    for _ in range(3):
        with prefork.script(TAKE_AND_CLEAR, path) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            try:
                process.wait(random.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        left = in_flight.read(path)
        assert len(left) >= 63  # one may have been cleared just then
        rows = [entry.row for entry in left if entry != UNREADABLE]
        assert max(rows) - min(rows) <= 64
