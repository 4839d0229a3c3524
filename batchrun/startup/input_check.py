"""Checks the input before the first request: reads each record and builds its request.

It keeps only counts, the first problems and the rejected ordinals, so ten million rows need no more memory than ten.
"""

import heapq
import itertools
import re
from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec

from batchrun.errors import InputError
from batchrun.job.answer_schema import ANYTHING, Expected
from batchrun.job.job import Job
from batchrun.records import Request, Row
from batchrun.request.builder import RequestBuilder, detect_dialect
from batchrun.request.images import Images
from batchrun.request.templates import did_you_mean
from batchrun.source import Record, Source
from batchrun.startup.buckets import IdIndex
from batchrun.tables.json_columns import ColumnTypes
from batchrun.tables.partitioned import PartitionLimit

SHOWN = 20
"""Problems that are reported one by one; all are counted."""

PROGRESS_EVERY = 5000  # records: several times a second

_VARYING = re.compile(r"\d+|(?:; did you mean .*?\?)? \(columns: .*\)$", re.DOTALL)
"""The parts that differ between messages of one kind: numbers, and the columns of JSON lines."""


class Problem(msgspec.Struct, frozen=True):
    """Why one record is invalid, and its place. `record` is None if it could not be read; `line` is its line then,
    unless that is too long.
    """

    ordinal: int
    place: str
    problem: str
    record: dict[str, object] | None
    line: str | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


class Survey(msgspec.Struct, frozen=True):
    """The result of the check. `rows` are accepted records; `rejected` the ordinals of the others, ascending.

    By model: `models` counts rows, `max_request` bounds the (prompt, output) tokens of the largest request, and
    `max_tokens` those of all requests together. `answer_schema`: the one JSON schema of all answers in JSON;
    None if there is none, or more than one. `image_tokens` is what all images usually count. `problem_kinds`: the
    first problem of each kind with the count of that kind, at most `SHOWN` kinds; problems that differ only in numbers
    or in the list of columns are of one kind.
    """

    dialect: str
    rows: int
    rejected: "array[int]"
    first_problems: tuple[Problem, ...]
    models: dict[str, int]
    body_bytes: int
    max_request: dict[str, tuple[int, int]]
    max_tokens: dict[str, tuple[int, int]]
    types: ColumnTypes | None
    answer_schema: str | None = None
    image_tokens: int = 0
    problem_kinds: "tuple[tuple[Problem, int], ...]" = ()


class _Sizes(msgspec.Struct):
    """One model's requests: their number, and their upper bounds added up and at most."""

    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    max_prompt_tokens: int = 0
    max_output_tokens: int = 0


class _Tally:
    """Counts while the survey runs, and passes each problem and each request on."""

    def __init__(self, keep: Callable[[Problem], None], accepted: Callable[[int, Request, bytes], None]) -> None:
        self.rows = self.body_bytes = self.image_tokens = 0
        self.unusable, self.repeated = array("Q"), array("Q")
        self.first_problems: list[Problem] = []
        self.problem_kinds: dict[str, tuple[Problem, int]] = {}
        self.sizes: dict[str, _Sizes] = {}
        self.answer_schemas: set[str | None] = set()
        self._expected: Expected = ANYTHING
        self._keep, self._accepted = keep, accepted

    def accept(self, ordinal: int, request: Request, images: bytes) -> None:
        """Counts the request of a record, and passes it on with the digest of its images."""
        prompt, output = request.max_prompt_tokens, request.max_output_tokens
        self.rows += 1
        self.body_bytes += len(request.body)
        self.image_tokens += request.image_tokens
        if (sizes := self.sizes.get(request.model)) is None:
            sizes = self.sizes[request.model] = _Sizes()
        sizes.rows += 1
        sizes.prompt_tokens += prompt
        sizes.output_tokens += output
        if prompt > sizes.max_prompt_tokens:
            sizes.max_prompt_tokens = prompt
        if output > sizes.max_output_tokens:
            sizes.max_output_tokens = output
        if request.expected is not self._expected:
            self._expected = request.expected
            if request.expected.in_json and len(self.answer_schemas) < 2:  # two show that there are several
                schema = request.expected.schema
                self.answer_schemas.add(None if schema is None else msgspec.json.encode(schema).decode())
        self._accepted(ordinal, request, images)

    def withdraw(self, request: Request) -> None:
        """Takes back a request that turned out to repeat an id; the maxima and sums stay upper bounds."""
        self.rows -= 1
        self.body_bytes -= len(request.body)
        self.image_tokens -= request.image_tokens
        self.sizes[request.model].rows -= 1

    def reject(self, problem: Problem, ordinals: "array[int]") -> None:
        ordinals.append(problem.ordinal)
        if len(self.first_problems) < SHOWN:
            self.first_problems.append(problem)
        kind = _VARYING.sub("#", problem.problem)
        first, count = self.problem_kinds.get(kind, (problem, 0))
        if count or len(self.problem_kinds) < SHOWN:
            self.problem_kinds[kind] = (first, count + 1)
        self._keep(problem)


