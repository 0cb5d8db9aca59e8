# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-kernels test-integrations test-browser test-load clean

demo: .venv/demo
	$(BIN)/lastrerank demo

test: .venv/test
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/test
	$(BIN)/python -m bench.end_to_end --runs 3 --providers transformers-sdpa-float32 lastrerank-reference-float32 \
		lastrerank-native-float32 lastrerank-native-int8
	$(BIN)/python -m bench.memory

.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

bench-kernels: .venv/test
	$(BIN)/python -m bench.kernels

# The real libraries, in an environment of their own.
test-integrations: .venv-integrations/done
	.venv-integrations/bin/python -m pytest tests/integrations

# The page in a Chromium that is installed (BROWSER_PATH names another).
test-browser: .venv-integrations/done
	.venv-integrations/bin/python -m pytest tests/browser

# Loads on a running server, a minute each, and its memory over 10,000 requests.
test-load: .venv/test
	$(BIN)/python -m bench.load

.venv-integrations/done: pyproject.toml constraints.txt
	test -x .venv-integrations/bin/python || $(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet --constraint constraints.txt torch numpy
	.venv-integrations/bin/python -m pip install --quiet --editable '.[integrations]'
	touch $@

clean:
	rm -rf .venv .venv-integrations build dist
