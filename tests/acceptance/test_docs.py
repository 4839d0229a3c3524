"""The documentation matches the code: these tests read its tables, examples and citations back."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.cli import cli
from batchrun.dispatch.runlog import RunLog
from batchrun.errors import ExitCode
from batchrun.job.job import all_settings
from batchrun.job.load import from_tables, load
from batchrun.job.settings import Retry
from batchrun.limits.admission import Limit
from batchrun.policy import BY_STATUS, FAULT_VERDICTS, RULES, judge
from batchrun.records import Attempt, PossiblyBilled, Status, Verdict
from batchrun.report.figures import FIGURES
from batchrun.report.findings import THRESHOLDS
from batchrun.report.keys import KEYS
from batchrun.response.answer import parse
from batchrun.run_summary import Summary, TotalsLine
from batchrun.simulator import SimulatorConfig, parse_faults
from batchrun.source import find_files, open_source
from batchrun.startup.input_check import survey
from batchrun.store.commits import SPILL
from batchrun.store.rundir import RunDirectory
from batchrun.tables.rows import OWN_COLUMNS, USAGE_COLUMNS
from batchrun.telemetry.metrics import METRICS
from batchrun.telemetry.samples import Snapshot, samples_of
from tests.simulator_process import running_simulator
from tests.unit.test_architecture import LAYERS
from tests.unit.test_metrics import FULL

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in (*DOCS, *sorted(ROOT.glob("*.md")), ROOT / "sample_inputs/README.md") if page.exists()]
USER_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which may speak of what is gone

CODE = re.compile(r"^ {4,}(?P<block>.+)$|^```.*\n(?P<fence>[\s\S]*?)^```|`(?P<span>[^`]+)`", re.MULTILINE)
FENCED = re.compile(r"^```.*\n[\s\S]*?^```", re.MULTILINE)
NOT_YET = re.compile(r"^- Not yet:.*(?:\n .*)*|^## Not yet\n(?:(?!## ).*\n?)*", re.MULTILINE)
OPTION = re.compile(r"(?<!\S)--?[a-z][\w-]*")
CITED_TESTS = re.compile(r"(?P<names>(?:`test_\w+`(?:,\s+|\s+and\s+)?)+)\s+in\s+(?P<file>tests/\w+/test_\w+\.py)")
LISTED_TESTS = re.compile(r"^- (?P<file>tests/\w+/test_\w+\.py):(?P<names>(?:\s+`test_\w+`,?)+)$", re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def rows(name: str, *header: str) -> list[list[str]]:
    """The rows, as cells, of every table of a page whose header begins with these cells."""
    found: list[list[str]] = []
    inside = False
    for line in text_of(name).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif tuple(cells[: len(header)]) == header:
            inside = True
        elif inside and not set(line) <= set("|-: "):
            found.append(cells)
    return found


def details(page: str, field: str) -> str:
    """The text of the list item that explains a field, below the table."""
    (text,) = re.findall(rf"^- \*\*`{field}`\*\*(.*(?:\n  .*)*)", page, re.MULTILINE)
    return " ".join(str(text).split())


def bare(cell: str) -> str:
    return cell.strip("`")


def code(page: Path) -> Iterator[str]:
    """Every line of code blocks and every code span of a page, but for what it says is not there yet."""
    for match in CODE.finditer(NOT_YET.sub("", page.read_text("utf-8"))):
        if match["span"] is not None:
            yield " ".join(match["span"].split())  # Markdown lets a span go over a line's end
        else:
            yield from (match["block"] or match["fence"]).splitlines()


def ids_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ── the reference tables ──────────────────────────────────────────────────────────────────────────────────────────────


def test_every_setting_is_listed_with_its_default(tmp_path: Path) -> None:
    listed = [(bare(path), default) for path, _, default, *_ in rows("docs/job.md", "setting", "type", "default")]
    assert sorted(path for path, _ in listed) == sorted(path for path, _ in all_settings())
    stated = dict(listed)
    for path, default in all_settings():
        wanted = list(default) if isinstance(default, tuple) else default
        assert path == "name" or _default(stated[path]) == wanted, path
    assert stated["name"] == "the job file's stem"
    (tmp_path / "nightly.toml").write_text('endpoint.url = "simulator"')
    assert load(tmp_path / "nightly.toml").name == "nightly"


def _default(cell: str) -> object:
    if cell == "required":
        return msgspec.NODEFAULT
    return None if cell == "none" else tomllib.loads(f"it = {bare(cell)}")["it"]


@pytest.mark.parametrize("schema", [OWN_COLUMNS, USAGE_COLUMNS], ids=["completions", "usage"])
def test_every_column_is_listed_with_its_type(schema: pa.Schema) -> None:
    columns = rows("docs/output.md", "column", "Arrow type")
    completions, usage = columns[: len(OWN_COLUMNS)], columns[len(OWN_COLUMNS) :]
    listed = completions if schema is OWN_COLUMNS else usage
    assert [(bare(row[0]), bare(row[1])) for row in listed] == [(field.name, str(field.type)) for field in schema]


def test_the_readmes_columns_are_among_them() -> None:
    for names, type_, *_ in rows("README.md", "column", "type"):
        for name in map(bare, names.split(", ")):
            assert str(OWN_COLUMNS.field(name).type).partition("<")[0] == type_


def test_usage_has_the_fields_of_a_totals_line() -> None:
    assert tuple(USAGE_COLUMNS.names) == TotalsLine.__struct_fields__


def test_every_summary_field_is_listed_in_order() -> None:
    page = text_of("docs/output.md").partition("## summary.json")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert tuple(listed) == Summary.__struct_fields__
    doubts = details(page, "possibly_billed")
    assert [name for name in PossiblyBilled.__struct_fields__ if f"`{name}`" not in doubts] == []


def test_every_status_and_every_event_is_listed() -> None:
    assert [bare(row[0]) for row in rows("docs/output.md", "status", "when")] == [str(status) for status in Status]
    listed = set(re.findall(r"`([\w ]+)`", " ".join(row[0] for row in rows("docs/output.md", "event", "fields"))))
    written = {
        event
        for module in (ROOT / "batchrun").rglob("*.py")
        for event in re.findall(rf'\b(?:log\.{RunLog.write.__name__}|warn)\(\s*"([^"]+)"', module.read_text("utf-8"))
    }
    assert listed == written | {"complete", "stopped", "failed"}


def test_everything_that_limits_rows_is_listed() -> None:
    field = details(text_of("docs/output.md"), "limited_by").partition("; while no rows")[0]
    advised = " ".join(row[0] for row in rows("docs/running.md", "limited by", "what to do for more speed"))
    wanted = {*map(str, Limit), "the reader of completions", "retries"}
    for listed in (field, advised):
        assert {name.partition(" (")[0] for name in re.findall("`([^`]+)`", listed)} == wanted


def test_every_file_of_a_run_directory_is_listed() -> None:
    listed = set(re.findall("`([^`]+)`", " ".join(row[0] for row in rows("docs/output.md", "file", "there"))))
    directory = RunDirectory(ROOT)
    files = {path.name for path in vars(directory).values() if path != directory.path}
    assert {name.rstrip("/") for name in listed} == {*files, SPILL, directory.images_of().name}


def test_every_metric_is_listed_with_its_meaning() -> None:
    listed = [(bare(name), kind, says.lower()) for name, kind, _, says in rows("docs/telemetry.md", "metric", "type")]
    assert listed == [(each.prometheus_name, each.kind, each.help.rstrip(".").lower()) for each in METRICS]
    labels = {bare(name): set(re.findall(r"\w+", cell)) for name, _, cell, _ in rows("docs/telemetry.md", "metric")}
    names = {metric.name: metric.prometheus_name for metric in METRICS}
    for name, samples in samples_of(Snapshot(FULL, "/runs/x")).items():
        assert all(labels[names[name]] == set(there) for there, _ in samples)


def test_every_key_of_the_report_is_listed() -> None:
    assert tuple(bare(row[0]) for row in rows("docs/cost.md", "`--by`")) == KEYS
    by, form = (next(each for each in cli.commands["report"].params if each.name == name) for name in ("by", "form"))
    assert [key for key in KEYS if not re.search(rf"\b{key}\b", getattr(by, "help", ""))] == []
    formats = text_of("docs/cost.md").partition("- **Formats.**")[2].partition("\n- ")[0]
    assert [name for name in getattr(form.type, "choices", "") if f"`{name}`" not in formats] == []


def test_every_bill_figure_has_its_formula() -> None:
    assert tuple(bare(row[0]) for row in rows("docs/cost.md", "figure", "formula")) == FIGURES


def test_every_finding_is_listed_with_its_threshold() -> None:
    listed = {bare(name): float(bare(limit)) for name, limit, *_ in rows("docs/cost.md", "finding", "threshold")}
    assert listed == THRESHOLDS


def test_every_exit_code_is_listed() -> None:
    listed = {int(code): bare(name) for code, name, *_ in rows("docs/failures.md", "code", "name")}
    assert listed == {int(code): code.name for code in ExitCode}
    in_short = ",".join(codes for codes, *_ in rows("README.md", "code", "meaning"))
    assert sorted(map(int, in_short.split(","))) == sorted(ExitCode)


def test_every_verdict_is_in_the_docs() -> None:
    assert [bare(row[0]) for row in rows("docs/failures.md", "verdict", "means")] == [
        str(verdict) for verdict in Verdict
    ]


def test_the_table_of_statuses_is_the_policys_own() -> None:
    stated: dict[int, tuple[str, str]] = {}
    for statuses, verdict, kind, *_ in rows("docs/failures.md", "status", "verdict"):
        for status in map(int, statuses.split(",")):
            assert status not in stated
            stated[status] = (bare(verdict), bare(kind))
    assert stated == BY_STATUS
    body = b'{"error": {"message": "no"}}'
    for status, (verdict, kind) in stated.items():
        judgement = judge(Attempt(0.0, 0.0, status, {}, body), parse(body), Retry())
        assert judgement.error is not None
        assert (judgement.verdict, judgement.error.kind) == (verdict, kind), status


def test_the_table_of_faults_is_the_policys_own() -> None:
    stated = [(bare(kind), bare(verdict)) for kind, verdict, *_ in rows("docs/failures.md", "`error.kind`", "verdict")]
    assert sorted(stated) == sorted((str(fault), str(verdict)) for fault, verdict in FAULT_VERDICTS.items())


def test_every_rule_about_a_body_is_listed() -> None:
    """A rule that changes the verdict of a status has an item with its status, verdict and kind."""
    section = text_of("docs/failures.md").partition("### By body and header")[2].partition("Headers and the moment")[0]
    items = [" ".join(item.split()) for item in section.split("\n- ")[1:]]
    changing = {
        ("2xx" if status == 200 else str(status), f"`{rule.verdict}`", f"`{rule.kind}`")
        for status, rules in RULES.items()
        for rule in rules
        if (rule.verdict, rule.kind) != BY_STATUS.get(status)
    }
    assert {rule for rule in changing if not any(all(word in item for word in rule) for item in items)} == set()


def test_every_kind_of_error_is_listed() -> None:
    listed = text_of("docs/output.md").partition("\n`error.kind` is ")[2].partition("\n\n")[0]
    of_refusals = {kind for _, kind in BY_STATUS.values()} | {rule.kind for rules in RULES.values() for rule in rules}
    assert {kind for kind in of_refusals if f"`{kind}`" not in listed} == set()


def test_every_package_has_its_line_in_the_design() -> None:
    listed = [row[0].strip("*`") for row in rows("docs/design.md", "package, module", "what it holds")]
    packages = {path.parent.name for path in (ROOT / "batchrun").glob("*/__init__.py")}
    from_the_ground_up = [name for layer in LAYERS for name in layer if name != "__init__"]
    assert listed == [f"{name}/" if name in packages else name for name in from_the_ground_up]


def test_the_tree_of_objects_names_classes_that_exist() -> None:
    tree = text_of("docs/design.md").partition("## The tree of objects")[2].partition("\n## ")[0]
    block = "\n".join(line for line in tree.splitlines() if line.startswith("    "))
    named = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", block))
    defined = {
        name
        for module in (ROOT / "batchrun").rglob("*.py")
        for name in re.findall(r"^class (\w+)", module.read_text("utf-8"), re.MULTILINE)
    }
    assert len(named) > 15
    assert named - defined == set()


def test_every_dependency_has_its_reason() -> None:
    listed = [row[0].partition(" ")[0] for row in rows("docs/decisions.md", "package", "reason")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for extra in extras if extra != "test" for name in extras[extra])]
    assert sorted(listed) == sorted(re.match(r"[\w-]+", name)[0] for name in wanted)  # type: ignore[index]


def test_every_package_of_tests_is_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    names = [re.split("[>=]", requirement)[0] for requirement in extras["test"]]
    assert len(set(names)) == len(names)
    assert [name for name in names if f"`{name}`" not in text_of("docs/decisions.md")] == []


# ── what pages point to ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_test_that_a_page_names_exists() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    cited = [
        (name, match["file"])
        for form in (CITED_TESTS, LISTED_TESTS)
        for match in form.finditer(text)
        for name in re.findall(r"test_\w+", match["names"])
    ]
    assert {name for name, _ in cited} == set(re.findall(r"`(test_\w+)`", text)), "a test is cited without its file"
    assert cited
    missing = [
        (name, file)
        for name, file in cited
        if not (ROOT / file).exists() or f"def {name}(" not in (ROOT / file).read_text("utf-8")
    ]
    assert missing == []


def test_every_promise_has_its_test() -> None:
    promises = text_of("docs/guarantees.md").partition("\n## Not guaranteed")[0].split("\n### ")[1:]
    assert len(promises) > 100
    assert [promise.partition("\n")[0] for promise in promises if not LISTED_TESTS.search(promise)] == []


def test_the_places_where_changes_go_exist() -> None:
    """CONTRIBUTING names, for each kind of change, a file and what to change in it."""
    places = text_of("CONTRIBUTING.md").partition("## Where to add what")[2].partition("\n## ")[0]
    assert _named_in_code(places) >= 10
    assert places.count("\n### ") == 6


def test_each_step_of_a_row_exists() -> None:
    """docs/design.md names, for each step in the life of a row, the function and its file."""
    steps = rows("docs/design.md", "step", "where")
    assert [_named_in_code(where) for _, where, _ in steps] == [1] * len(steps)
    assert len(steps) > 8


def _named_in_code(text: str) -> int:
    """How many names a text places in a file; each of them is there."""
    named = re.findall(r"`(\w+(?:\.\w+)?)`(?:,[^`.;]*)?(?: (?:and|in|of) )`(batchrun/[\w/.]+\.py)`", text)
    for name, file in named:
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", text_of(file)), (name, file)
    return len(named)


@pytest.mark.parametrize("page", PAGES, ids=ids_of)
def test_every_link_of_pages_works(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target


@pytest.mark.parametrize("page", DOCS, ids=ids_of)
def test_a_long_page_lists_its_sections(page: Path) -> None:
    """Before the first of five or more sections a line links to all of them, in their order."""
    text = FENCED.sub("", page.read_text("utf-8"))
    sections = [_anchor(heading) for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    listed = re.search(r"^On this page: (?:.+\n)+", text.partition("\n## ")[0], re.MULTILINE)
    assert len(sections) < 5 or (listed and re.findall(r"\]\(#([\w-]+)\)", listed[0]) == sections)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return set(map(_anchor, re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)))


@pytest.mark.parametrize("page", PAGES, ids=ids_of)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.compile(r"(?<![\w/.])(?:batchrun|benchmarks|docs|jobs|sample_inputs|tests)/[\w./*-]*\w")
    for name in named.findall(page.read_text("utf-8")):
        assert any(ROOT.glob(name)), name


@pytest.mark.parametrize("page", USER_PAGES, ids=ids_of)
def test_every_command_and_option_named_exists(page: Path) -> None:
    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in cli.commands.items()
    }
    for line in code(page):
        for name, arguments in re.findall(r"(?<![\w./-])(?<!from )batchrun ([a-z]\w*)([^|;&#]*)", line):
            assert name in options, line
            assert set(OPTION.findall(arguments.partition("  ")[0])) <= options[name] | {"--help", "-h"}, line
        if line.startswith("--"):
            assert line.split()[0].partition("=")[0] in set().union(*options.values(), {"--help", "--version"}), line


def test_the_help_describes_each_command_wholly() -> None:
    """click cuts a first sentence that does not fit beside the command's name in 80 columns."""
    width = 80 - 6 - max(map(len, cli.commands))
    cut = [name for name, command in cli.commands.items() if command.get_short_help_str(width).endswith("...")]
    assert cut == []


