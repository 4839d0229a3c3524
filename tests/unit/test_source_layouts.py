"""Files as other tools leave them: folders with keys, shards of other types, CSV, padding, other formats."""

import gzip
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError
from batchrun.source import START, as_file, find_files, open_source, rows_of
from batchrun.source.identity import changed, fingerprint

LINE = b'{"a": 1}\n'


def write(path: Path, content: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def rows(path: Path | str) -> list[dict[str, object]]:
    """The rows as the check sees them, which must be those that are dispatched."""
    source = open_source(find_files(str(path)))
    checked = [record.columns for record in source.records()]
    sent = [row for window in source.windows(START, 100, 1 << 20) for row in rows_of(window.table.to_batches()[0])]
    assert checked == sent
    return checked


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        rows(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"size"


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (gzip.compress(LINE) + bytes(512), 1),
        (gzip.compress(LINE) * 2, 2),
        (gzip.compress(b"") + gzip.compress(LINE), 1),
        (zstd(LINE) * 2, 2),
        (SKIPPABLE + zstd(LINE) + SKIPPABLE + zstd(LINE), 2),
        (b"\xef\xbb\xbf" + LINE + b"\xef\xbb\xbf" + LINE, 2),
    ],
    ids=["gzip padded", "gzip members", "gzip empty member", "zstd frames", "zstd skippable", "joined with marks"],
)
@pytest.mark.parametrize("name", ["in.jsonl", "in.gz", "in.zst"])
def test_foreign_compressed_files_are_read(tmp_path: Path, content: bytes, count: int, name: str) -> None:
    assert rows(write(tmp_path / name, content)) == [{"a": 1}] * count


@pytest.mark.parametrize(
    "content",
    [gzip.compress(LINE)[:-4], zstd(LINE)[:-3], gzip.compress(LINE) + b"rest"],
    ids=["gzip cut", "zstd cut", "gzip and something else"],
)
def test_a_cut_or_spoilt_compressed_file_is_named(tmp_path: Path, content: bytes) -> None:
    assert "can't be read to its end" in refused(write(tmp_path / "in.jsonl", content))


FOLDERS = (("day=1/lang=de%20AT", 1, "de AT"), ("day=2/lang=__HIVE_DEFAULT_PARTITION__", 2, None))


def test_keys_of_folders_become_columns(tmp_path: Path) -> None:
    for place, day, language in (
        ("day=1/l%61ng=de%20AT", 1, "de AT"),
        ("day=2/lang=__HIVE_DEFAULT_PARTITION__", 2, None),
    ):
        write(tmp_path / "j" / place / "a.jsonl", b' {}\n{"a": 1, "day": 9}\n')
        table(tmp_path / "p" / place / "a.parquet", {"a": [None, 1]})
        assert rows(tmp_path / "j" / place / "a.jsonl")[0] == {"day": day, "lang": language}
    for leftover in ("_SUCCESS", "._SUCCESS.crc", "_temporary/day=3/a.jsonl", "day=1/.a.jsonl.crc", "day=1/a.crc"):
        write(tmp_path / "j" / leftover, b"\x00junk")
    assert rows(tmp_path / "j") == rows(tmp_path / "j" / "**" / "*.jsonl")
    assert rows(tmp_path / "j")[1] == {"day": 9, "lang": "de AT", "a": 1}, "a row's own value stands"
    assert rows(tmp_path / "p")[3] == {"day": 2, "lang": None, "a": 1}


@pytest.mark.parametrize(
    ("log", "files", "name"),
    [
        ("t/_delta_log/00000000000000000000.json", "t/part-0.parquet", "t is a Delta table"),
        ("t/_delta_log/00000000000000000000.json", "t/day=1/part-0.parquet", "t is a Delta table"),
        ("t/.hoodie/hoodie.properties", "t/day=1/a.parquet", "t is a Hudi table"),
        ("t/metadata/00001-a.metadata.json", "t/data/a.parquet", "t is an Iceberg table"),
        ("t/metadata/00001-a.metadata.json", "t/data/day=1/a.parquet", "t is an Iceberg table"),
    ],
    ids=["Delta", "Delta in partitions", "Hudi", "Iceberg", "Iceberg in partitions"],
)
def test_a_table_format_is_not_its_files(tmp_path: Path, log: str, files: str, name: str) -> None:
    """Its files hold rows that the table has replaced or deleted. A file that is named alone is read."""
    write(tmp_path / log, b"{}")
    file = table(tmp_path / files, {"a": [1]})
    folder = tmp_path.joinpath(*Path(files).parts[: 2 if "data" in files else 1])
    assert name in refused(folder)
    assert name in refused(tmp_path / "t")
    assert name in refused(folder / "**" / "*.parquet")
    assert [row["a"] for row in rows(file)] == [1]


