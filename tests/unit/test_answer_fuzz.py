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
from batchrun.response.answer import MAX_CHOICES, parse
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


SOME_JSON = "\x1f"
"""Content that is no text and is kept as JSON: the oracle does not spell it."""


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
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not isinstance(content, list | str | None):
        content = SOME_JSON
    elif isinstance(content, list):
        only_texts = texts or all(isinstance(part, str) for part in parts)
        content = "".join(texts or parts) if only_texts else SOME_JSON
    return re.sub("[\ud800-\udfff]", "\ufffd", content) if isinstance(content, str) else None


def choices_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    choices = value.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def index_of(choice: dict[str, Any], otherwise: int) -> int:
    index = choice.get("index")
    whole = isinstance(index, float) and 0 <= index <= MAX_COUNT and index.is_integer()
    return int(index or 0) if whole else otherwise


def message_of(choice: dict[str, Any]) -> Any:
    if isinstance(choice.get("message"), dict):
        return choice["message"]
    if isinstance(choice.get("delta"), dict) and choice.get("finish_reason"):
        return choice["delta"]
    texts = [value for name in ("message", "text") if isinstance(value := choice.get(name), str)]
    return {"content": texts[0]} if texts else None


def said_by_a_body(raw: bytes) -> Said:
    value = decoded(raw)
    choices = choices_of(value) if isinstance(value, dict) else []
    numbered = {index_of(choice, place): choice for place, choice in reversed([*enumerate(choices)])}
    message = message_of(numbered[min(numbered)]) if numbered else None
    return Said(not value.get("error"), text_of(message)) if isinstance(message, dict) else NOTHING


def separated(events: Iterator[tuple[bool, bool, bytes]]) -> Iterator[tuple[bool, bool, bytes]]:
    """The events, and those that no blank line separates from the one before."""
    for is_error, whole, data in events:
        lines = [found for line in data.split(b"\n") if (found := re.sub(rb"^data:", b"", line).strip())]
        sound = [line == b"[DONE]" or isinstance(decoded(line), dict) for line in lines]
        together = decoded(data) is not None or not (sound if whole else sound[:-1])
        if together or not all(sound if whole else sound[:-1]) or not re.search(rb"\n|^data:", data):
            yield is_error, whole, data
            continue
        for place, line in enumerate(lines):
            yield is_error, whole or place < len(lines) - 1, line


def events_of(raw: bytes) -> Iterator[tuple[bool, bool, bytes]]:
    """(is named `error`, is whole, data) of each event."""
    blocks = re.split(rb"(?:^|(?<=\n))\n", re.sub(rb"\r\n|\r", b"\n", raw.removeprefix(b"\xef\xbb\xbf")))
    for place, block in enumerate(blocks):
        data = re.findall(rb"(?:^|(?<=\n))data(?:: ?([^\n]*)|(?=\n|$))(?=\n|$)", block)
        for line in block.split(b"\n"):
            if re.match(rb"data(:|$)", line):
                break
            if re.match(rb'\{\s*"error"\s*:', line):
                yield False, True, line
        names = re.findall(rb"(?:^|(?<=\n))event: ?([^\n]*)", block)
        if data:
            yield names[-1:] == [b"error"], place < len(blocks) - 1, b"\n".join(data)


def said_by_a_stream(raw: bytes) -> Said:
    done = failed = False
    contents: dict[int, str | None] = {}
    finished: set[int] = set()
    for is_error, whole, data in separated(events_of(raw)):
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
            place = index_of(choice, 0)
            if place >= MAX_CHOICES:
                continue
            if isinstance(choice.get("finish_reason"), str) and choice["finish_reason"]:
                finished.add(place)
            name = next((name for name in ("delta", "message") if isinstance(choice.get(name), dict)), None)
            if name is not None:
                before, text = contents.setdefault(place, None), text_of(choice[name])
                repeats = name == "message" and before and text is not None and text.startswith(before)
                contents[place] = text if repeats or before is None else before + (text or "")
    ended = done or contents.keys() <= finished
    return Said(ended and not failed, contents[0]) if 0 in contents else NOTHING


def said(raw: bytes) -> Said:
    if re.match(rb"(\xef\xbb\xbf)?\s*[\w-]*:", raw):
        return said_by_a_stream(raw)
    return said_by_a_body(raw)


def check(attempt: Attempt, answer: Answer, raw: bytes) -> bool:
    """The attempt says what `answer` and the oracle say of `raw`, its columns can be written, its bytes are kept; True
    if it counts.
    """
    assert parse(attempt.body) == answer
    expected = said(raw)
    counts = judge(attempt, answer, Retry()).verdict is Verdict.OK
    assert counts == expected.counts, raw
    if counts and SOME_JSON not in (expected.content or ""):
        assert answer.content == expected.content, raw
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
        check(attempt(packed.stored(raw), streamed=False), parse(packed.stored(raw)), raw)
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
        assert (whole.has_token, whole.done) == (split.has_token, split.done)
        counted += check(attempt(split.stored(), streamed=True), parse(raw), raw)
    assert COUNT // 10 < counted < COUNT * 9 // 10


def received(*pieces: bytes) -> Stream:
    """The stream as the client takes it, but for what comes behind its last event: that it would leave."""
    taken = Stream(NOTHING_SECRET.cleaner())
    for piece in pieces:
        taken.feed(piece)
    return taken
