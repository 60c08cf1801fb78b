"""experiments/published.py as a user runs it, on miniatures of its data sets; each metric also by another route."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer, ViTConfig, ViTModel
from transformers.image_utils import (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN,
                                       OPENAI_CLIP_STD)

import edit
import toy
from experiments import published
from experiments.published import (METRICS, Dino, compare, directions, plot, preprocess, read_magicbrush,
                                   read_test_split)
from losses import ClipScorer
from pictures import load_image, save_png
from uip2p import EditModel

ROOT = Path(__file__).resolve().parent.parent
MODEL, CLIP = ROOT / "models/toy", ROOT / "models/toy/clip"
FAST = ["--models", str(MODEL), "--steps", "2", "--batch-size", "2"]


def noise(height, width, seed=0):
    """A picture of single pixels, many of them black or white, at which bicubic filters overshoot."""
    values = np.random.default_rng(seed).normal(127, 120, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def tensor(picture):
    return torch.tensor(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="session")
def dino_path(tmp_path_factory):
    """A random ViT of images of 32x32 in the hub's layout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino")
    ViTModel(ViTConfig(image_size=32, patch_size=8, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=2, initializer_range=.3), add_pooling_layer=False).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def judges(dino_path):
    return ClipScorer.from_pretrained(CLIP), Dino.from_pretrained(dino_path)


# ---- miniatures ------------------------------------------------------------------------------------------------------

def magicbrush(path, turns=(1, 3, 2)):
    """MagicBrush's test with sessions of so many turns, of toy scenes, the second one's larger.

    Of the captions, the first session has no local one and the second an empty one for its last turn."""
    sessions, captions = {}, {"global": {}, "local": {}}
    for s, count in enumerate(turns):
        id, rows, edits = str(1000 + s), [], [toy.edit("test", 10 * s + n) for n in range(count)]
        scenes = [edits[0].scene] + [e.edited for e in edits]
        folder, names = path / "images" / id, [f"{id}-input.png"] + [f"{id}-output{n + 1}.png" for n in range(count)]
        folder.mkdir(parents=True)
        for name, image in zip(names, toy.render(scenes)):
            save_png(image.repeat_interleave(2, 2)[:, :, :48] if s == 1 else image, folder / name)
        for n, e in enumerate(edits):
            rows.append({"input": names[n], "mask": f"{id}-mask{n + 1}.png", "output": names[n + 1],
                         "instruction": e.instruction})
        sessions[id] = rows
        captions["global"][id] = {name: scene.caption for name, scene in zip(names, scenes)}
        captions["local"][id] = {name: e.instruction for name, e in zip(names[1:], edits)}
    captions["local"]["1000"] = {}
    captions["local"]["1001"]["1001-output3.png"] = " "
    rewrite(path, edit_sessions=sessions, global_descriptions=captions["global"],
            local_descriptions=captions["local"])
    return path


def rewrite(path, **files):
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))


def answers(sessions, folder, pick):
    """An editor's folder in which the outputs of each setting are the images that pick(session, turn) names."""
    for session in sessions:
        for turn in session:
            for setting in ("single-turn", "multi-turn"):
                target = folder / turn.output(setting)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(pick(session, turn), target)
    return folder


def instruct_pix2pix(path, count=40):
    rows = []
    for n in range(count):
        e, name = toy.edit("test", n), f"{n:07}"
        (path / name).mkdir(parents=True)
        caption = {"caption" if n % 2 else "input": e.scene.caption}
        texts = caption | {"edit": e.instruction, "output": e.edited.caption}
        (path / name / "prompt.json").write_text(json.dumps(texts))
        for seed in (n + 5, n + 6):
            for i, image in enumerate(toy.render([e.scene, e.edited])):
                save_png(image, path / name / f"{seed}_{i}.jpg")
        rows.append([name, [n + 5, n + 6]])
    (path / "seeds.json").write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def brush(tmp_path_factory):
    """A MagicBrush that tests do not change."""
    return magicbrush(tmp_path_factory.mktemp("brush"))


