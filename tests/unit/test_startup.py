import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from batchrun.errors import BatchrunError, CheckpointError, InputError, JobError
from batchrun.job.job import Job
from batchrun.startup import resume
from batchrun.startup.resume import Plan
from batchrun.startup.run_options import RunOptions
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.rundir import RunDirectory
from batchrun.tables.rows import OWN_COLUMNS
from tests.endings import MODEL
from tests.jobs import job_over, texts, write_lines

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
PRICED = {MODEL: {"input": Decimal(2), "output": Decimal(10)}}
UNPRICED = "model-without-a-price"


@contextmanager
def opened(directory: RunDirectory) -> Iterator[Checkpoint]:
    directory.create()
    checkpoint = Checkpoint(directory.checkpoint, free_reserve=lambda: False)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


class Starts:
    """Start after start of one run, over an input that lies beside it."""

    def __init__(self, tmp_path: Path) -> None:
        self.input = tmp_path / "in.jsonl"
        self.directory = RunDirectory(tmp_path / "run")
        self.messages: list[str] = []

    def job(self, **tables: Mapping[str, Any]) -> Job:
        return job_over(self.input, **tables)

    def make(self, job: Job | None = None, **requested: Any) -> Plan:
        with opened(self.directory) as checkpoint:
            asked_for = RunOptions(problem=self.messages.append, note=self.messages.append, **requested)
            return resume.plan_start(job or self.job(), self.directory, checkpoint, asked_for, NOW)

    def refused(self, job: Job | None = None, **requested: Any) -> str:
        with pytest.raises(BatchrunError) as error:
            self.make(job, **requested)
        assert isinstance(error.value, JobError | InputError)
        assert "\n" not in str(error.value)
        return str(error.value)


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    made = Starts(tmp_path)
    write_lines(made.input, texts(5))
    return made


# ── the first start ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_start_has_the_same_manifest(starts: Starts) -> None:
    first, second = starts.make(), starts.make()
    assert (first.resumed, second.resumed) == (False, True)
    assert first.manifest == second.manifest
    assert first.schema == second.schema
    assert first.prices == second.prices
    assert first.manifest.rows == 5
    assert first.schema.names == ["id", "text", *OWN_COLUMNS.names]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_input_has_a_valid_schema(starts: Starts, content: bytes) -> None:
    starts.input.write_bytes(content)
    job = starts.job(input={"min_rows": 0})
    for found in (starts.make(job), starts.make(job)):
        assert (found.manifest.rows, found.prices) == (0, {})
        assert found.schema == OWN_COLUMNS


def test_invalid_records_are_reported_once_by_kind(starts: Starts) -> None:
    write_lines(starts.input, [*texts(3), *[{"bad": number} for number in range(30)]])
    message = starts.refused()
    assert message == (
        "30 of 33 input records make no valid request. "
        "Correct them, or set them aside with batchrun run ... --skip-invalid"
    )
    assert len(starts.messages) == 1
    assert starts.messages[0].startswith(f"{starts.input}:4: ")
    assert starts.messages[0].endswith(" (and 29 more such records)")
    assert not starts.directory.rejects.exists()
    write_lines(starts.input, texts(3))  # mended: nothing had been sent
    assert starts.make().manifest.rows == 3


def test_skipped_records_keep_place_and_reason(starts: Starts) -> None:
    rows: list[object] = [{"id": 1, "text": "a"}, {"id": 2}, [7], {"id": 1, "text": "b"}, {"id": 3, "text": 2**70}]
    write_lines(starts.input, rows)
    job = starts.job(input={"id": "id"})
    for _ in range(2):  # the second start reads the manifest
        manifest = starts.make(job, skip_invalid=True).manifest
        assert (manifest.rows, manifest.rejected) == (2, (1, 2, 3))
    lines = starts.directory.rejects.read_bytes().splitlines()
    rejects = [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    assert [(reject["ordinal"], reject["place"], reject["record"]) for reject in rejects] == [
        (1, f"{starts.input}:2", {"id": 2}),
        (2, f"{starts.input}:3", None),
        (3, f"{starts.input}:4", {"id": 1, "text": "b"}),
    ]
    assert [reject["line"] for reject in rejects] == [None, "[7]", None]
    assert rejects[2]["problem"] == f"{starts.input}:1 has its id already"
    assert starts.directory.rejects.stat().st_mode & 0o777 == 0o600


def test_unwritable_rejects_are_a_disk_error(starts: Starts) -> None:
    write_lines(starts.input, [{"bad": 1}])
    starts.directory.rejects.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"rejects\.jsonl: Is a directory"):
        starts.make(skip_invalid=True)


