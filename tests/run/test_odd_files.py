"""Files as other tools and accidents leave them: read as what they say, or refused in one line that helps."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError
from batchrun.source import find_files, open_source
from batchrun.startup.input_check import Survey, survey
from batchrun.startup.preconditions import raise_problems
from tests.cli_process import batchrun, write_job
from tests.jobs import job_over

ROW = b'{"text":"a"}\n'
WIDE = 5_000


def surveyed(path: Path | str) -> Survey:
    source = open_source(find_files(str(path)))
    return survey(source, job_over(path), Path(str(source.files[0])).parent)


def reported(path: Path | str) -> list[str]:
    """All that a user sees of an input that is refused."""
    lines: list[str] = []
    try:
        raise_problems(surveyed(path), lines.append)
    except InputError as error:
        lines.append(str(error))
    assert not any("\n" in line for line in lines)
    return lines


READ = {
    "no last newline": (ROW + ROW.rstrip(), 2),
    "Windows line ends": (b'{"text":"a"}\r\n\r\n{"text":"b"}\r\n', 2),
    "byte order mark": (b"\xef\xbb\xbf" + ROW, 1),
    "gzip of several members": (gzip.compress(ROW) + gzip.compress(ROW), 2),
    "an integer of 30 digits": (b'{"text":"a","n":%d}\n{"text":"b","n":1}\n' % 10**30, 2),
    "NUL in a text": (b'{"text":"a\\u0000b"}\n', 1),
    "a line separator in a text": ('{"text":"a\u2028b"}\n'.encode(), 1),
    "20 MB of text": (b'{"text":"' + b"x" * 20_000_000 + b'"}', 1),
    "400 levels": (b'{"text":"a","d":' + b"[" * 400 + b"]" * 400 + b"}\n", 1),
    "a document in one line": (b'{"text":"a","rows":[{"text":"b"}]}', 1),
}


@pytest.mark.parametrize("name", READ)
def test_json_lines_are_read_as_others_write_them(tmp_path: Path, name: str) -> None:
    content, count = READ[name]
    (tmp_path / "in.jsonl").write_bytes(content)
    found = surveyed(tmp_path / "in.jsonl")
    assert (found.rows, len(found.rejected)) == (count, 0)


def tar_gz() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return sink.getvalue()


MESSAGES = {
    "a comma behind each line": (b'{"text":"a"},\n{"text":"b"},\n', "there is more text after the object"),
    "objects without newlines": (ROW.rstrip() * 3, "write one object per line"),
    "Python's own form": (b"{'text': 'a'}\n", "write it with json.dumps"),
    "CSV without its ending": (b"text,b\nx,1\ny,2\n", "CSV is read from files named .csv or .tsv only"),
    "plain text": (b"hello\nworld\n", "does not start with `{`"),
    "a number a line": (b"1\n2\n", "the line holds a number, not an object"),
    "keys twice": (b'{"text":"a","text":"b"}\n' * 30, "the key 'text' appears twice in one object"),
    "keys twice further down": (b'{"text":"a","m":{"x":1,"x":2}}\n' * 3, "the key 'x' appears twice"),
    "NaN": (b'{"text":"a","n":NaN}\n' * 9, "NaN at byte 17 is not JSON (and 8 more such records)"),
    "Infinity": (b'{"text":"a","n":-Infinity}\n', "-Infinity at byte 17 is not JSON"),
    "600 levels": (b'{"text":"a","d":' + b"[" * 600 + b"]" * 600 + b"}\n", "nested more than 500 levels deep"),
    "a block of NUL": (ROW + bytes(4_096) + b"\n" + ROW, "4,096 NUL bytes and nothing else"),
    "compressed in a way that has no mark": (b"\x0b\x06\x80\x01\x02\xff\x03\n", "a binary file?"),
    "a tar archive named .gz": (tar_gz(), "is a tar archive; convert it with: mkdir"),
    "too many keys": (
        json.dumps({"text": "a"} | {f"c{n}": n for n in range(6_000)}).encode(),
        "more than 5,000 different keys",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_each_mistake_is_one_counted_line(tmp_path: Path, name: str) -> None:
    content, said = MESSAGES[name]
    (tmp_path / "in.jsonl").write_bytes(content)
    first, *more = reported(tmp_path / "in.jsonl")
    assert said in first
    assert len(more) <= 1


def test_unreadable_parquet_gets_no_advice_for_lines(tmp_path: Path) -> None:
    far = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["a"], "at": far}), tmp_path / "in.parquet")
    assert "cast the column" in reported(tmp_path / "in.parquet")[0]
    assert reported(tmp_path / "in.parquet")[-1].endswith("correct what the lines above name")


def test_names_of_columns_may_be_anything(tmp_path: Path) -> None:
    names = ["text", "a.b", "a b", 'a"b', "a'b", "for", "{{ x }}", "", "ä\n", "row"]
    pq.write_table(pa.table({name: ["x"] for name in names}), tmp_path / "in.parquet")
    (tmp_path / "in.jsonl").write_text(json.dumps(dict.fromkeys(names, "x")))
    for path in (tmp_path / "in.parquet", tmp_path / "in.jsonl"):
        (record,) = open_source((path,)).records()
        assert record.columns == dict.fromkeys(names, "x")
        assert surveyed(path).rows == 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_five_thousand_columns_open_in_a_moment(tmp_path: Path, ending: str) -> None:
    names = ["text", *(f"c{n}" for n in range(WIDE - 1))]
    path = tmp_path / f"in.{ending}"
    if ending == "csv":
        path.write_text(",".join(names) + "\n" + ",".join(["x"] * WIDE) + "\n")
    elif ending == "parquet":
        pq.write_table(pa.table({name: ["x"] for name in names}), path)
    else:
        path.write_text(json.dumps(dict.fromkeys(names, "x")))
    began = time.process_time()
    assert surveyed(path).rows == 1
    assert time.process_time() - began < 1.5  # 0.1 to 0.4 measured; 3 s with a search through all names for each


def test_folders_as_spark_and_links_leave_them(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]})
    folder = tmp_path / "spark"
    folder.mkdir()
    pq.write_table(table, folder / "part-0.snappy.parquet")
    pq.write_table(table.slice(0, 0), folder / "part-1.parquet")
    pq.write_metadata(table.schema, str(folder / "_metadata"))
    for name in ("_SUCCESS", ".part-0.crc", "part-0.snappy.parquet.crc"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file.parquet").symlink_to(folder / "part-0.snappy.parquet")
    for path in (folder, tmp_path / "link", folder / "*", tmp_path / "file.parquet"):
        assert surveyed(path).rows == 1


def test_a_glob_may_name_a_file_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(ROW)
    for pattern in ("a[1].jsonl", "a[[]1].jsonl", "a*.jsonl"):
        assert surveyed(tmp_path / pattern).rows == 1


def test_an_arrow_dataset_folder_is_named(tmp_path: Path) -> None:
    """With the command that converts it."""
    table = pa.table({"text": ["a"]})  # as `save_to_disk` of Hugging Face's datasets leaves it
    with (
        pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as to,
    ):
        to.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{\n}")
    assert "data-00000-of-00001.arrow is an Arrow stream; convert it with: " in told_at_once(tmp_path)


def told_at_once(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        surveyed(path)
    return str(refused.value)


@pytest.mark.heavy
def test_standard_input_and_pipes_never_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    job = write_job(tmp_path / "job.toml", "simulator", "unused")
    ended = batchrun("check", job, "-i", tmp_path / "pipe")
    assert ended.stderr.count("\n") == 1
    assert "is not a regular file" in ended.stderr
    command = [sys.executable, "-c", "from batchrun.cli import main; main()", "check", str(job), "-i", "-"]
    piped = subprocess.run(command, input=b'[{"text": "a"}]', capture_output=True, check=False)
    assert piped.stderr.decode().splitlines() == [
        "Error: standard input is one JSON array, not JSON lines; "
        "save it as a file, and name that with -i to see how to convert it"
    ]
