# `make demo` and `make test` set themselves up from nothing but Python (3.11 or newer) and make.
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
SINKS_STAMP := $(VENV)/.installed-sinks

BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.installed
MONITOR_STAMP := $(BENCH)/.installed-monitor

# One thread per worker: the workers are the parallelism, and sums come out in the same order everywhere.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --doctest-modules dyntune tests

# What `import dyntune` must not load: slow imports, and frameworks that only an extra brings.
HEAVY := matplotlib scipy.optimize pandas sklearn rich optuna safetensors lightning transformers stable_baselines3 gymnasium \
         tensorboard wandb mlflow trackio pyarrow cleanlab flwr

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full check bench bench-lr bench-monitor docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install into it; the others do so by themselves

demo: $(STAMP) ## a tour in a minute or two; writes dyntune-demo.html
	$(BIN)/dyntune demo

test: $(STAMP) ## the quick tests and every docstring example
	$(PYTEST) -m "not slow"

test-full: $(SINKS_STAMP) ## everything: also the slow tests, the notebooks, and trackers that only they need
	$(PYTEST)

check: $(STAMP) ## format, lint, types, floors of the architecture, a light and silent import
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -W error -c "import dyntune"
	@$(BIN)/python -c 'import sys, dyntune; found = sorted(set(sys.argv[1:]) & set(sys.modules)); \
	  sys.exit(f"import dyntune loads {found}: import them where they are used" if found else 0)' $(HEAVY)

bench: $(BENCH_STAMP) ## compare with the peers, in an environment of its own
	$(BENCH)/bin/python benchmarks/obstacles.py
	$(BENCH)/bin/python benchmarks/peers.py

bench-lr: $(BENCH_STAMP) ## judge suggest_lr and every learning-rate finder by real training; an hour of two cores
	$(BENCH)/bin/python -m pip install --quiet --no-deps -r benchmarks/lr/requirements.txt
	$(BENCH)/bin/python benchmarks/lr/sweep.py --status
	$(BENCH)/bin/python benchmarks/lr/evidence.py --half tune --jobs $(JOBS)
	$(BENCH)/bin/python benchmarks/lr/evidence.py --half test --seeds 8 --jobs $(JOBS)
	$(BENCH)/bin/python benchmarks/lr/evidence.py --half test --seeds 1 --max-gradients 100 --jobs $(JOBS)
	$(BENCH)/bin/python benchmarks/lr/evidence.py --half test --seeds 1 --max-gradients 400 --jobs $(JOBS)
	$(BENCH)/bin/python benchmarks/lr/baselines.py --half test --jobs $(JOBS)
	$(BENCH)/bin/python benchmarks/lr/baselines.py --half test --pack
	$(BENCH)/bin/python benchmarks/lr/ours.py --jobs $(JOBS)
	$(BENCH)/bin/python benchmarks/lr/figures.py
	$(BENCH)/bin/python benchmarks/tables.py

bench-monitor: $(STAMP) $(MONITOR_STAMP) ## what watching a training costs, beside the peers; twenty minutes of one core
	$(BENCH)/bin/python benchmarks/monitor_peers.py
	$(BIN)/python benchmarks/monitor_overhead.py; status=$$?; $(BIN)/python benchmarks/tables.py && exit $$status

docs: $(DOCS_STAMP) ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -M html docs docs/_build -W --keep-going

clean: ## remove caches and built files; the environments stay
	rm -rf build dist docs/_build docs/notebooks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch goes in first, by itself: it is the one large download, and a failure there should read as such.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dyntune needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

$(SINKS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[sinks]"
	@touch $@

# Nothing is resolved here: the peers' file pins all that they import, and one of them would bring another torch.
$(BENCH_STAMP): benchmarks/requirements-peers.txt pyproject.toml constraints.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt torch
	$(BENCH)/bin/python -m pip install --quiet --no-deps -r benchmarks/requirements-peers.txt
	$(BENCH)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

$(MONITOR_STAMP): benchmarks/requirements-monitor-peers.txt $(BENCH_STAMP)
	$(BENCH)/bin/python -m pip install --quiet --no-deps -r benchmarks/requirements-monitor-peers.txt
	@touch $@
