"""Prompt-to-Prompt, the files that hold its pairs, and the measure of how much they change outside of the edit."""
import copy
import functools
import json
import random
import re
import shutil

import pytest
import torch

import toy
from attention import Attention
from experiments.truth import edit_mask
from prepare import pairs
from prepare.pairs import alignment, change_outside, controlled, fit, keep_settings, placed, prompt_to_prompt, share
from shards import InstructPix2Pix
from uip2p import EditModel


@pytest.fixture(scope="module")
def toy_model():
    return EditModel.from_pretrained(pairs.TOY + "/text2image")


SAME = {(5, 5), (6, 6)}                                      # what is padding in both texts goes on from its place


@pytest.mark.parametrize("edited, expected", [
    ("a red cat here .", {(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)}),
    ("a blue dog here .", {(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)}),             # a replacement
    ("a cat here .", {(0, 0), (2, 1), (3, 2), (4, 3), (4, 4)}),                  # padding goes on from the end token
    ("a dog here .", {(0, 0), (3, 2), (4, 3), (4, 4)}),                          # a refinement: the dog is new
    ("a big red dog here .", {(0, 0), (1, 2), (3, 4), (4, 5), (6, 6)}),
    ("a cat and a cat here .", {(0, 0), (2, 1), (3, 5), (4, 6)})])               # the first of equal ones
def test_tokens_go_on_from_equal_ones_and_padding_from_its_place(edited, expected):
    tokens = edited.split()
    matrix = alignment("a red cat here .".split(), tokens, 7)
    places = {tuple(place) for place in matrix.nonzero().tolist()}
    assert places == (expected | SAME if len(tokens) <= 5 else expected)


def needleman_wunsch(x, y):
    """Which token of x each of y goes on from, or -1: the best path by a match of 1, a mismatch of -1 and gaps of 0.
    Of equal paths, from the end: the one that takes a gap in x, else one in y."""
    @functools.cache
    def best(i, j):
        if not i or not j:
            return 0
        return max(best(i, j - 1), best(i - 1, j), best(i - 1, j - 1) + (1 if x[i - 1] == y[j - 1] else -1))

    def path(i, j):
        if not j:
            return []
        if not i or best(i, j) == best(i, j - 1):
            return path(i, j - 1) + [-1]
        if best(i, j) == best(i - 1, j):
            return path(i - 1, j)
        return path(i - 1, j - 1) + [i - 1]
    return path(len(x), len(y))


def test_attention_is_edited_as_by_prompt_to_prompt():
    """Its refinement: each token takes the first image's map of the token that it goes on from, if there is one, and
    otherwise keeps its own; from the text's end on, the map at its place."""
    rng, cases = random.Random(0), 0
    while cases < 40:
        x, y = ([0, *rng.choices(range(1, 6), k=rng.randint(1, 8)), 9] for _ in range(2))
        if len(x) == len(y):
            continue
        first, second = torch.rand(2, 1, 2, 3, 12).softmax(-1)                            # (1, heads, N, L)
        mapper = needleman_wunsch(x, y) + list(range(len(y), 12))
        expected = torch.stack([(first if source >= 0 else second)[..., source if source >= 0 else place]
                                for place, source in enumerate(mapper)], -1)
        given, on = torch.cat([first, second, first, second]), torch.ones(1, 1, 1, 1, dtype=bool)
        shared = share(given, True, alignment(x, y, 12)[None, None], on, 0)
        torch.testing.assert_close(shared, torch.cat([first, expected, first, second]))
        cases += 1


class Levels(torch.nn.Module):
    """Stands for a UNet of some resolutions; finds out in which of them self-attention is shared."""
    def __init__(self, levels):
        super().__init__()
        self.conv_in, self.attention = torch.nn.Conv2d(1, 1, 1), Attention(2, 2, 1)
        self.down_blocks, self.shared = range(levels), set()

    def forward(self, x, t, context):
        for side in (x.shape[-1] >> level for level in self.down_blocks):
            probs = torch.arange(4.0)[:, None, None, None].expand(4, 1, 1, side ** 2)
            first, second, *without_text = self.attention.control(probs, False)[:, 0, 0, 0].tolist()
            assert (first, without_text) == (0, [2, 3])
            self.shared |= {side} if second == 0 else set()
        return x[:, :4]


