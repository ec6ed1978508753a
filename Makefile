# `make` lists the targets. Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DEMO   ?= demo
comma  := ,
TARGET := $(shell case `uname -m` in (x86_64) echo x86;; (aarch64|arm64) echo arm;; (*) echo portable;; esac)

.PHONY: help demo test test-slow check format base-size bench kernels-asan kernels-arm test-arm wheels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.convert ## compress, export, profile and ask a real language model
	$(BIN)/edgekit compress smollm2-135m -o $(DEMO)/small -r int4 --force
	$(BIN)/edgekit export $(DEMO)/small -o $(DEMO)/small.$(TARGET) --target $(TARGET) --force
	$(BIN)/edgekit profile $(DEMO)/small.$(TARGET) -o $(DEMO)/profile.json
	$(BIN)/edgekit run $(DEMO)/small.$(TARGET) "What is the capital of France?"

test: $(VENV)/.dev ## the tests that need no model and no torch: under three minutes on 2 cores
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/.full ## the real model, against torch and transformers, and long runs
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev ## format, lint, types, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_docs.py

format: $(VENV)/.dev ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

base-size: $(VENV)/.convert ## fail when the base install downloads 60 MB or more
	@rm -rf build/base && mkdir -p build/base
	@$(PIP) download --quiet --dest build/base --constraint constraints.txt .
	@bytes=`du --bytes --summarize build/base | cut -f1`; echo "base install: $$bytes bytes"; test $$bytes -lt 60000000

bench: $(VENV)/.bench ## measure us and the peers in one run
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/quant.py
	$(BIN)/python benchmarks/profiler.py

SANITIZE = cmake -S . -B build/$(1) -DEDGEKIT_DRIVER=ON -DEDGEKIT_STRICT=ON -DEDGEKIT_SANITIZE=$(2) && \
	cmake --build build/$(1) --parallel 2
PRELOAD = LD_PRELOAD="`c++ -print-file-name=libasan.so` `c++ -print-file-name=libubsan.so`" ASAN_OPTIONS=detect_leaks=0

kernels-asan: $(VENV)/.dev ## run the kernels under the address, undefined and thread sanitizers (GCC)
	$(call SANITIZE,kernels-asan,address$(comma)undefined)
	build/kernels-asan/driver full
	@# A weak function of one path could end up in all: the linker keeps one copy.
	@! nm `find build/kernels-asan -name 'path_*.o'` | grep ' W '
	$(PRELOAD) EDGEKIT_KERNELS=build/kernels-asan/_edgekit_kernels.so $(BIN)/python -m pytest \
		tests/test_kernels.py tests/test_kernel_errors.py tests/test_library.py tests/test_whole_cache.py tests/test_sparse.py \
		tests/test_peak.py
	$(call SANITIZE,kernels-tsan,thread)
	build/kernels-tsan/driver threads

kernels-arm: $(VENV)/.cross ## compile the kernels for Arm and run each path on emulated processors
	$(BIN)/python tests/native/arm.py build/kernels-arm

test-arm: $(VENV)/.cross ## the same answer as here on emulated Arm processors (mmdebstrap, qemu-user-static)
	$(BIN)/edgekit compress smollm2-135m -o build/arm64/small -r int4 --force
	$(BIN)/edgekit export build/arm64/small -o build/arm64/small.arm --target arm --device pi5 --force
	$(BIN)/python tests/native/emulated.py build/arm64/small.arm build/arm64

wheels: $(VENV)/.cross ## wheels for x86-64 and 64-bit Arm, compiled by zig, into build/wheels
	$(BIN)/python -m edgekit.export.wheel build/wheels

clean: ## remove what the targets made
	rm -rf $(VENV) $(DEMO) build dist .mypy_cache .ruff_cache .pytest_cache

# One stamp an extra, so that nothing is installed twice.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

$(VENV)/.convert: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[convert]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.convert

$(VENV)/.full: $(VENV)/.dev
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,compress]' accelerate
	@touch $@

# GCC 12 drops stores that configure the matrix unit in llama.cpp, which then crashes where there is one.
$(VENV)/.bench: $(VENV)/.full
	CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-dse -fno-tree-dse'" $(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

$(VENV)/.cross: $(VENV)/.dev
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,cross]'
	@touch $@
