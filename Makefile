# make demo | make test | make bench: each sets up its own .venv and needs nothing but Python >= 3.10.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo test test-slow bench check clean
help:
	@echo "make demo       train duo_predict on the built-in corpus, show a sample and a plot (a minute on 2 CPU cores)"
	@echo "make test       the default tests"
	@echo "make test-slow  the long ones too"
	@echo "make bench      speed and memory of training, variant by variant, into benchmarks/results/ (minutes on 2 CPU cores)"
	@echo "make check      formatting, lint, types and the layout"

install: $(VENV)/.installed

# On a CPU machine torch comes first and as its CPU build: one that lies on the machine, else PyTorch's own index;
# a plain `torch` from PyPI pulls gigabytes of CUDA. On a CUDA machine it is the build that NVIDIA's driver can run.
$(VENV)/.installed: setup.py Makefile gpt2_variants/nvidia.py
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; Python >= 3.10 is needed (make PYTHON=/path/to/python ...)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is `$(PYTHON) -V 2>&1`; Python >= 3.10 is needed (make PYTHON=/path/to/python ...)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; install it (Debian: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; some minutes)"
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
	    torch=`$(BIN)/python gpt2_variants/nvidia.py` || exit 1; \
	    $(BIN)/pip install -q $$torch \
	    || { echo "PyTorch's index has failed: taking torch from where pip looks by default"; $(BIN)/pip install -q 'torch>=2.11'; }; \
	elif $(BIN)/python -c 'import torch' 2>/dev/null; then :; \
	else \
	    $(BIN)/pip install -q 'torch==2.13.0+cpu' 2>/dev/null \
	    || $(BIN)/pip install -q 'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	    || $(BIN)/pip install -q 'torch==2.13.0'; \
	fi
	@$(BIN)/pip install -q -e '.[wandb,plot]'
	@touch $@

# What the tests alone need; transformers imports some of it wherever it finds it, so that a training starts later.
$(VENV)/.installed-for-tests: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV) (once)"
	@$(BIN)/pip install -q -e '.[wandb,plot,dev]'
	@touch $@

# No network is touched: --report_to none, the corpus is Python's own documentation, the tokenizer is trained on it.
# 300 of the preset's 400 steps: enough for a curve and a sample, in less than a minute.
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: install
	$(BIN)/python train_ds.py --variant duo_predict --preset demo --max_steps 300 --report_to none --output_dir $(OUT) $(ARGS)

test: $(VENV)/.installed-for-tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests

test-slow: $(VENV)/.installed-for-tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

# ARGS="--compare": the references too.
bench: install
	$(BIN)/python benchmarks/throughput.py $(ARGS)

check: $(VENV)/.installed-for-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

clean:
	rm -rf $(VENV) build *.egg-info
