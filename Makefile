# Everything happens in .venv; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp)
ALL_CPP := $(SOURCES) $(wildcard csrc/*/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-heavy lint format bench report docs bench-peers precision check gpu sanitize fuzz clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: setup  ## Teach a small diffusion model a preference, on real images (about 2 or 3 minutes)
	$(BIN)/polydpo-fast demo $(ARGS)

# By file: fixtures of a module, such as compiled kernels, are made once.
PROCESSES ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
test: setup  ## Run the test suite, or ARGS="tests/test_loss.py -k mask", in PROCESSES=1 or more
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

test-heavy: setup  ## Run the long tests too: crashes, leaks, many seeds (minutes)
	$(BIN)/python -m pytest -m heavy --timeout 1800 $(ARGS)

lint: setup  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(ALL_CPP)
	$(BIN)/mypy

format: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(ALL_CPP)

bench: setup  ## Run the benchmarks, or SUITES="loss decode", and keep their results (an hour)
	$(BIN)/polydpo-fast bench $(SUITES) $(ARGS)

report: setup  ## Write docs/benchmarks.md, its plots and the README's tables from the results that are kept
	$(BIN)/python benchmarks/report.py

PEERS := build/peers
bench-peers: setup $(PEERS)/installed  ## Decoder, clips and loader beside their peers, such as OpenCV and DALI (1.5 GB)
	$(BIN)/python scripts/link_ffmpeg.py $(PEERS)/ffmpeg
	PYTHONPATH=$(PEERS) LD_LIBRARY_PATH=$(CURDIR)/$(PEERS)/ffmpeg $(BIN)/polydpo-fast bench $(or $(SUITES),decode clips loader) $(ARGS)

$(PEERS)/installed:
	$(BIN)/python -m pip install -q --target $(PEERS) opencv-python-headless==5.0.0.93 simplejpeg==1.9.0 \
		imagecodecs==2026.3.6 spdl==0.8.0 spdl-io==0.8.0 nvidia-dali-cuda120==2.4.0 decord2==3.4.0 webdataset==1.0.2
	# Without its dependencies, which are gigabytes: those that reading local shards needs.
	$(BIN)/python -m pip install -q --target $(PEERS) --no-deps mosaicml-streaming==0.13.0 xxhash==4.1.0 \
		zstandard==0.25.0 zstd==1.5.7.2 brotli==1.2.1 python-snappy==0.7.3 cramjam==2.14.0 catalogue==2.0.10
	# The last one that loads without CUDA.
	$(BIN)/python -m pip install -q --target $(PEERS) --no-deps torchcodec==0.13.0
	touch $@

precision: setup  ## Print how much of a logit survives, here and in other scripts
	$(BIN)/python benchmarks/precision.py

setup: $(VENV)/built  ## Install what is missing and build; the other targets do it by themselves

$(VENV)/installed: pyproject.toml constraints.txt scripts/system-packages.sh
	@! command -v $(PYTHON) >/dev/null || $(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit( \
		"make wants Python 3.11 or later, as constraints.txt does (make PYTHON=python3.12 ...); pip install . wants 3.10")'
	PYTHON=$(PYTHON) sh scripts/system-packages.sh
	@echo "Setting up $(VENV)"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel pybind11
	touch $@

$(VENV)/built: $(VENV)/installed setup.py $(SOURCES)
	@echo "Building the extension and installing the dependencies"
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

check: setup  ## Hold losses, decoding and loading against references on this machine (under a minute)
	$(BIN)/polydpo-fast check $(ARGS)

gpu:  ## On a machine with a GPU, with what it has: tests, check and benchmark of the losses (8 minutes at most)
	@for python in $(PYTHON) $(BIN)/python; do $$python -c 'import torch' 2>/dev/null && break; python=$(PYTHON); done; \
	$$python scripts/gpu.py

docs: setup  ## Build the documentation, strictly, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

sanitize: setup  ## Run the C++ under AddressSanitizer, UBSan and ThreadSanitizer (minutes)
	sh scripts/sanitize.sh $(BIN)

fuzz: setup  ## Fuzz the decoders, SECONDS=60 each (needs clang)
	sh scripts/fuzz.sh $(BIN) $(or $(SECONDS),60)

clean:  ## Remove what was built, and the virtual environment
	rm -rf $(VENV) build dist *.egg-info polydpo_fast/*.so demo-output
