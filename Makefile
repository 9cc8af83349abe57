# make demo: set everything up in .venv, train on DATA (or synthetic lesions), name the report.
# make test: the same set-up, then the tests. Both are quick the second time.
# make lint, make format, make check-cuda: for developers; see CONTRIBUTING.md.

PYTHON ?= python3
VENV ?= .venv
# The version that the tests are run with; any from 2.10 on will do: make demo TORCH='torch>=2.10'
TORCH ?= torch==2.13.0
DATA ?=
EPOCHS ?= 15

BIN := $(VENV)/bin
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
RUN = runs/demo$(if $(DATA),-$(shell basename "$(DATA)"))
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test lint format check-cuda clean

demo: $(VENV)/.built
	$(BIN)/skinfast train --model cnn --output "$(RUN)" --data "$(or $(DATA),synthetic)" \
	  --epochs $(EPOCHS) $$(test -f "$(RUN)/config.json" && echo --resume)

# A worker for each core, and threads that do not spin while those of another worker compute.
test: $(VENV)/.built
	OMP_NUM_THREADS=2 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

$(VENV)/.dependencies: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "skinfast needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel cmake ninja pybind11
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) '$(TORCH)'
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "building skinfast's C++ and CUDA parts (about a minute)"
	$(PIP) --no-build-isolation --editable '.[test]'
	@$(BIN)/skinfast info
	touch $@

$(VENV)/.linters: $(VENV)/.built
	$(PIP) --no-build-isolation --editable '.[test,dev]'
	touch $@

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.cu' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.cu' '*.h' | xargs $(BIN)/clang-format -i

# Every CUDA kernel, compiled with nvcc; warnings and register spills are errors. CUTLASS is headers
# alone: what its package asks for is not needed.
check-cuda: $(VENV)/.dependencies
	$(PIP) --no-deps 'nvidia-cutlass>=4.2' || echo 'no nvidia-cutlass: tensor-core convolutions are left out'
	mkdir -p build && rm -rf build/*-strict
	SKINFAST_STRICT=ON $(BIN)/python setup.py --quiet build_ext --inplace > build/check_cuda.log 2>&1 \
	  || { tail -n 40 build/check_cuda.log; exit 1; }
	@grep -o "for 'sm_[0-9a-z]*'" build/check_cuda.log | sort | uniq -c | grep . \
	  && echo 'kernels compiled, no spills' \
	  || { echo 'no CUDA kernel was compiled; is nvcc on PATH?'; exit 1; }

clean:
	rm -rf build $(VENV) skinfast/*.so *.egg-info