@pytest.mark.parametrize("page", PAGES, ids=ids_of)
def test_no_page_has_both_sides_of_a_merge(page: Path) -> None:
    assert re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", page.read_text("utf-8"), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=ids_of)
def test_no_page_names_a_place_on_somebodys_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:home|root|work|farm|tmp|Users)/\S*", page.read_text("utf-8")) == []


# ── the words ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DRAFT_WORDS = r"\b(?:told|begun|anew|nobody|dearest|dearer|goes on|gone on|held against|becomes? of|became of)\b"
"""Words of the drafts, in code and pages; the others of `DIALECT` are right in some code."""
DIALECT = re.compile(
    rf"{DRAFT_WORDS}|\b(?-i:is none)\b|\b(?:whatever|whoever|in vain|likewise)\b"
    r"|\b(?:(?<!is )(?<!are )(?<!be )used to|since then|earlier that day|(?:is|are|what \w+ is) worth)\b",
    re.IGNORECASE,
)
FIGURE = re.compile(r"\d(?: to [\d.]+)? (?:µs|rows/s)\b")
COMMAND = re.compile(r"\b(?:python (?:-m )?(?:benchmarks|tests)|make \w|/usr/bin/time|time batchrun)|\.py\b")


def _prose(page: Path) -> list[tuple[int, str]]:
    """The lines of a page with their numbers, without code, tables and headings."""
    text = page.read_text("utf-8")
    for code_block in (r"^```[\s\S]*?^```", r"^ {4,}.*$"):
        text = re.sub(code_block, lambda block: re.sub(r"[^\n]", "", block[0]), text, flags=re.MULTILINE)
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line and line[0] not in "|#"]


