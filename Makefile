# Everything runs in .venv, which these targets make; nothing has to be installed before but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Text for the demo: empty means the sources of Python's standard library; else a file or folder of text.
TEXT ?=
PROMPT ?= def
# The checksum keeps two texts of one name apart.
NAME := $(if $(TEXT),$(notdir $(abspath $(TEXT)))-$(firstword $(shell echo "$(abspath $(TEXT))" | cksum)),stdlib)
RUN := runs/$(if $(TEXT),$(NAME),demo)
DATA := runs/data/$(NAME)
TESTS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels lint format types bench clean

help:
	@echo "make demo               train a small byte-level Mamba-2 on real text, evaluate, generate, export (TEXT=path for your own)"
	@echo "make test               the test suite, PyTorch parity included (TESTS='tests/ops -k ssd' for a part)"
	@echo "make test-kernels       kernels in Triton's interpreter, and compiled for GPUs and TPUs that need not be there (Python >= 3.12)"
	@echo "make lint types         ruff and mypy"
	@echo "make bench              speed beside PyTorch on this machine"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Use: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: $(VENV)/.run pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,torch,harness]'
	@touch $@

$(VENV)/.lint: $(VENV)/.run pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'
	@touch $@

demo: $(VENV)/.run
	@test -e $(DATA) || $(BIN)/python -m train.prepare_data $(if $(TEXT),"$(TEXT)",--python-stdlib) --out $(DATA) --seq-len 256
	@$(BIN)/python -m train.pretrain --config configs/run/demo.yaml output=$(RUN) data.path=$(DATA)
	@$(BIN)/python -m train.evaluate $(RUN)
	@$(BIN)/python -m train.report $(RUN)
	@$(BIN)/python -m train.convert $(RUN) $(RUN)/transformers --overwrite
	@echo; echo "The model continues '$(PROMPT)':"; echo
	@$(BIN)/python -m train.generate $(RUN) --prompt "$(PROMPT) " --max-new-tokens 400 --seed 1
	@echo; echo "Open $(RUN)/report.html. More text: $(BIN)/python -m train.generate $(RUN) --prompt 'class '"

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow and not triton and not compile" $(TESTS)

$(VENV)/.aot: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,aot]'
	@touch $@

# An environment of its own: make test-kernels VENV=.venv-kernels PYTHON=python3.12
test-kernels: $(VENV)/.aot
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "triton and not slow" tests/triton
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "compile and not slow" tests/compile

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.lint
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m benchmarks.mamba_cpu
	$(BIN)/python -m benchmarks.context
	$(BIN)/python -m benchmarks.overhead

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
