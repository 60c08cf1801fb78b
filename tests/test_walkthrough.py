"""walkthrough.ipynb runs from top to bottom, without Jupyter, and prints what its committed outputs say."""
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "walkthrough.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
NUMBER = r"-?\d+\.?\d*"


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_the_cells_print_what_their_outputs_say(monkeypatch):
    """Other processors round otherwise: a share of ten scenes may differ by one of them, other numbers by 5 %."""
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setitem(sys.modules, "IPython.display", None)                 # as where it is not installed
    namespace = {}
    for cell in CELLS:
        with redirect_stdout(io.StringIO()) as said:
            exec("".join(cell["source"]), namespace)
        lines, committed = said.getvalue().splitlines(), printed(cell).splitlines()
        assert [re.sub(NUMBER, "", line) for line in lines] == [re.sub(NUMBER, "", line) for line in committed]
        for new, old in zip(lines, committed):
            numbers = [[float(number) for number in re.findall(NUMBER, line)] for line in (new, old)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.11 if "exact" in old else 0.01, rel=0.05), old


def test_the_notebook_is_short_small_and_executed():
    text = NOTEBOOK.read_text()
    assert len(text) < 2 * 2 ** 20 and not re.search(r"/home/|/root/|/Users/|/tmp/|Warning|site-packages", text)
    assert all(len(cell["source"]) <= 12 for cell in CELLS)
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    kinds = [output["output_type"] for cell in CELLS for output in cell["outputs"]]
    assert set(kinds) == {"stream", "display_data"} and kinds.count("display_data") >= 12
