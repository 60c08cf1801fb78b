# make demo: edits held-out scenes of the toy world and shows figure 3.   make test: the test suite.
# Both make their own environment in .venv first, from requirements.txt; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
export OMP_WAIT_POLICY = PASSIVE

demo: .venv/installed
	.venv/bin/python edit.py

test: .venv/installed
	.venv/bin/python -m pytest -q tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test
