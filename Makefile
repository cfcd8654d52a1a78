# What people do here. `make demo` and `make test` set up what they need on a fresh machine.
.PHONY: help setup demo demo-real example-trl test nightly test-vllm test-gpu bench bench-vllm soak lint types check docs

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:           ## build .venv with deltawire, torch, vLLM and the examples' libraries
	@scripts/setup

demo: setup      ## train a tiny model by RL while vLLM serves it, weights travelling through a bucket
	@.venv/bin/deltawire demo

demo-real: setup ## the same with a pretrained model, SmolLM2-135M, that learns sums: 10 to 20 minutes on two cores
	@.venv/bin/deltawire demo --real

example-trl: setup ## TRL's AsyncGRPOTrainer plays Wordle by tool calls for a few steps, all parts on this machine
	@.venv/bin/python -m examples.trl.run

test: setup      ## every test but the nightly ones, on a real vLLM server too, in two processes
	@.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

nightly: setup   ## what takes too long for every change: the tests marked nightly
	@.venv/bin/python -m pytest -m nightly
	@DELTAWIRE_FUZZ_SECONDS=60 .venv/bin/python -m pytest tests/attacks/test_fuzz.py

soak: setup      ## a thousand versions under faults, kills, compaction and pruning
	@DELTAWIRE_SOAK_VERSIONS=1000 .venv/bin/python -m pytest tests/test_soak.py tests/test_soak_writers.py --log-cli-level=INFO

test-vllm: setup ## every model and parallel layout on real vLLM servers, about 35 minutes
	@DELTAWIRE_TEST_VLLM=all .venv/bin/python -m pytest tests/live tests/follow tests/vllm

test-gpu:        ## on a host with CUDA, in the environment that has vLLM: PYTHON=path/to/python, SCENARIOS="fp8 8b" or all
	@DELTAWIRE_TEST_GPU="$(SCENARIOS)" $(or $(PYTHON),$(wildcard .venv/bin/python),python3) -m pytest -m gpu -W default -s tests/gpu

bench: setup     ## bytes and speed of every codec, and what more parameters, versions and tensors cost
	@.venv/bin/python benchmarks/codecs.py
	@.venv/bin/python benchmarks/scale.py parameters --sizes 10e6 100e6 1e9
	@.venv/bin/python benchmarks/scale.py versions
	@.venv/bin/python benchmarks/scale.py tensors

bench-vllm: setup ## the pause of an update beside vLLM's own ways, on this machine
	@.venv/bin/python benchmarks/vllm_pause.py
	@.venv/bin/python benchmarks/vllm_pause.py --small --seconds 0

lint: setup      ## style
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

types: setup     ## mypy --strict on the library
	@.venv/bin/mypy

docs: setup      ## write docs/CLI.md from the commands' help, and build every page as one site in site/
	@.venv/bin/python scripts/cli_reference.py
	@.venv/bin/python scripts/website.py site

check: lint types test  ## what CI runs
