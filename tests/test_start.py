"""experiments/start.py: what its three tables give the model, and how they count."""
import torch

import toy
from conftest import small_model
from experiments import start
from uip2p import EditModel

TOY = "models/toy"


def test_each_error_is_given_what_its_name_says():
    """... and all have the same noise and timesteps."""
    model, edits, seen = EditModel.from_pretrained(TOY), [toy.edit("validation", i) for i in range(5)], []
    model.unet.register_forward_hook(lambda module, args, output: seen.append(args))
    with torch.no_grad():
        errors = start.denoising_errors(model, edits)
        image = model.vae.encode(toy.render([e.scene for e in edits]))
        none, captions = model.encode_text([""] * 5), model.encode_text([e.scene.caption for e in edits])
        texts = {"image": none, "nothing": none, "caption": captions,
                 "image and instruction": model.encode_text([e.instruction for e in edits])}
    assert len(errors) == len(seen) == len(start.GIVEN) and list(texts) == list(start.GIVEN)
    for (x, t, context), (given, text) in zip(seen, texts.items()):
        assert torch.equal(x[:, 4:], image if "image" in given else torch.zeros_like(image)), given
        assert torch.equal(context, text) and torch.equal(t, seen[0][1]), given
        assert torch.equal(x[:, :4], seen[0][0][:, :4]) == (given != "image and instruction"), given


def test_what_the_tables_count(monkeypatch, capsys):
    """A drawing of the true edit shows all that the edit makes and nothing that it takes away; one of the input, the
    reverse.  An edit that only removes makes nothing, and one that only adds takes nothing away.  Forward edits are
    exact if they are the true edits, each t in its column."""
    edits = [toy.edit("validation", i) for i in range(10)]
    for side, made, gone in (("edited", "1.00", "0.00"), ("scene", "0.00", "1.00")):
        pictures = toy.render([getattr(e, side) for e in edits])
        inputs = toy.render([e.scene for e in edits])
        monkeypatch.setattr(start, "draw", lambda model, texts: pictures)
        monkeypatch.setattr(start, "forward_edits", lambda model, edits, t: pictures if t < 700 else inputs)
        start.main(["--models", str(small_model()), "--scenes", "10"])
        lines = capsys.readouterr().out.splitlines()
        rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
        assert rows[-6:-4] == [["what the edit makes", made, made, made, "", made],
                               ["what it takes away", gone, gone, gone, gone, ""]]
        assert rows[-1] == [made, made, "0.00", "0.00"]


def test_what_is_drawn_follows_the_text_alone():
    """The shipped text-to-image model draws most of what a caption says, with no image."""
    model, scenes = EditModel.from_pretrained(f"{TOY}/text2image"), [toy.edit("validation", i).scene for i in range(6)]
    model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:].any()))
    seen = []
    with torch.no_grad():
        drawn = start.read_scenes(start.draw(model, [scene.caption for scene in scenes]))
    assert sum(start.names(a) == start.names(b) for a, b in zip(scenes, drawn)) >= 5
    assert seen and not any(seen)


def test_forward_edits_are_of_one_prediction():
    """... of the input, at their timestep; the shipped editor makes most of them."""
    model, edits, seen = EditModel.from_pretrained(TOY), [toy.edit("validation", i) for i in range(10)], []
    model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        edited = start.forward_edits(model, edits, 600)
        image = model.vae.encode(toy.render([e.scene for e in edits]))
    assert start.judge_scenes(edits, edited)["exact"].mean() >= 0.7
    assert torch.allclose(seen[0][0][:, 4:], image, atol=1e-5) and (seen[0][1] == 600).all()
