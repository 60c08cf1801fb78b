# make demo: edits held-out scenes of the toy world and shows figure 3.   make test: the test suite.
# Both make their own environment in .venv first, from requirements.txt; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
export OMP_WAIT_POLICY = PASSIVE

demo: .venv/installed
	.venv/bin/python edit.py

# Two processes side by side: half of the time goes to the tests of train.py.
test: .venv/installed
	$(MAKE) -j2 test-train test-others

test-train:
	.venv/bin/python -m pytest -q tests/test_train.py

test-others:
	.venv/bin/python -m pytest -q tests --ignore tests/test_train.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test test-train test-others