@pytest.mark.parametrize("page", PAGES, ids=ids_of)
def test_pages_are_in_plain_words(page: Path) -> None:
    """The words in which this project's drafts were hard to read, and those of a history, are in no page."""
    said = [(number, re.sub(r"`[^`]*`", "", line)) for number, line in _prose(page)]
    assert [(number, line) for number, line in said if DIALECT.search(line)] == []


def test_code_is_in_plain_words() -> None:
    """The words of the drafts are in no code, comment, docstring or message of the package either."""
    words = re.compile(DRAFT_WORDS, re.IGNORECASE)
    modules = sorted((ROOT / "batchrun").rglob("*.py"))
    lines = [(ids_of(path), line) for path in modules for line in path.read_text("utf-8").splitlines()]
    assert lines
    assert [(name, line) for name, line in lines if words.search(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=ids_of)
def test_prose_fits_in_120_columns(page: Path) -> None:
    long = [(number, len(line)) for number, line in _prose(page) if len(line) > 120 and " " in line.strip()]
    assert long == []


@pytest.mark.parametrize("page", DOCS, ids=ids_of)
def test_a_measured_figure_has_its_command(page: Path) -> None:
    """A section with a speed or a time per row names the program that measures it."""
    sections = re.split(r"^## ", page.read_text("utf-8"), flags=re.MULTILINE)
    measured = [section for section in sections if FIGURE.search(section)]
    assert [section.partition("\n")[0] for section in measured if not COMMAND.search(section)] == []


def test_every_page_is_within_two_links() -> None:
    """Of the README: it is linked there, or by a page that is."""
    found, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in found or page.suffix != ".md" or not page.exists():
            continue
        found.add(page)
        targets = re.findall(r"\]\(([^)\s#]+)", page.read_text("utf-8"))
        left += [(page.parent / target).resolve() for target in targets if "://" not in target]
    assert [ids_of(page) for page in PAGES if page not in found] == []


def test_the_changelog_keeps_its_known_form() -> None:
    page = text_of("CHANGELOG.md")
    assert set(re.findall(r"^### (.+)$", page, re.MULTILINE)) <= {
        *("Added", "Changed", "Deprecated"),
        *("Removed", "Fixed", "Security"),
    }
    versions = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert versions[0] == "[Unreleased]" or versions[0].startswith(f"[{batchrun.__version__}] - ")
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])


