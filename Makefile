# make demo    install, then pre-train and fine-tune a tiny BERT on text that ships with Python
# make test    install, then run the tests
# make help    all targets

PYTHON ?= python3
VENV   ?= .venv
# A torch that is already there or satisfies pyproject.toml may be named here: make TORCH=torch==2.9.1 demo
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-cluster test-all certify bench gpu-kit check docs format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## install zerobert with its test tools into .venv

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test,dev,docs]"
	@touch $@

demo: install ## raw text -> pre-training on 2 ranks -> fine-tuning -> report, under runs/demo
	$(BIN)/zerobert demo

# one per core, four at most: most tests start ranks of their own
WORKERS := --numprocesses=logical --maxprocesses=4 --no-loadscope-reorder

# commands that the tests start would compile the package anew, each of them
test test-all test-cluster: export PYTHONDONTWRITEBYTECODE :=

test: install check ## lint, type check and the fast tests
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

CLUSTER_PACKAGES := slurm-wlm munge pdsh openssh-server openssh-client iproute2 procps

test-cluster: install ## runs on two nodes on this machine, by SLURM and by SSH; as root on Debian it installs both
	@{ PATH="$$PATH:/usr/sbin"; command -v slurmctld && command -v pdsh && command -v sshd && command -v ip; } >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends $(CLUSTER_PACKAGES); } || echo "can't install $(CLUSTER_PACKAGES) here"
	$(BIN)/python -m pytest tests/cluster

test-all: install check ## every test, the slow ones too
	$(BIN)/python -m pytest

certify: install ## kill -9 runs at random moments, resume them in other layouts, prove that nothing changes
	$(BIN)/zerobert certify

bench: install ## every benchmark against its peers, with pictures, under runs/bench: hours; BENCH="--quick" for minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	$(BIN)/python -m benchmarks.all $(BENCH)

gpu-kit: install ## a folder that proves and measures this on a GPU machine without a network: build/gpu-kit/run.sh
	$(BIN)/python -m benchmarks.proof.kit $(KIT)

check: install docs ## ruff, mypy, clang-format and the documentation, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@git ls-files '*.c' '*.cc' '*.cpp' '*.cu' '*.cuh' '*.h' | xargs -r $(BIN)/clang-format --dry-run --Werror

docs: install ## build the documentation into build/docs; broken links and missing pages fail
	$(BIN)/mkdocs build --strict

format: install ## apply ruff's and clang-format's layout
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	@git ls-files '*.c' '*.cc' '*.cpp' '*.cu' '*.cuh' '*.h' | xargs -r $(BIN)/clang-format -i

clean: ## remove the virtual environment and what the demo made
	rm -rf $(VENV) runs build *.egg-info
