# GNU make, Linux and macOS. Every variable can be set on the command line.
PYTHON ?= python3
VENV ?= .venv
# Versions that must not float; `make test CONSTRAINTS=` installs without.
CONSTRAINTS ?= constraints.txt
# Further options for every `pip install`.
PIP_OPTIONS ?=
# Two tests at a time; `make test PYTEST_OPTIONS=` runs one.
PYTEST_OPTIONS ?= -n 2 --dist worksteal

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALL := -m pip --disable-pip-version-check install --quiet $(PIP_OPTIONS)
INSTALL += $(if $(CONSTRAINTS),-c $(abspath $(CONSTRAINTS)))
SOURCES := flower_ext strategies baselines benchmarks tests tools

# A Flower home, port and Ray session of this command's own, removed when it ends.
# The path is short: Ray's sockets live below it. Workers are as urgent as the rest:
# at Ray's own niceness of 15 those of one test starve beside another test. None are
# started before they are needed: with a PYTHONPATH of their own, Ray would use no other.
define isolated
	home=$$(mktemp -d /tmp/flwr-XXXXXX); \
	trap 'rm -rf "$$home"' EXIT; \
	trap 'exit 130' HUP INT TERM; \
	port=$$($(PY) -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'); \
	FLWR_HOME="$$home" RAY_TMPDIR="$$home" RAY_ADDRESS=local RAY_worker_niceness=0 \
	RAY_prestart_worker_first_driver=0 \
	FLWR_LOCAL_SUPERLINK_HTTP_API_PORT="$$port" \
	FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_DISABLE_UPDATE_CHECK=1 \
	FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0
endef

.PHONY: help run report docs new-strategy test check lock release-check bench bench-simulation bench-gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

run: $(INSTALLED)  ## compare FedFish with FedAvg on images whose labels differ by client
	$(PY) -m flower_ext.data fetch fashion-mnist
	@results=results/fedfish-$$(date +%Y%m%d-%H%M%S); set -ex; \
	$(PY) -m flower_ext.runs.launch baselines/fedfish --num-supernodes 100 --progress --results $$results; \
	{ set +x; } 2> /dev/null; echo; \
	$(PY) baselines/fedfish/fedfish/words.py $$results

RESULTS ?= results
report: $(INSTALLED)  ## one HTML page of all results, or of those in RESULTS=
	$(PY) -m flower_ext.runs.report $(RESULTS)

# The same pages and settings for both; either builds the site.
DOCS ?= mkdocs
docs: $(INSTALLED)  ## build the documentation into site/, warnings are errors; DOCS=zensical
	$(PY) tools/docs_source.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/$(DOCS) build $(if $(filter mkdocs,$(DOCS)),--quiet,--config-file mkdocs.yml)
	@echo site/index.html

new-strategy: $(INSTALLED)  ## start a strategy from the template: make new-strategy NAME=my_idea
	@$(PY) tools/new_strategy.py "$(NAME)"

# One thread a test: with two tests at a time, threads of one wait for those of the other.
# Bytecode is kept, else every worker and every program of a test compiles all again.
test: $(INSTALLED)  ## run the whole test suite, Ray and SuperLink included
	@$(isolated) OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
	$(PY) -m pytest --durations=20 $(PYTEST_OPTIONS)

check: $(INSTALLED)  ## lint, check the format and the types
	$(VENV)/bin/ruff check $(wildcard $(SOURCES))
	$(VENV)/bin/ruff format --check $(wildcard $(SOURCES))
	$(VENV)/bin/mypy --strict
	$(VENV)/bin/mypy --strict tools/*.py tools/template/strategy.py

lock: $(INSTALLED)  ## note the versions of all packages here in lock.txt
	@(echo "# make CONSTRAINTS=lock.txt installs these; make lock wrote them."; \
	  $(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//') > lock.txt

# The wheel is built from the sdist, so that what is in it is in both.
release-check: $(INSTALLED)  ## build wheel and sdist, check them, test the wheel elsewhere
	rm -rf build dist
	$(PY) -m build --outdir dist
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents --package flower_ext --toplevel flower_ext dist/*.whl
	@for file in strategies/*.py; do \
	  $(PY) -m zipfile -l dist/*.whl | grep "^flower_ext/$$file " > /dev/null \
	    || { echo "error: the wheel lacks flower_ext/$$file"; exit 1; }; \
	done
	@out=$$(mktemp -d /tmp/flower-ext-XXXXXX); \
	trap 'rm -rf "$$out"' EXIT; \
	trap 'exit 130' HUP INT TERM; \
	set -ex; \
	$(PYTHON) -m venv "$$out/venv"; \
	"$$out/venv/bin/python" $(INSTALL) torch; \
	wheel=$$(ls "$$PWD"/dist/*.whl); \
	"$$out/venv/bin/python" $(INSTALL) "$$wheel[plot,tensorboard,dp,lora]" pytest pytest-xdist hypothesis; \
	cp -R tests pyproject.toml "$$out"; \
	cd "$$out"; \
	venv/bin/python -m pytest -m "not slow" $(PYTEST_OPTIONS) \
	  --ignore tests/test_architecture.py --ignore tests/test_packaging.py \
	  --ignore tests/test_docs.py --ignore tests/test_new_strategy.py \
	  --ignore tests/test_baselines.py --ignore tests/test_benchmarks.py  # these look at the checkout

bench: $(INSTALLED)  ## run the benchmarks one after the other
	@set -e; for file in $(filter-out benchmarks/simulation.py benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do \
	  echo "== $$file"; $(PY) "$$file"; \
	done

bench-simulation: $(INSTALLED)  ## time rounds of many virtual clients
	@$(isolated) $(PY) benchmarks/simulation.py

bench-gpu: $(INSTALLED)  ## time clients on a GPU and check what they compute there
	@$(isolated) $(PY) benchmarks/gpu.py

clean:  ## remove what the other targets made, except the results
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml $(wildcard $(CONSTRAINTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11: make PYTHON=python3.11"; \
	  exit 1; }
	@echo "Installing into $(VENV): this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PY) $(INSTALL) torch
	$(PY) $(INSTALL) -e ".[dev]"
	@touch $@
