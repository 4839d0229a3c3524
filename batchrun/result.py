"""The end of a run: the parts become the result, verified; then what the run no longer needs goes."""

import msgspec

from batchrun import output
from batchrun.checkpoint import Checkpoint
from batchrun.chunks import Chunks
from batchrun.plan import Plan
from batchrun.records import Summary
from batchrun.rundir import RunDirectory

FINISHED = "finished"
"""The manifest's entry that says the result is written. From then on the parts are not needed any more."""


def write(plan: Plan, checkpoint: Checkpoint, chunks: Chunks, directory: RunDirectory, summary: Summary) -> None:
    """The result is on disk and the checkpoint closed. Every step can be repeated after a kill in the middle."""
    if FINISHED not in checkpoint.manifest():
        digest = _write_completions(plan, chunks, directory, summary)
        output.write_usage(directory.usage, checkpoint.spent.totals.values())
        checkpoint.write_manifest({FINISHED: msgspec.json.encode({"digest": digest}).decode()})
    checkpoint.close(finished=True)
    for path in (*directory.parts.iterdir(), directory.reserve, directory.inflight):
        path.unlink(missing_ok=True)


def _write_completions(plan: Plan, chunks: Chunks, directory: RunDirectory, summary: Summary) -> str | None:
    """The digest of completions.parquet; None where the parts themselves are the result."""
    parts = [
        (directory.part_of(number, chunk.generation), chunk.part_digest or "", chunk.rows)
        for number, chunk in sorted(chunks.sealed.items())
    ]
    settings = plan.facts.output
    if settings.layout == "parts":
        output.move_parts(parts, directory.completions_folder)
        return None
    footer = {output.FOOTER_KEY: msgspec.json.encode(_bill(summary)).decode()}
    return output.assemble(parts, directory.completions, plan.schema, settings.compression, footer)


def _bill(summary: Summary) -> dict[str, object]:
    """What the footer says of the run: its bill, and that it is whole. A file that was moved still knows it."""
    names = ("job", "run_id", "begun_at", "rows", "by_status", "totals", "cost_usd", "wasted_usd")
    doubts = ("unpriced", "without_usage", "possibly_billed_count", "possibly_billed_usd", "models", "price")
    bill = {name: getattr(summary, name) for name in (*names, *doubts)}
    return {"version": summary.version, "complete": True, "rows_in_output": summary.rows, **bill}
