"""How the rows, starts, chunks and variants of shards are numbered in the merged run. PURE."""

from collections.abc import Sequence

import msgspec

from batchrun.merge.shards import CompleteShard
from batchrun.store.variants import Variant


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
