"""Input from a real S3 server: what a run reads, and how it notices that an object has changed."""

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError, JobError, StorageError
from batchrun.source import START, changed, find_files, fingerprint, open_source, rows_of
from tests.s3_server import BUCKET, READER, S3Server, environ_for, environment

pytestmark = pytest.mark.sampled(0)  # a server of its own: in `make test-rest`; tests/run/test_publish.py reads one

LINES = b"".join(b'{"text": "row %d"}\n' % row for row in range(1000))


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": range(rows), "text": [f"row {n}" for n in range(rows)]}), sink, row_group_size=700)
    return sink.getvalue()


def rows(url: str) -> list[dict[str, object]]:
    """The rows as the check sees them, which must be those that are dispatched."""
    source = open_source(find_files(url))
    checked = [record.columns for record in source.records()]
    windows = source.windows(START, 300, 1 << 20)
    assert checked == [row for window in windows for batch in window.table.to_batches() for row in rows_of(batch)]
    return checked


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.csv", b"text\n" + b"".join(b"row %d\n" % row for row in range(1000))),
        ("a.csv.gz", gzip.compress(b"text\n" + b"".join(b"row %d\n" % row for row in range(1000)))),
    ],
)
def test_text_is_read_as_from_a_disk(s3: S3Server, name: str, content: bytes) -> None:
    s3.put(f"{BUCKET}/text/{name}", content)
    assert rows(f"s3://{BUCKET}/text/{name}") == [{"text": f"row {row}"} for row in range(1000)]


def test_parquet_is_read_by_ranges_anywhere(s3: S3Server) -> None:
    s3.put(f"{BUCKET}/p/a.parquet", parquet(5000))
    source = open_source(find_files(f"s3://{BUCKET}/p/a.parquet"))
    first, *_ = source.windows(START, 1800, 1 << 30)
    again = next(iter(source.windows(first.end, 10, 1 << 30)))
    assert again.table.column("n").to_pylist() == list(range(1800, 1810))
    assert len(rows(f"s3://{BUCKET}/p/a.parquet")) == 5000


def test_paths_name_the_same_files_as_locally(s3: S3Server, tmp_path: Path) -> None:
    """Folders, globs and single keys."""
    names = ["b.jsonl", "a.jsonl", "lang=de/c.jsonl", "lang=de/_x.jsonl", "_tmp/d.jsonl", "sub/e.jsonl", "a.jsonl.crc"]
    for name in names:
        s3.put(f"{BUCKET}/tree/{name}", b'{"text": "x"}\n')
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b'{"text": "x"}\n')
    for pattern in ("tree", "tree/", "tree/*.jsonl", "tree/**/*.jsonl", "tree/*/*.jsonl", "tree/[ab]*l"):
        there = [str(file).partition("tree/")[2] for file in find_files(f"s3://{BUCKET}/{pattern}")]
        assert there == [str(file).partition("tree/")[2] for file in find_files(f"{tmp_path}/{pattern}")], pattern
    assert rows(f"s3://{BUCKET}/tree/lang=de")[0] == {"lang": "de", "text": "x"}


def test_names_of_any_characters_are_read(s3: S3Server) -> None:
    names = (
        "a b+c%20d.jsonl",
        "a#b&c=d.jsonl",
        "what?.jsonl",
        "x[1]*.jsonl",
        "ünï 猫.jsonl",
        '\'"quoted".jsonl',
        "~@;:,.jsonl",
    )
    for number, name in enumerate(names):
        s3.put(f"{BUCKET}/names/{name}", b'{"n": %d}\n' % number)
    for number, name in enumerate(names):
        (file,) = find_files(f"s3://{BUCKET}/names/{name}")
        assert str(file) == f"s3://{BUCKET}/names/{name}"
        assert rows(str(file)) == [{"n": number}]
    assert len(find_files(f"s3://{BUCKET}/names")) == len(names)
    assert [str(file)[-9:] for file in find_files(f"s3://{BUCKET}/names/x*")] == ["x[1]*.jsonl"[-9:]]


