"""Images in a request: their places, and the placeholders for them until it is sent. PURE.

An image is given by its bytes, a `data:` URL, an http(s) URL, or a path. An http(s) URL stays as it is. The others are
a `Picture` in the body, so that a waiting request holds no base64. The `request_key` has the digest of the bytes, so
one picture makes one question however it is given.
"""

import binascii
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from batchrun.errors import InputError

USUAL_TOKENS = {"auto": 765, "low": 85, "high": 765}
"""The tokens that the upstream counts for an image of common size, by detail: for estimates only."""

Source = str | bytes
"""The source of an image that must be loaded: a path, a `data:` URL, or its bytes."""

_SIGNATURES: dict[str, re.Pattern[bytes]] = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
_DATA_URL = re.compile(r"data:[^,]*;base64,")
_HTTP_URL = re.compile(r"https?://[^/\s]\S*")
_OTHER_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FILE_URL = re.compile(r"file:(?://(?:localhost)?(?=/))?(.*)", re.DOTALL)

_SLICE_BYTES = 3 << 18
"""Encoded at a time: the event loop gets its turn between two. A multiple of 3, so that base64 has no padding."""


class Image(msgspec.Struct, frozen=True):
    """The bytes of an image, and the type that they say they are."""

    media_type: str
    content: bytes

    def digest(self) -> bytes:
        """BLAKE2b-128 of the bytes."""
        return hashlib.blake2b(self.content, digest_size=16).digest()

    def data_url(self) -> Iterator[bytes]:
        """The image as a JSON string, piece by piece."""
        yield f'"data:{self.media_type};base64,'.encode()
        for start in range(0, len(self.content), _SLICE_BYTES):
            yield binascii.b2a_base64(self.content[start : start + _SLICE_BYTES], newline=False)
        yield b'"'


class Picture:
    """An image in a body by name, and `image` once it is loaded. No struct: the encoder must call its hook for it."""

    __slots__ = ("image", "source")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.image: Image | None = None

    def loaded(self) -> Image:
        """The image, which must be there."""
        assert self.image is not None, "an image is sent before it was read"
        return self.image


def _hook_of(form: Any) -> Any:
    def hook(value: object) -> object:
        if isinstance(value, Picture):
            return form(value)
        raise NotImplementedError(f"JSON has no {type(value).__name__}")

    return hook


without = msgspec.json.Encoder(enc_hook=_hook_of(lambda picture: "")).encode
"""A body as JSON with an empty text for each picture."""

canonical = msgspec.json.Encoder(
    order="deterministic", enc_hook=_hook_of(lambda picture: "digest:" + picture.loaded().digest().hex())
).encode
"""A body as the question it asks: names sorted, pictures by their digests."""


_HOLE = b"\0"
"""A byte that JSON can't hold: where a picture goes."""


def whole(body: Any, end: bytes = b"}") -> bytes:
    """A body as JSON with the content of its pictures, which must be loaded. `end` replaces its last
    brace. Each byte is copied once: a copy of 27 MB holds up every other thread for 10 ms and more.
    """
    pictures: list[Picture] = []

    def leave_a_hole(picture: Picture) -> msgspec.Raw:
        pictures.append(picture)
        return msgspec.Raw(_HOLE)

    first, *texts = msgspec.json.encode(body, enc_hook=_hook_of(leave_a_hole)).split(_HOLE)
    pieces = [first]
    for picture, text in zip(pictures, texts, strict=True):
        pieces += (*picture.loaded().data_url(), text)
    pieces[-1] = pieces[-1][:-1] + end
    return b"".join(pieces)


def image_of(content: bytes) -> Image:
    """The image that these bytes are, by their first ones.

    Raises:
        InputError: they are not an image that the endpoint accepts.
    """
    for media_type, signature in _SIGNATURES.items():
        if signature.match(content):
            return Image(media_type, content)
    raise InputError(f"not a png, jpeg, gif or webp image (begins with {content[:8]!r})" if content else "is empty")


