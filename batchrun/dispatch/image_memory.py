"""A bound on the memory of requests that hold their images."""

import asyncio
from collections.abc import Callable

from batchrun.records import Request

MOST_BYTES = 64_000_000
"""A fast connection is busy with less; 64 photos from a phone are more."""

READERS = 2
"""How many requests may be read beyond the bound: their size is known only after the images are encoded."""


class ImageMemory:
    """Counts the bytes of requests from when their images are read until they are answered. One per event loop."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._reading = asyncio.Semaphore(READERS)
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def load(self, read: Callable[[], Request]) -> Request:
        """The result of `read`, called in a thread once there is room; first come, first served."""
        async with self._reading:
            await self._has_room.wait()
            request = await asyncio.to_thread(read)
            self._count(len(request.body))
        return request

    def release(self, request: Request) -> None:
        """A loaded request is not needed any more."""
        self._count(-len(request.body))

    def _count(self, more_bytes: int) -> None:
        self._bytes += more_bytes
        if self._bytes < self._most_bytes:
            self._has_room.set()
        else:
            self._has_room.clear()
