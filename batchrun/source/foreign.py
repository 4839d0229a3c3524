"""Files that are not read: what each one is, and the command that converts it. PURE over a file's first bytes.

Magic numbers: each format's specification. A spreadsheet is a zip archive; its members tell which one.
"""

import re
import shlex
import zipfile
from pathlib import Path

from batchrun.errors import InputError

HEAD_BYTES = 512

_CONVERTED = {  # magic: (what it is, command; {0} is the file, {1} the new one, without its ending)
    b"BZh": ("is compressed with bzip2", "bzip2 -dk {0}"),
    b"\xfd7zXZ": ("is compressed with xz", "xz -dk {0}"),
    b"\x04\x22\x4d\x18": ("is compressed with LZ4", "lz4 -dk {0}"),
    b"\xff\x06\x00\x00sNaPpY": ("is compressed with Snappy", "snzip -dk {0}"),
    b"ARROW1": (
        "is an Arrow or Feather file",
        "python -c 'import sys, pyarrow.feather as f, pyarrow.parquet as p; "
        "p.write_table(f.read_table(sys.argv[1]), sys.argv[2])' {0} {1}.parquet",
    ),
    b"\xff\xff\xff\xff": (
        "is an Arrow stream",
        "python -c 'import sys, pyarrow.ipc as i, pyarrow.parquet as p; "
        "p.write_table(i.open_stream(sys.argv[1]).read_all(), sys.argv[2])' {0} {1}.parquet",
    ),
    b"FEA1": (
        "is a Feather file of version 1",
        "python -c 'import sys, pyarrow.feather as f, pyarrow.parquet as p; "
        "p.write_table(f.read_table(sys.argv[1]), sys.argv[2])' {0} {1}.parquet",
    ),
    b"ORC": (
        "is an ORC file",
        "python -c 'import sys, pyarrow.orc as o, pyarrow.parquet as p; "
        "p.write_table(o.read_table(sys.argv[1]), sys.argv[2])' {0} {1}.parquet",
    ),
    b"Obj\x01": (
        "is an Avro file",
        "python -c 'import sys, polars; polars.read_avro(sys.argv[1]).write_parquet(sys.argv[2])' {0} {1}.parquet",
    ),
    b"SQLite format 3": (
        "is an SQLite database",
        "sqlite3 -header -csv {0} 'SELECT * FROM your_table' > {1}.csv",
    ),
    b"DUCK": (
        "is a DuckDB database",
        "duckdb {0} \"COPY your_table TO '{1}.parquet'\"",
    ),
    b"\xd0\xcf\x11\xe0": (
        "is an old Excel or Office file",
        "python -c 'import sys, pandas; pandas.read_excel(sys.argv[1], dtype=str).to_csv(sys.argv[2], index=False)' "
        "{0} {1}.csv  (needs pandas and xlrd)",
    ),
    b"%PDF": ("is a PDF file", ""),
}
_DUCK_MAGIC_AT = 8  # behind a checksum of the first block

_SPREADSHEET = (
    "python -c 'import sys, pandas; pandas.read_excel(sys.argv[1], dtype=str).to_csv(sys.argv[2], index=False)' "
    "{0} {1}.csv  (needs pandas and %s)"
)
_UNWRAP = "jq -c '.[]' {0} > {1}.jsonl"
_ENCODINGS = {  # longest first: UTF-32's mark begins with UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
    b"{\x00\x00\x00": "UTF-32LE",
    b"\x00\x00\x00{": "UTF-32BE",
    b"{\x00": "UTF-16LE",
    b"\x00{": "UTF-16BE",
}
_JSON_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[(?:\s*\{|[ \t\r]*(?:\n|$))")


def refuse(head: bytes, path: Path) -> None:
    """Nothing, if content that begins with `head` may be text or Parquet.

    Raises:
        InputError: a known format or encoding that batchrun does not read; the line says how to convert it.
    """
    if head.startswith(b"PARE"):
        raise InputError(f"{path} is an encrypted Parquet file; decrypt it first")
    if head.startswith(b"PK\x03\x04"):
        raise InputError(_archive(path))
    for magic, (what, command) in _CONVERTED.items():
        if head.startswith(magic) or (magic == b"DUCK" and head.startswith(magic, _DUCK_MAGIC_AT)):
            raise InputError(f"{path} {what}; {_by(command, path)}")
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            quoted = shlex.quote(str(path))
            raise InputError(
                f"{path}:1 is {encoding}, not UTF-8; convert it with: iconv -f {encoding} -t UTF-8 {quoted}"
            )
    if _JSON_ARRAY.match(head):
        raise InputError(f"{path} is one JSON array, not JSON lines; {_by(_UNWRAP, path)}")


def _by(command: str, path: Path) -> str:
    """The way on: the command, with the names quoted as a shell wants them."""
    if not command:
        return "export the data as JSON lines, CSV or Parquet"
    target = path.with_suffix("")
    within_quotes = "'{1}" in command
    return "convert it with: " + command.format(
        shlex.quote(str(path)), str(target).replace("'", "''") if within_quotes else shlex.quote(str(target))
    )


def _archive(path: Path) -> str:
    """What a zip archive is, by its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            kind = archive.read("mimetype") if "mimetype" in names else b""
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        names, kind = [], b""
    if any(name.startswith("xl/") for name in names):
        return f"{path} is an Excel workbook; {_by(_SPREADSHEET % 'openpyxl', path)}"
    if b"opendocument.spreadsheet" in kind:
        return f"{path} is an OpenDocument spreadsheet; {_by(_SPREADSHEET % 'odfpy', path)}"
    return f"{path} is a zip archive; unpack it with: unzip {shlex.quote(str(path))}"
