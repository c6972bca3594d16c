# Two commands, `make run` and `make test`. Each sets up .venv first if there is none.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

WINOGRAD := $(addprefix extras/winograd/, cifar_winograd.py setup.py winograd.cpp)
FLOORS_PYTHON ?= python3.10
FLOORS := .venv-floors/bin/python

.PHONY: run test floors colab full notebooks benchmarks reliability mutants address clean

run: .venv/ready  ## the five notebooks and their solutions as pages under runs/html, then the included weights' accuracy, measured again
	$(PY) -m scripts.build_pages
	$(PY) -m scripts.archive_run --check

test: .venv/ready  ## lint, unit tests, and every notebook from top to bottom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q -n logical --dist loadgroup
	$(PY) -m pytest -q --nbmake notebooks

floors:  ## all lower bounds of requirements.txt together, with the lowest Python: unit tests and every notebook
	$(FLOORS_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10) and "make floors FLOORS_PYTHON=... wants Python 3.10")'
	$(FLOORS_PYTHON) -m venv --clear .venv-floors
	$(FLOORS) -m pip install --quiet --disable-pip-version-check uv
	$(FLOORS) -m uv pip install --quiet --resolution lowest-direct -r requirements.txt
	$(FLOORS) -m pytest -q -n logical --dist loadgroup
	$(FLOORS) -m pytest -q --nbmake notebooks

colab: .venv/ready  ## the notebooks as Colab runs them: its old IPython, an empty folder, a clone of the last commit
	$(PY) tests/colab/run.py $(ARGS)

# Afterwards results/shift is about other weights: move it away, and run `python -m scripts.ablation --images 2000`.
full: .venv/ready  ## the 60 epochs of `report` and `best`, three seeds each, into results/ and the weights: for a GPU
	set -e; for seed in 42 0 1; do for recipe in report best; do \
	  $(PY) -m cifar_lib train --recipe $$recipe --seed $$seed --run runs/$$recipe-seed$$seed $(ARGS); \
	  $(PY) -m scripts.archive_run runs/$$recipe-seed$$seed; \
	done; done
	$(PY) -m scripts.store_answers

notebooks: .venv/ready  ## runs the five notebooks and their solutions in place: outputs into these files, figures into figures/
	CIFAR_FIGURES=figures $(PY) -m scripts.build_pages --in-place

benchmarks: .venv/ready  ## the published loop and ours side by side, and 60 epochs of `report` where there is a GPU; scripts/on_gpu.py in miniature where there is none
	PYTHON=$(PY) bash benchmarks/all.sh $(ARGS)

reliability: .venv/ready  ## faults on purpose, into results/reliability.md
	$(PY) -m scripts.faults --write

mutants: .venv/ready  ## 200 small changes to the package: do the tests notice? Into results/mutants.md
	$(PY) -m scripts.mutants --named scripts/named_mutants.json $(ARGS)

address:  ## make address TO=you/your-repository: where your copy is, into the badges and notebooks
	@$(PYTHON) scripts/set_address.py "$(TO)"

clean:
	rm -rf .venv .venv-colab .venv-floors runs

.venv/ready: requirements.txt constraints.txt $(WINOGRAD)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10, 7) and "Python 3.10.7 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt -c constraints.txt
	$(PIP) 'setuptools>=77,<81'
	$(PIP) --no-build-isolation ./extras/winograd || \
	  echo "extras/winograd can't be built here: training in fp32 on a CPU goes without it, slower"
	touch $@
