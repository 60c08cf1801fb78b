"""train.py as a user runs it, in the toy world, a few steps at a time."""
import csv
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import losses
import toy
import train
from checkpoint import load_run, save_log, save_run
from cli import autocast, claimed, default_precision, replace_file
from conftest import small_model
from data import batches
from losses import ClipScorer, content_words
from pictures import save_png, to_pil
from shards import open_data
from uip2p import EditModel

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "models/toy"
pytestmark = pytest.mark.skipif(not (TOY / "baseline").is_dir(),
                                reason="models/toy is not here: run python -m prepare.pretrain")

SMALL = small_model()                                         # where the trainings here start
TOY_UNET = ["--model", str(SMALL), "--resolution", "32"]      # for other data than the toy world's
TOY_MODEL = [*TOY_UNET, "--clip", str(TOY / "clip")]
FAST = ["--model", str(SMALL), "--batch-size", "2", "--save-every", "2"]
LOSSES = {"cycle": ["clip", "sim", "attn", "recon", "cec", "denoise", "loss"], "ip2p": ["loss"]}
WEIGHTS = "diffusion_pytorch_model.safetensors"
AVERAGE_EVERY = train.AVERAGE_EVERY                           # the tests have it 1


def run(output, steps, *flags):
    train.main([*FAST, "--output", str(output), "--steps", str(steps), *map(str, flags)])
    return output


def refuse(capsys, *argv):
    """The message of a run that must fail with one line and status 2; a progress bar may stand before it."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in argv])
    lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if ": error: " in line]
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def options(*flags):
    return train.parse([str(flag) for flag in flags])[1]


def log(path):
    """The rows of log.csv: {column: number}, without the cells that are empty."""
    with open(path / "log.csv") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def state(path):
    return torch.load(path / "state.pt", weights_only=True)


def unet(path):
    """The weights of a run as they train; `model` holds their moving average."""
    return state(path)["parts"]["unet"]


def same(a, b):
    """Whether two states agree to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def folder(path, **changes):
    """Four pairs of the toy world as a data folder; `changes` are made in line 3 of its listing."""
    path.mkdir()
    lines = []
    for i in range(4):
        edit = toy.edit("train", i)
        for name, scene in (("in", edit.scene), ("out", edit.edited)):
            save_png(toy.render([scene])[0], path / f"{name}{i}.png")
        lines.append({"image": f"in{i}.png", "edited_image": f"out{i}.png", "caption": edit.scene.caption,
                      "instruction": edit.instruction, "edited_caption": edit.edited.caption,
                      "reverse_instruction": edit.reverse_instruction})
    lines[2] |= changes
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def toy_batch(size):
    """The first training samples of the toy world."""
    return next(batches(open_data(options())[0], size, seed=0))


@pytest.fixture(scope="module", autouse=True)
def every_step_is_logged_and_averaged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 1)
        patch.setattr(train, "AVERAGE_EVERY", 1)
        yield


