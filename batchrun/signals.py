"""Signals as ways out: which there are, and what they do while no event loop runs."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from batchrun.errors import ExitCode, RunStoppedError

EXIT_CODES = {
    signal.SIGINT: ExitCode.SIGINT,
    signal.SIGTERM: ExitCode.SIGTERM,
    signal.SIGHUP: ExitCode.SIGHUP,
}


def ours() -> bool:
    """True where signals may be listened for: Python lets only the main thread choose what they do."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Whatever the block made the signals do, they do afterwards what they did before."""
    before = {number: signal.getsignal(number) for number in EXIT_CODES} if ours() else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by C code, which alone can give it back
                signal.signal(number, handler)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """A signal ends the block at once with a RunStoppedError: while the input is checked, or a file is written."""
    if not ours():
        yield  # the program that runs us as a library has its own way
        return

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        raise RunStoppedError(f"{name.name}: stopped", EXIT_CODES[name])

    before = {number: signal.signal(number, stop) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