def test_too_few_rows_are_refused_early(starts: Starts) -> None:
    write_lines(starts.input, texts(3))
    job = starts.job(input={"min_rows": 4})
    assert "the input has 3 rows, and input.min_rows expects 4 or more" in starts.refused(job)
    write_lines(starts.input, texts(4))
    assert starts.make(job).manifest.rows == 4


def test_a_clean_start_removes_old_rejects(starts: Starts) -> None:
    starts.directory.create()
    starts.directory.rejects.write_text("old")
    starts.make(skip_invalid=True)
    assert not starts.directory.rejects.exists()


@pytest.mark.parametrize("left", ["completions.parquet", "inflight.bin", "parts/000000.g1.parquet"])
@pytest.mark.parametrize("emptied", [False, True])
def test_a_run_without_checkpoint_is_not_repaid(starts: Starts, left: str, emptied: bool) -> None:
    starts.make()
    (starts.directory.path / left).write_bytes(b"paid")
    os.truncate(starts.directory.checkpoint, 0) if emptied else starts.directory.checkpoint.unlink()
    with pytest.raises(CheckpointError, match=r"belongs to a run whose checkpoint\.db is missing or empty") as error:
        starts.make()
    assert error.value.exit_code == 7
    assert (starts.directory.path / left).read_bytes() == b"paid"


def test_a_missing_input_is_named(starts: Starts, tmp_path: Path) -> None:
    assert starts.refused(job_over(None)) == "input.path: name the input in the job or with -i"
    assert "no input file there" in starts.refused(job_over(tmp_path / "*.nothing"))


# ── a resume ──────────────────────────────────────────────────────────────────────────────────────────────────────────

CHANGES: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("request.model", {"request": {"model": "other"}}),
    ("request.prompt", {"request": {"prompt": "Other {{ text }}"}}),
    ("request.max_tokens", {"request": {"max_tokens": 17}}),
    ("request.max_tokens", {"request": {"max_tokens": None}}),
    ("request.temperature", {"request": {"temperature": 0.5}}),
    ("request.system", {"request": {"system": "Be brief."}}),
    ("request.extra.seed", {"request": {"extra": {"seed": 7}}}),
    ("endpoint.name", {"endpoint": {"name": "other"}}),
    ("input.dialect", {"input": {"dialect": "columns"}}),
    ("output.columns", {"output": {"columns": ["text"]}}),
    ("output.prefix", {"output": {"prefix": "x_"}}),
    ("output.raw", {"output": {"raw": "always"}}),
    ("output.layout", {"output": {"layout": "parts"}}),
    ("output.compression", {"output": {"compression": "snappy"}}),
    ("output.chunk_rows", {"output": {"chunk_rows": 7}}),
    ("output.chunk_bytes", {"output": {"chunk_bytes": 7}}),
]


@pytest.mark.parametrize(("setting", "tables"), [change for change in CHANGES if not change[0].startswith("output.")])
def test_a_changed_question_names_its_setting(starts: Starts, setting: str, tables: dict[str, dict[str, Any]]) -> None:
    """It is accepted while no row has an answer."""
    starts.make()
    changed = starts.make(starts.job(**tables))
    assert starts.messages == [f"{setting} has changed: 0 answers stay, 5 rows will be sent"]
    assert (changed.manifest.layout, changed.manifest.variant, len(changed.variants)) == (1, 1, 2)
    assert starts.make(starts.job(**tables)).manifest.layout == 1
    assert starts.make().manifest.variant == 0  # put back


@pytest.mark.parametrize(("setting", "tables"), [change for change in CHANGES if change[0].startswith("output.")])
def test_a_changed_shape_stops_with_its_setting(
    starts: Starts, setting: str, tables: dict[str, dict[str, Any]]
) -> None:
    starts.make()
    message = starts.refused(starts.job(**tables))
    assert message.startswith(f"{setting} ")
    assert "start another" in message
    assert starts.make().resumed  # put back


