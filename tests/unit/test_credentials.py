"""A key goes into a header and into nothing else: whatever repeats it, in any form, is cleaned."""

import base64
import json
import string
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchrun.credentials import MIN_SECRET_CHARS, Credentials, read
from batchrun.errors import JobError
from batchrun.job.settings import Endpoint

URL = "https://h/v1"
KEY = "sk-canary/4711+A&b=<%Z\"'\\"
PRINTABLE = string.ascii_letters + string.digits + string.punctuation
KEYS = st.text(PRINTABLE, min_size=MIN_SECRET_CHARS, max_size=80)


def holding(key: str) -> Credentials:
    return read(Endpoint(URL, api_key_env="KEY"), {"KEY": key})


def escaped_as_go_does(text: str) -> str:
    whole = json.dumps(text)
    for char in "<>&":
        whole = whole.replace(char, f"\\u{ord(char):04x}")
    return whole


FORMS: Mapping[str, Callable[[str], str]] = {
    "plain": lambda key: key,
    "JSON": json.dumps,
    "JSON of PHP": lambda key: json.dumps(key).replace("/", "\\/"),
    "JSON of Go": escaped_as_go_does,
    "URL": lambda key: urllib.parse.quote(key, safe=""),
    "URL path": urllib.parse.quote,
    "URL of JavaScript": lambda key: urllib.parse.quote(key, safe="!*'()"),
    "form": urllib.parse.quote_plus,
}


@pytest.mark.parametrize("form", FORMS)
@given(key=KEYS, before=st.text(max_size=20), after=st.text(max_size=20))
@example(key=KEY, before="", after="")
def test_no_form_of_the_key_survives(form: str, key: str, before: str, after: str) -> None:
    written = FORMS[form](key)
    raw = f"{before}{written}{after}".encode("utf-8", "replace")
    cleaned = holding(key).clean(raw)
    assert written.strip('"').encode() not in cleaned
    assert b"[redacted]" in cleaned


@given(KEYS)
def test_lower_case_percent_escapes_are_removed(key: str) -> None:
    first, *escapes = urllib.parse.quote(key, safe="").split("%")
    written = first + "".join(f"%{escape[:2].lower()}{escape[2:]}" for escape in escapes)
    assert written not in holding(key).clean_text(f"<{written}>")


@given(KEYS, st.binary(max_size=5), st.binary(max_size=5), st.booleans())
def test_base64_at_any_offset_is_removed(key: str, before: bytes, after: bytes, url_safe: bool) -> None:
    encode, decode = (
        (base64.urlsafe_b64encode, base64.urlsafe_b64decode) if url_safe else (base64.b64encode, base64.b64decode)
    )
    cleaned = holding(key).clean(encode(before + key.encode() + after))
    assert b"[redacted]" in cleaned
    for piece in cleaned.split(b"[redacted]"):
        for shift in range(4):
            digits = piece[shift:]
            assert key.encode() not in decode(digits[: len(digits) // 4 * 4])


def test_a_text_without_key_is_unchanged() -> None:
    raw = b'{"choices":[]}' * 100
    assert holding(KEY).clean(raw) is raw


def test_half_characters_survive_the_cleaning() -> None:
    assert holding("sk-canary").clean_text("\ud800 sk-canary") == "\ud800 [redacted]"


def test_the_repr_shows_no_key() -> None:
    assert "canary" not in repr(holding("sk-canary")) + str(holding("sk-canary"))


# -- where it comes from


def test_the_key_becomes_a_bearer_header() -> None:
    assert holding(" sk-canary\n").headers == {"Authorization": "Bearer sk-canary"}


@pytest.mark.parametrize("environ", [{}, {"KEY": ""}, {"KEY": "  "}])
def test_an_unset_variable_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(JobError, match=r"endpoint\.api_key_env: the environment variable KEY is not set; export KEY="):
        read(Endpoint(URL, api_key_env="KEY"), environ)


@pytest.mark.parametrize("key", ["sk canary", "sk-can\nary", "sk-canarý", "sk-\x00canary", "sk\u200bcanary"])
def test_an_unsendable_key_is_refused_unshown(key: str) -> None:
    with pytest.raises(JobError, match="the API key contains blanks or characters") as caught:
        holding(key)
    assert "ary" not in str(caught.value).removesuffix("carry")


def test_a_secret_header_is_cleaned() -> None:
    """With and without its scheme."""
    endpoint = Endpoint(URL, headers={"X-Team": "blue", "Authorization": "env:AUTH"})
    credentials = read(endpoint, {"AUTH": "Bearer sk-canary"})
    assert credentials.headers == {"X-Team": "blue", "Authorization": "Bearer sk-canary"}
    assert (
        credentials.clean(b"blue, Bearer sk-canary, sk-canary, Bearer x") == b"blue, [redacted], [redacted], Bearer x"
    )
    with pytest.raises(JobError, match=r"endpoint\.headers\.Authorization: the environment variable AUTH is not set"):
        read(endpoint, {})


@pytest.mark.parametrize("headers", [{"X-A": "a\r\nX-B: b"}, {"X-A": "env:SPLIT"}])
def test_a_header_that_would_become_two_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(JobError, match=r"endpoint\.headers\.X-A: contains characters"):
        read(Endpoint(URL, headers=headers), {"SPLIT": "canary\nX-B: b"})


def key_file(tmp_path: Path, mode: int, text: str = "sk-canary\n") -> Endpoint:
    file = tmp_path / "key"
    file.write_text(text)
    file.chmod(mode)
    return Endpoint(URL, api_key_file=str(file))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_key_file_of_ones_own_is_read(tmp_path: Path, mode: int) -> None:
    credentials = read(key_file(tmp_path, mode), {})
    assert credentials.headers == {"Authorization": "Bearer sk-canary"}
    assert credentials.warning is None


@pytest.mark.parametrize("mode", [0o444, 0o644, 0o604])
def test_a_readable_key_file_is_warned_of(tmp_path: Path, mode: int) -> None:
    credentials = read(key_file(tmp_path, mode), {})
    assert credentials.headers == {"Authorization": "Bearer sk-canary"}
    assert "can be read by everyone" in (credentials.warning or "")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o660])
def test_a_writable_key_file_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(JobError, match=r"endpoint\.api_key_file: others may write .*; chmod 600 "):
        read(key_file(tmp_path, mode), {})


def test_an_unusable_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"endpoint\.api_key_file: .* is empty"):
        read(key_file(tmp_path, 0o600, " \n"), {})
    with pytest.raises(JobError, match=r"endpoint\.api_key_file: can't read .*gone"):
        read(Endpoint(URL, api_key_file=str(tmp_path / "gone")), {})


def in_pieces(credentials: Credentials, raw: bytes, cuts: list[int]) -> bytes:
    cleaner = credentials.cleaner()
    fed = [
        cleaner.feed(raw[start:end]) for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True)
    ]
    return b"".join([*fed, cleaner.finish()])


@given(
    key=st.one_of(KEYS, st.text("ab", min_size=MIN_SECRET_CHARS, max_size=9)),
    words=st.lists(st.one_of(st.just("KEY"), st.text("ab", max_size=12), st.text(max_size=5)), max_size=6),
    data=st.data(),
)
def test_a_key_in_pieces_is_removed(key: str, words: list[str], data: st.DataObject) -> None:
    raw = "".join(key if word == "KEY" else word for word in words).encode("utf-8", "replace")
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=8))
    assert in_pieces(holding(key), raw, cuts) == holding(key).clean(raw)


@pytest.mark.parametrize("form", FORMS)
def test_no_key_form_survives_byte_by_byte(form: str) -> None:
    written = FORMS[form](KEY).strip('"').encode()
    raw = b"data: Bearer " + written + b"\n\n" + written + written
    cleaned = in_pieces(holding(KEY), raw, list(range(len(raw))))
    assert cleaned == b"data: Bearer [redacted]\n\n[redacted][redacted]"


def test_without_key_nothing_is_held_back() -> None:
    cleaner = Credentials({}, frozenset()).cleaner()
    assert (cleaner.feed(b"abc"), cleaner.finish()) == (b"abc", b"")
