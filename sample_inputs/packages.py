"""What the five Debian packages hold, as rows: change-log entries, functions, passages of novels, icons."""

import ast
import gzip
import hashlib
import re
import struct
import textwrap
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

# Where the packages put what is read here, relative to the folder they were unpacked into.
STDLIB = Path("usr/lib/python3.11")
NEWS = Path("usr/share/doc/python3.11/NEWS.gz")
NOVELS = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
ICONS = Path("usr/share/icons/Tango/32x32")
LICENSES = {
    "python.txt": STDLIB / "LICENSE.txt",
    "janeaustenr.txt": Path("usr/share/doc/r-cran-janeaustenr/copyright"),
    "tango-icon-theme.txt": Path("usr/share/doc/tango-icon-theme/copyright"),
}


class Change(msgspec.Struct, frozen=True):
    """One entry of Python's change log; `section` is where its authors filed it, a label to compare with."""

    change_id: str
    release: str
    section: str
    text: str


class Function(msgspec.Struct, frozen=True):
    """One function or method of the standard library, dedented, decorators included."""

    function_id: str
    module: str
    name: str
    lines: int
    source: str


class Passage(msgspec.Struct, frozen=True):
    """Whole consecutive paragraphs of one chapter; `chapter` and `position` count from 1."""

    passage_id: str
    book: str
    author: str
    chapter: int
    position: int
    words: int
    text: str


class Picture(msgspec.Struct, frozen=True):
    """A 32 x 32 PNG; `image` is its file's name."""

    picture_id: str
    title: str
    image: str


# --- selection: deterministic, without a random generator whose sequence could change between versions


