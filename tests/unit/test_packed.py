"""What is stored of an answer gives back every byte of it, whatever the bytes are."""

import os
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchrun.response import answer
from batchrun.response.packed import MARK, PIECE_BYTES, Packer, beginning, pieces, plain, size, stored


def packed(*fed: bytes) -> bytes:
    packer = Packer()
    for piece in fed:
        packer.feed(piece)
    return packer.finish()


@given(st.lists(st.binary(max_size=300)))
@example([])
@example([b"data: x\n\n" * 20_000, os.urandom(100_000)])
@example([bytes(PIECE_BYTES)] * 3)
def test_a_packed_stream_gives_back_its_bytes(fed: list[bytes]) -> None:
    answer_ = packed(*fed)
    assert plain(answer_) == b"".join(fed)
    assert size(answer_) == len(b"".join(fed))
    assert beginning(answer_, 10) == b"".join(fed)[:10]
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces(answer_))


@given(st.binary())
@example(MARK)
@example(MARK + b"no zlib")
@example(packed(b"data: a\n\n"))
def test_whole_bodies_are_stored_unpacked(body: bytes) -> None:
    """Unless one could be mistaken for a packed one."""
    assert plain(stored(body)) == body
    assert size(stored(body)) == len(body)
    assert (stored(body) == body) == (not body.startswith(MARK))


@pytest.mark.parametrize("fed", [b"", b"data: x\n\n" * 1000])
def test_a_packed_stream_that_is_damaged_raises_nothing(fed: bytes) -> None:
    whole = packed(fed)
    for place in range(len(MARK), len(whole)):
        assert plain(whole[:place]) == fed[: len(plain(whole[:place]))]
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        plain(bytes(damaged))
        answer.parse(bytes(damaged))


def test_reading_a_stream_needs_its_text_only() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"word "}}],"padding":"%s"}\n\n' % (b"x" * 2000)
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    stream = packed(*[event] * 5000, end)
    tracemalloc.start()
    assert answer.parse(stream).content == "word " * 5000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000 < len(event) * 5000