def test_a_key_with_leading_zeros_stays_text(tmp_path: Path) -> None:
    for value in ("007", "8"):
        write(tmp_path / f"id={value}" / "a.jsonl")
    assert [row["id"] for row in rows(tmp_path)] == ["007", "8"]


def test_a_folder_of_folders_names_the_glob(tmp_path: Path) -> None:
    write(tmp_path / "monday" / "a.jsonl")
    assert f"write '{tmp_path}/**/*.jsonl'" in refused(tmp_path)
    assert rows(tmp_path / "**" / "*.jsonl") == [{"a": 1}]


WORDS = pa.array(["x", "y"])


@pytest.mark.parametrize(
    ("one", "other", "values"),
    [
        (pa.nulls(2), WORDS, [None, None, "x", "y"]),
        (WORDS, pa.nulls(2), ["x", "y", None, None]),
        (WORDS, WORDS.cast(pa.large_string()), ["x", "y"] * 2),
        (WORDS, WORDS.cast(pa.string_view()), ["x", "y"] * 2),
        (WORDS.dictionary_encode(), WORDS.cast(pa.large_string()), ["x", "y"] * 2),
        (pa.array([1], pa.int32()), pa.array([2**40]), [1, 2**40]),
        (pa.array([0.1], pa.float32()), pa.array([0.1]), [0.1, 0.1]),
        (pa.array([1]), pa.array([0.5]), [1.0, 0.5]),
        (pa.array([[]], pa.list_(pa.null())), pa.array([["x"]]), [[], ["x"]]),
        (pa.array([{"a": 1}]), pa.array([{"b": "x"}]), [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
    ],
)
def test_shards_of_other_types_merge_losslessly(tmp_path: Path, one: Any, other: Any, values: list[object]) -> None:
    table(tmp_path / "0.parquet", {"n": [0] * len(one), "c": one})
    table(tmp_path / "1.parquet", {"c": other, "n": [0] * len(other)})
    assert [row["c"] for row in rows(tmp_path)] == values


def test_a_column_missing_in_shards_is_null(tmp_path: Path) -> None:
    table(tmp_path / "0.parquet", {"a": [1]})
    table(tmp_path / "1.parquet", {"b": ["x"]})
    assert rows(tmp_path) == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (WORDS, pa.array([1, 2])),
        (WORDS, pa.array([b"x"])),
        (pa.array([True]), pa.array([1])),
        (pa.array([1], pa.decimal128(5, 2)), pa.array([1], pa.decimal128(6, 3))),
    ],
)
def test_incompatible_types_name_both_files(tmp_path: Path, one: Any, other: Any) -> None:
    first, second = table(tmp_path / "0.parquet", {"c": one}), table(tmp_path / "1.parquet", {"c": other})
    said = refused(tmp_path)
    assert said.startswith(f"{second} has column 'c' as {other.type}, {first} as {one.type}")


def test_an_unsafe_integer_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "0.parquet", {"c": [0.5]})
    second = table(tmp_path / "1.parquet", {"c": [2**60 + 1]})
    assert refused(tmp_path).startswith(f"{second} rows 0 to 0 can't be read: column 'c' as double")


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float16()),
        pa.list_(pa.float32(), 2),
        pa.struct([("x", pa.list_(pa.float32()))]),
    ],
)
def test_floats_are_their_shortest_number(tmp_path: Path, type_: pa.DataType) -> None:
    value: Any = {"x": [0.25, 0.1]} if pa.types.is_struct(type_) else [0.25, 0.5]
    if pa.types.is_list(type_):
        value = [0.1, 3.3]
    assert rows(table(tmp_path / "a.parquet", {"c": pa.array([value, None], type_)})) == [{"c": value}, {"c": None}]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize(("name", "mark"), [("in.csv", ","), ("in.csv", ";"), ("in.TSV", "\t")])
def test_columns_of_csv_are_text(tmp_path: Path, pack: Any, name: str, mark: str) -> None:
    lines = [["id", "text", "x y"], ["007", '"a ""b""\nc, d; e"', ""], ["1.10", '""', "ü"]]
    content = "\r\n".join(mark.join(cells) for cells in lines).encode()
    path = write(tmp_path / (name if pack is bytes else f"{name}.gz"), pack(b"\xef\xbb\xbf" + content))
    assert rows(path) == [
        {"id": "007", "text": 'a "b"\nc, d; e', "x y": None},
        {"id": "1.10", "text": "", "x y": "ü"},
    ]


