"""Makes the pairs of the supervised baseline as InstructPix2Pix made them: by Prompt-to-Prompt, filtered by CLIP.

    python -m prepare.pairs                     # of the toy world's texts, by its text-to-image UNet
    python -m prepare.pairs --input edits.jsonl --output runs/pairs-sd15         # by Stable Diffusion 1.5
    python train.py --objective ip2p --data runs/pairs --model models/toy/text2image --resolution 32 \\
        --batch-size 64 --steps 2000 --lr 1e-3 --output runs/p2p                 # the toy's baseline on its pairs
    python -m prepare.pairs --biases            # how much the toy's pairs change outside of the edit

--input has the lines that prepare.instructions writes.  For each of them, an image of the caption and an image of the
edited caption are sampled together, many times, and the best of these pairs are kept.  --output has the layout of
InstructPix2Pix's data (shards.py).  What it already holds is not made again.
"""
import itertools
import json
import math
import random
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

import toy
from attention import Attention
from cli import (Parser, about, claimed, default_device, device, errors, non_negative_float, number, normal_path,
                 positive_int, replace_file, seed_int, sweep)
from data import TEXTS, parse_json, read_edits, read_json, read_lines, text_lines
from experiments.truth import edit_mask
from losses import ClipScorer
from pictures import load_image, to_pil
from uip2p import TIMESTEPS, EditModel

TOY = str(Path(__file__).resolve().parent.parent / "models/toy")
SD15, VIT_L = "stable-diffusion-v1-5/stable-diffusion-v1-5", "openai/clip-vit-large-patch14"

# The settings that depend on the texts.  The toy's CLIP tells near neighbours further apart than a real one does.
#             InstructPix2Pix's     the toy world's
SETTINGS = {
    "model":      (SD15,                 TOY + "/text2image"),       # a text-to-image model
    "clip":       (VIT_L,                TOY + "/clip"),             # the CLIP that filters
    "edits":      (None,                 1000),                      # at most so many; None: all of --input
    "samples":    (100,                  8),                         # pairs that are made of each edit
    "steps":      (100,                  20),                        # denoising steps
    "cfg_text":   ([7.5, 15.0],          [3.0, 3.0]),                # guidance scale of the text, drawn between them
    "thresholds": ([0.7, 0.2, 0.2, 0.2], [0.3, 0.5, 0.7, 0.7]),      # in the order of SCORES
    "resolution": (512,                  toy.SIZE),                  # of the images
    "batch_size": (2,                    32),                        # pairs at once
}
SCORES = ("image", "direction", "caption", "edited_caption")
MAY_CHANGE = ("edits", "output", "batch_size", "device", "biases")   # when a run goes on
KEPT = 4                            # pairs of an edit, at most: those with the highest direction similarity
CLEAR = 0.05                        # error up to which a generated image shows a scene
BIASES = {"attribute": ("colour",), "scene": ("shape", "remove", "add"), "global": ("background",)}    # of figure 2


# ---- Prompt-to-Prompt ----------------------------------------------------------------------------------------------

def alignment(tokens, edited_tokens, length):
    """Which token of one text each token of another goes on from: (length, length) of 0 and 1.

    tokens, edited_tokens: lists, from the start token to the first end token; `length` is with the padding
    As in Prompt-to-Prompt's code there are two cases.  Texts of as many tokens are a *replacement*: each token goes on
    from the one at its place.  Others are a *refinement*: tokens go on from the equal ones of the longest common
    subsequence, and a column of zeros is a token that is new.  (That code leaves the case to its user and counts words,
    not tokens.)  The padding always goes on from what is at its place."""
    matrix, n, m = torch.eye(length), len(tokens), len(edited_tokens)
    if n == m:
        return matrix
    matrix[:, :m] = 0
    common = torch.zeros(n + 1, m + 1, dtype=torch.int).tolist()   # [i][j]: of the first i and j tokens
    for i, j in itertools.product(range(n), range(m)):
        if tokens[i] == edited_tokens[j]:
            common[i + 1][j + 1] = common[i][j] + 1
        else:
            common[i + 1][j + 1] = max(common[i][j + 1], common[i + 1][j])
    while n and m:                                                 # back from the end
        if common[n][m] == common[n][m - 1]:
            m -= 1
        elif common[n][m] == common[n - 1][m]:
            n -= 1
        else:
            n, m = n - 1, m - 1
            matrix[n, m] = 1
    return matrix