@pytest.fixture
def plain(monkeypatch):
    """Runs without the pictures and the validation, which take most of the time of a short run."""
    monkeypatch.setattr(train, "draw_cycle", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(train, "validate", lambda *_: 1.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of four steps of the cycle that was not stopped, and the model and CLIP it trained with."""
    path, used = tmp_path_factory.mktemp("train") / "whole", {}
    with pytest.MonkeyPatch.context() as patch:
        def prepare(model, clip, args, prepare=train.prepare):
            used.update(model=model, clip=clip)
            return prepare(model, clip, args)
        patch.setattr(train, "prepare", prepare)
        run(path, 4)
    return path, used["model"], used["clip"]


@pytest.fixture
def model():
    model = EditModel.from_pretrained(TOY / "text2image")
    model.unet.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def clip():
    return ClipScorer.from_pretrained(TOY / "clip")


@pytest.fixture
def gradients(plain, monkeypatch):
    """Training with a loss without random numbers.

    Returns (the samples of each part, the seeds of each part, the gradient of each step)."""
    samples, seeds, steps = [], [], []

    def loss(model, clip, batch, args, generator, warming_up=False):
        samples.append(batch.instructions)
        seeds.append(generator.initial_seed())
        with autocast(args):
            z, t = model.encode(batch.images), torch.full((len(batch.images),), 500)
            eps = model.unet(torch.cat([z, z], 1), t, model.encode_text(batch.instructions))
        return {"loss": eps.float().square().mean()}

    def norm(parameters, bound):
        assert bound == train.MAX_NORM == 1
        steps.append(torch.cat([p.grad.flatten() for p in parameters]))
        return steps[-1].norm()
    monkeypatch.setattr(train, "compute_losses", loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    return samples, seeds, steps


# ---- a run and what it leaves ----------------------------------------------------------------------------------------

def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path):
    path = run(tmp_path / "stopped", 2)
    assert state(path)["run"]["step"] == 2 and len(log(path)) == 2
    run(path, 4)
    expected, got = contents(whole[0]), contents(path)
    assert got.keys() == expected.keys()
    assert [name for name in got if not name.endswith("state.pt") and got[name] != expected[name]] == []
    assert state(path)["run"]["step"] == 4 and same(state(path), state(whole[0]))


def test_what_a_run_leaves_behind(whole):
    path = whole[0]
    assert {f.name for f in path.iterdir()} == {
        "best", "model", "log.csv", "curves.png", "state.pt", "step-000002.png", "step-000004.png"}
    rows = log(path)
    assert [list(row) for row in rows] == [["step", "images", *LOSSES["cycle"]]] * 4
    assert [(row["step"], row["images"]) for row in rows] == [(1, 2), (2, 4), (3, 6), (4, 8)]
    for row in rows:
        cec = row["clip"] + 0.5 * row["attn"] + row["sim"] + row["recon"]
        assert row["cec"] == pytest.approx(cec, abs=1e-3)
        assert row["loss"] == pytest.approx(row["cec"] + row["denoise"], abs=1e-3)
    sizes = {}
    for file in path.glob("*.png"):
        with Image.open(file) as picture:
            picture.load()
            sizes[file.name] = picture.size
    assert sizes["step-000002.png"] == sizes["step-000004.png"]
    assert sizes["step-000004.png"][0] > 5 * 128 and sizes["step-000004.png"][1] > 8 * 128  # five columns, eight edits


def test_the_models_of_a_run_are_the_average_and_load(whole, clip):
    path, saved, start = whole[0], state(whole[0]), EditModel.from_pretrained(SMALL)
    last, best = (EditModel.from_pretrained(path / name) for name in ("model", "best"))
    assert same(dict(last.unet.state_dict()), dict(saved["parts"]["average"]))
    for other in (saved["parts"]["unet"], start.unet.state_dict()):
        assert any(not torch.equal(v, other[k]) for k, v in last.unet.state_dict().items())
    assert last.defaults == start.defaults
    assert last.edit(torch.zeros(1, 3, 32, 32), ["make the background pink"], steps=2).isfinite().all()
    args = options("--batch-size", "2")
    score = train.validate(best, clip, open_data(args)[1], args)
    assert score == pytest.approx(saved["run"]["best"], rel=1e-4)    # `best` is the model that had this validation loss


def test_the_best_model_is_that_of_the_lowest_validation_loss(tmp_path, gradients, monkeypatch):
    scores = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(train, "validate", lambda *_: next(scores))
    averages = []
    for steps in (1, 2, 3):                                   # the runs go on: the lowest so far is not forgotten
        run(tmp_path, steps, "--lr", 0.1)
        averages.append(load_file(tmp_path / "model/unet" / WEIGHTS))
    assert state(tmp_path)["run"]["best"] == 1
    assert same(averages[1], load_file(tmp_path / "best/unet" / WEIGHTS)) and not same(averages[1], averages[2])


def test_only_the_unet_trains(whole):
    path, used, clip = whole
    start = EditModel.from_pretrained(SMALL)
    frozen = {"vae": (used.vae, start.vae), "text encoder": (used.text_encoder, start.text_encoder),
              "CLIP": (clip.clip, ClipScorer.from_pretrained(TOY / "clip").clip)}
    for name, (after, before) in frozen.items():
        assert not any(p.requires_grad or p.grad is not None for p in after.parameters()), name
        assert same(dict(after.state_dict()), dict(before.state_dict())), name
    saved_vae = load_file(path / "model/vae" / WEIGHTS)
    assert all(torch.equal(v, saved_vae[k]) for k, v in start.vae.state_dict().items())
    saved, optimizer = unet(path), state(path)["parts"]["optimizer"]["state"]
    assert [k for k, v in start.unet.state_dict().items() if torch.equal(v, saved[k])] == []
    assert len(optimizer) == len(list(start.unet.parameters()))
    gradients = [moments["exp_avg"].abs().max() for moments in optimizer.values()]
    assert min(gradients) > 0                                 # weight decay alone moves a parameter, too


def test_cross_attention_alone_trains_and_resumes(tmp_path, plain):
    flags = ["--train", "cross-attention", "--precision", "bf16", "--lr", "0.1"]
    whole, stopped = run(tmp_path / "whole", 2, *flags, "--save-every", 1), tmp_path / "stopped"
    for steps in (1, 2):
        run(stopped, steps, *flags)
    assert same(state(whole), state(stopped))
    start, parts = EditModel.from_pretrained(SMALL), state(whole)["parts"]
    for name, before in start.unet.state_dict().items():
        after, average = parts["unet"][name], parts["average"][name]
        if ".attn2." in name or name.startswith("conv_in."):
            assert not torch.equal(after, before) and not torch.equal(average, before), name
        else:
            assert torch.equal(after, before.bfloat16()) and torch.equal(average, before), name
    layers = sum(name.endswith("attn2.to_q.weight") for name in parts["unet"])
    assert len(parts["optimizer"]["state"]) == 2 + 5 * layers
    model = EditModel.from_pretrained(whole / "model")        # its frozen parts are not rounded
    for part in ("vae", "text_encoder"):
        assert all(map(torch.equal, getattr(model, part).parameters(), getattr(start, part).parameters()))


def test_two_processes_are_two_parts_of_a_step(tmp_path):
    """The cycle with all its random numbers: two processes of one sample each end as one with --accumulate 2, whose two
    parts are a batch of two (below)."""
    flags = ["--lr", "0.1", "--batch-size", "1"]
    one = run(tmp_path / "one", 2, *flags, "--accumulate", 2)
    script = tmp_path / "train_and_log.py"
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", "import train",
             "train.LOG_EVERY = train.AVERAGE_EVERY = 1", "train.main()"]
    script.write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
               *FAST, *flags, "--steps", "2", "--output", str(tmp_path / "two")]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("parameters train") == 1 and said.stdout.count("step 2: validation") == 1
    assert {f.name for f in one.iterdir()} == {f.name for f in (tmp_path / "two").iterdir()}
    one, two = state(one), state(tmp_path / "two")
    start = EditModel.from_pretrained(SMALL).unet.state_dict()
    for part in ("unet", "average"):
        (first, second), change, difference = (s["parts"][part] for s in (one, two)), 0, 0
        for k, before in start.items():
            change = max(change, (first[k] - before).abs().max())
            difference = max(difference, (first[k] - second[k]).abs().max())
        assert difference < 0.01 * change
    for a, b in zip(one["run"]["rows"], two["run"]["rows"], strict=True):
        assert a == pytest.approx(b, abs=2e-4)
    assert one["run"]["best"] == pytest.approx(two["run"]["best"], abs=2e-4)               # on the same samples


def test_the_first_steps_of_a_warm_up_denoise_alone(tmp_path, plain):
    """... and their rows have no other losses; a run that was stopped within the warm-up ends as one that was not."""
    flags, names = ["--warmup", 3], ["step", "images", "denoise", "loss"]
    path = run(tmp_path / "whole", 4, *flags)
    rows = log(path)
    assert [list(row) for row in rows[:3]] == [names] * 3
    assert sorted(rows[3]) == sorted({*names, *LOSSES["cycle"]})
    assert all(row["loss"] == row["denoise"] for row in rows[:3])
    assert rows[3]["loss"] == pytest.approx(rows[3]["cec"] + rows[3]["denoise"], abs=1e-3)
    table = (path / "log.csv").read_text().splitlines()
    assert len({line.count(",") for line in table}) == 1 and all(line.endswith(",") for line in table[1:4])
    for steps in (2, 4):
        run(tmp_path / "stopped", steps, *flags)
    assert same(state(path), state(tmp_path / "stopped"))
    assert (tmp_path / "stopped/log.csv").read_bytes() == (path / "log.csv").read_bytes()


def test_the_average_takes_ten_steps_at_once_and_what_is_saved_has_the_last(tmp_path, gradients, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "AVERAGE_EVERY", AVERAGE_EVERY)
    monkeypatch.setattr(train, "update_average", lambda average, unet, step, steps=1: calls.append((step, steps)))
    run(tmp_path / "run", 23, "--batch-size", 1, "--save-every", 13)
    assert AVERAGE_EVERY == 10 and calls == [(10, 10), (13, 3), (20, 7), (23, 3)]
    run(tmp_path / "run", 25, "--batch-size", 1, "--save-every", 13)
    assert calls[4:] == [(25, 2)]


def test_the_average_moves_slowly_once_it_is_warm(monkeypatch):
    moved, late = [], 10 ** 6
    for step, decay, steps in ((1, 0.9999, 1), (90, 0.9999, 1), (late, 0.9999, 1), (late, 0.5, 1), (late, 0.5, 3)):
        monkeypatch.setattr(train, "DECAY", decay)
        average, weights = torch.nn.Linear(1, 1).requires_grad_(False), torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(average.weight)
        torch.nn.init.ones_(weights.weight)
        frozen = average.bias.clone()
        weights.bias.requires_grad_(False)
        train.update_average(average, weights, step, steps)
        moved.append(average.weight.item())
        assert torch.equal(average.bias, frozen)
    # 1 - min(decay, (1 + n) / (10 + n)) ** steps, where n counts the steps from 1
    assert moved == pytest.approx([9 / 11, 0.09, 1e-4, 0.5, 0.875], rel=1e-3)


def test_checkpointing_is_for_real_data_and_trains_the_same(clip):
    gradients = []
    for flags, on in ((["--data", "photos", *TOY_MODEL], True), ([], False)):
        args, model = options(*flags), EditModel.from_pretrained(SMALL)
        args.t_min, args.weights, args.snr_weight = 400, losses.WEIGHTS | {"denoise": 1}, 5
        train.prepare(model, clip, args)
        assert model.unet.checkpointing == model.vae.checkpointing == on
        out = train.compute_losses(model, clip, toy_batch(3), args, torch.Generator().manual_seed(0))
        out["loss"].backward()
        gradients.append([weight.grad for weight in model.unet.parameters()])
    largest = max(gradient.abs().max() for gradient in gradients[1])
    assert largest > 0
    torch.testing.assert_close(*gradients, atol=1e-5 * largest, rtol=1e-3)


def test_half_precision_trains_and_resumes(tmp_path, plain):
    """fp16, with the scaler of the loss, whose state a run that goes on gets back."""
    flags = ["--precision", "fp16", "--batch-size", 1]
    run(tmp_path / "whole", 2, *flags)
    for steps in (1, 2):                                      # the first step may be left out, see below
        run(tmp_path / "stopped", steps, *flags)
    parts, start = state(tmp_path / "whole")["parts"], EditModel.from_pretrained(SMALL).unet.state_dict()
    assert same(state(tmp_path / "whole"), state(tmp_path / "stopped"))
    for name, weight in parts["unet"].items():
        assert weight.dtype == torch.float32 and weight.isfinite().all() and not torch.equal(weight, start[name]), name
    assert 2 ** 14 <= parts["scaler"]["scale"] <= 2 ** 16     # it begins at 2 ** 16


def test_half_precision_has_the_gradient_of_full_precision(tmp_path, gradients):
    """The norm is bounded after the scale is taken out."""
    for precision in ("fp32", "fp16"):
        run(tmp_path / precision, 1, "--precision", precision)
    full, half = gradients[2]
    assert (full - half).norm() < 0.02 * full.norm()


def overflowing(compute, at, by):
    """compute_losses whose loss is multiplied in one of the calls."""
    count = iter(range(1, 100))

    def loss(*args):
        factor = by if next(count) == at else 1
        return {"loss": compute(*args)["loss"] * factor}
    return loss


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_gradient_that_is_not_finite(tmp_path, capsys, gradients, monkeypatch, precision):
    """In fp16 the step is left out, and the scale of the loss falls; otherwise the run ends with its checkpoint."""
    factor = {"fp16": 1e38, "fp32": float("nan")}[precision]
    monkeypatch.setattr(train, "compute_losses", overflowing(train.compute_losses, 2, factor))
    flags = ["--precision", precision, "--save-every", 1]
    if precision == "fp16":
        before = unet(run(tmp_path, 1, *flags))
        assert same(dict(before), dict(unet(run(tmp_path, 2, *flags))))
        assert state(tmp_path)["parts"]["scaler"]["scale"] == 32768
        assert not same(dict(before), dict(unet(run(tmp_path, 3, *flags))))
    else:
        assert "finite" in refuse(capsys, *FAST, *flags, "--steps", 3, "--output", tmp_path)
        assert state(tmp_path)["run"]["step"] == 1
        assert all(v.isfinite().all() for v in unet(tmp_path).values())


def test_half_precision_stops_when_its_scale_is_of_no_use(tmp_path, capsys, gradients, monkeypatch):
    monkeypatch.setattr(train, "compute_losses",
                        lambda model, *_: {"loss": sum(w.sum() for w in model.unet.parameters()) * float("nan")})
    message = refuse(capsys, *FAST, "--precision", "fp16", "--steps", 30, "--output", tmp_path / "run")
    assert "finite" in message and len(gradients[2]) == 17    # 2 ** 16 has fallen to 1


def test_a_loss_of_ones_own(tmp_path, plain, monkeypatch):
    """A function, a line in `cycle_losses` and an entry in WEIGHTS, as losses.py says; --weights sets its weight."""
    def darkness_loss(edited):
        return edited.mean() + 1

    source = inspect.getsource(losses.cycle_losses)
    line = '    losses = {\n        "mine": darkness_loss(cycle.edited),\n'
    assert source.count("    losses = {\n") == 1
    names = vars(losses) | {"darkness_loss": darkness_loss}
    exec(source.replace("    losses = {\n", line), names)
    monkeypatch.setattr(train, "cycle_losses", names["cycle_losses"])
    monkeypatch.setitem(train.ALL_WEIGHTS, "mine", 1.0)
    for flags, weight in (((), 1), (("--weights", "mine=2"), 2)):
        (row,) = log(run(tmp_path / str(weight), 1, *flags))
        assert row["mine"] > 0.1
        cec = row["clip"] + 0.5 * row["attn"] + row["sim"] + row["recon"] + weight * row["mine"]
        assert row["cec"] == pytest.approx(cec, abs=1e-3)


# ---- data ------------------------------------------------------------------------------------------------------------

def test_the_baseline_trains_from_a_folder(tmp_path):
    path = run(tmp_path / "run", 2, "--objective", "ip2p", *TOY_UNET, "--data", folder(tmp_path / "data"))
    assert list(log(path)[0]) == ["step", "images", *LOSSES["ip2p"]] and len(log(path)) == 2
    saved, start = load_file(path / "model/unet" / WEIGHTS), load_file(SMALL / "unet" / WEIGHTS)
    assert not torch.equal(saved["conv_out.weight"], start["conv_out.weight"])


def test_a_folder_trains_the_cycle_without_edited_images(tmp_path, plain, monkeypatch):
    data, seen, compute = folder(tmp_path / "data"), [], train.compute_losses
    for file in data.glob("out*.png"):
        file.unlink()

    def watched(model, clip, batch, *rest):
        seen.extend(batch.instructions)
        return compute(model, clip, batch, *rest)
    monkeypatch.setattr(train, "compute_losses", watched)
    run(tmp_path / "run", 2, *TOY_MODEL, "--data", data)
    assert sorted(seen) == sorted(toy.edit("train", i).instruction for i in range(4))      # an epoch in two steps


def other_data(kind, path):
    """The arguments for ten pairs of the toy world as other sources: two shards and a side file, InstructPix2Pix's
    tree, a mix of a folder and of twice as much of the shards."""
    path.mkdir()
    edits, flags = [toy.edit("train", i) for i in range(10)], ["--texts", path / "side.jsonl"]
    if kind == "mix":
        _, shards, *flags = other_data("shards", path / "shards")
        return ["--data", folder(path / "folder"), f"{shards}=2", *flags]
    rows = [{"key": f"{i:09}", "instruction": e.instruction, "edited_caption": e.edited.caption,
             "reverse_instruction": e.reverse_instruction} for i, e in enumerate(edits)]
    (path / "side.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if kind == "shards":
        for i, edit in enumerate(edits):
            save_png(toy.render([edit.scene])[0], path / "image.png")
            (path / "caption.txt").write_text(edit.scene.caption)
            with tarfile.open(path / f"{i // 5:05}.tar", "a") as tar:
                tar.add(path / "caption.txt", f"{i:09}.txt")
                tar.add(path / "image.png", f"{i:09}.png")
        return ["--data", path / "{00000..00001}.tar", *flags]
    for i, edit in enumerate(edits):
        (path / f"{i:09}").mkdir()
        for k, scene in enumerate((edit.scene, edit.edited)):
            to_pil(toy.render([scene])[0]).save(path / f"{i:09}/7_{k}.jpg")
        prompt = {"caption": edit.scene.caption, "edit": edit.instruction, "output": edit.edited.caption}
        (path / f"{i:09}/prompt.json").write_text(json.dumps(prompt))
    (path / "seeds.json").write_text(json.dumps([[f"{i:09}", [7]] for i in range(10)]))
    return ["--data", path, "--validation", folder(path / "validation"), *flags]


@pytest.mark.parametrize("kind", ["shards", "tree", "mix"])
def test_the_cycle_trains_from_other_data(tmp_path, capsys, kind):
    path = run(tmp_path / "run", 3, *TOY_MODEL, *other_data(kind, tmp_path / "data"), "--save-every", 3)
    assert len(log(path)) == 3 and list(log(path)[0]) == ["step", "images", *LOSSES["cycle"]]
    assert ("validation on the training data" in capsys.readouterr().out) == (kind != "tree")


def test_the_baseline_trains_from_the_data_of_instruct_pix2pix(tmp_path):
    flags = other_data("tree", tmp_path / "data")[:-2]        # without the side file
    path = run(tmp_path / "run", 3, "--objective", "ip2p", *TOY_UNET, *flags, "--save-every", 3)
    assert len(log(path)) == 3 and (path / "step-000003.png").is_file()


@pytest.mark.parametrize("kind", ["shards", "tree", "mix"])
def test_a_run_that_was_stopped_in_the_middle_of_a_shard_sees_what_it_would_have_seen(tmp_path, gradients, kind):
    samples, flags = gradients[0], [*TOY_MODEL, *other_data(kind, tmp_path / "data"), "--save-every", 10]
    run(tmp_path / "whole", 8, *flags)
    whole = samples[:]
    samples.clear()
    run(tmp_path / "stopped", 3, *flags)
    run(tmp_path / "stopped", 8, *flags)
    assert samples == whole and len({instruction for batch in whole for instruction in batch}) > 7


# ---- options ---------------------------------------------------------------------------------------------------------

def test_every_option_shows_the_default_that_holds(capsys):
    """Of three situations: the toy world, the toy's baseline, and other data."""
    shown = [action for action in train.parse([])[0]._actions if action.dest != "help"]
    assert len(shown) == 21
    for flags in ([], ["--objective", "ip2p"], ["--data", "photos"]):
        args = vars(options(*flags))
        for action in shown:
            default = action.help.rpartition("(default: ")[2]
            if f"--{action.dest}" not in flags and action.dest != "precision":
                assert str(args[action.dest]) in default, (flags, action.dest)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    assert out.count("(default:") == 21
    assert train.__doc__.splitlines()[0] in out


def test_weights_name_losses_and_keep_the_others():
    """The paper's, and that of the part that denoises."""
    assert losses.WEIGHTS == {"clip": 1, "attn": 0.5, "sim": 1, "recon": 1}
    assert options().weights == losses.WEIGHTS | {"denoise": 1}
    assert options("--weights", "attn=0").weights == options().weights | {"attn": 0}
    several = options("--weights", "sim=0.25", "clip=3", "denoise=10").weights
    assert several == {"clip": 3, "attn": 0.5, "sim": 0.25, "recon": 1, "denoise": 10}
    assert losses.WEIGHTS["attn"] == 0.5                                      # and the table stays


def test_the_settings_of_the_data_are_defaults_that_flags_overrule():
    for column, flags in ((1, ["--data", "photos"]), (1, ["--data", "toy", "photos"]), (2, []),
                          (2, ["--data", "toy=3", "toy:colour"]), (3, ["--objective", "ip2p"])):
        args = vars(options(*flags))
        for name, row in train.SETTINGS.items():
            assert args[name] == row[column], (flags, name)
    args = options("--steps", 7, "--lr", 0, "--model", "elsewhere")
    assert (args.steps, args.lr, args.model) == (7, 0, "elsewhere")
    assert args.t_min == 400 and args.batch_size == 8


def test_the_baseline_needs_no_clip():
    assert options("--objective", "ip2p").clip is options("--objective", "ip2p", "--data", "photos").clip is None


@pytest.mark.parametrize("where, emulated, native, precision", [
    ("cpu", False, False, "fp32"), ("cuda", True, True, "bf16"), ("cuda:1", True, False, "fp16"),
    ("cuda", False, False, "fp16"), ("mps", False, False, "fp32")])
def test_default_precision(monkeypatch, where, emulated, native, precision):
    """GPUs without bfloat16 (T4, V100) say that they have it, because torch emulates it there."""
    def is_bf16_supported(including_emulation=True):
        return emulated if including_emulation else native
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert default_precision(where) == precision
    if where == "cpu":
        assert options().precision == "fp32" and options("--precision", "bf16").precision == "bf16"
        monkeypatch.setattr(train, "default_precision", lambda where: f"that of {where}")
        assert options("--data", "photos").precision == "that of cpu" and options().precision == "fp32"


def test_the_toy_model_may_be_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    named, default = vars(options("--model", "models/toy/baseline")), vars(options())
    assert {k: named[k] for k in named if k != "model"} == {k: default[k] for k in default if k != "model"}


def test_the_unets_of_the_toy_world_are_models():
    whole, text2image, baseline = (EditModel.from_pretrained(TOY / name) for name in ("", "text2image", "baseline"))
    assert not text2image.unet.conv_in.weight[:, 4:].any() and baseline.unet.conv_in.weight[:, 4:].all()
    assert len({model.unet.conv_out.weight.sum().item() for model in (whole, text2image, baseline)}) == 3
    for model in (text2image, baseline):
        assert same(dict(model.vae.state_dict()), dict(whole.vae.state_dict())) and model.defaults == whole.defaults


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [["--lr", "1e-3"], ["--seed", "1"], ["--weights", "attn=0"],
                                   ["--warmup", "1"], ["--objective", "ip2p"]], ids=str)
def test_other_settings_do_not_enter_the_same_folder(whole, capsys, flags):
    before = contents(whole[0])
    message = refuse(capsys, *FAST, "--output", whole[0], "--steps", 6, *flags)
    assert str(whole[0]) in message
    # the first difference is named; another objective comes with another model
    assert f"another {flags[0][2:]}, " in message or flags[0] == "--objective" and "another model, " in message
    assert contents(whole[0]) == before


BAD_VALUES = {
    "--lr": ("nan", "inf", "-1", "fast"), "--batch-size": ("0", "-2", "2.5"), "--steps": ("0", "nan"),
    "--accumulate": ("0",), "--resolution": ("0",), "--warmup": ("-1",), "--cooldown": ("-1",), "--t-min": ("-1", "1000"),
    "--seed": ("-1", "1e3"), "--save-every": ("0",), "--device": ("abacus",), "--precision": ("fp8",),
    "--objective": ("magic", "identity"), "--train": ("vae",),
    "--weights": ("1", "clip", "clip=", "clip=nan", "clip=-1", "=1", "delta=1")}


@pytest.mark.parametrize("argv, says", [
    *[([flag, value], flag) for flag, values in BAD_VALUES.items() for value in values],
    (["--weights", "clip=1", "delta=1"], "--weights delta: the losses are clip, attn, sim, recon, denoise"),
    (["--no-such-option"], "--no-such"), (["--model", "no-such-directory"], "no-such-directory"),
    (["--model", "./no/such"], "./no/such is neither"), (["--model", str(TOY / "no-such-unet")], "no-such-unet"),
    (["--model", str(TOY / "clip")], "clip"), (["--clip", "/no/such/clip"], "/no/such/clip"),
    ([*TOY_MODEL, "--data", "no-such-data"], "no-such-data"), (["--validation", "no-such-data"], "no-such-data"),
    (["--data", "no-such-data.tar"], "no-such-data.tar"), (["--data", "no-such-data=3", "a"], "no-such-data"),
    (["--data", "a=many"], "many"), (["--data", "toy=0", *TOY_MODEL], "--data toy=0"),
    (["--data", "a", "--texts", "no-such-texts"], "no-such-texts"), (["--texts", "a"], "--texts"),
    (["--resolution", "64"], "--resolution 32"), (["--data", "toy", "photos"], "--resolution 32"),
    (["--data", "toy", "toy:tint"], "toy:tint: the kinds of edits are colour, background, shape, remove, add"),
    (["--data", "toy:"], "toy:: the kinds of edits are"), (["--data", "toy=2", "photos"], "--resolution 32"),
], ids=lambda value: " ".join(value).replace(str(ROOT), "") if isinstance(value, list) else "")
def test_bad_arguments_are_refused_in_one_line_and_leave_nothing(tmp_path, capsys, argv, says):
    assert says in refuse(capsys, "--output", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    ["--clip", str(TOY / "clip")], ["--weights", "attn=0"], ["--warmup", "3"], ["--t-min", "0"]], ids=str)
