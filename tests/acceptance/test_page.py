"""The page: one file that loads nothing and runs no script, says the bill's figures, and is legible for everyone."""

import base64
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from batchrun.errors import JobError
from batchrun.report import screenshot
from tests.cli_process import batchrun
from tests.result_files import row, write_result

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}\u202e\x1b[2J</style></svg>"
NIGHTS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for night in range(1, NIGHTS + 1):
        rows = []
        for number in range(80):
            cost = Decimal(number + night) / 10_000
            changes: dict[str, Any] = {"cost_usd": cost, "answer_cost_usd": cost, "latency_s": 0.1 * (1 + number % 13)}
            changes["finished_at"] = datetime(2026, 11, night, 2, number // 20, number % 60, tzinfo=UTC)
            if number % 4 == 0:
                changes |= {"requested_model": HOSTILE}
            if number % 20 == 7:
                error = {"kind": "quota", "http_status": 429, "code": None, "message": f"no more {HOSTILE}"}
                changes |= {"status": "error", "content": None, "error": error}
            rows.append(row(number, **changes))
        started = f"2026-11-{night:02d}T01:00:00Z"
        write_result(folder / f"2026-11-{night:02d}", rows, job=HOSTILE, created_at=started)
    write_result(folder / "2026-11-09", [row(0)], job="stopped", complete=False, pending=5, reason=HOSTILE)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    target = runs.parent / "bill.html"
    ended = batchrun("report", runs, "--by", "night,model", "--against", "3", "-o", target)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "", "")
    return target.read_text("utf-8")


class Elements(HTMLParser):
    """Start tags with attributes, and the cells of each table by the title before it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.title = ""
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "h2":
            self.title, self._within = "", "h2"
        elif tag == "table":
            self.tables[self.title] = []
        elif tag == "tr":
            self.tables[self.title].append([])
        elif tag in ("td", "th"):
            self.tables[self.title][-1].append("")
            self._within = "cell"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "td", "th"):
            self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "h2":
            self.title += data
        elif self._within == "cell":
            self.tables[self.title][-1][-1] += data


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    return Elements(page)


def test_nothing_is_loaded_and_nothing_runs(page: str, elements: Elements) -> None:
    assert {tag for tag, _ in elements.tags} & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "embed",
        "a",
        "form",
    } == set()
    names = {name for _, attributes in elements.tags for name in attributes}
    assert not [
        name for name in names if name.startswith("on") or name in ("src", "href", "xlink:href", "style", "srcset")
    ]
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    metas = [attributes for tag, attributes in elements.tags if tag == "meta"]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_hostile_text_is_only_text(page: str) -> None:
    assert "<script" not in page
    assert "alert(1)" in page
    assert "49" not in re.findall(r"\{\{.*?\}\}|&amp;(.*?)\\", page)
    assert not [char for char in page if not char.isprintable() and char != "\n"]
    assert page.count("</style>") == 1


def test_the_page_holds_no_prompts_or_answers(page: str) -> None:
    assert "question 1" not in page
    assert "answer 1" not in page


def test_the_tables_have_the_bills_figures(runs: Path, elements: Elements) -> None:
    bill = json.loads(batchrun("report", runs, "--by", "night,model", "--format", "json").stdout)
    header, *lines, total = elements.tables["The bill by night, model"]
    cost = header.index("cost $")
    assert [line[cost] for line in lines] == [f"{Decimal(line['cost_usd']):,.6f}" for line in bill["lines"]]
    assert total[cost] == f"{Decimal(bill['total']['cost_usd']):,.6f}"
    _, *nights = elements.tables["Cost by night and model"]
    by_night = json.loads(batchrun("report", runs, "--by", "night", "--format", "json").stdout)["lines"]
    for shown, line in zip(nights, by_night, strict=True):
        assert shown[0] == line["night"]
        assert sum(map(float, shown[1:])) == pytest.approx(float(line["cost_usd"]), rel=1e-5)
    _, *tokens = elements.tables["Tokens by night and kind"]
    total_tokens = sum(float(cell.replace(",", "")) for line in tokens for cell in line[1:])
    assert total_tokens == bill["total"]["prompt_tokens"] + bill["total"]["completion_tokens"]
    _, *steps = elements.tables["Latency of the rows' last attempts"]
    assert sum(int(step[1]) for step in steps) == NIGHTS * 80 + 1
    _, failure = elements.tables["Failures by kind"]
    assert failure[:2] == ["error, quota", str(NIGHTS * 4)]
    _, *costliest = elements.tables["The most expensive rows"]
    costs = [float(line[4]) for line in costliest]
    assert costliest[0][1:3] == [f"2026-11-{NIGHTS:02d}", "79"]
    assert len(costs) == 10
    assert all(one >= other for one, other in pairwise(costs))
    assert costs[0] == pytest.approx((79 + NIGHTS) / 10_000)


def test_an_expensive_row_names_its_run(tmp_path: Path) -> None:
    """Two runs of one night differ by the names of their directories, which is what `show` takes."""
    for name in ("2026-11-01", "2026-11-01-2"):
        write_result(tmp_path / "runs" / name, [row(0)])
    ended = batchrun("report", tmp_path / "runs", "-o", tmp_path / "bill.html")
    assert ended.exit_code == 0, ended.stderr
    elements = Elements((tmp_path / "bill.html").read_text("utf-8"))
    assert [line[1] for line in elements.tables["The most expensive rows"][1:]] == ["2026-11-01", "2026-11-01-2"]


def test_every_chart_has_name_and_table(elements: Elements) -> None:
    drawn = [attributes for tag, attributes in elements.tags if tag == "svg"]
    charts = [chart for chart in drawn if "pygal-chart" in (chart["class"] or "")]
    assert len(charts) == 2 * 4  # for a desk and for a phone
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert sum(tag == "details" for tag, _ in elements.tags) == 4
    assert ("html", {"lang": "en"}) in elements.tags
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in elements.tags if "aria-labelledby" in a} <= set(ids)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_series_stand_out_from_the_paper(page: str, scheme: str) -> None:
    roots = re.findall(r":root\{(.*?)\}", page)
    colours = dict(re.findall(r"--(\w+):(#\w+)", roots[0] if scheme == "light" else roots[1]))
    for paper in ("paper", "tint"):
        for name in ("ink", "soft"):
            assert contrast(colours[name], colours[paper]) >= 4.5  # WCAG 2.2, 1.4.3
    for number in range(8):
        assert contrast(colours[f"c{number}"], colours["paper"]) >= 3  # WCAG 2.2, 1.4.11


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ── in a browser (`make chromium` installs one) ──────────────────────────────────────────────────────────────────────

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"


@pytest.mark.heavy
def test_a_browser_draws_the_page_silently(runs: Path, page: str, tmp_path: Path) -> None:
    """Its console stays empty, and the whole page is drawn, on a telephone and on a desk. The pictures stay in
    build/screenshots to be looked at.
    """
    chromium = screenshot.browser(os.environ)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    shown = subprocess.run(
        [
            chromium,
            *flags,
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path}",
            (runs.parent / "bill.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in shown.stderr, shown.stderr
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for width in (390, 1400):
        picture = screenshot.png(page.encode(), chromium, width)
        (SCREENSHOTS / f"bill-{width}.png").write_bytes(picture)
        drawn, height = size_of(picture)
        assert drawn >= 2 * width
        assert 2_000 < height <= screenshot.MOST_PIXELS


def size_of(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


@pytest.mark.heavy
def test_png_draws_the_page_beside_the_table(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "bill.png"
    plain = batchrun("report", runs)
    ended = batchrun("report", runs, "--png", target)
    assert (ended.exit_code, ended.stderr, ended.stdout) == (0, "", plain.stdout)
    assert size_of(target.read_bytes())[0] >= 2 * screenshot.WIDTH
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("chrome", "said"),
    [
        ("no-such-browser", "$CHROME is no-such-browser, which can't be run"),
        ("false", "the browser ended before it drew the page"),
        ("true", "the browser ended before it drew the page"),
    ],
)
def test_a_failed_picture_leaves_the_old_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chrome: str, said: str
) -> None:
    monkeypatch.setenv("CHROME", chrome)
    target = tmp_path / "bill.png"
    target.write_bytes(b"old")
    ended = batchrun("report", runs, "--png", target)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"Error: --png: {said}")
    assert ended.stderr.count("\n") == 1
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_browser_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobError, match="--png needs Chromium: apt-get install chromium"):
        screenshot.browser({})


def test_a_page_too_tall_to_draw_is_refused(page: str) -> None:
    tall = page.replace("<main>", "<main>" + "<p>line</p>" * 1_000)
    with pytest.raises(JobError, match="pixels tall, more than a browser draws"):
        screenshot.png(tall.encode(), screenshot.browser(os.environ))


def test_a_missing_chart_package_is_named(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "pygal.py").write_text("raise ImportError('no pygal')")
    (tmp_path / "xlsxwriter.py").write_text("raise ImportError('no xlsxwriter')")
    for name in ("bill.html", "bill.xlsx"):
        arguments = ["batchrun", "report", str(runs), "-o", str(tmp_path / name)]
        path = f"sys.path.insert(0, {str(tmp_path)!r})"
        code = f"import sys; {path}; sys.argv = {arguments!r}; from batchrun.cli import main; main()"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stderr.startswith("Error: ")
        assert ended.stderr.endswith("needs another package: pip install 'batchrun[report]'\n")


def test_a_period_without_runs_has_no_charts(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "none.html"
    assert batchrun("report", runs, "--since", "2099-01", "-o", target).exit_code == 0
    elements = Elements(target.read_text("utf-8"))
    assert [line[0] for line in elements.tables["The bill by job, model"]] == ["job", "total"]
    assert "Failures by kind" not in elements.tables


def test_the_page_excludes_runs_outside_its_period(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "one.html"
    assert batchrun("report", runs, "--until", "2026-11-01", "--by", "night", "-o", target).exit_code == 0
    elements = Elements(target.read_text("utf-8"))
    assert [line[1] for line in elements.tables["The most expensive rows"][1:]] == ["2026-11-01"] * 10
    assert elements.tables["Failures by kind"][1][:2] == ["error, quota", "4"]


def test_a_workbook_holds_hostile_names_as_text(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "bill.xlsx"
    ended = batchrun("report", runs, "--by", "job,model", "-o", target)
    assert (ended.exit_code, ended.stderr) == (0, "")
    book = openpyxl.load_workbook(target)
    for name in ("bill", "exact"):
        cells = [cell for line in book[name].iter_rows() for cell in line]
        assert {cell.data_type for cell in cells} <= {"s", "n"}  # no formula, no error
        assert any(str(cell.value).startswith("<script>alert(1)") for cell in cells)
        assert not [cell for cell in cells if cell.hyperlink]


def test_a_damaged_result_costs_its_rows_only(runs: Path, tmp_path: Path) -> None:
    """The page of all other runs is complete."""
    place = tmp_path / "runs" / "2026-11-04"
    shutil.copytree(runs, place.parent)
    completions = place / "completions.parquet"
    content = completions.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # where it begins, after the rows
    completions.write_bytes(b"PAR1" + bytes(footer - 4) + content[footer:])
    target = tmp_path / "bill.html"
    ended = batchrun("report", place.parent, "--by", "night", "-o", target)
    assert (ended.exit_code, ended.stderr) == (0, "")
    tables = Elements(target.read_text("utf-8")).tables
    assert [line[1] for line in tables["Failures by kind"][1:]] == ["12"]  # 4 in each of the other three nights
    assert {line[1] for line in tables["The most expensive rows"][1:]} == {"2026-11-03", "2026-11-02", "2026-11-01"}
    by_day = ("report", place.parent, "--by", "night,day", "--tz", "America/Noronha", "--format", "json")
    ended = batchrun(*by_day)
    assert (ended.exit_code, ended.stderr) == (0, "")
    groups = {(line["night"], line["day"]) for line in json.loads(ended.stdout)["lines"]}
    assert {day for night, day in groups if night == "2026-11-04"} == {"2026-11-03 or 2026-11-04"}
