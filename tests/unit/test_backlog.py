import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.dispatch.backlog import MAX_WAITING, Backlog, Pending
from batchrun.dispatch.mixing import MOST_DOUBTED
from batchrun.errors import InputError
from batchrun.records import Request, Row, Verdict
from batchrun.source.window import LINES
from batchrun.store.db_tables import Chunk
from batchrun.store.open_chunk import OpenChunk
from batchrun.store.stored_window import StoredWindow, write
from tests import level
from tests.moved_clock import NothingWillHappen, run_on_moved_clock

T = TypeVar("T")


class Source:
    """Chunks of so many rows, opened one after another."""

    def __init__(self, folder: Path, *sizes: int) -> None:
        self._folder = folder
        self._sizes = sizes
        self.opened = 0

    def __call__(self) -> OpenChunk | None:
        if self.opened == len(self._sizes):
            return None
        number, first = self.opened, sum(self._sizes[: self.opened])
        size, path = self._sizes[number], self._folder / f"{number}.input.arrow"
        stored = write(path, pa.table([pa.array([b"{}"] * size, pa.large_binary())], schema=LINES))
        self.opened += 1
        return OpenChunk(Chunk(number, first, size, "", stored), StoredWindow(path, stored, first))


class AtOnce(ThreadPoolExecutor):
    """Does what it is given there and then: the moved clock waits for no thread."""

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        future: Future[T] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def moved(test: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What the test returns, on a clock that jumps from timer to timer."""

    async def main() -> T:
        asyncio.get_running_loop().set_default_executor(AtOnce())
        return await test()

    return run_on_moved_clock(main())


def now() -> float:
    return asyncio.get_running_loop().time()


def pending_of(row: Row, chunk: OpenChunk) -> Pending:
    return Pending(Request(row.row, b"", b"", "m", 1, 1), chunk)


def backlog_of(source: Callable[[], OpenChunk | None]) -> Backlog:
    return Backlog(source, pending_of, asyncio.get_running_loop().time)


async def taken(backlog: Backlog) -> Pending:
    pending = await backlog.next()
    assert pending is not None
    return pending


async def all_left(backlog: Backlog) -> list[int]:
    """Every row that is handed out from now on, each done at once."""
    rows = []
    while (pending := await backlog.next()) is not None:
        rows.append(pending.request.row)
        backlog.done()
    return rows


# ── order ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_rows_come_in_order_through_all_chunks(tmp_path: Path) -> None:
    async def test() -> list[int]:
        return await all_left(backlog_of(Source(tmp_path, 1500, 1, 700)))

    assert moved(test) == list(range(2201))


def test_an_input_without_rows_ends_at_once(tmp_path: Path) -> None:
    async def test() -> list[int]:
        return await all_left(backlog_of(Source(tmp_path)))

    assert moved(test) == []


def test_due_retries_precede_new_rows(tmp_path: Path) -> None:
    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 6))
        first, second, third = [await taken(backlog) for _ in range(3)]
        backlog.retry(third, now() + 1)
        backlog.retry(first, now() + 2)
        backlog.retry(second, now() + 3)
        await asyncio.sleep(2)
        return await all_left(backlog)

    assert moved(test) == [2, 0, 3, 4, 5, 1]


def test_equal_retries_go_by_row_number(tmp_path: Path) -> None:
    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 4))
        for pending in reversed([await taken(backlog) for _ in range(4)]):
            backlog.retry(pending, now())
        return await all_left(backlog)

    assert moved(test) == [0, 1, 2, 3]


def test_no_retry_comes_before_its_time(tmp_path: Path) -> None:
    async def test() -> float:
        backlog = backlog_of(Source(tmp_path, 1))
        started = now()
        backlog.retry(await taken(backlog), started + 3600)
        await taken(backlog)
        return now() - started

    assert moved(test) == 3600


def test_an_earlier_retry_wakes_the_waiter(tmp_path: Path) -> None:
    async def test() -> None:
        backlog = backlog_of(Source(tmp_path, 2))
        started = now()
        first, second = await taken(backlog), await taken(backlog)
        backlog.retry(first, started + 100)
        waiting = asyncio.create_task(taken(backlog))
        await asyncio.sleep(1)
        backlog.retry(second, started + 10)
        assert await waiting == second
        assert now() == started + 10

    moved(test)


def test_many_waiting_retries_hold_new_rows(tmp_path: Path) -> None:
    async def test() -> None:
        source = Source(tmp_path, MAX_WAITING + 1, 10, 10)
        backlog = backlog_of(source)
        started = now()
        for _ in range(MAX_WAITING):
            backlog.retry(await taken(backlog), started + 60)
        assert (await taken(backlog)).request.row == 0
        assert now() == started + 60
        assert source.opened == 2

    moved(test)


# ── held rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_held_row_comes_last(tmp_path: Path) -> None:
    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 5))
        backlog.hold(await taken(backlog))
        backlog.retry(await taken(backlog), now() + 10)
        return await all_left(backlog)

    assert moved(test) == [2, 3, 4, 1, 0]


def test_a_held_row_waits_for_rows_in_flight(tmp_path: Path) -> None:
    async def test() -> None:
        backlog = backlog_of(Source(tmp_path, 2))
        held, out = await taken(backlog), await taken(backlog)
        backlog.hold(held)
        waiting = asyncio.create_task(taken(backlog))
        await asyncio.sleep(5)
        assert not waiting.done()
        backlog.done()
        assert await waiting == held
        assert out != held

    moved(test)


def test_a_released_row_is_not_handed_out_again(tmp_path: Path) -> None:
    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 3))
        backlog.hold(await taken(backlog))
        backlog.hold(await taken(backlog))
        backlog.release(0)
        backlog.done()
        return await all_left(backlog)

    assert moved(test) == [2, 1]


def test_the_last_row_is_alone(tmp_path: Path) -> None:
    async def test() -> list[bool]:
        backlog = backlog_of(Source(tmp_path, 2, 1))
        found = []
        await taken(backlog)
        held = await taken(backlog)
        found.append(backlog.alone)  # two are out
        backlog.done()
        found.append(backlog.alone)  # another chunk may come
        await taken(backlog)
        backlog.hold(held)
        waiting = asyncio.create_task(backlog.next())
        await asyncio.sleep(1)
        found.append(backlog.alone)  # one is held
        backlog.done()
        assert await waiting == held
        found.append(backlog.alone)
        return found

    assert moved(test) == [False, False, False, True]


# ── rows that fail one after another ──────────────────────────────────────────────────────────────────────────────────


async def failed(backlog: Backlog, *pendings: Pending, due_in_s: float = 0.0) -> None:
    for pending in pendings:
        backlog.ended(pending, Verdict.FREE)
        backlog.retry(msgspec.structs.replace(pending, successes=0), now() + due_in_s)


def test_failing_new_rows_take_turns_with_retries(tmp_path: Path) -> None:
    """A retry, a row from further on and the next row in turn."""

    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 1500, 1500))
        await failed(backlog, *[await taken(backlog) for _ in range(3)])
        return [(await taken(backlog)).request.row for _ in range(5)]

    retried, far, new, retried_next, far_next = moved(test)
    assert (retried, new, retried_next) == (0, 3, 1)
    assert far > 900
    assert far_next == far - 1


def test_a_failing_distant_row_moves_the_search(tmp_path: Path) -> None:
    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 1500, 1500, 1500, 1500))
        await failed(backlog, *[await taken(backlog) for _ in range(3)], due_in_s=1e6)
        far = []
        for _ in range(6):
            pending = await taken(backlog)
            far += [pending.request.row] * (pending.request.row > 100)
            await failed(backlog, pending, due_in_s=1e6)
        return far

    first, second, third = moved(test)
    assert first < 1500 < second < 3000, "the middle of a reach four times as long"
    assert third > 3000


def test_answered_regions_continue_failing_ones_slow(tmp_path: Path) -> None:
    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 1500))
        await failed(backlog, *[await taken(backlog) for _ in range(3)], due_in_s=1e6)
        far = await taken(backlog)
        backlog.ended(far, Verdict.OK)
        backlog.done()
        return [(await taken(backlog)).request.row for _ in range(30)]

    rows = moved(test)
    near = [row for row in rows if row < 100]
    assert near == list(range(3, 3 + MOST_DOUBTED))


def test_a_due_retry_waits_for_its_turn(tmp_path: Path) -> None:
    """Without looking at the clock again and again: only another row's end lets it go."""

    async def test() -> int:
        reads = iter(range(1_000))

        def clock() -> float:
            assert next(reads, None) is not None, "the worker never sleeps"
            return now()

        backlog = Backlog(Source(tmp_path, 12), pending_of, clock)
        await failed(backlog, *[await taken(backlog) for _ in range(11)])
        first, answered = await taken(backlog), await taken(backlog)
        backlog.ended(answered, Verdict.OK)
        backlog.done()
        for _ in range(MOST_DOUBTED - 1):
            await taken(backlog)
        waiting = asyncio.create_task(backlog.next())
        await asyncio.sleep(60)
        assert not waiting.done()
        backlog.ended(first, Verdict.OK)
        pending = await waiting
        assert pending is not None
        return pending.request.row

    assert moved(test) == MOST_DOUBTED


def test_a_returned_row_keeps_its_order(tmp_path: Path) -> None:
    async def test() -> list[int]:
        backlog = backlog_of(Source(tmp_path, 5))
        first, second, third = [await taken(backlog) for _ in range(3)]
        backlog.put_back(third)
        backlog.put_back(msgspec.structs.replace(first, successes=0))
        assert not backlog.drained
        backlog.done()
        return [second.request.row, *await all_left(backlog)]

    assert moved(test) == [1, 2, 3, 4, 0]


def test_only_long_waits_are_not_waited_for(tmp_path: Path) -> None:
    async def test() -> int:
        backlog, started = backlog_of(Source(tmp_path, 2)), now()
        first, second = await taken(backlog), await taken(backlog)
        backlog.retry(msgspec.structs.replace(first, waits_long=True), now() + 1_000)
        backlog.retry(second, now() + 10)
        assert await taken(backlog) == second
        backlog.done()
        assert await backlog.next() is None
        assert now() - started == 10
        return backlog.left_to_wait

    assert moved(test) == 1


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_closing_the_backlog_wakes_workers(tmp_path: Path) -> None:
    async def test() -> None:
        backlog = backlog_of(Source(tmp_path, 10, 10))
        for _ in range(20):
            await taken(backlog)
        waiting = [asyncio.create_task(backlog.next()) for _ in range(50)]
        await asyncio.sleep(1)
        assert not any(task.done() for task in waiting)
        backlog.close()
        assert await asyncio.gather(*waiting) == [None] * 50
        assert await backlog.next() is None

    moved(test)


def test_the_last_row_done_ends_everyones_wait(tmp_path: Path) -> None:
    async def test() -> None:
        backlog = backlog_of(Source(tmp_path, 1))
        await taken(backlog)
        waiting = [asyncio.create_task(backlog.next()) for _ in range(50)]
        await asyncio.sleep(1)
        backlog.done()
        assert await asyncio.gather(*waiting) == [None] * 50

    moved(test)


def test_a_missing_row_is_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        backlog = backlog_of(Source(tmp_path, 1))
        await taken(backlog)
        await backlog.next()

    with pytest.raises(NothingWillHappen):
        moved(test)


# ── opening chunks, by real threads ───────────────────────────────────────────────────────────────────────────────────


def in_time(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def test_one_chunk_is_opened_ahead_and_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        source = Source(tmp_path, 10, 10, 10, 10)
        backlog = backlog_of(source)
        for row in range(40):
            assert (await taken(backlog)).request.row == row
            ahead = min(4, row // 10 + 2)
            while source.opened < ahead:
                await asyncio.sleep(0.001)
            assert source.opened == ahead

    in_time(test)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_error_of_opening_reaches_every_worker(tmp_path: Path, after: int) -> None:
    source = Source(tmp_path, *[3] * after)

    def open_next() -> OpenChunk | None:
        if source.opened == after:
            raise InputError("the input changed")
        return source()

    async def test() -> None:
        backlog = backlog_of(open_next)
        for _ in range(3 * after):
            await taken(backlog)
        found = await asyncio.gather(*(backlog.next() for _ in range(20)), return_exceptions=True)
        assert [str(error) for error in found] == ["the input changed"] * 20

    in_time(test)


def test_errors_ahead_are_silent_until_needed(tmp_path: Path) -> None:
    source, noise = Source(tmp_path, 3), []

    def open_next() -> OpenChunk | None:
        if source.opened:
            raise InputError("the input changed")
        return source()

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context["message"]))
        backlog = backlog_of(open_next)
        await taken(backlog)
        await backlog.stop()

    in_time(test)
    assert noise == []


def test_stopping_waits_for_the_thread_that_opens(tmp_path: Path) -> None:
    source, opening, go_on = Source(tmp_path, 3, 3, 3), threading.Event(), threading.Event()
    working: set[int] = set()

    def open_next() -> OpenChunk | None:
        working.add(threading.get_ident())
        opening.set()
        go_on.wait(5)
        opened = source()
        working.remove(threading.get_ident())
        return opened

    async def test() -> None:
        backlog = backlog_of(open_next)
        waiting = [asyncio.create_task(backlog.next()) for _ in range(5)]
        await asyncio.to_thread(opening.wait, 5)
        stopping = asyncio.create_task(backlog.stop())
        await asyncio.sleep(0.02)
        assert not stopping.done()
        go_on.set()
        await stopping
        await asyncio.sleep(0.02)
        assert not working
        assert source.opened == 1
        assert await asyncio.gather(*waiting) == [None] * 5

    in_time(test)


# ── many workers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Workers:
    """Workers that ask rows for random times with random outcomes, and what came of it."""

    def __init__(self, backlog: Backlog, random: Random) -> None:
        self._backlog = backlog
        self._random = random
        self._due: dict[int, float] = {}
        self._held: set[int] = set()
        self._left: dict[int, int] = {}
        self.settled: list[int] = []
        self.late: list[tuple[int, float]] = []

    async def work(self) -> None:
        while True:
            idle_since = now()
            pending = await self._backlog.next()
            if pending is None:
                return
            row = pending.request.row
            due = self._due.pop(row, None)
            if due is not None and now() != max(due, idle_since):
                self.late.append((row, now() - due))
            if row in self._held:
                assert self._backlog.alone or self._held - {row}
                self._held.remove(row)
            await asyncio.sleep(self._random.choice([0, 0, 0.25, 0.5, 1]))
            self._end(pending)

    def _end(self, pending: Pending) -> None:
        row = pending.request.row
        left = self._left.setdefault(row, self._random.choice([0, 0, 1, 3]))
        self._left[row] -= 1
        if not left:
            self.settled.append(row)
            self._backlog.done()
        elif self._random.random() < 0.2:
            self._held.add(row)
            self._backlog.hold(pending)
        else:
            self._due[row] = now() + self._random.choice([0, 0.25, 0.5, 2, 30])
            self._backlog.retry(pending, self._due[row])


@settings(
    deadline=None, max_examples=level.amount(25, 150), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(1, 12), max_size=4), st.integers(1, 12), st.integers(0, 2**32))
def test_every_row_settles_without_idle_workers(tmp_path: Path, sizes: list[int], count: int, seed: int) -> None:
    async def test() -> Workers:
        workers = Workers(backlog_of(Source(tmp_path, *sizes)), Random(seed))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(workers.work())
        return workers

    workers = moved(test)
    assert sorted(workers.settled) == list(range(sum(sizes)))
    assert workers.late == []
