"""What the toy world's truth says of edits (experiments/truth.py), and the table of it (experiments/evaluate.py)."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import toy
from experiments import evaluate
from experiments.truth import edit_mask, is_clean, judge, judge_attention, judge_scenes, read_scenes
from losses import ClipScorer
from uip2p import EditModel

TOY = "models/toy"


@pytest.fixture(scope="module")
def scorer():
    return ClipScorer.from_pretrained(f"{TOY}/clip")


# ---- reading a scene back, and the strict scores ---------------------------------------------------------------------

def test_scenes_are_read_back_from_their_pictures():
    scenes = [toy.edit("test", i, seed=5).edited for i in range(40)]
    for scene, found in zip(scenes, read_scenes(toy.render(scenes)), strict=True):
        assert found.background == scene.background
        assert sorted(o.name for o in found.objects) == sorted(o.name for o in scene.objects)
        places = {o.name: (o.x, o.y, o.radius) for o in found.objects}
        assert all(places[o.name] == pytest.approx((o.x, o.y, o.radius), abs=1.1) for o in scene.objects)


@pytest.fixture(scope="module")
def two_objects():
    """Changes of colour, which are every fifth edit, in scenes of two objects."""
    return [e for e in (toy.edit("test", i, seed=3) for i in range(0, 100, 5)) if len(e.edited.objects) == 2][:4]


def strict(edits, scenes):
    return {name: values.tolist() for name, values in judge_scenes(edits, toy.render(scenes)).items()}


def damaged(scene, k=0, **changes):
    changed = tuple(replace(o, **changes) if i == k else o for i, o in enumerate(scene.objects))
    return replace(scene, objects=changed)


def test_the_true_edit_is_exact_and_a_copy_is_not():
    edits = [toy.edit("test", i, seed=7) for i in range(25)]
    assert strict(edits, [e.edited for e in edits]) == {"exact": [1] * 25, "objects": [1] * 25}
    assert strict(edits, [e.scene for e in edits])["exact"] == [0] * 25


def test_one_thing_that_is_wrong_makes_a_scene_wrong(two_objects):
    n = len(two_objects)
    assert n >= 3
    for e in two_objects:
        for k, o in enumerate(e.edited.objects):
            shape = next(shape for shape in toy.SHAPES if shape != o.shape)
            colour = next(colour for colour in toy.COLOURS if colour != o.colour)
            gone = replace(e.edited, objects=tuple(x for x in e.edited.objects if x is not o))
            elsewhere = o.x + (5 if o.x < 16 else -5)
            wrong = [damaged(e.edited, k, shape=shape), damaged(e.edited, k, colour=colour), gone,
                     damaged(e.edited, k, x=elsewhere)]
            assert strict([e] * 4, wrong) == {"exact": [0] * 4, "objects": [.5] * 4}
        other = next(name for name in toy.BACKGROUNDS if name != e.edited.background)
        assert strict([e], [replace(e.edited, background=other)]) == {"exact": [0], "objects": [1]}
        tinted = tuple(0.6 * a + 0.4 * b for a, b in zip(toy.RGB[e.edited.background], toy.RGB[e.subject]))
        assert strict([e], [replace(e.edited, background=tinted)]) == {"exact": [0], "objects": [1]}
    third = [toy.truths(replace(e, kind="add", scene=e.edited, edited=replace(
        e.edited, objects=e.edited.objects + (toy.Object("red", "cross", 0, 0, 5),))))[1] for e in two_objects]
    assert strict(two_objects, third) == {"exact": [0] * n, "objects": [1] * n}


def test_a_smear_that_is_no_object_makes_a_scene_wrong(two_objects):
    for e in two_objects:
        image = toy.render([e.edited])
        y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        far = torch.stack([((x - o.x) ** 2 + (y - o.y) ** 2).sqrt() > 1.15 * o.radius + 4 for o in e.edited.objects])
        pixels = far.all(0).flatten().nonzero()[:, 0][::7]
        assert is_clean(e.edited, image[0])
        for count, exact in ((11, 1), (20, 0)):
            at = image.flatten(2)[:, :, pixels[:count]]
            smeared = image.flatten(2).index_copy(2, pixels[:count], at - .5 * at.sign()).view_as(image)
            scores = judge_scenes([e], smeared)
            assert scores["exact"].item() == exact and scores["objects"].item() == 1


def test_what_is_added_may_be_anywhere_but_what_was_there_may_not():
    edits = [e for e in (toy.edit("test", i) for i in range(40)) if e.kind == "add"]
    places = [toy.truths(e)[-1] for e in edits]
    assert strict(edits, places)["exact"] == [1] * len(edits)
    first = [damaged(scene, x=scene.objects[0].x + (5 if scene.objects[0].x < 16 else -5)) for scene in places]
    assert strict(edits, first)["exact"] == [0] * len(edits)


def test_an_empty_scene_has_all_its_objects_only_if_none_is_there():
    edit = next(e for e in (toy.edit("test", i) for i in range(400)) if not e.edited.objects)
    assert strict([edit, edit], [edit.edited, edit.scene]) == {"exact": [1, 0], "objects": [1, 0]}


# ---- the judge -------------------------------------------------------------------------------------------------------

def judged(edits, scenes, scorer):
    return judge(edits, toy.render([e.scene for e in edits]), toy.render(scenes), scorer)


def test_the_true_edit_is_right_and_the_copy_is_not(scorer):
    edits = [toy.edit("test", i) for i in range(15)]
    true, copy = [judged(edits, scenes, scorer) for scenes in ([e.edited for e in edits], [e.scene for e in edits])]
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
    mask = edit_mask(images, output)
    damaged = torch.where(mask, output, output + .2)
    scores, share = judge([edit], images, damaged, scorer), (~mask).float().mean().item()
    assert scores["inside"].item() == 0 and scores["right"].item() == 1
    assert scores["outside"].item() == pytest.approx(.1, rel=1e-4)
    assert scores["L1"].item() == pytest.approx(.1 * share, rel=1e-3)
    assert scores["L2"].item() == pytest.approx(.01 * share, rel=1e-3)


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


# ---- attention against the true mask ---------------------------------------------------------------------------------

def test_attention_is_judged_by_the_true_mask(monkeypatch):
    """A map that is the true mask has IoU 1, its opposite 0, half of it half, of either instruction."""
    edits = [toy.edit("test", i) for i in (0, 2)]             # a colour and a shape
    images, truth = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    mask = edit_mask(images, truth)[:, 0].float()
    half = mask * (mask.flatten(1).cumsum(1) <= mask.sum((1, 2))[:, None] / 2).view_as(mask)
    given = {edits[0].instruction: mask, edits[0].reverse_instruction: 1 - mask}
    model = SimpleNamespace(device="cpu")

    def maps(model, images, outputs, instructions):
        assert len(instructions) == 2
        return given[instructions[0]]
    monkeypatch.setattr("experiments.truth.edit_region", maps)
    scores = judge_attention(model, edits, images, truth)
    assert {name: score.tolist() for name, score in scores.items()} == {
        "A_f IoU": [1, 1], "A_r IoU": [0, 0], "agreement": [0, 0]}
    given = dict.fromkeys(given, half)
    scores = judge_attention(model, edits, images, truth)
    assert scores["A_r IoU"].tolist() == pytest.approx([.5, .5], abs=.02)
    assert scores["agreement"].tolist() == [1, 1]


# ---- the table -------------------------------------------------------------------------------------------------------

def test_the_ascent_climbs_clip_from_the_input(scorer):
    model, edits = EditModel.from_pretrained(TOY), [toy.edit("validation", i) for i in range(8)]
    images = toy.render([e.scene for e in edits])
    outputs = evaluate.ascend(model, scorer, edits, images, steps=15)
    assert judge(edits, images, outputs, scorer)["direction"].mean() > .3


def test_the_table_of_a_few_scenes(capsys):
    evaluate.main(["--scenes", "5", "--steps", "1", "2", "--scales", "1.5:1.2", "3:1.5", "--kinds"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][-len(evaluate.COLUMNS):] == list(evaluate.COLUMNS) and set("".join(rows[1])) == {"-"}
    assert len({len(row) for row in rows}) == 1
    models, per_kind = rows[2:], 1 + len(toy.KINDS)
    assert len(models) == (2 + 4) * per_kind                  # copy, VAE, and two steps by two scales
    assert [row[1] for row in models[2 * per_kind::per_kind]] == [
        "1.5, 1.2, 1", "3, 1.5, 1", "1.5, 1.2, 2", "3, 1.5, 2"]
    values = [[float(v) for v in row[2:]] for row in models]
    right, outside = (evaluate.COLUMNS.index(name) for name in ("right", "outside"))
    assert values[0][right] == 0 and values[0][outside] < .01 < values[2 * per_kind][outside]
    for group in range(0, len(values), per_kind):             # a model's row is the mean of its kinds'
        for column in range(len(evaluate.COLUMNS)):
            kinds = [row[column] for row in values[group + 1:group + per_kind]]
            assert values[group][column] == pytest.approx(sum(kinds) / 5, abs=2e-3)


def test_attention_and_the_ascent_are_shown_on_demand(capsys):
    evaluate.main(["--scenes", "2", "--steps", "1", "--attention", "--ascent"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header[-3:] == list(evaluate.ATTENTION) and {len(row) for row in rows} == {len(header)}
    assert [row[0] for row in rows[:3]] == [
        "copy of the input", "true edit through the VAE", "CLIP ascent on the latents"]
    assert rows[0][-3:] == [""] * 3 and all(0 <= float(cell) <= 1 for cell in rows[3][-3:])


def test_the_picture_of_the_steps(tmp_path):
    evaluate.main(["--scenes", "3", "--steps", "1", "2", "3", "--picture", str(tmp_path / "steps.png")])
    with Image.open(tmp_path / "steps.png") as sheet:
        assert sheet.width > 5 * 128 and sheet.height > 3 * 128


def test_edits_that_are_no_numbers_are_an_error_which_names_the_model(monkeypatch, capsys):
    def edit(self, images, *_, **__):
        return images.index_fill(0, torch.tensor(1), torch.nan)
    monkeypatch.setattr(EditModel, "edit", edit)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--scenes", "2"])
    assert stop.value.code == 2
    assert "models/toy, at 1.5, 1.2, 10: the L1 of 1 of 2 edits is no number" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--scales", "3"], ["--scales", "nan:1"], ["--steps", "0"], ["--scenes", "0"],
                                   ["--models", "no-such-model"], ["--models", f"{TOY}/text2image"],
                                   ["--picture", "no-such-folder/a.png"]])
def test_bad_arguments_of_the_evaluation(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("experiments.evaluate: error: ")
