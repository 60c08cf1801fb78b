"""Measures an editor against the truth of the toy world, on held-out scenes.

    python evaluate.py --models models/toy runs/baseline/model
"""
import argparse

import torch
from torch.nn.functional import cosine_similarity

import toy
from losses import ClipScorer
from uip2p import EditModel


@torch.no_grad()
def judge(edits, images, outputs, scorer):
    """Scores edited images by the truth: a dict of tensors (B,).  L1 and L2 in the range 0-1.

    Of an `add`, which names no place, the truth is the one of all its true edits that is nearest to the output.
    done: CLIP finds the output nearer to the edited caption than to the input's.
    right: inside the edit's mask, the output is nearer to the true edit than to the input."""
    truths = []
    for edit, output in zip(edits, outputs):
        candidates = toy.render(toy.truths(edit))
        truths.append(candidates[(candidates - output).abs().mean((1, 2, 3)).argmin()])
    truth = torch.stack(truths)
    mask = toy.edit_mask(images, truth)
    def mean(values, where):
        return (values * where).sum((1, 2, 3)) / (where.sum((1, 2, 3)) * 3).clamp_min(1)
    error = (outputs - truth).abs() / 2
    E_input, E_output = scorer.embed_images(images), scorer.embed_images(outputs)
    E_caption = scorer.embed_texts([e.scene.caption for e in edits])
    E_edited = scorer.embed_texts([e.edited.caption for e in edits])
    return {"L1": error.mean((1, 2, 3)), "L2": error.square().mean((1, 2, 3)),
            "inside": mean(error, mask), "outside": mean(error, ~mask),
            "done": ((E_output * E_edited).sum(1) > (E_output * E_caption).sum(1)).float(),
            "right": (mean(error, mask) < mean((outputs - images).abs() / 2, mask)).float(),
            "CLIP-T": (E_output * E_edited).sum(1),
            "direction": cosine_similarity(E_output - E_input, E_edited - E_caption)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--models", nargs="*", default=[])
    p.add_argument("--clip", default="models/toy/clip")
    p.add_argument("--n", type=int, default=500)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--scales", nargs="+", default=["1.5:1.2"])
    p.add_argument("--kinds", action="store_true")
    args = p.parse_args(argv)
    scorer = ClipScorer.from_pretrained(args.clip)
    edits = [toy.edit("test", i) for i in range(args.n)]
    images = toy.render([e.scene for e in edits])

    def report(name, outputs):
        scores = judge(edits, images, outputs, scorer)
        print(f"{name:40s}", " ".join(f"{k} {v.mean():.3f}" for k, v in scores.items()), flush=True)
        if args.kinds:
            for k, kind in enumerate(toy.KINDS):
                print(f"    {kind:36s}", " ".join(f"{n} {v[k::5].mean():.3f}" for n, v in scores.items()), flush=True)

    report("copy", images)
    vae = None
    for path in args.models:
        model = EditModel.from_pretrained(path)
        if vae is None:
            vae = model
            with torch.no_grad():
                report("true edit through the VAE", model.vae.decode(model.vae.encode(toy.render([e.edited for e in edits]))).clamp(-1, 1))
        for scale in args.scales:
            s_T, s_I = map(float, scale.split(":"))
            outputs = model.edit(images, [e.instruction for e in edits], steps=args.steps, text_guidance=s_T,
                                 image_guidance=s_I, generator=torch.Generator().manual_seed(0))
            report(f"{path} {scale}", outputs)


if __name__ == "__main__":
    main()
