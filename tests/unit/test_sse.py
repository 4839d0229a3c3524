"""A stream's bytes give the same events however they are split, and those that the specification says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.response.sse import Decoder, Event, events


def decoded(*pieces: bytes) -> list[Event]:
    return list(events(pieces))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(b"", [], id="nothing"),
        pytest.param(b"data: a\n\n", [Event(b"a")], id="LF"),
        pytest.param(b"data: a\r\r", [Event(b"a")], id="CR"),
        pytest.param(b"data: a\r\n\r\n", [Event(b"a")], id="CRLF"),
        pytest.param(b"data: a\r\ndata: b\n\rdata: c\r\n\n", [Event(b"a\nb"), Event(b"c")], id="mixed ends"),
        pytest.param(b"\xef\xbb\xbfdata: a\n\n", [Event(b"a")], id="BOM"),
        pytest.param(b"\n\xef\xbb\xbfdata: a\n\n", [], id="BOM, but not first"),
        pytest.param(b"data:a\n\n", [Event(b"a")], id="no space"),
        pytest.param(b"data:  a\n\n", [Event(b" a")], id="one space of two"),
        pytest.param(b"data: a\ndata:\ndata\ndata: b\n\n", [Event(b"a\n\n\nb")], id="data over lines"),
        pytest.param(b"data\n\n", [Event(b"")], id="a field without a colon"),
        pytest.param(b": data: a\n\n:\n\n", [], id="comments"),
        pytest.param(b"event: error\ndata: a\n\ndata: b\n\n", [Event(b"a", b"error"), Event(b"b")], id="a name"),
        pytest.param(b"event: error\n\ndata: b\n\n", [Event(b"b")], id="a name without data"),
        pytest.param(b"id: 1\nretry: 5\nother: x\ndatum: y\n Data: z\n\n", [], id="other fields"),
        pytest.param(
            b'data: a\n\n{"error": 1}\ndata: b\n\n',
            [Event(b"a"), Event(b'{"error": 1}'), Event(b"b")],
            id="a bare error",
        ),
        pytest.param(b'data: {\n{"error": 1}\n\n', [Event(b"{")], id="an error within an event"),
        pytest.param(b'{"choices": 1}\n\n', [], id="another object"),
        pytest.param(b"\n\n\ndata: a\n\n\n\n", [Event(b"a")], id="blank lines"),
        pytest.param(b"data: a\n", [Event(b"a", whole=False)], id="no blank line at the end"),
        pytest.param(b"data: a\n\ndata: b", [Event(b"a"), Event(b"b", whole=False)], id="half a line at the end"),
        pytest.param(
            b"data: \xff\x00\xc2\x85\xe2\x80\xa8\x0b\n\n", [Event(b"\xff\x00\xc2\x85\xe2\x80\xa8\x0b")], id="no ends"
        ),
    ],
)
def test_events_match_the_standards_specification(raw: bytes, expected: list[Event]) -> None:
    """Byte by byte too. One thing is beside the specification: an error in a line without a field."""
    assert decoded(raw) == expected
    assert decoded(*(raw[at : at + 1] for at in range(len(raw)))) == expected


LINES = st.lists(
    st.sampled_from(
        [
            b"data: a",
            b'{"error":1}',
            b"data:",
            b"data",
            b"",
            b":",
            b"event: error",
            b"\xef\xbb\xbf",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
        ]
    ),
    max_size=12,
)


@given(st.one_of(LINES.map(b"".join), st.binary(max_size=60)), st.data())
def test_events_ignore_how_bytes_are_split(raw: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    assert decoded(*(raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True))) == decoded(raw)


def test_an_event_follows_its_blank_line() -> None:
    decoder = Decoder()
    assert [decoder.feed(piece) for piece in (b"data: a", b"\r", b"\n", b"\r", b"\ndata: b\n", b"\n")] == [
        [],
        [],
        [],
        [Event(b"a")],
        [],
        [Event(b"b")],
    ]


def test_many_pieces_take_linear_time() -> None:
    decoder = Decoder()
    for _ in range(100_000):
        assert decoder.feed(b"x" * 10) == []
    (event,) = decoder.feed(b"\ndata: a\n\n")
    assert event == Event(b"a")