# ── the examples ──────────────────────────────────────────────────────────────────────────────────────────────────────

EXAMPLES = [
    example
    for page in ("docs/job.md", "docs/input.md")
    for block in re.findall(r"(?:^(?: {4}.*)?\n)+", text_of(page), re.MULTILINE)
    if (example := re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip()).startswith("[")
] + re.findall(r"^```toml\n([\s\S]*?)^```", text_of("README.md"), re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[0])
def test_every_job_example_is_a_valid_job(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = from_tables({"endpoint": {"url": "simulator"}, **tomllib.loads(example)})
    if job.input.path is not None:
        found = survey(open_source(find_files(job.input.path)), job, tmp_path)
        assert found.rows > 0
        assert len(found.rejected) == 0


def test_every_commented_template_line_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answer.schema.json").write_text("{}")
    lines = text_of("batchrun/new_job.toml").replace('url = "simulator"', "", 1).splitlines()
    uncommented = "\n".join(re.sub(r"^# (?=\w+ = |\[)", "", line) for line in lines)
    job = from_tables(tomllib.loads(uncommented))
    assert (job.retry.invalid, job.finish.length, job.request.stream) == (1, "fail", True)


def test_there_are_examples_of_all_three_dialects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    jobs = [from_tables({"endpoint": {"url": "simulator"}, **tomllib.loads(example)}) for example in EXAMPLES]
    with_input = [(job, job.input.path) for job in jobs if job.input.path is not None]
    dialects = {survey(open_source(find_files(path)), job, tmp_path).dialect for job, path in with_input}
    assert dialects == {"columns", "messages", "openai-batch"}


@pytest.mark.heavy
def test_the_miniature_sends_every_row_and_retries(tmp_path: Path) -> None:
    """docs/miniature.py runs against a simulator that fails some attempts, and starts one if none is named."""
    faults = parse_faults("500=0.1,429=0.05")
    with running_simulator(SimulatorConfig(latency_s=0, faults=faults, seed=7)) as simulator:
        command: list[str | Path] = [
            sys.executable,
            ROOT / "docs/miniature.py",
            ROOT / "sample_inputs/changes.jsonl",
            simulator.url,
        ]
        shown = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True)
        served = len(simulator.ledger())
    assert shown.returncode == 0, shown.stderr
    part = pq.read_table(tmp_path / "out/part.parquet", columns=["row", "status", "attempts"]).to_pydict()
    assert part["row"] == list(range(400))
    assert set(part["status"]) == {"ok"}
    assert sum(part["attempts"]) == served > 400
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    command = [sys.executable, ROOT / "docs/miniature.py", tmp_path / "in.jsonl"]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert (shown.returncode, shown.stderr) == (0, "")
    steps = [line.partition(": ")[2].split()[0] for line in shown.stdout.splitlines() if line.startswith("row 0: ")]
    assert steps[-4:] == ["a", "admitted", "HTTP", "ok:"]


