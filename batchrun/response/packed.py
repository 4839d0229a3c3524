"""Answers as they are stored: a whole one as it came, a stream through zlib behind `MARK` and its size. PURE.

A stream repeats its envelope around every few letters: it shrinks to about a thirtieth (measured), which is what many
long streams at once take in memory. Every reader of a stored answer reads it through here.
"""

import zlib
from collections.abc import Iterator

MARK = b"\x00zlib\x00"
"""No JSON, HTML or event stream starts with this; a body that does is stored as a stream is."""

SIZE_BYTES = 8
"""The size of what is packed, big-endian."""

LEVEL = 3  # a third of the time of zlib's default, for a third more bytes (measured)
# zlib takes 4 × the window and 512 × 2^MEMORY_LEVEL bytes (zconf.h): 256 KB by default
WINDOW_BITS = 13
MEMORY_LEVEL = 6  # with that window: 64 KB for each stream that is being read
PIECE_BYTES = 65_536  # of a stored stream, unpacked at a time: bounds what reading one takes


class Packer:
    """Stores a stream as it arrives."""

    def __init__(self) -> None:
        self._packer = zlib.compressobj(LEVEL, zlib.DEFLATED, WINDOW_BITS, MEMORY_LEVEL)
        self._packed: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> None:
        self._size += len(piece)
        self._packed.append(self._packer.compress(piece))

    def finish(self) -> bytes:
        """The stored form of all that was fed."""
        return b"".join((MARK, self._size.to_bytes(SIZE_BYTES, "big"), *self._packed, self._packer.flush()))


def stored(body: bytes) -> bytes:
    """The stored form of a whole body: the body itself, unless it could be taken for a packed one."""
    if not body.startswith(MARK):
        return body
    packer = Packer()
    packer.feed(body)
    return packer.finish()


def pieces(answer: bytes) -> Iterator[bytes]:
    """The plain bytes of a stored answer; a packed one in pieces of at most 64 KB. Damage ends them."""
    if not answer.startswith(MARK):
        yield answer
        return
    unpacker = zlib.decompressobj(WINDOW_BITS)
    rest = answer[len(MARK) + SIZE_BYTES :]
    try:
        while piece := unpacker.decompress(rest, PIECE_BYTES):
            yield piece
            rest = unpacker.unconsumed_tail
    except zlib.error:
        return


def plain(answer: bytes) -> bytes:
    """The answer's bytes as the server sent them."""
    return b"".join(pieces(answer)) if answer.startswith(MARK) else answer


def size(answer: bytes) -> int:
    """The number of plain bytes in a stored answer."""
    if not answer.startswith(MARK):
        return len(answer)
    return int.from_bytes(answer[len(MARK) : len(MARK) + SIZE_BYTES], "big")


def beginning(answer: bytes, length: int) -> bytes:
    """The first `length` plain bytes, at most 64 KB."""
    return next(pieces(answer), b"")[:length]
