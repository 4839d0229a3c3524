"""One actor as the driver sees it, and how requests are packed for a call of it."""

from collections.abc import Iterator
from typing import Any

from batchrun.ray_engine.sender import Parcel, Ready

PIECE_BYTES = 64_000
"""The most bytes of bodies in one argument of a call, unless one body alone has more. Ray sends arguments below 100 KB
with the call; larger ones pass through the object store, which may spill them to disk."""

OPTIONS = {"max_restarts": 0, "max_task_retries": 0}
"""Ray starts no actor again and repeats no call by itself: a request is sent again only if the run's policy says so."""


class Actor:
    """One actor. `ready` is None until it can send. `heard_at`, its last answer to a call, is on the loop's clock.

    `leaving`: it gets no more requests, because it is not needed.
    """

    def __init__(self, handle: Any, now: float) -> None:
        self.handle = handle
        self.ready: Ready | None = None
        self.in_flight: set[int] = set()
        self.calls = 0
        self.handing_over = self.leaving = False
        self.key_version = 0
        self.heard_at = now

    @property
    def room(self) -> int:
        """The further requests it can have in flight; 0 while a call hands over some, and if it is leaving."""
        if self.ready is None or self.handing_over or self.leaving:
            return 0
        return self.ready.room - len(self.in_flight)

    def __str__(self) -> str:
        return "a Ray actor" if self.ready is None else f"the Ray actor {self.ready.pid} on {self.ready.host}"


def pieces(batch: list[Parcel]) -> Iterator[list[Parcel]]:
    """The batch in lists that are small enough to be sent with the call; a large body gets its own list."""
    piece: list[Parcel] = []
    size = 0
    for parcel in batch:
        if piece and size + len(parcel[2]) > PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(parcel)
        size += len(parcel[2]) + 100  # its number, its endpoint's place and our id
    yield piece
