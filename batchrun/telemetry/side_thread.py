"""Work on a file system that may hang: done in a separate thread, and waited for only briefly."""

import threading
from collections.abc import Callable

WAIT_S = 1.0
"""A local file takes milliseconds. The caller may be a run's heartbeat."""


class SideThread:
    """Does one piece of work at a time. While one hangs, the newest other one waits, and no caller does."""

    def __init__(self, hangs: Callable[[], None], wait_s: float = WAIT_S) -> None:
        """`hangs` is called when a piece of work takes longer than `wait_s`. No work may raise anything."""
        self._on_hang = hangs
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._next: Callable[[], None] | None = None
        self._is_busy = self._hangs = self._ended = False
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], None], *, last: bool = False) -> None:
        """The work is done, or will be as soon as the file system answers. After the `last` the thread ends."""
        with self._changed:
            self._next, self._ended = work, last
            self._changed.notify_all()
            if self._thread is None:  # a daemon: a process that ends does not wait for it
                self._thread = threading.Thread(target=self._work, name="side thread", daemon=True)
                self._thread.start()
            if self._hangs:
                return
            self._hangs = not self._changed.wait_for(lambda: not self._is_busy and self._next is None, self._wait_s)
        if self._hangs:
            self._on_hang()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._ended)
                if (work := self._next) is None:
                    return
                self._next, self._is_busy = None, True
            work()
            with self._changed:
                self._is_busy = self._hangs = False
                self._changed.notify_all()
