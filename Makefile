# Everything from a fresh clone: a virtual environment in .venv, torch, then the project built against it.
# A stamp in .venv stands for each step, so that the next time only what has changed is done again.

PYTHON ?= python3
# Where torch comes from, when not from pip's own index. https://download.pytorch.org/whl/cpu has the small CPU builds.
TORCH_INDEX ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
GPU_CHECK_ARGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f)

.PHONY: help demo test gpu-check lint clean

help:
	@echo "make demo    train a detector on rendered products, show what it finds     (DEMO_ARGS='--categories 40')"
	@echo "make test    run the tests                                                 (PYTEST_ARGS='tests/cli -k resume')"
	@echo "make lint    check the style"
	@echo "make clean   remove the environment and all that was built"
	@echo "make gpu-check   compile every GPU kernel ahead of time: registers, spills, shared memory; needs no GPU"

demo: $(VENV)/.demo $(VENV)/.library
	$(VENV)/bin/dpdiff demo $(DEMO_ARGS)

test: $(VENV)/.test $(VENV)/.library
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

gpu-check: $(VENV)/.test
	$(VENV)/bin/python -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) build demo *.egg-info dpdiff_kernels/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -r {} +

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.venv constraints.txt
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(PIP) install -c constraints.txt "setuptools>=77" wheel ninja
	@touch $@

# A CUDA build of torch has brought the Triton that it was made with. Beside a CPU build, kernels are tested with the oldest.
$(VENV)/.test: | $(VENV)/.triton
$(VENV)/.triton: $(VENV)/.torch
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) install "triton==3.6.0; platform_system == 'Linux' and platform_machine == 'x86_64'"
	@touch $@

# The project is installed in place. Its native library is built apart (below), where ninja knows what has changed.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	DPDIFF_BUILD_EXTENSION=0 $(PIP) install -c constraints.txt --no-build-isolation -e ".[$*]"
	@touch $@

$(VENV)/.library: $(VENV)/.torch setup.py $(SOURCES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.lint: $(VENV)/.venv
	$(PIP) install -c constraints.txt ruff
	@touch $@
