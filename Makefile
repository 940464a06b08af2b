# Every target makes its own virtual environment from python3 alone when there is none.
# Tests that stand together share compiled programs: worksteal leaves them to one worker as far as it can.
PYTHON3 ?= python3
VENV ?= .venv
DEV ?= .venv-dev
OLDEST ?= .venv-oldest
ACCELERATORS ?= .venv-accelerators
DOCS ?= .venv-docs
PYTHON := $(VENV)/bin/python
WORKERS ?= auto
TESTS := $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal
# Most of the time of a test is that of XLA making code, which takes a third of it without optimizations, and less again
# where the workers have the cores. What code users get matters to the tests that are marked `numbers`.
QUICK := XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1"

.PHONY: demo test test-slow test-pure oldest lint bench accelerators docs parity stub clean

demo: $(VENV)/.examples
	$(PYTHON) examples/train_digits.py

test: $(VENV)/.test
	$(TESTS) -m "not slow and numbers"
	$(QUICK) $(TESTS) -m "not slow and not numbers"

test-slow: $(VENV)/.test
	$(TESTS) -m "slow and numbers"
	$(QUICK) $(TESTS) -m "slow and not numbers"

# The fast tests that compare with none of torch, Pyro, numpyro and devinterp, where none of them is installed.
test-pure: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and numbers"
	$(QUICK) $(DEV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not numbers"

# Imports and quick tests with the oldest versions of what the library depends on.
oldest: $(OLDEST)/.installed
	$(QUICK) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not numbers" \
		tests/test_rule.py tests/test_transform.py tests/test_stacks.py tests/test_llc_cases.py \
		jaxoptim/averaging.py jaxoptim/core jaxoptim/distributed jaxoptim/optim jaxoptim/rules jaxoptim/schedules

lint: $(VENV)/.test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(VENV)/.test
	$(PYTHON) benchmarks/step.py
	$(PYTHON) benchmarks/one_pass.py
	$(PYTHON) benchmarks/lbfgs.py
	$(PYTHON) benchmarks/averaging.py
	$(PYTHON) benchmarks/checkpoint.py
	$(PYTHON) benchmarks/newton.py
	$(PYTHON) benchmarks/pyro_optim.py
	$(PYTHON) benchmarks/groups.py
	$(PYTHON) benchmarks/variational.py
	$(PYTHON) benchmarks/sampling.py

# What steps cost on chips that need not be here, docs/accelerators.md and docs/scaling.md, by the compilers for them.
accelerators: $(ACCELERATORS)/.installed
	$(ACCELERATORS)/bin/python benchmarks/accelerators.py
	$(ACCELERATORS)/bin/python benchmarks/scaling.py

# The site, into out/site. A link that leads nowhere is an error.
docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs out/site
	@echo "The site is out/site/index.html."

# The table in docs/parity.md, from a run of the measurements that the tests make.
parity: $(VENV)/.test
	$(PYTHON) tests/parity.py

# The signatures of the torch-style classes, for editors and type checkers.
stub: $(VENV)/.test
	$(PYTHON) tests/stub.py

clean:
	rm -rf $(VENV) $(DEV) $(OLDEST) $(ACCELERATORS) $(DOCS)

%/bin/python:
	@$(PYTHON3) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		"jaxoptim needs Python 3.11 or newer, and $(PYTHON3) is %d.%d: name another, make PYTHON3=python3.12" % v[:2])'
	$(PYTHON3) -m venv $*

$(VENV)/.examples: pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/.test: pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.examples

$(DEV)/.installed: pyproject.toml | $(DEV)/bin/python
	$(DEV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*(x.replace(">=", "==") for x in project["dependencies"]), sep="\n")' > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --editable . --requirement $(OLDEST)/oldest.txt \
		chex hypothesis matplotlib pytest pytest-xdist safetensors
	touch $@

$(DOCS)/.installed: pyproject.toml | $(DOCS)/bin/python
	$(DOCS)/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

# The plugin for CUDA, which is that of the jax installed, needs ptxas to compile, and none of the libraries to run.
$(ACCELERATORS)/.installed: pyproject.toml | $(ACCELERATORS)/bin/python
	$(ACCELERATORS)/bin/python -m pip install --quiet --editable . 'jax[tpu]'
	jax=$$($(ACCELERATORS)/bin/python -c 'import jax; print(jax.__version__)') && \
	$(ACCELERATORS)/bin/python -m pip install --quiet --no-deps nvidia-cuda-nvcc-cu12 \
		jax-cuda12-plugin==$$jax jax-cuda12-pjrt==$$jax
	touch $@
