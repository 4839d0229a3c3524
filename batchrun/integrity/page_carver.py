"""Records of a damaged SQLite database, taken from its pages one by one. PURE.

SQLite gives up a whole tree for one wrong page, and every commit behind one wrong frame of the log. Each of our records
ends with a CRC, so none needs its tree: whatever looks like a cell is tried, and believed by its CRC alone. Pages that
are free by now, or were written again later, are read as well: what they hold was true once.
(sqlite.org, "Database File Format", sections 1.6 and 2.1, and "WAL-mode File Format")
"""

import re
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from batchrun.store.database import Field, Record, crc_of
from batchrun.store.wal import PAGE_BYTES

FIRST_PAGE_HEADER_BYTES = 100
LOG_HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
MAX_AGE = sys.maxsize
MAX_CELLS = (PAGE_BYTES - 8) // 4  # two bytes of pointer, two of the smallest cell

_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # serial types


class Table(msgspec.Struct, frozen=True):
    """What a cell must fit to be a record of this table. `keyed`: its first field is the cell's own key.

    `stored` are the fields in the order in which a cell has them: those of an index's primary key first.
    """

    name: str
    fields: int
    reals: tuple[int, ...]
    keyed: bool
    in_index: bool
    stored: tuple[int, ...]


class Kind(NamedTuple):
    """A kind of page that holds records: its first byte, the bytes before its pointers, those before a cell's size."""

    first_byte: int
    header_bytes: int
    child_bytes: int
    in_index: bool


KINDS = (Kind(0x0D, 8, 0, in_index=False), Kind(0x0A, 8, 0, in_index=True), Kind(0x02, 12, 4, in_index=True))


class Image(msgspec.Struct, frozen=True):
    """A page as it was written once; later images of a page have higher `age`s."""

    number: int
    age: int
    content: bytes


def tables_of(statements: str) -> list[Table]:
    """The tables that the CREATE statements make."""
    found = re.findall(r"CREATE TABLE (\w+) \((.*?)\)( WITHOUT ROWID)?;", statements, re.DOTALL)
    return [_table(name, columns, bool(without_rowid)) for name, columns, without_rowid in found]


def _table(name: str, columns: str, in_index: bool) -> Table:
    columns, _, key = columns.partition("PRIMARY KEY (")
    declared = [column.split() for column in columns.split(",") if column.strip()]
    names = [column[0] for column in declared]
    first = [names.index(name.strip()) for name in key.rstrip(")").split(",") if name.strip()] if in_index else []
    return Table(
        name=name,
        fields=len(declared),
        reals=tuple(place for place, column in enumerate(declared) if column[1] == "REAL"),
        keyed=declared[0][1:] == ["INTEGER", "PRIMARY", "KEY"] and not in_index,
        in_index=in_index,
        stored=(*first, *(place for place in range(len(names)) if place not in first)),
    )


def carve(database: bytes, log: bytes, statements: str) -> Iterator[tuple[str, Record]]:
    """Every intact record as (table, fields before the CRC), those of older page images first; equal ones once.

    A record whose shape fits two tables is given for both.
    """
    images = _images(database, log)
    by_number: dict[int, list[Image]] = {}
    for image in images:
        by_number.setdefault(image.number, []).append(image)
    tables = tables_of(statements)
    seen: set[tuple[int, bytes]] = set()  # most of a page is in its next image again
    for image in images:
        for kind in _kinds(image):
            of_kind = [table for table in tables if table.in_index == kind.in_index]
            for cell in _cells(image, kind):
                for payload in _payloads(image, kind, cell, by_number):
                    if payload not in seen:
                        seen.add(payload)
                        yield from _records(*payload, of_kind)


