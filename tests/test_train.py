"""train.py as a user runs it, in the toy world, a few steps at a time; and truth.py's judgement of edits."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import evaluate
import toy
import train
from losses import ClipScorer, attention_loss
from pictures import save_png, to_pil
from truth import judge
from uip2p import EditModel, delta_edit

TOY = Path(__file__).resolve().parent.parent / "models/toy"
pytestmark = pytest.mark.skipif(not (TOY / "text2image").is_dir(), reason="models/toy is not here: run pretrain.py")

TOY_UNET = ["--model", str(TOY), "--unet", "text2image", "--resolution", "32"]      # for other data than the toy world's
TOY_MODEL = [*TOY_UNET, "--clip", str(TOY / "clip")]
FAST = ["--batch-size", "2", "--log-every", "1", "--save-every", "2"]
LOSSES = {"cycle": ["clip", "sim", "attn", "recon", "cec", "delta", "denoise", "loss"], "identity": ["denoise", "loss"],
          "ip2p": ["loss"]}
train.TOY_RUNS["identity"]["batch_size"] = 4                      # with which the cycle from text-to-image begins
train.FROM_TEXT2IMAGE |= {"identity_steps": 2, "sharp": 0}
UNET = "unet/diffusion_pytorch_model.safetensors"


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


def log(path):
    with open(path / "log.csv") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def state(path):
    """A run's state.pt, with the names of the weights that train, all in float32, beside their average."""
    state = torch.load(path / "state.pt", weights_only=True)
    trained = [name for name, weight in state["unet"].items() if weight.dtype == torch.float32]
    return state | {"ema": dict(zip(trained, state["ema"], strict=True))}


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
        lines.append({"image": f"in{i}.png", "edited_image": f"out{i}.png", "caption": edit.scene.caption, "instruction":
                      edit.instruction, "edited_caption": edit.edited.caption, "reverse_instruction": edit.reverse_instruction})
    lines[2] |= changes
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of four steps of the cycle objective that was not stopped, and the model and CLIP it trained with."""
    path, used = tmp_path_factory.mktemp("train") / "whole", []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (EditModel, ClipScorer):
            def keep(*args, load=kind.from_pretrained, **kwargs):
                used.append(load(*args, **kwargs))
                return used[-1]
            patch.setattr(kind, "from_pretrained", keep)
        run(path, 4)
    return path, used[-1], used[1]


@pytest.fixture
def model():
    model = EditModel.from_pretrained(TOY, unet="text2image")
    model.unet.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def scorer():
    return ClipScorer.from_pretrained(TOY / "clip")


@pytest.fixture
def gradients(monkeypatch):
    """Training with a loss without random numbers; returns (the samples of each part, the seeds of each part, the gradient of
    each step)."""
    samples, seeds, steps = [], [], []

    def loss(model, scorer, batch, args, generator):
        samples.append(batch.instructions)
        seeds.append(generator.initial_seed())
        z, t = model.encode(batch.images), torch.full((len(batch.images),), 500)
        return {"loss": model.unet(torch.cat([z, z], 1), t, model.encode_text(batch.instructions)).square().mean()}

    def norm(parameters, bound):
        steps.append(torch.cat([p.grad.flatten() for p in parameters]))
        return steps[-1].norm()
    monkeypatch.setattr(train, "compute_losses", loss)
    monkeypatch.setattr(train, "validate", lambda *_: {"loss": 1.0})
    monkeypatch.setattr(train, "figure", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    return samples, seeds, steps


def options(*flags):
    return train.parse(list(flags))[1]


# ---- a run and what it leaves --------------------------------------------------------------------------------------------

def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path):
    path = run(tmp_path / "stopped", 2)
    assert state(path)["step"] == 2 and len(log(path)) == 2
    run(path, 4)
    expected, got = contents(whole[0]), contents(path)
    assert got.keys() == expected.keys()
    assert [name for name in got if not name.endswith("state.pt") and got[name] != expected[name]] == []
    expected, got = state(whole[0]), state(path)
    assert got["step"] == expected["step"] == 4 and got["rows"] == expected["rows"] and got["best"] == expected["best"]
    for part in ("unet", "ema"):
        assert all(torch.equal(got[part][k], expected[part][k]) for k in expected[part]), part
    for i, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(got["optimizer"]["state"][i][k], v) for k, v in moments.items())


def test_what_a_run_leaves_behind(whole):
    path = whole[0]
    assert {f.name for f in path.iterdir()} == {
        "best", "identity", "delta", "model", "log.csv", "curves.png", "state.pt", "step-000002.png", "step-000004.png"}
    rows = log(path)
    assert list(rows[0]) == ["step", "images", *LOSSES["cycle"]]
    assert [(row["step"], row["images"]) for row in rows] == [(1, 2), (2, 4), (3, 6), (4, 8)]
    weights = dict(zip(("clip", "attn", "sim", "recon"), options().weights))
    for row in rows:
        assert row["cec"] == pytest.approx(sum(w * row[name] for name, w in weights.items()), abs=1e-3)
        assert row["loss"] == pytest.approx(row["cec"] + row["denoise"] + options().delta * row["delta"], abs=1e-3)
    sizes = {}
    for file in path.glob("*.png"):
        with Image.open(file) as picture:
            picture.load()
            sizes[file.name] = picture.size
    assert sizes["step-000002.png"] == sizes["step-000004.png"]
    assert sizes["step-000004.png"][0] > 5 * 128 and sizes["step-000004.png"][1] > 8 * 128  # five columns, eight edits


def test_the_models_of_a_run_are_the_average_and_load(whole, scorer):
    path, saved = whole[0], state(whole[0])
    last, best = (EditModel.from_pretrained(path / name) for name in ("model", "best"))
    assert all(torch.equal(v, saved["ema"][k]) for k, v in last.unet.state_dict().items())
    assert any(not torch.equal(v, saved["unet"][k]) for k, v in last.unet.state_dict().items())
    assert last.defaults == EditModel.from_pretrained(TOY, unet="text2image").defaults
    assert last.edit(torch.zeros(1, 3, 32, 32), ["make the background pink"], steps=2).isfinite().all()
    args = options("--batch-size", "2", "--delta", "0")
    score = train.validate(best, scorer, train.open_data("toy", "validation", args), args)["cec"]
    assert score == pytest.approx(saved["best"], rel=1e-4)    # `best` is the model that had this validation loss


def test_only_the_unet_trains(whole):
    path, used, scorer = whole
    start = EditModel.from_pretrained(TOY, unet="text2image")
    frozen = {"vae": (used.vae, start.vae), "text encoder": (used.text_encoder, start.text_encoder),
              "CLIP": (scorer.clip, ClipScorer.from_pretrained(TOY / "clip").clip)}
    for name, (after, before) in frozen.items():
        assert not any(p.requires_grad or p.grad is not None for p in after.parameters()), name
        assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items()), name
    assert all(torch.equal(v, load_file(path / "model/vae/diffusion_pytorch_model.safetensors")[k])
               for k, v in start.vae.state_dict().items())
    saved = state(path)
    assert [k for k, v in start.unet.state_dict().items() if torch.equal(v, saved["unet"][k])] == []
    assert len(saved["optimizer"]["state"]) == len(list(start.unet.parameters()))
    gradients = [moments["exp_avg"].abs().max() for moments in saved["optimizer"]["state"].values()]
    assert min(gradients) > 0                                 # weight decay alone moves a parameter, too


def test_cross_attention_alone_trains_and_resumes(tmp_path):
    flags = ["--train", "cross-attention", "--precision", "bf16", "--model", TOY, "--unet", "unet", "--lr", ".1"]
    whole, stopped = run(tmp_path / "whole", 2, *flags), tmp_path / "stopped"
    for steps in (1, 2):
        run(stopped, steps, *flags)
    start, saved, resumed = EditModel.from_pretrained(TOY), state(whole), state(stopped)
    for name, before in start.unet.state_dict().items():
        after = saved["unet"][name]
        assert torch.equal(after, resumed["unet"][name]), name
        if ".attn2." in name or name.startswith("conv_in."):
            assert not torch.equal(after, before) and not torch.equal(saved["ema"][name], before), name
            assert torch.equal(saved["ema"][name], resumed["ema"][name]), name
        else:
            assert torch.equal(after, before.bfloat16()) and name not in saved["ema"], name
    assert len(saved["optimizer"]["state"]) == 2 + 5 * sum(name.endswith("attn2.to_q.weight") for name in saved["unet"])
    model = EditModel.from_pretrained(whole / "model")        # its frozen parts are not rounded
    for part in ("vae", "text_encoder"):
        assert all(map(torch.equal, getattr(model, part).parameters(), getattr(start, part).parameters()))


def test_two_processes_are_two_parts_of_a_step(tmp_path):
    """The cycle with all its random numbers: two processes of one sample each end as one with --accumulate 2, whose two
    parts are a batch of two (below)."""
    flags = [*TOY_MODEL, "--data", "toy", "--unet", "unet", "--lr", ".1", "--batch-size", "1"]
    one = run(tmp_path / "one", 2, *flags, "--accumulate", 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train.__file__, *FAST, *flags,
               "--steps", "2", "--output", str(tmp_path / "two")]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("training of") == 1 and said.stdout.count("step 2: validation") == 1
    one, two = state(one), state(tmp_path / "two")
    start = EditModel.from_pretrained(TOY).unet.state_dict()
    for part in ("unet", "ema"):
        difference, change = (max((a[part][k] - b[k]).abs().max() for k in start) for a, b in
                              ((two, one[part]), (one, start)))
        assert difference < .01 * change
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a == pytest.approx(b, abs=2e-4)
    assert one["best"] == pytest.approx(two["best"], abs=2e-4)            # on the same samples


def test_the_average_on_the_host_takes_ten_steps_at_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "update_average", lambda average, weights, step, decay, steps: calls.append((step, steps)))
    run(tmp_path, 12, "--objective", "identity", "--ema-on-host", "--save-every", 100)
    assert calls == [(9, 10), (11, 2)]                        # what is saved has the last steps, too


def test_checkpointing_trains_the_same(tmp_path):
    plain, less = (state(run(tmp_path / str(len(flags)), 1, *TOY_MODEL, "--unet", "unet", "--lr", ".1", *flags))["unet"]
                   for flags in ((), ("--checkpointing",)))
    assert all(torch.allclose(plain[k], less[k], atol=1e-4) for k in plain)


def test_the_cycle_from_text_to_image_first_learns_to_use_its_input(tmp_path):
    path = run(tmp_path / "run", 1, "--lr", 0)
    identity, delta, cycle = (load_file(path / part / "model" / UNET) for part in ("identity", "delta", "."))
    assert all(torch.equal(v, delta[k]) for k, v in cycle.items())
    assert identity["conv_in.weight"][:, 4:].abs().max() > 0 and state(path / "identity")["step"] == state(path / "delta")["step"] == 2
    assert list(log(path / "identity")[0]) == ["step", "images", "denoise", "loss"]
    assert list(log(path / "delta")[0]) == ["step", "images", "denoise", "delta", "loss"]
    assert not {"identity", "delta"} & {f.name for f in run(tmp_path / "none", 1, "--identity-steps", 0).iterdir()}
    assert not (run(tmp_path / "plain", 1, "--delta", 0) / "delta").exists()


def test_the_delta_edit_is_that_of_the_start(tmp_path, monkeypatch):
    """Its weight counts, and its UNet stays as it was when the training began, also when that is resumed."""
    targets = []
    def watched(model, *args):
        targets.append(model.unet.conv_out.weight.clone())
        return delta_edit(model, *args)
    monkeypatch.setattr(train, "delta_edit", watched)
    flags = [*TOY_UNET, "--unet", "unet", "--lr", .1, "--delta", 2]
    rows = log(run(tmp_path / "run", 1, *flags))
    assert rows[0]["loss"] == pytest.approx(rows[0]["cec"] + rows[0]["denoise"] + 2 * rows[0]["delta"], rel=1e-3)
    assert len(log(run(tmp_path / "run", 2, *flags))) == 2
    start = load_file(TOY / UNET)["conv_out.weight"].float()
    assert all(torch.equal(weight, start) for weight in targets) and len(targets) > 2
    assert not torch.equal(load_file(tmp_path / "run/model" / UNET)["conv_out.weight"].float(), start)

    del targets[:]
    rows = log(run(tmp_path / "identity", 2, *flags, "--objective", "identity"))
    assert rows[0]["loss"] == pytest.approx(rows[0]["denoise"] + 2 * rows[0]["delta"], rel=1e-3) and len(targets) == 2 + 4


@pytest.mark.parametrize("objective", ["ip2p", "identity"])
def test_the_other_objectives_train_from_a_folder(tmp_path, objective):
    path = run(tmp_path / "run", 2, "--objective", objective, *TOY_UNET, "--data", folder(tmp_path / "data"))
    assert list(log(path)[0]) == ["step", "images", *LOSSES[objective]] and len(log(path)) == 2
    assert not torch.equal(load_file(path / "model" / UNET)["conv_out.weight"],
                           load_file(TOY / "text2image/diffusion_pytorch_model.safetensors")["conv_out.weight"])


def test_a_folder_trains_the_cycle_without_edited_images(tmp_path, monkeypatch):
    data, seen, compute = folder(tmp_path / "data"), [], train.compute_losses
    for file in data.glob("out*.png"):
        file.unlink()
    monkeypatch.setattr(train, "compute_losses", lambda model, scorer, batch, *rest: (
        seen.append(batch.instructions) or compute(model, scorer, batch, *rest)))
    monkeypatch.setattr(train, "validate", lambda *_: {"cec": 1.0})
    run(tmp_path / "run", 2, *TOY_MODEL, "--identity-steps", 0, "--data", data)
    assert sorted(seen[0] + seen[1]) == sorted(toy.edit("train", i).instruction for i in range(4))  # an epoch in two steps


def other_data(kind, path):
    """The arguments for ten pairs of the toy world as other sources: two shards and a side file, InstructPix2Pix's tree, a mix."""
    path.mkdir()
    edits, flags = [toy.edit("train", i) for i in range(10)], ["--texts", path / "side.jsonl"]
    if kind == "mix":
        return ["--data", folder(path / "folder"), *other_data("shards", path / "shards")[1:], "--mix", 1, 2]
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
    assert ("validation on the training data itself" in capsys.readouterr().out) == (kind != "tree")


