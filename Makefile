# Two commands matter: `make demo` and `make test`. Each makes .venv when it is missing, installs, and runs.
PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= dev,models,distributed,zoo,export,notebooks
WORKERS ?= 2
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed

# One thread per worker, repeatable hashes, no windows, and no network (tests/offline is loaded by every Python process)
RUN_ENV  = OMP_NUM_THREADS=1 PYTHONHASHSEED=0 MPLBACKEND=agg PATH="$(CURDIR)/$(BIN):$$PATH"
TEST_ENV = $(RUN_ENV) PYTHONPATH="$(CURDIR)/tests/offline"

# Each notebook in a process of its own: fastai changes torch.Tensor for whoever comes after it. The long ones come first.
NOTEBOOKS = find nbs -name '*.ipynb' -not -path '*/.*' -not -path '*/_*' | sort -r

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full check nbs outputs readme docs clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP) ## make .venv and install the package in it, editable

# pyproject.toml is not asked: every nbdev-export writes it anew, and what is installed stands in settings.ini
$(STAMP): settings.ini setup.py
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 10) or sys.exit('dropclass needs Python 3.10 or later, this is %d.%d: try make PYTHON=python3.12' % v[:2])"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## train with class weights alone, DropClass, fading weights and class paste, on generated streets, and compare (ARGS="--help")
	$(BIN)/dropclass-demo $(ARGS)

test: $(STAMP) ## run every notebook, then pytest; no network, a few minutes
	$(NOTEBOOKS) | $(TEST_ENV) xargs -n 1 -P $(WORKERS) nbdev-test --timing
	$(TEST_ENV) python -m pytest -q -n $(WORKERS) --dist loadfile

test-full: $(STAMP) ## the same with the cells and tests marked slow (and cuda, where there is a GPU)
	flags=$$($(BIN)/python -c "import torch; print('slow cuda' if torch.cuda.is_available() else 'slow')"); \
	$(NOTEBOOKS) | $(TEST_ENV) xargs -n 1 -P $(WORKERS) nbdev-test --timing --flags "$$flags"
	$(TEST_ENV) python -m pytest -q -n $(WORKERS) --dist loadfile -m ''

check: $(STAMP) ## only whether imports, lines, package, README, notebooks and site fit each other (a minute)
	$(TEST_ENV) python -m pytest -q tests/test_house.py tests/test_package.py tests/test_site.py

nbs: $(STAMP) ## write dropclass/ from the notebooks and clean them
	$(BIN)/python .ci/repo_url.py
	$(RUN_ENV) nbdev-export
	$(RUN_ENV) nbdev-clean

outputs: $(STAMP) ## run the notebooks again and store what they show (NB=nbs/one.ipynb for one)
	$(if $(NB),echo $(NB),$(NOTEBOOKS)) | $(TEST_ENV) PYTHONWARNINGS=ignore::FutureWarning xargs -n 1 -P $(WORKERS) nbdev-test --save
	$(RUN_ENV) nbdev-clean

readme: $(STAMP) ## write README.md from nbs/index.ipynb (needs no Quarto)
	$(BIN)/python .ci/readme.py

docs: $(STAMP) ## render the site into _docs/ (needs Quarto on the PATH)
	@command -v quarto >/dev/null || { echo 'make docs needs Quarto on the PATH (quarto.org); the tests and the README do not.' >&2; exit 1; }
	$(RUN_ENV) nbdev-docs; status=$$?; ln -sfn ../_quarto.yml nbs/_quarto.yml; exit $$status

clean: ## remove what was built, keep .venv and runs
	rm -rf build dist _docs _proc .quarto .pytest_cache .hypothesis *.egg-info nbs/llms.txt
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