def _images(database: bytes, log: bytes) -> list[Image]:
    pages = range(0, len(database), PAGE_BYTES)
    found = [Image(place // PAGE_BYTES + 1, 0, database[place : place + PAGE_BYTES]) for place in pages]
    for age, start in enumerate(range(LOG_HEADER_BYTES, len(log), FRAME_HEADER_BYTES + PAGE_BYTES), start=1):
        content = start + FRAME_HEADER_BYTES
        number = int.from_bytes(log[start : start + 4], "big")
        found.append(Image(number, age, log[content : content + PAGE_BYTES]))
    return found


def _kinds(image: Image) -> list[Kind]:
    """What the page's first byte says, or could have said before one of its bits was flipped."""
    header = FIRST_PAGE_HEADER_BYTES if image.number == 1 else 0
    first = int.from_bytes(image.content[header : header + 1], "big")
    return [kind for kind in KINDS if kind.first_byte == first] or [
        kind for kind in KINDS if (kind.first_byte ^ first).bit_count() == 1
    ]


def _cells(image: Image, kind: Kind) -> Iterator[int]:
    """Where cells may begin: as many pointers as the header says, and as many as there is room for before a cell."""
    header = FIRST_PAGE_HEADER_BYTES if image.number == 1 else 0
    pointers = header + kind.header_bytes
    count = int.from_bytes(image.content[header + 3 : header + 5], "big")
    nearest = len(image.content)
    for place in range(pointers, pointers + 2 * MAX_CELLS, 2):
        if place + 2 > nearest and place >= pointers + 2 * count:
            return
        cell = int.from_bytes(image.content[place : place + 2], "big")
        if place < cell < len(image.content):
            nearest = min(nearest, cell)
            yield cell + kind.child_bytes


def _payloads(image: Image, kind: Kind, place: int, by_number: dict[int, list[Image]]) -> Iterator[tuple[int, bytes]]:
    """The key (0 in an index) and content of what may be a cell. Where it goes on in overflow pages, it is given twice:
    with those as they are last, and as they were when the cell's page was written.
    """
    try:
        size, at = _varint(image.content, place)
        key, at = (0, at) if kind.in_index else _varint(image.content, at)
    except IndexError:
        return
    local = _local_bytes(size, kind)
    begin, follow = image.content[at : at + local], image.content[at + local : at + local + 4]
    if len(begin) < local or size > len(by_number) * PAGE_BYTES:
        return
    if local == size:
        yield key, begin
        return
    for age in (MAX_AGE, image.age):
        rest = _overflow(follow, size - local, by_number, age)
        if rest is not None:
            yield key, begin + rest


def _local_bytes(size: int, kind: Kind) -> int:
    """How much of a payload is in the cell itself."""
    most = (PAGE_BYTES - 12) * 64 // 255 - 23 if kind.in_index else PAGE_BYTES - 35
    if size <= most:
        return size
    least = (PAGE_BYTES - 12) * 32 // 255 - 23
    wanted = least + (size - least) % (PAGE_BYTES - 4)
    return wanted if wanted <= most else least


def _overflow(follow: bytes, size: int, by_number: dict[int, list[Image]], age: int) -> bytes | None:
    """The rest of a payload in a chain of pages, none younger than `age`; None where the chain breaks."""
    parts: list[bytes] = []
    while size > 0:
        versions = by_number.get(int.from_bytes(follow, "big"), [])
        page = next((page for page in reversed(versions) if page.age <= age), None)
        if page is None:
            return None
        follow = page.content[:4]
        parts.append(page.content[4 : 4 + size])
        size -= PAGE_BYTES - 4
    return b"".join(parts)


def _records(key: int, payload: bytes, tables: Sequence[Table]) -> Iterator[tuple[str, Record]]:
    try:
        values = _values(payload)
    except (IndexError, ValueError, struct.error):
        return
    for table in tables:
        if len(values) != table.fields:
            continue
        fields = [value for _, value in sorted(zip(table.stored, values, strict=True), key=lambda pair: pair[0])]
        for place in table.reals:  # SQLite stores a whole number as an integer
            fields[place] = float(value) if isinstance(value := fields[place], int) else value
        if table.keyed:
            fields[0] = key
        if fields[-1] == crc_of(tuple(fields[:-1])):
            yield table.name, tuple(fields[:-1])


def _values(payload: bytes) -> list[Field]:
    header_bytes, at = _varint(payload, 0)
    if not 0 < header_bytes <= len(payload):
        raise ValueError("no record")
    body, values = header_bytes, list[Field]()
    while at < header_bytes:
        kind, at = _varint(payload, at)
        value, body = _value(payload, body, kind)
        values.append(value)
    return values


def _value(payload: bytes, at: int, kind: int) -> tuple[Field, int]:
    if kind in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[kind], at
    if kind == 7:
        return struct.unpack_from(">d", payload, at)[0], at + 8
    size = _INTEGER_BYTES[kind] if kind in _INTEGER_BYTES else (kind - 12) // 2
    content = payload[at : at + size]
    if len(content) < size or kind in (10, 11):
        raise ValueError("no value")
    if kind in _INTEGER_BYTES:
        return int.from_bytes(content, "big", signed=True), at + size
    return (content.decode() if kind % 2 else content), at + size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The integer at `at`, and where it ends: seven bits a byte, at most nine bytes, the ninth whole."""
    value = 0
    for place in range(at, at + 8):
        byte = content[place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, place + 1
    return value << 8 | content[at + 8], at + 9
