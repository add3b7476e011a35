# Python 3.11 is the only requirement: the first target that needs it
# creates .venv from pyproject.toml and constraints.txt.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell \
	$(p) -c 'import sys, venv; print("$(p)") if sys.version_info >= (3, 11) else None' 2>/dev/null)))
VENV := .venv
RUN := $(VENV)/bin/python
CHECKED := kda_ops lowering tests perf
HISTORY := perf/history
TRAINED = $(lastword $(sort $(wildcard $(HISTORY)/h200/training/*.json)))
OVERVIEW := $(HISTORY)/h200/2026-11-27-must.json  # the newest run with all rows of the picture

.PHONY: help demo test check docs format format-check lint types wheel-check nixl test-nixl test-gpu perf perf-compare perf-report clean

help:
	@echo 'make demo           compile a Kimi Linear layer, prefill a text and decode, checked against fp64'
	@echo 'make test           all tests that need no GPU (ARGS="-k gate" for some of them)'
	@echo 'make docs           the documentation, into build/site'
	@echo 'make check          format, lint, types, docs, tests; after make nixl wheel-check, everything that continuous integration runs'
	@echo 'make format         rewrite the sources in the one format'
	@echo 'make nixl           install NIXL (Linux, 70 MB): make test then also runs the transfers over it'
	@echo 'make test-nixl      only the transfers over NIXL'
	@echo 'make test-gpu       the same cases on a CUDA device'
	@echo 'make perf           benchmarks on a CUDA device against flash-linear-attention'
	@echo 'make perf-compare   fails if the newest run is 5 % worse than the committed ones (FILE=one.json)'
	@echo 'make perf-report    tables and pictures of the documentation from the runs in perf/history/h200'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; name it with PYTHON=...))
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.perf-installed: $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[perf]'
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/.installed
	$(RUN) -m kda_ops demo $(ARGS)

test: $(VENV)/.installed
	$(RUN) -m tests $(ARGS)

format-check: $(VENV)/.installed
	$(RUN) -m ruff format --check $(CHECKED)

lint: $(VENV)/.installed
	$(RUN) -m ruff check $(CHECKED)

types: $(VENV)/.installed
	$(RUN) -m mypy

docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

check: format-check lint types docs
	$(RUN) -m tests

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix --select I $(CHECKED)
	$(RUN) -m ruff format $(CHECKED)

wheel-check: $(VENV)/.installed
	rm -rf build/wheel
	$(RUN) -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir build/wheel .
	$(RUN) -m tests.support.wheel build/wheel

# --no-deps: the meta-package requires the libraries of all CUDA versions
$(VENV)/.nixl-installed: $(VENV)/.installed
	cuda=$$($(RUN) -c 'import torch; print((torch.version.cuda or "12").split(".")[0])') && \
	$(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt --no-deps nixl nixl-cu$$cuda
	$(RUN) -c 'import nixl._api'
	@touch $@

nixl: $(VENV)/.nixl-installed

test-nixl: $(VENV)/.nixl-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -p no:benchmark --nixl only tests $(ARGS)

test-gpu: $(VENV)/.installed
	$(RUN) -m tests --gpu $(ARGS)

# a whole run is saved with its GPU's runs, a partial one (ARGS="-k gate") in build/
perf: $(VENV)/.perf-installed
	@json="$(PERF_JSON)"; \
	if [ -z "$$json" ]; then json=$(if $(ARGS),build/perf.json,$$($(RUN) -m perf.harness.machine)); fi; \
	mkdir -p "$$(dirname "$$json")"; status=0; \
	$(RUN) -m pytest perf -q --durations=15 --benchmark-json="$$json" $(ARGS) || status=$$?; \
	$(RUN) -m perf.analysis.report "$$json" && echo "run saved in $$json" && exit $$status

perf-compare: $(VENV)/.perf-installed
	$(RUN) -m perf.analysis.compare $(FILE)

perf-report: $(VENV)/.perf-installed
	$(RUN) -m perf.analysis.report $(wildcard $(HISTORY)/h200/*.json) --page docs/performance.md --picture docs/assets/report.png \
		--training docs/training.md --training-picture docs/assets/training-report.png \
		--models docs/integrations.md --fla-layer docs/integrations-fla.md
	$(if $(TRAINED),$(RUN) -m perf.analysis.curve $(TRAINED) --page docs/training.md --picture docs/assets/training.png)
	$(RUN) -m perf.analysis.mesh --page docs/several-gpus.md
	$(RUN) -m perf.analysis.overview $(OVERVIEW) --svg docs/assets/overview.svg

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache
