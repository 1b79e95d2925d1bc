# The two commands: `make demo` and `make test`. Both set up .venv on the first run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test lint wheel clean

$(VENV)/.base: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

# The published weights are gigabytes; until a small trained model ships, the demo makes a random checkpoint.
$(DEMO)/random.gguf: $(VENV)/.base
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/python -m auricle.tools.sample $(DEMO)/checkpoint
	$(BIN)/auricle convert $(DEMO)/checkpoint -o $@ --type q8_0

demo: $(DEMO)/random.gguf
	@echo "This model is small and its weights are random: it shows that everything runs, and what it says means nothing."
	$(BIN)/auricle transcribe tests/data/jfk.flac -m $(DEMO)/random.gguf --max-new-tokens 24

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --durations 10

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf build dist *.egg-info
