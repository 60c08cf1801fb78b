"""benchmark.py as a user runs it, in seconds; and its reference, the plain loop, against the edit that it measures."""
import json

import pytest
import torch

import benchmark
from uip2p import EditModel


@pytest.mark.parametrize("branches, dtype, tolerance", [(3, torch.float32, 1e-5), (2, torch.float32, 1e-5), (1, torch.float32, 1e-5),
                                                        (3, torch.float16, 1e-2)])
def test_an_edit_is_what_the_plain_loop_gives(checkpoint, expected, branches, dtype, tolerance):
    plain, fast = (EditModel.from_pretrained(checkpoint, dtype=dtype) for _ in range(2))
    plain.unet.to(memory_format=torch.contiguous_format), plain.vae.to(memory_format=torch.contiguous_format)
    inputs = expected["pair.images"], expected["info"]["pair_texts"], 7, *benchmark.SCALES[branches], expected["pair.noise"]
    reference, edited = benchmark.plain_edit(plain, *inputs), fast.edit(*inputs)
    assert (edited - reference).norm() / reference.norm() < tolerance


def test_the_table_of_the_toy_in_half_a_minute(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    benchmark.main(["--size", "toy", "--budget", "25", "--output", str(tmp_path / "out.json")])
    rows, said = json.loads((tmp_path / "out.json").read_text())["rows"], capsys.readouterr().out
    named = {(row.get("what"), row.get("batch")): row for row in rows}
    assert len([what for what, _ in named if what and "branches" in what and what.startswith("edit")]) == 24
    edit, plain = (named[what + ", 1 steps, 3 branches", 1] for what in ("edit", "plain loop"))
    assert edit["of plain"] == pytest.approx(edit["s"] / plain["s"]) and 0 < edit["of peak"] < 1
    unet, encode, decode = (named[part, 1]["TFLOP"] for part in ("UNet forward", "VAE encode", "VAE decode"))
    assert named["edit, 5 steps, 2 branches", 8]["TFLOP"] == pytest.approx(8 * (10 * unet + encode + decode))
    assert "not measured: no time" in said and said.count("bottleneck of") == 1 and "machine's peak" in said


def test_flops_are_those_of_multiplications_and_additions_in_fused_attention_too():
    q = torch.zeros(2, 3, 16, 8, device="meta")
    assert benchmark.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 3 * 16 * 16 * 8


def test_the_random_model_that_it_saves_edits(tmp_path):
    benchmark.main(["--size", "toy", "--save", str(tmp_path / "model")])
    assert EditModel.from_pretrained(tmp_path / "model").edit(torch.zeros(1, 3, 32, 32), ["x"], steps=1).isfinite().all()
    assert benchmark.ClipScorer.from_pretrained(tmp_path / "model/clip").embed_texts(["x"]).shape[0] == 1
