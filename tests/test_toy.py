"""The toy world tells the truth: captions, instructions, masks and splits agree with what is rendered."""
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toy
from experiments.claims import chain
from experiments.truth import edit_mask
from losses import ClipScorer
from prepare import pretrain
from uip2p import EditModel

EDITS = {split: [toy.edit(split, i) for i in range(400 if split == "train" else 150)] for split in toy.SPLITS}
ALL = sum(EDITS.values(), [])
KINDS = [pytest.param([e for e in ALL if e.kind == kind], id=kind) for kind in toy.KINDS]


# ---- texts: read here by a grammar of their own --------------------------------------------------------------------

def noun(words):
    """'an orange circle' -> 'orange circle', if the article is right."""
    article, rest = words.split(" ", 1)
    assert article == ("an" if rest[0] in "aeiou" else "a"), words
    return rest


def read_caption(caption):
    """'a red circle, a blue cross and an orange square on a teal background' -> ({names}, background)."""
    if match := re.fullmatch(r"a (\w+) background", caption):
        return set(), match[1]
    listed, background = re.fullmatch(r"(.+) on a (\w+) background", caption).groups()
    head, _, last = listed.rpartition(" and ")
    assert " and " not in head and "," not in last
    names = [noun(n) for n in (head.split(", ") if head else []) + [last]]
    assert len(set(names)) == len(names), f"two objects of one name: {caption}"
    return set(names), background


def obey(instruction, names, background):
    """What a caption says after an instruction: the same pair as read_caption."""
    if match := re.fullmatch(r"make the background (\w+)", instruction):
        return names, match[1]
    if match := re.fullmatch(r"add (.+)", instruction):
        assert noun(match[1]) not in names
        return names | {noun(match[1])}, background
    if match := re.fullmatch(r"remove the (.+)", instruction):
        old, new = match[1], None
    elif match := re.fullmatch(r"make the ((\w+) (\w+)) (\w+)", instruction):
        old, new = match[1], f"{match[4]} {match[3]}"
    else:
        match = re.fullmatch(r"turn the ((\w+) (\w+)) into (.+)", instruction)
        old, new = match[1], f"{match[2]} {noun(match[4])}"
    assert old in names and new not in names                  # the object named is there, and an edit changes something
    return names - {old} | ({new} - {None}), background


@pytest.mark.parametrize("edits", KINDS)
def test_instructions_lead_from_one_caption_to_the_other_and_back(edits):
    for e in edits:
        before, after = read_caption(e.scene.caption), read_caption(e.edited.caption)
        assert before != after
        assert obey(e.instruction, *before) == after
        assert obey(e.reverse_instruction, *after) == before


def test_captions_say_what_is_rendered():
    for e in ALL:
        names, background = read_caption(e.scene.caption)
        assert names == {f"{o.colour} {o.shape}" for o in e.scene.objects} and background == e.scene.background
        image = (toy.render([e.scene])[0] + 1) * 127.5
        for o in e.scene.objects:
            assert image[:, int(o.y), int(o.x)].tolist() == pytest.approx(toy.COLOURS[o.colour], abs=1)


def test_the_four_shapes_look_different():
    """Their areas in radii squared: pi, 1.7 squared, an equilateral triangle of height 1.8, two bars of 2 by .72."""
    for shape, area in (("circle", 3.14), ("square", 2.89), ("triangle", 1.87), ("cross", 2.36)):
        o = toy.Object("red", shape, 16., 16., 7.)
        assert float(cover([o])[0].sum()) / 49 == pytest.approx(area, rel=.04)


# ---- pixels --------------------------------------------------------------------------------------------------------

def cover(objects):
    """How much of each pixel each object covers: (N, SIZE, SIZE) in [0, 1]."""
    white = toy.Scene("white", (0, 0), ())
    scenes = [replace(white, objects=(replace(o, colour=(0, 0, 0)),)) for o in objects]
    return 1 - (toy.render(scenes)[:, 0] + 1) / (toy.render([white])[0, 0, 0, 0] + 1)


def test_images_are_in_range_and_independent_of_the_batch():
    scenes = [e.scene for e in ALL[:50]] + [e.edited for e in ALL[:50]] + [
        toy.Scene("white", (.12, .12), ()), toy.Scene("black", (-.12, .12), ())]
    images = toy.render(scenes)
    assert images.shape == (len(scenes), 3, toy.SIZE, toy.SIZE) and images.min() >= -1 and images.max() <= 1
    for scene, image in list(zip(scenes, images))[::5]:
        assert torch.equal(toy.render([scene])[0], image)


