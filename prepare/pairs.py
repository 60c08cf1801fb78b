"""Makes the pairs of the supervised baseline as InstructPix2Pix made them: Prompt-to-Prompt, filtered by CLIP.

    python pairs.py                                                  # of the toy world's texts, by its text-to-image UNet
    python pairs.py --input edits.jsonl --model stable-diffusion-v1-5/stable-diffusion-v1-5 --output runs/pairs
    python train.py --objective ip2p --data runs/pairs --model models/toy --resolution 32 --batch-size 64 --steps 2000 \
        --lr 1e-3 --output runs/p2p                                  # the toy's baseline on them
    python pairs.py --biases                                         # how much the toy's pairs change outside of the edit

--input has the lines that instructions.py writes; of each, an image of the caption and one of the edited caption are
sampled together, many times, and the best pairs kept.  --output has InstructPix2Pix's layout (data.py); what it already
holds is not made again.
"""
import itertools
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

import toy
from cli import (Parser, device, keep_settings, non_negative_float, number, positive_int, quiet_transformers, replace_file,
                 seed_int)
from data import read_edits, read_lines
from losses import ClipScorer
from pictures import load_image, to_pil
from train import attention_kernel
from uip2p import EditModel

HERE = Path(__file__).resolve().parent
KEPT = 4                                                      # pairs of an edit, at most: those of the largest direction
CLEAR = .05                                                   # error up to which a generated image shows a scene
BIASES = {"attribute": ("colour",), "scene": ("shape", "remove", "add"), "global": ("background",)}     # figure 2's
REAL = dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", unet="unet", clip="openai/clip-vit-large-patch14", samples=100,
            steps=100, cfg_text=7.5, resolution=512, batch_size=2, thresholds=[.7, .2, .2, .2])       # InstructPix2Pix's
TOY = dict(model=str(HERE / "models/toy"), unet="text2image", clip=str(HERE / "models/toy/clip"), samples=8, steps=20,
           cfg_text=3., resolution=toy.SIZE, batch_size=32, edits=1000,
           thresholds=[.3, .5, .7, .7])                       # its CLIP tells near neighbours further apart
SCORES = "image", "direction", "caption", "edited_caption"    # the order of --thresholds


def alignment(tokens, edited_tokens):
    """Which token of one text each token of another goes on from: two lists of L -> (L, L) of 0 and 1.

    Words that are replaced one for one correspond; a column of zeros is a token that is new."""
    matrix = torch.zeros(len(tokens), len(edited_tokens))
    for kind, a, a_end, b, b_end in SequenceMatcher(None, tokens, edited_tokens, autojunk=False).get_opcodes():
        if kind == "equal" or kind == "replace" and a_end - a == b_end - b:
            matrix[range(a, a_end), range(b, b_end)] = 1
    return matrix


@torch.no_grad()
def prompt_to_prompt(model, captions, edited_captions, shares, noise, steps, text_guidance):
    """Prompt-to-Prompt (arXiv 2208.01626): two images (B, 3, H, W) in [-1, 1], of the captions and of the edited captions.

    Both start from `noise` (B, 4, h, w); for the first `shares` (B,) of the steps the second has the first's self-attention,
    and its cross-attention to the words that they share, in the branch with text.  InstructPix2Pix's code leaves
    cross-attention out and shares self-attention in both branches of guidance."""
    B = len(captions)
    tokens = model.tokenizer(captions + edited_captions, padding="max_length", truncation=True).input_ids
    aligned = torch.stack([alignment(*pair) for pair in zip(tokens[:B], tokens[B:])]).to(model.device)[:, None]  # (B, 1, L, L)
    is_new = 1 - aligned.sum(2, keepdim=True)                                              # (B, 1, 1, L)

    def control(done):
        if done >= shares.max():                              # none shares any more: attention may be fused again
            return None
        active = (shares > done).to(model.device)[:, None, None, None]
        def share(probs, is_text):                            # (4B, heads, N, L): with text (images 1, 2), without
            first, second, *without_text = probs.split(B)
            shared = first @ aligned + second * is_new if is_text else first
            return torch.cat([first, torch.where(active, shared, second), *without_text])
        return share

    z = noise.repeat(2, 1, 1, 1)
    # without an image, and s_I = 1, the guidance is that of text alone
    z_0 = model.sample(torch.zeros_like(z), captions + edited_captions, z, steps, text_guidance, 1., control=control)
    return model.decode(z_0).clamp(-1, 1).chunk(2)


