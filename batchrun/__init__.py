"""batchrun: a file of prompts in, a Parquet file of completions and their cost out.

Names the public API, which docs/library.md describes. Each name loads what it needs when it is
first used, so that `import batchrun` costs next to nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.api import Options, RunIncompleteError, run
    from batchrun.errors import (
        BatchrunError,
        CheckpointError,
        DiskError,
        ExitCode,
        InputError,
        JobError,
        RunLockedError,
        RunStoppedError,
    )
    from batchrun.job.answer_schema import schema_of
    from batchrun.job.job import Job
    from batchrun.job.load import load as load_job
    from batchrun.job.settings import (
        Budget,
        Endpoint,
        Finish,
        Function,
        FunctionName,
        Input,
        Limits,
        MessageTemplate,
        Output,
        Price,
        RequestTemplate,
        ResponseFormat,
        Retry,
        Simulator,
    )
    from batchrun.records import Choice, FunctionCall, RowError, Status
    from batchrun.run_summary import Summary, TotalsLine
    from batchrun.runner import Runner
    from batchrun.startup.adopt import ChangedError
    from batchrun.tables.rows import Completion

__version__ = "0.1.0"

__all__ = [
    "run",
    "Runner",
    "Options",
    "Completion",
    "FunctionCall",
    "Choice",
    "RowError",
    "Summary",
    "TotalsLine",
    "Status",
    "Job",
    "load_job",
    "Endpoint",
    "Input",
    "RequestTemplate",
    "MessageTemplate",
    "ResponseFormat",
    "schema_of",
    "Function",
    "FunctionName",
    "Limits",
    "Retry",
    "Finish",
    "Budget",
    "Output",
    "Price",
    "Simulator",
    "BatchrunError",
    "JobError",
    "ChangedError",
    "InputError",
    "CheckpointError",
    "RunLockedError",
    "DiskError",
    "RunStoppedError",
    "RunIncompleteError",
    "ExitCode",
    "__version__",
]

if not TYPE_CHECKING:  # a type checker would take it that every name is there
    _ERRORS = ("BatchrunError", "CheckpointError", "DiskError", "ExitCode", "InputError", "JobError", "RunLockedError")
    _HOMES = {
        **dict.fromkeys((*_ERRORS, "RunStoppedError"), "errors"),
        **dict.fromkeys(("Choice", "FunctionCall", "RowError", "Status"), "records"),
        **dict.fromkeys(("Summary", "TotalsLine"), "run_summary"),
        **dict.fromkeys(("Options", "RunIncompleteError", "run"), "api"),
        "ChangedError": "startup.adopt",
        "Completion": "tables.rows",
        "Job": "job.job",
        "Runner": "runner",
        "load_job": "job.load",
        "schema_of": "job.answer_schema",
    }

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'batchrun' has no attribute {name!r}")
        from importlib import import_module

        home = import_module(f"batchrun.{_HOMES.get(name, 'job.settings')}")
        value = globals()[name] = getattr(home, "load" if name == "load_job" else name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
