"""Signals as ways out: which there are, and what they do while no event loop runs; and a program's own word instead."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
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
def raised() -> Iterator[None]:
    """A signal ends the block at once with a RunStoppedError: while the input is checked, or a file is written.

    Whatever the block makes signals do, they do afterwards what they did before.
    """
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


PROGRAM = "stopped by the program"


class StopRequest:
    """What a signal is to the command line, for a program that runs us in a thread. Made by any thread, at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made = 0
        self._heard: Callable[[], None] = lambda: None

    def make(self) -> None:
        """The first one drains the run, a second one ends it at once."""
        with self._lock:
            self._made += 1
            heard = self._heard
        heard()

    def listen(self, heard: Callable[[], None]) -> None:
        """`heard` is called for each request, for those made before, too."""
        with self._lock:
            self._heard = heard
            made = self._made
        for _ in range(made):
            heard()

    def raise_if_made(self) -> None:
        """While no event loop runs: ends the run here.

        Raises:
            RunStoppedError: it was made.
        """
        if self._made:
            raise RunStoppedError(PROGRAM, ExitCode.STOPPED)