@pytest.mark.parametrize("latents, levels, shared", [(64, 4, {16, 8}), (32, 4, {8, 4}), (8, 2, {4})])
def test_self_attention_is_shared_in_the_coarser_half_of_the_unet(toy_model, latents, levels, shared):
    """In Stable Diffusion at 512x512 up to 16x16 pixels, as Prompt-to-Prompt's code has it."""
    model = copy.copy(toy_model)
    model.unet = Levels(levels)
    noise = torch.zeros(1, 4, latents, latents)
    prompt_to_prompt(model, ["a circle"], ["a cross"], torch.full((1,), 0.5), noise, 1, torch.ones(1))
    assert model.unet.shared == shared


def test_a_control_replaces_the_probabilities_of_both_kinds_of_attention():
    torch.manual_seed(0)
    x, context, asked = torch.randn(2, 5, 8), torch.randn(2, 3, 6), []

    def control(probs, is_text):
        asked.append(is_text)
        return probs[:1].expand_as(probs)
    for layer, given in ((Attention(8, 6, 2), context), (Attention(8, 8, 2), None)):
        _, probs = layer(x, given, capture=True)
        layer.control = control
        out, used = layer(x, given, capture=True)
        assert torch.equal(used, probs[:1].expand_as(probs))
        values = layer.to_v(x if given is None else given).unflatten(-1, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(out, layer.to_out[0]((probs[:1] @ values).transpose(1, 2).flatten(2)))
        torch.testing.assert_close(layer(x, given)[0], out)
    assert asked == [True, True, False, False]


def controls(model):
    return {module.control for module in model.unet.modules() if isinstance(module, Attention)}


def test_a_control_holds_only_inside_also_if_something_fails(toy_model):
    with pytest.raises(KeyboardInterrupt), controlled(toy_model, max):
        assert controls(toy_model) == {max}
        raise KeyboardInterrupt
    assert controls(toy_model) == {None}


def test_attention_is_shared_in_the_first_steps_only(toy_model, monkeypatch):
    seen = []

    def record(probs, is_text, aligned, active, coarse):
        if is_text and active.flatten().tolist() not in seen:
            seen.append(active.flatten().tolist())
        return share(probs, is_text, aligned, active, coarse)
    monkeypatch.setattr(pairs, "share", record)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt_to_prompt(toy_model, CAPTIONS, EDITED, torch.tensor([0.75, 0.1]), noise, 4, torch.full((2,), 3.0))
    assert seen == [[True, True], [True, False]] and controls(toy_model) == {None}


CAPTIONS = ["a red circle on a white background", "a blue cross and a red square on a teal background"]
EDITED = ["a green circle on a white background", "a blue cross on a teal background"]


def sampled(model, captions, noise, scale):
    with torch.no_grad():
        return model.decode(model.sample(torch.zeros_like(noise), captions, noise, 5, scale, 1.)).clamp(-1, 1)


def test_without_shared_steps_both_images_are_what_their_captions_give(toy_model):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image, edited = prompt_to_prompt(toy_model, CAPTIONS, EDITED, torch.zeros(2), noise, 5, torch.tensor([3., 9.]))
    for b, scale in ((0, 3.), (1, 9.)):                       # each pair has a guidance scale of its own
        for images, texts in ((image, CAPTIONS), (edited, EDITED)):
            alone = sampled(toy_model, texts[b:b + 1], noise[b:b + 1], scale)
            torch.testing.assert_close(images[b:b + 1], alone, atol=2e-4, rtol=0)


def test_sharing_attention_changes_only_the_edited_image_and_brings_it_nearer(toy_model):
    edits = [e for e in (toy.edit("validation", i) for i in range(60)) if e.kind == "shape"]
    texts = [e.scene.caption for e in edits], [e.edited.caption for e in edits]
    noise = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scales = torch.full((12,), 3.)
    apart = prompt_to_prompt(toy_model, *texts, torch.zeros(12), noise, 5, scales)
    shares = torch.ones(12).index_fill(0, torch.tensor([0]), 0)               # each pair has one of its own
    image, edited = prompt_to_prompt(toy_model, *texts, shares, noise, 5, scales)
    torch.testing.assert_close(image, apart[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(edited[0], apart[1][0], atol=1e-4, rtol=0)
    assert (edited - image)[1:].abs().mean() < (apart[1] - apart[0])[1:].abs().mean()


def make(path, *options):
    pairs.main(["--output", str(path), "--edits", "3", "--samples", "6", "--steps", "2", *options])
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of pairs, not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    make(folder)
    return folder


def test_pairs_are_written_as_instruct_pix2pix_has_them_and_resumed(tmp_path):
    files = make(tmp_path / "pairs", "--thresholds", "0", ".6", "0", ".5")
    least = dict(clip_sim_image=0, clip_sim_dir=.6, clip_sim_0=0, clip_sim_1=.5)
    listing = json.loads(files["seeds.json"])
    for name, seeds in listing:
        edit = toy.edit("train", int(name))
        assert json.loads(files[f"{name}/prompt.json"]) == {
            "caption": edit.scene.caption, "edit": edit.instruction, "output": edit.edited.caption}
        rows = [json.loads(line) for line in files[f"{name}/metadata.jsonl"].splitlines()]
        assert [row["seed"] for row in rows] == seeds and 0 < len(seeds) <= 4
        assert {row["cfg_scale"] for row in rows} == {3}
        directions = [row["clip_sim_dir"] for row in rows]
        assert directions == sorted(directions, reverse=True) and all(.1 <= row["p2p_threshold"] <= .9 for row in rows)
        assert all(row[key] >= value for row in rows for key, value in least.items())
        assert {f"{name}/{seed}_{i}.jpg" for seed in seeds for i in (0, 1)} < set(files)
    source = InstructPix2Pix(tmp_path / "pairs", "train", 32, pairs=True)
    batch, errors = source.__getitems__([(0, source.items[0])])
    assert not errors and batch.instructions == [toy.edit("train", int(listing[0][0])).instruction]

    shutil.rmtree(tmp_path / "pairs" / listing[0][0])          # as if it had been stopped before
    again = make(tmp_path / "pairs", "--thresholds", "0", ".6", "0", ".5")
    assert again.keys() == files.keys() and again["seeds.json"] == files["seeds.json"]


def test_other_texts_than_those_of_the_output_are_refused(tmp_path, capsys, made):
    shutil.copytree(made, tmp_path / "pairs")
    texts = next((tmp_path / "pairs").glob("*/prompt.json"))
    texts.write_text(texts.read_text().replace('"caption"', '"input"'))          # as InstructPix2Pix's own data has it
    make(tmp_path / "pairs")
    texts.write_text(texts.read_text().replace("background", "table"))
    assert "another edit" in refused(capsys, tmp_path / "pairs")


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        make(*argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("prepare.pairs: error: ")
    return last


@pytest.mark.parametrize("flags, says", [
    (["--seed", "7"], "another seed"), (["--steps", "3"], "another steps"),
    (["--cfg-text", "0.5", "3"], "--cfg-text"), (["--cfg-text", "9", "8"], "--cfg-text 9.0 8.0"),
    (["--biases"], "no effect on --biases")])
def test_other_settings_than_those_of_the_output_are_refused(made, capsys, flags, says):
    assert says in refused(capsys, made, *flags)


def test_guidance_is_drawn_for_each_pair_between_instruct_pix2pixs_7_5_and_15(monkeypatch, toy_model):
    args, given = pairs.parse(["--input", "edits.jsonl", "--resolution", "32"])[1], []
    def record(model, captions, edited_captions, shares, noise, steps, scales):
        given.extend(scales.tolist())
        return torch.zeros(2, len(captions), 3, 32, 32)
    monkeypatch.setattr(pairs, "prompt_to_prompt", record)
    monkeypatch.setattr(pairs, "similarities", lambda scorer, images, *_: {name: images[:, 0, 0, 0]
                                                                           for name in pairs.SCORES})
    edits = [dict(caption="a", instruction="b", edited_caption="c")] * 200
    rows = [row for row, _, _ in pairs.sample_pairs(toy_model, None, edits, range(200), args)]
    assert [row["cfg_scale"] for row in rows] == given and len(set(given)) == 200
    assert 7.5 <= min(given) < 7.8 and 14.7 < max(given) <= 15 and 10.8 < sum(given) / 200 < 11.7


def test_settings_bind_only_when_there_are_pairs(tmp_path, capsys):
    assert "from 1 to 999" in refused(capsys, tmp_path / "pairs", "--steps", "1000")
    assert not (tmp_path / "pairs").exists()
    keep_settings(tmp_path / "pairs", {"steps": 1000}, "*/prompt.json")          # of a run that failed
    assert make(tmp_path / "pairs")["seeds.json"]


def test_a_fitted_scene_is_the_one_that_was_drawn():
    for i in range(4):
        scene = toy.edit("train", i).scene
        found, error = fit(toy.render([scene])[0], scene)
        assert error < .02
        assert all(abs(a.x - b.x) < 1 and abs(a.y - b.y) < 1 for a, b in zip(found.objects, scene.objects))


@pytest.mark.parametrize("kind", toy.KINDS)
def test_only_what_changes_outside_of_the_edit_counts(kind):
    edit = next(e for e in (toy.edit("train", i) for i in range(20)) if e.kind == kind)
    image, truth = toy.render([edit.scene, edit.edited])
    mask = edit_mask(image[None], truth[None])[0, 0]
    assert change_outside(edit, image, truth) < .01
    assert change_outside(edit, image, truth + .2 * mask) < .01
    assert change_outside(edit, image, truth + .2 * ~mask) == pytest.approx(.1, abs=.01)


def test_an_edit_is_moved_with_its_scene():
    for i in range(10):
        edit = toy.edit("train", i)
        moved = toy.replace(edit.scene, objects=tuple(toy.replace(o, x=o.x + 1) for o in edit.scene.objects))
        new = placed(edit, moved)
        assert new.edited.caption == edit.edited.caption
        for o in new.edited.objects:
            added = edit.kind == "add" and o == edit.edited.objects[-1]
            assert added or any(o == toy.replace(p, x=p.x + 1) for p in edit.edited.objects)


# ---- what may be damaged -------------------------------------------------------------------------------------------

def test_a_pair_that_is_no_number_does_not_pass(toy_model, monkeypatch):
    scores = {name: torch.tensor([.9, float("nan") if name == "direction" else .9]) for name in pairs.SCORES}
    monkeypatch.setattr(pairs, "prompt_to_prompt", lambda *_: torch.zeros(2, 2, 3, 32, 32))
    monkeypatch.setattr(pairs, "similarities", lambda *_: scores)
    edits = [{"caption": text, "edited_caption": text} for text in CAPTIONS]
    args = pairs.parse(["--thresholds", "0", "0", "0", "0"])[1]
    made = pairs.sample_pairs(toy_model, None, edits, [1, 2], args)
    assert [failed for _, failed, _ in made] == [[], ["direction"]]


@pytest.mark.parametrize("content", ["[]", '{"seed": 0', "[" * 100_000, "\udcff", '{"seed": 1}'])
def test_damaged_settings_are_refused_and_the_folder_is_left_as_it_is(tmp_path, content):
    folder = tmp_path / "0000000"
    folder.mkdir()
    (folder / "prompt.json").touch()
    (tmp_path / "seeds.json.tmp-0123abcd").touch()
    (tmp_path / "settings.json").write_bytes(content.encode(errors="surrogateescape"))
    before = {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
        keep_settings(tmp_path, {"seed": 0}, "*/prompt.json")
    assert "\n" not in str(error.value) and "remove" in str(error.value)
    assert before == {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes())
                      for file in tmp_path.rglob("*")}


@pytest.mark.parametrize("line", ["{}", "[]", "{", '{"seed": "1", "p2p_threshold": 0.5}', '{"seed": 1}'])
def test_a_damaged_list_of_pairs_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"seed": 1, "p2p_threshold": .5}) + "\n")
    assert pairs.read_scores(tmp_path)[0]["seed"] == 1
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match="metadata.jsonl is damaged"):
        pairs.read_scores(tmp_path)
