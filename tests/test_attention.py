"""experiments/attention.py: its measures by hand, and that losses.py has the rule that it names."""
from dataclasses import replace

import pytest
import torch

import toy
from experiments import attention
from losses import content_words
from uip2p import EditModel

TOY = "models/toy"


@pytest.fixture(scope="module")
def tokenizer():
    return EditModel.from_pretrained(TOY).tokenizer


def test_auc_by_hand():
    mask = torch.tensor([[[True, False], [False, True]]])
    maps = torch.tensor([[[3.0, 1], [2, 4]], [[1, 3], [4, 2]], [[2, 1], [3, 4]], [[5, 5], [5, 5]]])
    assert attention.auc(maps, mask.expand(4, -1, -1)).tolist() == [1, 0, 0.75, 0.5]


def test_a_map_of_all_objects_does_not_say_which():
    """One map is the first of three objects', one the second's, one of all alike; a single object is not compared."""
    scene = next(e.scene for e in (toy.edit("train", i) for i in range(100)) if len(e.scene.objects) == 3)
    first, second, third = list(attention.areas(scene).values())
    empty, drawn = toy.render([replace(scene, objects=()), scene])
    assert torch.equal(first | second | third, (empty != drawn).any(0))
    assert not (first & second).any() and not (first & third).any() and not (second & third).any()
    maps = torch.stack([first.float(), second.float(), first.float() + second.float() + third.float(), first.float()])
    asked = [(first, [second, third]), (first, [second, third]), (first, [second, third]), (first, [])]
    assert attention.which(maps + 0.1 * torch.stack([third.float()] * 4), asked).tolist()[:3] == [1, 0, 0]
    assert attention.which(maps, asked)[3].isnan()


def test_kinds_of_tokens(tokenizer):
    first, second = attention.kinds_of_tokens(tokenizer, ["turn the red circle into a square", "remove the blue cross"])
    assert first[:9] == ["start", "verb", "stop word", "other", "shape", "stop word", "stop word", "shape", "end"]
    assert second[:6] == ["start", "verb", "stop word", "other", "shape", "end"]
    assert set(first[9:] + second[6:]) == {"padding"} and len(first) == len(second) == tokenizer.model_max_length


@pytest.mark.parametrize("name", ["each word by its mean", "each head by its mean", "each word standardised"])
def test_words_count_alike(name):
    probs = torch.rand(2, 3, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    words, strength = torch.tensor([[0.0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]), torch.tensor([1, 0.1, 1, 2, 5])
    reduce = attention.REDUCTIONS[name]
    torch.testing.assert_close(reduce(probs * strength, words), reduce(probs, words))
    assert not torch.allclose(attention.summed(probs * strength, words), attention.summed(probs, words))


def test_the_rule_has_the_words_of_the_losses(tokenizer):
    edits = [toy.edit("validation", i) for i in range(20)]
    texts = [e.instruction for e in edits] + [e.reverse_instruction for e in edits]
    words = attention.choose(attention.kinds_of_tokens(tokenizer, texts), attention.RULE)
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(words, content_words(tokenizer, ids))


def test_a_map_that_is_the_mask_finds_every_edit(monkeypatch, capsys):
    """... in all tables, there and back; an `add` is judged by its way back alone, and a `remove` by its way there."""
    def capture(model, inputs, conditions, texts, t):
        seen.append((inputs, conditions, texts))
        told = [next(e for e, image in zip(edits, images) if text in (e.instruction, e.reverse_instruction)
                     and torch.equal(image, given)) for text, given in zip(texts, inputs)]
        truths = toy.render([e.edited for e in told])
        mask = attention.edit_mask(inputs, truths)[:, 0].float()
        return [(mask + 0.001)[:, None, ..., None].expand(-1, 2, -1, -1, 24)] * 2
    seen, edits = [], [toy.edit("validation", i) for i in range(20)]
    images = toy.render([e.scene for e in edits])
    monkeypatch.setattr(attention, "capture", capture)
    attention.main(["--scenes", "20", "--model", TOY])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ")[1:] for line in lines if "AUC" not in line]
    assert len(rows) == 4 * len(attention.WORDS) + len(attention.TIMESTEPS) + 1 + 2
    assert {cell for row in rows for cell in row} == {"1.00"}
    inputs, conditions, texts = seen[0]
    kinds = [e.kind for e in edits if e.kind != "background"]
    assert len(texts) == 2 * len(kinds) - kinds.count("add") - kinds.count("remove")
    assert not any(text.startswith("add") for text in texts)
    changed = (inputs != conditions).flatten(1).any(1)
    assert not changed[:len(kinds) - kinds.count("add")].any() and changed[len(kinds) - kinds.count("add"):].all()


def test_the_rule_is_measured_there_and_back(monkeypatch):
    """Of the words of the losses, whatever the others' maps show; AUC over all edits, *which* where there are others."""
    edits = [edit for edit in (toy.edit("test", i) for i in range(20)) if edit.kind != "background"]
    model = EditModel.from_pretrained(TOY)

    def capture(model, inputs, conditions, texts, t):
        assert t == attention.T
        (_, _, again), (masks, _, _) = attention.looks(edits)
        assert texts == again
        words = content_words(model.tokenizer, model.tokenize(texts))
        mask = masks.float()[:, None, ..., None]
        return [torch.where(words[:, None, None, None] > 0, mask, 1 - mask)]
    monkeypatch.setattr(attention, "capture", capture)
    scores = attention.measure_rule(model, edits)
    several = [o for _, o in attention.looks(edits)[1][1] if o]
    assert set(scores["AUC"].tolist()) == {1} and set(scores["which"].tolist()) == {1}
    assert 0 < len(several) == len(scores["which"]) < len(scores["AUC"])
