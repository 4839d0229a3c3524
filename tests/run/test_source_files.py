import os
import socket
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import DiskError, InputError
from batchrun.source import changed, digest, find_files, fingerprint, open_source
from batchrun.startup.stdin_copy import save, spool
from batchrun.store.rundir import RunDirectory

NOBODY = 65534


def write(path: Path, content: bytes = b'{"a": 1}\n') -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def refused(path: Path | str) -> str:
    with pytest.raises(InputError) as error:
        open_source(find_files(str(path)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_directory_lists_its_own_data_files(tmp_path: Path) -> None:
    """Sorted, without hidden files and markers."""
    for name in ("b.jsonl", "a.jsonl", ".hidden", "_SUCCESS", "10.jsonl", "9.jsonl"):
        write(tmp_path / name)
    write(tmp_path / "sub" / "c.jsonl")
    assert [file.name for file in find_files(str(tmp_path))] == ["10.jsonl", "9.jsonl", "a.jsonl", "b.jsonl"]


def test_a_glob_matches_in_path_order(tmp_path: Path) -> None:
    for name in ("2/a.jsonl", "1/b.jsonl", "1/_SUCCESS"):
        write(tmp_path / name)
    files = find_files(str(tmp_path / "**" / "*"))
    assert [str(Path(str(file)).relative_to(tmp_path)) for file in files] == ["1/b.jsonl", "2/a.jsonl"]


@pytest.mark.parametrize("loop", ["loop", "k=v"])
def test_a_folder_within_itself_is_read_once(tmp_path: Path, loop: str) -> None:
    write(tmp_path / "in" / "a.jsonl")
    write(tmp_path / "in" / "sub" / "b.jsonl")
    write(tmp_path / "other" / "c.jsonl")
    (tmp_path / "in" / loop).symlink_to(".")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    names = [Path(str(file)).name for file in find_files(str(tmp_path / "in" / "**" / "*.jsonl"))]
    assert names == ["a.jsonl", "c.jsonl", "b.jsonl"]
    assert [Path(str(file)).name for file in find_files(str(tmp_path / "in"))] == ["a.jsonl"]


def test_what_editors_leave_is_not_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl~", ".a.jsonl.swp", "b.jsonl.swp"):
        write(tmp_path / name)
    for path in (tmp_path, tmp_path / "*"):
        assert [Path(str(file)).name for file in find_files(str(path))] == ["a.jsonl"]


def test_a_name_with_glob_characters_is_itself(tmp_path: Path) -> None:
    odd = write(tmp_path / "part[1].jsonl")
    assert find_files(str(odd)) == (odd,)


@pytest.mark.parametrize("name", ["no.jsonl", "*.jsonl", ""])
def test_a_missing_input_is_one_line(tmp_path: Path, name: str) -> None:
    assert "name a JSONL or Parquet file" in refused(tmp_path / name)


def test_special_files_are_refused_without_opening(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero")):
            assert "not a regular file" in refused(path)


def test_an_unreadable_file_names_the_reason(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    dangling = tmp_path / "dangling.jsonl"
    dangling.symlink_to(tmp_path / "gone")
    assert str(loop) in refused(loop)
    assert "No such file" in refused(dangling)


def test_a_file_without_read_permission_is_named() -> None:
    me = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        secret = write(Path(folder) / "a.jsonl")
        secret.chmod(0)
        Path(folder).chmod(0o755)
        if me == 0:
            os.seteuid(NOBODY)  # root reads everything
        try:
            assert "Permission denied" in refused(secret)
        finally:
            os.seteuid(me)


def test_jsonl_and_parquet_together_are_refused_naming_both(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    write(tmp_path / "y.jsonl")
    assert "x.parquet is Parquet but" in refused(tmp_path)
    assert "y.jsonl is not" in refused(tmp_path)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"PK\x03\x04rest", "zip archive"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"BZh91AY", "bzip2"),
        (b"ARROW1\x00\x00", "Arrow or Feather"),
        (b"Obj\x01", "Avro"),
        (b"SQLite format 3\x00", "SQLite"),
    ],
)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, head: bytes, said: str) -> None:
    assert said in refused(write(tmp_path / "input", head))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_other_unicode_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    """With file, line and the command that converts them."""
    said = refused(write(tmp_path / "a.jsonl", '{"a": "ä"}\n'.encode(encoding)))
    assert f"{tmp_path / 'a.jsonl'} is UTF-{encoding[4:6]}" in said
    assert "iconv -f UTF-" in said


def test_the_content_decides_where_the_name_says_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "data.bin")
    assert open_source(find_files(str(tmp_path / "data.bin"))).format == "parquet"
    assert open_source((write(tmp_path / "lines.txt"),)).format == "jsonl"


def test_a_file_changes_by_write_or_removal(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    before = fingerprint((a, b))
    assert changed((a, b), before) is None
    assert changed((a,), before) == f"{b} is no longer part of the input"
    write(a, b'{"a": 1}\n{"a": 2}\n')
    assert changed((a, b), before) == f"{a} had 9 bytes and has 18"
    write(tmp_path / "other").replace(a)
    assert changed((a, b), before) == f"{a} was written again"
    a.unlink()
    assert changed((a, b), before) == f"{a} is gone"
    assert changed((b, write(tmp_path / "c.jsonl")), before) == f"{tmp_path / 'c.jsonl'} is new"


def test_a_digest_is_of_the_bytes_alone(tmp_path: Path) -> None:
    a, b, c = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", b"{}")
    assert digest(a) == digest(b) != digest(c)
    assert len(digest(a)) == 32


def test_spooled_input_is_whole_and_private(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    spool(BytesIO(data), tmp_path / "stdin.jsonl")
    assert (tmp_path / "stdin.jsonl").read_bytes() == data
    assert (tmp_path / "stdin.jsonl").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "stdin.jsonl"]


@pytest.mark.parametrize("started", [False, True])
def test_unreadable_stdin_is_named_also_at_resume(tmp_path: Path, started: bool) -> None:
    directory = RunDirectory(tmp_path / "out")
    directory.create()
    if started:
        write(directory.spool)
    only_written = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with open(only_written, "rb") as stream, pytest.raises(InputError, match="standard input can't be read"):
        save(stream, directory, started=started)


def test_a_full_disk_leaves_no_stdin_copy(tmp_path: Path) -> None:
    script = (
        "import io, resource, signal, pathlib; from batchrun.startup.stdin_copy import spool\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"spool(io.BytesIO(bytes(1_000_000)), pathlib.Path({str(tmp_path / 'in')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"{DiskError.__module__}.{DiskError.__name__}: {tmp_path / 'in'}" in done.stderr
    assert list(tmp_path.iterdir()) == []