@pytest.mark.parametrize("edits", KINDS)
def test_an_edit_changes_what_it_names_and_nothing_else(edits):
    images, edited = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    masks = edit_mask(images, edited)[:, 0]
    for e, before, after, mask in zip(edits, images, edited, masks):
        assert mask.any()
        if e.kind == "background":
            covers = cover(e.scene.objects) if e.scene.objects else torch.zeros(1, toy.SIZE, toy.SIZE)
            inside = (covers == 1).any(0)
        else:                                                 # what only one of the two scenes has
            changed = set(e.scene.objects) ^ set(e.edited.objects)
            assert len(changed) == (2 if e.kind in ("colour", "shape") else 1)
            assert e.scene.background == e.edited.background
            inside = (cover(changed) == 0).all(0)
        assert torch.equal(before[:, inside], after[:, inside]) and not mask[inside].any()
        assert mask[~inside].float().mean() > (.05 if e.kind == "shape" else .5)      # two shapes share most pixels
    places = [[(o.x, o.y, o.radius) for o in s.objects] for e in edits for s in (e.scene, e.edited)]
    assert edits[0].kind in ("add", "remove") or places[::2] == places[1::2]


@pytest.mark.parametrize("edits", KINDS)
def test_entangled_pairs_change_what_the_true_edit_leaves_alone(edits):
    for i, e in enumerate(edits[:40]):
        wrong = toy.entangled(e, random.Random(i))
        image, true, pair = toy.render([e.scene, e.edited, wrong])
        outside = (image == true).all(0)
        leaked = (pair - image).abs().amax(0)[outside]
        if e.kind != "background":
            assert (leaked > .01).float().mean() > .75        # the whole background took colour
        elif e.scene.objects:
            assert leaked.max() > .06                         # the objects did
        assert [o.shape for o in wrong.objects] == [o.shape for o in e.edited.objects]
        moved = [max(abs(a.x - b.x), abs(a.y - b.y)) for a, b in zip(wrong.objects, e.edited.objects)]
        assert all(0 < m <= 2 for m in moved)


