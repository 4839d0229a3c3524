"""Run directories that a module makes once; each test works on a copy."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from batchrun import credentials, engine
from batchrun.job.load import load
from batchrun.run_summary import Summary
from batchrun.store.rundir import RunDirectory
from tests.cli_process import KEY, KEY_ENV
from tests.simulator_process import RunningSimulator


class Runs(NamedTuple):
    """Run directories in `folder`, their jobs `<layout>.toml` beside them, and the result of an undisturbed run."""

    folder: Path
    simulator: RunningSimulator
    undisturbed: pa.Table

    def copy(self, name: str, to: Path) -> RunDirectory:
        """The directory of that name, to be changed."""
        return RunDirectory(Path(shutil.copytree(self.folder / name, to)))

    def resume(self, directory: RunDirectory, layout: str = "file", **changes: Any) -> Summary:
        """The run is resumed in this process."""
        job = load(self.folder / f"{layout}.toml", [f"{name}={value}" for name, value in changes.items()])
        return engine.run(job, directory, credentials.read(job.endpoint, {KEY_ENV: KEY}))
