# The front door. `make help` lists the targets; every target prints the one command that it runs.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a target needs installed: MindSpore only where it is asked for.
READY := $(VENV)/.ready$(if $(filter mindspore,$(BACKEND)),-mindspore)

# What a user sets: make finetune MODEL=qwen1_5_7b CARDS=8 ARGS="train.lr=1e-5 data.seq_length=4096"
export MODEL CARDS NODES NODE_RANK MASTER_ADDR MASTER_PORT BACKEND DEVICE WEIGHTS ADAPTER TOKENIZER DATA RUN OUTPUT A B LOGITS PORT ENGINE
# To the letter: a prompt may hold dollar signs that make would expand.
export QWEN_PROMPT := $(value PROMPT)
export PY := $(BIN)/python

TASKS := data pretrain finetune lora predict chat serve export lite merge weights convert split merge-shards reshard verify

.PHONY: help setup $(TASKS) ranktable test test-fast bench lint format clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  Variables: MODEL CARDS NODES NODE_RANK MASTER_ADDR MASTER_PORT BACKEND DEVICE WEIGHTS ADAPTER TOKENIZER'
	@echo '             DATA RUN OUTPUT PROMPT PORT ENGINE A B LOGITS, and ARGS="setting=value ..." for everything else'
	@echo '  Settings:  research/core/config/schema.py'

setup: $(READY) ## create .venv with the pinned requirements (every target does it by itself)

data: $(READY) ## tokenise, pack and audit a data set: make data DATA=alpaca_data.json MODEL=qwen2_5_7b TOKENIZER=folder
	@scripts/task.sh data $(ARGS)

pretrain: $(READY) ## train on plain text: make pretrain DATA=wikitext MODEL=qwen2_5_tiny
	@scripts/task.sh pretrain $(ARGS)

finetune: $(READY) ## train all weights on conversations; without variables: the quick start, nothing to download
	@scripts/task.sh finetune $(ARGS)

lora: $(READY) ## train a low-rank adapter: make lora MODEL=qwen2_5_0_5b DATA=alpaca_data.json
	@scripts/task.sh lora $(ARGS)

predict: $(READY) ## answer one prompt: make predict PROMPT='What is 47 plus 8?' [RUN=runs/...]
	@scripts/task.sh predict $(ARGS)

chat: $(READY) ## talk to a model, on the terminal or over a pipe
	@scripts/task.sh chat $(ARGS)

serve: $(READY) ## answer over HTTP as OpenAI's and TGI's servers do, with a chat page: make serve WEIGHTS=folder PORT=8000
	@scripts/task.sh serve $(ARGS)

export: $(READY) ## a run's newest checkpoint as a Hugging Face folder, or BACKEND=mindspore as MINDIR graphs: make export RUN=runs/... OUTPUT=folder
	@scripts/task.sh export $(ARGS)

lite: $(VENV)/.ready-mindspore ## answer a prompt with exported MINDIR graphs: make lite WEIGHTS=folder PROMPT='What is 47 plus 8?'
	@scripts/task.sh lite $(ARGS)

merge: $(READY) ## fold an adapter into its weights: make merge WEIGHTS=folder ADAPTER=folder OUTPUT=folder
	@scripts/task.sh merge $(ARGS)

weights: $(READY) ## fetch a released model, or link a local folder: make weights MODEL=qwen2_5_0_5b
	@scripts/task.sh weights $(ARGS)

convert: $(READY) ## between Hugging Face and MindFormers layouts: make convert WEIGHTS=folder OUTPUT=model.ckpt
	@scripts/task.sh convert $(ARGS)

split: $(READY) ## cut weights into tensor-parallel parts: make split WEIGHTS=folder OUTPUT=parts CARDS=4
	@scripts/task.sh split $(ARGS)

merge-shards: $(READY) ## put parts together again: make merge-shards WEIGHTS=parts OUTPUT=folder
	@scripts/task.sh merge_shards $(ARGS)

reshard: $(READY) ## from any grid to any grid: make reshard WEIGHTS=parts OUTPUT=other CARDS=8
	@scripts/task.sh reshard $(ARGS)

verify: $(READY) ## compare two weights of any layouts: make verify A=folder B=model.ckpt LOGITS=1
	@scripts/task.sh verify $(ARGS)

ranktable: ## the rank table of this host's NPUs, of several hosts' tools/merge_hccl.py: make ranktable CARDS=8 SERVER_IP=address
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) tools/hccl_tools.py --device_num "[0,$${CARDS:-8})" --device_num_per_node $${CARDS:-8} $(if $(SERVER_IP),--server_ip $(SERVER_IP)) $(ARGS)

test: $(VENV)/.ready-dev ## every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/.ready-dev ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

bench: $(VENV)/.ready-dev ## every benchmark, each beside its peer; results as JSON lines
	@scripts/bench.sh $(ARGS)

lint: $(VENV)/.ready-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-dev ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: requirements.txt
	@scripts/setup.sh requirements.txt $@

$(VENV)/.ready-mindspore: requirements/mindspore.txt requirements.txt
	@scripts/setup.sh requirements/mindspore.txt $@
	@touch $(VENV)/.ready

$(VENV)/.ready-dev: requirements/dev.txt requirements/mindspore.txt requirements.txt
	@scripts/setup.sh requirements/dev.txt $@
	@touch $(VENV)/.ready $(VENV)/.ready-mindspore
