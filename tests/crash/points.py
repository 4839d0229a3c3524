"""The marked points: places in the product where a kill shows most. The product itself knows nothing of them.

Each point wraps one real function in the process that is to be killed. A function that is not there any more ends that
process with an AttributeError, and a point that is never passed fails the tests: the marks can't rot in silence.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Any

Matches = Callable[[tuple[Any, ...]], bool]


class Side(StrEnum):
    BEFORE = "before"
    AFTER = "after"


class Phase(StrEnum):
    """Which part of a run passes the point: asking comes before finishing, so kills are planned in this order.

    Reopening is what `--retry-failed` does to a finished run.
    """

    REOPENING = "reopening"
    STARTING = "starting"
    ASKING = "asking"
    FINISHING = "finishing"


@dataclass(frozen=True, slots=True)
class Point:
    """`where` is `module:attribute` of the wrapped function; `often` how many times a whole run passes, about."""

    name: str
    where: str
    side: Side
    matches: Matches
    phase: Phase
    often: int


def _any(arguments: tuple[Any, ...]) -> bool:
    return True


def _target(pattern: str) -> Matches:
    """A rename whose new name matches."""
    return lambda arguments: re.search(pattern, str(arguments[1])) is not None


def _first(pattern: str) -> Matches:
    """A call whose first argument, a path, matches."""
    return lambda arguments: re.search(pattern, str(arguments[0])) is not None


def _statement(word: str) -> Matches:
    """A query of the database's thread that begins with the word."""
    return lambda arguments: str(arguments[1]).startswith(word)


def _table(name: str) -> Matches:
    """Records for the table."""
    return lambda arguments: arguments[1] == name and bool(arguments[2])


def _writes(pattern: str) -> Matches:
    """A Parquet writer whose file matches."""
    return lambda arguments: re.search(pattern, _name_of(arguments[0].where.fileno())) is not None


def _name_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _fact(name: str) -> Matches:
    """A manifest entry."""
    return lambda arguments: name in arguments[1]


_PART = r"/parts/\d+\.g\d+\.parquet"
_INPUT = r"/parts/\d+\.input\.arrow"
_RESULT = r"/completions(\.parquet|\.tmp/part-\d+\.parquet|)$"

_CHECKPOINT = "batchrun.store.checkpoint:Checkpoint"
_INSERT = "batchrun.store.database:Database.insert"
_QUERY = "batchrun.store.database:Database.query"
_B, _A = Side.BEFORE, Side.AFTER


def _points() -> tuple[Point, ...]:
    reopening, starting, asking, finishing = Phase
    return (
        Point("before the reopening is on record", f"{_CHECKPOINT}.reopen_chunks", _B, _any, reopening, 1),
        Point("after the reopening is on record", f"{_CHECKPOINT}.reopen_chunks", _A, _any, reopening, 1),
        Point("before the manifest is on record", f"{_CHECKPOINT}.write_manifest", _B, _fact("manifest"), starting, 1),
        Point("after the manifest is on record", f"{_CHECKPOINT}.write_manifest", _A, _fact("manifest"), starting, 1),
        Point("before the invocation is on record", f"{_CHECKPOINT}.start_invocation", _B, _any, starting, 1),
        Point("before the lost are named", f"{_CHECKPOINT}.add_possibly_billed", _B, _any, starting, 1),
        Point("after the lost are named", f"{_CHECKPOINT}.add_possibly_billed", _A, _any, starting, 1),
        Point("after the slots are emptied", "batchrun.store.in_flight:InFlightFile.__init__", _A, _any, starting, 1),
        Point("before the slot is taken", "batchrun.store.in_flight:InFlightFile.occupy", _B, _any, asking, 300),
        Point("after the slot is taken", "batchrun.store.in_flight:InFlightFile.occupy", _A, _any, asking, 300),
        Point("between answer and put", f"{_CHECKPOINT}.put", _B, _any, asking, 300),
        Point("after the put", f"{_CHECKPOINT}.put", _A, _any, asking, 300),
        Point("before BEGIN", _QUERY, _B, _statement("BEGIN"), asking, 50),
        Point("after BEGIN", _QUERY, _A, _statement("BEGIN"), asking, 50),
        Point("before a commit's rows", _INSERT, _B, _table("rows"), asking, 100),
        Point("after a commit's rows", _INSERT, _A, _table("rows"), asking, 100),
        Point("before COMMIT", _QUERY, _B, _statement("COMMIT"), asking, 50),
        Point("after COMMIT", _QUERY, _A, _statement("COMMIT"), asking, 50),
        Point("between commit and free slot", "batchrun.store.in_flight:InFlightFile.clear", _B, _any, asking, 300),
        Point("mid input of a chunk", "pyarrow.ipc:RecordBatchFileWriter.write_batch", _A, _any, asking, 80),
        Point("before the input's rename", "os:rename", _B, _target(_INPUT), asking, 20),
        Point("after the input's rename", "os:rename", _A, _target(_INPUT), asking, 20),
        Point("before the chunk is on record", f"{_CHECKPOINT}.open_chunk", _B, _any, asking, 20),
        Point("after the chunk is on record", f"{_CHECKPOINT}.open_chunk", _A, _any, asking, 20),
        Point("mid part", "pyarrow.parquet:ParquetWriter.write_table", _A, _writes(_PART), asking, 80),
        Point("before the part's rename", "os:rename", _B, _target(_PART + "$"), asking, 20),
        Point("after the part's rename", "os:rename", _A, _target(_PART + "$"), asking, 20),
        Point("between part and seal", f"{_CHECKPOINT}.seal_chunk", _B, _any, asking, 20),
        Point("mid seal", _QUERY, _A, _statement("DELETE FROM rows"), asking, 20),
        Point("after the seal", f"{_CHECKPOINT}.seal_chunk", _A, _any, asking, 20),
        Point("mid result", "pyarrow.parquet:ParquetWriter.write_table", _A, _writes("/completions"), finishing, 20),
        Point("before the result's rename", "os:rename", _B, _target(_RESULT), finishing, 1),
        Point("after the result's rename", "os:rename", _A, _target(_RESULT), finishing, 1),
        Point("before the usage table's rename", "os:rename", _B, _target("/usage.parquet$"), finishing, 1),
        Point("between result and finished", f"{_CHECKPOINT}.write_manifest", _B, _fact("finished"), finishing, 1),
        Point("after finished", f"{_CHECKPOINT}.write_manifest", _A, _fact("finished"), finishing, 1),
        Point("after the database rests", "batchrun.store.database:Database.leave_wal", _A, _any, finishing, 1),
        Point("before a part is removed", "pathlib:Path.unlink", _B, _first(_PART + "$"), finishing, 20),
        Point("before the last summary", "batchrun.dispatch.run_status:RunStatus.end", _B, _any, finishing, 1),
        Point("after the last summary", "batchrun.dispatch.run_status:RunStatus.end", _A, _any, finishing, 1),
    )


POINTS = {point.name: point for point in _points()}
"""All marked points by name, in the order in which a run passes them first."""


FIRST_ROUND = {name: point for name, point in POINTS.items() if point.phase is not Phase.REOPENING}
"""Those that a run passes without `--retry-failed`."""


def mark(point: Point, passed: Callable[[str], None]) -> None:
    """From now on `passed` is called with the point's name whenever this process passes it."""
    module, _, path = point.where.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    @wraps(real)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        mine = point.matches(arguments)
        if mine and point.side is Side.BEFORE:
            passed(point.name)
        result = real(*arguments, **options)
        if mine and point.side is Side.AFTER:
            passed(point.name)
        return result

    setattr(owner, name, wrapped)