def test_an_option_without_effect_is_refused(tmp_path, capsys, flags):
    message = refuse(capsys, "--output", tmp_path / "run", "--objective", "ip2p", *flags)
    assert flags[0] in message and "no effect" in message and not (tmp_path / "run").exists()


def test_a_clip_without_a_vocabulary_is_refused(tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TOY / "clip" / name, tmp_path / "clip")
    message = refuse(capsys, "--clip", tmp_path / "clip", "--output", tmp_path / "run")
    assert re.search("/clip.* tokenizer", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective, key", [("cycle", "caption"), ("ip2p", "edited_image")])
def test_a_bad_line_of_the_listing_is_named(tmp_path, capsys, objective, key):
    data = folder(tmp_path / "data", **{key: ""})
    message = refuse(capsys, *TOY_UNET, "--objective", objective, "--data", data, "--output", tmp_path / "run")
    assert "metadata.jsonl line 3" in message and key in message
    assert not (tmp_path / "run").exists()


def test_a_missing_image_of_the_listing_is_named(tmp_path, capsys, gradients):
    data = folder(tmp_path / "data", image="elsewhere.png")
    message = refuse(capsys, *TOY_MODEL, "--data", data, "--output", tmp_path / "run", "--batch-size", 20, "--steps", 3)
    assert "samples are broken; the last is" in message and "line 3: " in message and "elsewhere.png" in message


class Part(dict):
    """What save_run takes for a network."""
    def state_dict(self):
        return dict(self)

    def load_state_dict(self, state):
        if state.keys() != self.keys():
            raise RuntimeError("Missing keys:\n\tb")
        self.update(state)


def flipped(file):
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(99.).numpy().tobytes()) + 200] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage, says", [
    (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged"), (flipped, "checksum"),
    (lambda file: file.write_bytes(b"PK\3\4 cut"), "is damaged"), (lambda file: file.write_bytes(b""), "is damaged"),
    (lambda file: torch.save({"settings": [], "parts": 1}, file), "checksum"),            # of another program
    (lambda file: torch.save([1, 2], file), "checksum"), (lambda file: file.unlink() or file.mkdir(), "is damaged"),
    (lambda file: save_run(file.parent, {"model": "m", "lr": "1"}, {"a": Part(b=1)}, {}), "does not fit the model m"),
    (lambda file: save_run(file.parent, {"model": "m", "lr": "2"}, {"a": Part()}, {}), "another lr, 2, not 1")])
