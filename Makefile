# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-kernels clean

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

clean:
	rm -rf .venv build dist
