"""The text that the prompts of a job share, and how much of it a prompt cache can serve. PURE.

Providers cache the beginning of a prompt, from 1,024 tokens on and in steps of 128, and bill it at a fraction of the
price (https://developers.openai.com/api/docs/guides/prompt-caching). So text that all rows share has to come first.
"""

import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from batchrun.records import Request

CACHED_FROM_TOKENS = 1_024  # this and the step as OpenAI documents its prompt cache (guides/prompt-caching)
CACHED_STEP_TOKENS = 128

GROUP_BYTES = 3_072
"""Requests whose bodies share this many first bytes are a group. 1,024 tokens have about 4,096 bytes in
English and 3,000 in languages with denser text; a group that proves too short for a cache costs nothing."""

_TOKENS_PER_BYTE = 0.25  # English text, as OpenAI's rule of thumb has it: four characters a token
_MOST_GROUPS = 256  # groups that are measured; a job with more of them is described by the others
_MOST_COMMON_BYTES = 131_072  # of a shared beginning; longer ones count as this long
_SAMPLE = 64  # rows whose texts are compared sentence by sentence
_WARN_FROM_BYTES = 1_024  # shared text behind row data; more than this gets a warning
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_LEAST_SENTENCE = 12  # characters: shorter ones are shared by chance


def group_of(body: bytes) -> bytes | None:
    """The digest of the beginning that requests of one group share; None: too short for any cache.

    An image in it is not in the body yet, so nothing is known of what follows.
    """
    start = body[:GROUP_BYTES]
    if len(start) < GROUP_BYTES or b'"image_url"' in start:
        return None
    return blake2b(start, digest_size=8).digest()


class Group(msgspec.Struct):
    """Requests of one model that start alike: `common` is their shared beginning."""

    model: str
    common: bytes
    rows: int = 1

    @property
    def tokens(self) -> int:
        """The estimated tokens of the shared beginning that a cache can hold."""
        shared = int(len(self.common) * _TOKENS_PER_BYTE)
        return shared - shared % CACHED_STEP_TOKENS if shared >= CACHED_FROM_TOKENS else 0


class SharedText(msgspec.Struct, frozen=True):
    """`groups` have at least two rows each, the largest first. `behind_bytes`: text that all sampled rows share behind
    their row data, where no cache finds it; `behind` is its beginning.
    """

    rows: int
    body_bytes: int
    groups: tuple[Group, ...]
    behind_bytes: int = 0
    behind: str = ""


class SharedTextSurvey:
    """Measures request by request, in bounded memory: `add` each, then `result`."""

    def __init__(self) -> None:
        self._rows = self._bytes = 0
        self._single: dict[bytes, Group] = {}
        self._groups: dict[bytes, Group] = {}
        self._sample: list[list[str]] = []

    def add(self, request: Request) -> None:
        """One request more."""
        body, model = request.body, request.model
        self._rows += 1
        self._bytes += len(body)
        if len(self._sample) < _SAMPLE:
            self._sample.append([each for text in _texts(body) for each in _SENTENCE.split(text) if each])
        if (digest := group_of(body)) is None:
            return
        if (group := self._groups.get(digest)) is not None:
            group.rows += 1
            if not body.startswith(group.common):
                group.common = _common(group.common, body)
        elif (first := self._single.pop(digest, None)) is not None:
            if len(self._groups) < _MOST_GROUPS:
                self._groups[digest] = Group(model, _common(first.common, body), 2)
        else:
            self._single[digest] = Group(model, body[:_MOST_COMMON_BYTES])
            if len(self._single) > _MOST_GROUPS:
                del self._single[next(iter(self._single))]

    def result(self) -> SharedText:
        """The shared text that was found."""
        groups = sorted(self._groups.values(), key=lambda group: -group.rows * len(group.common))
        measured = SharedText(self._rows, self._bytes, tuple(groups))
        if len(self._sample) < 2:
            return measured
        first, common = self._sample[0], set[str].intersection(*map(set, self._sample))
        shared = {sentence for sentence in common if len(sentence) >= _LEAST_SENTENCE}
        # up to the first sentence of its own, a row begins as all others do: no cache finds what they share behind it
        own = next((i for i, sentence in enumerate(first) if sentence not in shared), len(first))
        behind = [sentence for sentence in first[own:] if sentence in shared]
        size, leading = (sum(len(each.encode()) for each in sentences) for sentences in (behind, first[:own]))
        if size < _WARN_FROM_BYTES or size + leading < CACHED_FROM_TOKENS / _TOKENS_PER_BYTE:
            return measured  # moved to the front it would still be too little for a cache
        return msgspec.structs.replace(measured, behind_bytes=size, behind=behind[0])


def _common(one: bytes, other: bytes) -> bytes:
    """The beginning that both have, by bisection: comparing slices is a hundred times as fast as a loop over bytes."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return one[:low]


def _texts(body: bytes) -> Iterator[str]:
    """The texts of a body of either API, in their order."""
    fields: dict[str, Any] = msgspec.json.decode(body)
    if isinstance(instructions := fields.get("instructions"), str):  # of the Responses API
        yield instructions
    for message in fields.get("messages") or fields.get("input") or ():
        content = message.get("content")
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
