"""Small jobs and inputs for tests that need no endpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from batchrun.job.job import Job
from batchrun.job.load import from_tables
from tests.endings import MODEL


def job_over(path: Path | str | None, **tables: Mapping[str, Any]) -> Job:
    """A job that asks about the column `text` of the input at `path`; `tables` are laid over its own."""
    whole: dict[str, dict[str, Any]] = {
        "endpoint": {"url": "simulator"},
        "input": {} if path is None else {"path": str(path)},
        "request": {"model": MODEL, "prompt": "About {{ text }}", "max_tokens": 16},
    }
    for name, table in tables.items():
        whole[name] = {**whole.get(name, {}), **table}
    return from_tables(whole)


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """The rows as JSON lines."""
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return path


def texts(count: int, first: int = 0) -> list[dict[str, object]]:
    """Rows with an id and a text."""
    return [{"id": f"r{number}", "text": f"text {number}"} for number in range(first, first + count)]
