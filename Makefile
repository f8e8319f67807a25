# Every target does its own set-up; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# DeepSpeed's compiled operators, kept from run to run.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help setup quickstart browser hosts test cluster extras lint format docs release-check bench gpu torture clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Large parts of packages that nothing here imports, or only little of.
UNUSED := '/tests?/|/transformers/models/|/plotly/graph_objs/|/ray/rllib/|/moto/iam/|/databricks/'

setup: $(READY) ## make .venv and install requirements.lock

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	@# Two installers at once, then what the lock leaves out (setuptools), and bytecode on all cores: pip does it on one.
	sed '/^#/d' requirements.lock | tr '\n' '\0' | \
		xargs -0 -n 104 -P 2 $(BIN)/pip install --quiet --retries 10 --no-deps --no-compile
	$(BIN)/pip install --quiet --retries 10 --no-compile --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/python -m compileall -qq -j 0 -x $(UNUSED) $(VENV)/lib || true # a few files are of other Pythons
	@touch $@

quickstart: $(READY) ## the whole job on real text: tokenizer, shards, training, kill, resume, export
	@$(BIN)/python -m launch.quickstart

# Debian's packages: targets of their own, so that `make --jobs` installs them beside Python's.
browser:
	@sh tests/install.sh chromium

hosts:
	@sh tests/install.sh iproute2 openssh-server openssh-client pdsh slurm-wlm munge util-linux

test: $(READY) browser ## all tests (arguments: ARGS="-k resume")
	@$(BIN)/python -m tests.alone $(BIN)/python -m pytest --numprocesses 3 --no-loadscope-reorder $(ARGS)

cluster: $(READY) hosts ## tests over three hosts and on Slurm: network namespaces, sshd, pdsh, slurmd; as root
	$(BIN)/python -m pytest -m cluster tests/cluster $(ARGS)

# Over .venv and apart from it: with accelerate at hand transformers loads models in another way, and imports it always.
EXTRAS := .cache/extras
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
extras: $(READY) ## the tests of `evaluate --tasks` and `export --onnx`, with their packages in an environment of its own
	$(PYTHON) -m venv $(EXTRAS)
	@$(BIN)/python $(PACKAGES) > "$$($(EXTRAS)/bin/python $(PACKAGES))/over.pth"
	$(EXTRAS)/bin/pip install --quiet --retries 10 --no-compile --constraint requirements.lock \
		lm_eval==0.4.13 accelerate==1.15.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
	$(EXTRAS)/bin/python -m pytest -m extras tests/launch/test_evaluate.py tests/pipeline/test_onnx.py $(ARGS)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## the documentation as a site, in build/site: links checked, nothing from another host
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

release-check: $(READY) ## wheel and sdist in clean environments; README and docs walked as typed (ARGS="--beside": no downloads)
	$(BIN)/python -m tests.deploy.release_check $(ARGS)

bench: $(READY) ## measure, and write docs/benchmarks.md (arguments: ARGS="reading")
	$(BIN)/python -m tests.benchmarks $(ARGS)

# Where $(PYTHON) has everything, as on many machines with a GPU, nothing is installed.
HAS_ALL := -c 'import sys; from importlib.util import find_spec; sys.exit(any(find_spec(name) is None for name in \
	"datasets deepspeed mlflow pydantic pytest sentencepiece torch transformers triton typer webdataset xdist".split()))'
gpu: ## on one GPU, in ten minutes: kernels, passes, the trainer, decoding, into docs/benchmarks.md (ARGS="trainer")
	@$(PYTHON) $(HAS_ALL) || $(MAKE) setup
	@python=$$($(PYTHON) $(HAS_ALL) && echo $(PYTHON) || echo $(BIN)/python); \
		$$python -m tests.benchmarks.bench_gpu $(ARGS)

torture: $(READY) ## hours of kills and hangs; the last figures in docs/reliability.md (arguments: ARGS="kills")
	$(BIN)/python -m tests.torture $(ARGS)

clean: ## remove what runs and builds left, the virtual environment included
	rm -rf $(VENV) .cache data runs build *.egg-info mlflow.db mlruns mlartifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis
