"""Latencies counted in narrow buckets, so any number of rows takes little memory. PURE, except that it reads rows.

Buckets of groups and runs can be added; percentiles can't.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchrun import compute as pc
from batchrun.report import run_rows
from batchrun.report.run_rows import Result

_WIDTH = math.log(1.01)  # a bucket is 1 % wide, so a percentile is exact to half a percent
_SHORTEST_S = 1e-6  # the logarithm of 0 is not finite

Group = tuple[object, ...]


def percentile(buckets: Mapping[int, int], share: float) -> float | None:
    """The latency in seconds that this share of the rows did not exceed (nearest rank); None without rows."""
    rank = math.ceil(share * sum(buckets.values()))
    for bucket in sorted(buckets):
        rank -= buckets[bucket]
        if rank <= 0:
            return seconds_of(bucket)
    return None


def seconds_of(bucket: int) -> float:
    """The middle of a bucket."""
    return math.exp((bucket + 0.5) * _WIDTH)


def buckets_of(numbers: Any) -> dict[int, int]:
    """Bucket → how many of the numbers are in it, without nulls."""
    return {int(bucket): count for bucket, count in run_rows.counts(_bucket(numbers)).items()}


def _bucket(numbers: Any) -> Any:
    at_least = pc.max_element_wise(pc.cast(numbers, pa.float64()), _SHORTEST_S, skip_nulls=False)
    return pc.floor(pc.divide(pc.ln(at_least), _WIDTH))


Scanned = dict[Group, Counter[int]]
"""Buckets by group."""


def scan(result: Result, keys: Sequence[str], zone: str) -> Scanned:
    """The rows by `keys`, some of `requested_model`, `status` and `day` (the local date in `zone`)."""
    found: Scanned = {}
    needed = [*("finished_at" if key == "day" else key for key in keys), "latency_s"]
    for table in run_rows.tables(result, needed):
        columns: dict[str, Any] = {key: table[key] for key in keys if key != "day"}
        if "day" in keys:
            columns["day"] = pc.cast(local_days(table["finished_at"], zone), pa.string())
        columns["bucket"] = _bucket(table["latency_s"])
        grouped = pa.table(columns).group_by([*keys, "bucket"], use_threads=False).aggregate([([], "count_all")])
        values = [grouped[name].to_pylist() for name in (*keys, "bucket", "count_all")]
        for *group, bucket, count in zip(*values, strict=True):
            if bucket is not None:  # a pending row and a reused one have no latency
                found.setdefault(tuple(group), Counter())[int(bucket)] += count
    return found


def local_days(times: "pa.ChunkedArray[Any]", zone: str) -> "pa.ChunkedArray[Any]":
    """The dates, in that time zone, of times in UTC."""
    if zone == "UTC":
        return pc.cast(pc.cast(times, pa.timestamp("us")), pa.date32())
    local: Any = pc.local_timestamp(pc.cast(times, pa.timestamp("us", tz=zone)))  # type: ignore[arg-type]
    return local.cast(pa.date32())  # type: ignore[no-any-return]
