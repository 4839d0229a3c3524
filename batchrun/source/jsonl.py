"""Reads JSON lines, plain or compressed, as records and windows."""

from collections.abc import Callable, Container, Iterator
from typing import Literal

import msgspec
import pyarrow as pa

from batchrun.errors import InputError, writable
from batchrun.source import hive
from batchrun.source.content import BOM, blocks, format_of
from batchrun.source.lines import read_row, split_lines
from batchrun.source.window import LINES, START, Position, Record, Span, Window
from batchrun.storage.objects import InputFile

BLOCK_BYTES = 1 << 20  # larger blocks are no faster (measured)
MAX_LINE_BYTES = 64 << 20  # a longer line is usually a file without line ends, which must not fill the memory
MARK_EVERY = 1000  # records; a span is found by one pass, and a second one over so many at most


class _Line(msgspec.Struct, frozen=True, gc=False):
    """One line that is not blank. `text` is None for a line over the length limit; `end` is the offset after it."""

    file: int
    number: int
    ordinal: int
    text: bytes | None
    end: int

    def after(self) -> Position:
        return Position(self.file, self.end, self.number, self.ordinal + 1)


class JsonlSource:
    """Files of JSON lines, each plain, gzip or zstd by its content. Blank lines are skipped.

    The keys of folders named `key=value` are columns of the files in them. A row's own value overrides such a key."""

    format: Literal["jsonl"] = "jsonl"

    def __init__(
        self,
        files: tuple[InputFile, ...],
        max_line_bytes: int = MAX_LINE_BYTES,
        block_bytes: int = BLOCK_BYTES,
        span: Span | None = None,
    ) -> None:
        """Reads every file's head, inside its compression too. With a `span` nothing else is yielded.

        Raises:
            InputError: a file is unreadable, in another format, or in another encoding than UTF-8.
        """
        self.files = files
        self._max_line_bytes = max_line_bytes
        self._block_bytes = block_bytes
        self._keys = hive.keys_of(files)
        self._span = span
        for file in files:
            if format_of(file) != "jsonl":
                raise InputError(f"{file} is not JSON lines; all files of an input must have one format")

    def records(self, start: Position = START) -> Iterator[Record]:
        """Every record from `start` on: the decoded line or its problem.

        Raises:
            InputError: the rest of the file can't be read, as in a truncated or damaged compressed stream.
        """
        origins = [writable(f"{file}:") for file in self.files]
        too_long = f"the line is longer than {self._max_line_bytes:,} bytes"
        for line in self._lines(start):
            row = too_long if line.text is None else read_row(line.text)
            if isinstance(row, dict) and self._keys[line.file]:
                row = {**self._keys[line.file], **row}
            if isinstance(row, str):
                yield Record(line.ordinal, origins[line.file], line.number, {}, row, line.text)
            else:
                yield Record(line.ordinal, origins[line.file], line.number, row)

    def windows(self, start: Position, max_rows: int, max_bytes: int, skip: Container[int] = ()) -> Iterator[Window]:
        """The lines from `start` on without those in `skip`, undecoded, in windows with the schema `LINES`.

        Raises:
            InputError: as `records`, or a line over the length limit is not in `skip`.
        """
        lines: list[bytes] = []
        size, end = 0, start
        prefixes = [msgspec.json.encode(keys)[:-1] if keys else b"" for keys in self._keys]  # such as `{"k":1`
        for line in self._lines(start):
            if line.ordinal not in skip:
                if line.text is None:
                    raise InputError(f"{self.files[line.file]}:{line.number}: the line is too long")
                if lines and (len(lines) >= max_rows or size + len(line.text) > max_bytes):
                    window, lines, size = _window(lines, end), [], 0
                    yield window  # its lines have been released
                    del window
                text = line.text
                if keys := prefixes[line.file]:
                    # The folders' keys come first: the decoder keeps the last value, which is the line's own.
                    members = text.strip()[1:]
                    text = keys + (b"" if members.lstrip().startswith(b"}") else b",") + members
                lines.append(text)
                size += len(text)
            end = line.after()
        if lines:
            yield _window(lines, end)

    def find_span(self, choose: Callable[[int], tuple[int, int]]) -> Span:
        """The span of the ordinals that `choose` returns for the number of records. Reads all files once.

        Raises:
            InputError: as `records`.
        """
        marks, count = [START], 0
        for line in self._lines(START):
            count = line.ordinal + 1
            if count % MARK_EVERY == 0:
                marks.append(line.after())
        first, end = choose(count)
        start = marks[min(first // MARK_EVERY, len(marks) - 1)]
        lines = self._lines(start)
        while start.ordinal < first:
            start = next(lines).after()
        return Span(start, end, count)

    def _lines(self, start: Position) -> Iterator[_Line]:
        if self._span is not None:
            start = self._span.enter(start)
        end = None if self._span is None else self._span.end
        offset, number, ordinal = start.offset, start.line, start.ordinal
        for index in range(start.file, len(self.files)):
            content = blocks(self.files[index], offset, self._block_bytes)
            for text, size in split_lines(content, self._max_line_bytes):
                if text is not None:  # joined files have a mark at the start of each
                    text = text.removeprefix(BOM)
                offset += size
                number += 1
                if text is None or text.strip():
                    if ordinal == end:
                        return
                    text = text[:-1] if text is not None and text.endswith(b"\r") else text
                    yield _Line(index, number, ordinal, text, offset)
                    ordinal += 1
            offset = number = 0


def _window(lines: list[bytes], end: Position) -> Window:
    return Window(pa.table([pa.array(lines, pa.large_binary())], schema=LINES), end)
