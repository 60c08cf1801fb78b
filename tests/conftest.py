"""What the tests share: the golden model (a tiny random InstructPix2Pix) and what diffusers computes with it."""
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)                                      # the models are tiny

GOLDEN = Path(__file__).parent / "golden"
TEMPORARY = tempfile.TemporaryDirectory()                     # for as long as the tests run


@functools.cache
def small_model():
    """The directory of the toy's editor with a UNet of a tenth of its size and random weights: to train for a step."""
    from checkpoint import save_network, write_json
    from unet import UNet
    toy, folder = Path(__file__).parent.parent / "models/toy", Path(TEMPORARY.name) / "small"
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("unet", "baseline", "text2image", "clip"))
    config = json.loads((toy / "unet/config.json").read_text())
    torch.manual_seed(0)
    save_network(UNet(config | {"block_out_channels": [8, 16], "attention_head_dim": 2}), folder / "unet")
    write_json(json.loads((toy / "edit_defaults.json").read_text()) | {"steps": 1}, folder / "edit_defaults.json")
    return folder


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
