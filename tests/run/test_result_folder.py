"""A result of several files: made beside its place, published as a whole, described by one value."""

import json
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.durable import digest, exchange_in_steps
from batchrun.errors import CheckpointError
from batchrun.records import ResultFile
from batchrun.store.result_folder import MANIFEST, publish, stage_parts
from batchrun.store.rundir import RunDirectory
from tests import prefork
from tests.run.test_tables import Part, part_of, table_of

BILL = {"job": "reviews", "cost_usd": "0.25"}


def directory_with(path: Path, parts: int = 3) -> tuple[RunDirectory, list[Part]]:
    directory = RunDirectory(path)
    directory.create()
    return directory, [part_of(directory.parts, number, table_of(2, 2 * number), 2 * number) for number in range(parts)]


def published(directory: RunDirectory, parts: list[Part]) -> tuple[ResultFile, ...]:
    written = publish(stage_parts(parts, directory), BILL, directory)
    (manifest,) = written.beside
    assert manifest.digest == digest(directory.path / manifest.name)
    assert (written.folder, written.rows) == ("completions", sum(rows for _, _, rows in parts))
    return written.files


def test_parts_become_a_folder_with_a_manifest(tmp_path: Path) -> None:
    directory, parts = directory_with(tmp_path / "run")
    inodes = [path.stat().st_ino for path, _, _ in parts]
    files = published(directory, parts)
    assert [(directory.path / file.name).stat().st_ino for file in files] == inodes  # no byte is copied
    names = [f"part-00000{number}.parquet" for number in range(3)]
    assert [file.name for file in files] == [f"completions/{name}" for name in names]
    for file in files:
        path = directory.path / file.name
        assert (file.rows, file.size_bytes, file.digest) == (2, path.stat().st_size, digest(path))
    assert not directory.staging.exists()
    assert list(directory.parts.iterdir()) == []
    manifest = json.loads((directory.completions_folder / MANIFEST).read_bytes())
    assert [(file["name"], file["rows"]) for file in manifest["files"]] == [(name, 2) for name in names]
    assert (manifest["version"], manifest["rows"], manifest["bill"]) == (1, 6, BILL)
    assert pq.read_table(directory.completions_folder).column("row").to_pylist() == list(range(6))


@pytest.mark.parametrize("moved", range(4))
def test_publishing_can_be_repeated_after_a_kill(tmp_path: Path, moved: int) -> None:
    """After some parts were moved, and after the folder has got its name."""
    directory, parts = directory_with(tmp_path / "run")
    directory.staging.mkdir()
    for number, (path, _, _) in enumerate(parts[:moved]):
        path.rename(directory.staging / f"part-00000{number}.parquet")
    (directory.staging / "part-000009.parquet").write_bytes(b"of an older run")
    first = published(directory, parts)
    again = published(directory, parts)
    assert [file.digest for file in again] == [file.digest for file in first]
    assert pq.read_table(directory.completions_folder).column("row").to_pylist() == list(range(6))


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    directory, parts = directory_with(tmp_path / "run")
    published(directory, parts)
    fewer = [part_of(directory.parts, number, table_of(1, 10 + number), 10 + number) for number in range(2)]
    published(directory, fewer)
    assert pq.read_table(directory.completions_folder).column("row").to_pylist() == [10, 11]
    assert pq.read_table(directory.staging).num_rows == 6  # the old one, until `tidy`


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    directory, parts = directory_with(tmp_path / "run", 2)
    parts[1][0].unlink()
    with pytest.raises(CheckpointError, match=parts[1][0].name):
        stage_parts(parts, directory)


def test_a_part_damaged_after_moving_is_named(tmp_path: Path) -> None:
    directory, parts = directory_with(tmp_path / "run", 1)
    stage_parts(parts, directory)
    moved = directory.staging / "part-000000.parquet"
    os.truncate(moved, moved.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"part-000000\.parquet"):
        stage_parts(parts, directory)


PUBLISH_FOR_EVER = """
import sys
from pathlib import Path
from batchrun.durable import replace_folder
root = Path(sys.argv[1])
for number in range(1_000_000):
    (root / "new").mkdir(exist_ok=True)
    for name in "abcdefgh":
        (root / "new" / name).write_text(str(number))
    replace_folder(root / "new", root / "folder")
    print(number, flush=True)
"""


def test_readers_see_whole_folders_after_a_kill(tmp_path: Path) -> None:
    for number in range(4):
        with prefork.script(PUBLISH_FOR_EVER, tmp_path) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "0\n"
            ends_at = time.monotonic() + 0.05 + 0.011 * number
            while time.monotonic() < ends_at:
                assert os.path.lexists(tmp_path / "folder")  # never missing, on a file system that can exchange
            process.send_signal(signal.SIGKILL)
        contents = {(tmp_path / "folder" / name).read_text() for name in "abcdefgh"}
        assert len(contents) == 1
        assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == list("abcdefgh")


def test_without_an_exchange_the_folder_still_comes(tmp_path: Path) -> None:
    for name in ("new", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    (tmp_path / "folder.old.tmp").mkdir()  # of a start that was killed
    exchange_in_steps(tmp_path / "new", tmp_path / "folder")
    assert [(tmp_path / name / "a").read_text() for name in ("folder", "new")] == ["new", "folder"]
    assert not (tmp_path / "folder.old.tmp").exists()
