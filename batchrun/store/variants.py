"""The variants of the job in a run: 0 is the one it started with; a retry with other settings adds another. PURE.

The templates are stored with the run, so that a row that was pending when a process died is sent by the next one as it
was meant, even if the job file has changed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from batchrun.errors import CheckpointError
from batchrun.job.job import Job
from batchrun.job.settings import RequestTemplate

_SERVED_BY = frozenset({"stream_options", "prompt_cache_key"})

ENTRY = "variants"
"""The manifest entry that holds them."""


class Variant(msgspec.Struct, frozen=True):
    """A request template, and all settings that are part of its questions."""

    request: RequestTemplate
    question: dict[str, object]


def of_job(job: Job) -> Variant:
    """The job as a variant."""
    question = msgspec.json.decode(msgspec.json.encode(job.question()), type=dict[str, object])
    return Variant(job.request, question)


def decode(entries: Mapping[str, str]) -> tuple[Variant, ...]:
    """The variants in the manifest's entries.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    try:
        return msgspec.json.decode(entries[ENTRY], type=tuple[Variant, ...])
    except (KeyError, msgspec.DecodeError) as error:
        raise CheckpointError(f"the run's manifest can't be read: {error}; keep a copy of this directory") from error


def encode(variants: Sequence[Variant]) -> dict[str, str]:
    """The variants as a manifest entry."""
    return {ENTRY: msgspec.json.encode(variants).decode()}


class Placed(NamedTuple):
    """The variants of a run with that of the present job among them, its number, and the settings that changed."""

    variants: tuple[Variant, ...]
    number: int
    changed: tuple[str, ...]


def place(job: Job, variants: tuple[Variant, ...], current: int, *, retrying: bool) -> Placed:
    """The job's place among the variants, where it is added if it is new. Settings are compared with those of the
    `current` variant of the run.
    """
    own = of_job(job)
    known = [number for number, variant in enumerate(variants) if variant.question == own.question]
    number = current if current in known else known[0] if known else len(variants)
    changed = tuple(differences(variants[current], own))
    if retrying and all(path.startswith("request.") for path in changed):
        changed = ()  # a retry may use another request
    return Placed(variants if known else (*variants, own), number, changed)


def differences(one: Variant, other: Variant) -> list[str]:
    """The settings in which two variants differ, sorted."""
    paths = sorted(one.question.keys() | other.question.keys())
    return [path for path in paths if one.question.get(path) != other.question.get(path)]


def as_job(job: Job, variant: Variant) -> Job:
    """The job with the variant's request. How requests are served and answers travel stays as the job has it."""
    extra = {name: value for name, value in variant.request.extra.items() if name not in _SERVED_BY}
    extra |= {name: value for name, value in job.request.extra.items() if name in _SERVED_BY}
    own = job.request
    request = msgspec.structs.replace(
        variant.request, stream=own.stream, service_tier=own.service_tier, cache_prefix=own.cache_prefix, extra=extra
    )
    return msgspec.structs.replace(job, request=request)
