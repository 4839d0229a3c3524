"""Whole runs over images, as real processes against the simulator, which rejects invalid images."""

import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types.chat import ChatCompletionContentPartImageParam

from batchrun.simulator import SimulatorConfig, parse_faults
from tests.cli_process import KEY, batchrun, finish, kill_when, read_summary, start
from tests.jobs import write_lines
from tests.pictures import SAMPLES, data_url
from tests.simulator_process import RunningSimulator, running_simulator

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name for path in SAMPLES.iterdir())

JOB = """
[endpoint]
url = "{url}"
name = "test"
api_key_env = "BATCHRUN_TEST_KEY"

[input]
path = "{source}"
image_root = "{root}"

[request]
model = "vtrix-gpt-5.3-codex"
prompt = "Caption it."
images = ["image"]
max_tokens = 40

[limits]
max_in_flight = 4

[retry]
backoff_base_s = 0.01
max_attempts = 50
max_5xx = 50

[output]
chunk_rows = 7
"""


def write_job(tmp_path: Path, simulator: RunningSimulator, source: Path, name: str = "job") -> Path:
    job = tmp_path / f"{name}.toml"
    job.write_text(JOB.format(url=simulator.url, source=source, root=tmp_path / "pictures"))
    return job


def rows_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "completions.parquet", page_checksum_verification=True).to_pylist()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A JSONL input that names a copy of the samples."""
    shutil.copytree(SAMPLES, tmp_path / "pictures")
    return write_lines(tmp_path / "in.jsonl", [{"id": n, "image": name} for n, name in enumerate(NAMES)])


def holding_a_picture(folder: Path) -> list[str]:
    """The files that hold a sample, as bytes or in base64."""
    contents = [path.read_bytes() for path in SAMPLES.iterdir()]
    forms = [content[40:80] for content in contents]
    forms += [data_url(content).encode()[100:140] for content in contents]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(form in path.read_bytes() for form in forms)]


@pytest.mark.heavy
def test_the_caption_job_runs_on_samples(tmp_path: Path) -> None:
    job = ROOT / "jobs" / "caption_pictures.toml"
    quick = ("--set", "endpoint.url=simulator", "--set", "simulator.latency_s=0")
    ended = batchrun("run", job, "-o", tmp_path / "out", *quick, cwd=ROOT)
    assert ended.exit_code == 0, ended.stderr
    rows = rows_of(tmp_path / "out")
    assert sorted(row["image"] for row in rows) == NAMES
    assert {row["status"] for row in rows} == {"ok"}
    assert len({row["request_key"] for row in rows}) == len(rows)
    assert min(row["prompt_tokens"] for row in rows) > 85  # what an image of low detail counts as
    assert holding_a_picture(tmp_path / "out") == []


def test_image_forms_are_one_question(tmp_path: Path, pictures: Path) -> None:
    """A path, bytes and a data URL bring one answer."""
    contents = [(SAMPLES / name).read_bytes() for name in NAMES]
    pq.write_table(pa.table({"image": contents}), tmp_path / "bytes.parquet")
    urls = write_lines(tmp_path / "urls.jsonl", [{"image": data_url(content)} for content in contents])
    answers = []
    faults = parse_faults("500=0.2")  # a retry reads the image again
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        for source in (pictures, tmp_path / "bytes.parquet", urls):
            out = tmp_path / f"out-{source.stem}"
            ended = batchrun("run", write_job(tmp_path, simulator, source, source.stem), "-o", out)
            assert ended.exit_code == 0, ended.stderr
            answers.append([(row["request_key"], row["content"], row["prompt_tokens"]) for row in rows_of(out)])
        assert any(line.status == 500 for line in simulator.ledger())
        assert len({line.question for line in simulator.ledger()}) == len(NAMES)
    assert answers[0] == answers[1] == answers[2]
    table = pq.read_table(tmp_path / "out-bytes" / "completions.parquet", columns=["image"])
    assert table.to_pydict() == {"image": contents}


def test_bad_images_are_reported_before_sending(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "pictures" / NAMES[3]).unlink()
    (tmp_path / "pictures" / NAMES[5]).write_text("no image")
    with running_simulator() as simulator:
        job, out = write_job(tmp_path, simulator, pictures), tmp_path / "out"
        ended = batchrun("run", job, "-o", out)
        assert ended.exit_code == 2
        assert f"{pictures}:4: {NAMES[3]}: can't be read: No such file or directory" in ended.stderr
        assert f"{pictures}:6: {NAMES[5]}: not a png, jpeg, gif or webp image" in ended.stderr
        assert "2 of 20 input records make no valid request" in ended.stderr
        assert simulator.ledger() == []
        assert batchrun("run", job, "-o", out, "--skip-invalid").exit_code == 0
        assert len(simulator.ledger()) == 18
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_bytes().splitlines()]
    assert [reject["record"]["image"] for reject in rejects] == [NAMES[3], NAMES[5]]


def test_a_changed_image_stops_the_run(tmp_path: Path, pictures: Path) -> None:
    """By consent the run takes it."""
    gone, changed = tmp_path / "pictures" / NAMES[-1], tmp_path / "pictures" / NAMES[-2]
    with running_simulator() as simulator:
        job, out = write_job(tmp_path, simulator, pictures), tmp_path / "out"
        assert batchrun("run", job, "-o", out, "--limit", "3").exit_code == 0  # every image is checked, 3 are sent
        kept = gone.read_bytes()
        gone.unlink()
        changed.write_bytes(kept)
        ended = batchrun("run", job, "-o", out)
        assert ended.exit_code == 2
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: row ")]
        assert line.startswith(
            (f"Error: row 19: {NAMES[-1]}: can't be read: No such file", "Error: row 18: its images")
        )
        assert line.endswith(
            "while the run was working; restore them, or accept the images as they are with --accept-changes"
        )
        summary = read_summary(out)
        assert summary["pending"] >= 2
        assert summary["possibly_billed_count"] == 0
        assert holding_a_picture(out) == []
        gone.write_bytes(kept)
        before = simulator.ledger()
        ended = batchrun("run", job, "-o", out, "--accept-changes")
        assert ended.exit_code == 0, ended.stderr
        # both show the same picture by now, so one of them is sent; and a row may have waited when the run failed
        to_send = summary["pending"] - 1
        rows_will = "1 row will" if to_send == 1 else f"{to_send} rows will"
        assert f"the images: {len(before)} answers stay, {rows_will} be sent" in ended.stderr
        assert len(simulator.ledger()) == len(before) + to_send == 19
    rows = rows_of(out)
    assert {row["status"] for row in rows} <= {"ok", "truncated"}
    assert rows[18]["request_key"] == rows[19]["request_key"]
    assert [path.name for path in out.glob("images*.bin")] == ["images.1.bin"]


@pytest.mark.heavy
def test_a_killed_image_run_resumes_and_salvages(tmp_path: Path, pictures: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.1)) as simulator:
        job, out = write_job(tmp_path, simulator, pictures), tmp_path / "out"
        job.write_text(job.read_text().replace("chunk_rows = 7", "chunk_rows = 3"))
        process = start("run", job, "-o", out)
        kill_when(process, lambda: (out / "parts" / "000001.g1.parquet").exists())  # so the first is on record
        finish(process)
        damaged = tmp_path / "damaged"
        shutil.copytree(out, damaged)
        served = len(simulator.ledger())
        assert batchrun("run", job, "-o", out).exit_code == 0
        assert len(simulator.ledger()) <= 20 + 4  # only rows in flight are sent again
        first = damaged / "parts" / "000000.g1.parquet"
        content = bytearray(first.read_bytes())
        content[len(content) // 3] ^= 4
        first.write_bytes(content)
        assert batchrun("verify", damaged, "--salvage").exit_code == 7
        before = len(simulator.ledger())
        ended = batchrun("run", job, "-o", tmp_path / "damaged.salvaged")
        assert ended.exit_code == 0, ended.stderr
        assert len(simulator.ledger()) - before <= 20 - served + 4 + 3  # the part's rows, too
    same = ("image", "request_key", "content", "prompt_tokens")
    whole, salvaged = rows_of(out), rows_of(tmp_path / "damaged.salvaged")
    assert [[row[name] for name in same] for row in salvaged] == [[row[name] for name in same] for row in whole]
    assert (tmp_path / "damaged.salvaged" / "images.bin").read_bytes() == (out / "images.bin").read_bytes()
    assert [path for path in (out, damaged) if holding_a_picture(path)] == []


def test_both_clients_send_the_same_image(tmp_path: Path, pictures: Path) -> None:
    """A retry may ask for more detail."""
    name = NAMES[0]
    with running_simulator() as simulator, openai.OpenAI(base_url=simulator.url, api_key=KEY) as client:
        source = write_lines(tmp_path / "one.jsonl", [{"image": name}])
        job, out = write_job(tmp_path, simulator, source), tmp_path / "out"
        job.write_text(job.read_text().replace("max_tokens = 40", 'max_tokens = 1\nimage_detail = "low"'))
        assert batchrun("run", job, "-o", out).exit_code == 0
        image: ChatCompletionContentPartImageParam = {
            "type": "image_url",
            "image_url": {"url": data_url((SAMPLES / name).read_bytes()), "detail": "low"},
        }
        answer = client.chat.completions.create(
            model="vtrix-gpt-5.3-codex",
            messages=[{"role": "user", "content": [{"type": "text", "text": "Caption it."}, image]}],
            max_tokens=1,
        )
        ours, theirs = simulator.ledger()
        assert ours.question == theirs.question
        (row,) = rows_of(out)
        assert (row["status"], row["content"]) == ("truncated", answer.choices[0].message.content)
        closer = ("--status", "truncated", "--set", "request.image_detail=high", "--set", "request.max_tokens=400")
        ended = batchrun("run", job, "-o", out, "--retry-failed", *closer)
        assert ended.exit_code == 0, ended.stderr
    (again,) = rows_of(out)
    assert (again["status"], again["variant"]) == ("ok", 1)
    assert again["prompt_tokens"] == row["prompt_tokens"] + 765 - 85
    assert again["request_key"] != row["request_key"]