def test_csv_resumes_at_a_window(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", b"n\n" + b"".join(b"%d\n" % n for n in range(3_000)))
    source = open_source(find_files(str(path)))
    first = next(source.windows(START, 1_500, 1 << 20))
    again = [record.columns["n"] for record in source.records(first.end)]
    assert again == [str(n) for n in range(1_500, 3_000)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n3\n", "row 3 (the header is 1) has 1 cells, the header 2"),
        (b"a\nm\xfcde\n", "not UTF-8"),
        (b"a,a\n1,2\n", "two columns named 'a'"),
        (b"", "its first line must name the columns"),
        (b'a,b\n"x \\"y\\" z",1\n', "line 2: there is text after a closing quote"),
        (b'a,b\nx,"1" y\n', "line 2: there is text after a closing quote"),
        (b'a,b\nx,"1\ny,2\nz,3\n', "a quote is not closed"),
        (b'a,b\n"x \\"y, z\\"",1\n', "quotes within a quoted cell must be doubled"),
        (b'a,b\n"x,1\ny,2\n', "a quote is not closed"),
        (b"a,b\nx,1,2\n", "put cells that hold the delimiter in double quotes"),
    ],
)
def test_unreadable_csv_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(write(tmp_path / "in.csv", content))


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", "sep=;\r\na;b\r\nx,y;1\r\n", {"a": "x,y", "b": "1"}),
        ("a.csv", '\ufeff"sep=\t"\r\na\tb\r\nx\t1\r\n', {"a": "x", "b": "1"}),
        ("a.csv", 'a;"b, c"\nx;1\n', {"a": "x", "b, c": "1"}),
        ("a.csv", '"a\nb";c\nx;1\n', {"a\nb": "x", "c": "1"}),
        ("a.csv", "a|b\nx|1\n", {"a": "x", "b": "1"}),
        ("a.psv", "a|b\nx|1\n", {"a": "x", "b": "1"}),
        ("a.tab", "a\tb\nx\t1\n", {"a": "x", "b": "1"}),
        ("a.tsv", 'a\tb,c\n{"k": "x\\"y\\""}\tz"\n', {"a": '{"k": "x\\"y\\""}', "b,c": 'z"'}),
        ("a.csv", "\n\na,b\n\nx,1\n\n", {"a": "x", "b": "1"}),
        ("a.csv", "a,b\rx,1", {"a": "x", "b": "1"}),
        ("a.csv", ",a\n0,x\n", {"": "0", "a": "x"}),
        ("a.csv", "a,b,\nx,1,\n", {"a": "x", "b": "1", "": None}),
        ("a.csv", 'a,b\n"C:\\new\\","say ""\\""!"\n', {"a": "C:\\new\\", "b": 'say "\\"!'}),
        ("a.csv", "a,b\nx\0y,1\n", {"a": "x\0y", "b": "1"}),
    ],
)
def test_csv_of_spreadsheets_is_read(tmp_path: Path, name: str, content: str, columns: dict[str, object]) -> None:
    assert rows(write(tmp_path / name, content.encode())) == [columns]


def test_json_lines_named_csv_are_json_lines(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "in.csv")) == [{"a": 1}]


@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("xl/workbook.xml", "", "Excel workbook"),
        ("mimetype", "application/vnd.oasis.opendocument.spreadsheet", "OpenDocument"),
        ("a.jsonl", "", "zip archive"),
    ],
)
def test_zip_archives_differ_from_spreadsheets(tmp_path: Path, member: str, content: str, said: str) -> None:
    path = tmp_path / "in"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    assert said in refused(path)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_input_names_may_have_any_bytes(ending: str, tmp_path: Path) -> None:
    """Also those of folders, whose keys are columns."""
    folder = tmp_path / os.fsdecode(b"caf\xe9=\xff")
    folder.mkdir()
    path = folder / os.fsdecode(b"\x80." + ending.encode())
    parquet = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), parquet)
    content = {"jsonl": LINE, "jsonl.gz": gzip.compress(LINE), "csv": b"a\n1\n", "parquet": parquet.getvalue()}
    path.write_bytes(content[ending])
    assert rows(path) == [{"caf\\xe9": "\\xff", "a": "1" if ending == "csv" else 1}]
    (identity,) = fingerprint((path,))
    assert identity.path.endswith("caf\\xe9=\\xff/\\x80." + ending), "as the checkpoint stores it"
    assert changed((path,), (identity,)) is None


def test_errors_spell_bytes_of_file_names(tmp_path: Path) -> None:
    """A message must fit into the log, the summary and JSON, which hold UTF-8."""
    path = tmp_path / os.fsdecode(b"\xff.parquet")
    path.write_bytes(b"PAR1 and no more")
    assert r"/\xff.parquet can't be read" in refused(path)
    assert r"/\xfe: no input file there" in refused(tmp_path / os.fsdecode(b"\xfe"))
    assert str(InputError("half a pair: \ud83d")) == "half a pair: ?"