def test_a_state_that_is_not_of_this_run_is_refused_in_one_line_and_nothing_is_touched(tmp_path, damage, says):
    settings, part = {"model": "m", "lr": "1"}, Part(weights=torch.arange(99.))
    save_run(tmp_path, settings, {"a": part}, {"step": 3})
    assert load_run(tmp_path, settings, {"a": Part(weights=None)}) == {"step": 3}
    damage(tmp_path / "state.pt")
    (tmp_path / "log.csv.tmp-0123abcd").touch()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        load_run(tmp_path, settings, {"a": part})
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and contents(tmp_path) == before


# ---- the folder of a run ---------------------------------------------------------------------------------------------

CLAIM = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, ".")
import cli
with cli.claimed(Path(sys.argv[1])):
    if os.fork() == 0:                         # a worker, which lives on for a while
        print("claimed", flush=True)
    time.sleep(20)
"""


def test_a_folder_has_one_run_until_this_is_killed(tmp_path, capsys):
    """A second one is refused at once and leaves it as it is."""
    path = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", CLAIM, path], cwd=ROOT, stdout=subprocess.PIPE,
                             start_new_session=True)
    try:
        assert first.stdout.readline() == b"claimed\n"
        (path / "log.csv.tmp-0123abcd").touch()               # which the first is writing
        time = path.stat().st_mtime_ns
        assert f"{path} is in use by another process" in refuse(capsys, *FAST, "--output", path)
        assert os.listdir(path) == ["log.csv.tmp-0123abcd"] and path.stat().st_mtime_ns == time
        first.kill()
        first.wait()
        with claimed(path):
            pass
    finally:
        os.killpg(first.pid, signal.SIGKILL)                  # the worker


def test_what_a_killed_run_left_goes_with_the_next_start(tmp_path, plain):
    path = run(tmp_path, 1, "--objective", "ip2p")
    whole = contents(path)
    for name in ("state.pt.tmp-0123abcd", "best/new.tmp-00000000/unet/a.json", "model/new.tmp-01234567/b"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    (path / "notes.tmp-mine").touch()                         # not one of our names
    run(tmp_path, 1, "--objective", "ip2p")
    assert contents(path).keys() - whole.keys() == {"notes.tmp-mine"} and not list(path.glob("*/new.*"))


@pytest.mark.parametrize("in_the_way", ["run", "run/model", "run/best"])
def test_a_file_in_the_way_is_found_before_any_work(tmp_path, capsys, in_the_way):
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).write_text("mine")
    message = refuse(capsys, *FAST, "--output", tmp_path / "run", "--model", "no/such")
    assert str(tmp_path / in_the_way) in message and contents(tmp_path) == {in_the_way: b"mine"}


def test_two_writers_of_a_file_never_mix(tmp_path):
    """One that begins while another writes, and that ends after it."""
    def first(file):
        file.write_text("first, ")
        replace_file(tmp_path / "a", lambda other: other.write_text("second"))
        with open(file, "a") as stream:
            stream.write("whole")
    replace_file(tmp_path / "a", first)
    assert (tmp_path / "a").read_text() == "first, whole" and len(os.listdir(tmp_path)) == 1


def test_ctrl_c_ends_in_one_line_below_the_bar(tmp_path, capsys, gradients, monkeypatch):
    monkeypatch.setattr(train, "mean_of_processes", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        train.main(["--output", str(tmp_path / "run")])
    assert stop.value.code == 130 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.split("\n")[-2] == "train.py: stopped by Ctrl-C"


@pytest.mark.parametrize("words", ["CUDA out of memory", None])
def test_too_little_memory_is_said_with_advice(tmp_path, capsys, gradients, monkeypatch, words):
    def needs_too_much(_):
        if words:
            raise torch.OutOfMemoryError(words)
        torch.empty(10 ** 15)
    monkeypatch.setattr(train, "mean_of_processes", needs_too_much)
    assert "memory is too small" in refuse(capsys, "--output", tmp_path / "run")


def test_an_error_is_on_a_line_of_its_own(tmp_path, capsys, gradients, monkeypatch):
    monkeypatch.setattr(train, "compute_losses", overflowing(train.compute_losses, 2, float("nan")))
    with pytest.raises(SystemExit):
        train.main([*FAST, "--output", str(tmp_path)])
    *bar, line, end = capsys.readouterr().err.split("\n")
    assert "train: " in bar[-1] and line.startswith("train.py: error: no finite") and end == ""


def test_every_process_empties_its_losses_and_the_first_alone_writes(tmp_path):
    for rank in (0, 1):
        numbers = SimpleNamespace(step=1, rows=[], losses={"loss": [1.0]})
        args = SimpleNamespace(rank=rank, processes=2, batch_size=1, accumulate=1, device="cpu")
        args.output = tmp_path / str(rank)
        args.output.mkdir()
        save_log(args, numbers)
        assert numbers.losses == {} and (args.output / "log.csv").exists() == (rank == 0)


def test_a_path_may_be_spelled_otherwise():
    """With a slash at the end, as shells complete it.  "./toy" is not the toy world, nor "./a/b" on the hub."""
    flags = ["--data", "photos/", "./toy", "a//*.tar=3", "--model", "runs/../m/", "--texts", "./t.jsonl"]
    args = options(*flags)
    assert (args.data, args.model, args.texts) == (["photos", "./toy", "a/*.tar=3"], "m", "./t.jsonl")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, ".")
import checkpoint, cli, pictures, uip2p
folder, model = Path(sys.argv[1]), uip2p.EditModel.from_pretrained("tests/golden/model")

def tokenizer():
    with checkpoint.new_files(folder) as new:
        model.tokenizer.save_pretrained(new)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                 # so that a write fails instead
for limit, write in (
        (50_000, lambda: checkpoint.save_run(folder, {}, {"unet": model.unet}, {})),
        (50_000, lambda: model.save_pretrained(folder)),      # a SafetensorError
        (1000, tokenizer),                                    # of tokenizers, a bare Exception
        (100, lambda: pictures.save_png(model.alphas_cumprod.expand(3, 9, 1000), folder / "a.png")),
        (100, lambda: cli.replace_file(folder / "a.txt", lambda file: file.write_text("a" * 200)))):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        write()
    except (OSError, ValueError) as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    print(message, list(folder.iterdir()))
"""


