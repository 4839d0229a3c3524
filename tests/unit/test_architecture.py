"""Imports go one way, `cli → api → engine → dispatch → stages → records, job, errors`, libraries to one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "batchrun"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("signals", "streams", "open_files", "memory", "patterns", "compute", "arrow_files", "durable", "money", "job"),
    ("records",),
    ("run_summary",),
    ("prices", "credentials", "storage"),
    ("price_list", "source", "request", "limits", "response"),
    ("transport", "policy", "row_status", "tables"),
    ("attempt_caps", "store", "ray_engine"),
    ("report",),
    ("startup", "telemetry"),
    ("dispatch",),
    ("engine", "integrity", "simulator"),
    ("simulated", "terminal", "merge"),
    ("preflight", "destination", "on_end"),
    ("api",),
    ("runner",),
    ("__init__",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A package or module imports from lower layers only; stages share a layer."""

FORBIDDEN: dict[str, frozenset[str]] = {
    "source": frozenset({"job", "records"}),
    "tables": frozenset({"request", "limits"}),
    "store": frozenset({"request", "limits", "transport", "policy", "row_status"}),
    "report": frozenset({"transport", "policy", "row_status", "request"}),
    "engine": frozenset({"transport", "request", "response"}),
    "integrity": frozenset({"transport", "limits", "policy", "row_status", "dispatch", "engine"}),
    "commands": frozenset(
        {
            "engine",
            "transport",
        }
    ),
}
"""What stands lower and is still none of a package's business."""

SOLE_IMPORTERS: dict[str, frozenset[str]] = {
    "aiohttp": frozenset({"transport", "simulator"}),
    "aiolimiter": frozenset({"limits.rates"}),
    "sqlite3": frozenset({"store.database", "integrity.damaged_db"}),
    "click": frozenset({"cli", "commands"}),
    "tqdm": frozenset({"terminal"}),
    "uvloop": frozenset({"api", "simulator"}),
    "jinja2": frozenset({"request.templates", "report.page"}),
    "pygal": frozenset({"report.charts"}),
    "ray": frozenset({"ray_engine.cluster", "ray_engine.failures", "ray_engine.fleet"}),
    "genai_prices": frozenset({"price_list.convert"}),
    "jsonschema_rs": frozenset({"job.answer_schema", "simulator.schemas"}),
    "opentelemetry": frozenset({"telemetry.otel", "telemetry.otel_export"}),
    "toktok": frozenset({"response.token_count"}),
    "xlsxwriter": frozenset({"report.spreadsheet"}),
    "pyarrow": frozenset(
        {
            "arrow_files",
            "compute",
            "storage",
            "source",
            "tables",
            "store",
            "report",
            "startup",
            "dispatch",
            "integrity",
            "merge",
        }
    ),
}
"""Library → the packages and modules that import it."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every file with the module it counts as: a package within the package is one."""
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        yield place.parts[0].removesuffix(".py"), file


@cache
def imported(file: Path) -> tuple[str, ...]:
    """The dotted name of everything that the file imports, wherever in it that stands."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


@cache
def edges() -> dict[str, set[str]]:
    """Package or module → those of ours that it imports; `__version__`, which is `__init__`'s, does not count."""
    graph: dict[str, set[str]] = {module: set() for module, _ in modules()}
    for module, file in modules():
        for name in imported(file):
            first, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if first == "batchrun" and target not in {module, "__version__"}:
                graph[module].add(target if target in graph else "__init__")
    return graph


def test_imports_go_to_lower_layers_only() -> None:
    level = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    assert set(level) == set(edges()), "every package and module has a layer"
    wrong = {
        (module, target) for module, targets in edges().items() for target in targets if level[target] >= level[module]
    }
    assert wrong == set()


@pytest.mark.parametrize("module", FORBIDDEN)
def test_packages_keep_out_of_foreign_concerns(module: str) -> None:
    assert edges()[module] & FORBIDDEN[module] == set()


def test_no_two_files_import_each_other() -> None:
    files = {dotted(file): file for _, file in modules()}
    graph = {
        module: {
            place
            for name in imported(file)
            for place in (name.removeprefix("batchrun."), name.removeprefix("batchrun.").rpartition(".")[0])
            if name.startswith("batchrun.") and place in files and place != module
        }
        for module, file in files.items()
    }
    assert graph["engine"] >= {"dispatch.dispatch", "startup.resume"}
    TopologicalSorter(graph).prepare()


def test_the_simulator_is_independent_of_the_client() -> None:
    assert edges()["simulator"] <= {"errors"}
    assert {module for module, targets in edges().items() if "simulator" in targets} == {"commands", "simulated"}


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {dotted(file) for _, file in modules() for name in imported(file) if name.partition(".")[0] == library}
    allowed = SOLE_IMPORTERS[library]
    assert {user for user in users if not {user, user.partition(".")[0]} & allowed} == set()
    assert all(any(user == place or user.startswith(f"{place}.") for user in users) for place in allowed)


def test_only_the_transport_opens_connections() -> None:
    names = {name for module, file in modules() if module != "transport" for name in imported(file)}
    assert {name for name in names if name.startswith("aiohttp")} <= {"aiohttp.web"}


def test_the_command_line_starts_without_anything_heavy() -> None:
    heavy = (
        "pyarrow",
        "aiohttp",
        "jinja2",
        "msgspec",
        "tqdm",
        "sqlite3",
        "genai_prices",
        "jsonschema_rs",
        "aiolimiter",
        "uvloop",
        "asyncio",
        "decimal",
        "ray",
    )
    code = f"import sys, batchrun.cli; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_servers_and_opentelemetry_load_on_demand() -> None:
    code = "import sys, batchrun.api; print('aiohttp.web' in sys.modules or 'opentelemetry' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"


def test_no_constructor_has_above_six_parameters() -> None:
    """More of them hide an object that belongs between."""
    for _, file in modules():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                parameters = len(node.args.args) + len(node.args.kwonlyargs) - 1  # self is not counted
                assert parameters <= 6, f"{file}:{node.lineno} has {parameters}"
