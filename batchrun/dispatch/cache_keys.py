"""Requests with the same beginning, sent so that the provider's prompt cache finds it. PURE: the clock is an argument.

A cache has a prefix once the first request with it was answered. So one request of each group goes first, and the
others wait for its answer. A provider sends requests with the same prefix and `prompt_cache_key` to one machine, up
to about 15 a minute; beyond that they go to machines without the prefix
(https://developers.openai.com/api/docs/guides/prompt-caching). So a group gets as many keys as its pace needs, and the
first request of each key goes ahead of the others with that key.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from batchrun.request.shared_prefix import group_of

KEY_REQUESTS_PER_MINUTE = 14
"""Of one key. The provider's "about 15" less the jitter of the network."""

WARM_S = 240.0
"""So long after its last answer a prefix counts as cached: providers keep it five to ten minutes."""

MOST_PARKED = 1_000
"""Rows that wait for the first of their group, over all groups: their bodies are in memory."""

MOST_GROUPS = 10_000  # beyond that the oldest one that no row needs is forgotten

Parked = TypeVar("Parked")


class Key(msgspec.Struct):
    """One `prompt_cache_key`. `leads`: the request that fills its cache is in flight."""

    name: str
    level: float
    at_s: float
    leads: bool = True
    answered_s: float = float("-inf")

    def is_warm(self, now_s: float) -> bool:
        """Whether the cache has the prefix under this key."""
        return now_s - self.answered_s < WARM_S

    def has_room(self, now_s: float) -> bool:
        """Whether one request more keeps below the key's pace."""
        refilled = self.level + (now_s - self.at_s) * KEY_REQUESTS_PER_MINUTE / 60
        self.level, self.at_s = min(float(KEY_REQUESTS_PER_MINUTE), refilled), now_s
        return self.level >= 1


class _Group(msgspec.Struct, Generic[Parked]):
    """`current`: the key that was used last. It is used while it has room, so that a low pace keeps few keys warm."""

    keys: list[Key]
    parked: deque[Parked]
    current: int = 0

    def with_room(self, now_s: float) -> Key | None:
        """A warm key that may be used now."""
        for step in range(len(self.keys)):
            place = (self.current + step) % len(self.keys)
            if self.keys[place].is_warm(now_s) and self.keys[place].has_room(now_s):
                self.current = place
                return self.keys[place]
        return None

    def room(self, now_s: float) -> int:
        """How many rows may be sent now, at least one: with warm keys, and as the first of a new one."""
        warm = [key for key in self.keys if key.is_warm(now_s)]
        leading = sum(key.leads for key in self.keys)
        return sum(int(key.level) for key in warm if key.has_room(now_s)) + max(1, len(warm) - leading)


class CacheKeys(Generic[Parked]):
    """Gives each request its key, or parks its row until one is warm."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._groups: dict[bytes, _Group[Parked]] = {}
        self._group_of_key: dict[str, _Group[Parked]] = {}
        self.parked = 0

    def key_for(self, body: bytes, *, may_wait: bool) -> Key | None:
        """The key that the request is to be sent with; None: it has to wait for the first of its group (`park` it).

        Call `ended` with the key when the attempt has ended, or was not sent. Without `may_wait` there is always a key.
        """
        if (digest := group_of(body)) is None:
            return NO_KEY
        group = self._groups.get(digest)
        if group is None:
            group = self._groups[digest] = _Group([], deque())
            self._forget_some()
        now_s = self._clock()
        if (warm := group.with_room(now_s)) is not None:
            warm.level -= 1
            return warm
        leading = sum(key.leads for key in group.keys)
        # twice as many keys with each answer, until the pace has enough of them
        if leading and leading >= sum(key.is_warm(now_s) for key in group.keys) and may_wait:
            return None
        cold = next((key for key in group.keys if not key.leads and not key.is_warm(now_s)), None)
        if cold is None:
            cold = Key(f"{digest.hex()}-{len(group.keys)}", 0.0, now_s)
            group.keys.append(cold)
            self._group_of_key[cold.name] = group
        cold.leads, cold.level, cold.at_s = True, KEY_REQUESTS_PER_MINUTE - 1.0, now_s
        return cold

    def park(self, body: bytes, row: Parked) -> bool:
        """The row waits for the first of its group; False: too many wait already."""
        digest = group_of(body)
        assert digest is not None
        if self.parked >= MOST_PARKED:
            return False
        self.parked += 1
        self._groups[digest].parked.append(row)
        return True

    def ended(self, key: Key, *, answered: bool) -> list[Parked]:
        """The rows that may be sent now."""
        group = self._group_of_key.get(key.name)
        if group is None:
            return []
        key.leads = False
        if answered:
            key.answered_s = self._clock()
        # no more than can go now: the others would only be parked again. One at least, and its end releases the next
        released = [group.parked.popleft() for _ in range(min(len(group.parked), group.room(self._clock())))]
        self.parked -= len(released)
        return released

    def _forget_some(self) -> None:
        """Bounds the memory of a job in which each row begins otherwise: the oldest group goes, if no one needs it."""
        if len(self._groups) > MOST_GROUPS:
            digest, oldest = next(iter(self._groups.items()))
            if not oldest.parked and not any(key.leads for key in oldest.keys):
                for key in oldest.keys:
                    del self._group_of_key[key.name]
                del self._groups[digest]


NO_KEY = Key("", 0.0, 0.0, leads=False)
"""Of a request that is too short for any cache."""
