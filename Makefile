# SPDX-License-Identifier: Apache-2.0
#
#   make demo       set up, build, pretrain a small sparse LLM (about three minutes on two cores)
#   make test       set up, build, run every test that a CPU can run
#   make test-gpu   build and run the gpu tests with the interpreter at hand; writes tests/gpu_report.json
#   make bench      on a GPU: every benchmark, records into benchmarks/results/<gpu>; BENCH_ARGS="--quick --out DIR"
#   make sanitize   on a GPU: compute-sanitizer over the tests of the kernels; record in tests/
#   make stress     on a GPU: 100,000 mixed calls from two threads, memory watched; record in tests/
#   make lint       formatters, linters and type checks, nothing rewritten
#   make build      build the native libraries in place
#   make wheel      build a wheel into dist/
#   make clean      remove what the build made;  make demo-clean  forget the demo's run
#
# PYTHON=...        interpreter to start from; if it has a CUDA torch, that torch is used
# TORCH=...         what pip installs where it has none
# SLOPE_CUDA=...    AUTO (default), ON or OFF: compile the CUDA kernels

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
PYTEST_ARGS ?=

# "system" if PYTHON already has a torch that can use CUDA, else "own".
TORCH_FROM := $(shell $(PYTHON) -c "import torch; print('system' if torch.version.cuda else 'own')" 2>/dev/null || echo own)
# Its packages are then seen through a .pth file: venv's own flag sees nothing of a PYTHON in a venv.
SITE := "import sysconfig; print(sysconfig.get_path('purelib'))"
TORCH_SPEC := $(if $(filter own,$(TORCH_FROM)),'$(TORCH)')

BENCHES := compress prune transpose pack spmm spmm_native weight_grad adamw training memory host_overhead first_call
BENCH_ARGS ?=

.PHONY: demo test built-here test-gpu bench sanitize stress lint build wheel clean demo-clean
.DELETE_ON_ERROR:

# ---- environment and build -------------------------------------------------------------------------

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(if $(filter system,$(TORCH_FROM)),$(PYTHON) -c $(SITE) > $$($(BIN)/python -c $(SITE))/parent.pth)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --ignore-installed 'setuptools>=77' wheel 'cmake>=3.26' ninja pybind11
	$(if $(TORCH_SPEC),$(BIN)/python -m pip install -q $(TORCH_SPEC))
	SLOPE_CUDA=$(SLOPE_CUDA) $(BIN)/python -m pip install -q --no-build-isolation -e '.[pretrain,test,lint]'
	touch $@

NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt setup.py
BUILT := $(VENV)/.built$(SLOPE_CUDA)

$(BUILT): $(VENV)/.stamp $(NATIVE)
	SLOPE_CUDA=$(SLOPE_CUDA) $(BIN)/python setup.py -q build_ext --inplace
	rm -f $(VENV)/.built*
	touch $@

build: $(BUILT)

wheel: $(VENV)/.stamp
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

# ---- the two commands ------------------------------------------------------------------------------

demo: $(BUILT)
	$(BIN)/slope-pretrain --demo --output-dir $(DEMO_DIR)

test: $(BUILT)
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

# ---- on a machine with a GPU: the interpreter as it is ----------------------------------------------

built-here:
	$(PYTHON) setup.py -q build_ext --inplace

test-gpu: built-here
	PYTHONPATH=. $(PYTHON) scripts/gpu_report.py $(PYTEST_ARGS)

bench: built-here
	for name in $(BENCHES); do PYTHONPATH=.:benchmarks $(PYTHON) benchmarks/bench_$$name.py $(BENCH_ARGS) || exit 1; done

sanitize: built-here
	PYTHONPATH=. $(PYTHON) scripts/sanitize.py

stress: built-here
	PYTHONPATH=. $(PYTHON) scripts/stress.py --out tests/stress_report.json

# ---- quality ---------------------------------------------------------------------------------------

lint: $(VENV)/.stamp
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

clean:
	rm -rf build dist slope_ext/*.so *.egg-info $(VENV)/.built*

demo-clean:
	rm -rf $(DEMO_DIR)