def test_markers_of_folders_are_no_input(s3: S3Server) -> None:
    """Nor is a file that is named like a folder."""
    s3.put(f"{BUCKET}/twice/part", b'{"n": 0}\n')
    s3.put(f"{BUCKET}/twice/part/a.jsonl", b'{"n": 1}\n')  # a prefix that is an object, too
    s3.filesystem.create_dir(f"{BUCKET}/twice/key=1")
    s3.put(f"{BUCKET}/twice/key=1/a.jsonl", b'{"n": 2}\n')
    assert rows(f"s3://{BUCKET}/twice/key=1/") == [{"n": 2, "key": 1}]
    s3.put(f"{BUCKET}/twice/key=2", b"")  # as some tools mark a folder
    s3.put(f"{BUCKET}/twice/key=2_$folder$", b"")  # and as Hadoop does
    s3.put(f"{BUCKET}/twice/key=2/a.jsonl", b'{"n": 3}\n')
    for named in ("key=2", "key=2/", "key=[2]/*"):
        assert rows(f"s3://{BUCKET}/twice/{named}")[0]["n"] == 3, named
    for named, numbers in {"part": [0], "part/": [1], "part/*": [1], "part*": [0]}.items():
        assert rows(f"s3://{BUCKET}/twice/{named}") == [{"n": number} for number in numbers], named


def test_a_changed_object_is_noticed_by_its_etag(s3: S3Server) -> None:
    for name in ("one", "two"):
        s3.put(f"{BUCKET}/etag/{name}.jsonl", LINES)
    files = find_files(f"s3://{BUCKET}/etag/*.jsonl")
    before = fingerprint(files)
    assert changed(files, before) is None
    s3.put(f"{BUCKET}/etag/two.jsonl", LINES)  # the same content: another time, the same etag
    assert changed(files, before) is None
    s3.put(f"{BUCKET}/etag/two.jsonl", LINES.replace(b"row 7", b"row 8"))
    assert changed(files, before) == f"s3://{BUCKET}/etag/two.jsonl was written again"
    s3.filesystem.delete_file(f"{BUCKET}/etag/one.jsonl")
    assert changed(files, before) == f"s3://{BUCKET}/etag/one.jsonl is gone"


def test_what_can_not_be_read_is_one_line(s3: S3Server) -> None:
    s3.put(f"{BUCKET}/odd/a.jsonl.bz2", b"BZh91AY")
    for url, problem in {
        f"s3://{BUCKET}/nothing.jsonl": "no input file there",
        "s3://no-such-bucket/a.jsonl": "no input file there",
        f"s3://{BUCKET}/odd/a.jsonl.bz2": "bzip2 -dc a.jsonl.bz2",
    }.items():
        with pytest.raises(InputError, match=problem) as error:
            find_files(url)
        assert url in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("s3://KEY:secret@data/x", "holds a secret"),
        ("s3:///x", "names no bucket"),
        ("s3://data/x?token=1", "token in the URL is unknown"),
        ("az://container/x", "AZURE_STORAGE_ACCOUNT"),
        ("hf://datasets/a/b/c.parquet", "pip install fsspec huggingface_hub"),
    ],
)
def test_an_unusable_url_says_what_to_do(text: str, problem: str) -> None:
    with pytest.raises(JobError, match=problem):
        find_files(text)


def test_a_wrong_secret_is_no_absent_store(s3: S3Server) -> None:
    """Each has a line of its own."""
    url = f"s3://{BUCKET}/tree/a.jsonl"
    with environment(environ_for(s3.url, (READER[0], "wrong"))), pytest.raises(InputError, match="access is denied"):
        find_files(url)
    with environment({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}), pytest.raises(StorageError, match="NETWORK_CONN"):
        find_files(url)