@torch.no_grad()
def similarities(scorer, images, edited_images, captions, edited_captions):
    """The cosines that InstructPix2Pix filters by, under the names of SCORES: a dict of tensors (B,)."""
    E_image, E_edited_image = scorer.embed_images(torch.cat([images, edited_images])).chunk(2)
    E_caption, E_edited_caption = scorer.embed_texts(captions + edited_captions).chunk(2)
    return {"image": cosine_similarity(E_image, E_edited_image),
            "direction": cosine_similarity(E_edited_image - E_image, E_edited_caption - E_caption),
            "caption": cosine_similarity(E_image, E_caption),
            "edited_caption": cosine_similarity(E_edited_image, E_edited_caption)}


def write_pairs(folder, edit, pairs):
    """One directory of InstructPix2Pix's layout, whole or not at all: texts, and of each pair the scores and the images."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "prompt.json").write_text(json.dumps(prompt(edit)))
    (temporary / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in pairs))
    for row, images in pairs:
        for i, image in enumerate(images):
            to_pil(image).save(temporary / f"{row['seed']}_{i}.jpg", quality=100, subsampling=0)
    os.replace(temporary, folder)


def prompt(edit):
    """The texts of an edit under InstructPix2Pix's names."""
    return {"caption": edit["caption"], "edit": edit["instruction"], "output": edit["edited_caption"]}


def read_input(args):
    """The edits that are asked for: dicts of caption, instruction, edited_caption."""
    if args.input == "toy":
        edits = (toy.edit("train", i) for i in range(args.edits))
        return [{"caption": e.scene.caption, "instruction": e.instruction, "edited_caption": e.edited.caption} for e in edits]
    rows = read_lines(args.input, lambda row: read_edits(row, [{}], ["caption", "instruction", "edited_caption"]))
    return [edit for _, edits in rows for edit in edits][:args.edits]


def sample_pairs(model, scorer, edits, seeds, args):
    """One pair of images for each edit and seed -> their rows of metadata.jsonl, under InstructPix2Pix's names, the names of
    the thresholds that they fail, and the images."""
    side = args.resolution // model.vae_factor
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shares = .1 + .8 * torch.cat([torch.rand(1, generator=g) for g in generators])
    noise = torch.stack([torch.randn(4, side, side, generator=g) for g in generators]).to(model.device, model.dtype)
    texts = [[edit[name] for edit in edits] for name in ("caption", "edited_caption")]
    with attention_kernel(args):
        images = prompt_to_prompt(model, *texts, shares, noise, args.steps, args.cfg_text)
    scores = similarities(scorer, *(i.float() for i in images), *texts)
    for b, pair in enumerate(zip(*images)):
        score = {name: values[b].item() for name, values in scores.items()}
        yield ({"seed": seeds[b], "p2p_threshold": shares[b].item(), "cfg_scale": args.cfg_text,
                "clip_sim_0": score["caption"], "clip_sim_1": score["edited_caption"],
                "clip_sim_dir": score["direction"], "clip_sim_image": score["image"]},
               [name for name, least in zip(SCORES, args.thresholds) if score[name] < least], pair)


