"""JSON lines, plain or compressed: blocks → lines → records and windows."""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pyarrow as pa

from batchrun.errors import InputError
from batchrun.source.files import HEAD_BYTES, classify, content_of, reading
from batchrun.source.lines import read_row, split_lines
from batchrun.source.window import LINES, START, Position, Record, Window

BLOCK_BYTES = 1 << 20  # beyond it reading gets no faster (measured), only larger
MAX_LINE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"


class _Line(msgspec.Struct, frozen=True, gc=False):
    """One line that is not blank. `text` is None beyond the length limit; `end` is the offset behind it."""

    file: int
    number: int
    ordinal: int
    text: bytes | None
    end: int

    def after(self) -> Position:
        return Position(self.file, self.end, self.number, self.ordinal + 1)


class JsonlSource:
    """Files of JSON lines, each plain, gzip or zstd whatever its name says. Blank lines are no records."""

    format: Literal["jsonl"] = "jsonl"

    def __init__(
        self, files: tuple[Path, ...], max_line_bytes: int = MAX_LINE_BYTES, block_bytes: int = BLOCK_BYTES
    ) -> None:
        """Every file's head was looked at, inside its compression too.

        Raises:
            InputError: a file is unreadable, of another format, or in another encoding than UTF-8.
        """
        self.files = files
        self._max_line_bytes = max_line_bytes
        self._block_bytes = block_bytes
        for file in files:
            head = next(_blocks(file, 0, HEAD_BYTES), b"")
            if classify(head, file) != "plain":
                raise InputError(f"{file} holds another compressed or Parquet file; unpack it once")

    def records(self, start: Position = START) -> Iterator[Record]:
        """Every record from `start` on: the decoded line or its problem.

        Raises:
            InputError: the file can't be read any further, such as a cut or damaged compressed stream.
        """
        origins = [f"{file}:" for file in self.files]
        too_long = f"the line is longer than {self._max_line_bytes:,} bytes"
        for line in self._lines(start):
            row = too_long if line.text is None else read_row(line.text)
            if isinstance(row, str):
                yield Record(line.ordinal, origins[line.file], line.number, {}, row, line.text)
            else:
                yield Record(line.ordinal, origins[line.file], line.number, row)

    def windows(self, start: Position, max_rows: int, max_bytes: int, skip: Container[int] = ()) -> Iterator[Window]:
        """The lines from `start` on without those in `skip`, undecoded, in windows of `LINES`.

        Raises:
            InputError: as `records`, or a line beyond the length limit is not in `skip`.
        """
        lines: list[bytes] = []
        size, end = 0, start
        for line in self._lines(start):
            if line.ordinal not in skip:
                if line.text is None:
                    raise InputError(f"{self.files[line.file]}:{line.number}: the line is too long")
                if lines and (len(lines) >= max_rows or size + len(line.text) > max_bytes):
                    window, lines, size = _window(lines, end), [], 0
                    yield window  # after letting go of what it was made of
                    del window
                lines.append(line.text)
                size += len(line.text)
            end = line.after()
        if lines:
            yield _window(lines, end)

    def _lines(self, start: Position) -> Iterator[_Line]:
        offset, number, ordinal = start.offset, start.line, start.ordinal
        for index in range(start.file, len(self.files)):
            blocks = _blocks(self.files[index], offset, self._block_bytes)
            for text, size in split_lines(blocks, self._max_line_bytes):
                if offset == 0 and text is not None:
                    text = text.removeprefix(_BOM)
                offset += size
                number += 1
                if text is None or text.strip():
                    text = text[:-1] if text is not None and text.endswith(b"\r") else text
                    yield _Line(index, number, ordinal, text, offset)
                    ordinal += 1
            offset = number = 0


def _blocks(file: Path, offset: int, block_bytes: int) -> Iterator[bytes]:
    try:
        with _open(file) as stream:
            _skip(stream, offset, block_bytes)
            while block := stream.read(block_bytes):
                yield block
    except OSError as error:
        raise InputError(f"{file} can't be read to its end: {error}; write or copy it again") from error


def _open(file: Path) -> pa.NativeFile:
    content = content_of(file)
    with reading(file):
        stream = pa.OSFile(str(file), "rb")
        if content == "gzip" or content == "zstd":
            return pa.CompressedInputStream(stream, content)
        return stream


def _skip(stream: pa.NativeFile, offset: int, block_bytes: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset and (block := stream.read(min(offset, block_bytes))):
        offset -= len(block)


def _window(lines: list[bytes], end: Position) -> Window:
    return Window(pa.table([pa.array(lines, pa.large_binary())], schema=LINES), end)
