"""Parses URLs of object stores. PURE."""

import re
from urllib.parse import parse_qsl

import msgspec

from batchrun.errors import JobError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)  # two letters or more: "c:/x" is a path
_QUERY = re.compile(r"\?((?:[a-z_]+=[^&?#]*)(?:&[a-z_]+=[^&?#]*)*)$")
_WITH_SECRET = re.compile(r"[^/@]*:[^/@]*@")

OPTIONS = frozenset({"endpoint_override", "scheme", "region", "anonymous"})
"""The options that may follow the `?` of a URL."""

SAME = {"gcs": "gs", "s3a": "s3", "s3n": "s3", "abfss": "abfs", "adl": "abfs", "az": "abfs", "azure": "abfs"}
"""Other names of a scheme. Azure is reached over TLS under each of them."""


class Url(msgspec.Struct, frozen=True):
    """`scheme` as it is written and `path` without it: "bucket/folder/name", or "container@account/name" in Azure.

    `options` are those of the query. `str` gives the URL without them.
    """

    scheme: str
    path: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    @property
    def kind(self) -> str:
        """The scheme under its usual name: "s3", "gs", "abfs", "hf" …"""
        return SAME.get(self.scheme.lower(), self.scheme.lower())

    def at(self, path: str) -> "Url":
        """The URL of another path in the same store."""
        return msgspec.structs.replace(self, path=path)

    def child(self, name: str) -> "Url":
        """The URL of something below this one."""
        return self.at(f"{self.path.rstrip('/')}/{name}")


def is_url(text: str) -> bool:
    """True for "s3://bucket/name" and any other URL, False for a path."""
    return _URL.fullmatch(text) is not None


def parse(text: str, setting: str = "") -> Url:
    """The URL that `text` is. `setting` names its place in an error.

    Raises:
        JobError: it holds a secret, has an unknown option, or names no bucket.
    """
    match = _URL.fullmatch(text)
    place = f"{setting}: " if setting else ""
    if match is None:
        raise JobError(f"{place}{text!r} is not a URL such as s3://bucket/folder")
    scheme, rest = match.groups()
    if _WITH_SECRET.match(rest):
        raise JobError(f"{place}the URL of {scheme}://… holds a secret; give it in the environment (docs/storage.md)")
    options: tuple[tuple[str, str], ...] = ()
    if (query := _QUERY.search(rest)) is not None and (found := parse_qsl(query[1], keep_blank_values=True)):
        if unknown := sorted({name for name, _ in found} - OPTIONS):
            raise JobError(f"{place}{unknown[0]} in the URL is unknown; expected one of {', '.join(sorted(OPTIONS))}")
        rest, options = rest[: query.start()], tuple(found)
    if not rest.strip("/") or rest.startswith("/"):
        raise JobError(f"{place}{scheme}://{rest} names no bucket; expected {scheme}://bucket/name")
    return Url(scheme, rest, options)


_GLOB = re.compile(r"[*?\[]")


def fixed_part(pattern: str) -> str:
    """The folder that every match of the pattern is in: "bucket/a" for "bucket/a/x*/y"."""
    found = _GLOB.search(pattern)
    return pattern if found is None else pattern[: found.start()].rpartition("/")[0]


def is_pattern(path: str) -> bool:
    """True if the path holds `*`, `?` or `[`."""
    return _GLOB.search(path) is not None


def glob_expression(pattern: str) -> "re.Pattern[str]":
    """A glob as a regular expression: `*` and `?` stay within a name, `**` matches any folders."""
    out, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            out, at = out + "(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif pattern[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = out + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", r"\\")
            out, at = out + f"[{'^' + inside[1:] if inside[0] == '!' else inside}]", end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return re.compile(out, re.DOTALL)
