"""What grows with the rows of a run is on the disk: it would fill memory only with millions of them."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.startup import buckets
from batchrun.startup.answer_match import NONE, Matches
from batchrun.startup.buckets import Buckets
from batchrun.store import origins
from batchrun.store.origins import SENT, OriginsWriter

ROWS = 4_000_000
MOST_MB = 8
"""32 MB of numbers in a mapped file would count as memory."""


def resident_mb() -> float:
    """The resident set of this process, pages of mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def test_matches_are_not_in_memory(tmp_path: Path) -> None:
    before = resident_mb()
    with Matches(ROWS, tmp_path) as matches:
        for row in range(0, ROWS, 1000):
            matches[row] = ROWS - row
        assert resident_mb() - before < MOST_MB
        assert (matches[0], matches[1], matches[ROWS - 1000]) == (ROWS, NONE, 1000)
        assert sum(old != NONE for old in matches) == ROWS / 1000
        assert resident_mb() - before < MOST_MB


def test_origins_are_not_in_memory(tmp_path: Path) -> None:
    before, path = resident_mb(), tmp_path / "origins.bin"
    with OriginsWriter(path, ROWS) as writer:
        for row in range(1, ROWS, 1000):
            writer[row] = origins.copy_of(row - 1)
        writer.keep()
    assert resident_mb() - before < MOST_MB
    assert list(origins.read(path, 0, 3)) == [SENT, origins.copy_of(0), SENT]
    assert path.stat().st_size == 8 * ROWS


def test_origins_of_sent_rows_take_no_disk(tmp_path: Path) -> None:
    with OriginsWriter(tmp_path / "origins.bin", 1 << 40):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_keys_to_compare_are_not_in_memory(tmp_path: Path) -> None:
    """Nor do they take more than one file: a hundred million rows have 400 buckets of them."""
    keys, before, files = 1_000_000, resident_mb(), len(list(Path("/proc/self/fd").iterdir()))
    with Buckets(tmp_path, buckets.count_for(100_000_000), "keys") as spread:
        spread.add_all((number.to_bytes(4, "little") * 4, number) for number in range(keys))
        assert resident_mb() - before < 2 * MOST_MB < 24 * keys / 1e6
        assert len(list(Path("/proc/self/fd").iterdir())) == files + 1
        found = [number for bucket in range(spread.count) for _, number in spread.entries(bucket)]
        assert sorted(found) == list(range(keys))
        assert list(spread.entries(7))[:2] == [
            ((7).to_bytes(4, "little") * 4, 7),
            ((408).to_bytes(4, "little") * 4, 408),
        ]
    assert list(tmp_path.iterdir()) == []


ARENAS = """
import ctypes, sys, threading
from batchrun import memory
if sys.argv[1] == "one":
    memory.share_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
at_once = threading.Barrier(4)
def work():
    at_once.wait()
    for _ in range(1000):
        libc.malloc(5000)
threads = [threading.Thread(target=work) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such parameters")
def test_all_threads_share_one_arena(tmp_path: Path) -> None:
    """With one for each, what a thread has freed is of no use to the others."""
    found = tmp_path / "malloc.xml"
    for how in ("one", "as they are"):
        subprocess.run([sys.executable, "-c", ARENAS, how, str(found)], check=True)
        arenas = found.read_text().count("<heap nr=")
        assert arenas == 1 if how == "one" else arenas > 1
