"""A run inside a program that has an event loop of its own: completions one by one, as they become durable.

The run works in a thread, with a loop of its own: whatever the program does meanwhile, no request is late for it.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from batchrun.api import Options, RunIncompleteError, begin
from batchrun.dispatch.hooks import Host
from batchrun.dispatch.result_queue import ResultQueue
from batchrun.errors import RunStoppedError
from batchrun.job.job import Job
from batchrun.records import Summary
from batchrun.signals import StopRequest
from batchrun.source import Rows
from batchrun.tables.completions import Completion


class Runner:
    """`async with Runner(job, rows, output=…) as runner`: the run works from here to the end of the block.

    Iterating over it hands out each row once, as soon as its completion is durable, in the order in which that
    happens; rows that earlier starts settled come first, unless `replay` is False. A reader that is slow slows the
    run: it asks no new row while some hundred wait to be read.

    Leaving the block early drains the run as a first signal does the command line's: what is in flight may end within
    `grace_s`, and another Runner goes on with the rest. No signal is touched.

    Entering raises what keeps the run from starting. Iterating, `wait` and leaving raise what ends it before it is
    complete: RunIncompleteError, or another BatchrunError.
    """

    def __init__(
        self,
        job: Job | str | Path,
        rows: Rows | None = None,
        *,
        replay: bool = True,
        **options: Unpack[Options],
    ) -> None:
        self._job = job
        self._rows = rows
        self._replay = replay
        self._tell = options.get("progress")
        self._options: Options = {**options, "progress": self._progress}
        self._stop = StopRequest()
        self._summary: Summary | None = None
        self._failure: BaseException | None = None
        self._left = self._raised = False
        self._ready: deque[Completion] = deque()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._news, self._begun, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._results = ResultQueue(lambda: self._call(self._news))
        threading.Thread(target=self._work, name="batchrun", daemon=True).start()
        try:
            await self._begun.wait()
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
            if taken := self._results.take():
                self._ready.extend(taken)
            elif ended:
                self._raise()
                raise StopAsyncIteration
            else:
                await self._news.wait()
        return self._ready.popleft()

    @property
    def summary(self) -> Summary:
        """Where the run stands, half a second old at most; once it has ended, its last word."""
        if self._summary is None:
            raise RuntimeError("the run has not begun: enter the block first")
        return self._summary

    async def wait(self) -> Summary:
        """The run is complete; completions that were not read are not handed out any more."""
        self._results.stop_reading()
        await self._ended.wait()
        self._raise()
        return self.summary

    def stop(self) -> None:
        """No new row is asked; what is in flight ends and is handed out, then the iteration ends. From any thread.

        Called again, the run ends at once: requests in flight are given up, and named as possibly billed.
        """
        self._left = True
        self._stop.make()

    async def _leave(self) -> None:
        """The run's thread has ended. Being cancelled while waiting for that is as a second signal."""
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
        host = Host(self._stop, self._results, self._replay)
        try:
            self._summary = begin(self._job, self._rows, self._options, host)
        except RunIncompleteError as stopped:
            self._failure, self._summary = stopped, stopped.summary
        except BaseException as error:
            self._failure = error
        for event in (self._ended, self._begun, self._news):
            self._call(event)

    def _progress(self, summary: Summary) -> None:
        first, self._summary = self._summary is None, summary
        if first:
            self._call(self._begun)
        if self._tell is not None:
            self._tell(summary)

    def _call(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # what a closed loop raises: the program is gone
            self._loop.call_soon_threadsafe(event.set)
