"""Recognises files that batchrun does not read, and names the command that converts each one. PURE, but it looks
for free file names.

Magic numbers are from each format's specification. A spreadsheet is a zip archive; its members say which kind it is.
Every command has been run on such a file (tests/run/test_unsupported_files.py). None overwrites an existing file.
"""

import os
import re
import sys
import zipfile
from itertools import count
from pathlib import Path

from batchrun.errors import InputError, quoted

HEAD_BYTES = 512  # the header of a tar archive, whose magic is farthest from the start

_PYARROW = (
    "{python} -c 'import sys, pyarrow.%s as f, pyarrow.parquet as p; p.write_table(%s, sys.argv[2])' {file} {new}"
)
_TABLE = "f.read_table(sys.argv[1])"
_POLARS = "python -c 'import sys, polars; polars.read_avro(sys.argv[1]).write_parquet(sys.argv[2])' {file} {new}"
_EXCEL = (  # as text: pandas reads "NA" as a missing cell and long numbers as doubles
    "python -c 'import sys, pandas; pandas.read_excel(sys.argv[1], dtype=str, keep_default_na=False)"
    ".to_csv(sys.argv[2], index=False)' {file} {new}  (needs pandas and %s)"
)
_ZLIB = "{python} -c 'import sys, zlib; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read()))'"
_ICONV = "iconv -f %s -t UTF-8 {file} > {new}"
_UNWRAP = "jq -c '.[]' {file} > {new}"

_Conversion = tuple[str, str, str | None]
"""The kind of file, the command, and the ending of the new file: None = the file's own ending, "" = a folder."""

_CONVERTED: dict[bytes, _Conversion] = {
    b"BZh": ("is compressed with bzip2", "bzip2 -dc {file} > {new}", None),
    b"\xfd7zXZ": ("is compressed with xz", "xz -dc {file} > {new}", None),
    b"\x04\x22\x4d\x18": ("is compressed with LZ4", "lz4 -dc {file} > {new}", None),
    b"\xff\x06\x00\x00sNaPpY": (
        "is compressed with Snappy",
        'python -c \'import sys, snappy; snappy.stream_decompress(open(sys.argv[1], "rb"), open(sys.argv[2], "wb"))\''
        " {file} {new}  (needs python-snappy)",
        None,
    ),
    b"x\x9c": ("is compressed with zlib", _ZLIB + " < {file} > {new}", None),
    b"x\xda": ("is compressed with zlib", _ZLIB + " < {file} > {new}", None),
    b"ARROW1": ("is an Arrow or Feather file", _PYARROW % ("feather", _TABLE), ".parquet"),
    b"\xff\xff\xff\xff": (
        "is an Arrow stream",
        _PYARROW % ("ipc", "f.open_stream(sys.argv[1]).read_all()"),
        ".parquet",
    ),
    b"FEA1": ("is a Feather file of version 1", _PYARROW % ("feather", _TABLE), ".parquet"),
    b"ORC": ("is an ORC file", _PYARROW % ("orc", _TABLE), ".parquet"),
    b"Obj\x01": ("is an Avro file", _POLARS + "  (needs polars)", ".parquet"),
    b"SQLite format 3": (
        "is an SQLite database",
        "sqlite3 -header -csv {file} 'SELECT * FROM your_table' > {new}",
        ".csv",
    ),
    b"DUCK": (  # with the library: a client of another version can't read the file
        "is a DuckDB database",
        'python -c \'import sys, duckdb; duckdb.connect(sys.argv[1], read_only=True).sql("FROM your_table")'
        ".write_parquet(sys.argv[2])' {file} {new}  (needs duckdb)",
        ".parquet",
    ),
    b"VTXF": (
        "is a Vortex file",
        "python -c 'import sys, vortex, pyarrow.parquet as p; p.write_table(vortex.open(sys.argv[1]).to_arrow()"
        ".read_all(), sys.argv[2])' {file} {new}  (needs vortex-data)",
        ".parquet",
    ),
    b"\xd0\xcf\x11\xe0": ("is an old Excel or Office file", _EXCEL % "xlrd", ".csv"),
    b"\x1e{": ("is a JSON text sequence, not JSON lines", "tr -d '\\036' < {file} > {new}", ".jsonl"),
    b"version https://git-lfs": ("is a Git LFS pointer, not the file", "git lfs pull", None),
    b"%PDF": ("is a PDF file", "", None),
    b"\x89HDF": ("is an HDF5 file", "", None),
    b"\x93NUMPY": ("is a NumPy file", "", None),
    b"\x89PNG": ("is an image", "", None),
    b"\xff\xd8\xff": ("is an image", "", None),
    **{b"\x80%c" % version: ("is a Python pickle", "", None) for version in range(2, 6)},
}
_READS_COMPRESSED = ("mkdir", "git")  # tar unpacks compressed archives itself
_DUCK_MAGIC_AT = 8  # after a checksum of the first block
_TAR_MAGIC_AT = 257  # pax(1), "ustar Interchange Format"
_COMPRESSED = (".bz2", ".xz", ".lz4", ".sz", ".snappy", ".zz", ".zlib", ".gz", ".zst", ".zstd")

_ENCODINGS = {  # longest first: UTF-32's mark starts with UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
    b"{\x00\x00\x00": "UTF-32LE",
    b"\x00\x00\x00{": "UTF-32BE",
    b"{\x00": "UTF-16LE",
    b"\x00{": "UTF-16BE",
}
_LEADING = rb"(?:\xef\xbb\xbf)?\s*"
_JSON_ARRAY = re.compile(_LEADING + rb"\[(?:\s*\{|[ \t\r]*(?:\n|$))")
_JSON_OVER_LINES = re.compile(_LEADING + rb"\{[ \t\r]*\n")
_MARKUP = re.compile(_LEADING + rb"<(?:!doctype html|html|\?xml)", re.IGNORECASE)


