# make demo: edits held-out scenes of the toy world and shows figure 3.   make test: the test suite.
# make walkthrough: executes walkthrough.ipynb anew, with the tools of notebooks, which it installs.
# All make their own environment in .venv first, from requirements.txt; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
export OMP_WAIT_POLICY = PASSIVE

demo: .venv/installed
	.venv/bin/python edit.py

# Two processes side by side, which take about as long.
SLOW = tests/test_train.py tests/test_walkthrough.py tests/test_claims.py tests/test_evaluate.py

test: .venv/installed
	$(MAKE) -j2 test-slow test-others

test-slow:
	.venv/bin/python -m pytest -q $(SLOW)

test-others:
	.venv/bin/python -m pytest -q tests $(SLOW:%=--ignore=%)

walkthrough: .venv/installed
	.venv/bin/python -m pip install --quiet nbconvert ipykernel ipywidgets
	.venv/bin/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		walkthrough.ipynb

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test test-slow test-others walkthrough