def test_truths_of_an_add_differ_only_in_place():
    for e in [e for e in ALL if e.kind == "add"][:25]:
        truths = toy.truths(e)
        assert truths[0] == e.edited and len(truths) == len(set(truths))
        for truth in truths:
            assert truth.objects[:-1] == e.scene.objects
            assert truth.caption == e.edited.caption and truth.background == e.scene.background
        new = torch.stack([c for c in cover([t.objects[-1] for t in truths])])
        border = torch.ones(toy.SIZE, toy.SIZE, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        assert (new[1:, border].amax(1) < .6).all()           # none is cut off by the edge
    assert max(len(toy.truths(e)) for e in ALL if e.kind == "add") > 50
    assert all(toy.truths(e) == [e.edited] for e in ALL if e.kind != "add")


def overlap(objects):
    """The largest overlap of two objects, in areas of a pixel."""
    covers = cover(objects)
    return max(torch.minimum(covers[i], covers[j]).sum().item() for i in range(len(covers)) for j in range(i))


def test_objects_keep_apart_but_for_a_rare_corner():
    """Distances are kept as between circles, but squares and triangles reach 1.2 radii: in fewer than two scenes of a
    hundred a corner meets another object, and covers less than a pixel of it."""
    edits = [e for e in ALL if len(e.scene.objects) > 1]
    adds = [e for e in ALL if e.kind == "add" and e.scene.objects]
    for scenes in ([e.scene for e in edits], [e.edited for e in adds], [t for e in adds[:50] for t in toy.truths(e)]):
        overlaps = torch.tensor([overlap(s.objects) for s in scenes])
        assert overlaps.max() < 1 and (overlaps > .05).float().mean() < .02


# ---- splits --------------------------------------------------------------------------------------------------------

def combinations(scene):
    return {(o.colour, o.shape, scene.background) for o in scene.objects}


def test_held_out_combinations_are_seen_in_the_test_split_only():
    everything = [(c, s, b) for c in toy.COLOURS for s in toy.SHAPES for b in toy.BACKGROUNDS]
    held_out = {(c, s, b) for c, s, b in everything if toy.Scene(b, (0, 0), (toy.Object(c, s, 16, 16, 5),)).held_out}
    assert len(held_out) == len(everything) // 6
    for kept in (set(everything) - held_out, held_out):       # each colour, shape and background is in both halves
        assert [len(set(values)) for values in zip(*kept)] == [6, 4, 6]
    for split, edits in EDITS.items():
        for e in edits:
            assert bool((combinations(e.scene) | combinations(e.edited)) & held_out) == (split == "test")


def test_samples_are_a_pure_function_of_split_index_and_seed():
    random.seed(7), torch.manual_seed(7)                      # the global generators have no part in it
    assert [toy.edit("train", i) for i in reversed(range(20))] == EDITS["train"][19::-1]
    others = [toy.edit("train", i, seed=1) for i in range(100)]
    assert not set(others) & set(EDITS["train"]) and not set(EDITS["train"]) & set(EDITS["validation"])
    assert len(set(ALL)) == len(ALL)


@pytest.mark.parametrize("split", toy.SPLITS)
def test_the_kinds_of_edits_are_equally_frequent(split):
    assert len(set(Counter(e.kind for e in EDITS[split]).values())) == 1


def test_edits_in_turn_lead_from_scene_to_scene():
    """Each edit starts where the last one ended, names no place, and is not taken back by a later one."""
    for index in range(60):
        edits = chain("test", index)
        assert edits[0].scene == toy.edit("test", index).scene and len({e.kind for e in edits}) == len(edits) == 3
        names, background = read_caption(edits[0].scene.caption)
        for e, after in zip(edits, [*edits[1:], None]):
            assert e.kind != "add" and e.edited.objects and (after is None or after.scene is e.edited)
            names, background = obey(e.instruction, names, background)
        assert (names, background) == read_caption(edits[-1].edited.caption)
        assert edit_mask(*toy.render([edits[0].scene, edits[-1].edited])[:, None]).any()
    assert chain("test", 3) == chain("test", 3)


# ---- the model of it -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("edits", KINDS)
def test_the_vae_shows_the_tints_of_entangled_pairs(edits):
    """As true as what has names: otherwise the baseline could not show its bias."""
    vae = EditModel.from_pretrained(pretrain.TOY / "text2image").vae
    pairs = toy.render([toy.entangled(e, random.Random(i)) for i, e in enumerate(edits[:40])])
    with torch.no_grad():
        shown = vae.decode(vae.encode(pairs))
    assert (shown - pairs).abs().mean() / 2 < .02


@pytest.fixture
def short(monkeypatch):
    """Few scenes, and what is done is saved after each step."""
    for name, value in (("BATCH", 4), ("LATENTS", 2), ("TESTED", 4), ("SAMPLED", 2), ("SAVE_EVERY", 1)):
        monkeypatch.setattr(pretrain, name, value)


def test_the_parts_of_a_new_toy_model_are_those_of_the_old_one(tmp_path, short, capsys):
    pretrain.main(["--clip-steps", "1", "--vae-steps", "1", "--text2image-steps", "1", "--output", str(tmp_path)])
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["clip", "VAE", "text2image", "text2image"]
    new, shipped = (EditModel.from_pretrained(path / "text2image") for path in (tmp_path, pretrain.TOY))
    assert new.defaults == shipped.defaults and new.scheduler == shipped.scheduler
    assert new.unet.config == shipped.unet.config
    assert new.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    assert ClipScorer.from_pretrained(tmp_path / "clip").embed_texts(["a red circle"]).isfinite().all()
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--parts", "text2image", "--output", str(tmp_path / "other")])
    assert stop.value.code == 2 and "make it first, with --parts clip" in capsys.readouterr().err


def test_a_pretraining_that_was_stopped_goes_on(tmp_path, short, monkeypatch, capsys):
    """Stopped in its second part, it makes the first one not again, and ends with the same bytes."""
    command = ["--parts", "text2image", "vae", "--vae-steps", "1", "--text2image-steps", "3", "--output"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in whole, stopped:
        for name in pretrain.PARTS["clip"]:
            shutil.copytree(pretrain.TOY / name, folder / name)
    pretrain.main([*command, str(whole)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        save_run = pretrain.save_run

        def stop_at_2(folder, settings, parts, run):
            save_run(folder, settings, parts, run)
            if run["step"] == 2:
                raise KeyboardInterrupt
        patch.setattr(pretrain, "save_run", stop_at_2)
        pretrain.main([*command, str(stopped)])
    assert {f.name for f in stopped.iterdir()} == {*pretrain.PARTS["clip"], "unfinished"}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        pretrain.main([*command, str(stopped), "--seed", "1"])
    assert "was begun with other options" in capsys.readouterr().err
    monkeypatch.setattr(pretrain, "pretrain_vae", None)
    pretrain.main([*command, str(stopped)])
    files = [f.relative_to(whole) for f in whole.rglob("*") if f.is_file()]
    assert sorted(files) == sorted(f.relative_to(stopped) for f in stopped.rglob("*") if f.is_file())
    assert all((whole / f).read_bytes() == (stopped / f).read_bytes() for f in files)


@pytest.mark.parametrize("moves", range(9))
def test_a_new_toy_model_takes_the_place_of_the_old_one_as_a_whole(tmp_path, monkeypatch, moves):
    """Stopped between two of its renames, it leaves parts of one model only; stopped before, it leaves the old one."""
    def make_part(part, folder, args):
        for name in pretrain.PARTS[part]:
            assert not (folder / name).exists()
            (folder / name).mkdir()
            (folder / name / "new").touch()

    rename, count = Path.rename, iter(range(moves))

    def stopped(path, target):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return rename(path, target)
    monkeypatch.setattr(pretrain, "make_part", make_part)
    parts = [*pretrain.PARTS["clip"], *pretrain.PARTS["vae"]]
    for name in [*parts, "unet"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Path, "rename", stopped)
        pretrain.main(["--parts", "clip", "vae", "--output", str(tmp_path)])
    there = {folder.name: [file.name for file in folder.iterdir()] for folder in tmp_path.iterdir()}
    assert there.pop("unet") == ["old"] and (there.pop("unfinished", None) is None) == (moves > 0)
    assert there.keys() <= {*parts}
    assert len({*map(str, there.values())}) <= 1 and (moves > 0 or len(there) == 4)
    pretrain.main(["--parts", "clip", "vae", "--output", str(tmp_path)])
    assert all((tmp_path / name / "new").exists() for name in parts)
