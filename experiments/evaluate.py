"""Measures editors of the toy world against the true edits, as a table and a picture.

    python -m experiments.evaluate --models models/toy runs/baseline/model
    python -m experiments.evaluate --scales 1.5:1.2 3:1.5 --steps 5 15 50 --picture steps.png

truth.py says what the columns mean.  published.py has the protocols for real photographs.
"""
import argparse
from pathlib import Path

import torch

import toy
from cli import Parser, about, errors, non_negative_float, number, seed_int
from edit import TOY, load_editor
from experiments.truth import judge, judge_attention
from losses import ClipScorer, clip_direction_loss, clip_similarity_loss, rms
from pictures import grid, save_png

COLUMNS = ("exact", "objects", "L1", "L2", "inside", "outside", "done", "right", "CLIP-T", "direction")
ATTENTION = ("A_f IoU", "A_r IoU", "agreement")
SHOWN = 8                                      # edits in the picture


def ascend(model, clip, edits, images, steps=60):
    """Images whose latents minimise L_CLIP + L_sim + half the pixel distance to the input, by Adam, with no network in
    between: how far CLIP's gradient itself leads to the edit, and how far to patterns that only fool it."""
    with torch.no_grad():
        z, E_input = model.encode(images), clip.embed_images(images)          # (B, 4, h, w), (B, D)
    E_caption = clip.embed_texts([e.scene.caption for e in edits])
    E_edited_caption = clip.embed_texts([e.edited.caption for e in edits])
    optimizer = torch.optim.Adam([z.requires_grad_()], lr=0.05)
    for _ in range(steps):
        outputs = model.decode(z)
        E_output = clip.embed_images(outputs)
        loss = clip_direction_loss(E_input, E_output, E_caption, E_edited_caption)
        loss = loss + clip_similarity_loss(E_output, E_edited_caption) + 0.5 * rms(outputs - images).mean()
        optimizer.zero_grad()
        (loss * len(images)).backward()
        optimizer.step()
    return model.decode(z).detach().clamp(-1, 1)


class Table:
    """A table of scores in Markdown, printed line by line, each the mean over the edits or over a kind of them."""

    def __init__(self, edits, images, clip, columns, kinds):
        self.edits, self.images, self.clip, self.columns = edits, images, clip, columns
        self.groups = {"": range(len(edits))}
        if kinds:
            of_kind = {f", {kind}": range(k, len(edits), len(toy.KINDS)) for k, kind in enumerate(toy.KINDS)}
            self.groups |= of_kind
        print("| model | s_T, s_I, steps | " + " | ".join(columns) + " |")
        print("|---" * (2 + len(columns)) + "|")

    def add(self, name, settings, outputs, model=None):
        """The lines of edited images; model: it made them, and its attention is judged if there are columns for it."""
        scores = judge(self.edits, self.images, outputs, self.clip)
        if model and ATTENTION[0] in self.columns:
            scores |= judge_attention(model, self.edits, self.images, outputs)
        for group, rows in self.groups.items():
            cells = [f"{scores[c][list(rows)].mean():.3f}" if c in scores else "" for c in self.columns]
            print(f"| {name}{group} | {settings} | {' | '.join(cells)} |", flush=True)


def evaluate(args):
    if args.picture and (args.picture.suffix.lower() != ".png" or not args.picture.parent.is_dir()):
        raise ValueError(f"--picture {args.picture}: give the name of a .png file in a folder that is there")
    clip = ClipScorer.from_pretrained(args.clip)
    models = {path: load_editor(path) for path in args.models}
    edits = [toy.edit(args.split, i) for i in range(args.scenes)]
    images, truth = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    instructions = [e.instruction for e in edits]

    # ---- what is no editor, to compare with
    print(f"{args.scenes} {args.split} scenes, seed {args.seed}\n")
    table = Table(edits, images, clip, COLUMNS + (ATTENTION if args.attention else ()), args.kinds)
    table.add("copy of the input", "", images)
    first = models[args.models[0]]
    with torch.no_grad():
        through = first.decode(first.encode(truth)).clamp(-1, 1)
    table.add("true edit through the VAE", "", through)
    if args.ascent:
        table.add("CLIP ascent on the latents", "", ascend(first, clip, edits, images))

    # ---- the editors
    columns = {"input": images}                # of the picture
    for path, model in models.items():
        for steps in args.steps:
            for s_T, s_I in args.scales:
                generator = torch.Generator().manual_seed(args.seed)
                outputs = model.edit(images, instructions, steps, s_T, s_I, generator=generator)
                settings = f"{s_T:g}, {s_I:g}, {steps}"
                with about(f"{path}, at {settings}"):
                    table.add(path, settings, outputs, model)
                columns[f"{path}: {settings}"] = outputs
    if args.picture:
        columns["true edit"] = truth
        rows = list(zip(*columns.values()))[:SHOWN]
        save_png(grid(rows, list(columns), instructions[:SHOWN]), args.picture)


def scales(text):
    """The argparse type of two guidance scales, text and image."""
    s_T, _, s_I = text.partition(":")
    return non_negative_float(s_T), non_negative_float(s_I)


def main(argv=None):
    p = Parser("experiments.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=[TOY], help="directories of toy models")
    p.add_argument("--clip", default=f"{TOY}/clip", help="the CLIP of done, CLIP-T and direction")
    p.add_argument("--split", choices=("validation", "test"), default="test", help="of the toy world (%(default)s)")
    p.add_argument("--scenes", type=number(int, 1, 100_000), default=500, help="how many of its scenes (%(default)s)")
    p.add_argument("--steps", type=number(int, 1, 999), nargs="+", default=[10],
                   help="denoising steps, one or several (10)")
    p.add_argument("--scales", nargs="+", type=scales, default=[(1.5, 1.2)], metavar="TEXT:IMAGE",
                   help="guidance scales, one pair or several (1.5:1.2)")
    p.add_argument("--seed", type=seed_int, default=0, help="of the noise that the edits start from (%(default)s)")
    p.add_argument("--ascent", action="store_true", help="also what CLIP's gradient alone makes of the latents")
    p.add_argument("--attention", action="store_true", help="also how far the attention maps mark the true edit")
    p.add_argument("--kinds", action="store_true", help="also a line for each kind of edit")
    p.add_argument("--picture", type=Path, help="a .png file, for the first scenes")
    args = p.parse_args(argv)
    with errors(p):
        evaluate(args)


if __name__ == "__main__":
    main()
