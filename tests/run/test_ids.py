import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.startup import buckets
from batchrun.startup.buckets import IdIndex


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-3, 3) | st.text("ab1", max_size=2)))
def test_every_repetition_names_its_first_record(tmp_path: Path, values: list[int | str]) -> None:
    with IdIndex(tmp_path) as index:
        assert all(index.add_id(ordinal, value) is None for ordinal, value in enumerate(values))
        found = sorted(index.duplicates())
        assert found == sorted(index.duplicates())
    assert found == [
        (ordinal, values.index(value)) for ordinal, value in enumerate(values) if values.index(value) < ordinal
    ]


@pytest.mark.heavy
def test_repeated_ids_are_found_on_disk(tmp_path: Path) -> None:
    count = 2 * buckets.BUFFER_BYTES // 24
    with IdIndex(tmp_path) as index:
        for ordinal in range(count):
            index.add_id(ordinal, ordinal if ordinal != count - 1 else 5)
        assert list(index.duplicates()) == [(count - 1, 5)]
        assert list(tmp_path.iterdir()) == []  # its file has no name that a crash could leave


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "null"), (1.5, "float"), (True, "bool"), (["a"], "list")],
)
def test_an_id_is_a_string_or_an_integer(tmp_path: Path, value: object, said: str) -> None:
    with IdIndex(tmp_path) as index:
        assert said in str(index.add_id(0, value))
        assert list(index.duplicates()) == []


def test_string_and_integer_ids_differ(tmp_path: Path) -> None:
    with IdIndex(tmp_path) as index:
        index.add_id(0, 7)
        index.add_id(1, "7")
        assert list(index.duplicates()) == []


def test_a_disk_without_room_is_a_disk_error(tmp_path: Path) -> None:
    script = (
        "import pathlib, resource, signal; from batchrun.startup.buckets import IdIndex\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"index = IdIndex(pathlib.Path({str(tmp_path)!r}))\n"
        "for ordinal in range(400_000): index.add_id(ordinal, ordinal)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "DiskError: the ids to compare don't fit" in done.stderr
