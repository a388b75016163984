# `make demo` and `make test` need only Python and a network with PyPI; they make the environment they run in.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: demo test test-slow mutations check lint types release compat format train-sudoku train-sudoku-quick train-text train-text-quick train-heads notebook docs bench results clean

# torch first and alone: with it in place no other package's open range pulls a CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed        ## solve a Sudoku with the bundled model
	$(BIN)/prism sudoku

test: $(VENV)/.installed        ## the tests, about 4 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed       ## the laws of one family of models, and its line in the docs: make check FAMILY=llada
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --family "$(FAMILY)"
	$(BIN)/python -m pytest tests/test_examples.py::test_the_docs_list_every_family_with_its_facts

test-slow: $(VENV)/.installed   ## checks of whole programs: docs, wheel, launchers, pages in a browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

mutations: $(VENV)/.installed   ## which tests notice a mistake: chosen lines are broken one by one, in a copy
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py

lint: types     ## style, formatting, types and the downward-imports rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_imports.py

# mypy knows folders, not setuptools' mapping of schedulers/ into the package: it reads a folder of links.
types: $(VENV)/.installed       ## mypy on the package; a minute the first time
	rm -rf build/types && mkdir -p build/types/prism_pipelines
	ln -s $(CURDIR)/prism_pipelines/* $(CURDIR)/schedulers build/types/prism_pipelines/
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# Each in an environment of its own, below build/.
release: $(VENV)/.installed     ## sdist and wheel in dist/, and both demos by the wheel alone, from another folder
	rm -rf dist build/release && $(BIN)/python -m build
	$(PYTHON) -m venv build/release
	build/release/bin/pip install -q "$$(grep '^torch==' constraints.txt)"
	build/release/bin/pip install -q -c constraints.txt dist/*.whl
	build/release/bin/pip check
	cd build/release && bin/prism -q sudoku --json && bin/prism -q text --gen-length 32 --num-inference-steps 8

compat: ## the quick tests, or TESTS="tests/test_x.py ...", on the lowest versions that pyproject.toml declares
	test -x build/compat/bin/uv || { $(PYTHON) -m venv build/compat && build/compat/bin/pip install -q uv; }
	build/compat/bin/uv pip install -q --python build/compat/bin/python --resolution lowest-direct -e ".[dev]"
	OMP_NUM_THREADS=1 build/compat/bin/python -m pytest $(TESTS)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-sudoku: $(VENV)/.installed        ## a Sudoku model like the shipped one from nothing; hours on two cores, resumable
	BIN=$(BIN) RUNS=$(RUNS) examples/sudoku/train.sh

train-sudoku-quick: $(VENV)/.installed  ## the same stages, each cut short: a much weaker model
	BIN=$(BIN) RUNS=$(RUNS) examples/sudoku/train.sh --quick

train-text: $(VENV)/.installed          ## a text model like the shipped one from nothing; hours on one core, resumable
	BIN=$(BIN) RUNS=$(RUNS) examples/text/train.sh

train-text-quick: $(VENV)/.installed    ## the same stages, each cut short: a much weaker model
	BIN=$(BIN) RUNS=$(RUNS) examples/text/train.sh --quick

train-heads: $(VENV)/.installed         ## the heads that know the run, for both bundled models; resumable
	BIN=$(BIN) RUNS=$(RUNS) examples/bundled_heads.sh

notebook: $(VENV)/.installed    ## run examples/quickstart.ipynb from top to bottom
	$(BIN)/python -c "import nbclient, ipykernel" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e ".[notebook]"
	$(BIN)/python -m pytest tests/test_notebook.py -m "slow or not slow"

docs: $(VENV)/.installed        ## the site, in site/; a warning is an error
	$(BIN)/python -c "import mkdocstrings, material" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed       ## quality and cost tables; --quick forms finish in minutes
	$(BIN)/python -m benchmarks.sudoku_cost
	$(BIN)/python -m benchmarks.sudoku --quick
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sampling --gen-length 32 --repeats 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cache --shapes vocabulary --repeats 1
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training --quick
	$(BIN)/python -m benchmarks.text --quick

results: $(VENV)/.installed     ## docs/results.md and the tables of docs/performance.md from the committed tables, and the figures
	$(BIN)/python -m benchmarks.results
	$(BIN)/python -m benchmarks.performance
	$(BIN)/python -m benchmarks.figures

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