def make(args):
    """Makes the directories of all edits that --output does not hold yet, and at the end the list of all, seeds.json."""
    model = EditModel.from_pretrained(args.model, args.device, torch.float16 if args.device.startswith("cuda") else torch.float32,
                                      args.unet)
    scorer, edits = ClipScorer.from_pretrained(args.clip, args.device), read_input(args)
    if args.resolution % model.vae_factor:
        raise ValueError(f"--resolution {args.resolution} is no multiple of {model.vae_factor}")
    model.ddim_timesteps(args.steps)                          # refuses too many, before anything is written
    counts, todo = Counter(), []
    free = "edits", "output", "batch_size", "device", "biases"            # to change when a run goes on
    settings = {name: value for name, value in vars(args).items() if name not in free}
    keep_settings(args.output, settings, "*/prompt.json")
    for i, edit in enumerate(edits):
        folder = args.output / f"{i:07d}"
        if not folder.is_dir():
            todo.append((folder, edit))
        elif json.loads((folder / "prompt.json").read_text()) != prompt(edit):
            raise ValueError(f"{folder} holds another edit than --input: choose another --output, or remove it")

    progress, together = tqdm(total=len(todo), desc="edits"), -(-args.batch_size // args.samples)
    for group in (todo[i:i + together] for i in range(0, len(todo), together)):
        jobs = [(folder, edit, seed) for folder, edit in group
                for seed in random.Random(f"{args.seed} {folder.name}").sample(range(2 ** 32), args.samples)]
        found = {folder: [] for folder, _ in group}
        for n in range(0, len(jobs), args.batch_size):
            folders, batch, seeds = zip(*jobs[n:n + args.batch_size])
            for folder, (row, failed, pair) in zip(folders, sample_pairs(model, scorer, batch, seeds, args)):
                counts.update([*failed, "made", *["passed"] * (not failed)])
                if not failed:
                    found[folder].append((row, pair))
        for folder, edit in group:
            write_pairs(folder, edit, sorted(found[folder], key=lambda pair: -pair[0]["clip_sim_dir"])[:KEPT])
        progress.update(len(group))

    seeds = [[f"{i:07d}", [json.loads(line)["seed"] for line in open(args.output / f"{i:07d}" / "metadata.jsonl")]]
             for i in range(len(edits))]
    seeds = [row for row in seeds if row[1]]
    replace_file(args.output / "seeds.json", lambda path: path.write_text(json.dumps(seeds)))
    if counts:
        print(f"{counts['made']} pairs made, {counts['passed']} passed; too low: "
              + ", ".join(f"{name} {counts[name]}" for name in SCORES))
    print(f"{args.output}: {sum(len(row[1]) for row in seeds)} pairs of {len(seeds)} edits of {len(edits)}")


# ---- how far the pairs differ where they should not: figure 2 of the paper -----------------------------------------------

def fit(image, scene):
    """The scene of these names that is nearest to an image (3, S, S): places, sizes and shade found by search.
    -> Scene, and the mean absolute difference of its rendering to the image (range 0-1)."""
    def nearest(scenes):
        errors = (toy.render(scenes) - image).abs().mean((1, 2, 3)) / 2
        return scenes[errors.argmin()], errors.min().item()

    def moved(scene, i, spots):
        before, old, after = scene.objects[:i], scene.objects[i], scene.objects[i + 1:]
        return [replace(scene, objects=(*before, replace(old, x=x, y=y, radius=r), *after)) for x, y, r in spots]

    steps, best = range(2, toy.SIZE, 2), replace(scene, shade=(0, 0), objects=())
    for o in scene.objects:                                   # one after the other, coarsely
        best = replace(best, objects=(*best.objects, o))
        best, _ = nearest(moved(best, len(best.objects) - 1, itertools.product(steps, steps, (5, 6, 7))))
    for distance in (1, 1, .5):                               # then all, ever more finely
        shades = [(a, b) for a in (-.12, -.06, 0, .06, .12) for b in (-.12, -.06, 0, .06, .12)]
        best, error = nearest([replace(best, shade=shade) for shade in shades])
        for i, o in enumerate(best.objects):
            near = itertools.product((-distance, 0, distance), repeat=3)
            best, error = nearest(moved(best, i, [(o.x + a, o.y + b, max(o.radius + c, 1)) for a, b, c in near]))
    return best, error


def placed(edit, scene):
    """The edit with the places of another scene of the same names; an object that is added stays where it is."""
    where = {(o.x, o.y): new for o, new in zip(edit.scene.objects, scene.objects)}
    objects = tuple(replace(where.get((o.x, o.y), o), colour=o.colour, shape=o.shape) for o in edit.edited.objects)
    return replace(edit, scene=scene, edited=replace(scene, background=edit.edited.background, objects=objects))


def change_outside(edit, image, edited_image):
    """How much two images (3, S, S) differ where the true edit changes nothing; range 0-1."""
    truths = toy.render(toy.truths(edit))
    truth = truths[(truths - edited_image).abs().mean((1, 2, 3)).argmin()][None]
    outside = ~toy.edit_mask(toy.render([edit.scene]), truth)[0, 0]
    return (image - edited_image).abs().mean(0)[outside].mean().item() / 2


def biases(args):
    """Prints, by kind of edit, how much pairs change outside of the edit: those of --output, the best one of each edit, and
    those that toy.entangled renders.  Images that do not show their caption are left out."""
    changes, unclear = {kind: [] for kind in toy.KINDS}, 0
    for i, edit in enumerate(tqdm([toy.edit("train", i) for i in range(args.edits)], "measured")):
        folder = args.output / f"{i:07d}"
        for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()[:1]):
            image, edited_image = (load_image(folder / f"{row['seed']}_{n}.jpg") for n in (0, 1))
            scene, error = fit(image, edit.scene)
            if error > CLEAR:
                unclear += 1
                continue
            rendered = toy.render([edit.scene, toy.entangled(edit, random.Random(i))])
            changed = change_outside(placed(edit, scene), image, edited_image)
            changes[edit.kind].append((row["p2p_threshold"], changed, change_outside(edit, *rendered)))
    print(f"{unclear} edits left out, whose image is not the scene of its caption (mean error above {CLEAR})\n")
    print("| bias | edits | pairs | Prompt-to-Prompt | share < .5 | share >= .5 | rendered |\n|---|---|---|---|---|---|---|")
    for bias, kinds in BIASES.items():
        if not (rows := [row for kind in kinds for row in changes[kind]]):
            continue
        share, changed, rendered = torch.tensor(rows).T
        means = changed.mean(), changed[share < .5].mean(), changed[share >= .5].mean(), rendered.mean()
        print(f"| {bias} | {', '.join(kinds)} | {len(share)} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


def main(argv=None):
    p = Parser("pairs.py", description=__doc__.split("\n")[0])
    p.add_argument("--input", default="toy", help="'toy', or JSONL of caption, instruction, edited_caption")
    p.add_argument("--edits", type=positive_int, help="at most so many of --input (of the toy 1000)")
    p.add_argument("--output", type=Path, default=Path("runs/pairs"))
    p.add_argument("--model", help="text-to-image: directory or hub id (default: the toy model, or Stable Diffusion 1.5)")
    p.add_argument("--unet", help="its UNet's subfolder (default: unet; of the toy model, text2image)")
    p.add_argument("--clip", help="directory or hub id of the CLIP that filters")
    p.add_argument("--samples", type=positive_int, help="pairs made of each edit (100; of the toy 8)")
    p.add_argument("--steps", type=positive_int, help="denoising steps (100; of the toy 20)")
    p.add_argument("--cfg-text", type=number(float, 1), help="guidance of the text, 1 or more (7.5; of the toy 3)")
    p.add_argument("--thresholds", type=non_negative_float, nargs=4, metavar=("IMAGE", "DIRECTION", "CAPTION", "EDITED"),
                   help="least CLIP similarities: image to image, direction, each image to its caption")
    p.add_argument("--resolution", type=positive_int, help="of the images (512; of the toy 32)")
    p.add_argument("--batch-size", type=positive_int, help="pairs at once (2; of the toy 32)")
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=seed_int, default=0)
    p.add_argument("--biases", action="store_true", help="measure the pairs of --output, made from 'toy', instead of making some")
    given = {name for name, value in vars(p.parse_args(argv)).items() if value != p.get_default(name)}
    if "biases" in given and (unused := given - {"biases", "output", "edits"}):
        p.error(f"--{min(unused).replace('_', '-')} has no effect on --biases, which measures pairs of 'toy' that are there")
    p.set_defaults(**(TOY if p.parse_args(argv).input == "toy" else REAL))
    args = p.parse_args(argv)
    quiet_transformers()
    try:
        (biases if args.biases else make)(args)
    except torch.OutOfMemoryError:
        p.error(f"the memory of {args.device} is too small; choose a smaller --batch-size")
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
