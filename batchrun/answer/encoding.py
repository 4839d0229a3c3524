"""A body's Content-Encoding (RFC 9110, section 8.4): gzip and deflate are asked for and unpacked, in bounded memory.

The transport does this itself because its library reads no status from an answer whose encoding it can't unpack: such
an answer would look like none.
"""

import zlib

ASKED_FOR = "gzip, deflate"

_GZIP = 16 + zlib.MAX_WBITS
_GZIP_FIRST = 0x1F
"""The first byte of a gzip member; a body may hold several, one behind the other (RFC 1952, section 2.2)."""
_AS_IS = frozenset({"", "identity"})
_WINDOWS = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": zlib.MAX_WBITS}


class EncodingError(Exception):
    """The body can't be unpacked; the text says why."""


class Unpacker:
    """Unpacks one body as it arrives."""

    def __init__(self, encoding: str) -> None:
        """`encoding` is the header's value.

        Raises:
            EncodingError: it was not asked for.
        """
        self._name = encoding.strip().lower()
        self._packed = self._name not in _AS_IS
        if self._packed and self._name not in _WINDOWS:
            raise EncodingError(f"the answer's encoding was not asked for: {encoding.strip()[:100]}")
        self._inflater: zlib._Decompress | None = None

    def unpack(self, piece: bytes, at_most: int) -> bytes:
        """What the piece holds; no more than `at_most` bytes of it, the rest is dropped.

        Raises:
            EncodingError: it is not in that encoding.
        """
        if not self._packed:
            return piece[:at_most]
        out = bytearray()
        try:
            while piece and len(out) < at_most:
                if self._inflater is None or self._inflater.eof:
                    if self._inflater is not None and piece[0] != _GZIP_FIRST:
                        break  # padding behind the end
                    self._inflater = zlib.decompressobj(self._window(piece[0]))
                out += self._inflater.decompress(piece, at_most - len(out))
                piece = self._inflater.unused_data or self._inflater.unconsumed_tail
        except zlib.error as error:
            raise EncodingError(f"the answer is no {self._name}: {error}") from error
        return bytes(out)

    def _window(self, first: int) -> int:
        """Some servers send deflate without zlib's header, whose first byte ends in 8 (RFC 1950)."""
        return -zlib.MAX_WBITS if self._name == "deflate" and first & 0x0F != 8 else _WINDOWS[self._name]