def test_a_full_disk_is_said_in_one_line(tmp_path):
    """... which names the file and the cause; nothing is left.  A limit of a file's size stands for a disk's."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 5, done
    for name, line in zip(("/state.pt", "", "", "/a.png", "/a.txt"), lines):
        assert line.startswith(f"{tmp_path}{name} cannot be written: ") and "File too large" in line, line
        assert line.endswith(" []")


def test_every_seed_that_is_accepted_works(tmp_path, gradients):
    run(tmp_path / "run", 1, "--seed", 2 ** 63 - 1)


# ---- one step --------------------------------------------------------------------------------------------------------

def test_two_parts_of_two_are_a_batch_of_four(tmp_path, gradients):
    samples, seeds, steps = gradients
    for name, batch, parts in (("four", 4, 1), ("two", 2, 2)):
        run(tmp_path / name, 2, "--batch-size", batch, "--accumulate", parts, "--lr", 0)
    assert sum(samples[:2], []) == sum(samples[2:], []) and len(samples[2]) == 2
    assert len(set(seeds[:2])) == 2 and len(set(seeds[2:])) == 4  # every part draws its own noise
    for whole, parts in zip(steps[:2], steps[2:]):
        torch.testing.assert_close(whole, parts, atol=1e-5 * whole.abs().max().item(), rtol=1e-3)
    four, two = log(tmp_path / "four"), log(tmp_path / "two")
    assert [row["images"] for row in four] == [row["images"] for row in two] == [4, 8]
    assert [row["loss"] for row in four] == pytest.approx([row["loss"] for row in two], abs=2e-4)


def test_a_run_stopped_between_two_rows_of_the_log_loses_none(tmp_path, gradients, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    for steps in (1, 2):
        run(tmp_path / "stopped", steps)
    rows = log(run(tmp_path / "whole", 2))
    assert len(rows) == 1 and log(tmp_path / "stopped") == rows
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    each = log(run(tmp_path / "each", 2))
    assert rows[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, abs=1e-4)


@pytest.mark.parametrize("objective", ["ip2p", "cycle"])
def test_the_loss_of_one_batch_falls(model, objective):
    """Of the cycle, that of its warm-up: the others take more steps to fall than a test has time for."""
    args = options("--objective", objective, "--batch-size", "4")
    batch = next(batches(open_data(args)[0], 4, seed=0))
    optimizer, values = torch.optim.Adam(model.unet.parameters(), 3e-4), []
    for _ in range(12):
        out = train.compute_losses(model, None, batch, args, torch.Generator().manual_seed(0), warming_up=True)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        values.append(out["loss"].item())
    assert list(out) == {"ip2p": ["loss"], "cycle": ["denoise", "loss"]}[objective]
    assert values[-1] < 0.9 * values[0]


def test_the_learning_rate_is_warmed_up_and_stays_until_it_cools_down(tmp_path, gradients, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert train.LR_WARMUP == 100
    monkeypatch.setattr(train, "LR_WARMUP", 2)
    for steps in (1, 4):                                      # the second run goes on
        run(tmp_path / "run", steps, "--lr", 0.003)
    assert rates == pytest.approx([0.0015, 0.003, 0.003, 0.003])
    rates.clear()
    run(tmp_path / "cooled", 6, "--lr", 0.004, "--cooldown", 4)
    assert rates == pytest.approx([0.002, 0.004, 0.004, 0.003, 0.002, 0.001])


def test_what_the_cycle_and_its_losses_are_given(model, monkeypatch):
    """t is drawn from t_min on, t_hat from 0, each with noise of its own; --weights reach their place, and
    each instruction its own maps."""
    args, batch, seen, trip = options("--weights", "sim=7", "--t-min", 700), toy_batch(64), [], object()
    batch.reverse_instructions = ["now undo it"] * 64         # in the toy world, all words are in line
    assert options().t_min == 400 and options("--data", "photos").t_min == 0

    def watched(*given):
        seen.append(given)
        return trip
    monkeypatch.setattr(train, "cycle", watched)
    monkeypatch.setattr(train, "cycle_losses", watched)
    train.round_trip_losses(model, "a CLIP", batch, args, torch.Generator().manual_seed(0))
    (given_model, images, forward, back, t, t_hat, noise), of_losses = seen
    assert given_model is model and images is batch.images
    assert (forward, back) == (batch.instructions, batch.reverse_instructions)
    assert 700 <= t.min() < 720 and 980 < t.max() < 1000 and t_hat.min() < 60 and t_hat.max() > 900
    assert not torch.equal(noise[0], noise[1]) and noise.std() == pytest.approx(1, abs=0.05)

    given_clip, images, captions, edited_captions, given_trip, forward_words, reverse_words, weights = of_losses
    assert given_clip == "a CLIP" and images is batch.images and given_trip is trip
    assert (captions, edited_captions) == (batch.captions, batch.edited_captions)
    for words, texts in ((forward_words, batch.instructions), (reverse_words, batch.reverse_instructions)):
        assert torch.equal(words, content_words(model.tokenizer, model.tokenize(texts)))
    assert not torch.equal(forward_words, reverse_words) and weights == args.weights and weights["sim"] == 7


def test_conditioning_dropout(model):
    """No text below 0.10, no image from 0.05 to 0.15; the image latents are the unscaled mode."""
    r = torch.tensor([0, 0.049, 0.05, 0.099, 0.1, 0.149, 0.15, 0.999])
    text, image = r >= 0.10, (r < 0.05) | (r >= 0.15)
    images, targets = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: seen.append(args))
    train.denoising_loss(model, images, targets, ["make it red"] * 8, r, torch.Generator().manual_seed(0))
    hook.remove()
    ((x, t, context),) = seen
    latents, (with_text, without) = model.vae.encode(images), model.encode_text(["make it red", ""])
    for b in range(8):
        torch.testing.assert_close(x[b, 4:], latents[b] if image[b] else torch.zeros_like(latents[b]))
        torch.testing.assert_close(context[b], with_text if text[b] else without)


def test_the_baseline_of_real_data_has_the_published_loss(model):
    """InstructPix2Pix's loss and its gradients, computed by its formula: all t count alike."""
    args = options("--objective", "ip2p", "--data", "photos", "--precision", "fp32")
    batch, seen = next(batches(open_data(options("--objective", "ip2p"))[0], 4, seed=0)), []
    hook = model.unet.register_forward_pre_hook(lambda module, given: seen.append([x.clone() for x in given]))
    loss = train.compute_losses(model, None, batch, args, torch.Generator().manual_seed(1))["loss"]
    hook.remove()
    weights = [weight for weight in model.unet.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights)

    # The noise is what was added to the latents: their sample is drawn first, then the noise, then t.
    generator = torch.Generator().manual_seed(1)
    torch.rand(4, generator=generator)
    mean, logvar = model.vae.moments(batch.edited_images)
    z_0 = model.vae.scaling_factor * (mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator))
    noise, ((x, t, context),) = torch.randn(mean.shape, generator=generator), seen
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[t].float()[:, None, None, None]
    torch.testing.assert_close(x[:, :4], abar.sqrt() * z_0 + (1 - abar).sqrt() * noise, atol=1e-5, rtol=1e-5)
    expected = torch.nn.functional.mse_loss(model.unet(x, t, context), noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_denoising_is_towards_the_targets_and_weighs_by_the_signal(model):
    """The loss of a network that is wrong by 1 everywhere is the weight 1 / SNR, at most 5; of the right one, 0."""
    images, targets = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn, add_noise = [], model.add_noise

    def watched(z_0, noise, t):
        drawn.append((z_0, noise, t))
        return add_noise(z_0, noise, t)
    model.add_noise = watched
    for wrong_by in (0.0, 1.0):
        model.unet.forward = lambda x, t, context: drawn[-1][1] + wrong_by
        generator = torch.Generator().manual_seed(3)
        loss = train.denoising_loss(model, images, targets, ["a"] * 6, torch.ones(6), generator, options().snr_weight)
        z_0, noise, t = drawn[-1]
        betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
        abar = (1 - betas).cumprod(0)[t]
        weights = [min(5, (1 - a) / a) for a in abar.tolist()]
        assert loss.item() == pytest.approx(wrong_by * sum(weights) / 6, rel=1e-3)
    mean, logvar = model.vae.moments(targets)
    deviation = (z_0 / model.vae.scaling_factor - mean) / (logvar / 2).exp()
    assert 0.9 < deviation.std() < 1.1 and abs(deviation.mean()) < 0.1        # a sample of the target's posterior


@pytest.mark.parametrize("objective, warming_up", [("cycle", False), ("cycle", True), ("ip2p", False)])
def test_what_each_objective_denoises(model, monkeypatch, objective, warming_up):
    args, calls = options("--objective", objective), []
    if objective == "cycle":
        args.weights["denoise"] = 3
    monkeypatch.setattr(train, "denoising_loss", lambda *given: calls.append(given) or torch.ones(()))
    monkeypatch.setattr(train, "round_trip_losses", lambda *_: {"cec": torch.ones(()) * 2})
    batch = next(batches(open_data(args)[0], 64, seed=0))
    out = train.compute_losses(model, None, batch, args, torch.Generator().manual_seed(0), warming_up)
    ((_, images, targets, texts, r, _, snr_weight),) = calls
    assert images is batch.images and len(r) == len(texts) == 64
    assert out["loss"] == (1 if objective == "ip2p" else 3 if warming_up else 3 + 2) and snr_weight == 5
    if objective == "ip2p":
        assert targets is batch.edited_images and texts == batch.instructions and r.max() > 0.9 and r.min() < 0.1
    else:                                                     # the input itself, a third each: image, nothing, caption
        assert targets is images and texts == batch.captions and r.max() < 0.15
        assert all(0.1 < (r // 0.05 == third).float().mean() < 0.6 for third in range(3))