def test_the_baseline_trains_from_the_data_of_instruct_pix2pix(tmp_path):
    flags = other_data("tree", tmp_path / "data")[:-2]        # without the side file
    path = run(tmp_path / "run", 3, "--objective", "ip2p", *TOY_UNET, *flags, "--save-every", 3)
    assert len(log(path)) == 3 and (path / "step-000003.png").is_file()


@pytest.mark.parametrize("kind", ["shards", "tree", "mix"])
def test_a_run_that_was_stopped_in_the_middle_of_a_shard_sees_what_it_would_have_seen(tmp_path, gradients, kind):
    samples, flags = gradients[0], [*TOY_UNET, *other_data(kind, tmp_path / "data"), "--objective", "identity"]
    run(tmp_path / "whole", 10, *flags)
    whole = samples[:]
    samples.clear()
    run(tmp_path / "stopped", 3, *flags, "--workers", 2)
    run(tmp_path / "stopped", 10, *flags)
    assert samples == whole and len({i for batch in whole for i in batch}) > 7


# ---- what is refused -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, value", [("--lr", "1e-3"), ("--seed", "1"), ("--start", "noise"), ("--objective", "identity")])
def test_other_settings_do_not_enter_the_same_folder(whole, capsys, flag, value):
    before = contents(whole[0])
    message = refuse(capsys, *FAST, "--output", whole[0], "--steps", 6, flag, value)
    assert str(whole[0]) in message and flag in message
    assert contents(whole[0]) == before


