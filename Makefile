# The two commands: `make demo` and `make test`. Both set up .venv on the first run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test card lint wheel clean

$(VENV)/.base: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

# The model in the box knows spoken digits only; the recordings are of people, see tools/demo/README.md.
demo: $(VENV)/.base
	$(BIN)/auricle transcribe tools/demo/george.flac tools/demo/jackson.flac tools/demo/yweweler.flac -m demo
	$(BIN)/auricle transcribe tools/demo/george.flac -m demo --timestamps
	$(BIN)/auricle ask tools/demo/jackson.flac "How many digits are spoken?" -m demo

# Any order must do; this one is the same each time. `pytest` without the seed takes another.
test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --randomly-seed=14 --durations 10

# Is it right and fast on the GPU of this machine? Eight minutes; MINUTES=4 for less.
MINUTES ?= 8
card: $(VENV)/.dev
	$(BIN)/python benchmarks/card.py --out card --minutes $(MINUTES)

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf build dist *.egg-info