def share(probs, is_text, aligned, active, coarse):
    """The control of a step: where `active`, the second image has the first one's attention.

    probs: (4B, heads, N, L), of the first and the second images with text, then of both without
    aligned: (B, 1, L, L), the alignment of the two captions; active: (B, 1, 1, 1), bool
    coarse: self-attention is shared only by layers of so many pixels N or fewer"""
    first, second, *without_text = probs.split(len(active))
    if not is_text and probs.shape[-1] > coarse:
        return probs
    shared = first
    if is_text:
        is_new = 1 - aligned.sum(2, keepdim=True)                             # (B, 1, 1, L)
        shared = first @ aligned + second * is_new                            # (B, heads, N, L)
    return torch.cat([first, torch.where(active, shared, second), *without_text])


@contextmanager
def controlled(model, control):
    """Inside, all attention layers of the UNet use what `control` makes of their probabilities."""
    layers = [module for module in model.unet.modules() if isinstance(module, Attention)]
    try:
        for layer in layers:
            layer.control = control
        yield
    finally:
        for layer in layers:
            layer.control = None


@torch.no_grad()
def prompt_to_prompt(model, captions, edited_captions, shares, noise, steps, text_guidance):
    """Prompt-to-Prompt (arXiv 2208.01626): two images, of the captions and of the edited captions.

    Both start from `noise` (B, 4, h, w); text_guidance: (B,).  For the first `shares` (B,) of the steps the second one
    has the first one's self-attention, and its cross-attention to the words that both captions have, where the text is
    given.  Prompt-to-Prompt's code shares self-attention up to 16x16 pixels; these are the coarser half of the four
    resolutions of Stable Diffusion's UNet at 512x512, and so the coarser half of them here, 8x8 in the toy world.
    InstructPix2Pix's code leaves cross-attention out, and shares all self-attention, also where no text is given.
    Returns two tensors (B, 3, H, W) in [-1, 1]."""
    # ---- the texts
    B, texts = len(captions), captions + edited_captions
    ids, end = model.tokenize(texts).tolist(), model.tokenizer.eos_token_id
    tokens = [row[:row.index(end) + 1] for row in ids]
    aligned = torch.stack([alignment(*pair, len(ids[0])) for pair in zip(tokens[:B], tokens[B:])])
    aligned = aligned[:, None].to(model.device)                               # (B, 1, L, L)
    text, no_text = model.encode_text([*texts, ""]).split([2 * B, 1])
    context = torch.cat([text, no_text.expand_as(text)])                      # (4B, L, D)

    # ---- the loop: DDIM without an image, with e = e(0) + s (e(T) - e(0))
    coarse = noise[0, 0].numel() // 4 ** (len(model.unet.down_blocks) // 2)   # pixels
    scale = text_guidance.to(noise).repeat(2)[:, None, None, None]            # (2B, 1, 1, 1)
    z_t = noise.repeat(2, 1, 1, 1)                                            # (2B, 4, h, w)
    no_image = torch.zeros_like(noise).repeat(4, 1, 1, 1)
    for i, t in enumerate(model.ddim_timesteps(steps)):
        t = torch.full((2 * B,), t, device=model.device)
        x = torch.cat([z_t.repeat(2, 1, 1, 1), no_image], dim=1)              # (4B, 8, h, w)
        active = (shares > i / max(steps - 1, 1)).to(model.device)[:, None, None, None]   # (B, 1, 1, 1)
        control = partial(share, aligned=aligned, active=active, coarse=coarse) if active.any() else None
        with controlled(model, control):
            e_text, e_none = model.unet(x, t.repeat(2), context).chunk(2)     # (2B, 4, h, w) each
        eps = e_none + scale * (e_text - e_none)
        z_t = model.ddim_step(z_t, eps, t, stride=TIMESTEPS // steps)
    return model.decode(z_t).clamp(-1, 1).chunk(2)


@torch.no_grad()
def similarities(scorer, images, edited_images, captions, edited_captions):
    """The cosines that InstructPix2Pix filters by, under the names of SCORES: a dict of tensors (B,)."""
    E_image, E_edited_image = scorer.embed_images(torch.cat([images, edited_images])).chunk(2)
    E_caption, E_edited_caption = scorer.embed_texts(captions + edited_captions).chunk(2)
    return {"image": cosine_similarity(E_image, E_edited_image),
            "direction": cosine_similarity(E_edited_image - E_image, E_edited_caption - E_caption),
            "caption": cosine_similarity(E_image, E_caption),
            "edited_caption": cosine_similarity(E_edited_image, E_edited_caption)}


# ---- the files of pairs --------------------------------------------------------------------------------------------

def keep_settings(folder, settings, results):
    """Writes a folder's settings.json, and removes what a killed run left unfinished.  ValueError if there are
    `results` in the folder, a glob pattern, that were made with other settings; then nothing is touched."""
    file, text = folder / "settings.json", json.dumps(settings, indent=1)
    if any(folder.glob(results)):
        with about(f"{folder} has results; choose another --output, or remove it"):
            old = read_json(file)
        changed = [name for name in settings if old.get(name) != json.loads(text)[name]]
        if changed:
            raise ValueError(f"{folder} holds results with another {', '.join(changed)}: choose another --output, or "
                             "remove it")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if not file.is_file() or file.read_bytes() != text.encode():
        replace_file(file, lambda path: path.write_text(text))


def read_input(args):
    """The edits that are asked for: dicts of caption, instruction, edited_caption."""
    if args.input == "toy":
        edits = [toy.edit("train", i) for i in range(args.edits)]
        return [{"caption": edit.scene.caption, "instruction": edit.instruction,
                 "edited_caption": edit.edited.caption} for edit in edits]
    rows = read_lines(args.input, lambda row: read_edits(row, [{}], TEXTS[:3]))
    return list(itertools.chain.from_iterable(edits for _, edits in rows))[:args.edits]


def prompt(edit):
    """The texts of an edit under InstructPix2Pix's names."""
    return {"caption": edit["caption"], "edit": edit["instruction"], "output": edit["edited_caption"]}


def read_prompt(folder):
    """The edit of a directory.  InstructPix2Pix calls the caption "input" in some of its data, "caption" in others."""
    with about(folder):
        edit, = read_edits(read_json(folder / "prompt.json"), [{}], TEXTS[:3])
    return edit


def write_pairs(folder, edit, pairs):
    """One directory of InstructPix2Pix's layout, whole or not at all.  pairs: [(scores, two images), ...]"""
    def write(temporary):
        temporary.mkdir()
        (temporary / "prompt.json").write_text(json.dumps(prompt(edit)))
        lines = [json.dumps(row) + "\n" for row, _ in pairs]
        (temporary / "metadata.jsonl").write_text("".join(lines))
        for row, images in pairs:
            for i, image in enumerate(images):
                to_pil(image).save(temporary / f"{row['seed']}_{i}.jpg", quality=100, subsampling=0)
    replace_file(folder, write)


def read_scores(folder):
    """The scores of the pairs of a directory, the best pair first.  ValueError if its list is damaged."""
    file = folder / "metadata.jsonl"
    with about(f"{file} is damaged; remove {folder}, and it is made again"):
        rows = [parse_json(line) for _, line in text_lines(file)]
        for row in rows:
            if type(row.get("seed")) is not int or type(row.get("p2p_threshold")) is not float:
                raise ValueError("a line has no seed or no p2p_threshold")
    return rows


def sample_pairs(model, scorer, edits, seeds, args):
    """One pair of images for each edit and seed: (its row of metadata.jsonl, under InstructPix2Pix's names, the names
    of the thresholds that it fails, the two images)."""
    # Each pair has random numbers of its own, so that it does not depend on its batch.
    side = args.resolution // model.vae.factor
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shares = 0.1 + 0.8 * torch.cat([torch.rand(1, generator=g) for g in generators])
    noise = torch.stack([torch.randn(4, side, side, generator=g) for g in generators])
    noise = noise.to(model.device, model.dtype)
    least, most = args.cfg_text
    scales = least + (most - least) * torch.cat([torch.rand(1, generator=g) for g in generators])

    captions, edited_captions = ([edit[name] for edit in edits] for name in ("caption", "edited_caption"))
    images = prompt_to_prompt(model, captions, edited_captions, shares, noise, args.steps, scales)
    scores = similarities(scorer, *(i.float() for i in images), captions, edited_captions)
    for b, pair in enumerate(zip(*images)):
        score = {name: values[b].item() for name, values in scores.items()}
        passed = {name: score[name] >= least for name, least in zip(SCORES, args.thresholds)}     # NaN does not
        failed = [name for name in SCORES if not passed[name]]
        row = {"seed": seeds[b], "p2p_threshold": shares[b].item(), "cfg_scale": scales[b].item(),
               "clip_sim_0": score["caption"], "clip_sim_1": score["edited_caption"],
               "clip_sim_dir": score["direction"], "clip_sim_image": score["image"]}
        yield row, failed, pair


def make_group(model, scorer, group, args, counts):
    """Makes the directories of some edits, [(directory, edit), ...], that are not there, and counts the pairs."""
    jobs = []
    for folder, edit in group:
        seeds = random.Random(f"{args.seed} {folder.name}").sample(range(2 ** 32), args.samples)
        jobs += [(folder, edit, seed) for seed in seeds]
    found = {folder: [] for folder, _ in group}
    for n in range(0, len(jobs), args.batch_size):
        folders, edits, seeds = zip(*jobs[n:n + args.batch_size])
        for folder, (row, failed, pair) in zip(folders, sample_pairs(model, scorer, edits, seeds, args)):
            counts.update(failed or ["passed"])
            counts["made"] += 1
            if not failed:
                found[folder].append((row, pair))
    for folder, edit in group:
        best = sorted(found[folder], key=lambda pair: -pair[0]["clip_sim_dir"])
        if not folder.is_dir():
            write_pairs(folder, edit, best[:KEPT])


def make(args):
    """Makes the directories of all edits that --output does not hold yet, and at the end their list, seeds.json."""
    # ---- the models and the texts
    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    model = EditModel.from_pretrained(args.model, args.device, dtype)
    scorer, edits = ClipScorer.from_pretrained(args.clip, args.device), read_input(args)
    if args.resolution % model.vae.factor:
        raise ValueError(f"--resolution {args.resolution} is no multiple of {model.vae.factor}")
    model.ddim_timesteps(args.steps)                      # refuses too many, before anything is written

    # ---- what is there
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    keep_settings(args.output, settings, "*/prompt.json")
    folders = [args.output / f"{i:07d}" for i in range(len(edits))]
    for folder, edit in zip(folders, edits):
        if folder.is_dir() and prompt(read_prompt(folder)) != prompt(edit):
            raise ValueError(f"{folder} holds another edit than --input: choose another --output, or remove it")

    # ---- what is not.  A group of which one is missing is made again: the rounding depends on what is together.
    counts, together = Counter(), math.ceil(args.batch_size / args.samples)
    for i in tqdm(range(0, len(edits), together), f"groups of {together} edits"):
        group = list(zip(folders[i:i + together], edits[i:i + together]))
        if not all(folder.is_dir() for folder, _ in group):
            make_group(model, scorer, group, args, counts)

    # ---- the list
    seeds = [[folder.name, [row["seed"] for row in read_scores(folder)]] for folder in folders]
    seeds = [row for row in seeds if row[1]]
    replace_file(args.output / "seeds.json", lambda path: path.write_text(json.dumps(seeds)))
    if counts:
        low = ", ".join(f"{name} {counts[name]}" for name in SCORES)
        print(f"{counts['made']} pairs made, {counts['passed']} passed; too low: {low}")
    print(f"{args.output}: {sum(len(row[1]) for row in seeds)} pairs of {len(seeds)} edits of {len(edits)}")


# ---- how far the pairs differ where they should not: figure 2 of the paper ----------------------------------------

def fit(image, scene):
    """The scene of these names that is nearest to an image (3, S, S); places, sizes and shade are found by search.
    -> Scene, and the mean absolute difference of its rendering to the image (range 0-1)."""
    def nearest(scenes):
        differences = (toy.render(scenes) - image).abs().mean((1, 2, 3)) / 2
        return scenes[differences.argmin()], differences.min().item()

    def moved(scene, i, spots):
        before, old, after = scene.objects[:i], scene.objects[i], scene.objects[i + 1:]
        return [replace(scene, objects=(*before, replace(old, x=x, y=y, radius=r), *after)) for x, y, r in spots]

    # First one object after the other, coarsely.
    steps, best = range(2, toy.SIZE, 2), replace(scene, shade=(0, 0), objects=())
    for o in scene.objects:
        best = replace(best, objects=(*best.objects, o))
        best, _ = nearest(moved(best, len(best.objects) - 1, itertools.product(steps, steps, (5, 6, 7))))

    # Then all of them, ever more finely.
    for distance in (1, 1, 0.5):
        shades = itertools.product((-0.12, -0.06, 0, 0.06, 0.12), repeat=2)
        best, error = nearest([replace(best, shade=shade) for shade in shades])
        for i, o in enumerate(best.objects):
            near = itertools.product((-distance, 0, distance), repeat=3)
            spots = [(o.x + a, o.y + b, max(o.radius + c, 1)) for a, b, c in near]
            best, error = nearest(moved(best, i, spots))
    return best, error


def placed(edit, scene):
    """The edit with the places of another scene of the same names; an object that is added stays where it is."""
    where = {(o.x, o.y): new for o, new in zip(edit.scene.objects, scene.objects)}
    objects = [replace(where.get((o.x, o.y), o), colour=o.colour, shape=o.shape) for o in edit.edited.objects]
    edited = replace(scene, background=edit.edited.background, objects=tuple(objects))
    return replace(edit, scene=scene, edited=edited)


def change_outside(edit, image, edited_image):
    """How much two images (3, S, S) differ where the true edit changes nothing; range 0-1."""
    truths = toy.render(toy.truths(edit))
    nearest = (truths - edited_image).abs().mean((1, 2, 3)).argmin()
    outside = ~edit_mask(toy.render([edit.scene]), truths[nearest][None])[0, 0]           # (S, S)
    return (image - edited_image).abs().mean(0)[outside].mean().item() / 2


def biases(args):
    """Prints, by kind of edit, how much pairs change outside of the edit: the best pair of each edit of --output, and
    the one that toy.entangled renders.  Images that do not show their caption are left out."""
    changes, unclear = {kind: [] for kind in toy.KINDS}, 0
    for i in tqdm(range(args.edits), "measured"):
        edit, folder = toy.edit("train", i), args.output / f"{i:07d}"
        for row in read_scores(folder)[:1]:
            image, edited_image = (load_image(folder / f"{row['seed']}_{n}.jpg") for n in (0, 1))
            scene, error = fit(image, edit.scene)
            if error > CLEAR:
                unclear += 1
                continue
            rendered = toy.render([edit.scene, toy.entangled(edit, random.Random(i))])
            changed = change_outside(placed(edit, scene), image, edited_image)
            changes[edit.kind].append((row["p2p_threshold"], changed, change_outside(edit, *rendered)))

    print(f"{unclear} edits left out, whose image is not the scene of its caption (mean error above {CLEAR})\n")
    print("| bias | edits | pairs | Prompt-to-Prompt | share < 0.5 | share >= 0.5 | rendered |")
    print("|---|---|---|---|---|---|---|")
    for bias, kinds in BIASES.items():
        rows = list(itertools.chain.from_iterable(changes[kind] for kind in kinds))
        if rows:
            shares, changed, rendered = torch.tensor(rows).T
            means = changed.mean(), changed[shares < 0.5].mean(), changed[shares >= 0.5].mean(), rendered.mean()
            cells = [bias, ", ".join(kinds), str(len(rows)), *(f"{mean:.3f}" for mean in means)]
            print(f"| {' | '.join(cells)} |")


# ---- the command ---------------------------------------------------------------------------------------------------

def parse(argv):
    p = Parser("prepare.pairs", description=__doc__, formatter_class=RawDescriptionHelpFormatter)

    def add(flag, text, type=normal_path, **kind):
        usual, of_toy = SETTINGS[flag[2:].replace("-", "_")]
        p.add_argument(flag, help=f"{text} (default: {usual or 'all'}; toy: {of_toy})", type=type, **kind)

    p.add_argument("--input", default="toy", type=normal_path,
                   help="'toy', or JSONL of caption, instruction, edited_caption")
    add("--edits", "at most so many edits of --input", type=positive_int)
    p.add_argument("--output", type=Path, default=Path("runs/pairs"), help="(%(default)s)")
    add("--model", "text-to-image: directory or hub id")
    add("--clip", "directory or hub id of the CLIP that filters")
    add("--samples", "pairs that are made of each edit", type=positive_int)
    add("--steps", "denoising steps", type=number(int, 1, 999))
    add("--cfg-text", "guidance scale of the text, drawn between two numbers for each pair, 1 or more",
        type=number(float, 1), nargs=2, metavar=("LEAST", "MOST"))
    add("--thresholds", "least CLIP similarities: of both images, of the direction, of each image and its caption",
        type=non_negative_float, nargs=4, metavar=("IMAGE", "DIRECTION", "CAPTION", "EDITED"))
    add("--resolution", "of the images", type=number(int, 16, 2048))
    add("--batch-size", "pairs at once", type=positive_int)
    p.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    p.add_argument("--seed", type=seed_int, default=0, help="of the sampling (%(default)s)")
    p.add_argument("--biases", action="store_true",
                   help="measures the pairs of --output, made from 'toy', instead of making some")
    args = p.parse_args(argv)

    given = {name for name, value in vars(args).items() if value != p.get_default(name)}
    unused = given - {"biases", "output", "edits"}
    if args.biases and unused:
        name = min(unused).replace("_", "-")
        p.error(f"--{name} has no effect on --biases, which measures pairs of 'toy' that are there")
    for name, (usual, of_toy) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, of_toy if args.input == "toy" else usual)
    least, most = args.cfg_text
    if least > most:
        p.error(f"--cfg-text {least} {most}: give the smaller number first")
    return p, args


def main(argv=None):
    p, args = parse(argv)
    with errors(p):
        if args.biases:
            biases(args)
            return
        with claimed(args.output):
            make(args)


if __name__ == "__main__":
    main()
