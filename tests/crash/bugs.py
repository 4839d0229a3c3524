"""Seeded bugs: what the harness must notice. Each is an exact replacement in a module's source, at launch, in the
process that is to be killed only; an anchor that no longer matches exactly once fails loudly.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Bug:
    """In `module`, each first text becomes the second. `noticed` is what the harness says of it, in part.

    `point` is the marked point whose kill shows it; None: it shows without a kill.
    """

    name: str
    module: str
    changes: tuple[tuple[str, str], ...]
    noticed: str
    point: str | None = None
    passage: int = 1


_SLOT_FREED_EARLY = Bug(
    "the slot is free before the commit",
    "batchrun.dispatch.endings",
    (
        (
            "        self._checkpoint.put(completion)\n",
            "        if slot is not None:\n"
            "            self._slots.clear(slot)\n"
            "        self._checkpoint.put(completion)\n",
        ),
    ),
    "the first was forgotten",
    point="between answer and put",  # a put may be committed before a kill behind it
    passage=30,
)

_COMMIT_DROPPED = Bug(
    "the commit is dropped",
    "batchrun.store.ledger",
    (('            self._database.append("rows", records)\n', ""),),
    "rows are missing from the checkpoint",
)

_RENAMED_BEFORE_FSYNC = Bug(
    "the rename comes before the fsync",
    "batchrun.durable",
    (
        (
            "            fsync(temporary)\n            temporary.rename(path)\n",
            "            temporary.rename(path)\n            fsync(path)\n",
        ),
    ),
    "got its name before its content was on disk",
)

_SEALED_BEFORE_RENAME = Bug(
    "the chunk is sealed before the part has its name",
    "batchrun.store.chunks",
    (
        (
            "        part = self._directory.part_of(chunk.chunk, generation)\n",
            "        named = self._directory.part_of(chunk.chunk, generation)\n"
            '        part = named.with_suffix(".aside")\n',
        ),
        (
            "        self.sealed[chunk.chunk] = self._on_record[chunk.chunk] = sealed\n",
            "        part.rename(named)\n        self.sealed[chunk.chunk] = self._on_record[chunk.chunk] = sealed\n",
        ),
    ),
    "a sealed part can't be read",
    point="after the seal",
    passage=3,
)

_SLOT_TAKEN_LATE = Bug(
    "the slot is written after the send",
    "batchrun.dispatch.worker",
    (
        ("        self._slots.occupy(slot, request.row, n, request.key, bound, tokens)\n", ""),
        (
            "        answer = answers.parse(attempt.body, request.choices)\n",
            "        self._slots.occupy(slot, request.row, n, request.key, bound, tokens)\n"
            "        answer = answers.parse(attempt.body, request.choices)\n",
        ),
    ),
    "the first was forgotten",
    point="after the slot is taken",
    passage=30,
)

_OVERLAY_GONE_EARLY = Bug(
    "the overlay is deleted before the seal",
    "batchrun.store.checkpoint",
    (
        (
            '            self._database.replace("chunks", [msgspec.structs.astuple(chunk)])\n',
            '            overlay = "DELETE FROM rows WHERE row >= ? AND row < ?"\n'
            "            self._database.query(overlay, (chunk.first_row, chunk.end_row))\n"
            '            self._database.query("COMMIT")\n'
            '            self._database.query("BEGIN IMMEDIATE")\n'
            '            self._database.replace("chunks", [msgspec.structs.astuple(chunk)])\n',
        ),
        ("            if stored is not None and found != stored:\n", "            if False:\n"),  # it would be noticed
    ),
    "the first was forgotten",
    point="mid seal",
    passage=2,  # of the two deletions there are now, the one after the early commit
)

_RETRY_UNCOUNTED = Bug(
    "the retry is not counted",
    "batchrun.dispatch.endings",
    (
        (
            "        self._uncommitted[row, history.attempts] = _Uncommitted(result, slot, retry, due_s)\n"
            "        self._checkpoint.put(discarded)\n",
            "        self._uncommitted[row, history.attempts] = _Uncommitted(result, slot, retry, due_s)\n"
            "        self.on_commit([discarded])\n",
        ),
    ),
    "0 retries",
)

_BUSY_TAKEN_FOR_IDLE = Bug(
    "the end of a busy connection is taken for an idle one's",
    "batchrun.transport.keep_alive",
    (
        (
            "    if was_idle and loss.heard_bytes == 0 and in_time:\n",
            "    if was_idle or (loss.idle_s is not None and loss.ended_after_s < 0.1):\n",
        ),
    ),
    "the first was forgotten",
)

_LOST_UNCOUNTED = Bug(
    "lost attempts have no line",
    "batchrun.store.totals",
    (
        (
            "        return [*lines_with_figures, *lost]\n",
            "        return [*lines_with_figures, *lost[:0]]\n",
        ),
    ),
    "attempts: the rows say",
    point="after the slot is taken",
    passage=30,
)

BUGS = {
    bug.name: bug
    for bug in (
        _SLOT_FREED_EARLY,
        _COMMIT_DROPPED,
        _RENAMED_BEFORE_FSYNC,
        _SEALED_BEFORE_RENAME,
        _SLOT_TAKEN_LATE,
        _OVERLAY_GONE_EARLY,
        _RETRY_UNCOUNTED,
        _BUSY_TAKEN_FOR_IDLE,
        _LOST_UNCOUNTED,
    )
}


def plant(bug: Bug) -> None:
    """The module is loaded with the bug in it, before anything else imports it. A fork has the product without it."""
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "batchrun"]:
        del sys.modules[loaded]
    package, _, name = bug.module.rpartition(".")
    spec = importlib.util.find_spec(bug.module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text("utf-8")
    for right, wrong in bug.changes:
        found = source.count(right)
        assert found == 1, f"{bug.name}: an anchor is {found} times in {spec.origin}: mend tests/crash/bugs.py"
        source = source.replace(right, wrong)
    module = importlib.util.module_from_spec(spec)
    sys.modules[bug.module] = module
    setattr(sys.modules[package], name, module)
    exec(compile(source, spec.origin, "exec"), module.__dict__)
