"""Bytes that were meant to be an input or an answer, and were damaged on their way: no crash, no hang, one line."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError
from batchrun.source import START, find_files, open_source
from tests.crash.test_network_faults import row_of, run
from tests.endings import answer_body
from tests.fault_server import Exchange, answer, chunked, serving_moved

ROWS = [
    {"id": row, "text": "word ü" * (row % 9), "tags": ["a", "b"][: row % 3], "more": {"x": row / 2, "y": None}}
    for row in range(60)
]


def damaged(whole: bytes, chance: Random) -> bytes:
    """The bytes with one to five flips, cuts, insertions and repetitions, most of them near one of the ends."""
    damage = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 5))):
        near = min(len(damage), chance.choice((len(damage), 600, 100)))
        offset = chance.randrange(max(1, near))
        at = offset if chance.random() < 0.5 else max(0, len(damage) - 1 - offset)
        match chance.randrange(4):
            case 0 if damage:
                damage[at] ^= 1 << chance.randrange(8)
            case 1:
                del damage[at : at + chance.randrange(1, 60)]
            case 2:
                damage[at:at] = chance.randbytes(chance.randrange(1, 20))
            case _:
                damage[at:at] = damage[at : at + chance.randrange(1, 200)]
    return bytes(damage)


def parquet(path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=20)
    return path.read_bytes()


def jsonl(path: Path) -> bytes:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    return path.read_bytes()


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "files"), [(parquet, 400), (jsonl, 1_000)], ids=["Parquet", "JSONL"])
def test_a_damaged_input_is_one_line_or_read(tmp_path: Path, kind: Callable[[Path], bytes], files: int) -> None:
    whole, path = kind(tmp_path / "whole"), tmp_path / "damaged"
    noticed = 0
    for seed in range(files):
        path.write_bytes(damaged(whole, Random(seed)))
        problems = problems_of(path)
        assert not [problem for problem in problems if "\n" in problem], seed
        noticed += bool(problems)
    assert 0 < noticed < files


def problems_of(path: Path) -> list[str]:
    """What is said of the records that can't be used, or of the file; the others have been read."""
    try:
        source = open_source(find_files(str(path)))
        bad = {record.ordinal: record.problem for record in source.records() if record.problem is not None}
        for window in source.windows(START, 20, 1 << 20, bad):
            assert window.table.num_rows <= 20
    except InputError as error:
        return [str(error)]
    return list(bad.values())


@pytest.mark.heavy
def test_damaged_answers_fail_only_their_rows(tmp_path: Path) -> None:
    answered = 0

    async def damages_two_of_three(exchange: Exchange) -> None:
        nonlocal answered
        row = row_of(exchange)
        body = answer_body(f"answer {row}")
        whole = answer(body, "X-Request-Id: r") if row % 2 else chunked(body[:40], body[40:])
        spoiled = row % 3 > 0
        answered += not spoiled
        await exchange.send(damaged(whole, Random(len(server.exchanges))) if spoiled else whole)
        if spoiled:
            await asyncio.sleep(0.5)
            exchange.writer.close()

    with serving_moved(damages_two_of_three) as server:
        # a sound row may meet a connection that a spoiled one has just lost, more than once
        retry = {"backoff_base_s": 0.1, "max_outage_s": 1e6, "max_maybe_billed": 4}
        reported = run(tmp_path, server, 300, retry=retry)
    assert reported.exit_code in (0, 3)
    assert [row["status"] for row in reported.rows[::3]] == ["ok"] * 100
    assert {row["status"] for row in reported.rows} <= {"ok", "truncated", "filtered", "empty", "error"}
    assert max(row["attempts"] for row in reported.rows) <= 6 + 3
    assert answered >= 100
