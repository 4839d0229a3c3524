"""Reading takes bounded memory, however large the input: in a process of its own, whose peak nothing else made."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError
from batchrun.source import START, find_files, open_source

READ = """
import resource, sys
from batchrun.source import START, find_files, open_source

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

before = peak()
source = open_source(find_files(sys.argv[1]))
checked = sum(1 for _ in source.records())
sent = 0
for window in source.windows(START, 1024, 8 << 20):
    sent += window.rows
    del window
print(checked, sent, peak() - before)
"""


def read(path: Path) -> tuple[int, int, int]:
    """How many records are checked and sent, and by how many MB the peak of memory grew."""
    command = [sys.executable, "-c", READ, str(path)]
    checked, sent, grown_mb = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(checked), int(sent), int(grown_mb)


@pytest.mark.heavy
def test_a_large_csv_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """Measured: 62 MB for 0.1 GB and for 2 GB alike; 500 MB with blocks of 8 MB, which Arrow reads far ahead."""
    line = b'7,"' + b"word, " * 60 + b'"\n'
    (tmp_path / "in.csv").write_bytes(b"n,text\n" + line * 200_000)
    checked, sent, grown_mb = read(tmp_path / "in.csv")
    assert (checked, sent) == (200_000, 200_000)
    assert grown_mb < 110


@pytest.mark.heavy
def test_many_shards_need_bounded_memory(tmp_path: Path) -> None:
    """Measured: 65 MB for 400 shards of 0.2 GB in all, once unpacked."""
    texts = [f"text {n} " + "word " * 100 for n in range(500)]
    for shard in range(300):
        columns = {
            "text": pa.array(texts, pa.large_string() if shard % 2 else pa.string()),
            f"own {shard % 40}": pa.array(range(500), pa.int32() if shard % 3 else pa.int64()),
            "maybe": pa.array(["x"] * 500) if shard % 7 == 0 else pa.nulls(500),
            "score": pa.array([0.1] * 500, pa.float32() if shard % 5 else pa.float64()),
        }
        turned = dict(sorted(columns.items(), reverse=shard % 2 == 0))
        pq.write_table(pa.table(turned), tmp_path / f"{shard:03}.parquet")
    checked, sent, grown_mb = read(tmp_path)
    assert (checked, sent) == (150_000, 150_000)
    assert grown_mb < 130


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_long_csv_row_is_read_once(tmp_path: Path, place: str) -> None:
    rows = [f"{n},short" for n in range(2_000)]
    rows.insert({"first": 0, "middle": 1_500, "last": 2_000}[place], 'long,"' + "x\n" * 1_200_000 + '"')
    path = tmp_path / "in.csv"
    path.write_text("id,text\n" + "\n".join(rows) + "\n")
    source = open_source(find_files(str(path)))
    ids = [record.columns["id"] for record in source.records()]
    assert ids == [row.partition(",")[0] for row in rows]
    assert sum(window.rows for window in source.windows(START, 500, 1 << 20)) == 2_001


def test_an_oversized_csv_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,text\n1,a\n2," + "x" * (20 << 20) + "\n")
    with pytest.raises(InputError, match="a row is longer than 8,388,608 bytes"):
        list(open_source((path,)).records())


def test_a_long_csv_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f"id,{'x' * (2 << 20)}\n1,2\n")
    (record,) = open_source((path,)).records()
    assert list(record.columns.values()) == ["1", "2"]


def test_a_cut_compressed_csv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.csv.gz"
    content = gzip.compress(
        b"id,text\n" + b"".join(b"%d,%s\n" % (n, os.urandom(20).hex().encode()) for n in range(9_000))
    )
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="can't be read to its end"):
        list(open_source((path,)).records())