def refuse(head: bytes, path: Path, packed: str | None = None) -> None:
    """Reject content that starts with `head` if it is in a known format or encoding that batchrun does not read.

    `packed`: the tool that unpacks `path`, if `head` was read from inside its compression.

    Raises:
        InputError: names the format and the command that converts the file.
    """
    if head.startswith(b"PARE"):
        raise InputError(f"{path} is an encrypted Parquet file; decrypt it first")
    conversion = _conversion_of(head, path)
    if conversion is None:
        return
    what, command, ending = conversion
    if packed is not None and command and not command.startswith(_READS_COMPRESSED):
        raise InputError(f"{path}: its content {what}; {unpack_hint(packed, path)}")
    hint = "convert it with: " + _filled(command, path, ending) if command else "export the data as CSV or Parquet"
    raise InputError(f"{path} {what}; {hint}")


_DELTA = (
    "python -c 'import sys, deltalake, pyarrow.parquet as p; "
    "p.write_table(deltalake.DeltaTable(sys.argv[1]).to_pyarrow_table(), sys.argv[2])' {file} {new}  (needs deltalake)"
)
_ICEBERG = (
    "python -c 'import sys, pyiceberg.table as t, pyarrow.parquet as p; "
    "p.write_table(t.StaticTable.from_metadata(sys.argv[1]).scan().to_arrow(), sys.argv[2])' {file} {new}"
    "  (needs pyiceberg)"
)


def refuse_table(folder: Path) -> None:
    """Reject the folder of a table format: rows that the table has replaced or deleted are still in its data files.

    `folder`: where data files are; above it may be folders named `key=value`.

    Raises:
        InputError: names the table and the command that writes its present rows.
    """
    while "=" in folder.name:
        folder = folder.parent
    why = "whose files may hold rows that the table no longer has"
    if (folder / "_delta_log").is_dir():
        raise InputError(f"{folder} is a Delta table, {why}; convert it with: {_filled(_DELTA, folder, '.parquet')}")
    if (folder / ".hoodie").is_dir():
        raise InputError(f"{folder} is a Hudi table, {why}; export its present rows as Parquet")
    versions = [*folder.glob("metadata/*.metadata.json"), *folder.parent.glob("metadata/*.metadata.json")]
    if versions and (folder.name == "data" or (folder / "metadata").is_dir()):
        newest = max(versions, key=lambda version: version.stat().st_mtime_ns)
        table = newest.parent.parent
        command = _filled(_ICEBERG, newest, ".parquet", beside=table)
        raise InputError(f"{table} is an Iceberg table, {why}; convert it with: {command}")


def unpack_hint(tool: str, path: Path) -> str:
    """Advice for a compressed file whose content is not text."""
    return "unpack it first: " + _filled(f"{tool} -dc {{file}} > {{new}}", path, None)


def encoding_hint(encoding: str, path: Path) -> str:
    """Advice for a text file in another encoding."""
    return "convert it with: " + _filled(_ICONV % encoding, path, None)


def _conversion_of(head: bytes, path: Path) -> _Conversion | None:
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    for magic, way in _CONVERTED.items():
        if head.startswith(magic) or (magic == b"DUCK" and head.startswith(magic, _DUCK_MAGIC_AT)):
            return way
    if head.startswith(b"ustar", _TAR_MAGIC_AT):
        return "is a tar archive", "mkdir {new} && tar -xf {file} -C {new}", ""
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            return f"is {encoding} from line 1 on, not UTF-8", _ICONV % encoding, None
    if _JSON_ARRAY.match(head):
        return "is one JSON array, not JSON lines", _UNWRAP, ".jsonl"
    if _JSON_OVER_LINES.match(head):
        inside = "  (for rows in an array inside, name the array: jq -c '.rows[]')"
        return "is JSON over many lines, not JSON lines", "jq -c . {file} > {new}" + inside, ".jsonl"
    if _MARKUP.match(head):
        return "is HTML or XML, perhaps a web page in place of the file", "", None
    return None


def _filled(command: str, path: Path, ending: str | None, beside: Path | None = None) -> str:
    """The command with the file names quoted for a shell. The new file's name is free, beside the old one's."""
    base = beside or path
    if ending is None:
        base = base.with_suffix("") if base.suffix.lower() in _COMPRESSED else base
        ending = base.suffix
    stem = str(base.with_suffix(""))
    names = (f"{stem}{'.converted' if n else ''}{n if n > 1 else ''}{ending}" for n in count())
    new = next(name for name in names if not os.path.lexists(name))
    # so that a name that starts with a dash is not read as an option
    file, new = (quoted(f"./{name}" if name.startswith("-") else name) for name in (str(path), new))
    return command.format(file=file, new=new, python=quoted(sys.executable))


def _archive(path: Path) -> _Conversion:
    """The kind of a zip archive, by its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            kind = archive.read("mimetype") if "mimetype" in names else b""
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        names, kind = [], b""
    if any(name.startswith("xl/") for name in names):
        return "is an Excel workbook", _EXCEL % "openpyxl", ".csv"
    if b"opendocument.spreadsheet" in kind:
        return "is an OpenDocument spreadsheet", _EXCEL % "odfpy", ".csv"
    return "is a zip archive", "{python} -m zipfile -e {file} {new}", ""
