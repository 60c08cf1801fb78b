"""experiments/benchmark.py as a user runs it, in seconds; and its reference, the plain loop, against the edit."""
import json

import pytest
import torch

from experiments import benchmark
from uip2p import EditModel


@pytest.mark.parametrize("scales, dtype, tolerance", [
    (benchmark.SCALES, torch.float32, 1e-5), ((7.5, 1.0), torch.float32, 1e-5), ((1.0, 1.0), torch.float32, 1e-5),
    (benchmark.SCALES, torch.float16, 1e-2)])
def test_an_edit_is_what_the_plain_loop_gives(checkpoint, expected, scales, dtype, tolerance):
    plain, fast = (EditModel.from_pretrained(checkpoint, dtype=dtype) for _ in range(2))
    plain.unet.to(memory_format=torch.contiguous_format), plain.vae.to(memory_format=torch.contiguous_format)
    inputs = expected["pair.images"], expected["info"]["pair_texts"], 7, *scales, expected["pair.noise"]
    reference, edited = benchmark.plain_edit(plain, *inputs), fast.edit(*inputs)
    assert (edited - reference).norm() / reference.norm() < tolerance


def test_what_does_not_fit_is_not_measured(capsys):
    table, ran = benchmark.Table("cpu", 100), []
    table.rate = table.peak = table.bandwidth = 1e9
    assert table.line("short", 2, lambda: ran.append(1), flops=1e9) > 0 and len(ran) == 1 + benchmark.REPEATS
    assert table.line("long", 2, lambda: ran.append(1), flops=table.rate * 101) is None
    assert len(ran) == 1 + benchmark.REPEATS
    table.rate = 1e9                           # what takes more than 10 s is measured once, if at all
    assert table.line("slow", 2, lambda: ran.append(1), flops=1e9 * 20) > 0 and len(ran) == 2 + benchmark.REPEATS
    assert table.line("reserved", 2, lambda: ran.append(1), flops=table.rate * 20, reserve=90) is None

    def full():
        raise torch.OutOfMemoryError("too large")
    assert table.line("large", 2, full) is None
    no_time = "not measured: no time"
    assert [row.get("skipped") for row in table.rows] == [None, no_time, None, no_time, "does not fit"]
    assert capsys.readouterr().out.count("not measured: no time") == 2


@pytest.fixture
def small(monkeypatch):
    """The toy's UNet with its first level only."""
    level = {"block_out_channels": [16], "attention_head_dim": 2, "down_block_types": ["CrossAttnDownBlock2D"],
             "up_block_types": ["CrossAttnUpBlock2D"]}
    read = benchmark.read_json
    monkeypatch.setattr(benchmark, "read_json",
                        lambda path: read(path) | (level if path.parent.name == "unet" else {}))


def test_the_table_of_the_toy(tmp_path, capsys, monkeypatch, small):
    monkeypatch.setattr(benchmark, "SLOW", 0)  # one run each
    monkeypatch.setattr(benchmark, "BATCHES", (2,))
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "STEPS", (1, 2))
    monkeypatch.setattr(benchmark, "EDITED", (1, 2))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: None)
    benchmark.main(["--size", "toy", "--budget", "10000", "--output", str(tmp_path / "out.json")])
    rows, said = json.loads((tmp_path / "out.json").read_text())["rows"], capsys.readouterr().out
    named = {(row.get("what"), row.get("batch")): row for row in rows}
    assert len([what for what, _ in named if what and what.startswith("edit")]) == 4
    edit, plain = named["edit, 1 steps", 1], named["plain loop, 1 steps", 1]
    assert edit["of plain"] == pytest.approx(edit["s"] / plain["s"]) and 0 < edit["of peak"] < 1
    unet, encode, decode = (named[part, 1]["TFLOP"] for part in ("UNet forward", "VAE encode", "VAE decode"))
    assert named["edit, 2 steps", 2]["TFLOP"] == pytest.approx(2 * (6 * unet + encode + decode))
    assert 0 < named["training step, all", 2]["of peak"] < 1 and 0 < named["CLIP and its backward", 2]["of peak"] < 1
    assert "the bottleneck of an edit of 50 steps: UNet" in said
    assert "the bottleneck of training step, all, batch 2: " in said
    assert "the machine's peak" in said and "torch: " in said and ("compiled edit, 2 steps", 1) in named


def test_flops_are_those_of_multiplications_and_additions_in_fused_attention_too():
    q = torch.zeros(2, 3, 16, 8, device="meta")
    flops = benchmark.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert flops == 2 * 2 * 2 * 3 * 16 * 16 * 8


def test_with_checkpointing_a_training_step_computes_more(monkeypatch, small):
    costs, prepare = [], benchmark.train.prepare
    monkeypatch.setattr(benchmark.Table, "line", lambda self, what, batch, run, flops=0, *more: costs.append(flops))
    for checkpointing in (False, True):
        def prepared(model, *args):
            weights = prepare(model, *args)
            model.unet.checkpointing = model.vae.checkpointing = checkpointing
            return weights
        monkeypatch.setattr(benchmark.train, "prepare", prepared)
        benchmark.training(benchmark.Table("cpu", 100), "toy", "all", (2,), None, 0)
    assert costs[2] > costs[0] > 0             # after each, the moving average


def test_saving_measures_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--save", str(tmp_path / "model"), "--budget", "9"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "experiments.benchmark: error: --budget has no effect with --save\n"
    assert not (tmp_path / "model").exists()


def test_the_random_model_that_it_saves_edits(tmp_path):
    benchmark.main(["--size", "toy", "--save", str(tmp_path / "model")])
    model = EditModel.from_pretrained(tmp_path / "model")
    assert model.edit(torch.zeros(1, 3, 32, 32), ["x"], steps=1).isfinite().all()
    assert benchmark.ClipScorer.from_pretrained(tmp_path / "model/clip").embed_texts(["x"]).shape[0] == 1