@pytest.mark.parametrize(
    "tables",
    [
        {"limits": {"requests_per_minute": 7, "max_in_flight": 3}},
        {"budget": {"max_cost_usd": Decimal(50)}},
        {"retry": {"max_attempts": 2}},
        {"pricing": PRICED},
        {"output": {"max_failures": 3, "path": "elsewhere"}},
        {"request": {"stream": True}},
        {"endpoint": {"attempt_timeout_s": 5.0}},
    ],
)
def test_settings_outside_the_question_may_change(starts: Starts, tables: dict[str, dict[str, Any]]) -> None:
    starts.make()
    assert starts.make(starts.job(**tables)).resumed


def test_a_new_price_is_used_and_stored(starts: Starts) -> None:
    listed = starts.make().prices[MODEL]
    assert listed is not None
    own = starts.make(starts.job(pricing=PRICED)).prices[MODEL]
    assert own is not None
    assert own.tiers[0].input == 2
    assert starts.make().prices[MODEL] == own


def test_a_price_known_later_is_used(starts: Starts) -> None:
    unknown = {"request": {"model": UNPRICED}}
    assert starts.make(starts.job(**unknown)).prices == {UNPRICED: None}
    priced = starts.job(**unknown, pricing={UNPRICED: PRICED[MODEL]})
    assert starts.make(priced).prices[UNPRICED] is not None


def test_an_edited_input_is_reported(starts: Starts) -> None:
    """One that was only touched or copied is the same."""
    starts.make()
    os.utime(starts.input, ns=(1, 1))
    assert starts.make().resumed
    content = starts.input.read_bytes()
    starts.input.unlink()
    starts.input.write_bytes(content)
    resumed = starts.make()
    assert resumed.manifest.files[0].inode == starts.input.stat().st_ino
    assert starts.messages == []
    starts.input.write_bytes(content.replace(b"text 3", b"TEXT 3"))
    assert starts.make().manifest.layout == 1
    assert starts.messages[0].startswith(f"the input: {starts.input} was written again: 0 answers stay, 5 rows")
    starts.input.write_bytes(content + b'{"text": "more"}\n')
    assert starts.make().manifest.rows == 6
    assert "bytes and has" in starts.messages[1]
    starts.input.unlink()
    assert "no input file there" in starts.refused()


def test_equal_content_is_the_same_input(starts: Starts, tmp_path: Path) -> None:
    starts.make()
    other = tmp_path / "moved.jsonl"
    starts.input.rename(other)
    assert starts.make(job_over(other)).resumed
    assert starts.messages == []
    assert starts.make(job_over(write_lines(tmp_path / "else.jsonl", texts(6)))).manifest.rows == 6
    assert "is new" in starts.messages[0]


@pytest.mark.parametrize("manifest", ["{}", "[", '{"run_id": 7}'])
def test_a_manifest_of_another_hand_is_damage(starts: Starts, manifest: str) -> None:
    with opened(starts.directory) as checkpoint:
        checkpoint.write_manifest({"manifest": manifest})
    with pytest.raises(CheckpointError, match="manifest can't be read"):
        starts.make()


# ── standard input ────────────────────────────────────────────────────────────────────────────────────────────────────


