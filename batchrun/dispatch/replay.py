"""Rows that earlier starts settled, handed over to who reads this one: from the result, or parts and checkpoint."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from batchrun.dispatch.result_queue import ResultQueue
from batchrun.store.rundir import RunDirectory
from batchrun.tables import completions, files


def hand_over(batches: Iterable[pa.RecordBatch], results: ResultQueue) -> None:
    """The rows were handed over as they were read, or nobody reads any more. Blocks while the reader is behind."""
    for batch in batches:
        for completion in completions.read(batch):
            if not results.put_earlier(completion):
                return


def result(directory: RunDirectory) -> Iterator[pa.RecordBatch]:
    """The rows of a complete run, in order."""
    paths = [directory.completions]
    if not directory.completions.exists():  # layout = "parts"
        paths = sorted(directory.completions_folder.iterdir())
    for path in paths:
        yield from files.batches_of(path)
