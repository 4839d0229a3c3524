"""Signals that end a run, their exit codes, and the equivalent request from a program that runs us."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from batchrun.errors import ExitCode, RunStoppedError

EXIT_CODES = {signal.SIGINT: ExitCode.SIGINT, signal.SIGTERM: ExitCode.SIGTERM, signal.SIGHUP: ExitCode.SIGHUP}


def may_handle() -> bool:
    """True if this thread may handle signals: Python allows only the main thread."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside the block, without an event loop, a signal raises RunStoppedError. Afterwards the earlier handlers are
    restored.
    """
    if not may_handle():
        yield  # a program that runs us as a library handles its own signals
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
    """The equivalent of a signal, for a program that runs us in a thread. Any thread may make it, at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made = 0
        self._heard: Callable[[], None] = lambda: None

    def make(self) -> None:
        """The first call drains the run, a second one ends it at once."""
        with self._lock:
            self._made += 1
            heard = self._heard
        heard()

    def listen(self, heard: Callable[[], None]) -> None:
        """Calls `heard` for each request, earlier ones included."""
        with self._lock:
            self._heard = heard
            made = self._made
        for _ in range(made):
            heard()

    def raise_if_made(self) -> None:
        """Ends the run while no event loop runs.

        Raises:
            RunStoppedError: a stop was requested.
        """
        if self._made:
            raise RunStoppedError(PROGRAM, ExitCode.STOPPED)
