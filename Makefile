# One command each; everything is made on first use. See README.md.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, venv, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard kernels/*.pyx kernels/*.h gateway/_kernels/*.pxd)

# Each file runs in one process, so that its servers are started once; in the files' order, which has those
# of many short tests last, so that both processes end at the same time.
PYTEST_SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

export ORT_DISABLE_TELEMETRY := 1
# Tests start hundreds of servers: not each of them is to compile the gateway's modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint types unit bench peers backend watermarks rollouts power build build-debug clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo  ## Serve the bundled digits and classify them over HTTP, until Ctrl-C.
	@$(BIN)/gateway demo

test: lint types unit  ## Build, lint, check types, run every test.

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: build build-debug
	$(BIN)/python -m pytest $(PYTEST_SPREAD) $(PYTEST_ARGS)

bench: build  ## Run the benchmarks; tables go to benchmarks/results/.
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/saturation.py
	$(BIN)/python benchmarks/idle.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/padding.py
	$(BIN)/python benchmarks/reload.py

peers: build  ## Measure other servers beside the gateway; installs them in benchmarks/.peers; takes an hour.
	$(BIN)/python benchmarks/peers.py

backend: build  ## Serve all of the onnx package's own tests of operators; takes minutes.
	$(BIN)/python tests/backend/run.py --write benchmarks/results/backend.md

watermarks: build  ## 100,000 requests that carry their number in every element, amid kills; takes minutes.
	$(BIN)/python tests/system/watermarks.py --requests 100000 --write benchmarks/results/watermarks.md

rollouts: build  ## 20 rollouts, kills of the supervisor and 100,000 requests of each split; takes minutes.
	$(BIN)/python benchmarks/rollouts.py

power: build  ## How often rollouts are wrong, by simulation; takes ten minutes.
	$(BIN)/python benchmarks/rollout_power.py

build: $(VENV)/.dev $(VENV)/.kernels  ## Build the kernels in place.

build-debug: $(VENV)/.kernels-debug

clean:  ## Remove everything that was made.
	rm -rf $(VENV) benchmarks/.peers build dist *.egg-info gateway/_kernels/*.so

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed" >&2; exit 1; }
	@echo "making the environment in $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml setup.py $(KERNELS) | $(VENV)/bin/python
	@echo "installing the gateway and building its kernels (a minute or two)"
	$(BIN)/python -m pip install --quiet --editable '.[cpu]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py | $(VENV)/bin/python
	@echo "installing the gateway and its development tools (a minute or two)"
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.kernels: setup.py $(KERNELS) | $(VENV)/.dev
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.kernels-debug: setup.py $(KERNELS) | $(VENV)/.dev
	GATEWAY_CYTHON_DEBUG=1 $(BIN)/python setup.py --quiet build_ext \
		--build-lib build/debug --build-temp build/debug-temp
	@touch $@
