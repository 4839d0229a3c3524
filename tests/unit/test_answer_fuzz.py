"""Twenty thousand bodies and streams that went wrong: none raises, none counts that isn't an answer, all bytes stay.

What counts is said a second time here, with the standard library and regular expressions only.
"""

import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pytest

from batchrun.credentials import Credentials
from batchrun.job.settings import Retry
from batchrun.policy import judge
from batchrun.records import Answer, Attempt, Verdict
from batchrun.response import packed
from batchrun.response.answer import MAX_CHOICES, read
from batchrun.response.stream import Stream
from batchrun.response.usage import MAX_COUNT
from tests import level
from tests.unit.test_answer import COUNTED, FIRST, STOP, USAGE, WORDS, body, chunk, stream

COUNT = level.amount(sample=1_000, full=10_000)
NOTHING_SECRET = Credentials({}, frozenset())

BODIES = [
    body(),
    body({"content": None, "function_call": {"name": "f", "arguments": "{}"}}),
    body({"content": [{"type": "text", "text": "Fine."}]}, usage={"prompt_tokens": "12", "completion_tokens": 7}),
    body(choices=[]),
    b'{"error":{"message":"no","code":"c"}}',
    b'{"message":"no","code":401}',
    b"<html><body>502 Bad Gateway</body></html>",
]
STREAMS = [
    stream(*WORDS, STOP, COUNTED),
    stream(*WORDS, STOP, end="\r\n\r\n"),
    stream(*WORDS, STOP, COUNTED, done=False),
    b"\xef\xbb\xbf: hello\n\n" + stream(*WORDS, STOP | {"usage": USAGE}, end="\r\r", done=False),
    stream(
        chunk({"function_call": {"name": "f", "arguments": ""}}), chunk({"function_call": {"arguments": "{}"}}), STOP
    ),
    stream(FIRST, chunk({"reasoning_content": "Hm."}), *WORDS, chunk(choices=[{"index": 1, "delta": {}}]), STOP),
    stream(*WORDS, chunk(choices=[{"index": 1, "delta": {"content": "?"}}]), STOP, COUNTED, done=False),
    stream(*WORDS, {"error": {"message": "gone", "code": 503}}, done=False),
    stream(*WORDS, done=False) + b'event: error\ndata: {"message": "gone"}\n\n',
]
PIECES = [
    *(b'"', b"}", b"[", b"null", b"\\ud800", b"\x00", b"\xff", b"NaN", b"-", b"9" * 400, b"1e999", b"[" * 3000),
    *(b"\n\n", b"\r", b"\n", b"data:", b"data: [DONE]\n\n", b": x\n", b"event: error\n", b"data: {\n\n"),
    *(b"data: ping\n\n", b"\xef\xbb\xbf", packed.MARK, b'"error":', b'"error":"x",', b'"finish_reason":"stop"'),
    *(b'"message":{},', b'"choices":[],'),
]


def mutated(seeds: list[bytes], rounds: int, chance: random.Random) -> Iterator[bytes]:
    """The seeds, each cut, doubled, overwritten and spliced with others at random places."""
    for _ in range(rounds):
        raw = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 6))):
            at, to = sorted(chance.randint(0, len(raw)) for _ in range(2))
            other = chance.choice(seeds)
            raw[at : chance.choice([at, at, at + 1, to])] = chance.choice(
                [b"", chance.choice(PIECES), chance.choice(PIECES), raw[at:to], other[at:to]]
            )
        yield bytes(raw[: chance.choice((20_000, 20_000, 20_000, chance.randint(0, len(raw))))])


class Said(NamedTuple):
    """What the oracle makes of some bytes."""

    counts: bool
    content: str | None


NOTHING = Said(False, None)


def decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig", "replace"), strict=False, parse_int=float)
    except (ValueError, RecursionError):
        return None


def text_of(message: dict[str, Any]) -> str | None:
    content = message.get("content")
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        content = "".join(text for text in texts if isinstance(text, str))
    return re.sub("[\ud800-\udfff]", "\ufffd", content) if isinstance(content, str) else None


def choices_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    choices = value.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def first_choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def said_by_a_body(raw: bytes) -> Said:
    value = decoded(raw)
    message = first_choice(value).get("message") if isinstance(value, dict) else None
    return Said(not value.get("error"), text_of(message)) if isinstance(message, dict) else NOTHING


