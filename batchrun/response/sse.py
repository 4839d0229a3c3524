"""Server-sent events, decoded as their bytes arrive: however the bytes are split, they give the same events. PURE.

Source: WHATWG HTML, section "Server-sent events", "Parsing an event stream": lines end with LF, CR or CRLF, a BOM may
come first, a line that starts with a colon is a comment, the `data` lines of an event are joined by LF. Only `data` and
`event` mean something here.

One thing is beside the specification, which would ignore it: `{"error": …}` in a line without a field is an event of
its own. Servers that fail in mid-stream write their error so. Other lines without a field are ignored.
"""

import re
from collections.abc import Iterable, Iterator

import msgspec

_BARE_ERROR = re.compile(rb'\{\s*"error"\s*:')

BOM = b"\xef\xbb\xbf"


class Event(msgspec.Struct, frozen=True):
    """One event. `name` is its `event` field; empty where it has none. `whole`: the blank line behind it was there."""

    data: bytes
    name: bytes = b""
    whole: bool = True


class Decoder:
    """Gives each event once the blank line behind it has come. One for each stream."""

    def __init__(self) -> None:
        self._start: bytes | None = b""
        self._partial: list[bytes] = []
        self._after_cr = False
        self._data: list[bytes] = []
        self._name = b""

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes."""
        if self._start is not None:
            piece = self._start + piece
            if len(piece) < len(BOM) and BOM.startswith(piece):
                self._start = piece
                return []
            self._start, piece = None, piece.removeprefix(BOM)
        if self._after_cr and piece:
            piece, self._after_cr = piece.removeprefix(b"\n"), False
        if not piece:
            return []
        self._after_cr = piece.endswith(b"\r")
        if b"\n" not in piece and b"\r" not in piece:
            self._partial.append(piece)  # an incomplete line waits for the next piece
            return []
        lines = (b"".join((*self._partial, piece)) if self._partial else piece).splitlines()
        self._partial = [] if piece.endswith((b"\n", b"\r")) else [lines.pop()]
        return self._events(lines)

    def close(self) -> list[Event]:
        """The event that was incomplete when the stream ended, not `whole`; the specification would drop it."""
        last = b"".join(self._partial)
        events = self._events([last]) if last else []
        if self._data:
            events.append(Event(b"\n".join(self._data), self._name, whole=False))
            self._data = []
        return events

    def _events(self, lines: list[bytes]) -> list[Event]:
        events: list[Event] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._data:
                    events.append(Event(b"\n".join(self._data), self._name))
                    self._data = []
                self._name = b""
            elif line == b"data":
                self._data.append(b"")
            elif line.startswith(b"event:"):
                self._name = line[6:].removeprefix(b" ")
            elif not self._data and _BARE_ERROR.match(line):
                events.append(Event(line))
        return events


def events(pieces: Iterable[bytes]) -> Iterator[Event]:
    """The events of a stream that has ended, the last one though it may not be whole."""
    decoder = Decoder()
    for piece in pieces:
        yield from decoder.feed(piece)
    yield from decoder.close()
