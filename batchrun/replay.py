"""Rows that earlier starts settled, handed over to who reads this one: from the result, or parts and checkpoint."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from batchrun import completions, output
from batchrun.delivery import Delivery
from batchrun.rundir import RunDirectory


def hand_over(batches: Iterable[pa.RecordBatch], delivery: Delivery) -> None:
    """The rows were handed over as they were read, or nobody reads any more. Blocks while the reader is behind."""
    for batch in batches:
        for completion in completions.read(batch):
            if not delivery.put_earlier(completion):
                return


def result(directory: RunDirectory) -> Iterator[pa.RecordBatch]:
    """The rows of a complete run, in order."""
    files = [directory.completions]
    if not directory.completions.exists():  # layout = "parts"
        files = sorted(directory.completions_folder.iterdir())
    for file in files:
        yield from output.batches_of(file)
