# `make demo` and `make test` set up everything they need in .venv and run on any machine with Python and two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all soak lint clean

demo: $(READY)
	$(BIN)/python -m parallel_backend demo --devices cpu --out demo.png --report demo.json

test: lint
	-$(BIN)/python benchmarks/round_trip.py --steps 5
	$(BIN)/python -m pytest -n 2 -m "not thorough"

# Also every layout in every test of one, every kind of fault at every moment, and pictures in the sizes as shipped.
test-all: lint
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n 2

# 200 prompts on a real ComfyUI server with a fault in every fifth; soak.json has what came of it. With
# HYBRID_DIT_SOAK_LEAK=1024, of which a rank keeps that many KiB a picture, it has to fail.
soak: $(READY)
	HYBRID_DIT_SOAK=200 HYBRID_DIT_SOAK_REPORT=soak.json HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -s tests/faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo.png demo.json soak.json
