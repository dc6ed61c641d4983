# Excimer's daily commands. `make run` and `make test` set up whatever is missing.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
SOURCES := $(wildcard src/excimer/_native/*.pyx src/excimer/_native/*.pxd csrc/*/*.c csrc/*/*.h)

.PHONY: setup run demo test check bench clean
setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml setup.py $(SOURCES)
	@PYTHON=$(PYTHON) VENV=$(VENV) sh tools/setup.sh
	@touch $@

run: setup
	@$(BIN)/excimer up
demo: setup
	@$(BIN)/excimer up --demo
test: setup
	@$(BIN)/python -m pytest
check: setup
	@sh tools/check.sh $(BIN)
bench: setup
	@$(BIN)/python -m bench
clean:
	rm -rf build $(VENV) src/*.egg-info src/excimer/_native/*.so src/excimer/_native/*.c