def events_of(raw: bytes) -> Iterator[tuple[bool, bool, bytes]]:
    """(is named `error`, is whole, data) of each event."""
    blocks = re.split(rb"(?:^|(?<=\n))\n", re.sub(rb"\r\n|\r", b"\n", raw.removeprefix(b"\xef\xbb\xbf")))
    for place, block in enumerate(blocks):
        data = re.findall(rb"(?:^|(?<=\n))data(?:: ?([^\n]*)|(?=\n|$))(?=\n|$)", block)
        names = re.findall(rb"(?:^|(?<=\n))event: ?([^\n]*)", block)
        if data:
            yield names[-1:] == [b"error"], place < len(blocks) - 1, b"\n".join(data)


def said_by_a_stream(raw: bytes) -> Said:
    done = failed = False
    contents: dict[int, list[str | None]] = {}
    finished: set[int] = set()
    for is_error, whole, data in events_of(raw):
        if data.strip() == b"[DONE]":
            done = True
            break
        value = decoded(data)
        failed |= is_error
        if not isinstance(value, dict):
            failed |= whole and data.lstrip().startswith(b"{")
            continue
        failed |= bool(value.get("error"))
        for choice in choices_of(value):
            index = choice.get("index")
            whole_number = isinstance(index, float) and 0 <= index <= MAX_COUNT and index.is_integer()
            place = int(index or 0) if whole_number else 0
            if place >= MAX_CHOICES:
                continue
            if isinstance(choice.get("finish_reason"), str) and choice["finish_reason"]:
                finished.add(place)
            for delta in (choice.get("delta"), choice.get("message")):
                if isinstance(delta, dict):
                    contents.setdefault(place, []).append(text_of(delta))
                    break
    if 0 not in contents:
        return NOTHING
    texts = [text for text in contents[0] if text is not None]
    ended = done or contents.keys() <= finished
    return Said(ended and not failed, "".join(texts) if texts else None)


def said(raw: bytes) -> Said:
    if re.match(rb"(\xef\xbb\xbf)?\s*[\w-]*:", raw):
        return said_by_a_stream(raw)
    return said_by_a_body(raw)


def check(attempt: Attempt, answer: Answer, raw: bytes) -> bool:
    """The attempt says what `answer` and the oracle say of `raw`, its columns can be written, its bytes are kept; True
    if it counts.
    """
    assert read(attempt.body) == answer
    expected = said(raw)
    counts = judge(attempt, answer, Retry()).verdict is Verdict.OK
    assert (counts, answer.content if counts else None) == (expected.counts, expected.content if counts else None), raw
    assert packed.plain(attempt.body) == raw
    msgspec.json.encode(answer)
    pa.array([answer.content, answer.error_message, answer.finish_reason, answer.model], pa.large_string())
    return counts


def attempt(stored: bytes, *, streamed: bool) -> Attempt:
    return Attempt(0.0, 1.0, 200, {}, stored, streamed=streamed)


@pytest.mark.campaign
def test_ten_thousand_mutated_bodies_are_safe() -> None:
    """They count only as what they are."""
    counted = sum(
        check(attempt(packed.stored(raw), streamed=False), read(packed.stored(raw)), raw)
        for raw in mutated([*BODIES, *STREAMS[:1]], COUNT, random.Random(4711))
    )
    assert COUNT // 10 < counted < COUNT * 9 // 10


@pytest.mark.campaign
def test_ten_thousand_mutated_streams_are_safe() -> None:
    """They count only as what they are, in any split."""
    chance = random.Random(4712)
    counted = 0
    for raw in mutated([*STREAMS, *STREAMS[:3], BODIES[0]], COUNT, chance):
        cuts = sorted(chance.randint(0, len(raw)) for _ in range(chance.choice((0, 1, 3, 9))))
        whole, split = received(raw), received(*(raw[at:to] for at, to in pairwise([0, *cuts, len(raw)])))
        assert (whole.speaks, whole.done) == (split.speaks, split.done)
        counted += check(attempt(split.stored(), streamed=True), read(raw), raw)
    assert COUNT // 10 < counted < COUNT * 9 // 10


def received(*pieces: bytes) -> Stream:
    """The stream as the client takes it, but for what comes behind its last event: that it would leave."""
    taken = Stream(NOTHING_SECRET.cleaner())
    for piece in pieces:
        taken.take(piece)
    return taken
