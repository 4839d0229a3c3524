"""The database's own thread: it commits endings in groups, and runs calls between two commits."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from batchrun.durable import disk_errors, fsync
from batchrun.errors import BatchrunError, DiskError
from batchrun.records import Ending
from batchrun.store import spill
from batchrun.store.ledger import Ledger

SPILL = "spill.bin"

MAX_GROUP = 1000
"""Endings in one commit: enough to share the cost of its fsync, few enough that no slot waits long."""

T = TypeVar("T")


class Listeners:
    """The callbacks for each commit's endings and for the first failure; both run in the database's thread.

    `call_soon` is that of the event loop whose thread puts endings.
    """

    def __init__(self) -> None:
        self.on_commit: Callable[[Sequence[Ending]], None] = lambda endings: None
        self.on_failure: Callable[[BatchrunError], None] = lambda error: None
        self.call_soon: Callable[[Callable[[], None]], object] = lambda call: call()


class Commits:
    """Everything that is in the queue when a commit has ended goes into the next one: there is no timer.

    `broken` is True once the database and the spill file have both failed: nothing can be stored any more.
    """

    def __init__(self, path: Path, ledger: Ledger, listeners: Listeners) -> None:
        """`path` is the database's. Endings that an earlier start spilled are in it afterwards."""
        self._path = path
        self._spill = path.with_name(SPILL)
        self._ledger = ledger
        self._listeners = listeners
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends the thread
        self._endings: deque[Ending] = deque()
        self._entries: deque[tuple[str, str]] = deque()
        self._idle = False
        self._failed: BatchrunError | None = None
        self.broken = False
        self._restore_spilled()
        self._thread = threading.Thread(target=self._serve, name="checkpoint", daemon=True)
        self._thread.start()

    # ── any thread may call ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def failed(self) -> bool:
        """True once the database has refused a write."""
        return self._failed is not None

    def put(self, ending: Ending) -> None:
        """Queues the ending; `on_commit` gets it once it is durable."""
        self._endings.append(ending)
        if self._idle:  # waking the thread for every row would cost as much as the row's commit (measured)
            self._idle = False
            # what else ends in this turn of the event loop shares the commit; a call that does nothing wakes the thread
            self._listeners.call_soon(lambda: self._calls.put(lambda: None))

    def put_entry(self, name: str, value: str) -> None:
        """Queues a manifest entry; it is durable before any ending that is put later."""
        self._entries.append((name, value))

    def call(self, work: Callable[[], T]) -> T:
        """Commits everything that was put before, then runs `work` in the database's thread; its result."""
        assert threading.current_thread() is not self._thread, "the database's thread would wait for itself"
        future: Future[T] = Future()

        def run() -> None:
            if self._failed is not None:
                future.set_exception(self._failed)
                return
            try:
                future.set_result(work())
            except DiskError as error:
                self._fail(error)
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        return future.result()

    def stop(self, last: Callable[[], None]) -> None:
        """Commits everything that was put before, runs `last` unless the database has failed, and ends the thread."""
        if self._thread.is_alive():
            if not self.failed:
                self.call(last)
            self._calls.put(None)
            self._thread.join()

    # ── the database's own thread ─────────────────────────────────────────────────────────────────────────────────

    def _serve(self) -> None:
        """The thread's work: before each call it commits everything that was put before."""
        while True:
            call = self._next_call()
            while self._endings:  # those put before the call, and those that came since
                self._commit_group()
            self._write_entries()
            if call is None:
                return
            call()

    def _next_call(self) -> Callable[[], None] | None:
        """The next call; until there is one, commits endings as they come."""
        while self._calls.empty():
            if self._endings:
                self._commit_group()
                continue
            self._idle = True  # set before the queue is checked: an ending that is put later wakes this thread
            if not self._endings:
                break
            self._idle = False
        return self._calls.get()

    def _write_entries(self) -> None:
        """Commits the manifest entries that were put."""
        entries = dict(self._entries.popleft() for _ in range(len(self._entries)))
        if entries and self._failed is None:
            try:
                self._ledger.write_entries(entries)
            except BatchrunError as error:
                self._fail(error)

    def _commit_group(self) -> None:
        """Makes the oldest endings durable, in the database or else in the spill file, and hands them to `on_commit`.

        If neither can be written they are dropped; their slots still name them.
        """
        endings = [self._endings.popleft() for _ in range(min(len(self._endings), MAX_GROUP))]
        self._write_entries()  # only now, so that an entry put before one of these endings is written first
        if self.broken:
            return
        if self._failed is None:
            try:
                self._ledger.commit(endings)
                self._listeners.on_commit(endings)
                return
            except BatchrunError as error:
                self._fail(error)
            except Exception as error:  # SQLite can't store a value: stop, but let no caller wait for ever
                self.broken = True
                self._fail(BatchrunError(f"{self._path}: can't store an answer ({type(error).__name__}: {error})"))
                return
        try:
            spill.append(self._spill, endings, self._ledger.invocation)
        except BatchrunError as error:
            self.broken = True
            self._listeners.on_failure(error)
            return
        self._ledger.count_spilled(endings)
        self._listeners.on_commit(endings)

    def _restore_spilled(self) -> None:
        """Endings that an earlier start spilled are in the database. Can be repeated."""
        for frame in spill.read(self._spill):
            # a commit that failed may be on the disk after all
            completions = [c for c in frame.completions if not self._ledger.has_end(c.row, c.attempts)]
            discarded = [d for d in frame.discarded if not self._ledger.has_end(d.row, d.n)]
            self._ledger.commit([*completions, *discarded], frame.invocation)
        if self._spill.exists():  # even without a whole frame: a torn one must not precede a later frame
            with disk_errors(self._spill):
                self._spill.unlink()
                fsync(self._path.parent)

    def _fail(self, error: BatchrunError) -> None:
        """Reports the first failure; from then on nothing is written to the database."""
        if self._failed is None:
            self._failed = error
            self._listeners.on_failure(error)