def piped(*rows: object) -> io.BytesIO:
    return io.BytesIO(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


STDIN = job_over("-")


def test_standard_input_is_stored_for_the_resume(starts: Starts) -> None:
    """A resume brings the same bytes or none."""
    assert starts.make(STDIN, stdin=piped(*texts(3))).manifest.rows == 3
    for again in (io.BytesIO(), piped(*texts(3)), None):
        resumed = starts.make(STDIN, stdin=again)
        assert (resumed.resumed, resumed.manifest.rows) == (True, 3)
    assert starts.directory.spool.stat().st_mode & 0o777 == 0o600


def test_other_standard_input_is_a_changed_input(starts: Starts) -> None:
    starts.make(STDIN, stdin=piped(*texts(3)))
    assert starts.make(STDIN, stdin=piped(*texts(4))).manifest.rows == 4  # nothing is answered yet: no harm
    assert starts.make(STDIN, stdin=io.BytesIO()).manifest.rows == 4
    assert starts.messages[0].startswith("standard input has other rows")
    refused = starts.refused(STDIN, stdin=piped({"bad": 1}))
    assert "none of the input records (1) make a valid request" in refused
    assert "--skip-invalid" not in refused
    assert starts.make(STDIN, stdin=io.BytesIO()).manifest.rows == 4
    assert [path.name for path in starts.directory.path.glob("input*")] == ["input.jsonl"]


@pytest.mark.parametrize("accepted", [False, True])
def test_a_killed_change_keeps_the_known_rows(starts: Starts, accepted: bool) -> None:
    starts.make(STDIN, stdin=piped(*texts(3)))
    spool, before = starts.directory.spool, starts.directory.spool_before
    if accepted:  # killed when the run knew the new rows
        write_lines(before, texts(5))
    else:
        spool.replace(before)
        write_lines(spool, texts(5))
    assert starts.make(STDIN, stdin=io.BytesIO()).manifest.rows == 3
    assert (spool.exists(), before.exists()) == (True, False)


def test_a_refused_pipe_can_be_corrected(starts: Starts) -> None:
    assert "1 of 2 input records" in starts.refused(STDIN, stdin=piped({"text": "a"}, {"bad": 1}))
    assert starts.make(STDIN, stdin=piped({"text": "a"}, {"text": "b"})).manifest.rows == 2


def test_a_kill_during_the_check_keeps_stdin(starts: Starts) -> None:
    starts.directory.create()
    write_lines(starts.directory.spool, texts(3))  # as far as it came
    assert starts.make(STDIN, stdin=io.BytesIO()).manifest.rows == 3


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_no_input(starts: Starts) -> None:
    assert starts.refused(STDIN, stdin=Terminal()).startswith("standard input is a terminal")
    starts.make(STDIN, stdin=piped(*texts(3)))
    assert starts.make(STDIN, stdin=Terminal()).resumed


# ── the budget ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cap_below_one_request_is_refused(starts: Starts) -> None:
    """The error says what one request may cost."""
    cap = {"max_cost_usd": Decimal("0.0001")}
    message = starts.refused(starts.job(budget=cap, pricing=PRICED))
    assert message.startswith("budget.max_cost_usd: $0.0001 is less than the largest request may cost ($0.000")
    assert starts.make(starts.job(budget={"max_cost_usd": Decimal("0.01")}, pricing=PRICED)).prices[MODEL] is not None


def test_unset_max_tokens_cost_the_longest_answer(starts: Starts) -> None:
    tables: dict[str, dict[str, Any]] = {"pricing": PRICED, "request": {"max_tokens": None}}
    assert "($1.28" in starts.refused(starts.job(**tables, budget={"max_cost_usd": Decimal(1)}))
    starts.make(starts.job(**tables, budget={"max_cost_usd": Decimal(2)}))


def test_a_token_cap_below_one_is_refused(starts: Starts) -> None:
    """The error says how many tokens one request may use."""
    message = starts.refused(starts.job(budget={"max_tokens": 20}))
    assert message.startswith("budget.max_tokens: 20 are fewer than the largest request may use (1")
    starts.make(starts.job(budget={"max_tokens": 1000, "max_requests": 1}))


def test_a_cap_needs_a_price(starts: Starts) -> None:
    job = starts.job(request={"model": UNPRICED}, budget={"max_cost_usd": Decimal(5)})
    message = starts.refused(job)
    assert message.startswith(f"budget.max_cost_usd: the price of {UNPRICED} is unknown, so a cap can't be kept")
    assert f'[pricing."{UNPRICED}"]' in message


def test_an_empty_input_needs_no_price(starts: Starts) -> None:
    starts.input.write_bytes(b"")
    assert starts.make(starts.job(input={"min_rows": 0}, budget={"max_cost_usd": Decimal(5)})).prices == {}


def test_a_name_clash_is_reported_early(starts: Starts) -> None:
    write_lines(starts.input, [{"text": "a", "model": "b"}])
    assert "input column 'model' has the name of an output column" in starts.refused()
    assert starts.make(starts.job(output={"prefix": "out_"})).schema.field("model").type == pa.string()
