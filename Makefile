# Two commands do everything, set-up included: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Else each of the hundred processes that tests start would compile torch and Transformers for itself.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick lint docs oracles bench clean

demo: $(VENV)/.demo
	$(BIN)/halfbyte demo

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --few 2

lint: $(VENV)/.ready
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/pyright

# The site, into site/; a warning is an error. Nothing is fetched while it is built or read.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# GPTQModel's own kernels on our gptq and awq folders, in an environment of its own: its metadata asks for a newer torch than it needs.
oracles:
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/pip install -q -c constraints.txt torch
	.venv-oracles/bin/pip install -q -c constraints.txt -e '.[test]'
	.venv-oracles/bin/pip install -q -c constraints.txt -r tests/requirements-oracles.txt
	.venv-oracles/bin/pip install -q --no-deps --no-build-isolation gptqmodel==7.7.0
	GPTQMODEL_CPU_WORKERS=2 .venv-oracles/bin/python -m pytest tests/containers/test_gptqmodel_oracle.py

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/llama_quantize.py --llama-cpp $(BIN)/python

# The package alone, for the demo. Modules are compiled as they are first imported: pip would compile all of torch's and Transformers'.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt torch
	$(BIN)/pip install -q --no-compile -c constraints.txt -e .
	touch $@

# What tests need beside it: llama.cpp, which is built here, and the tools whose formats are checked.
$(VENV)/.ready: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oracles site
