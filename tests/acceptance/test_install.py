"""What is installed: a base install is small, imports nothing else, and has the price list inside."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import batchrun as package
from batchrun.price_list import newest
from batchrun.simulator import SimulatorConfig
from tests.cli_process import KEY, KEY_ENV, write_job, write_rows
from tests.simulator_process import running_simulator

ROOT = Path(__file__).parents[2]
PACKAGES = 20


def installed_with(name: str) -> set[str]:
    """The package and all that it needs on this Python and system, without extras that nothing asks for."""
    needed, waiting = set[str](), [Requirement(name)]
    while waiting:
        wanted = waiting.pop()
        chosen = [f"{canonicalize_name(wanted.name)}[{extra}]" for extra in ("", *wanted.extras)]
        if needed.issuperset(chosen):
            continue
        needed.update(chosen)
        for requirement in map(Requirement, distribution(wanted.name).requires or ()):
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)
            ):
                waiting.append(requirement)
    return {each.partition("[")[0] for each in needed}


def test_a_base_install_has_few_packages() -> None:
    needed = installed_with("batchrun")
    assert len(needed) <= PACKAGES, sorted(needed)
    assert len(installed_with("batchrun[prices]")) > PACKAGES  # it counts what a package needs in its turn


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_simulator(SimulatorConfig(latency_s=0.0)) as simulator:
        yield simulator.url


def imported(*command: str | Path) -> set[str]:
    """The modules that the process imports, by their full names."""
    run = [sys.executable, "-X", "importtime", *command]
    ended = subprocess.run(run, env={**os.environ, KEY_ENV: KEY}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return {found[1] for found in re.finditer(r"^import time:.*\| +(\S+)$", ended.stderr, re.MULTILINE)}


@cache
def homes_of_modules() -> dict[str, set[str]]:
    """The installed packages by the top-level modules that they bring."""
    return {module: {canonicalize_name(home) for home in homes} for module, homes in packages_distributions().items()}


@pytest.mark.parametrize("what", ["import", "help", "run"])
def test_only_what_a_base_install_has_is_imported(what: str, url: str, tmp_path: Path) -> None:
    """Beside uvloop, which is used where it is installed. A complete run imports least."""
    job = write_job(tmp_path / "job.toml", url, write_rows(tmp_path / "in.jsonl", 3))
    command = "from batchrun.cli import main; main()"
    modules = {
        "import": lambda: imported("-c", "import batchrun"),
        "help": lambda: imported("-c", command, "--help"),
        "run": lambda: imported("-c", command, "run", job, "-o", tmp_path / "out"),
    }[what]()
    assert "batchrun" in modules
    assert ("pyarrow" in modules) == (what == "run")
    allowed, homes = installed_with("batchrun[uvloop]"), homes_of_modules()
    names = {module.partition(".")[0] for module in modules - imported("-c", "")}
    names.discard("typing_extensions")  # msgspec uses it where it is installed
    found = {name: homes[name] for name in names if name in homes}
    assert {module for module, packages in found.items() if not packages & allowed} == set()
    assert ("aiohttp" in modules) == (what == "run")
    assert not {"jinja2", "tqdm", "jsonschema_rs", "pyarrow.compute"} & modules
    if what == "run":
        again = imported("-c", command, "run", job, "-o", tmp_path / "out")
        assert not {"aiohttp", "uvloop"} & again


# -- the price list in it

SHOW = """
from batchrun.price_list.lookup import resolve
table = resolve("gpt-5-mini", {}, "2026-11-22", "https://api.openai.com")
print(table.tiers[0].input, table.source)
"""
WITHOUT = "import sys; sys.modules['genai_prices'] = None; "


def priced(code: str, *before: Path) -> str:
    """What `code` prints with these folders before the installed packages, or the error of a run."""
    path = os.pathsep.join(map(str, before))
    environ = {**os.environ, KEY_ENV: KEY, "PYTHONPATH": path}
    ended = subprocess.run([sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True)
    return (ended.stdout + ended.stderr).strip()


def other_version(folder: Path, version: str, old: str = "", new: str = "") -> Path:
    """A copy of the package with the prices that claims to be another version, with its list changed."""
    theirs = distribution("genai-prices")
    shutil.copytree(str(theirs.locate_file("genai_prices")), folder / "genai_prices")
    metadata = folder / f"genai_prices-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: genai-prices\nVersion: {version}\n")
    data = folder / "genai_prices" / "data.py"
    text = data.read_text()
    assert old in text
    data.write_text(text.replace(old, new))
    return folder


@pytest.mark.heavy
def test_a_newer_list_that_is_installed_counts(tmp_path: Path) -> None:
    newer = other_version(tmp_path, "0.2.10", "input_mtok=Decimal('0.25')", "input_mtok=Decimal('0.20')")
    assert priced(SHOW, newer) == "0.20 genai-prices 0.2.10"


def test_an_older_installed_list_does_not_count(tmp_path: Path) -> None:
    older = other_version(tmp_path, "0.1.9", "input_mtok=Decimal('0.25')", "input_mtok=Decimal('0.20')")
    assert priced(SHOW, older) == f"0.25 {newest.price_list().source}"


@pytest.mark.heavy
def test_a_price_list_of_unknown_form_is_reported(tmp_path: Path) -> None:
    strange = other_version(tmp_path, "9.0", "providers: list[Provider] = [", "vendors: list[Provider] = [")
    assert priced(SHOW, strange) == (
        f"0.25 {newest.price_list().source} (the form of 9.0, which is installed, is not known)"
    )


@pytest.mark.heavy
def test_a_tree_that_was_not_built_says_so(tmp_path: Path, url: str) -> None:
    """Also where it was built by a version with another shape of the list."""
    copy = tmp_path / "source"
    shutil.copytree(
        Path(package.__file__).parent, copy / "batchrun", ignore=shutil.ignore_patterns("data", "__pycache__")
    )
    assert priced(SHOW, copy) == f"0.25 {newest.price_list().source}"  # the installed package has it, too
    job = write_job(tmp_path / "job.toml", url, write_rows(tmp_path / "in.jsonl", 3))
    arguments = ["run", str(job), "-o", str(tmp_path / "out")]
    run = f"{WITHOUT}sys.argv[1:] = {arguments}; from batchrun.cli import main; main()"
    place = copy / "batchrun" / "price_list" / "data" / "prices.json"
    for _ in range(2):
        assert priced(run, copy).splitlines() == [
            f"Error: {place} is missing or of another version; build it: `pip install -e .` in the source tree"
        ]
        place.parent.mkdir(exist_ok=True)
        place.write_text("{}")


@pytest.mark.heavy
def test_a_wheel_has_the_list_and_its_licence(tmp_path: Path, url: str) -> None:
    """By way of the source distribution, which has neither."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    shutil.unpack_archive(sdist, tmp_path / "sdist")
    assert not list((tmp_path / "sdist").rglob("prices.json"))
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    data = site / "batchrun" / "price_list" / "data"
    assert {path.name: path.read_bytes() for path in data.iterdir()} == {
        path.name: path.read_bytes() for path in newest.BUILT_IN.parent.iterdir()
    }
    assert priced(WITHOUT + SHOW, site) == f"0.25 {newest.price_list().source}"
    assert str(site) in priced("import batchrun; print(batchrun.__file__)", site)
