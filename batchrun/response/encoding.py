"""A body's Content-Encoding (RFC 9110, section 8.4): gzip and deflate are requested and unpacked, in bounded memory.

The transport does this itself because its library reads no status from an answer whose encoding it can't unpack: such
an answer would look like none.
"""

import re
import zlib

ACCEPTED = "gzip, deflate"

_GZIP = 16 + zlib.MAX_WBITS  # 16 means a gzip header instead of zlib's (zlib.h, inflateInit2)
_GZIP_FIRST = 0x1F
"""The first byte of a gzip member; a body may hold several, one behind the other (RFC 1952, section 2.2)."""
_AS_IS = frozenset(
    {"", "identity", "none", "null", "utf-8", "utf8", "binary", "7bit", "8bit", "chunked", "aws-chunked"}
)
"""Names of no encoding, or of another layer's, which servers put into the header all the same."""
_WINDOWS = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": zlib.MAX_WBITS}
_PLAIN = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:[{\[]|data:|event:|:)")
"""The beginning of JSON or a stream of events; gzip and deflated answers never start so."""


class EncodingError(Exception):
    """The body can't be unpacked; the text says why."""


class Unpacker:
    """Unpacks one body as it arrives. Its first bytes decide: a plain answer may be labelled as packed."""

    def __init__(self, encoding: str) -> None:
        """`encoding` is the header's value: names in the order in which they were applied."""
        self._label = encoding.strip()
        names = [name.strip().lower() for name in encoding.split(",")]
        self._names = [name for name in names if name not in _AS_IS]
        self._layers: list[_Layer] | None = None

    def unpack(self, piece: bytes, at_most: int) -> bytes:
        """The decoded piece, at most `at_most` bytes of it; the rest is dropped.

        Raises:
            EncodingError: it is not in that encoding, or in one that was not requested.
        """
        if self._layers is None:
            if not piece.strip() and "deflate" not in self._names:
                return piece[:at_most]  # servers send spaces while they work
            if _PLAIN.match(piece):
                self._layers = []
            elif any(name not in _WINDOWS for name in self._names):
                raise EncodingError(f"the answer has an encoding that was not requested: {self._label[:100]}")
            elif self._names:
                self._layers = [_Layer(name) for name in reversed(self._names)]  # the outermost first
            else:
                self._layers = [_Layer("gzip")] if is_gzip(piece) else []
        for layer in self._layers:
            piece = layer.unpack(piece, at_most)
        return piece[:at_most]


def is_gzip(first: bytes) -> bool:
    """True where the first piece of a body is gzip, even if its header says otherwise: no JSON or text starts so."""
    return first[:1] == bytes([_GZIP_FIRST])


class _Layer:
    """One encoding, unpacked as it arrives."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._inflater: zlib._Decompress | None = None

    def unpack(self, piece: bytes, at_most: int) -> bytes:
        out = bytearray()
        try:
            while piece and len(out) < at_most:
                if self._inflater is None or self._inflater.eof:
                    if self._inflater is not None and piece[0] != _GZIP_FIRST:
                        break  # padding behind the end
                    # Some servers send deflate without zlib's header, whose first byte ends in 8 (RFC 1950).
                    raw = self._name == "deflate" and piece[0] & 0x0F != 8
                    self._inflater = zlib.decompressobj(-zlib.MAX_WBITS if raw else _WINDOWS[self._name])
                out += self._inflater.decompress(piece, at_most - len(out))
                piece = self._inflater.unused_data or self._inflater.unconsumed_tail
        except zlib.error as error:
            raise EncodingError(f"the answer is not valid {self._name}: {error}") from error
        return bytes(out)
