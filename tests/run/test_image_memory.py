"""Images in memory are bounded by bytes: how many requests are out depends on how large they are."""

import asyncio
import functools
from pathlib import Path

import pytest

import batchrun
from batchrun.dispatch import worker
from batchrun.dispatch.image_memory import READERS, ImageMemory
from batchrun.records import Request
from batchrun.simulator import SimulatorConfig
from tests.pictures import SAMPLES
from tests.run.test_api import KEYS
from tests.simulator_process import running_simulator


def request_of(row: int, size: int) -> Request:
    return Request(row=row, key=b"", body=b"x" * size, model="m", max_prompt_tokens=1, max_output_tokens=1)


def test_images_load_until_memory_is_full() -> None:
    """The next row loads when another is done."""
    loaded: list[int] = []

    def read(row: int) -> Request:
        loaded.append(row)
        return request_of(row, 40)

    async def fill() -> None:
        room = ImageMemory(100)
        tasks = [asyncio.create_task(room.load(functools.partial(read, row))) for row in range(12)]
        for left, task in enumerate(tasks):
            await task  # with three in the room it is full; those that were being read come on top of them
            await asyncio.wait(tasks[: left + 3])
            assert len(loaded) - left <= 3 + READERS - 1
            room.release(task.result())

    asyncio.run(fill())
    assert sorted(loaded) == list(range(12))


def test_an_oversized_image_is_loaded_alone() -> None:
    def fail() -> Request:
        raise batchrun.InputError("gone")

    async def pass_through() -> None:
        room = ImageMemory(100)
        for row in range(3):
            with pytest.raises(batchrun.InputError):
                await room.load(fail)
            room.release(await room.load(functools.partial(request_of, row, 1_000)))

    asyncio.run(pass_through())


def test_rows_waiting_for_memory_are_all_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is sent after a stop."""
    monkeypatch.setattr(worker, "ImageMemory", functools.partial(ImageMemory, 1))
    rows = [{"image": path.name} for path in sorted(SAMPLES.iterdir())[:8]]
    with running_simulator(SimulatorConfig(latency_s=0.5, ledger=str(tmp_path / "ledger"))) as simulator:
        job = batchrun.Job(
            endpoint=batchrun.Endpoint(url=simulator.url, api_key_env=next(iter(KEYS))),
            input=batchrun.Input(image_root=str(SAMPLES)),
            request=batchrun.RequestTemplate(
                model="vtrix-gpt-5.3-codex", prompt="Caption it.", images=["image"], max_tokens=40
            ),
        )

        async def leave_after(completions: int) -> batchrun.Summary:
            runner = batchrun.Runner(job, rows, output=tmp_path / "out", environ=KEYS, replay=False)
            async with runner:
                async for _ in runner:
                    completions -= 1
                    if not completions:
                        break
            return runner.summary

        stopped = asyncio.run(leave_after(1))
        served = len(simulator.ledger())
        assert served <= 1 + READERS  # eight were admitted
        assert (stopped.pending, stopped.possibly_billed_count) == (8 - served, 0)
        assert asyncio.run(leave_after(-1)).complete
        assert len(simulator.ledger()) == 8