def run(output, dino, *argv):
    """published.py magicbrush -> its table as {(setting, method): values}, its lines, and the rows of its .jsonl."""
    published.main(["magicbrush", *map(str, argv), "--clip", str(CLIP), "--dino", str(dino), "--output", str(output)])
    lines = (output / "magicbrush.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    rows = [json.loads(line) for line in (output / "magicbrush.jsonl").read_text().splitlines()]
    return {tuple(row[:2]): row[2:] for row in cells}, lines, rows


def refuse(capsys, *argv):
    """The message of a run that must fail with one line, after bars at most, and status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        published.main([str(a) for a in argv])
    *bars, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith("experiments.published: error: ")
    assert not [b for b in bars if b and "it/s" not in b]
    return error


# ---- metrics, by another route ---------------------------------------------------------------------------------------

def processed(picture, resize, crop, mean, std):
    """By pillow, as torchvision's Resize, CenterCrop and Normalize do it, which MagicBrush's script and CLIP's own
    package call -> (1, 3, crop, crop).  Of 0, 1, 2, ... pixels too many, CenterCrop of torchvision 0.28 cuts off
    0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6 at the left."""
    shorter = min(picture.size)
    picture = picture.resize([int(resize * side / shorter) for side in picture.size], Image.BICUBIC)
    left, top = [side // 4 * 2 + [0, 0, 1, 2][side % 4] for side in (length - crop for length in picture.size)]
    pixels = torch.tensor(np.array(picture.crop((left, top, left + crop, top + crop)))).permute(2, 0, 1) / 255
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


@pytest.mark.parametrize("resize, crop", [(224, 224), (256, 224), (32, 32), (36, 32)])
@pytest.mark.parametrize("height, width", [(300, 411), (97, 60), (64, 64), (32, 45), (55, 32), (33, 34), (257, 264)])
def test_images_are_prepared_as_by_torchvision(resize, crop, height, width):
    picture = noise(height, width)
    theirs = processed(picture, resize, crop, (.5, .5, .5), (.5, .5, .5))[0]
    levels = (preprocess(tensor(picture), resize, crop) - theirs).abs() * 127.5
    assert theirs.shape == (3, crop, crop) and levels.max() < 2.1 and levels.mean() < .01


def test_embeddings_are_those_of_the_models_own_processors(judges, dino_path):
    clip, dino = judges
    pictures = [noise(70, 50), noise(40, 40, 1), noise(32, 90, 2)]
    model = CLIPModel.from_pretrained(CLIP)
    with torch.no_grad():
        inputs = torch.cat([processed(p, 32, 32, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) for p in pictures])
        theirs = model.get_image_features(inputs).pooler_output
        ours = published.clip_embed(clip, [tensor(p) for p in pictures])
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > .9995
        inputs = torch.cat([processed(p, 36, 32, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) for p in pictures])
        theirs = ViTModel.from_pretrained(dino_path, add_pooling_layer=False)(inputs).last_hidden_state[:, 0]
        ours = dino.embed_images([tensor(p) for p in pictures])
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > .9995
        assert (ours.norm(dim=1) - 1).abs().max() < 1e-5 and (ours[0] @ ours[1]) < .999


def cosine(a, b):
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_magicbrushs_metrics_by_numpy_and_pillow(judges):
    clip, dino = judges
    outputs, targets = [noise(64, 80), noise(33, 32, 1)], [noise(32, 40, 2), noise(33, 32, 3)]
    texts = [("a red circle on a teal background", ""), ("an orange square on a pink background", "a blue cross")]
    rows = compare([tensor(p) for p in outputs], [tensor(p) for p in targets], texts, clip, dino)
    model, tokenizer = CLIPModel.from_pretrained(CLIP), CLIPTokenizer.from_pretrained(CLIP)
    def clip_image(picture):
        inputs = processed(picture, 32, 32, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        return model.get_image_features(inputs).pooler_output[0].detach()
    def dino_image(picture):
        inputs = processed(picture, 36, 32, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        return dino.vit(inputs).last_hidden_state[0, 0].detach()
    for output, target, captions, row in zip(outputs, targets, texts, rows):
        difference = (np.asarray(output.resize(target.size, Image.BICUBIC), np.float64) - np.asarray(target)) / 255
        assert tuple(row) == METRICS
        assert row["L1"] == pytest.approx(np.abs(difference).mean(), abs=5e-3)
        assert row["L2"] == pytest.approx((difference ** 2).mean(), abs=5e-3)
        assert row["CLIP-I"] == pytest.approx(cosine(clip_image(output), clip_image(target)), abs=2e-3)
        assert row["DINO"] == pytest.approx(cosine(dino_image(output), dino_image(target)), abs=2e-3)
        for name, caption in zip(METRICS[4:], captions):
            if caption:
                text = model.get_text_features(**tokenizer([caption], return_tensors="pt")).pooler_output[0].detach()
                assert row[name] == pytest.approx(cosine(clip_image(output), text), abs=2e-3)
            else:
                assert row[name] is None
    black, grey = torch.full((3, 32, 32), -1.), torch.full((3, 32, 32), -.5)
    row, = compare([grey], [black], [("", "")], clip, dino)
    assert (row["L1"], row["L2"]) == (.25, .0625)             # by hand


def test_the_curve_looks_at_images_as_its_script_does(judges):
    """Made a square by a bicubic filter of four pixels, without antialiasing; but in [0, 1], as CLIP expects."""
    clip, pictures = judges[0], [noise(96, 96), noise(80, 120, 1)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    inputs = [torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 255 for picture in pictures]
    inputs = [torch.nn.functional.interpolate(i, size=32, mode="bicubic", align_corners=False) for i in inputs]
    with torch.no_grad():
        features = CLIPModel.from_pretrained(CLIP).get_image_features((torch.cat(inputs) - mean) / std).pooler_output
    row, = directions([tensor(pictures[0])], [tensor(pictures[1])], [("a red circle", "a blue cross")], clip)
    assert row["image"] == pytest.approx(cosine(*features), abs=1e-4)
    smooth = published.clip_embed(clip, [tensor(p) for p in pictures])
    assert abs(cosine(*smooth) - row["image"]) > 1e-3


def test_the_curves_numbers_by_numpy(judges):
    clip = judges[0]
    edits = [toy.edit("test", i) for i in range(4)]
    inputs, outputs = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    rows = directions(list(inputs), list(outputs), [(e.scene.caption, e.edited.caption) for e in edits], clip)
    for e, image, output, row in zip(edits, inputs, outputs, rows):
        E_I0, E_I1 = (clip.embed_images(i[None])[0].numpy() for i in (image, output))
        E_T0, E_T1 = clip.embed_texts([e.scene.caption])[0].numpy(), clip.embed_texts([e.edited.caption])[0].numpy()
        assert row["direction"] == pytest.approx(cosine(E_I1 - E_I0, E_T1 - E_T0), abs=1e-2)
        assert row["image"] == pytest.approx(cosine(E_I0, E_I1), abs=1e-3)
    assert min(row["direction"] for row in rows) > .3         # the true edits; the other way round it is negative
    back = directions(list(outputs), list(inputs), [(e.scene.caption, e.edited.caption) for e in edits], clip)
    assert [row["direction"] for row in back] == pytest.approx([-row["direction"] for row in rows], abs=1e-6)


# ---- MagicBrush ------------------------------------------------------------------------------------------------------

def test_magicbrush_is_read_as_it_is_on_disk(brush):
    sessions = read_magicbrush(brush)
    assert [len(session) for session in sessions] == [1, 3, 2]
    turn = sessions[1][2]
    assert (turn.input, turn.target) == (brush / "images/1001/1001-output2.png", brush / "images/1001/1001-output3.png")
    e = toy.edit("test", 12)
    assert turn.instruction == e.instruction and turn.captions == (e.edited.caption, "")
    assert sessions[2][0].captions[1] == toy.edit("test", 20).instruction and sessions[0][0].captions[1] == ""
    assert [turn.output(s) for s in ("single-turn", "multi-turn")] == ["1001/1001_inde_3.png", "1001/1001_iter_3.png"]
    assert {sessions[1][0].output(s) for s in ("single-turn", "multi-turn")} == {"1001/1001_1.png"}


def test_single_turns_start_from_true_inputs_and_multi_turns_from_the_last_output(tmp_path, brush, dino_path, capsys):
    table, lines, rows = run(tmp_path / "out", dino_path, brush, *FAST)
    said = capsys.readouterr().out
    folder, = (tmp_path / "out").glob("*/2-steps-1.5-1.2")    # the guidance that the model recommends
    assert "steps 2, cfg_text 1.5, cfg_image 1.2, resolution 32" in said
    assert "seed 0, device cpu, precision fp32" in said
    assert sorted(f.name for f in folder.glob("*/*")) == [
        "1000_1.png", "1001_1.png", "1001_inde_2.png", "1001_inde_3.png", "1001_iter_2.png", "1001_iter_3.png",
        "1002_1.png", "1002_inde_2.png", "1002_iter_2.png"]
    third = read_magicbrush(brush)[1][2]
    for source, output in ((third.input, "1001_inde_3"), (folder / "1001/1001_iter_2.png", "1001_iter_3")):
        with Image.open(source) as picture:                   # 48x32, or the output before, which is of the edit's size
            ImageOps.fit(picture, (36, 24), Image.Resampling.LANCZOS).save(tmp_path / "i.png")
        edit.main(["--input", str(tmp_path / "i.png"), "--edit", third.instruction, "--output", str(tmp_path / "o.png"),
                   "--model", str(MODEL), "--steps", "2"])
        alone, ours = (load_image(path) for path in (tmp_path / "o.png", folder / f"1001/{output}.png"))
        assert alone.shape == ours.shape
        assert (alone - ours).abs().max() <= 2.1 / 127.5      # a batch of two may round otherwise
    single, multi = (load_image(folder / f"1001/1001_{kind}_3.png") for kind in ("inde", "iter"))
    assert not (single - multi).abs().max() < .05

    method = f"{MODEL}, 2 steps"
    judged = {setting: [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
              for setting in ("single-turn", "multi-turn")}
    assert [row["output"] for row in judged["multi-turn"]] == [
        "1000/1000_1.png", "1001/1001_iter_3.png", "1002/1002_iter_2.png"]
    assert len(judged["single-turn"]) == 6 and judged["single-turn"][3]["output"] == "1001/1001_inde_3.png"
    files = third.target, folder / "1001/1001_iter_3.png"
    target, output = (Image.open(path) for path in files)
    target, output = (np.asarray(image, float) / 255 for image in (target, output.resize(target.size, Image.BICUBIC)))
    assert judged["multi-turn"][1]["L2"] == pytest.approx(((target - output) ** 2).mean(), abs=1e-4)
    for setting, own in judged.items():
        for i, name in enumerate(METRICS):
            values = [row[name] for row in own if row[name] is not None]
            assert len(values) == {"single-turn": 4, "multi-turn": 1}[setting] if name == "CLIP-T local" else len(own)
            assert float(table[setting, method][i]) == pytest.approx(np.mean(values), abs=6e-5)
    assert table["single-turn", "UIP2P, CC12M, published"] == ["0.0619", "0.0174", "0.9318", "0.9039", "0.2964 ?", ""]
    assert table["multi-turn", "IP2P, published"] == ["0.1584", "0.0598", "0.7924", "0.6177", "", "0.2726"]
    assert table["single-turn", "HIVE, published"][4:] == ["", "0.2752"]
    said = " ".join(lines)
    for difference in ("local captions", "Euler", "100 steps", "a turn without one is left out"):
        assert difference in said, difference
    assert lines[0] == f"MagicBrush test, all 3 sessions; CLIP {CLIP}, DINO {dino_path}"
    assert "multi-turn, of 3: 0 global, 2 local." in lines[-1] and "single-turn, of 6: 0 global, 2 local." in lines[-2]
    with Image.open(tmp_path / "out/magicbrush.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 6 * 96


def test_published_rows_are_those_of_the_paper():
    assert {len(values) for rows in published.PUBLISHED.values() for values in rows.values()} == {5}
    rows = [row for setting in published.PUBLISHED.values() for row in setting.values()]
    sums = [round(sum(column), 4) for column in zip(*rows)]
    assert len(rows) == 10 and sums == [1.046, .3435, 8.7246, 7.8813, 2.8491]


def test_a_run_that_was_killed_continues_and_ends_with_the_same_bytes(tmp_path, brush, dino_path, capsys):
    run(tmp_path / "out", dino_path, brush, *FAST)
    folder, = (tmp_path / "out").glob("*/2-steps-1.5-1.2")
    first = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    times = {f: f.stat().st_mtime_ns for f in folder.rglob("*.png")}
    (folder / "1001/1001_inde_3.png").unlink(), (folder / "1001/1001_iter_3.png").unlink()
    run(tmp_path / "out", dino_path, brush, *FAST)
    assert {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()} == first
    made = sorted(f.name for f, time in times.items() if f.stat().st_mtime_ns != time)
    assert made == ["1001_inde_2.png", "1001_inde_3.png", "1001_iter_3.png"]      # the batches in which one was missing
    argv = ["magicbrush", brush, *FAST, "--clip", CLIP, "--dino", dino_path, "--output", tmp_path / "out"]
    assert "another seed" in refuse(capsys, *argv, "--seed", 1)
    assert "another resolution" in refuse(capsys, *argv, "--resolution", 64)
    assert {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()} == first


def test_edits_of_a_model_that_was_trained_further_are_not_taken_for_its_own(tmp_path, brush, dino_path, capsys):
    shutil.copytree(MODEL, tmp_path / "model")
    argv, output = [brush, "--models", tmp_path / "model", "--steps", 1, "--limit", 1], tmp_path / "out"
    run(output, dino_path, *argv)
    model = EditModel.from_pretrained(tmp_path / "model")
    model.unet.conv_out.bias.data += .1
    model.save_pretrained(tmp_path / "model")
    judge = "--clip", CLIP, "--dino", dino_path
    assert "another weights" in refuse(capsys, "magicbrush", *argv, *judge, "--output", output)


def test_another_editors_folder_is_scored(tmp_path, brush, dino_path):
    sessions = read_magicbrush(brush)
    perfect = answers(sessions, tmp_path / "perfect", lambda session, turn: turn.target)
    copy = answers(sessions, tmp_path / "copy", lambda session, turn: session[0].input)
    table, _, rows = run(tmp_path / "out", dino_path, brush, "--outputs", perfect, copy)
    for setting in ("single-turn", "multi-turn"):
        assert table[setting, str(perfect)][:4] == ["0.0000", "0.0000", "1.0000", "1.0000"]
        assert float(table[setting, str(perfect)][4]) > float(table[setting, str(copy)][4])
    assert table["multi-turn", str(copy)] == table["multi-turn", "copy of the input"]
    assert table["single-turn", str(copy)] != table["single-turn", "copy of the input"]   # whose inputs are true ones
    assert len(rows) == 3 * (6 + 3) and list(tmp_path.glob("out/*/")) == []


def test_several_step_counts_and_a_subset_are_said(tmp_path, brush, dino_path):
    table, lines, rows = run(tmp_path, dino_path, brush, "--models", MODEL, "--steps", 1, 3, "--limit", 2)
    assert "ONLY 2 of 3 sessions, not the published protocol" in lines[0]
    assert {row["output"][:4] for row in rows} == {"1000", "1001"}
    values = [table["single-turn", f"{MODEL}, {n} steps"] for n in (1, 3)]
    assert values[0] != values[1]
    with Image.open(tmp_path / "magicbrush.png") as sheet:
        assert sheet.width > 4 * 128                          # input, 1 step, 3 steps, true edit


def test_bad_magicbrush_data_is_refused_before_any_work(tmp_path, dino_path, capsys):
    def damaged(name, **files):
        path = magicbrush(tmp_path / name, (1, 2))
        sessions = json.loads((path / "edit_sessions.json").read_text())
        rewrite(path, **{key: make(sessions) for key, make in files.items()})
        return path
    def with_name(key, name):
        def change(sessions):
            sessions["1001"][1][key] = name
            return sessions
        return change
    (tmp_path / "secret.png").write_bytes(b"")
    for n, (name, words) in enumerate((
            ("../../../secret.png", "not ID-input.png"), ("/etc/passwd", "not ID-input.png"), (7, "is 7"),
            (None, "is None"),
            ("1000-input.png", "not ID-input.png"), ("1001-/../1001-input.png", "not ID-input.png"),
            ("1001-output9.png", "missing"))):
        assert words in refuse(capsys, "magicbrush", damaged(f"n{n}", edit_sessions=with_name("input", name)), *FAST)
    escape = {"../..": [{"input": "../..-input.png", "output": "../..-output1.png", "instruction": "add a cross"}]}
    for n, (content, words) in enumerate((([], "JSON object"), ({}, "empty"), ({"1000": {}}, "no list of turns"),
                                          ({"1000": ["a"]}, "no instruction"), (escape, "not ID-input.png"))):
        assert words in refuse(capsys, "magicbrush", damaged(f"c{n}", edit_sessions=lambda sessions: content), *FAST)
    path = damaged("i", edit_sessions=with_name("instruction", " "))
    assert "no instruction" in refuse(capsys, "magicbrush", path, *FAST)
    path = damaged("g", global_descriptions=lambda s: {"1000": "text"})
    assert "{ID: {file" in refuse(capsys, "magicbrush", path, *FAST)
    path = damaged("f")
    (path / "global_descriptions.json").write_text("{oops")
    assert "not valid JSON" in refuse(capsys, "magicbrush", path, *FAST)
    (path / "global_descriptions.json").unlink()
    assert "is missing" in refuse(capsys, "magicbrush", path, *FAST)
    assert "is missing" in refuse(capsys, "magicbrush", tmp_path / "nowhere", *FAST)


def test_local_captions_may_be_in_a_file_of_another_name(tmp_path):
    path = magicbrush(tmp_path / "data")
    before = [turn.captions for session in read_magicbrush(path) for turn in session]
    (path / "local_descriptions.json").rename(path / "local_captions.json")
    assert [turn.captions for session in read_magicbrush(path) for turn in session] == before
    assert any(c[1] for c in before)


def test_bad_arguments_are_refused(tmp_path, brush, dino_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = ["magicbrush", brush, "--clip", CLIP, "--dino", dino_path]
    folder = answers(read_magicbrush(brush), tmp_path / "some", lambda session, turn: turn.target)
    (folder / "1001/1001_iter_2.png").rename(tmp_path / "kept.png")
    (folder / "1001/1001_iter_3.png").unlink()
    assert "1 of 9 images are missing" in refuse(capsys, *whole, "--outputs", folder)
    (tmp_path / "kept.png").rename(folder / "1001/1001_iter_3.png")
    (folder / "1001/1001_inde_2.png").write_text("no image")
    assert "not an image" in refuse(capsys, *whole, "--outputs", folder)
    for flags, word in (((), "--models, --outputs"), (("--models", "no-model"), "no-model"),
                        ((*FAST, "--limit", 0), "--limit"), ((*FAST, "--steps", 0), "--steps"),
                        ((*FAST, "--dino", tmp_path), "config.json is missing"),
                        (("--models", MODEL / "text2image"), "text-to-image"),
                        ((*FAST, "--clip", tmp_path / "nowhere"), "nowhere"),
                        ((*FAST, "--device", "abacus"), "abacus")):
        assert word in refuse(capsys, *whole, *flags)
    assert "invalid choice" in refuse(capsys, "magick") and "required" in refuse(capsys)
    assert not (tmp_path / "outputs").exists()


def test_the_commands_of_the_docs_convert_pickles(tmp_path, monkeypatch, judges, dino_path):
    """Judges and networks that are only pickles are refused, and what the docs make of them is read."""
    monkeypatch.chdir(tmp_path)
    for source, name in ((CLIP, "clip"), (dino_path, "dino"), (MODEL, "MODEL")):
        shutil.copytree(source, name)
    for file, pickle in (("clip/model", "clip/pytorch_model"), ("dino/model", "dino/pytorch_model"),
                         ("MODEL/unet/diffusion_pytorch_model",) * 2):
        torch.save(load_file(f"{file}.safetensors"), f"{pickle}.bin")
        Path(f"{file}.safetensors").unlink()
    for load, name in ((ClipScorer, "clip"), (Dino, "dino"), (EditModel, "MODEL")):
        with pytest.raises(ValueError, match="docs/data.md says how to convert"):
            load.from_pretrained(name)
    commands = re.findall(r'python -c "(.*?)"\n', (ROOT / "docs/data.md").read_text(), re.DOTALL)
    commands = [command.replace("\\\n", "") for command in commands if ".from_pretrained(name" in command
                or "torch.load" in command]
    for command in commands:
        exec(command.replace("openai/clip-vit-base-patch32", "clip").replace("facebook/dino-vits16", "dino"), {})
    assert len(commands) == 3
    clip, dino = ClipScorer.from_pretrained("models/clip-b32"), Dino.from_pretrained("models/dino-s16")
    texts, image = ["a red circle"], tensor(noise(40, 40))
    assert torch.equal(clip.embed_texts(texts), judges[0].embed_texts(texts))
    assert torch.equal(dino.embed_images([image]), judges[1].embed_images([image]))
    new, old = (EditModel.from_pretrained(path).unet.state_dict() for path in ("MODEL", MODEL))
    assert all(torch.equal(new[key], old[key]) for key in old)


# ---- InstructPix2Pix's curve -----------------------------------------------------------------------------------------

def test_the_test_split_is_the_last_twentieth(tmp_path):
    data = instruct_pix2pix(tmp_path)
    samples, total = read_test_split(data, None, 0)
    assert total == 2 and [s.input.parent for s in samples] == [tmp_path / "0000038", tmp_path / "0000039"]
    e, drawn = toy.edit("test", 39), samples[1].input.name.removesuffix("_0.jpg")
    assert (samples[1].output, samples[1].instruction) == (f"0000039_{drawn}.png", e.instruction)
    assert samples == read_test_split(data, None, 0)[0]       # a seed of each directory, drawn
    assert {read_test_split(data, None, seed)[0][1].input.name for seed in range(9)} == {"44_0.jpg", "45_0.jpg"}
    assert samples[1].captions == (e.scene.caption, e.edited.caption)


def test_the_test_split_counts_what_is_not_unpacked(tmp_path):
    shutil.rmtree(instruct_pix2pix(tmp_path) / "0000038")
    samples, named = read_test_split(tmp_path, None, 0)
    assert [sample.output for sample in samples] == ["0000039_44.png"] and named == 2


def test_the_curve_of_a_model_and_of_another_editors_points(tmp_path, judges, capsys):
    data, other = instruct_pix2pix(tmp_path / "data", 60), tmp_path / "other"
    samples, _ = read_test_split(data, None, 0)
    for point, i in (("copy", 0), ("true", 1)):
        (other / point).mkdir(parents=True)
        for sample in samples:
            shutil.copy(str(sample.input).replace("_0.jpg", f"_{i}.jpg"), other / point / sample.output)
    argv = ["curve", data, "--clip", CLIP, "--output", tmp_path / "out"]
    flags = [*FAST, "--cfg-text", 1.5, "--cfg-image", 1.0, 2.2, "--outputs", other]
    published.main([*map(str, argv), *map(str, flags)])
    rows = {row["point"]: row for row in map(json.loads, (tmp_path / "out/curve.jsonl").read_text().splitlines())}
    assert list(rows) == ["s_I = 1.0", "s_I = 2.2", "copy", "true"]
    assert {(row["samples"], row["of"]) for row in rows.values()} == {(3, 3)}
    assert rows["copy"]["image"] == pytest.approx(1) and rows["copy"]["direction"] == pytest.approx(0, abs=1e-6)
    true = directions([load_image(s.input) for s in samples], [load_image(other / "true" / s.output) for s in samples],
                      [s.captions for s in samples], judges[0])
    assert .3 < rows["true"]["direction"] == pytest.approx(np.mean([row["direction"] for row in true]))
    edit.main(["--input", str(samples[2].input), "--edit", samples[2].instruction, "--output", str(tmp_path / "o.png"),
               "--model", str(MODEL), "--steps", "2", "--cfg-image", "2.2"])
    ours, = (tmp_path / "out").glob(f"*/2-steps-1.5-2.2/{samples[2].output}")
    assert (load_image(ours) - load_image(tmp_path / "o.png")).abs().max() <= 2.1 / 127.5
    table = (tmp_path / "out/curve.md").read_text()
    values = f"{rows['true']['direction']:.3f} | {rows['true']['image']:.3f}"
    assert "all 3 samples" in table and f"| {other} | true | {values} |" in table
    assert "| IP2P, read off the published figure | s_I = 1.0 | 0.151 | 0.800 |" in table
    assert all(difference in table for difference in ("Euler", "5,000", "nor rounded", "[-1, 1]"))
    with Image.open(tmp_path / "out/curve.png") as sheet:
        assert len(sheet.getcolors(10 ** 6)) > 7
    published.main([*map(str, argv), *map(str, flags), "--limit", "1"])
    assert "ONLY 1 of 3 samples, not" in (tmp_path / "out/curve.md").read_text()

    (other / "true" / samples[2].output).unlink()
    assert "1 of 6 images are missing" in refuse(capsys, *argv, "--outputs", other)
    (tmp_path / "empty").mkdir()
    assert "empty/POINT" in refuse(capsys, *argv, "--outputs", tmp_path / "empty")


def test_the_default_curve_is_the_published_one():
    args = published.parser().parse_args(["curve", "data"])
    assert (args.steps, args.cfg_text, args.cfg_image) == (100, 7.5, (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2))


def test_bad_trees_are_refused(tmp_path, capsys):
    judge = [*FAST, "--clip", CLIP, "--output", tmp_path / "out"]
    instruct_pix2pix(tmp_path / "outside", 1)
    for n, (row, words) in enumerate((
            (["../outside/0000000", [5]], "not one of a directory"), (["0000019", []], "has no seed"),
            (["0000019", ["../5"]], "has no seed"), (["0000019", [99]], "99_0.jpg is missing"),
            (["missing", [1]], "no directory for test"), (["wordless", [1]], "wordless/prompt.json is missing"))):
        path = instruct_pix2pix(tmp_path / f"data{n}", 20)
        (path / "wordless").mkdir()
        rows = json.loads((path / "seeds.json").read_text())
        (path / "seeds.json").write_text(json.dumps(rows[:19] + [row]))
        assert words in refuse(capsys, "curve", path, *judge)
    (path / "0000019/prompt.json").write_text("{}")
    (path / "seeds.json").write_text(json.dumps(rows))
    assert "0000019: no text for caption" in refuse(capsys, "curve", path, *judge)
    assert "seeds.json" in refuse(capsys, "curve", tmp_path / "nowhere", *FAST)
    assert not (tmp_path / "out").exists()


def test_a_plot_shows_points_where_they_are():
    sheet = plot({"ours": [(0, 0), (1, 1)]}, {"theirs": [(0, 1), (.5, .5)]}, ("x", "y"), size=(200, 100), margin=60)
    ours, theirs = (sheet.getpixel(place) for place in ((60, 160), (60, 60)))
    assert ours == sheet.getpixel((260, 60)) != (255, 255, 255)                # the ends of our line, filled
    assert theirs == (255, 255, 255) and sheet.getpixel((60, 56)) not in (theirs, ours)   # published ones are rings


# ---- the program -----------------------------------------------------------------------------------------------------

def test_as_a_program():
    command = [sys.executable, "-m", "experiments.published", "magicbrush", "nowhere", "--models", "models/toy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("experiments.published: error: nowhere/.* is missing.*\n", done.stderr)
