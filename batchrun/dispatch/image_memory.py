"""Requests with their images in memory: about so many bytes at once, however large the images are."""

import asyncio
from collections.abc import Callable

from batchrun.records import Request

MOST_BYTES = 64_000_000
"""A fast line is busy with less; 64 photographs of a telephone have more."""

AT_ONCE = 2
"""So many are read and encoded beyond the bound: how large they are is not known before."""


class ImageMemory:
    """Where requests are from when their images are read until they are answered. One per event loop."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._free = asyncio.Event()
        self._free.set()

    async def load(self, read: Callable[[], Request]) -> Request:
        """What `read` gives, called in a thread once there is room; first come, first served."""
        async with self._turn:
            await self._free.wait()
            request = await asyncio.to_thread(read)
            self._hold(len(request.body))
        return request

    def leave(self, request: Request) -> None:
        """A request that was loaded is not needed any more."""
        self._hold(-len(request.body))

    def _hold(self, more_bytes: int) -> None:
        self._bytes += more_bytes
        if self._bytes < self._most_bytes:
            self._free.set()
        else:
            self._free.clear()