def shuffled(items: Sequence[T], identity: Callable[[T], str]) -> list[T]:
    """The items in an order that depends on their identities only."""
    return sorted(items, key=lambda item: hashlib.blake2b(identity(item).encode()).digest())


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def headed(text: str, heading: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Each heading's one group with the text up to the next heading; what precedes the first is left out."""
    parts = heading.split(text)
    return zip(parts[1::2], parts[2::2], strict=True)


# --- changes

RELEASE = re.compile(r"^What's New in Python (.+)\?\n=+$", re.M)
SECTION = re.compile(r"^(\S.*)\n-{4,}$", re.M)
ENTRY = re.compile(r"^- (gh|bpo)(?:-issue)?-(\d+): (.+?)(?=^- |\Z)", re.M | re.S)
PEP = re.compile(r":pep:`(\d+)`")
ROLE = re.compile(r":[a-z:]+:`[~!]?([^`<]+?)(?: ?<[^>]+>)?`")  # :func:`~os.fspath`, :ref:`title <label>`


def changes(packages: Path, series: str = "3.11", count: int = 400) -> list[Change]:
    """`count` entries of the releases of one series, every section with an equal share as far as it reaches.

    Shuffled, so that the first rows, which a pilot run takes, are of many kinds.
    """
    news = gzip.decompress((packages / NEWS).read_bytes()).decode()
    by_section: defaultdict[str, list[Change]] = defaultdict(list)
    seen: set[str] = set()
    for release, body in headed(news, RELEASE):
        if not release.startswith(series):
            continue
        for section, entries in headed(body, SECTION):
            for change in entries_of(release.removesuffix(" final"), section, entries):
                if change.change_id not in seen:  # one issue may have several entries; an id must have one
                    seen.add(change.change_id)
                    by_section[section].append(change)
    chosen: list[Change] = []
    smallest_first = sorted(by_section.values(), key=len)
    for left, section_changes in zip(range(len(smallest_first), 0, -1), smallest_first, strict=True):
        chosen += spread(section_changes, (count - len(chosen)) // left)
    return shuffled(chosen, lambda change: change.change_id)


def entries_of(release: str, section: str, entries: str) -> Iterator[Change]:
    """The entries of 8 to 80 words, as one line each, Sphinx roles shown as plain code."""
    for tracker, number, text in ENTRY.findall(entries):
        line = ROLE.sub(r"`\1`", PEP.sub(r"PEP \1", " ".join(text.split()))).replace("``", "`")
        if 8 <= len(line.split()) <= 80:
            yield Change(f"{tracker}-{number}", release, section, line)


# --- functions

PER_MODULE = 4
NOT_LIBRARY = {"test", "idlelib", "lib2to3", "distutils", "encodings", "pydoc_data", "turtledemo", "ensurepip"}


def functions(packages: Path, count: int = 250) -> list[Function]:
    """`count` public functions of 5 to 60 lines that do something, at most `PER_MODULE` of a module, ordered by id.

    Modules that carry a copyright or licence notice of their own are left out: what remains is under the PSF
    licence alone.
    """
    stdlib = packages / STDLIB
    chosen: list[Function] = []
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        private = any(part.startswith("_") and part != "__init__" for part in parts)
        if private or parts[0] in NOT_LIBRARY or re.search("copyright|licen[cs]e", text, re.I):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        found = shuffled(list(functions_of(module, text)), lambda function: function.function_id)
        chosen += islice(found, PER_MODULE)
    return sorted(shuffled(chosen, lambda f: f.function_id)[:count], key=lambda f: f.function_id)


def functions_of(module: str, text: str) -> Iterator[Function]:
    """The public functions of a module and methods of its public classes that are worth explaining, each name once."""
    tree = ast.parse(text)
    owners: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    owners += [(f"{node.name}.", node.body) for node in tree.body if isinstance(node, ast.ClassDef)]
    lines = text.splitlines()
    found: dict[str, Function] = {}  # overloads and conditional definitions share a name
    for owner, body in owners:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                name = owner + node.name
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
                if worth_explaining(name, node, source):
                    found.setdefault(name, Function(f"{module}.{name}", module, name, source.count("\n") + 1, source))
    return iter(found.values())


def worth_explaining(name: str, node: ast.AST, source: str) -> bool:
    """Public, of readable length, with at least four statements, and able to stand alone."""
    public = not any(part.startswith("_") for part in name.split("."))
    statements = sum(isinstance(inner, ast.stmt) and not is_docstring(inner) for inner in ast.walk(node)) - 1
    # A string that reaches the left margin keeps dedent() from dedenting the code around it.
    return public and 5 <= source.count("\n") + 1 <= 60 and statements >= 4 and not source.startswith(" ")


def is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


# --- passages

CHAPTER = re.compile(r"^(?:chapter) ([ivxl]+|\d+)$", re.M | re.I)
CHAPTER_END = re.compile(r"^(?:VOLUME [IVX]+|FINIS|THE END|A NOTE ON THE TEXT)$", re.M | re.I)


def novels(lazy_load: bytes) -> Iterator[list[str]]:
    """The lines of each novel in an R lazy-load file.

    Such a file is a row of blocks, 4 bytes of big-endian plain size before a zlib stream; a block is one value in
    R's XDR serialization (R Internals, section 1.8): "X\\n", three int32 versions, the encoding's length and name,
    then here a character vector (int32 flags, int32 length) of strings (int32 flags, int32 length, bytes).
    """
    while lazy_load:
        inflate = zlib.decompressobj()
        value = inflate.decompress(lazy_load[4:])
        lazy_load = inflate.unused_data
        at = 18 + int.from_bytes(value[14:18], "big")
        (count,) = struct.unpack_from(">4xi", value, at)
        at += 8
        lines = []
        for _ in range(count):
            (size,) = struct.unpack_from(">4xi", value, at)
            lines.append(value[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield lines


def passages(packages: Path, count: int = 200) -> list[Passage]:
    """`count` passages of 80 to 250 words, spread evenly over all chapters of all novels."""
    found: list[Passage] = []
    for lines in novels((packages / NOVELS).read_bytes()):
        book = lines[0].title().replace(" And ", " and ")
        slug = book.lower().replace(" ", "-")
        for chapter, (_, body) in enumerate(headed("\n".join(lines[1:]), CHAPTER), 1):
            for position, text in enumerate(passages_of(CHAPTER_END.split(body)[0]), 1):
                passage_id = f"{slug}-{chapter:02}-{position:02}"
                words = len(text.split())
                found.append(Passage(passage_id, book, "Jane Austen", chapter, position, words, text))
    return spread([passage for passage in found if 80 <= passage.words <= 250], count)


def passages_of(chapter: str) -> Iterator[str]:
    """The chapter's paragraphs, each unwrapped to one line, gathered until a passage has 80 words."""
    gathered: list[str] = []
    for block in re.split(r"\n\s*\n", chapter):
        gathered += [" ".join(block.split())] if block.strip() else []
        if len(" ".join(gathered).split()) >= 80:
            yield "\n\n".join(gathered)
            gathered = []


# --- pictures

PICTURES = (
    "apps/accessories-calculator",
    "apps/internet-web-browser",
    "apps/office-calendar",
    "apps/utilities-terminal",
    "actions/edit-cut",
    "actions/edit-find",
    "actions/media-playback-start",
    "actions/system-lock-screen",
    "devices/battery",
    "devices/camera-photo",
    "devices/input-gaming",
    "devices/printer",
    "emotes/face-monkey",
    "emotes/face-smile",
    "places/folder",
    "places/user-trash",
    "status/audio-volume-muted",
    "status/weather-clear-night",
    "status/weather-snow",
    "status/weather-storm",
)


def pictures(packages: Path) -> list[Picture]:
    """The named icons, titled as the icon theme names them. Their files are in `packages / ICONS`."""
    return [Picture(name, name.replace("-", " ").capitalize(), f"{name}.png") for name in PICTURES]