def survey(
    source: Source,
    job: Job,
    scratch: Path,
    *,
    keep: Callable[[Problem], None] = lambda problem: None,
    progress: Callable[[int], None] = lambda rows: None,
    accepted: Callable[[int, Request, bytes], None] = lambda ordinal, request, images: None,
) -> Survey:
    """The whole input, read once, and every image file that it names. `keep` gets every problem, `progress` the count
    of rows now and then. `accepted` gets each valid record's ordinal, its request, and the digest of its images, b"" if
    none is read; records included that turn out to repeat an id.

    `scratch` is a directory for what does not fit into memory.

    Raises:
        InputError: the input can't be read further, or nothing says what to send.
        JobError: the template is invalid, or the output would have too many partitions.
    """
    tally = _Tally(keep, accepted)
    types = ColumnTypes() if source.format == "jsonl" else None
    partitions = PartitionLimit(job.output)
    builder: RequestBuilder | None = None
    images = Images(job.input)
    with IdIndex(scratch) as ids:
        for record in source.records():
            if record.problem is not None:
                line = None if record.line is None else record.line.decode("utf-8", "backslashreplace")
                tally.reject(Problem(record.ordinal, record.place, record.problem, None, line), tally.unusable)
                continue
            if builder is None:
                builder = RequestBuilder(job, detect_dialect(job, record.columns))
                id_column = job.input.id or ("custom_id" if builder.dialect == "openai-batch" else None)
            if (problem := _add(record, builder, images, ids, id_column, tally)) is not None:
                tally.reject(Problem(record.ordinal, record.place, problem, record.columns), tally.unusable)
            else:
                partitions.observe(record.columns)
                if types is not None:
                    types.observe(record.columns)
            if record.ordinal % PROGRESS_EVERY == 0:
                progress(tally.rows)
        if builder is not None:
            _reject_repeated(source, builder, ids, tally)
    return Survey(
        dialect=job.input.dialect if builder is None else builder.dialect,
        rows=tally.rows,
        rejected=array("Q", heapq.merge(tally.unusable, tally.repeated)),
        first_problems=tuple(tally.first_problems),
        problem_kinds=tuple(tally.problem_kinds.values()),
        models={model: sizes.rows for model, sizes in tally.sizes.items() if sizes.rows},
        body_bytes=tally.body_bytes,
        max_request={model: (each.max_prompt_tokens, each.max_output_tokens) for model, each in tally.sizes.items()},
        max_tokens={model: (each.prompt_tokens, each.output_tokens) for model, each in tally.sizes.items()},
        types=types,
        answer_schema=tally.answer_schemas.pop() if len(tally.answer_schemas) == 1 else None,
        image_tokens=tally.image_tokens,
    )


def _add(
    record: Record,
    builder: RequestBuilder,
    images: Images,
    ids: IdIndex,
    id_column: str | None,
    tally: _Tally,
) -> str | None:
    """Counts the record if it makes a valid request; else returns the reason."""
    digest = b""
    try:
        request = builder.build(Row(tally.rows, record.columns))
        if request.pictures:
            request, digest = builder.identify(Row(tally.rows, record.columns), images.read)
    except InputError as error:
        return str(error)
    if id_column is not None:
        if id_column not in record.columns:
            missing = f"column {id_column!r}, which input.id names, is missing"
            return missing + did_you_mean(tuple(record.columns), id_column)
        if (problem := ids.add_id(record.ordinal, record.columns[id_column])) is not None:
            return f"{id_column}: {problem}"
    tally.accept(record.ordinal, request, digest)
    return None


def _reject_repeated(source: Source, builder: RequestBuilder, ids: IdIndex, tally: _Tally) -> None:
    """Rejects records that repeat an earlier record's id. If there are any, the input is read again for their places.

    With a wrong input.id nearly every record is one: a byte for each record marks them, and only the first few are
    reported with the place of the record that they repeat.
    """
    shown = dict(heapq.nsmallest(SHOWN, ids.duplicates()))
    if not shown:
        return
    marked = bytearray(1 + max(ordinal for ordinal, _ in ids.duplicates()))
    for ordinal, _ in ids.duplicates():
        marked[ordinal] = 1
    places = dict.fromkeys(shown.values(), "")
    for record in itertools.islice(source.records(), len(marked)):
        if record.ordinal in places:
            places[record.ordinal] = record.place
        if marked[record.ordinal]:
            tally.withdraw(builder.build(Row(0, record.columns)))
            first = shown.get(record.ordinal)
            problem = "an earlier record has its id" if first is None else f"{places[first]} has its id already"
            tally.reject(Problem(record.ordinal, record.place, problem, record.columns), tally.repeated)
