# Everything a person types. `make demo` and `make test` need nothing but Python 3.11+ and make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
FETCH := $(BIN)/python -m pip --disable-pip-version-check --quiet
FOLDERS := cluster datasets trainers tune
PYTEST_ARGS ?=
RUN ?= runs/demo

.PHONY: help install install-test demo test test-fast test-bitsandbytes lab storm test-gpu-matrix check lint types layers format links golden structure pages site docs wheel pocket bench bench-tune bench-gpu gpu-bundle clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

# ---------------------------------------------------------------- installation

$(BIN)/python:
	@[[ -n "$(PYTHON)" ]] || { echo "dreamfleet needs Python 3.11 or newer: none found. On Debian or Ubuntu:" \
		"sudo apt-get install python3 python3-venv; or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing, or older than Python 3.11; name another: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: sudo apt-get install python3-venv" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

# torch comes first: DeepSpeed is a source package whose set-up imports it, so the rest is built without isolation.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing dreamfleet into $(VENV) (several minutes the first time)"
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) torch numpy
	DS_BUILD_OPS=0 PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	DS_BUILD_OPS=0 PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

install: $(VENV)/.installed ## .venv with dreamfleet and what it needs

install-test: $(VENV)/.installed-test ## the same with the test tools

# ---------------------------------------------------------------- running

# A new folder each time (runs/demo, runs/demo-2, ...): a run never overwrites another.
demo: $(VENV)/.installed ## learn the cat that ships, on a local Ray; pictures and a report at the end
	@folder="$(CURDIR)/$(RUN)"; n=1; while [[ -e "$$folder" ]]; do n=$$((n + 1)); folder="$(CURDIR)/$(RUN)-$$n"; done; \
	$(BIN)/dreamfleet train recipes/demo.yaml "output_dir=$$folder"

# A file's tests stay in one process, as its fixtures start servers. A process that a hang has ended is not started again.
IN_TWO := -n 2 --dist loadfile --max-worker-restart 0

test: $(VENV)/.installed-test ## every test of this machine, servers included (PYTEST_ARGS="-k plan -x")
	$(BIN)/python -m pytest $(IN_TWO) $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test ## the tests without servers and compilers: about four and a half minutes on two cores
	$(BIN)/python -m pytest $(IN_TWO) -m "not cluster and not lab and not s3 and not slow and not simulated_gpu and not gpu" $(PYTEST_ARGS)

# Apart from the rest: peft imports bitsandbytes wherever it finds it, in every process of the other tests.
test-bitsandbytes: $(VENV)/.installed-test ## the optimizers of bitsandbytes, on the CPU, which other tests skip
	@[[ -d .cache/bitsandbytes/bitsandbytes ]] || $(PIP) --no-deps --target .cache/bitsandbytes bitsandbytes
	PYTHONPATH=.cache/bitsandbytes $(BIN)/python -m pytest -q -k "8bit or paged" tests/trainers/optim/test_optimizer_registry.py

lab: $(VENV)/.installed-test ## every fault on a cluster of namespaces; results and docs/faults.md (root, half an hour)
	$(BIN)/python benchmarks/faults.py

storm: $(VENV)/.installed-test ## random faults on one run: MINUTES=60 EVERY=60 PAIRS=0 SEED=0 SLOWER=0 (root, twice the minutes)
	$(BIN)/python benchmarks/storm.py

test-gpu-matrix: $(VENV)/.installed-test ## every method, family and precision on a simulated GPU (`make test` has every pair of them)
	DREAMFLEET_GPU_MATRIX=1 $(BIN)/python -m pytest -m simulated_gpu $(PYTEST_ARGS)

check: lint types layers ## lint, types and import rules

lint: $(VENV)/.installed-test ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not follow the editable mapping: it is shown a tree of links in which the folders lie under their name.
types: links $(VENV)/.installed-test ## mypy over all folders
	$(BIN)/mypy build/types/dreamfleet

links:
	@mkdir -p build/types/dreamfleet
	@for f in $(FOLDERS); do ln -sfn ../../../$$f build/types/dreamfleet/$$f; done

layers: $(VENV)/.installed-test ## who may import whom
	$(BIN)/python -m pytest -q --durations=0 tests/repository/test_layers.py

golden: $(VENV)/.installed-test ## rewrite the recorded loss curves; read the diff before you commit it
	$(BIN)/python tests/support/golden.py --write

structure: $(VENV)/.installed ## print files, packages, import levels, cycles and lines of code
	$(BIN)/python docs/structure.py

pages: $(VENV)/.installed ## rewrite the generated pages: recipe reference, package diagram, examples, table of importers
	$(BIN)/python docs/write_recipes.py
	$(BIN)/python docs/structure.py --write
	$(BIN)/python docs/write_examples.py
	$(BIN)/python docs/write_imports.py

docs: pages site ## rewrite the generated pages and build the documentation site

# mkdocstrings reads the sources through the links that mypy is shown.
site: links $(VENV)/.installed-docs ## the documentation site in build/site; a broken link, anchor or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site: build/site/index.html; with search: $(BIN)/python -m http.server --directory build/site"

wheel: $(VENV)/.installed-test ## dist/dreamfleet-*.whl, the pocket model inside
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

pocket: $(VENV)/.installed ## train the small model that ships (hours on two cores, minutes on a GPU; resumes)
	$(BIN)/python examples/pocket/build.py

bench: $(VENV)/.installed ## every measurement in benchmarks/ that needs neither GPU nor root, one after the other
	@for script in $$(grep -l __main__ benchmarks/*.py | grep -Ev '/(gpu|faults|storm|scale|import_peers|preparation_nodes)'); do echo "== $$script"; $(BIN)/python "$$script"; done

bench-tune: $(VENV)/.installed ## what a search brings, and trials, packs and fleets per hour
	@for script in planted search_gain packing fleet; do echo "== $$script"; $(BIN)/python "benchmarks/$$script.py"; done

bench-gpu: $(VENV)/.installed ## memory and speed on this machine's GPU, predicted beside measured (minutes)
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/gpu_packing.py

# For a GPU machine with torch and transformers but no network: the wheels that benchmarks/gpu.py needs besides.
GPU_PYTHON ?= 3.12
gpu-bundle: wheel ## build/gpu: wheels to carry to a GPU machine without a network; benchmarks/README.md says how
	rm -rf build/gpu && mkdir -p build/gpu
	cp dist/dreamfleet-*.whl build/gpu/
	$(FETCH) download --constraint constraints.txt --no-deps --dest build/gpu --python-version $(GPU_PYTHON) --only-binary=:all: \
		diffusers pydantic pydantic-core typing-inspection annotated-types hjson
	DS_BUILD_OPS=0 PYTHONWARNINGS=ignore $(FETCH) wheel --constraint constraints.txt --no-deps --no-build-isolation --wheel-dir build/gpu deepspeed
	@du -sh build/gpu

clean: ## what building leaves behind (keeps .venv and runs)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
