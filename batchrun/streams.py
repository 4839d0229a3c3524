"""Standard input, output and error as a process finds them: closed, full, hung up, or in another encoding.

Results go to stdout: one that can't be written ends the command with the documented exit code. Lines for people go to
stderr: one that can't be written is dropped, and the run continues.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from batchrun.errors import BatchrunError, DiskError, ExitCode


class StdoutClosedError(BatchrunError):
    """The reader of our results has gone, as `head` does."""

    exit_code = ExitCode.SIGPIPE


def open_all() -> None:
    """File descriptors 0 to 2 are open, and what an encoding has no character for is written escaped.

    A closed one is /dev/null from now on. Otherwise the next file that this process opens would get its number, and a
    line for people would be written into the checkpoint. (libuv aborts on a descriptor of its own below 3.)
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # POSIX: the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    sys.stdout = _text(sys.stdout, 1)
    sys.stderr = _text(sys.stderr, 2)


def _text(stream: TextIO | None, descriptor: int) -> TextIO:
    """The stream, or one over the descriptor where Python found it closed and made None of it."""
    if stream is None:
        return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


def standard_input() -> BinaryIO | None:
    """The bytes of stdin; None where it was closed when the process began."""
    return None if sys.stdin is None else sys.stdin.buffer


def write_result(text: str) -> None:
    """The text is written to stdout, and has left this process.

    Raises:
        StdoutClosedError: its reader has gone.
        DiskError: it can't be written for another reason.
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
            f"standard output can't be written: {error.strerror}; see to it and run the same command again"
        ) from error


@contextlib.contextmanager
def for_people() -> Iterator[None]:
    """Inside, a failed write to stderr is dropped, and so is every later one: no one sees them."""
    try:
        yield
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """What is still buffered for the stream, and all that comes, goes to /dev/null.

    Python flushes both streams at its end, and would complain and exit with 120 if that failed.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
