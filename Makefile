# make demo: edits held-out scenes of the toy world and shows figure 3.   make test: the test suite.
# Both make their own environment in .venv first, from requirements.txt; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
export OMP_WAIT_POLICY = PASSIVE

demo: .venv/installed
	.venv/bin/python edit.py

# Two processes side by side, which take about as long.
SLOW = tests/test_train.py tests/test_benchmark.py

test: .venv/installed
	$(MAKE) -j2 test-slow test-others

test-slow:
	.venv/bin/python -m pytest -q $(SLOW)

test-others:
	.venv/bin/python -m pytest -q tests $(SLOW:%=--ignore=%)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test test-slow test-others
