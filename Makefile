# make demo and make test install what they need into .venv and run.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test torture check fix docs bench gpu-check gpu-bench clean

demo: $(INSTALLED)
	$(BIN)/nibble demo

test: $(INSTALLED)-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

# Forty minutes at most on two cores: kills, mutations, races and fuzz in full; prints the figures.
torture: $(INSTALLED)-test
	NIBBLE_TORTURE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m torture -rP --timeout 2400 --durations 20

check: $(INSTALLED)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_structure.py
	$(BIN)/python tools/make_docs.py --check
	$(BIN)/python tools/compile_triton.py --check

fix: $(INSTALLED)-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)-test
	$(BIN)/python tools/make_docs.py

bench: $(INSTALLED)-test
	$(BIN)/python benchmarks/nf4_cpu.py
	$(BIN)/python benchmarks/cpu_attention.py
	$(BIN)/python benchmarks/vs_peers.py
	$(BIN)/python benchmarks/memory_by_length.py
	$(BIN)/python benchmarks/held_out_loss.py

# Eight minutes at most on one GPU: the tests marked gpu, the main job, kernels, then the planner.
gpu-check:
	python3 -m pytest -m gpu
	python3 -m nibble demo
	python3 benchmarks/triton_kernels.py --write
	python3 benchmarks/plan_accuracy.py --write

# Two commands, ten minutes at most each: memory of 7B to 70B, then an 8B beside the peers.
gpu-bench:
	python3 benchmarks/gpu_memory.py --write
	python3 benchmarks/vs_peers.py --layers 32 --width 4096 --intermediate 14336 --heads 32 \
		--kv-heads 8 --vocabulary 128256 --tokens 2048 8192 --rounds 5 --write

clean:
	rm -rf .venv build dist *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(INSTALLED)-test: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