# ── the library ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_public_name_is_listed() -> None:
    listed = [bare(name) for names, *_ in rows("docs/library.md", "name", "what it is") for name in names.split(", ")]
    assert sorted(listed) == sorted(set(batchrun.__all__) - {"__version__"})


def test_every_option_is_listed_in_order() -> None:
    assert [bare(name) for name, *_ in rows("docs/library.md", "option", "type")] == list(
        batchrun.Options.__annotations__
    )


def test_transcripts_are_what_the_commands_print(tmp_path: Path) -> None:
    """Every command of the README runs in order, as a stranger types them, then those of docs/running.md that show
    what they print; dates and speeds are masked.
    """
    for name in ("jobs", "sample_inputs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = {
        **os.environ,
        "PATH": path,
        "LC_ALL": "C.UTF-8",
        "VTRIX_API_KEY": "any",
    }  # `estimate` wants a key to be set
    for page in ("README.md", "docs/running.md"):
        for command, shown in _transcripts(page):
            if command.startswith(("make ", "source ")) or (page != "README.md" and not shown):
                continue
            ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=shell)
            assert ended.returncode == 0, ended.stderr
            if shown:
                printed = (ended.stderr + ended.stdout).splitlines()
                assert [_masked(line) for line in printed] == [_masked(line) for line in shown.splitlines()]


def _transcripts(page: str) -> Iterator[tuple[str, str]]:
    """Each command of the page's consoles, with what it prints; empty where the page does not show that."""
    for block in re.findall(r"^```console\n([\s\S]*?)^```", text_of(page), re.MULTILINE):
        yield from re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def _masked(line: str) -> str:
    line = re.sub(r"\d{4}-\d\d-\d\d", "DATE", line)
    return re.sub(r"[\d,.]+ tokens in [\d.]+ s", "TOKENS in TIME", line)


@pytest.mark.heavy
def test_the_programs_of_the_readme_run(tmp_path: Path) -> None:
    programs = re.findall(r"^```python\n([\s\S]*?)^```", text_of("README.md"), re.MULTILINE)
    program = "\n".join([*programs, "import asyncio; asyncio.run(label([{'text': 'Fine.'}]))"])
    command = [sys.executable, "-W", "error", "-c", program]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("{'ok': 2} 0.00")
    assert shown.stdout.splitlines()[1].startswith("0 ")
    for run in ("labels", "more"):
        assert (tmp_path / "runs" / run / "completions.parquet").exists()
