import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchrun.durable import digest, disk_errors, replace_bytes, replacing
from batchrun.errors import DiskError, ExitCode

REPLACE_FOR_EVER = """
import sys
from pathlib import Path
from batchrun.durable import replace_bytes
while True:
    for letter in b"ab":
        replace_bytes(Path(sys.argv[1]), bytes([letter]) * 300_000)
"""


def test_readers_see_a_whole_file_after_kill_9(tmp_path: Path) -> None:
    """The old one or the new one."""
    path = tmp_path / "summary.json"
    wholes = {letter * 300_000 for letter in (b"a", b"b")}
    seen = set()
    with subprocess.Popen([sys.executable, "-c", REPLACE_FOR_EVER, str(path)]) as process:
        while not path.exists():
            time.sleep(0.001)
        for _ in range(300):
            seen.add(path.read_bytes())
        process.send_signal(signal.SIGKILL)
    assert seen | {path.read_bytes()} <= wholes


def fail_halfway(path: Path, error: Exception) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise error


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "part"
    replace_bytes(path, b"old")
    message = r"part: No space left on device; make room and run the same command again"
    with pytest.raises(DiskError, match=message):
        fail_halfway(path, OSError(28, "No space left on device"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_disk_errors_become_disk_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"):
        fail_halfway(tmp_path / "part", ValueError("no"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_files_are_private_under_any_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        replace_bytes(tmp_path / "summary.json", b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "summary.json").stat().st_mode & 0o777 == 0o600


def test_a_refusal_names_file_cause_and_step(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as error, disk_errors(tmp_path / "x"):
        (tmp_path / "missing" / "file").read_bytes()
    assert str(error.value) == (
        f"{tmp_path}/x: No such file or directory; repair the disk or choose another directory with -o, then run again"
    )
    assert error.value.exit_code == ExitCode.PAUSED


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_digest_is_blake2b_of_all_bytes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert digest(tmp_path / "file") == hashlib.blake2b(content, digest_size=16).hexdigest()
