"""Reads the input: finds the files, checks their records one by one, and yields windows of rows to work on.

    files = find_files("reviews/*.jsonl.gz")
    source = open_source(files)
    for record in source.records(): ...                      # the check pass
    for window in source.windows(START, 8192, 32 << 20): ...  # chunks, each from where the last one ended

Files are read block by block: the longest line or one batch bounds memory, never the file's size.
"""

from batchrun.source.content import format_of
from batchrun.source.files import file_at, find_files
from batchrun.source.identity import FileIdentity, changed, digest, fingerprint
from batchrun.source.in_memory import Rows, as_file
from batchrun.source.jsonl import MAX_LINE_BYTES, JsonlSource
from batchrun.source.rows import rows_of
from batchrun.source.table import TableSource
from batchrun.source.window import START, Position, Record, Source, Span, Window
from batchrun.storage.objects import InputFile

__all__ = ["find_files", "file_at", "open_source", "rows_of", "Rows", "as_file", "JsonlSource", "TableSource"]
__all__ += ["START", "Position", "Record", "Source", "Span", "Window"]
__all__ += ["FileIdentity", "InputFile", "changed", "digest", "fingerprint"]


def open_source(files: tuple[InputFile, ...], max_line_bytes: int = MAX_LINE_BYTES, span: Span | None = None) -> Source:
    """The source that reads `files`, all of one format, as `find_files` returned them, or a `span` of their records. A
    longer line is rejected.

    Raises:
        InputError: a file can't be read in its format. Only heads and footers have been read.
    """
    if format_of(files[0]) == "jsonl":
        return JsonlSource(files, max_line_bytes, span=span)
    return TableSource(files, span)
