"""The manifest of the run that shards are merged into, and its numbers of rows, starts, chunks and variants. PURE."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

import msgspec

from batchrun.merge.shards import CompleteShard
from batchrun.run_summary import Estimate, MergedShard
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.variants import Variant


def merged_manifest(shards: Sequence[CompleteShard], target: RunDirectory) -> Manifest:
    every = [shard.manifest for shard in shards]
    models: Counter[str] = Counter()
    largest: dict[str, tuple[int, int]] = {}
    for each in every:
        models.update(each.models)
        for model, (prompt, output) in each.max_request.items():
            before = largest.get(model, (0, 0))
            largest[model] = max(before[0], prompt), max(before[1], output)
    schemas = {each.answer_schema for each in every if each.rows}
    ids = "\n".join(each.run_id for each in every)
    return msgspec.structs.replace(
        every[0],
        # made of the shards' ids, so that every merge of them is the same run
        run_id=hashlib.blake2b(ids.encode(), digest_size=6).hexdigest(),
        created_at=min(each.created_at for each in every),
        rows=sum(each.rows for each in every),
        rejected=tuple(ordinal for each in every for ordinal in each.rejected),
        answer_schema=schemas.pop() if len(schemas) == 1 else None,
        models=dict(models),
        max_request=largest,
        output=msgspec.structs.replace(every[0].output, path=str(target.path)),
        estimate=_estimate([each.estimate for each in every if each.estimate is not None]),
        share=None,
        merged=tuple(
            MergedShard(manifest.run_id, str(shard.share.shard), manifest.rows, totals.requests(), totals.cost_usd())
            for shard, manifest, totals in ((each, each.manifest, each.known.totals) for each in shards)
        ),
    )


def _estimate(every: Sequence[Estimate]) -> Estimate | None:
    """The estimate for all rows: shards work side by side."""
    if not every:
        return None

    def usd(name: str) -> Decimal | None:
        amounts = [getattr(each, name) for each in every]
        return None if None in amounts else sum(amounts, Decimal(0))

    return msgspec.structs.replace(
        every[0],
        rows=sum(each.rows for each in every),
        prompt_tokens=sum(each.prompt_tokens for each in every),
        completion_tokens=sum(each.completion_tokens for each in every),
        **{name: usd(name) for name in ("low_usd", "expected_usd", "high_usd")},
        minutes=max((each.minutes for each in every if each.minutes is not None), default=None),
    )


class Renumbering(msgspec.Struct, frozen=True):
    """Added to a shard's numbers. `rows` is negative where earlier shards set records aside. `variants` are the
    new numbers by the old ones.
    """

    rows: int
    invocations: int
    chunks: int
    variants: tuple[int, ...]


def renumbered(shards: Sequence[CompleteShard]) -> tuple[tuple[Variant, ...], list[Renumbering]]:
    """The variants of all shards, and how each shard is renumbered."""
    every = list(shards[0].variants)
    numbers: list[Renumbering] = []
    rejected = invocations = chunks = 0
    for shard in shards:
        for variant in shard.variants:
            if not any(known.question == variant.question for known in every):
                every.append(variant)
        places = tuple(
            next(place for place, known in enumerate(every) if known.question == variant.question)
            for variant in shard.variants
        )
        numbers.append(Renumbering(-rejected, invocations, chunks, places))
        rejected += len(shard.manifest.rejected)
        invocations += max((record[0] for record in shard.known.invocations), default=0)
        chunks += len(shard.known.chunks)
    return tuple(every), numbers
