# `make demo` and `make test` are all a newcomer needs; both build the environment first.
PYTHON ?= python3
# The build that pip finds for this machine. Set TORCH to another requirement to choose one.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export ORT_DISABLE_TELEMETRY := 1
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help

.PHONY: help
help: ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: env
env: $(VENV)/.ready ## build the environment in .venv

# The compiled part of the server is built by the install, so its source is one of the reasons for one.
$(VENV)/.ready: pyproject.toml hatch_build.py $(wildcard server/conveyor_server/_turn*.p?[xi])
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Conveyor needs Python 3.11 or newer; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing packages (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@$(BIN)/python -c 'from conveyor_server.compiled import BUILT; BUILT or print("no C compiler, or no headers of Python: the server does without its compiled part, and the tests that need it will fail")'
	touch $@

.PHONY: demo
demo: env ## train, export, serve and stream two small models
	$(BIN)/python -m examples.demo

.PHONY: test
test: env ## all tests; those under faults by themselves, because they fill the machine
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/fault
	$(BIN)/python -m pytest tests/fault

MINUTES ?= 30
.PHONY: soak
soak: env ## sessions under faults for MINUTES=30; SEED=... draws the same faults again
	$(BIN)/python -m tests.fault.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

INPUTS ?= 1000000
.PHONY: fuzz
fuzz: env ## every decoder with INPUTS=1000000 inputs that look for what none has reached; SEED=... draws them again
	$(BIN)/python -m tests.fuzz.fuzz --inputs $(INPUTS) $(if $(SEED),--seed $(SEED))

.PHONY: check
check: env ## static checks: ruff, mypy strict, import-linter, stubs fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m proto.generate --check

.PHONY: docs
docs: env ## build the documentation site into build/site; links that lead nowhere are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: stubs
stubs: env ## regenerate proto/conveyor_proto from the .proto files
	$(BIN)/python -m proto.generate

.PHONY: format
format: env ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: env ## the figures of docs/performance.md, as ratios of one run (some 12 minutes)
	$(BIN)/python -m benchmarks.bench

.PHONY: bench-open bench-idle bench-ragged bench-churn bench-workers bench-inference bench-durability bench-all
bench-open: env ## open loop: latency at shares of the closed loop's rate, refusals beyond it
	$(BIN)/python -m benchmarks.open_loop
bench-idle: env ## memory of 100,000 idle sessions and of 10,000 silent streams
	$(BIN)/python -m benchmarks.idle
bench-ragged: env ## single tokens beside prompts of 512
	$(BIN)/python -m benchmarks.ragged
bench-churn: env ## half an hour of cut connections: memory over time
	$(BIN)/python -m benchmarks.churn
bench-workers: env ## one, two and more workers
	$(BIN)/python -m benchmarks.workers
bench-inference: env ## what a request of the Open Inference Protocol costs
	$(BIN)/python -m benchmarks.inference
bench-durability: env ## what a store costs a token, and a session that is in it alone
	$(BIN)/python -m benchmarks.durability
bench-all: bench bench-open bench-idle bench-ragged bench-workers bench-inference bench-durability bench-churn ## all of them

# A load as make bench names it: GROUP/TARGET.
CASE ?= streams/full
.PHONY: profile
profile: env ## a flame graph of the server under load; CASE=frames-1/full and the like
	$(BIN)/python -m benchmarks.profile --case $(CASE)

.PHONY: gpu-check
gpu-check: env ## on a machine with CUDA: parity, batch independence, no host copies, speed against cuDNN
	$(BIN)/python -m benchmarks.gpu_check

# SMOKE="--without grafana" where its image cannot be had; SMOKE=--demo for the demo's profile too.
.PHONY: compose-smoke
compose-smoke: env ## where Docker is: build docker-compose.yml, run it, kill a server under load
	$(BIN)/python -m deploy.smoke $(SMOKE)

.PHONY: clean
clean: ## remove the environment and caches, keep models/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build server/conveyor_server/*.so