def decoded(url: str, max_bytes: int) -> bytes:
    """The bytes in a data URL.

    Raises:
        InputError: it is not base64, or holds more than `max_bytes`.
    """
    start = _DATA_URL.match(url)
    if start is None:
        raise InputError("the data URL is not in base64")
    size = (len(url) - start.end()) // 4 * 3 - url.count("=", -2)
    if size > max_bytes:
        raise InputError(too_large(size, max_bytes))
    try:
        return binascii.a2b_base64(url[start.end() :], strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character outside ASCII
        raise InputError(f"the data URL is not base64: {error}") from error


def path_in(source: str) -> str:
    """The path that a text says: itself, or what a `file:` URL says (RFC 8089), by which a name may have any bytes."""
    url = _FILE_URL.fullmatch(source)
    return source if url is None else os.fsdecode(unquote_to_bytes(url[1]))


def too_large(size: int, max_bytes: int) -> str:
    """The error for an image of so many bytes."""
    return f"has {size:,} bytes, more than input.max_image_bytes ({max_bytes:,})"


def shown(source: Source) -> str:
    """An image by name: its path, or what it is instead."""
    if isinstance(source, bytes):
        return "an image in bytes"
    if source.startswith("data:"):
        return "a data URL"
    return "".join(
        each if each.isprintable() else repr(each)[1:-1] for each in source[:200]
    )  # a name may have newlines


def sources_in(value: Any, column: str) -> Iterator[Source]:
    """The images that a column's value says: none for a null, all of a list's, a struct of bytes or a path as one.

    Raises:
        InputError: it says something else.
    """
    match value:
        case None:
            return
        case list():
            for item in value:
                yield from sources_in(item, column)
        case str() | bytes():
            yield value
        case {"bytes": bytes() as content}:
            yield content
        case {"path": str() as path} | {"url": str() as path}:
            yield path
        case _:
            raise InputError(f"{column}: expected a path, a URL or bytes of an image (is {value!r:.80})")


def with_images(messages: list[Any], sources: list[Source], detail: str | None) -> list[Any]:
    """The messages with the images behind the content of the last one by the user.

    Raises:
        InputError: no message is by the user.
    """
    place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if place is None:
        raise InputError("request.images: there is no message by the user to put them into")
    content = messages[place].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    more = {} if detail is None else {"detail": detail}
    parts += [{"type": "image_url", "image_url": {"url": source, **more}} for source in sources]
    return [*messages[:place], {**messages[place], "content": parts}, *messages[place + 1 :]]


def with_pictures(messages: list[Any]) -> tuple[list[Any], list[Picture], list[str]]:
    """The messages with a `Picture` in place of each image that must be loaded, the pictures, and every image's detail.

    Raises:
        InputError: an image part is invalid by docs/api.md.
    """
    pictures: list[Picture] = []
    details: list[str] = []
    for place, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        at = [n for n, part in enumerate(content) if isinstance(part, dict) and part.get("type") == "image_url"]
        if not at:
            continue
        if not details:
            messages = list(messages)
        parts = list(content)
        for n in at:
            parts[n] = _with_picture(parts[n], f"messages[{place}].content[{n}].image_url", pictures)
            details.append(parts[n]["image_url"].get("detail", "auto"))
        messages[place] = {**message, "content": parts}
    return messages, pictures, details


def _with_picture(part: dict[str, Any], place: str, pictures: list[Picture]) -> dict[str, Any]:
    """The part; if its image must be loaded, with a `Picture` in it, which is appended to `pictures`."""
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(url, str | bytes):
        raise InputError(f"{place}: expected an object with a url")
    detail = given.get("detail", "auto")
    if not isinstance(detail, str) or detail not in USUAL_TOKENS:
        raise InputError(f"{place}.detail: expected one of {', '.join(USUAL_TOKENS)} (is {detail!r:.80})")
    if isinstance(url, str) and _is_http(url, place):
        return part
    picture = Picture(url)
    pictures.append(picture)
    return {**part, "image_url": {**given, "url": picture}}


def _is_http(url: str, place: str) -> bool:
    """True for an http(s) URL; False for a data URL, a file URL or a path.

    Raises:
        InputError: it is neither, nor anything else that can be sent.
    """
    if url.startswith(("data:", "file:")):
        return False
    if _HTTP_URL.fullmatch(url):
        return True
    if _OTHER_URL.match(url) or not url:
        raise InputError(f"{place}.url: expected an http(s) URL, a data URL or a path (is {url!r:.80})")
    return False