@pytest.mark.parametrize("argv, says", [
    *[([flag, value], flag) for flag, values in {
        "--lr": ("nan", "inf", "-1", "fast"), "--batch-size": ("0", "-2", "2.5"), "--steps": ("0", "nan"), "--accumulate": ("0",),
        "--resolution": ("0",), "--clip-grad": ("nan",), "--ema": ("-.5",), "--denoise": ("nan",), "--t-min": ("-1", "1000"),
        "--workers": ("-1",), "--seed": ("-1", "1e3"), "--log-every": ("0",), "--save-every": ("0",), "--device": ("abacus",),
        "--objective": ("magic",), "--start": ("edit",)}.items() for value in values],
    (["--weights", "1", "1", "nan", "1"], "--weights"), (["--weights", "1", "1"], "--weights"), (["--no-such-option"], "--no-such"),
    (["--model", "no-such-directory"], "no-such-directory"), (["--model", "./no/such"], "no/such"),
    (["--unet", "no-such-unet"], "no-such-unet"), (["--clip", "/no/such/clip"], "/no/such/clip"),
    ([*TOY_MODEL, "--data", "no-such-data"], "no-such-data"),
    (["--validation", "no-such-data"], "no-such-data"), (["--data", "no-such-data.tar"], "no-such-data.tar"),
    (["--data", "a.tar", "b.tar"], "--mix 1 weights (quote"), (["--mix", "1", "2"], "--mix 2 weights"), (["--texts", "a"], "--texts"),
    (["--objective", "identity", "--denoise", "0"], "nothing to learn"),
    (["--data", "a", "--texts", "no-such-texts"], "no-such-texts"), (["--resolution", "64"], "--resolution 32"),
])
def test_bad_arguments_are_refused_in_one_line_and_leave_nothing(tmp_path, capsys, argv, says):
    assert says in refuse(capsys, "--output", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


def test_a_clip_without_a_vocabulary_is_refused(tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TOY / "clip" / name, tmp_path / "clip")
    assert "clip has no tokenizer" in refuse(capsys, "--clip", tmp_path / "clip", "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective, key", [("cycle", "caption"), ("ip2p", "edited_image")])
def test_a_bad_line_of_the_listing_is_named(tmp_path, capsys, objective, key):
    message = refuse(capsys, *TOY_UNET, "--objective", objective, "--data", folder(tmp_path / "data", **{key: ""}),
                     "--output", tmp_path / "run")
    assert "metadata.jsonl line 3" in message and key in message
    assert not (tmp_path / "run").exists()


def test_a_missing_image_of_the_listing_is_named(tmp_path, capsys, gradients):
    data = folder(tmp_path / "data", image="elsewhere.png")
    message = refuse(capsys, *FAST, *TOY_UNET, "--objective", "identity", "--data", data, "--output", tmp_path / "run", "--steps", 50)
    assert "samples are broken; the last is" in message and "line 3: " in message and "elsewhere.png" in message


def test_a_damaged_state_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "state.pt").write_bytes(b"PK\3\4 cut short")
    assert "state.pt" in refuse(capsys, *FAST, "--output", tmp_path, "--steps", 1)


