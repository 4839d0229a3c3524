"""What is fixed when a run first starts, and stands until a changed input or job is accepted. PURE."""

from collections.abc import Mapping
from datetime import datetime

import msgspec

from batchrun.errors import CheckpointError
from batchrun.job.job import Output
from batchrun.records import Estimate
from batchrun.source import FileIdentity
from batchrun.tables.arrow_types import Column, column_of

ENTRY = "facts"
"""The manifest's entry that holds them."""


class Manifest(msgspec.Struct, frozen=True):
    """What is fixed when a run first starts. `types` are the column types of JSONL input, as JSON;
    `answer_schema` is the JSON schema that types the column `parsed`.

    `layout` counts how often the rows were laid out anew over a changed input or job; `variant` is the way in which
    rows are asked since the last time. `estimate` is what all rows were expected to take.
    """

    run_id: str
    begun_at: datetime
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

    @property
    def attempt_prefix(self) -> str:
        """What the ids of attempts begin with: after a new layout the same row number is another row."""
        return f"{self.run_id}.{self.layout}" if self.layout else self.run_id


def read(manifest: Mapping[str, str]) -> Manifest:
    """The facts in a manifest."""
    try:
        return msgspec.json.decode(manifest[ENTRY], type=Manifest)
    except (KeyError, msgspec.DecodeError) as error:
        raise CheckpointError(f"the run's manifest can't be read: {error}; keep a copy of this directory") from error


def parsed(facts: Manifest) -> Column:
    """The type of the column `parsed`."""
    return column_of(None if facts.answer_schema is None else msgspec.json.decode(facts.answer_schema))


def encode(facts: Manifest) -> dict[str, str]:
    """The facts as the manifest's entry."""
    return {ENTRY: msgspec.json.encode(facts).decode()}
