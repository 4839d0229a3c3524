"""An event loop whose clock is moved, not waited for: hours of timers pass in milliseconds, exactly on time.

Whenever nothing is ready to run, the clock jumps to the next timer. `loop.time()` is that clock, so everything that
asks the loop for the time (aiolimiter, asyncio.sleep, asyncio.timeout, the gate) lives on it. It stands still while
threads work for the loop and while bytes are on their way through loopback, so a busy machine makes nothing late here.
"""

import asyncio
import math
import selectors
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack

from batchrun.store.commits import Commits

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

START_S = 1_000.0
"""Not zero, so that a time left at its default is noticed."""

HANDSHAKE = 3
"""Packets of a new connection, each of which the kernel sends when it has read the one before."""

OWN_FILES = 1
"""What a loop without connections watches: the pipe that wakes it."""

POLL_S = 0.001
"""How often the loop looks whether the threads that work for it have ended, in real time."""


class NothingWillHappen(AssertionError):
    """Every task waits and no timer is set: on a real loop this test would hang."""


class _JumpingSelector(selectors.SelectSelector):
    """Where a loop sleeps until its next timer, this one moves the clock there."""

    def __init__(self, is_helped: Callable[[], bool]) -> None:
        """`is_helped` is True while a thread works for the loop, and will wake it."""
        super().__init__()
        self._is_helped = is_helped
        self._sends, self._receives = _connection()
        self.now_s = START_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        has_connections = len(self.get_map()) > OWN_FILES
        events: list[tuple[selectors.SelectorKey, int]] = []
        # in a simulation nothing is watched but the pipe by which a thread wakes the loop, and there is no thread
        if has_connections or (timeout != 0 and threading.active_count() > 1):
            if timeout != 0 and self._is_helped():
                return super().select(POLL_S)
            if timeout != 0 and has_connections:
                self._let_arrive()
            events = super().select(0)
        if not events and timeout is None:
            raise NothingWillHappen
        if not events and timeout:  # not rounded down: a timer would then ring early, again and again
            self.now_s = max(self.now_s + timeout, math.nextafter(self.now_s, math.inf))
        return events

    def _let_arrive(self) -> None:
        """Waits for all that was sent through loopback before: it keeps the order."""
        for _ in range(HANDSHAKE):
            self._sends.send(b".")
            self._receives.recv(1)

    def close(self) -> None:
        super().close()
        self._sends.close()
        self._receives.close()


def _connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sends = socket.create_connection(listener.getsockname())
        receives, _ = listener.accept()
    sends.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sends, receives


class MovedClockLoop(asyncio.SelectorEventLoop):
    """A loop at `START_S` seconds that jumps from timer to timer."""

    _default_executor: Executor | None

    def __init__(self) -> None:
        self._calls_in_threads = 0
        self._clock = _JumpingSelector(lambda: self._calls_in_threads > 0 or _is_storing())
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """As asyncio's, and the clock stands still until the call has ended."""
        call = super().run_in_executor(executor, func, *args)
        self._calls_in_threads += 1
        call.add_done_callback(self._call_ended)
        return call

    def _call_ended(self, call: asyncio.Future[Any]) -> None:
        self._calls_in_threads -= 1

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Waits for its threads for real: asyncio's own waits for an event, of which this clock sees nothing coming."""
        executor, self._default_executor = self._default_executor, None
        if executor is not None:
            executor.shutdown()

    def call_exception_handler(self, context: Mapping[str, Any]) -> None:
        """An unhandled exception fails the test instead of being printed."""
        raise context.get("exception") or AssertionError(context["message"])


def _is_storing() -> bool:
    """True while the thread of a checkpoint has anything left to commit."""
    for thread in threading.enumerate():
        commits = getattr(vars(thread).get("_target"), "__self__", None)
        if isinstance(commits, Commits) and not (commits._idle and not commits._endings):
            return True
    return False


def run_on_moved_clock(main: Coroutine[Any, Any, T]) -> T:
    """What `main` returned, having run on a clock that jumps.

    Raises:
        NothingWillHappen: every task waited and no timer was set.
    """
    with asyncio.Runner(loop_factory=MovedClockLoop) as runner:
        return runner.run(main)
