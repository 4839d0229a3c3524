"""What is fixed when a run first starts, and stays until a changed input or job is accepted. PURE."""

from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar, Self

import msgspec

from batchrun.errors import CheckpointError, writable
from batchrun.job.settings import Output
from batchrun.run_summary import Estimate, MergedShard, Shard
from batchrun.source import FileIdentity, Span
from batchrun.tables.arrow_types import Column, column_of
from batchrun.tables.json_columns import ColumnTypes


class InputShare(msgspec.Struct, frozen=True):
    """What a shard reads of the input, and the statuses of rows that its job counts as failed."""

    shard: Shard
    span: Span
    failing: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True):
    """`types` are the column types of JSONL input, as JSON; `answer_schema` is the JSON schema of the column `parsed`.

    `layout` counts how often a changed input or job was accepted, and `variant` is the variant of the job since then.
    `estimate` is what all rows were expected to take. `share` is set in a shard; `merged` are the runs that were merged
    into this one.
    """

    ENTRY: ClassVar[str] = "manifest"
    """The checkpoint's manifest entry that holds it."""

    run_id: str
    created_at: datetime
    job: str
    dialect: str
    files: tuple[FileIdentity, ...]
    digests: tuple[str, ...]
    rows: int
    rejected: tuple[int, ...]
    types: str | None
    answer_schema: str | None
    models: dict[str, int]
    max_request: dict[str, tuple[int, int]]
    output: Output
    layout: int = 0
    variant: int = 0
    estimate: Estimate | None = None
    share: InputShare | None = None
    merged: tuple[MergedShard, ...] = ()

    @property
    def is_sharded(self) -> bool:
        """True for a shard, and for what shards were merged into."""
        return self.share is not None or bool(self.merged)

    @property
    def first_row(self) -> int:
        """The number of the first row: in a shard, how many records of the input come before it."""
        return 0 if self.share is None else self.share.span.start.ordinal

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.rows

    @property
    def attempt_prefix(self) -> str:
        """The start of the ids of attempts: after a change the same row number may be another row."""
        return f"{self.run_id}.{self.layout}" if self.layout else self.run_id

    @classmethod
    def decode(cls, entries: Mapping[str, str]) -> Self:
        """The manifest in the checkpoint's manifest entries.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            return msgspec.json.decode(entries[cls.ENTRY], type=cls)
        except (KeyError, msgspec.DecodeError) as error:
            raise CheckpointError(
                f"the run's manifest can't be read: {error}; keep a copy of this directory"
            ) from error

    def encode(self) -> dict[str, str]:
        """The manifest as a checkpoint entry."""
        output = msgspec.structs.replace(self.output, path=writable(self.output.path))
        return {self.ENTRY: msgspec.json.encode(msgspec.structs.replace(self, output=output)).decode()}

    @property
    def column_types(self) -> ColumnTypes | None:
        """The types of the input's columns if it is JSON lines."""
        return None if self.types is None else ColumnTypes.from_json(self.types)

    @property
    def answer_column(self) -> Column:
        """The type of the column `parsed`."""
        return column_of(None if self.answer_schema is None else msgspec.json.decode(self.answer_schema))
