"""What the tests share: the golden model (a tiny random InstructPix2Pix) and what diffusers computes with it."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)                                      # the models are tiny

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """The golden model; tests do not change it."""
    from uip2p import EditModel
    return EditModel.from_pretrained(GOLDEN / "model")


@pytest.fixture(scope="session")
def expected():
    """Inputs and outputs by name, and under "info" their texts."""
    with safe_open(GOLDEN / "expected.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors | {"info": json.loads(file.metadata()["info"])}


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the golden model's directory, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
