import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.errors import InputError
from batchrun.source import START, JsonlSource, Position, Window, rows_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=20)


def zstd_compress(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstd_compress,
    "members": lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
    "frames": lambda data: zstd_compress(data[:7]) + zstd_compress(data[7:]),
}


def source(directory: Path, *contents: bytes, max_line_bytes: int = 1 << 20, block_bytes: int = 1 << 20) -> JsonlSource:
    files = []
    for number, content in enumerate(contents):
        files.append(directory / f"{number}.jsonl")
        files[-1].write_bytes(content)
    return JsonlSource(tuple(files), max_line_bytes, block_bytes)


def rows_in(windows: list[Window]) -> list[dict[str, object]]:
    return [row for window in windows for batch in window.table.to_batches() for row in rows_of(batch)]


def line_bytes(window: Window) -> int:
    return sum(len(line) for line in window.table["line"].to_pylist() if line is not None)


def stored(window: Window) -> pa.Table:
    """The window as a chunk's input file gives it back, in batches of two rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, window.table.schema) as writer:
        writer.write_table(window.table, max_chunksize=2)
    with pa.ipc.open_file(sink.getvalue()) as reader:
        return reader.read_all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=ROWS,
    packing=st.sampled_from(sorted(PACKED)),
    ending=st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r\n \t\n"]),
    bom=st.booleans(),
    last_ending=st.booleans(),
    block_bytes=st.integers(1, 50),
    limits=st.tuples(st.integers(1, 6), st.integers(1, 200)),
)
def test_rows_survive_any_file_layout(
    tmp_path: Path,
    rows: list[dict[str, object]],
    packing: str,
    ending: bytes,
    bom: bool,
    last_ending: bool,
    block_bytes: int,
    limits: tuple[int, int],
) -> None:
    """Whatever the compression, blocks, line ends and window limits."""
    text = ending.join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    data = b"\xef\xbb\xbf" * bom + text + ending * last_ending
    jsonl = source(tmp_path, PACKED[packing](data), block_bytes=block_bytes)
    windows = list(jsonl.windows(START, *limits))
    assert [record.columns for record in jsonl.records()] == rows
    assert [row for window in windows for batch in stored(window).to_batches() for row in rows_of(batch)] == rows
    assert all(0 < window.rows <= limits[0] for window in windows)
    assert all(window.rows == 1 or line_bytes(window) <= limits[1] for window in windows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    skip=st.sets(st.integers(0, 12)),
    packing=st.sampled_from(sorted(PACKED)),
    max_rows=st.integers(1, 4),
)
def test_any_windows_end_resumes_exactly(
    tmp_path: Path, counts: list[int], skip: set[int], packing: str, max_rows: int
) -> None:
    contents = [b"\n".join(b'{"n": "%d.%d"}\n' % (k, i) for i in range(count)) for k, count in enumerate(counts)]
    jsonl = source(tmp_path, *map(PACKED[packing], contents), block_bytes=16)
    windows = list(jsonl.windows(START, max_rows, 1 << 20, skip))
    everything = list(jsonl.records())
    assert rows_in(windows) == [record.columns for record in everything if record.ordinal not in skip]
    for k, window in enumerate(windows):
        assert list(jsonl.windows(window.end, max_rows, 1 << 20, skip)) == windows[k + 1 :]
        assert list(jsonl.records(window.end)) == everything[window.end.ordinal :]


def test_places_count_blank_lines_and_ordinals_do_not(tmp_path: Path) -> None:
    records = list(source(tmp_path, b'\n{"a": 1}\n \r\n[]\n', b'{"a": 2}').records())
    assert [(record.ordinal, record.place, record.problem) for record in records] == [
        (0, f"{tmp_path}/0.jsonl:2", None),
        (1, f"{tmp_path}/0.jsonl:4", "the line holds an array, not an object"),
        (2, f"{tmp_path}/1.jsonl:1", None),
    ]


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_blank_lines_and_files_are_empty(tmp_path: Path, content: bytes) -> None:
    empty = source(tmp_path, content)
    assert list(empty.records()) == []
    assert list(empty.windows(START, 10, 10)) == []


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    line = '{"a": "x\u2028y\u2029z\x85\x7f"}\r\n'.encode()
    assert [record.columns for record in source(tmp_path, line).records()] == [{"a": "x\u2028y\u2029z\x85\x7f"}]


def test_an_oversized_line_is_one_problem(tmp_path: Path) -> None:
    jsonl = source(tmp_path, b'{"a": "' + b"x" * 5_000 + b'"}\n{"a": 1}\n', max_line_bytes=100, block_bytes=64)
    long, short = jsonl.records()
    assert (long.number, long.problem) == (1, "the line is longer than 100 bytes")
    assert (short.number, short.columns) == (2, {"a": 1})
    assert rows_in(list(jsonl.windows(START, 10, 10, skip={0}))) == [{"a": 1}]
    with pytest.raises(InputError, match=r"0\.jsonl:1: the line is too long"):
        list(jsonl.windows(START, 10, 10))


def test_a_window_keeps_the_written_line(tmp_path: Path) -> None:
    (window,) = source(tmp_path, b' {"a":1.50, "a": 2} \r\n').windows(START, 10, 1)
    assert window.table.to_pydict() == {"line": [b' {"a":1.50, "a": 2} ']}
    assert window.end == Position(file=0, offset=22, line=1, ordinal=1)


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_a_cut_compressed_file_is_named(tmp_path: Path, packing: str) -> None:
    data = PACKED[packing](b"".join(b'{"n": %d}\n' % (n * n) for n in range(5_000)))
    with pytest.raises(InputError, match=r"0\.jsonl can't be read to its end: .*(runcated|ended before)"):
        list(source(tmp_path, data[:-10]).records())


def test_a_double_compressed_file_is_refused(tmp_path: Path) -> None:
    """So is Parquet inside a compressed file."""
    for inner in (gzip.compress(b"{}"), b"PAR1"):
        with pytest.raises(InputError, match="unpack it first: gzip -dc"):
            source(tmp_path, gzip.compress(inner))


def test_utf_16_inside_gzip_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="UTF-16LE"):
        source(tmp_path, gzip.compress('{"a": 1}'.encode("utf-16")))
