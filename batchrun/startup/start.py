"""What a start works on and with, as one value."""

import msgspec

from batchrun.job.job import Job
from batchrun.startup.run_options import RunOptions
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory


class Start(msgspec.Struct, frozen=True):
    """One start of a run: its job, and the directory with its open checkpoint."""

    job: Job
    directory: RunDirectory
    checkpoint: Checkpoint
    options: RunOptions

    def opened_rows(self, known: Manifest) -> int:
        """The rows of chunks that were opened."""
        chunks = self.checkpoint.chunks()
        return chunks[-1].end_row - known.first_row if chunks else 0
