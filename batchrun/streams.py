"""Standard input, output and error, which may be closed, full, hung up, or in another encoding.

Results go to stdout: if one can't be written, the command ends with the documented exit code. Messages go to stderr: if
one can't be written, it is dropped, and the run continues.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from batchrun.errors import BatchrunError, DiskError, ExitCode


class StdoutClosedError(BatchrunError):
    """The reader of stdout has closed it, as `head` does."""

    exit_code = ExitCode.SIGPIPE


def open_all() -> None:
    """Opens closed descriptors 0 to 2 as /dev/null, and escapes characters that the encoding lacks."""
    # Otherwise the next file that is opened gets that number, and a message would be written into the checkpoint.
    # (And libuv aborts if one of its descriptors is below 3.)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # POSIX: gets the lowest free number
            os.set_inheritable(descriptor, True)
    sys.stdout = _text(sys.stdout, 1)
    sys.stderr = _text(sys.stderr, 2)


def _text(stream: TextIO | None, descriptor: int) -> TextIO:
    """The stream, or a new one on the descriptor if Python found it closed (None)."""
    if stream is None:
        return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


def standard_input() -> BinaryIO | None:
    """The bytes of stdin; None if it was closed when the process began."""
    return None if sys.stdin is None else sys.stdin.buffer


def write_result(text: str) -> None:
    """Writes the text to stdout and flushes it.

    Raises:
        StdoutClosedError: its reader closed it.
        DiskError: the write failed for another reason.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        silence(sys.stdout)
        raise StdoutClosedError("standard output was closed") from error
    except OSError as error:
        silence(sys.stdout)
        raise DiskError(
            f"standard output can't be written: {error.strerror}; fix it and run the same command again"
        ) from error


@contextlib.contextmanager
def lenient_stderr() -> Iterator[None]:
    """Inside the block, a failed write to stderr is dropped, and so is every later one."""
    try:
        yield
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Redirects the stream, and what it has buffered, to /dev/null.

    Python flushes both streams at exit, and would exit with 120 if that failed.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
