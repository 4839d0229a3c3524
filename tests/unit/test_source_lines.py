from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.source.lines import MAX_DEPTH, read_row, split_lines


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(
    st.lists(st.sampled_from([b"", b"a", b"bc\r", b"\xe2\x80\xa8\x0b\r\x85", b"x" * 9])), st.lists(st.integers(0, 60))
)
def test_lines_do_not_depend_on_where_blocks_end(lines: list[bytes], places: list[int]) -> None:
    data = b"\n".join(lines)
    split = list(split_lines(cut(data, places), max_line_bytes=8))
    assert [line for line, _ in split] == [
        line if len(line) <= 8 else None for line in (lines[:-1] if lines and not lines[-1] else lines)
    ]
    assert sum(size for _, size in split) == len(data)


def test_an_oversized_line_is_never_held() -> None:
    def blocks() -> list[bytes]:
        return [b"a\n", *[b"x" * 1_000] * 100, b"\nb"]

    assert list(split_lines(blocks(), max_line_bytes=5_000)) == [(b"a", 2), (None, 100_001), (b"b", 1)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1', "the JSON ends too early, at byte 7"),
        (
            b'{"a": 1}x',
            "there is more text after the object, near byte 9; write one object per line and nothing else",
        ),
        (
            b"{'a': 1}",
            "it is not JSON: keys need double quotes; if Python printed it, write it with json.dumps",
        ),
        (b"[1, 2]", "the line holds an array, not an object"),
        (b"null", "the line holds null, not an object"),
        (b'"x"', "the line holds a string, not an object"),
        (b"12", "the line holds a number, not an object"),
        (b"true", "the line holds true or false, not an object"),
        (b"[", "the file looks like one JSON document over many lines; write one object per line (jq -c)"),
        (b'{"a": NaN}', "NaN at byte 7 is not JSON"),
        (b'{"a": "NaN", "b": -Infinity}', "-Infinity at byte 19 is not JSON"),
        (b'{"a": None, "b": 1}', "None at byte 7 is not JSON"),
        (b'{"a": "inf', "the JSON ends too early, at byte 10"),
        (b'{"a": "\\ud800"}', "\\ud800 at byte 8 is half of a surrogate pair, which is not a character"),
        (
            b'{"a": "\\ud83d\\ude00 \\udc00x"}',
            "\\udc00 at byte 21 is half of a surrogate pair, which is not a character",
        ),
        (b'{"a": "\\\\ud800", "b"', "the JSON ends too early, at byte 20"),
        (b'{"a": "\xed\xa0\x80"}', "byte 8 begins half of a surrogate pair, which is not UTF-8"),
        (
            '{"a": "né"}'.encode("latin-1"),
            "byte 9 (0xe9) is not UTF-8; it looks like ISO-8859-1: iconv -f ISO-8859-1 -t UTF-8",
        ),
        (
            '{"a": "5 €"}'.encode("cp1252"),
            "byte 10 (0x80) is not UTF-8; it looks like WINDOWS-1252: iconv -f WINDOWS-1252 -t UTF-8",
        ),
        (b'{"a": 1}\x00', "byte 9 is NUL; the file may be UTF-16"),
        (bytes(4096), "4,096 NUL bytes and nothing else: this part of the file was never written, or was lost"),
        (b'{"a": 1}\r{"a": 2}', "its lines end with CR alone; write them with LF: tr '\\r' '\\n'"),
        (b'{"a": "1e999", "b": 1e400}', "the number 1e400 at byte 21 is too large for a double"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the integer at byte 7 has 5,000 digits; at most 4,300 can be read"),
        (b'{"a":' * 600 + b"1" + b"}" * 600, f"it is nested more than {MAX_DEPTH} levels deep"),
        (b'{"a":' + b"[" * 100_000, f"it is nested more than {MAX_DEPTH} levels deep"),
    ],
)
def test_a_broken_line_names_its_byte(line: bytes, said: str) -> None:
    assert read_row(line) == said


@pytest.mark.parametrize(
    "line", [b'{"a": 1, "a": 1}', b'{"b": {"a": 1, "c": ":", "a": 2}}', b'{"b": [{"a":1,"\\u0061":2}]}']
)
def test_repeated_keys_are_reported_at_any_depth(line: bytes) -> None:
    assert read_row(line) == "the key 'a' appears twice in one object, so its value is ambiguous"
    assert isinstance(read_row(b'{"b": {"a": "a: 1, a: 2"}, "a": [{"a": 1}, {"a": 2}]}'), dict)


def test_integers_keep_all_their_digits() -> None:
    assert read_row(b'{"a": 18446744073709551616, "b": 123456789012345678901234567890}') == {
        "a": 2**64,
        "b": 123456789012345678901234567890,
    }


def test_brackets_inside_strings_are_no_nesting() -> None:
    assert read_row(b'{"a": "' + b'[\\"{' * 1_000 + b'"}') == {"a": '["{' * 1_000}


@given(st.binary())
def test_any_bytes_are_a_row_or_a_problem(line: bytes) -> None:
    assert isinstance(read_row(line), dict | str)


@given(st.binary(max_size=20))
def test_any_string_bytes_are_row_or_problem(text: bytes) -> None:
    assert isinstance(read_row(b'{"a": "' + text + b'"}'), dict | str)
