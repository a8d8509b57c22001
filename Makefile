# Two commands: `make demo` (install into .venv and run the main job) and `make test` (lint and tests).
# Stamp files in .venv make both idempotent: what is installed already is not installed again.

PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
NATIVE := $(shell find ops -type f 2>/dev/null) $(wildcard CMakeLists.txt)

# .venv is used only where it is: no other Python environment leaks in.
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := demo
.PHONY: demo install test test-xrt lint format bench tables clean

demo: $(VENV)/.package  ## quantize the embedded model, compile it, generate, measure
	$(PY) -m unicorn_backend demo

install: $(VENV)/.package

# Threads that sleep instead of spinning: on a busy machine the tests take half the time.
test: lint  ## lint, then every test
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal

test-xrt:  ## the NPU runtime on the real XRT over a fake kernel driver, in a chroot (root; network the first time)
	tests/npu/xrt/run.sh

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find ops kernels -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cc' -o -name '*.hpp')

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find ops kernels -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cc' -o -name '*.hpp')

bench: $(VENV)/.package  ## rewrite benchmarks/results/ on this machine (takes long), then the README tables
	$(PY) benchmarks/decode.py
	$(PY) benchmarks/tables.py

tables: $(VENV)/.package
	$(PY) benchmarks/tables.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python has no venv: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# --no-compile: torch and transformers are thousands of files, of which few are imported; these are compiled then.
# torch first, and its CPU build: the configured index, else PyTorch's own, else whatever the index calls $(TORCH).
$(VENV)/.torch: $(VENV)/.created
	@echo "installing torch $(TORCH) (CPU)"
	@$(PIP) install -qq --no-compile "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install -qq --no-compile "torch==$(TORCH)+cpu" --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	  || $(PIP) install -qq --no-compile "torch==$(TORCH)"
	@touch $@

# The C++ extension is built by CMake and ninja, both from PyPI; only the compiler is the system's.
$(VENV)/.package: $(VENV)/.torch pyproject.toml $(NATIVE)
	@command -v $${CXX:-g++} >/dev/null || { echo "no C++ compiler: apt install g++"; exit 1; }
	@echo "installing the build tools and building unicorn_backend"
	@$(PIP) install -qq --no-compile "scikit-build-core>=0.10" "cmake>=3.24" ninja
	@$(PIP) install -qq --no-compile --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "installing the test tools"
	@$(PIP) install -qq --no-compile --no-build-isolation -e '.[dev]'
	@touch $@
