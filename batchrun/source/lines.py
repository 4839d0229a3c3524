"""Splits and decodes JSON lines, and explains what is wrong with an invalid line. PURE."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate

import msgspec

MAX_DEPTH = 500
"""The deepest nesting of a row. Python's own limit is between 900 and 1,000 and depends on its stack, so without a
lower limit a row could pass the input check and fail when it is sent."""

_decode = msgspec.json.Decoder().decode

_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_BRACKETS = re.compile(_STRING + rb"|([\[{])|([\]}])", re.DOTALL)
_NOT_JSON = re.compile(_STRING + rb"|(-?\b(?:NaN|nan|Infinity|inf|None|True|False|undefined)\b)", re.DOTALL)
_NUMBER = re.compile(_STRING + rb"|(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)", re.DOTALL)
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL
)  # a pair, half a pair, or any other


def split_lines(blocks: Iterable[bytes], max_line_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    r"""Every line of the stream without its "\n", and its size including it. Only "\n" ends a line.

    A line longer than `max_line_bytes` is yielded as None: memory never holds more than that and one block.
    """
    held: list[bytes] = []
    held_bytes = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        held_bytes += len(first)
        if held_bytes <= max_line_bytes:
            held.append(first)
        else:
            held.clear()
        if not others:
            continue
        yield (b"".join(held) if held_bytes <= max_line_bytes else None), held_bytes + 1
        last = others.pop()
        for line in others:
            yield (line if len(line) <= max_line_bytes else None), len(line) + 1
        held, held_bytes = [last], len(last)
    if held_bytes:
        yield (b"".join(held) if held_bytes <= max_line_bytes else None), held_bytes


def read_row(line: bytes) -> dict[str, object] | str:
    """The object in `line`, or a message about what is wrong with it.

    Bytes count from 1; "near byte N" is msgspec's count. Integers keep all their digits.
    """
    try:
        row = _decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return _problem(line, error)
    if type(row) is not dict:
        return f"the line holds {_NAMES[type(row)]}, not an object"
    if len(line) > 2 * MAX_DEPTH and line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        return _TOO_DEEP
    # Readers differ in which value of a repeated key they use. Looked for only where there are more colons than keys at
    # the top, since it takes longer than all else.
    if line.count(b":") > len(row) and (name := _repeated(line)) is not None:
        return f"the key {name!r} appears twice in one object, so its value is ambiguous"
    return row


def _repeated(line: bytes) -> str | None:
    """A key that one of the line's objects has twice, or None. 9 µs for 350 bytes by Python's decoder (measured)."""
    twice: list[str] = []

    def note(members: list[tuple[str, object]]) -> None:
        names = {name for name, _ in members}
        if len(names) < len(members):
            twice.append(max((name for name, _ in members), key=[name for name, _ in members].count))

    json.loads(line, object_pairs_hook=note, parse_int=str, parse_float=str, strict=False)
    return twice[0] if twice else None


_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def _depth(line: bytes) -> int:
    """How deep the line is nested."""
    steps = (1 if opened else -1 if closed else 0 for opened, closed in _BRACKETS.findall(line))
    return max(accumulate(steps), default=0)


def _problem(line: bytes, error: Exception) -> str:
    """The error in a line that can't be decoded, the most specific cause first."""
    if (problem := _encoding_problem(line)) is not None:
        return problem
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    for match in _ESCAPE.finditer(line):
        if half := match[1]:
            at = match.start() + 1
            return f"{half.decode()} at byte {at} is half of a surrogate pair, which is not a character"
    for match in _NUMBER.finditer(line) if isinstance(error, msgspec.ValidationError) else ():
        number = match[1]
        if number and number.lstrip(b"-").isdigit() and len(number) > 4300:  # CPython's limit for int()
            return f"the integer at byte {match.start() + 1} has {len(number):,} digits; at most 4,300 can be read"
        if number and not number.lstrip(b"-").isdigit() and math.isinf(float(number)):
            return f"the number {number[:20].decode()} at byte {match.start() + 1} is too large for a double"
    message = str(error)
    # Only for these messages: a truncated line may end inside a string that holds such a word.
    has_word = "invalid character" in message or "invalid number" in message
    for match in _NOT_JSON.finditer(line) if has_word else ():
        if match[1]:
            return f"{match[1].decode()} at byte {match.start() + 1} is not JSON"
    return _syntax_problem(line, message)


def _encoding_problem(line: bytes) -> str | None:
    """Why the bytes are not text, with a guess at their encoding; None: they are."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        at, bad = error.start + 1, line[error.start]
    else:
        if not line.strip(b"\0"):
            return f"{len(line):,} NUL bytes and nothing else: this part of the file was never written, or was lost"
        return f"byte {line.index(0) + 1} is NUL; the file may be UTF-16" if 0 in line else None
    if bad == 0xED and line[at : at + 1] >= b"\xa0":
        return f"byte {at} begins half of a surrogate pair, which is not UTF-8"
    if control := _CONTROL.search(line):
        return (
            f"byte {at} (0x{bad:02x}) is not UTF-8, and byte {control.start() + 1} is not text either: a binary file?"
        )
    guess = "WINDOWS-1252" if any(0x80 <= byte < 0xA0 for byte in line) else "ISO-8859-1"
    return f"byte {at} (0x{bad:02x}) is not UTF-8; it looks like {guess}: iconv -f {guess} -t UTF-8"


def _syntax_problem(line: bytes, message: str) -> str:
    """The cause of msgspec's message where it is known, with what to do; else the message itself."""
    if line.strip() in (b"[", b"{"):
        return "the file looks like one JSON document over many lines; write one object per line (jq -c)"
    if message == "Input data was truncated":
        return f"the JSON ends too early, at byte {len(line)}"
    if line.lstrip()[:1] not in (b"{", b"["):
        return "it is not JSON: it does not start with `{`; CSV is read from files named .csv or .tsv only"
    if "trailing characters" in message:
        at = message.partition("(byte ")[2].rstrip(")")
        if b"\r" in line.strip():
            return "its lines end with CR alone; write them with LF: tr '\\r' '\\n'"
        return f"there is more text after the object, near byte {at}; write one object per line and nothing else"
    if "object keys must be strings" in message:
        return "it is not JSON: keys need double quotes; if Python printed it, write it with json.dumps"
    what = message.removeprefix("JSON is malformed: ")
    return "it is not JSON: " + re.sub(r"\(byte (\d+)\)", r"near byte \1", what)
