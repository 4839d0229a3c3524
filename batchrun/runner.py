"""A run inside a program that has its own event loop: completions one by one, as they become durable."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from batchrun.api import Options, RunIncompleteError, run_start
from batchrun.dispatch.hooks import Host
from batchrun.dispatch.result_queue import ResultQueue
from batchrun.errors import RunStoppedError
from batchrun.job.job import Job
from batchrun.run_summary import Summary
from batchrun.signals import StopRequest
from batchrun.source import Rows
from batchrun.tables.rows import Completion


class Runner:
    """`async with Runner(job, rows, output=…) as runner`: the run works from here to the end of the block.

    Iterating yields each row once, as soon as its completion is durable, in that order. Rows that earlier starts
    completed come first, unless `replay` is False. A slow reader slows the run: while some hundred completions wait to
    be read, no new row is sent.

    Leaving the block early drains the run, like a first signal on the command line: requests in flight may end within
    `grace_s`, and another Runner resumes the rest. Signals are not touched.

    Entering raises the error that keeps the run from starting. Iterating, `wait` and leaving raise the error that ended
    it before it was complete: RunIncompleteError, or another BatchrunError.
    """

    def __init__(
        self, job: Job | str | Path, rows: Rows | None = None, *, replay: bool = True, **options: Unpack[Options]
    ) -> None:
        self._job = job
        self._rows = rows
        self._replay = replay
        self._on_progress = options.get("progress")
        self._options: Options = {**options, "progress": self._progress}
        self._stop = StopRequest()
        self._summary: Summary | None = None
        self._failure: BaseException | None = None
        self._left = self._raised = False
        self._ready: deque[Completion] = deque()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._news, self._started, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._results = ResultQueue(lambda: self._call(self._news))
        # a separate loop in a separate thread: a busy program delays no request
        threading.Thread(target=self._work, name="batchrun", daemon=True).start()
        try:
            await self._started.wait()
        except BaseException:
            await self._leave()
            raise
        if self._failure is not None:
            raise self._failure
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave()
        if error is None and not self._raised:
            self._raise()

    def __aiter__(self) -> AsyncIterator[Completion]:
        return self

    async def __anext__(self) -> Completion:
        while not self._ready:
            self._news.clear()
            ended = self._ended.is_set()
            if taken := self._results.pop_all():
                self._ready.extend(taken)
            elif ended:
                self._raise()
                raise StopAsyncIteration
            else:
                await self._news.wait()
        return self._ready.popleft()

    @property
    def summary(self) -> Summary:
        """The state of the run, at most half a second old; after its end, the last summary."""
        if self._summary is None:
            raise RuntimeError("the run has not started: enter the block first")
        return self._summary

    async def wait(self) -> Summary:
        """Waits until the run is complete. Completions that were not read yet are dropped."""
        self._results.stop_reading()
        await self._ended.wait()
        self._raise()
        return self.summary

    def stop(self) -> None:
        """Sends no new row. Requests in flight end and are yielded, then the iteration ends. Callable from any thread.

        A second call ends the run at once: requests in flight are given up, and named as possibly billed.
        """
        self._left = True
        self._stop.make()

    async def _leave(self) -> None:
        """Waits for the run's thread. Being cancelled meanwhile acts like a second signal."""
        self._results.stop_reading()
        cancelled: asyncio.CancelledError | None = None
        if not self._ended.is_set():
            self.stop()
        while not self._ended.is_set():
            try:
                await self._ended.wait()
            except asyncio.CancelledError as error:
                cancelled = error
                self.stop()
        if cancelled is not None:
            raise cancelled

    def _raise(self) -> None:
        """Raises what ended the run, unless this program stopped it."""
        if self._failure is not None and not (self._left and isinstance(self._failure, RunStoppedError)):
            self._raised = True
            raise self._failure

    # ── the run's own thread ──────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        """The whole run; at its end everything that waits for it is woken."""
        host = Host(self._stop, self._results, self._replay)
        try:
            self._summary = run_start(self._job, self._rows, self._options, host)
        except RunIncompleteError as stopped:
            self._failure, self._summary = stopped, stopped.summary
        except BaseException as error:
            self._failure = error
        for event in (self._ended, self._started, self._news):
            self._call(event)

    def _progress(self, summary: Summary) -> None:
        first, self._summary = self._summary is None, summary
        if first:
            self._call(self._started)
        if self._on_progress is not None:
            self._on_progress(summary)

    def _call(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # a closed loop raises this: the program has ended
            self._loop.call_soon_threadsafe(event.set)
