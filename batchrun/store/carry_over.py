"""Where rows get the answers that they take without a request: earlier results, and equal rows of this run."""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from batchrun.errors import InputError
from batchrun.store import origins
from batchrun.store.origins import OldFile, Origins
from batchrun.tables.carried import carried, with_source
from batchrun.tables.old_answers import OldAnswers
from batchrun.tables.rows import OWN_COLUMNS

OPEN_FILES = 8
"""Earlier results that are kept open, each at the place where it was read last."""

BLOCK_ROWS = 8192


class Taken(NamedTuple):
    """Where a row's answer is: in row `row` of an earlier result's `file`, or else in row `original` of this run.

    -1: not there. A copy of a row that takes an earlier answer has all three.
    """

    original: int
    file: int = -1
    row: int = -1

    @property
    def of_this_run(self) -> bool:
        """True if the answer is that of another row of this run."""
        return self.file < 0


class CarryOver:
    """The answers of one run's rows. `made` says what the origins file holds; None: every row is sent.

    Answers are fetched by one thread at a time.
    """

    def __init__(self, made: Origins | None, path: Path, *, variant: int = 0, model: str = "") -> None:
        """`variant` numbers the job's present settings; `model` is the requested one where the input names one only."""
        self._made = made
        self._path = path
        self._variant = variant
        self._model = model
        self._open: OrderedDict[int, OldAnswers] = OrderedDict()

    def window(self, first_row: int, end_row: int) -> dict[int, Taken]:
        """Of these rows, those that are not sent."""
        if self._made is None or self._made.digest is None:
            return {}
        taken: dict[int, Taken] = {}
        numbers = self._numbers(first_row, end_row)
        for row, origin in enumerate(numbers, first_row):
            if (found := origins.place(origin)) is not None:
                taken[row] = Taken(-1, *found)
            elif (original := origins.original(origin)) is not None:
                inside = original >= first_row
                of = numbers[original - first_row] if inside else self._numbers(original, original + 1)[0]
                taken[row] = Taken(original, *(origins.place(of) or (-1, -1)))
        return taken

    def count(self, rows: int, among: Callable[[int], bool]) -> int:
        """How many rows are not sent, of those for which `among` is true."""
        if self._made is None or self._made.digest is None:
            return 0
        blocks = ((first, min(first + BLOCK_ROWS, rows)) for first in range(0, rows, BLOCK_ROWS))
        return sum(among(row) for block in blocks for row in self.window(*block))

    def last_copies(self, first_row: int, end_row: int) -> dict[int, int]:
        """By row: the last later row that takes its answer. Rows that have no copy are not in it."""
        if self._made is None or not self._made.duplicates:
            return {}
        numbers = enumerate(self._numbers(first_row, end_row), first_row)
        return {row: last for row, origin in numbers if (last := origins.last_copy(origin)) >= 0}

    def table(
        self,
        taken: Mapping[int, Taken],
        own_answers: Callable[[Sequence[int]], pa.Table],
        *,
        invocation: int,
    ) -> pa.Table:
        """The records of these rows, in order. `own_answers` gives those of rows of this run (`OWN_COLUMNS`).

        Raises:
            InputError: an earlier result is gone, or not what it was.
        """
        tables: list[pa.Table] = [OWN_COLUMNS.empty_table()]
        now_s = time.time()
        by_file: dict[int, list[int]] = {}
        for row, each in taken.items():
            by_file.setdefault(each.file, []).append(row)
        for file, rows in by_file.items():
            if file < 0:
                answers = own_answers([taken[row].original for row in rows])
            else:
                found = self._answers_of(file).take([taken[row].row for row in rows])
                answers = with_source(found, self._file(file).name, variant=self._variant, model=self._model)
            originals = [None if (original := taken[row].original) < 0 else original for row in rows]
            tables.append(carried(answers, rows, originals, invocation=invocation, at_s=now_s))
        return pa.concat_tables(tables).sort_by("row")

    def _numbers(self, first_row: int, end_row: int) -> "array[int]":
        """The origins of these rows of the run, whose first one is the file's first."""
        before = 0 if self._made is None else self._made.first_row
        return origins.read(self._path, first_row - before, end_row - before)

    def _file(self, number: int) -> OldFile:
        assert self._made is not None
        return self._made.files[number]

    def _answers_of(self, number: int) -> OldAnswers:
        """The earlier result's file, open and as it was when its answers were looked up."""
        if (known := self._open.get(number)) is not None:
            self._open.move_to_end(number)
            return known
        file = self._file(number)
        require_unchanged(file)
        if len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        found = self._open[number] = OldAnswers(file.path)
        return found


def require_unchanged(file: OldFile) -> None:
    """Returns if the file is what it was when its answers were looked up.

    Raises:
        InputError: it is gone or another.
    """
    if not is_unchanged(file):
        raise InputError(
            f"{file.path}: an earlier result whose answers are reused is gone or has changed; run the same command "
            "again: it looks the answers up again, and sends the rows that no longer have one"
        )


def is_unchanged(file: OldFile) -> bool:
    """Whether the file is there, of the same size and time."""
    try:
        now = file.path.stat()
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) == (file.size, file.mtime_ns)