@pytest.mark.parametrize("flags", [["--objective", "ip2p", "--weights", "1", "2", "3", "4"], ["--objective", "identity", "--t-min", "9"],
                                   ["--objective", "ip2p", "--denoise", "2"], ["--objective", "ip2p", "--reencode"],
                                   ["--objective", "identity", "--identity-steps", "3"]])
def test_an_option_without_effect_is_refused(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(train, "run", lambda args: None)
    refuse(capsys, "--output", tmp_path / "run", *flags)


def test_the_toy_model_may_be_named(monkeypatch):
    monkeypatch.chdir(TOY.parent.parent)
    named, default = vars(options("--model", "models/toy")), vars(options())
    assert {k: named[k] for k in named if k != "model"} == {k: default[k] for k in default if k != "model"}


def test_every_seed_that_is_accepted_works(tmp_path, gradients):
    run(tmp_path / "run", 1, "--objective", "identity", "--seed", 2 ** 63 - 1)


# ---- one step ------------------------------------------------------------------------------------------------------------

def test_two_parts_of_two_are_a_batch_of_four(tmp_path, gradients):
    samples, seeds, steps = gradients
    for name, batch, parts in (("four", 4, 1), ("two", 2, 2)):
        run(tmp_path / name, 2, "--objective", "identity", "--batch-size", batch, "--accumulate", parts, "--lr", 0)
    assert sum(samples[:2], []) == sum(samples[2:], []) and len(samples[2]) == 2
    assert len(set(seeds[:2])) == 2 and len(set(seeds[2:])) == 4  # every part draws its own noise
    for whole, parts in zip(steps[:2], steps[2:]):
        torch.testing.assert_close(whole, parts, atol=1e-5 * whole.abs().max().item(), rtol=1e-3)
    (four, two) = (log(tmp_path / name) for name in ("four", "two"))
    assert [row["images"] for row in four] == [row["images"] for row in two] == [4, 8]
    assert [row["loss"] for row in four] == pytest.approx([row["loss"] for row in two], abs=2e-4)


def test_a_run_stopped_between_two_rows_of_the_log_loses_none(tmp_path, gradients):
    for steps, every in ((1, 3), (2, 1)):
        run(tmp_path / "stopped", steps, "--objective", "identity", "--log-every", every)
    assert log(tmp_path / "stopped") == log(run(tmp_path / "whole", 2, "--objective", "identity", "--log-every", 2))


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tmp_path, capsys, gradients, monkeypatch):
    whole = train.compute_losses
    def loss(model, scorer, batch, args, generator):
        return {"loss": whole(model, scorer, batch, args, generator)["loss"] * (float("nan") if len(gradients[2]) == 1 else 1)}
    monkeypatch.setattr(train, "compute_losses", loss)
    message = refuse(capsys, *FAST, "--objective", "identity", "--save-every", 1, "--steps", 3, "--output", tmp_path)
    assert "not finite at step 2" in message
    assert state(tmp_path)["step"] == 1 and all(v.isfinite().all() for v in state(tmp_path)["unet"].values())


