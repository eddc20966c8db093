# Every target sets the machine up first (contrib/setup.sh: a blink when there is nothing to do); as root.
SHELL := /bin/bash
BIN := .venv/bin
# Each file's tests in one of two processes, in the order of the files: what is below fails first.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: help demo test quick soak lint conformance bench proto wheel pages clean

help:
	@echo 'make demo         mount a real image lazily from a real registry, and print what it cost'
	@echo 'make test         lint, types, import contracts and the whole test suite, in two processes'
	@echo 'make quick        the same without what mounts, runs containers or is slow: a minute'
	@echo 'make soak         the long forms of the tests of faults, which print figures; SOAK=0.1 is a tenth of them'
	@echo 'make conformance  the suite of containerd for snapshotters, against a daemon of ours; needs Go'
	@echo 'make lint         lint, types and import contracts alone'
	@echo 'make bench        how soon images start, as JSON and plots in bench/results; BENCH=full: every figure'
	@echo 'make proto        the stubs of src/nsfs/serve/proto and of the tests, after a change there'
	@echo 'make wheel        dist/nsfs-*.whl'
	@echo 'make pages        manual pages and completions, in dist/'

demo:
	@contrib/setup.sh
	@$(BIN)/python -m bench.demo

test: lint
	@$(BIN)/pytest $(BESIDE)

quick: lint
	@$(BIN)/pytest $(BESIDE) -m 'not slow' $(addprefix tests/,t0_model t1_format t2_store t3_core)

soak:
	@contrib/setup.sh
	@$(BIN)/pytest -s -m soak

lint:
	@contrib/setup.sh
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

conformance:
	@contrib/setup.sh
	@$(BIN)/pytest -q -s tests/t5_containerd/test_conformance.py

bench:
	@contrib/setup.sh
	@$(BIN)/python -m bench

# The stubs are checked in: whoever installs nsfs needs no compiler for them.
proto:
	@contrib/setup.sh
	@$(BIN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src src/nsfs/serve/proto/*.proto
	@$(BIN)/python -m grpc_tools.protoc -Itests --python_out=tests --pyi_out=tests tests/cri_api.proto

wheel:
	@contrib/setup.sh
	@$(BIN)/pip wheel -q --no-deps -w dist .

pages:
	@contrib/setup.sh
	@contrib/pages.sh dist

clean:
	rm -rf dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
