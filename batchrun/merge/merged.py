"""Writes shards as one run, complete as if one process had sent every row: result, bill, checkpoint, summary.

The directory is built beside its place and renamed, so that it is there as a whole or not at all. Starts of the shards
become starts of the merged run, numbered through: those of the first shard, then those of the next.
"""

import contextlib
import functools
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from batchrun import durable
from batchrun.durable import disk_errors
from batchrun.errors import CheckpointError, ExitCode, InputError, JobError, writable
from batchrun.integrity.db_records import SALVAGED
from batchrun.merge.merged_manifest import Renumbering, merged_manifest, renumbered
from batchrun.merge.shards import CompleteShard
from batchrun.records import ResultFile, Status
from batchrun.report.summary import Moment, failures, summarise
from batchrun.report.summary import files as summary_files
from batchrun.report.summary import read as read_summary
from batchrun.request import image_digests
from batchrun.run_summary import Summary, TotalsLine
from batchrun.source import JsonlSource
from batchrun.store import db_tables, price_tables, result, shared_dataset, variants
from batchrun.store.checkpoint import Checkpoint, read_finished, write_new
from batchrun.store.chunks import Chunks, Layout
from batchrun.store.database import Record
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.price_tables import Tables
from batchrun.store.rundir import RunDirectory
from batchrun.store.totals import UNSTATED, Unstated
from batchrun.tables import files
from batchrun.tables.rows import as_own, joined, own_schema


class Merged(msgspec.Struct, frozen=True):
    """The merged run. `written`: it was not there before."""

    directory: RunDirectory
    summary: Summary
    written: bool


def merge(shards: Sequence[CompleteShard], to: Path) -> Merged:
    """The shards as one run at `to`. Nothing is written if they were merged there before.

    Raises:
        JobError: something else is there.
        CheckpointError: a shard changed while it was read, or the run that was merged before is damaged.
        DiskError: it can't be written.
    """
    target, building = RunDirectory(to), RunDirectory(to.with_name(to.name + durable.TEMP_SUFFIX))
    writer = MergedWriter(shards, building, target)
    if to.exists():
        before = writer.merged_before()
        _publish(target)
        return Merged(target, before, written=False)
    building.require_possible()
    shutil.rmtree(building.path, ignore_errors=True)
    building.create()
    try:
        with building.lock():
            summary = writer.write()
        with disk_errors(to):
            durable.fsync(building.path)
            building.path.rename(to)
            durable.fsync(to.absolute().parent)
    except BaseException:
        shutil.rmtree(building.path, ignore_errors=True)
        raise
    _publish(target)
    return Merged(target, summary, written=True)


def _publish(directory: RunDirectory) -> None:
    """Publishes the run's partitions in the dataset that its job names. Shards don't: each would replace the others'. A
    merge that was interrupted before this does it when it is repeated.
    """
    entries = read_finished(directory.checkpoint)
    manifest = Manifest.decode(entries)
    if manifest.output.dataset is not None:
        shared_dataset.publish(result.finished(entries), directory, manifest.output.dataset, manifest.run_id)


