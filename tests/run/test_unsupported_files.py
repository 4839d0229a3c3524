"""Files in formats that are not read: the command that the message names is run, and what it makes is read."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import shutil
import sqlite3
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pytest

from batchrun.errors import InputError
from batchrun.source import find_files, open_source

ROWS = [{"text": 'a, "q"'}, {"text": "é"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()
CSV = 'text\r\n"a, ""q"""\r\né\r\n'
TABLE = pa.table({"text": [row["text"] for row in ROWS]})


def lz4(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def stream() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


def feather() -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(TABLE, sink)
    return sink.getvalue()


def orc() -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.orc.write_table(TABLE, sink)
    return sink.getvalue().to_pybytes()


def tar(mode: str) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES))
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.jsonl", LINES)
        archive.writestr("__MACOSX/._a.jsonl", b"\0")
    return sink.getvalue()


def pretty() -> bytes:
    return b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS)


MADE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a.jsonl.bz2": ("bzip2", lambda: bz2.compress(LINES)),
    "-a.jsonl.xz": ("xz", lambda: lzma.compress(LINES)),
    "no ending": ("xz", lambda: lzma.compress(LINES)),
    "a.lz4": ("lz4", lambda: lz4(LINES)),
    "a.zz": ("python", lambda: zlib.compress(LINES)),
    "a.jsonl": ("jq", lambda: ARRAY),
    "a.json": ("jq", lambda: json.dumps(ROWS, indent=2).encode()),
    "pretty.json": ("jq", pretty),
    "packed array.json.gz": ("jq", lambda: gzip.compress(ARRAY)),
    "twice.jsonl.gz.gz": ("gzip", lambda: gzip.compress(gzip.compress(LINES))),
    "packed.feather.gz": ("gzip", lambda: gzip.compress(feather())),
    "sequence.json": ("tr", lambda: b"".join(b"\x1e" + line + b"\n" for line in LINES.splitlines())),
    "utf16.jsonl": ("iconv", lambda: LINES.decode().encode("utf-16")),
    "utf16 without a mark.jsonl": ("iconv", lambda: LINES.decode().encode("utf-16-be")),
    "utf32.csv": ("iconv", lambda: CSV.encode("utf-32")),
    "latin1.csv": ("iconv", lambda: CSV.encode("latin-1")),
    "a.arrow": ("python", stream),
    "wrongly named.parquet": ("python", stream),
    "a.feather": ("python", feather),
    "a.orc": ("python", orc),
    "a.tar": ("tar", lambda: tar("w")),
    "a.tar.gz": ("tar", lambda: tar("w:gz")),
    "a tar without its name.jsonl.gz": ("tar", lambda: tar("w:gz")),
    "a.zip": ("python", zipped),
    "a.sqlite": ("sqlite3", lambda: b""),
}


def read(path: str) -> list[dict[str, object]]:
    return [record.columns for record in open_source(find_files(path)).records()]


def command_for(path: str) -> str:
    with pytest.raises(InputError) as refused:
        read(path)
    said = str(refused.value)
    assert "\n" not in said
    _, found, command = said.partition("convert it with: " if "convert it with: " in said else "unpack it first: ")
    assert found, said
    return command.split("  (")[0].replace("your_table", "facts")


def made(name: str) -> str:
    if name == "a.sqlite":
        with contextlib.closing(sqlite3.connect(name)) as database:
            database.execute("CREATE TABLE facts (text)")
            database.executemany("INSERT INTO facts VALUES (?)", [(row["text"],) for row in ROWS])
            database.commit()
    else:
        Path(name).write_bytes(MADE[name][1]())
    return name


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", MADE)
def test_the_suggested_command_converts_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It overwrites nothing."""
    if (tool := MADE[name][0]) != "python" and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed here")
    folder = tmp_path / "it's $HOME (1)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path, others = made(name), ["a.csv", "a.parquet"]
    for other in others:
        Path(other).write_text("mine")
    for _ in range(3):
        before = {each.name: each.stat().st_size for each in Path().iterdir()}
        subprocess.run(["sh", "-c", command_for(path)], check=True, capture_output=True)
        assert {each: Path(each).stat().st_size for each in before} == before
        (path,) = {each.name for each in Path().iterdir()} - set(before)
        with contextlib.suppress(InputError):
            assert read(path) == ROWS
            return
    pytest.fail(f"{path} is not read")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\x80\x04\x95\x10", "Python pickle"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"VTXF\x00\x00\x00\x00", "a Vortex file"),
        (b"\x89PNG\r\n", "an image"),
        (b"%PDF-1.7", "PDF"),
        (b"\n<!DOCTYPE html>\n<html>", "HTML or XML"),
        (b'<?xml version="1.0"?>', "HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_unconvertible_files_are_named_for_what_they_are(tmp_path: Path, head: bytes, said: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(head) if name.endswith(".gz") else head)
    with pytest.raises(InputError) as refused:
        read(str(path))
    assert said in str(refused.value)
