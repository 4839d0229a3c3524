"""The ways in which a run's rows were asked: variant 0 as the run began, others by a retry with other settings. PURE.

Each row carries its variant. The templates are kept with the run, so that a row which is pending when a process dies is
asked by the next one as it was meant, whatever the job file says by then.
"""

from collections.abc import Mapping, Sequence

import msgspec

from batchrun.errors import CheckpointError
from batchrun.job.job import Job, RequestTemplate

_SERVED_BY = frozenset({"stream_options", "prompt_cache_key"})

ENTRY = "variants"
"""The manifest's entry that holds them."""


class Variant(msgspec.Struct, frozen=True):
    """A request template, and the settings that decide its questions."""

    request: RequestTemplate
    question: dict[str, object]


def of_job(job: Job) -> Variant:
    """The variant that the job is."""
    question = msgspec.json.decode(msgspec.json.encode(job.question()), type=dict[str, object])
    return Variant(job.request, question)


def read(manifest: Mapping[str, str]) -> tuple[Variant, ...]:
    """The variants on record.

    Raises:
        CheckpointError: there are none that can be read.
    """
    try:
        return msgspec.json.decode(manifest[ENTRY], type=tuple[Variant, ...])
    except (KeyError, msgspec.DecodeError) as error:
        raise CheckpointError(f"the run's manifest can't be read: {error}; keep a copy of this directory") from error


def encode(variants: Sequence[Variant]) -> dict[str, str]:
    """The variants as the manifest's entry."""
    return {ENTRY: msgspec.json.encode(variants).decode()}


def place(
    job: Job, variants: tuple[Variant, ...], current: int, *, retrying: bool
) -> tuple[tuple[Variant, ...], int, tuple[str, ...]]:
    """The variants with the job's among them, its number, and the settings in which it differs from `current`, the way
    in which the run's rows are asked. A retry may ask in another way, if by the request alone; that is no difference.
    """
    mine = of_job(job)
    known = [number for number, variant in enumerate(variants) if variant.question == mine.question]
    number = current if current in known else known[0] if known else len(variants)
    changed = tuple(differences(variants[current], mine))
    if retrying and all(path.startswith("request.") for path in changed):
        changed = ()
    return variants if known else (*variants, mine), number, changed


def differences(one: Variant, other: Variant) -> list[str]:
    """The settings in which two variants ask otherwise, sorted."""
    paths = sorted(one.question.keys() | other.question.keys())
    return [path for path in paths if one.question.get(path) != other.question.get(path)]


def as_job(job: Job, variant: Variant) -> Job:
    """The job, asking as the variant does; how requests are served and answers travel stays the job's own."""
    extra = {name: value for name, value in variant.request.extra.items() if name not in _SERVED_BY}
    extra |= {name: value for name, value in job.request.extra.items() if name in _SERVED_BY}
    own = job.request
    request = msgspec.structs.replace(
        variant.request, stream=own.stream, service_tier=own.service_tier, cache_prefix=own.cache_prefix, extra=extra
    )
    return msgspec.structs.replace(job, request=request)
