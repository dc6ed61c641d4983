# Excimer's daily commands. `make run` and `make test` set up whatever is missing; `make help` lists all.
VENV   ?= .venv
PYTHON ?= python3
# TESTS: what to run, and with which options of pytest. JOBS: how many test files at once.
TESTS  ?=
JOBS   ?= 3
MINUTES ?= 30
# PG: which PostgreSQL `make regress` tries; REGRESS: options of `python -m tests.regress`.
PG      ?= 18
REGRESS ?=
# Options of `python -m tests.chaos`.
CHAOS  ?=

BIN     := $(VENV)/bin
NATIVE  := src/excimer/_native
SOURCES := $(wildcard $(NATIVE)/*.pyx $(NATIVE)/*.pxd $(NATIVE)/*.h \
             csrc/libhydrate/*.c csrc/libhydrate/*.h csrc/libhydrate/Makefile)
PYTEST  := $(BIN)/python -m pytest
# Whole files go to a worker, because their tests share servers; in the order collected, the long ones first.
PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A virtual environment does not work after its folder was moved or copied.
ifneq ($(shell cat $(VENV)/.place 2>/dev/null),$(abspath $(VENV)))
MOVED := moved
endif

.PHONY: help setup run demo test sweep chaos regress check findings bench clean moved
help:
	@echo 'make run     start everything and print a postgresql:// URL'
	@echo 'make demo    the same, then a walk through branching on real data'
	@echo 'make test    all tests; TESTS="tests/unit -k lsn" some of them; JOBS=1 one at a time'
	@echo 'make sweep   the tests that draw at random, at many times their usual length'
	@echo 'make chaos   random faults under load for MINUTES (30); CHAOS=--control: the same on stock PostgreSQL'
	@echo 'make regress  PostgreSQL'"'"'s own suites against an endpoint, then verify; PG=14..18; REGRESS=--control: on stock'
	@echo 'make check   lint, format, types, spelling, house rules'
	@echo 'make findings  what surprised us in outside software, tried again without Excimer'
	@echo 'make bench   measure against plain PostgreSQL'
	@echo 'make setup   only make $(VENV) and build the native parts'
	@echo 'make clean   remove what was built (not your data in .excimer)'
	@echo
	@echo 'Variables: VENV=$(VENV) PYTHON=$(PYTHON)'

setup: $(VENV)/.ready
moved: ;
$(VENV)/.packages: pyproject.toml setup.py $(MOVED)
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh tools/setup.sh packages
$(VENV)/.ready: $(VENV)/.packages $(SOURCES)
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh tools/setup.sh native

# A new installation gets a PostgreSQL with ICU and TLS, where one can be brought.
WHOLE = test -e "$${EXCIMER_DIR:-.excimer}/config.toml" || $(BIN)/excimer pg install 18 --if-lacking
run: setup
	@$(WHOLE)
	@$(BIN)/excimer up
demo: setup
	@$(WHOLE)
	@$(BIN)/excimer up --demo
test: setup
	@$(PYTEST) $(PARALLEL) $(TESTS)
sweep: setup
	@EXCIMER_AMPLIFICATION_FLUSHES=4000 EXCIMER_ENGINE_EXAMPLES=500 EXCIMER_FAULT_STRIDE=1 EXCIMER_GC_EXAMPLES=5000 EXCIMER_EXPORT_VERSIONS=14,15,16,17,18 EXCIMER_IMPORT_VERSIONS=14,15,16,17,18 EXCIMER_LOGICAL_VERSIONS=14,15,16,17,18 EXCIMER_PASSWORD_VERSIONS=14,15,16,17,18 EXCIMER_BACKUP_VERSIONS=14,15,16,17,18 EXCIMER_COLD_VERSIONS=14,15,16,17,18 EXCIMER_PUBLISHER_VERSIONS=14,15,16,17,18 EXCIMER_CACHE_VERSIONS=14,15,16,17,18 EXCIMER_REPLICA_VERSIONS=14,15,16,17,18 EXCIMER_SUSPEND_VERSIONS=14,15,16,17 EXCIMER_SUSPENDS=50 EXCIMER_UNLOGGED_VERSIONS=14,15,16,17,18 EXCIMER_VERIFY_VERSIONS=14,15,16,17,18 EXCIMER_REDO_DAMAGE_ROUNDS=100 \
	EXCIMER_CRASH_STRIDE=1 EXCIMER_GENERATION_SEEDS=3000 EXCIMER_NETWORK_SEEDS=100 EXCIMER_SIMULATION_SEEDS=50000 EXCIMER_TORTURE_ROUNDS=100 EXCIMER_TRUTH_LSNS=10 EXCIMER_TRUTH_PAGES=2000 \
	$(PYTEST) $(PARALLEL) -o timeout=7200 -o faulthandler_timeout=7200 $(TESTS)
chaos: setup
	@$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(CHAOS)
regress: setup
	@$(BIN)/python -m tests.regress --pg-version $(PG) $(REGRESS)
check: setup
	@sh tools/check.sh $(BIN)
findings:
	@for script in findings/*.sh; do echo "$$script"; bash "$$script" || exit 1; done
bench: setup
	@$(BIN)/python -m bench
clean:
	rm -rf build $(VENV) src/*.egg-info $(NATIVE)/*.so $(NATIVE)/*.c csrc/libhydrate/libhydrate.so
