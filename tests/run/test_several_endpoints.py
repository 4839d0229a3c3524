"""Several endpoints or keys for one model: a gate each, one backlog, one budget. Real servers, each with its ledger."""

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.errors import ExitCode, JobError
from batchrun.job.job import Job
from batchrun.job.load import from_tables
from batchrun.run_summary import Summary
from tests.fault_server import Exchange, FaultServer, serving_aside
from tests.jobs import texts

PRICES = {"model-a": {"input": 1.0, "output": 1.0}}


class Script:
    """Answers requests with a valid key, as fast as its limit allows. `served` and `refused` have the times."""

    def __init__(self, *keys: str, per_minute: float | None = None, latency_s: float = 0.01) -> None:
        self.keys = set(keys)
        self.wrong_key_status = 401
        self.per_minute = per_minute
        self.latency_s = latency_s
        self.served: list[float] = []
        self.refused: list[int] = []
        self.dies_after: int | None = None

    async def __call__(self, exchange: Exchange) -> None:
        key = re.search(rb"(?i)authorization: Bearer (\S+)", exchange.head)
        if self.dies_after is not None and len(self.served) >= self.dies_after:
            exchange.reset()
        elif key is None or key[1].decode() not in self.keys:
            refusal = {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}
            await self._answer(exchange, self.wrong_key_status, refusal)
        elif self.per_minute is not None and self._is_over(time.monotonic()):
            await self._answer(exchange, 429, {"error": {"message": "Rate limit on requests"}})
        else:
            self.served.append(time.monotonic())
            await asyncio.sleep(self.latency_s)
            usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
            choice = {"message": {"role": "assistant", "content": "Fine."}, "finish_reason": "stop"}
            await self._answer(exchange, 200, {"choices": [choice], "model": "model-a", "usage": usage})

    def _is_over(self, now: float) -> bool:
        """No more in any ten seconds than the limit gives, and a burst of two seconds."""
        assert self.per_minute is not None
        return sum(now - at < 10 for at in self.served) >= self.per_minute / 60 * 12

    async def _answer(self, exchange: Exchange, status: int, body: dict[str, Any]) -> None:
        if status != 200:
            self.refused.append(status)
        raw = msgspec.json.encode(body)
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        await exchange.send(head.encode() + raw)


@contextlib.contextmanager
def serving(*scripts: Script) -> Iterator[list[FaultServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serving_aside(script)) for script in scripts]


def job_at(*endpoints: dict[str, Any], **tables: Any) -> Job:
    return from_tables(
        {
            "endpoint": list(endpoints),
            "request": {"model": "model-a", "prompt": "About {{ text }}", "max_tokens": 16},
            "pricing": PRICES,
            **tables,
        }
    )


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_A", "sk-first-canary")
    monkeypatch.setenv("KEY_B", "sk-second-canary")


def at(server: FaultServer, key: str, **more: Any) -> dict[str, Any]:
    return {"url": server.url, "api_key_env": key, "name": "both", **more}


def run(job: Job, path: Path, rows: int) -> Summary:
    return batchrun.run(job, texts(rows), output=path)


def wal_of(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in (path / "run.log").read_bytes().splitlines()]


@pytest.mark.usefixtures("keys")
def test_two_limits_are_used_fully_and_neither_exceeded(tmp_path: Path) -> None:
    """600 and 1,200 a minute give 30 requests a second together."""
    first, second = Script("sk-first-canary", per_minute=600), Script("sk-second-canary", per_minute=1_200)
    with serving(first, second) as (a, b):
        limits = [{"requests_per_minute": 600}, {"requests_per_minute": 1_200}]
        started = time.monotonic()
        summary = run(job_at(at(a, "KEY_A", **limits[0]), at(b, "KEY_B", **limits[1])), tmp_path / "run", 150)
        took_s = time.monotonic() - started
    assert summary.by_status == {"ok": 150}
    assert not first.refused
    assert not second.refused
    assert len(first.served) + len(second.served) == 150
    assert len(first.served) / 150 == pytest.approx(1 / 3, abs=0.05)
    assert took_s < 150 / 30 + 3
    assert [(each.label, each.requests) for each in summary.endpoints] == [
        ("KEY_A", len(first.served)),
        ("KEY_B", len(second.served)),
    ]


@pytest.mark.usefixtures("keys")
def test_a_revoked_key_is_set_aside_and_named(tmp_path: Path) -> None:
    """The rows that it refused are answered by the other endpoint, each once."""
    notes: list[str] = []
    first, second = Script("sk-first-canary"), Script()
    with serving(first, second) as (a, b):
        job = job_at(at(a, "KEY_A"), at(b, "KEY_B"))
        summary = batchrun.run(job, texts(100), output=tmp_path / "run", note=notes.append)
    assert summary.exit_code == 0
    assert summary.by_status == {"ok": 100}
    assert len(first.served) == 100
    assert 2 <= len(second.refused) <= 16
    (set_aside,) = [entry for entry in wal_of(tmp_path / "run") if entry["event"] == "endpoint set aside"]
    assert set_aside["endpoint"] == "KEY_B"
    assert "401" in set_aside["why"]
    assert summary.endpoints[1].set_aside is not None
    assert any("KEY_B" in note and "set aside" in note for note in notes)
    whole = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"canary" not in whole


@pytest.mark.usefixtures("keys")
def test_a_run_pauses_without_endpoints_left(tmp_path: Path) -> None:
    first, second = Script(), Script()
    with serving(first, second) as (a, b):
        job = job_at(at(a, "KEY_A"), at(b, "KEY_B"))
        with pytest.raises(
            batchrun.RunIncompleteError, match=r"no endpoint is left: KEY_A: .*401.*; KEY_B: "
        ) as caught:
            run(job, tmp_path / "run", 50)
        assert caught.value.exit_code is ExitCode.PAUSED
        first.keys.add("sk-first-canary")
        assert run(job, tmp_path / "run", 50).by_status == {"ok": 50}
    assert len(first.served) == 50


@pytest.mark.heavy
@pytest.mark.usefixtures("keys")
def test_a_dead_endpoints_rows_go_elsewhere(tmp_path: Path) -> None:
    """To the other endpoint."""
    first, second = Script("sk-first-canary", per_minute=6_000), Script("sk-second-canary")
    second.dies_after = 20
    with serving(first, second) as (a, b):
        job = job_at(at(a, "KEY_A", requests_per_minute=3_000), at(b, "KEY_B"), retry={"max_maybe_billed": 3})
        summary = run(job, tmp_path / "run", 300)
    assert summary.by_status == {"ok": 300}
    assert len(second.served) == 20
    assert len(first.served) == 280
    assert any(
        entry.get("endpoint") == "KEY_B" and entry.get("after") == "Cooling" for entry in wal_of(tmp_path / "run")
    )


@pytest.mark.usefixtures("keys")
def test_one_budget_covers_all_endpoints(tmp_path: Path) -> None:
    first, second = Script("sk-first-canary"), Script("sk-second-canary")
    with serving(first, second) as (a, b):
        job = job_at(at(a, "KEY_A"), at(b, "KEY_B"), budget={"max_requests": 40})
        with pytest.raises(batchrun.RunIncompleteError, match="40 of 40 requests sent") as caught:
            run(job, tmp_path / "run", 100)
    assert caught.value.exit_code is ExitCode.STOPPED
    assert len(first.served) + len(second.served) == 40


@pytest.mark.parametrize("status", [401, 400, 402, 200])
def test_a_rotated_key_is_used_without_a_restart(tmp_path: Path, status: int) -> None:
    """The file is replaced, then the old key is revoked, while requests are in flight. Some servers say so with 400 or
    an error in a 200; a 402 says that the old key's account is empty.
    """
    file = tmp_path / "key"
    file.write_text("sk-old-canary")
    file.chmod(0o600)
    server = Script("sk-old-canary", latency_s=0.02)
    server.wrong_key_status = status

    async def rotate() -> None:
        if len(server.served) == 60:
            new = tmp_path / "new"
            new.write_text("sk-new-canary\n")
            new.chmod(0o600)
            new.replace(file)
            server.keys = {"sk-new-canary"}

    class Rotating(Script):
        async def __call__(self, exchange: Exchange) -> None:
            await rotate()
            await server(exchange)

    with serving(Rotating()) as (a,):
        job = job_at({"url": a.url, "api_key_file": str(file)})
        summary = run(job, tmp_path / "run", 200)
    assert summary.by_status == {"ok": 200}
    assert len(server.served) == 200
    assert any(entry["event"] == "key replaced" for entry in wal_of(tmp_path / "run"))
    whole = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"canary" not in whole