class MergedWriter:
    """Writes the shards into an empty directory that will be renamed to `target`."""

    def __init__(self, shards: Sequence[CompleteShard], building: RunDirectory, target: RunDirectory) -> None:
        self._shards = shards
        self._to = building
        self._target = target
        self._variants, self._numbers = renumbered(shards)
        self._manifest = merged_manifest(shards, target)
        self._parsed = self._manifest.answer_column

    def merged_before(self) -> Summary:
        """The summary of the same merge, made before.

        Raises:
            JobError: something else is there.
            CheckpointError: it is damaged.
        """
        place = self._target.path
        with contextlib.suppress(InputError, CheckpointError):
            summary = read_summary(self._target)
            if summary.complete and summary.merged == list(self._manifest.merged):
                result.require_intact(self._target, summary.rows_in_output, read_finished(self._target.checkpoint))
                return summary
        raise JobError(f"{place}: exists already and is not an intact merge of these shards; name another with -o")

    def write(self) -> Summary:
        chunks = [chunk for pair in self._pairs() for chunk in self._parts(*pair)]
        write_new(self._to.checkpoint, self._records(chunks))
        checkpoint = Checkpoint(self._to.checkpoint, free_reserve=lambda: False)
        try:
            summary = self._summary(checkpoint)
            settings = self._manifest.output
            layout = Layout(JsonlSource(()), (), frozenset(), None, self._schema, settings, self._parsed)
            chunks_sealed = Chunks(self._to, checkpoint, layout)
            result.write(self._manifest, self._schema, checkpoint, chunks_sealed, self._to, summary)
        finally:
            checkpoint.close()
        for path in (self._to.rejects, self._to.images_of(), self._to.log):
            self._join_files(path.name)
        written, target = writable(str(self._to.path)), writable(str(self._target.path))
        places = {name: target + path.removeprefix(written) for name, path in summary_files(self._to).items()}
        summary = msgspec.structs.replace(summary, files=places)
        durable.replace_bytes(self._to.summary, summary.to_json())
        return summary

    def _pairs(self) -> "Iterator[tuple[CompleteShard, Renumbering]]":
        return zip(self._shards, self._numbers, strict=True)

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _parts(self, shard: CompleteShard, numbers: Renumbering) -> Iterator[Chunk]:
        """Writes the parts of the shard's chunks; each chunk as the merged run has it."""
        for chunk, batches in zip(shard.known.chunks, _pieces(shard), strict=False):  # without rows there is no chunk
            number = numbers.chunks + chunk.chunk
            mine = (self._batch(batch, shard, numbers) for batch in batches)
            path = self._to.part_of(number, 1)
            digest = files.write_part(path, self._schema, mine, self._manifest.output, chunk.rows)
            yield msgspec.structs.replace(
                chunk, chunk=number, first_row=chunk.first_row + numbers.rows, generation=1, part_digest=digest, open=0
            )

    def _batch(self, batch: pa.RecordBatch, shard: CompleteShard, numbers: Renumbering) -> pa.RecordBatch:
        """The rows as the merged run has them."""
        prefix = shard.manifest.output.prefix
        changes = {"row": numbers.rows, "duplicate_of": numbers.rows, "invocation": numbers.invocations}
        for name, change in changes.items():
            place = batch.schema.get_field_index(prefix + name)
            field = batch.schema.field(place)
            batch = batch.set_column(place, field, pc.add(batch.column(place), pa.scalar(change, field.type)))
        place = batch.schema.get_field_index(f"{prefix}variant")
        field = batch.schema.field(place)
        now = pa.array(numbers.variants, field.type).take(batch.column(place))
        batch = batch.set_column(place, field, now)
        if batch.schema.equals(self._schema):
            return batch
        table = pa.Table.from_batches([batch])
        own = as_own(table.select(own_schema(prefix).names))
        return joined(table, own, self._schema, self._parsed)

    @functools.cached_property
    def _schema(self) -> pa.Schema:
        """The columns of the result: those of the input are the same in all shards."""
        first = next((shard for shard in self._shards if shard.manifest.rows), self._shards[0])
        given = files.schema_of(first.directory.path / _in_order(first)[0].name).remove_metadata()
        prefix = first.manifest.output.prefix
        own = own_schema(prefix, self._parsed)
        return pa.schema([*list(given)[: len(given) - len(own)], *own])

    # ── records ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _records(self, chunks: Sequence[Chunk]) -> dict[str, list[Record]]:
        """The records of the merged run's checkpoint by table."""
        standing: Counter[str] = Counter()
        answered_as: Counter[str] = Counter()
        records: dict[str, list[Record]] = {
            name: [] for name in ("invocations", "attempts", "possibly_billed", "totals", "replaced")
        }
        for shard, numbers in self._pairs():
            known, more = shard.known, numbers.invocations
            standing.update(known.totals.standing)
            answered_as.update(known.totals.answered_as)
            records["invocations"] += [(number + more, *rest) for number, *rest in known.invocations]
            records["attempts"] += [(row + numbers.rows, *rest, number + more) for row, *rest, number in known.attempts]
            for doubt in known.possibly_billed:
                row = doubt.row + numbers.rows if doubt.row >= 0 else doubt.row  # -1: its slot can't be read
                moved = msgspec.structs.replace(doubt, row=row, invocation=doubt.invocation + more)
                records["possibly_billed"].append(db_tables.possibly_billed_record(moved))
            for line in known.totals.booked.values():
                records["totals"].append(db_tables.totals_record(_of_start(line, more)))
            for line in known.totals.replaced.values():
                records["replaced"].append(db_tables.replaced_record(_of_start(line, more), 1))
        return {
            "manifest": list(self._entries().items()),
            "chunks": [msgspec.structs.astuple(chunk) for chunk in chunks],
            "standing": list(standing.items()),
            "answered_as": list(answered_as.items()),
            **records,
        }

    def _entries(self) -> dict[str, str]:
        entries = self._manifest.encode() | variants.encode(self._variants) | price_tables.encode(self._prices)
        known = [shard.known.manifest for shard in self._shards]
        unstated = [msgspec.json.decode(each.get(UNSTATED, "{}"), type=Unstated) for each in known]
        usd, tokens = sum((each.usd for each in unstated), Decimal(0)), sum(each.tokens for each in unstated)
        if usd or tokens:
            entries[UNSTATED] = msgspec.json.encode(Unstated(usd, tokens)).decode()
        if salvaged := [int(each[SALVAGED]) for each in known if SALVAGED in each]:
            entries[SALVAGED] = str(sum(salvaged))
        return entries

    @property
    def _prices(self) -> Tables:
        return {model: table for shard in reversed(self._shards) for model, table in shard.prices.items()}

    def _summary(self, checkpoint: Checkpoint) -> Summary:
        """The summary. Fields of a single start are those of the last start of the last shard."""
        last = self._shards[-1].summary
        every = [shard.summary for shard in self._shards]
        moment = Moment(
            state="complete",
            invocation=last.invocation + self._numbers[-1].invocations,
            started_at=last.started_at,
            now=max(each.updated_at for each in every),
            elapsed_s=last.elapsed_s,
            sent=0,
            limited_by="complete",
            pid=last.pid,
            host=last.host,
            complete=True,
            unknown_finish_reasons=sorted({reason for each in every for reason in each.unknown_finish_reasons}),
            unpriced_tiers=sorted({tier for each in every for tier in each.unpriced_tiers}),
            unpriced_usage=sorted({what for each in every for what in each.unpriced_usage}),
            example_error=next((each.example_error for each in every if each.example_error is not None), None),
            tags=every[0].tags,
        )
        manifest, rows = self._manifest, self._manifest.rows
        summary = summarise(manifest, rows, self._prices, checkpoint.totals, moment, self._to)
        failing = {Status(status) for status in self._shards[0].share.failing}
        failed = failures(summary, failing) > manifest.output.max_failures
        answered = [each.last_answer_at for each in every if each.last_answer_at is not None]
        return msgspec.structs.replace(
            summary,
            exit_code=int(ExitCode.TOO_MANY_FAILURES if failed else ExitCode.COMPLETE),
            last_answer_at=max(answered, default=None),
        )

    def _join_files(self, name: str) -> None:
        """A file that each shard may have: lines one after another, or entries at the place of their row."""
        at_row = name == self._to.images_of().name
        to = self._to.path / name
        for shard, numbers in self._pairs():
            path = shard.directory.path / name
            if not path.exists() or (at_row and numbers.rows):  # an entry that is missing says nothing
                continue
            start = image_digests.ENTRY_BYTES * shard.manifest.first_row if at_row else 0
            to.touch(mode=0o600)
            with disk_errors(to), path.open("rb") as source, to.open("r+b") as target:
                source.seek(start)
                target.seek(start, os.SEEK_SET if at_row else os.SEEK_END)
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())


def _of_start(line: TotalsLine, more: int) -> TotalsLine:
    return msgspec.structs.replace(line, invocation=line.invocation + more)


def _in_order(shard: CompleteShard) -> tuple[ResultFile, ...]:
    """The files that hold the shard's rows in their order: its parts where the result has another."""
    return shard.result.kept or shard.result.files


def _pieces(shard: CompleteShard) -> Iterator[Iterator[pa.RecordBatch]]:
    """The rows of each of the shard's chunks, in order; take each piece whole before the next.

    Raises:
        CheckpointError: the result is not what was written.
    """
    written = [(shard.directory.path / file.name, file.digest, file.rows) for file in _in_order(shard)]
    if shard.result.kept or shard.result.folder:
        return (files.sealed_batches(*file) for file in written)
    ((path, digest, _),) = written
    return files.cut(path, digest, [chunk.rows for chunk in shard.known.chunks])