def test_dictionary_views_are_plain_text(tmp_path: Path) -> None:
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.uint32()), pa.array(["x", "y"], pa.string_view()))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), words)
    given = pa.table({"c": words, "v": pa.array(["x", "y", "x"], pa.string_view()), "l": lists})  # as polars has them
    with as_file(given, tmp_path) as file:
        path = write(tmp_path / "a.parquet", file.read())
    assert rows(path) == [
        {"c": "x", "v": "x", "l": ["x"]},
        {"c": "y", "v": "y", "l": ["y"]},
        {"c": None, "v": "x", "l": [None]},
    ]


# ── partition filters ─────────────────────────────────────────────────────────────────────────────────────────────────


FILTERED = (
    *("lang=de/day=2026-10-31", "lang=de/day=2026-11-01", "lang=en/day=2026-11-02", "lang=pt%20BR/day=2026-11-30"),
    *("lang=__HIVE_DEFAULT_PARTITION__/day=2026-12-01", "lang=en", "lang=A%2FB/day=2026-01-01"),
)


def test_filters_choose_files_by_their_folders(tmp_path: Path) -> None:
    for folder in FILTERED:
        write(tmp_path / folder / "in.jsonl")
    (tmp_path / "lang=it").mkdir()
    (tmp_path / "lang=it" / "in.parquet").write_bytes(b"not opened, so not refused")
    every = {"lang": "!=it"}
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"lang": "de"}, [0, 1]),
        ({"lang": ["de", "en"]}, [0, 1, 2, 5]),
        ({"lang": "pt BR"}, [3]),
        ({"lang": "A/B"}, [6]),
        ({"lang": "=de"}, [0, 1]),
        ({"lang": "__HIVE_DEFAULT_PARTITION__"}, [4]),
        ({"lang": ["__HIVE_DEFAULT_PARTITION__", "pt BR"]}, [3, 4]),
        (every, [0, 1, 2, 3, 5, 6]),
        ({**every, "day": ">=2026-11-01"}, [1, 2, 3]),
        ({**every, "day": [">2026-11-01", "< 2026-11-30"]}, [2]),
        ({"day": "__HIVE_DEFAULT_PARTITION__", "lang": "en"}, [5]),
        ({"day": "2026-12-01"}, [4]),
        ({"day": 20261201, "lang": ">"}, []),
    ]
    for filters, places in cases:
        wanted = sorted(tmp_path / FILTERED[place] / "in.jsonl" for place in places)
        if wanted:
            assert list(find_files(str(tmp_path), filters)) == wanted, filters
            assert list(find_files(f"{tmp_path}/**/in.*", filters)) == wanted, filters
        else:
            with pytest.raises(InputError, match=r"none of the files .* \(8 in all\)"):
                find_files(str(tmp_path), filters)


def test_integer_keys_are_compared_as_numbers(tmp_path: Path) -> None:
    for month in ("01", "2", "10", "-1", "x"):
        write(tmp_path / f"month={month}" / "in.jsonl")

    def months(wanted: Any) -> set[str]:
        return {file.parents[0].name.removeprefix("month=") for file in find_files(str(tmp_path), {"month": wanted})}

    assert months(1) == months("1") == months("01") == {"01"}
    assert months(">=2") == {"2", "10", "x"}  # text is compared as text
    assert months([">=2", "<10"]) == {"2"}
    assert months("!=2") == {"01", "10", "-1", "x"}


@pytest.mark.parametrize(
    ("filters", "line"),
    [
        ({"lng": "de"}, "input.partitions.lng: {path} has no folder named lng=…; its keys are lang, day"),
        ({"lang": "fr"}, "input.partitions: none of the files of {path} match (2 in all); lang is de, en"),
        ({"lang": []}, "input.partitions.lang: is empty; name a value"),
        ({"lang": ["de", ">e"]}, "input.partitions.lang: mixes values and comparisons; a list has one kind"),
    ],
)
def test_a_senseless_filter_is_one_line(tmp_path: Path, filters: dict[str, Any], line: str) -> None:
    for lang in ("de", "en"):
        write(tmp_path / f"lang={lang}" / "day=1" / "in.jsonl")
    with pytest.raises(InputError) as error:
        find_files(str(tmp_path), filters)
    assert str(error.value) == line.format(path=tmp_path)


def test_paths_without_keys_have_no_filters(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl")
    with pytest.raises(InputError, match="it has no folders named key=value"):
        find_files(str(tmp_path), {"lang": "de"})


def test_many_values_are_shown_in_part(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"day=2026-11-{number + 1:02}" / "in.jsonl")
    with pytest.raises(InputError, match="2026-11-05, …, 2026-11-26"):
        find_files(str(tmp_path), {"day": "2027-01-01"})
