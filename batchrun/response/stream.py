"""A streamed answer while it arrives: detects its first token and its end, keeps its bytes packed and redacted.

Its content is parsed after its end, like an answer from the disk (`answer.parse`).
"""

from batchrun.credentials import Cleaner
from batchrun.response import sse
from batchrun.response.answer import has_token, is_done
from batchrun.response.packed import Packer

PACK_BYTES = 16_384
"""Bytes gathered before they are packed: packing event by event costs three times as much."""


class Stream:
    """The bytes of one stream. `size` counts them; `has_token`: a first token has come; `done`: the last event, too."""

    def __init__(self, cleaner: Cleaner) -> None:
        self.size = 0
        self.has_token = False
        self.done = False
        self._decoder = sse.Decoder()
        self._cleaner = cleaner
        self._packer = Packer()
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0

    def feed(self, piece: bytes) -> None:
        """Keeps the next bytes, and looks for a token and the end in them."""
        self.size += len(piece)
        self._gathered.append(piece)
        self._gathered_bytes += len(piece)
        if self._gathered_bytes >= PACK_BYTES:
            self._pack()
        for event in self._decoder.feed(piece):
            self.has_token = self.has_token or has_token(event.data)
            self.done = self.done or is_done(event.data)

    def stored(self) -> bytes:
        """All received bytes in their stored form, without the key. Call it once, at the end."""
        self._pack()
        self._packer.feed(self._cleaner.finish())
        return self._packer.finish()

    def _pack(self) -> None:
        self._packer.feed(self._cleaner.feed(b"".join(self._gathered)))
        self._gathered, self._gathered_bytes = [], 0
