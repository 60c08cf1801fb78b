"""Measures editors against the truth of the toy world, on held-out scenes, as a table.

    python evaluate.py --models models/toy runs/baseline/model --scales 1.5:1.2 3:1.5 --steps 5 10 50
"""
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

import toy
from cli import Parser, non_negative_float, positive_int, quiet_transformers, seed_int
from losses import ClipScorer, clip_direction_loss, clip_similarity_loss, norm
from uip2p import EditModel

HERE = Path(__file__).resolve().parent
COLUMNS = ("L1", "L2", "inside", "outside", "done", "right", "CLIP-T", "direction")


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


def ascend(model, scorer, edits, images, views, steps=60):
    """Images whose latents minimise L_CLIP + L_sim + half the pixel distance to the input, by Adam, with no network in
    between: how far CLIP's gradient itself leads to the edit, and how far to patterns that only fool it."""
    texts = scorer.embed_texts([e.scene.caption for e in edits]), scorer.embed_texts([e.edited.caption for e in edits])
    E_caption, E_edited = (E.repeat(max(views, 1), 1) for E in texts)
    with torch.no_grad():
        z = model.encode(images)                                                          # (B, 4, h, w)
    optimizer, generator = torch.optim.Adam([z.requires_grad_()], lr=.05), torch.Generator().manual_seed(0)
    for _ in range(steps):
        outputs = model.decode(z)
        E_input, E_output = scorer.embed_views((images, outputs), views, generator)
        loss = clip_direction_loss(E_input, E_output, E_caption, E_edited) + clip_similarity_loss(E_output, E_edited) \
            + .5 * norm(outputs - images).mean()
        optimizer.zero_grad()
        (loss * len(images)).backward()
        optimizer.step()
    return model.decode(z).detach().clamp(-1, 1)


def main(argv=None):
    p = Parser("evaluate.py", description=__doc__.split("\n")[0])
    p.add_argument("--models", nargs="*", default=[str(HERE / "models/toy")], help="directories of toy models")
    p.add_argument("--clip", default=str(HERE / "models/toy/clip"), help="the CLIP of done, CLIP-T and direction")
    p.add_argument("--split", choices=("validation", "test"), default="test", help="of the toy world (%(default)s)")
    p.add_argument("--scenes", type=positive_int, default=500, help="how many of its scenes (%(default)s)")
    p.add_argument("--steps", type=positive_int, nargs="+", default=[10], help="denoising steps, one or several")
    p.add_argument("--scales", nargs="+", type=scales, default=[(1.5, 1.2)], metavar="TEXT:IMAGE", help="guidance, as 1.5:1.2")
    p.add_argument("--seed", type=seed_int, default=0, help="of the noise that the edits start from")
    p.add_argument("--ascent", action="store_true", help="also what CLIP's gradient alone makes of the latents")
    p.add_argument("--kinds", action="store_true", help="also a row for each kind of edit")
    args = p.parse_args(argv)
    quiet_transformers()
    try:
        run(args)
    except (ValueError, OSError) as error:
        p.error(str(error))


def scales(text):
    """The argparse type of two guidance scales, text and image."""
    return tuple(map(non_negative_float, text.split(":", 1) if ":" in text else (text, "")))


def run(args):
    scorer = ClipScorer.from_pretrained(args.clip)
    models = {path: EditModel.from_pretrained(path) for path in args.models}
    edits = [toy.edit(args.split, i) for i in range(args.scenes)]
    images = toy.render([e.scene for e in edits])
    print(f"{args.scenes} {args.split} scenes, seed {args.seed}\n")
    print("| model | s_T, s_I, steps | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))

    def report(name, settings, outputs):
        scores = judge(edits, images, outputs, scorer)
        groups = {name: range(len(edits))}
        if args.kinds:
            groups |= {f"{name}, {kind}": range(k, len(edits), len(toy.KINDS)) for k, kind in enumerate(toy.KINDS)}
        for label, rows in groups.items():
            print(f"| {label} | {settings} | " + " | ".join(f"{scores[c][list(rows)].mean():.3f}" for c in COLUMNS) + " |", flush=True)

    report("copy of the input", "", images)
    truth = toy.render([e.edited for e in edits])
    for n, (path, model) in enumerate(models.items()):
        if n == 0:
            with torch.no_grad():
                through = model.decode(model.encode(truth)).clamp(-1, 1)
            report("true edit through the VAE", "", through)
            if args.ascent:
                for views in (0, 2):
                    report(f"CLIP ascent on the latents, {views} views", "", ascend(model, scorer, edits, images, views))
        for steps in args.steps:
            for s_T, s_I in args.scales:
                generator = torch.Generator().manual_seed(args.seed)
                outputs = model.edit(images, [e.instruction for e in edits], steps, s_T, s_I, generator=generator)
                report(path, f"{s_T:g}, {s_I:g}, {steps}", outputs)


if __name__ == "__main__":
    main()