def test_a_rows_own_refusal_blames_no_old_key(tmp_path: Path) -> None:
    """A 400 that comes after the key was replaced fails the row, which is sent once."""
    file = tmp_path / "key"
    file.write_text("sk-old-canary")
    file.chmod(0o600)
    server = Script("sk-old-canary", "sk-new-canary")
    refused: list[bytes] = []

    class Refusing(Script):
        async def __call__(self, exchange: Exchange) -> None:
            if b'"About text 7"' not in exchange.body:
                await server(exchange)
                return
            file.write_text("sk-new-canary")
            refused.append(exchange.head)
            await self._answer(exchange, 400, {"error": {"message": "The prompt is too long"}})

    with serving(Refusing()) as (a,):
        summary = run(job_at({"url": a.url, "api_key_file": str(file)}), tmp_path / "run", 50)
    assert (summary.by_status, len(refused)) == ({"ok": 49, "error": 1}, 1)


def test_a_new_key_restores_its_endpoint(tmp_path: Path) -> None:
    """The old key is refused first, and its file replaced a while later."""
    (tmp_path / "a").write_text("sk-a-canary")
    (tmp_path / "b").write_text("sk-b-old-canary")
    for name in "ab":
        (tmp_path / name).chmod(0o600)
    first, second = Script("sk-a-canary", latency_s=0.05), Script("sk-b-new-canary")

    class Watching(Script):
        async def __call__(self, exchange: Exchange) -> None:
            if len(first.served) == 60:
                (tmp_path / "b").write_text("sk-b-new-canary")
            await first(exchange)

    with serving(Watching(), second) as (a, b):
        endpoints = [{"url": each.url, "api_key_file": str(tmp_path / key)} for each, key in ((a, "a"), (b, "b"))]
        job = job_at({**endpoints[0], "requests_per_minute": 1_800}, endpoints[1])
        summary = run(job, tmp_path / "run", 250)
    assert summary.by_status == {"ok": 250}
    assert len(second.served) > 0
    events = [entry["event"] for entry in wal_of(tmp_path / "run")]
    assert events.index("endpoint set aside") < events.index("key replaced") < events.index("endpoint restored")
    assert summary.endpoints[1].set_aside is None


@pytest.mark.usefixtures("keys")
def test_another_endpoint_changes_no_key_or_answer(tmp_path: Path) -> None:
    """A second endpoint added after the run is complete asks nothing again."""
    first, second = Script("sk-first-canary"), Script("sk-second-canary")
    with serving(first, second) as (a, b):
        single = {"url": a.url, "api_key_env": "KEY_A"}
        alone = from_tables({**msgspec.to_builtins(job_at(single)), "endpoint": single})
        run(alone, tmp_path / "run", 20)
        before = pq.read_table(tmp_path / "run/completions.parquet")["request_key"].to_pylist()
        summary = run(job_at(single, {"url": b.url, "api_key_env": "KEY_B"}), tmp_path / "run", 20)
    assert summary.by_status == {"ok": 20}
    assert len(first.served) + len(second.served) == 20
    assert pq.read_table(tmp_path / "run/completions.parquet")["request_key"].to_pylist() == before


@pytest.mark.parametrize(
    ("endpoints", "tables", "message"),
    [
        ([{}, {"name": "x"}, {"name": "y"}], {}, "endpoint.name: several endpoints share one name"),
        ([{}, {"dialect": "responses"}], {}, r"endpoint\[1\].dialect: must be the same"),
        ([{}, {"url": "simulator"}], {}, r'endpoint\[1\].url: "simulator" can be the only endpoint'),
        ([{}, {"url": "ftp://x"}], {}, r"endpoint\[1\].url: expected an http"),
        ([{}, {"weight": 0}], {}, r"endpoint\[1\].weight"),
        ([{}, {"wieght": 2}], {}, r"endpoint\[1\].*weight"),
        ([{}, {}], {"limits": {"requests_per_minute": 60}}, "limits.requests_per_minute: with several"),
        ([{"requests_per_minute": 60}], {}, "endpoint.requests_per_minute: .* set limits.requests_per_minute"),
        ([], {}, "endpoint: is empty"),
    ],
)
def test_wrong_endpoints_are_named_when_loaded(
    endpoints: list[dict[str, Any]], tables: dict[str, Any], message: str
) -> None:
    common = {"url": "https://api.example.com/v1", "api_key_env": "KEY_A"}
    with pytest.raises(JobError, match=message):
        job_at(*({**common, **each} for each in endpoints), **tables)


def test_prices_must_agree_at_all_endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_A", "sk-first-canary")
    hosts = ["https://api.openai.com/v1", "https://openrouter.ai/api/v1"]
    job = job_at(*({"url": url, "api_key_env": "KEY_A"} for url in hosts), pricing={})
    job = msgspec.structs.replace(job, request=msgspec.structs.replace(job.request, model="gpt-4o"))
    with pytest.raises(JobError, match="gpt-4o has different prices at the job's endpoints"):
        run(job, tmp_path / "run", 2)
