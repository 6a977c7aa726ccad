# `make demo` and `make test` need Python 3.10-3.13 and nothing else; both make .venv if it is not there.
# With a virtual environment of your own: `make test PYTHON_BIN=/path/to/python`.
PYTHON ?= python3
PYTHON_BIN ?= .venv/bin/python

.PHONY: demo test lint clean

demo: .venv/installed
	$(PYTHON_BIN) examples/quickstart.py

test: lint
	TRITON_INTERPRET=1 PTE_KERNELS=triton $(PYTHON_BIN) -m pytest -n 2 --dist worksteal tests/interpreted
	HF_HUB_OFFLINE=1 $(PYTHON_BIN) -m pytest -n 2 --dist worksteal tests

lint: .venv/installed
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .

# torch goes first and by its exact version: resolved together with the rest, pip may take a newer build for CUDA.
.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt torch
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,test]"
	touch .venv/installed

clean:
	rm -rf .venv .cache .pytest_cache .hypothesis .ruff_cache build dist *.egg-info outputs
