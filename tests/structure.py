"""The kinds of places that a run directory's files consist of, so that damage meets each kind and not only the largest.

Sources: parquet.apache.org ("File Format"), sqlite.org ("Database File Format", "WAL-mode File Format"),
arrow.apache.org ("IPC File Format").
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from batchrun.store.in_flight import SLOT_BYTES

Place = tuple[Path, range]
"""A range of bytes in a file, all of one kind."""

PAGE_HEADER_BYTES = 20  # at least: Thrift's variable lengths
PAGE_BYTES = 4096  # SQLite's default
FRAME_HEADER_BYTES = 24


def by_kind(files: Iterable[Path]) -> dict[str, list[Place]]:
    """Where each kind of place is in these files."""
    found: dict[str, list[Place]] = {}
    for path in files:
        for what, place in _places(path):
            found.setdefault(f"{what} of *{path.suffix}", []).append((path, place))
    return found


def chosen(files: Iterable[Path], chance: random.Random, count: int) -> list[tuple[Path, int]]:
    """So many bytes, each of another kind until every kind had one."""
    kinds = list(by_kind(files).values())
    chance.shuffle(kinds)
    picked = [chance.choice(kinds[number % len(kinds)]) for number in range(count)]
    return [(path, chance.choice(place)) for path, place in picked]


def _places(path: Path) -> Iterator[tuple[str, range]]:
    size = path.stat().st_size
    match path.suffix:
        case _ if not size:
            return
        case ".parquet":
            yield from _of_parquet(path, size)
        case ".arrow":
            yield "the magic", range(8)
            yield "the schema and batches", range(8, size - 256)
            yield "the footer", range(size - 256, size)
        case ".db":
            yield "the header", range(100)
            for start in range(0, size, PAGE_BYTES):
                first = start + 100 if start == 0 else start
                yield "a page's header", range(first, first + 8)
                yield "a page's content", range(first + 8, start + PAGE_BYTES)
        case ".db-wal":
            yield "the header", range(32)
            for start in range(32, size - PAGE_BYTES, FRAME_HEADER_BYTES + PAGE_BYTES):
                yield "a frame's header", range(start, start + FRAME_HEADER_BYTES)
                yield "a frame's page", range(start + FRAME_HEADER_BYTES, start + FRAME_HEADER_BYTES + PAGE_BYTES)
        case ".bin":
            content = path.read_bytes()
            for start in range(0, size - SLOT_BYTES + 1, SLOT_BYTES):
                slot = range(start, start + SLOT_BYTES)
                yield "a slot in use" if any(content[start : slot.stop]) else "an empty slot", slot
        case _:
            yield "the text", range(size)


def _of_parquet(path: Path, size: int) -> Iterator[tuple[str, range]]:
    metadata = pq.read_metadata(path)
    yield "the magic", range(4)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            end: int = start + column.total_compressed_size
            yield "a page's header", range(start, min(start + PAGE_HEADER_BYTES, end))
            yield "a column's last bytes", range(max(start, end - 4), end)
            yield "a column", range(start, end)
    footer = size - 8 - int.from_bytes(path.read_bytes()[size - 8 : size - 4], "little")
    yield "the footer", range(footer, size - 8)
    yield "the footer's length and the magic", range(size - 8, size)