@pytest.mark.parametrize("name, error", [("torch.save", RuntimeError), ("uip2p.save_file", SafetensorError)])
def test_a_full_disk_is_said_in_one_line(tmp_path, capsys, monkeypatch, name, error):
    def save(content, path, *rest):
        Path(path).write_bytes(b"half")
        raise error("No space left")
    monkeypatch.setattr(name, save)
    assert "No space left" in refuse(capsys, *FAST, "--objective", "identity", "--steps", 1, "--output", tmp_path)
    assert not any(file.read_bytes() == b"half" for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("objective", ["ip2p", "identity"])   # the cycle's takes more steps to fall than a test has time for
def test_the_loss_of_one_batch_falls(model, objective):
    args = options("--objective", objective, "--batch-size", "4")
    batch = next(train.batches(train.open_data("toy", "train", args), 4, seed=0))
    optimizer, losses = torch.optim.Adam(model.unet.parameters(), 1e-3), []
    for _ in range(12):
        out = train.compute_losses(model, None, batch, args, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert list(out) == LOSSES[objective]
    assert losses[-1] < .9 * losses[0]


def test_the_learning_rate_is_warmed_up_and_stays():
    assert [train.learning_rate(step, 3.) for step in (0, 49, 99, 100, 5000)] == pytest.approx([.03, 1.5, 3, 3, 3])


def test_the_forward_edit_is_noised_from_t_min_on(model, monkeypatch):
    """The reverse edit is noised at any time, and the choices that the paper leaves open reach the cycle."""
    args, seen = options("--t-min", "700", "--start", "noise", "--reverse-start", "edit", "--reencode", "--sharp", "3"), []
    def watched(model, images, forward, back, t, t_hat, noise, *choices):
        seen.append((t, t_hat, noise, choices))
        raise StopIteration
    monkeypatch.setattr(train, "cycle", watched)
    batch = next(train.batches(train.open_data("toy", "train", args), 64, seed=0))
    with pytest.raises(StopIteration):
        train.round_trip_losses(model, None, batch, args, torch.Generator().manual_seed(0))
    ((t, t_hat, noise, choices),) = seen
    assert 700 <= t.min() < 720 and 980 < t.max() < 1000 and t_hat.min() < 60 and t_hat.max() > 900
    assert choices == ("noise", "edit", True, 3) and not torch.equal(noise[0], noise[1]) and noise.std() == pytest.approx(1, abs=.05)


def test_conditioning_dropout(model):
    """No text below .10, no image from .05 to .15; the image latents are the unscaled mode."""
    r = torch.tensor([0, .049, .05, .099, .1, .149, .15, .999])
    text, image = r >= .10, (r < .05) | (r >= .15)
    images, targets = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: seen.append(args))
    train.denoising_loss(model, images, targets, ["make it red"] * 8, r, torch.Generator().manual_seed(0))
    hook.remove()
    ((x, t, context),) = seen
    latents, (with_text, without) = model.vae.encode(images), model.encode_text(["make it red", ""])
    for b in range(8):
        torch.testing.assert_close(x[b, 4:], latents[b] if image[b] else torch.zeros(4, 8, 8).expand_as(latents[b]))
        torch.testing.assert_close(context[b], with_text if text[b] else without)


def test_denoising_is_towards_the_targets_and_weighs_by_the_signal(model):
    """The loss of a network that is wrong by 1 everywhere is the weight 1 / SNR, at most 5; of the right one, 0."""
    images, targets = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn, add_noise = [], model.add_noise
    model.add_noise = lambda z_0, noise, t: drawn.append((z_0, noise, t)) or add_noise(z_0, noise, t)
    for wrong_by in (0., 1.):
        model.unet.forward = lambda x, t, context: drawn[-1][1] + wrong_by
        loss = train.denoising_loss(model, images, targets, ["a"] * 6, torch.ones(6), torch.Generator().manual_seed(3))
        z_0, noise, t = drawn[-1]
        betas = torch.linspace(.00085 ** .5, .012 ** .5, 1000, dtype=torch.float64) ** 2
        abar = (1 - betas).cumprod(0)[t]
        assert loss.item() == pytest.approx(wrong_by * sum(min(5, (1 - a) / a) for a in abar.tolist()) / 6, rel=1e-3)
    mean, logvar = model.vae.moments(targets)
    deviation = (z_0 / model.vae.scaling_factor - mean) / (logvar / 2).exp()
    assert .9 < deviation.std() < 1.1 and abs(deviation.mean()) < .1  # a sample of the target's posterior, at unit variance


@pytest.mark.parametrize("objective, rows", [("cycle", 32), ("identity", 64), ("ip2p", 64)])
def test_what_each_objective_denoises(model, monkeypatch, objective, rows):
    args, calls = options("--objective", objective), []
    monkeypatch.setattr(train, "denoising_loss", lambda *a: calls.append(a) or torch.zeros(()))
    monkeypatch.setattr(train, "round_trip_losses", lambda *_: {"cec": torch.ones(())})
    batch = next(train.batches(train.open_data("toy", "train", args), 64, seed=0))
    train.compute_losses(model, None, batch, args, torch.Generator().manual_seed(0))
    ((_, images, targets, texts, r, _),) = calls
    assert torch.equal(images, batch.images[:rows]) and len(r) == len(texts) == rows
    if objective == "ip2p":
        assert torch.equal(targets, batch.edited_images) and texts == batch.instructions and r.max() > .9 and r.min() < .1
    else:                                                     # the input itself, a third each: image, nothing, or caption
        assert torch.equal(targets, images) and texts == batch.captions[:rows] and r.max() < .15
        assert all(.1 < (r // .05 == third).float().mean() < .6 for third in range(3))


def test_an_instruction_without_content_words_leaves_the_loss_finite():
    assert attention_loss([torch.zeros(1, 4, 4)], [torch.rand(1, 4, 4)]).isfinite()


# ---- the judge -----------------------------------------------------------------------------------------------------------

def judged(edits, scenes, scorer):
    return judge(edits, toy.render([e.scene for e in edits]), toy.render(scenes), scorer)


def test_the_true_edit_is_right_and_the_copy_is_not(scorer):
    edits = [toy.edit("test", i) for i in range(15)]
    true, copy = judged(edits, [e.edited for e in edits], scorer), judged(edits, [e.scene for e in edits], scorer)
    assert set(true) == {*evaluate.COLUMNS, "CLIP-I"} and all(v.shape == (15,) for v in true.values())
    for name in ("L1", "L2", "inside", "outside"):
        assert true[name].max() == 0
    assert true["right"].min() == 1 and copy["right"].max() == 0
    assert copy["outside"].max() < .01 and copy["inside"].min() > .02
    assert copy["L1"].min() > 0 and copy["direction"].abs().max() < 1e-3
    assert true["CLIP-I"].min() > .999 > .95 > copy["CLIP-I"].mean()
    assert true["done"].mean() > copy["done"].mean() and true["CLIP-T"].mean() > copy["CLIP-T"].mean()


def test_damage_outside_the_edit_counts_as_outside_alone(scorer):
    edit = toy.edit("test", 0)                                # a change of colour
    images, output = toy.render([edit.scene]), toy.render([edit.edited])
    mask = toy.edit_mask(images, output)
    damaged = torch.where(mask, output, output + .2)
    scores = judge([edit], images, damaged, scorer)
    assert scores["inside"].item() == 0 and scores["right"].item() == 1 and scores["outside"].item() == pytest.approx(.1, rel=1e-4)
    assert scores["L1"].item() == pytest.approx(.1 * (~mask).float().mean().item(), rel=1e-3)
    assert scores["L2"].item() == pytest.approx(.01 * (~mask).float().mean().item(), rel=1e-3)


def test_an_object_may_be_added_at_any_free_place(scorer):
    edits = [e for e in (toy.edit("test", i) for i in range(40)) if e.kind == "add"]
    def distance(edit, scene):
        a, b = edit.edited.objects[-1], scene.objects[-1]
        return (a.x - b.x) ** 2 + (a.y - b.y) ** 2
    elsewhere = [max(toy.truths(e), key=lambda scene: distance(e, scene)) for e in edits]
    assert all(distance(e, scene) > 25 for e, scene in zip(edits, elsewhere))
    scores = judged(edits, elsewhere, scorer)
    assert scores["L1"].max() == 0 and scores["outside"].max() == 0 and scores["right"].min() == 1
    removals = [e for e in (toy.edit("test", i) for i in range(40)) if e.kind == "remove"]
    assert judged(removals, [e.scene for e in removals], scorer)["right"].max() == 0


@pytest.mark.parametrize("views", [0, 2])
def test_the_ascent_climbs_clip_from_the_input(model, scorer, views):
    edits = [toy.edit("validation", i) for i in range(8)]
    images = toy.render([e.scene for e in edits])
    outputs = evaluate.ascend(model, scorer, edits, images, views, steps=15)
    assert judge(edits, images, outputs, scorer)["direction"].mean() > .3


def test_the_table_of_a_few_scenes(whole, capsys):
    evaluate.main(["toy", "--models", str(whole[0] / "model"), "--scenes", "5", "--steps", "1", "2", "--scales", "1.5:1.2", "3:1.5", "--kinds"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][-len(evaluate.COLUMNS):] == list(evaluate.COLUMNS) and set("".join(rows[1])) == {"-"}
    assert len({len(row) for row in rows}) == 1
    models, per_kind = rows[2:], 1 + len(toy.KINDS)
    assert len(models) == (2 + 4) * per_kind                  # copy, VAE, and two steps by two scales
    assert [row[1] for row in models[2 * per_kind::per_kind]] == ["1.5, 1.2, 1", "3, 1.5, 1", "1.5, 1.2, 2", "3, 1.5, 2"]
    values = [[float(v) for v in row[2:]] for row in models]
    right, outside = (evaluate.COLUMNS.index(name) for name in ("right", "outside"))
    assert values[0][right] == 0 and values[0][outside] < .01 < values[2 * per_kind][outside]
    for group in range(0, len(values), per_kind):             # a model's row is the mean of its kinds'
        for column in range(len(evaluate.COLUMNS)):
            kinds = [row[column] for row in values[group + 1:group + per_kind]]
            assert values[group][column] == pytest.approx(sum(kinds) / 5, abs=2e-3)


@pytest.mark.parametrize("flags", [["--scales", "3"], ["--scales", "nan:1"], ["--steps", "0"], ["--scenes", "0"], ["--models", "no-such-model"]])
def test_bad_arguments_of_the_evaluation(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["toy", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and ": error: " in error
