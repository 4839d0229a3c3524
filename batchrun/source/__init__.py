"""Reading the input: which files, their records one by one, and windows of them to work on.

    files = find_files("reviews/*.jsonl.gz")
    source = open_source(files)
    for record in source.records(): ...                      # the check pass
    for window in source.windows(START, 8192, 32 << 20): ...  # chunks, each from where the last one ended

Everything is read block by block: memory is bounded by the longest line or one batch, never by the file.
"""

from pathlib import Path

from batchrun.source.files import FileIdentity, changed, digest, find_files, fingerprint, format_of, spool
from batchrun.source.given import Rows, as_file
from batchrun.source.jsonl import MAX_LINE_BYTES, JsonlSource
from batchrun.source.rows import rows_of
from batchrun.source.table import TableSource
from batchrun.source.window import START, Position, Record, Source, Window

__all__ = [
    "find_files",
    "open_source",
    "rows_of",
    "spool",
    "Rows",
    "as_file",
    "START",
    "Position",
    "Record",
    "Source",
    "Window",
    "JsonlSource",
    "TableSource",
    "FileIdentity",
    "changed",
    "digest",
    "fingerprint",
]


def open_source(files: tuple[Path, ...], max_line_bytes: int = MAX_LINE_BYTES) -> Source:
    """The source that reads `files`, all of one format, as `find_files` returned them; a longer line is a problem.

    Raises:
        InputError: a file can't be read as what it is; nothing was read beyond heads and footers.
    """
    return JsonlSource(files, max_line_bytes) if format_of(files[0]) == "jsonl" else TableSource(files)
