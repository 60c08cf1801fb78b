"""The published protocols on real photographs: edits their images, compares them as the papers do, writes tables.

    python -m experiments.published magicbrush MagicBrush/test --models timbrooks/instruct-pix2pix --steps 5 15 50
    python -m experiments.published magicbrush MagicBrush/test --outputs another_editor   # images that exist already
    python -m experiments.published curve clip-filtered-dataset --models timbrooks/instruct-pix2pix --limit 2000

Every edited image is kept below --output, and only those that are missing are made: the same command resumes.  The data
and the folders of --outputs are named as the authors' own scripts have them:

    MagicBrush's test    images/ID/{ID-input.png, ID-output1.png, ...}, edit_sessions.json,
                         global_descriptions.json, local_descriptions.json (or local_captions.json)
    an editor's folder   ID/ID_1.png the first turn; from the second on ID/ID_inde_N.png, made from the true input, and
                         ID/ID_iter_N.png, made from the editor's own last output
    InstructPix2Pix's    the last 0.05 of seeds.json, see shards.py
    an editor's folder   one folder for each point of the curve, of any name, with DIRECTORY_SEED.png

Each table says below itself how it differs from what the authors' scripts do.
"""
import argparse
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import ViTModel

import edit
from checkpoint import find, load_transformer
from cli import (DTYPES, Parser, about, claimed, default_device, device, errors, non_negative_float, normal_path,
                 number, positive_int, replace_file, seed_int, sweep)
from data import TEXTS, read_edits, read_json
from losses import ClipScorer
from pictures import FONT, GREY, TEXT, from_pil, grid, load_image, save_png, to_pil
from prepare.pairs import keep_settings
from shards import InstructPix2Pix

METRICS = ("L1", "L2", "CLIP-I", "DINO", "CLIP-T global", "CLIP-T local")
SCALES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)   # s_I of the curve, at s_T = 7.5
SHOWN = 8                                      # edits in a picture
COLOURS = [(200, 60, 30), (30, 90, 180), (20, 130, 70), (150, 60, 160), (190, 130, 0), (80, 80, 80), (0, 140, 150)]

# UIP2P's tables.  Its rows of HIVE and IP2P are those of MagicBrush's paper.
PUBLISHED = {
    "single-turn": {
        "HIVE": (0.1092, 0.0341, 0.8519, 0.7500, 0.2752),
        "IP2P": (0.1122, 0.0371, 0.8524, 0.7428, 0.2764),
        "UIP2P, IP2P data": (0.0722, 0.0193, 0.9243, 0.8876, 0.2944),
        "UIP2P, CC3M": (0.0680, 0.0183, 0.9262, 0.8924, 0.2966),
        "UIP2P, CC12M": (0.0619, 0.0174, 0.9318, 0.9039, 0.2964)},
    "multi-turn": {
        "HIVE": (0.1521, 0.0557, 0.8004, 0.6463, 0.2673),
        "IP2P": (0.1584, 0.0598, 0.7924, 0.6177, 0.2726),
        "UIP2P, IP2P data": (0.1104, 0.0358, 0.8779, 0.8041, 0.2892),
        "UIP2P, CC3M": (0.1040, 0.0337, 0.8816, 0.8130, 0.2909),
        "UIP2P, CC12M": (0.0976, 0.0323, 0.8857, 0.8235, 0.2901)}}
LOCAL = ("HIVE", "IP2P")                       # their CLIP-T is of local captions
# (direction, image similarity) at s_I = 2.2 and 1.0, read off UIP2P's figure
PUBLISHED_CURVES = {
    "IP2P": [(0.048, 0.95), (0.151, 0.80)],
    "UIP2P, IP2P data": [(0.125, 0.895), (0.182, 0.858)],
    "UIP2P, CC3M": [(0.122, 0.908), (0.176, 0.862)],
    "UIP2P, CC12M": [(0.094, 0.933), (0.159, 0.891)]}

# What stands below the tables.
MAGICBRUSH_NOTES = """
CLIP-T of HIVE and IP2P, published, is MagicBrush's own, whose authors take the local captions.
?: UIP2P does not say which captions its CLIP-T takes; probably the global ones, as it exceeds what the true edits have
with the local ones.
MagicBrush's scripts differ: they sample by ancestral Euler, in 100 steps, at s_T = 7.5 and s_I = 1.5; here DDIM
samples, and without flags a model's own recommendations hold.  They have a caption for each turn; here a turn without
one is left out of CLIP-T.""".splitlines()
CURVE_NOTES = """
InstructPix2Pix's script differs: it samples by ancestral Euler, from other noise for each edit; here DDIM samples, from
the same noise.  It takes 5,000 samples of the split, drawn at random; here all or the first are taken.  Its edited
images are neither clamped nor rounded to the 256 steps of a file.  And it gives CLIP images in [-1, 1] where CLIP
expects [0, 1], a mistake that is not repeated here; the published figures are probably made with it.""".splitlines()


# ---- MagicBrush's files ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Turn:
    """One edit of a session, the number-th from 1: the true input and output, and the output's captions, "" if none."""
    id: str
    number: int
    input: Path
    target: Path
    instruction: str
    captions: tuple                            # global, local

    def output(self, setting):
        """The name of its output in an editor's folder."""
        kind = ""
        if self.number > 1:
            kind = {"single-turn": "inde_", "multi-turn": "iter_"}[setting]
        return f"{self.id}/{self.id}_{kind}{self.number}.png"


def read_listing(path):
    """A JSON file that holds an object which is not empty."""
    content = read_json(path)
    if not content:
        raise ValueError(f"{path} is empty")
    return content


def read_turn(path, listing, id, number, row, captions):
    """A Turn from its row of a listing.  Names are ID-input.png or ID-outputN.png: none leads out of images/ID."""
    said = row.get("instruction") if isinstance(row, dict) else None
    if not isinstance(said, str) or not said.strip():
        raise ValueError(f"{listing}: turn {number} of {id!r} has no instruction")
    files = []
    for key in ("input", "output"):
        name = str(row.get(key))
        if not re.fullmatch(r"\w+-(input|output\d+)\.png", name) or name.split("-")[0] != id:
            raise ValueError(f"{listing}: the {key} of turn {number} of {id!r} is {row.get(key)!r}, not "
                             "ID-input.png or ID-outputN.png")
        files.append(path / "images" / id / name)
        if not files[-1].is_file():
            raise ValueError(f"{files[-1]} is missing, which {listing.name} names")
    found = [texts.get(id, {}).get(row["output"]) for texts in captions]
    found = [caption.strip() if isinstance(caption, str) else "" for caption in found]
    return Turn(id, number, *files, said, tuple(found))


def read_magicbrush(path):
    """MagicBrush's test -> its sessions, lists of Turn.  All of it is checked: ValueError names the file."""
    path, captions = Path(path), []
    local = "local_captions.json" if (path / "local_captions.json").is_file() else "local_descriptions.json"
    for name in ("global_descriptions.json", local):
        captions.append(read_listing(path / name))
        if not all(isinstance(texts, dict) for texts in captions[-1].values()):
            raise ValueError(f"{path / name} is no {{ID: {{file: caption}}}}")
    listing, sessions = path / "edit_sessions.json", []
    for id, rows in read_listing(listing).items():
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{listing}: {id!r} is no list of turns")
        sessions.append([read_turn(path, listing, id, n, row, captions) for n, row in enumerate(rows, 1)])
    return sessions


# ---- InstructPix2Pix's files -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sample:
    """A sample of InstructPix2Pix's test split, one of its seeds."""
    output: str                                # its name in the folder of a point of the curve
    input: Path
    instruction: str
    captions: tuple                            # of the image, and of the edited image


def read_test_split(path, limit, seed):
    """-> the first `limit` (or all) Samples of InstructPix2Pix's test split, and how many seeds.json names.  `seed`
    decides which of its seeds a directory gives, as in InstructPix2Pix's script."""
    source, samples = InstructPix2Pix(path, "test", 0, pairs=True), []
    for folder, seeds, _ in source.items[:limit]:
        drawn = random.Random(f"{seed} {folder.name}").choice(seeds or [""])
        name = f"{folder.name}_{drawn}" if seeds else ""
        if folder.parent != Path(path) or not re.fullmatch(r"\w+", name):
            raise ValueError(f"{path}/seeds.json: {folder.name!r} has no seed, or its name is not one of a directory "
                             f"in {path}")
        listing, image = folder / "prompt.json", folder / f"{drawn}_0.jpg"
        for file in (listing, image):
            if not file.is_file():
                raise ValueError(f"{file} is missing, but seeds.json names its directory: is all unpacked?")
        with about(folder):
            texts, = read_edits(read_json(listing), [{}], TEXTS[:3])
        captions = texts["caption"], texts["edited_caption"]
        samples.append(Sample(f"{name}.png", image, texts["instruction"], captions))
    return samples, source.named


# ---- metrics ---------------------------------------------------------------------------------------------------------

def preprocess(image, resize, crop):
    """(3, H, W) in [-1, 1] -> (3, crop, crop) in [-1, 1], as torchvision does it with a file: the short side is resized
    to `resize`, bicubic, first along the rows and then along the columns, each time in the 256 steps of a file; then
    the centre is cut out, and half a pixel goes to the even side."""
    height, width = image.shape[1:]
    new_height, new_width = [side * resize // min(height, width) for side in (height, width)]
    for size in ((height, new_width), (new_height, new_width)):
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        image = ((image + 1) * 127.5).round() / 127.5 - 1
    top, left = [round((side - crop) / 2) for side in (new_height, new_width)]
    return image[:, top:top + crop, left:left + crop]


class Dino:
    """DINO's ViT as image embeddings: the class token, normalised.  Images are resized to 256 and cut to 224."""
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's

    def __init__(self, vit):
        self.vit, self.size = vit.eval(), vit.config.image_size
        self.mean = torch.tensor(self.MEAN, device=vit.device)[:, None, None]
        self.std = torch.tensor(self.STD, device=vit.device)[:, None, None]

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu"):
        """A DINO in the hub's layout, ViT-S/16 is facebook/dino-vits16."""
        return cls(load_transformer(ViTModel, find(path_or_id, ["model"]), add_pooling_layer=False).to(device))

    def embed_images(self, images):
        """List of (3, H, W) in [-1, 1] -> unit vectors (B, D)."""
        resize = self.size * 256 // 224
        images = torch.stack([preprocess(image, resize, self.size) for image in images]).to(self.vit.device)
        tokens = self.vit((images / 2 + 0.5 - self.mean) / self.std).last_hidden_state    # (B, 1 + patches, D)
        return F.normalize(tokens[:, 0], dim=-1)


def clip_embed(clip, images):
    """List of (3, H, W) in [-1, 1] -> unit vectors (B, D) of a ClipScorer, which takes what is of its size as it is."""
    images = torch.stack([preprocess(image, clip.size, clip.size) for image in images])
    return clip.embed_images(images.to(clip.clip.device))


@torch.no_grad()
def compare(outputs, targets, captions, clip, dino):
    """MagicBrush's metrics of B pairs of images (3, H, W) in [-1, 1] with the targets' captions -> B dicts of METRICS.

    L1 and L2 are of images in [0, 1], the output resized to the target's size; L2 has no root.  CLIP-T is None where
    there is no caption."""
    E_output, E_target = clip_embed(clip, outputs), clip_embed(clip, targets)             # (B, D) each
    dinos = (dino.embed_images(outputs) * dino.embed_images(targets)).sum(1)              # (B,)
    rows = []
    for output, target, texts, E_o, E_t, d in zip(outputs, targets, captions, E_output, E_target, dinos):
        resized = F.interpolate(output[None], target.shape[1:], mode="bicubic", antialias=True)[0].clamp(-1, 1)
        error = (resized - target).abs() / 2
        row = {"L1": error.mean(), "L2": error.square().mean(), "CLIP-I": E_o @ E_t, "DINO": d}
        row = {name: value.item() for name, value in row.items()}
        for name, text in zip(METRICS[4:], texts):
            row[name] = (E_o @ clip.embed_texts([text])[0]).item() if text else None
        rows.append(row)
    return rows


@torch.no_grad()
def directions(inputs, outputs, captions, clip):
    """The curve's two numbers of B edits, images (3, H, W) in [-1, 1], captions (before, after) -> B dicts:
    direction = cos(E_I1 - E_I0, E_T1 - E_T0), image = cos(E_I0, E_I1).  InstructPix2Pix's script resizes to a square,
    without a filter against aliasing."""
    size = (clip.size, clip.size)
    small = torch.cat([F.interpolate(image[None], size, mode="bicubic") for image in (*inputs, *outputs)])
    E_I0, E_I1 = clip.embed_images(small.to(clip.clip.device)).chunk(2)
    E_T0, E_T1 = [clip.embed_texts(list(texts)) for texts in zip(*captions)]
    direction, image = cosine_similarity(E_I1 - E_I0, E_T1 - E_T0), (E_I0 * E_I1).sum(1)
    return [{"direction": d, "image": i} for d, i in zip(direction.tolist(), image.tolist())]


def score(jobs, batch_size, function, *judges):
    """The rows of function(images, images, texts, *judges) for jobs (path, path, texts), batch by batch."""
    rows = []
    for first in tqdm(range(0, len(jobs), batch_size), f"scores of {batch_size} images"):
        a, b, texts = zip(*jobs[first:first + batch_size])
        rows += function([load_image(path) for path in a], [load_image(path) for path in b], texts, *judges)
    for row, (path, *_) in zip(rows, jobs):
        for name, value in row.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{path}: its {name} is no number (NaN)")
    return rows


def mean(rows, name):
    """The mean of what the rows have under a name, without those that have None."""
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else float("nan")


# ---- the edits -------------------------------------------------------------------------------------------------------

def begin(model, path, args, steps, cfg_image):
    """The folder of a model's edits, and all their settings: the flags, otherwise what the model recommends.
    ValueError if the folder has edits with other settings."""
    flags = {"steps": steps, "cfg_text": args.cfg_text, "cfg_image": cfg_image, "resolution": args.resolution}
    settings = edit.recommended(model) | {name: value for name, value in flags.items() if value is not None}
    scales = "{steps}-steps-{cfg_text:g}-{cfg_image:g}".format(**settings)
    # The sum tells a model that was trained further under the same name.
    weights = sum(p.cpu().double().abs().sum().item() for p in model.unet.parameters())
    settings |= {"model": path, "weights": f"{weights:.9g}", "data": args.data, "seed": args.seed,
                 "device": args.device, "precision": args.precision, "batch_size": args.batch_size}
    folder = args.output / re.sub(r"[^\w.]+", "-", path).strip("-.") / scales
    keep_settings(folder, settings, "**/*.png")
    print(", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    return folder, SimpleNamespace(**settings)


def fit(model, name, image, resolution):
    """An image (3, H, W) at the size of its edit, as InstructPix2Pix's and MagicBrush's scripts have it: resized by
    Lanczos, so that it covers that size, and cropped to it in the middle."""
    height, width = edit.edit_size(model, name, image.shape[1:], resolution, math.floor)
    return from_pil(ImageOps.fit(to_pil(image), (width, height), Image.Resampling.LANCZOS))


def make_edits(model, settings, jobs):
    """Edits (output, input, instruction), paths and a text, batch by batch, and saves the outputs, at the edit's size.

    A batch that is there is skipped, one of which a part is there made again: outputs do not depend on
    interruptions."""
    for folder in {output.parent for output, _, _ in jobs}:
        folder.mkdir(exist_ok=True)
        sweep(folder)
    for first in tqdm(range(0, len(jobs), settings.batch_size), f"batches of {settings.batch_size} edits"):
        batch = jobs[first:first + settings.batch_size]
        if all(output.is_file() for output, _, _ in batch):
            continue
        by_size = {}
        for output, source, instruction in batch:
            image = fit(model, source, load_image(source), settings.resolution)
            by_size.setdefault(image.shape[1:], []).append((output, image, instruction))
        for size, same in by_size.items():
            outputs, images, instructions = zip(*same)
            for output, image in zip(outputs, edit.edit(model, images, instructions, size, settings)):
                save_png(image, output)


def check_files(files):
    """ValueError if another editor's outputs are not all there, or one is damaged."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"--outputs: {len(missing)} of {len(files)} images are missing, the first is {missing[0]}")
    for file in files:
        load_image(file)


# ---- tables ----------------------------------------------------------------------------------------------------------

def plot(measured, published, axes, size=(560, 400), margin=60):
    """One plot of {name: [(x, y), ...]}: measured lines with dots, published ones with rings.  axes: their names."""
    points = sum([*measured.values(), *published.values()], [])
    (x0, x1), (y0, y1) = [(min(values), max(values)) for values in zip(*points)]

    def place(x, y):
        return margin + (x - x0) / (x1 - x0 or 1) * size[0], margin + (y1 - y) / (y1 - y0 or 1) * size[1]

    # ---- axes
    lines = measured | published
    height = size[1] + 2 * margin + (TEXT + 5) * len(lines)
    sheet = Image.new("RGB", (size[0] + 2 * margin, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((margin - 10, margin - 10, margin + size[0] + 10, margin + size[1] + 10), outline=GREY)
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        draw.text((place(x, y)[0], margin + size[1] + 14), f"{x:.3f}", GREY, FONT, anchor="mt")
        draw.text((margin - 14, place(x, y)[1]), f"{y:.2f}", GREY, FONT, anchor="rm")
    draw.text((margin + size[0] / 2, margin + size[1] + 32), axes[0], "black", FONT, anchor="mt")
    draw.text((margin - 10, margin - 16), axes[1], "black", FONT, anchor="lb")

    # ---- lines, and their names below
    for i, (name, line) in enumerate(lines.items()):
        colour, top = COLOURS[i % len(COLOURS)], 2 * margin + size[1] + (TEXT + 5) * i
        width, inside = (1, "white") if name in published else (3, colour)
        draw.line([place(*point) for point in line], colour, width)
        for x, y in [place(*point) for point in line] + [(margin, top)]:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), inside, colour)
        draw.text((margin + 12, top), name, colour, FONT, anchor="lm")
    return sheet


def write(folder, name, lines, rows, picture):
    """Prints a table, and keeps it as NAME.md, its numbers as NAME.jsonl and a picture as NAME.png."""
    sweep(folder)
    for suffix, text in ((".md", lines), (".jsonl", [json.dumps(row) for row in rows])):
        content = "\n".join(text) + "\n"
        replace_file(folder / (name + suffix),
                     lambda temporary: temporary.write_text(content, "utf-8", "backslashreplace"))
    save_png(picture, folder / f"{name}.png")
    print("\n" + "\n".join(lines) + f"\n\n{folder / name}.md, .jsonl, .png")


def extent(done, total, what):
    """What of a data set was used, for the table."""
    if done == total:
        return f"all {total} {what}"
    return f"ONLY {done} of {total} {what}, not the published protocol"


# ---- magicbrush ------------------------------------------------------------------------------------------------------

def edit_magicbrush(model, path, args, steps, sessions):
    """Edits each turn from its true input, and from the output of the turn before -> the folder, the settings."""
    folder, settings = begin(model, path, args, steps, args.cfg_image)
    turns = sum(sessions, [])
    make_edits(model, settings, [(folder / t.output("single-turn"), t.input, t.instruction) for t in turns])
    for n in range(1, max(map(len, sessions))):                   # the second turns of all sessions, then the third
        pairs = [session[n - 1:n + 1] for session in sessions if len(session) > n]
        make_edits(model, settings, [(folder / turn.output("multi-turn"), folder / last.output("multi-turn"),
                                      turn.instruction) for last, turn in pairs])
    return folder, settings


def magicbrush(args):
    """Single-turn: every turn from its true input.  Multi-turn: the last of a chain of edits."""
    # ---- data and judges
    sessions = read_magicbrush(args.data)
    used = sessions[:args.limit]
    judged = {"single-turn": sum(used, []), "multi-turn": [session[-1] for session in used]}

    def outputs(folder):
        return {setting: [folder / turn.output(setting) for turn in turns] for setting, turns in judged.items()}

    others = {str(folder): outputs(folder) for folder in args.outputs}
    for files in others.values():
        check_files(files["single-turn"] + files["multi-turn"])
    clip, dino = ClipScorer.from_pretrained(args.clip, args.device), Dino.from_pretrained(args.dino, args.device)

    # ---- edits
    methods = {"copy of the input": {"single-turn": [turn.input for turn in judged["single-turn"]],
                                     "multi-turn": [session[0].input for session in used]}}
    for path in args.models:
        model = edit.load_editor(path, args.device, args.precision)
        for steps in args.steps:
            folder, settings = edit_magicbrush(model, path, args, steps, used)
            methods[f"{path}, {settings.steps} steps"] = outputs(folder)
    methods |= others

    # ---- scores
    rows = []
    for setting, turns in judged.items():
        for method, files in methods.items():
            jobs = [(file, turn.target, turn.captions) for file, turn in zip(files[setting], turns)]
            scores = score(jobs, args.batch_size, compare, clip, dino)
            rows += [{"setting": setting, "method": method, "output": turn.output(setting)} | row
                     for turn, row in zip(turns, scores)]

    # ---- table and picture
    lines = [f"MagicBrush test, {extent(len(used), len(sessions), 'sessions')}; CLIP {args.clip}, DINO {args.dino}", ""]
    lines += magicbrush_table(rows, judged, methods)
    shown = judged["single-turn"][:SHOWN]
    columns = [files["single-turn"][:SHOWN] for files in methods.values()] + [[turn.target for turn in shown]]
    images = [[load_image(file) for file in row] for row in zip(*columns)]
    picture = grid(images, [*methods, "true edit"], [turn.instruction for turn in shown])
    write(args.output, "magicbrush", lines, rows, picture)


def magicbrush_table(rows, judged, methods):
    """The lines of the table, from the rows of all edits."""
    lines = [f"| setting | method | {' | '.join(METRICS)} |", "|---" * (2 + len(METRICS)) + "|"]
    for setting in judged:
        for method, values in PUBLISHED[setting].items():
            *cells, clip_t = [f"{value:.4f}" for value in values]
            cells += ["", clip_t] if method in LOCAL else [f"{clip_t} ?", ""]
            lines.append(f"| {setting} | {method}, published | {' | '.join(cells)} |")
        for method in methods:
            scores = [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
            lines.append(f"| {setting} | {method} | {' | '.join(f'{mean(scores, name):.4f}' for name in METRICS)} |")
    lines += MAGICBRUSH_NOTES
    for setting, turns in judged.items():
        no_global, no_local = [sum(not turn.captions[i] for turn in turns) for i in range(2)]
        lines.append(f"Captions missing or empty, left out of CLIP-T: {setting}, of {len(turns)}: {no_global} global, "
                     f"{no_local} local.")
    return lines


# ---- curve -----------------------------------------------------------------------------------------------------------

def curve(args):
    """Direction and image similarity at several scales s_I."""
    # ---- data and judge
    samples, total = read_test_split(args.data, args.limit, args.seed)
    editors, others = {}, {}                   # {an editor: {a point of its curve: the folder of its outputs}}
    for folder in args.outputs:
        others[str(folder)] = points = {f.name: f for f in sorted(folder.iterdir())
                                       if f.is_dir() and not f.name.startswith(".")}
        pairs = itertools.product(points.values() or [folder / "POINT"], samples)
        check_files([point / sample.output for point, sample in pairs])
    clip = ClipScorer.from_pretrained(args.clip, args.device)

    # ---- edits
    for path in args.models:
        model = edit.load_editor(path, args.device, args.precision)
        for s_I in args.cfg_image:
            folder, settings = begin(model, path, args, args.steps, s_I)
            make_edits(model, settings, [(folder / s.output, s.input, s.instruction) for s in samples])
            editors.setdefault(path, {})[f"s_I = {s_I}"] = folder
    editors |= others

    # ---- scores
    rows = []
    for method, points in editors.items():
        for point, folder in points.items():
            jobs = [(sample.input, folder / sample.output, sample.captions) for sample in samples]
            scores = score(jobs, args.batch_size, directions, clip)
            rows.append({"method": method, "point": point, "samples": len(samples), "of": total,
                         "direction": mean(scores, "direction"), "image": mean(scores, "image")})

    # ---- table and picture
    lines = [f"InstructPix2Pix test split, {extent(len(samples), total, 'samples')}; CLIP {args.clip}", "",
             "| method | point | direction similarity | image similarity |", "|---|---|---|---|"]
    for method, points in PUBLISHED_CURVES.items():
        for end, (x, y) in zip(("s_I = 2.2", "s_I = 1.0"), points):
            lines.append(f"| {method}, read off the published figure | {end} | {x:.3f} | {y:.3f} |")
    for row in rows:
        lines.append(f"| {row['method']} | {row['point']} | {row['direction']:.3f} | {row['image']:.3f} |")
    lines += CURVE_NOTES
    measured = {m: [(row["direction"], row["image"]) for row in rows if row["method"] == m] for m in editors}
    published = {f"{method}, published": points for method, points in PUBLISHED_CURVES.items()}
    write(args.output, "curve", lines, rows, plot(measured, published, ("direction similarity", "image similarity")))


# ---- the commands ----------------------------------------------------------------------------------------------------

def parser():
    main = Parser("experiments.published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    steps, scale = number(int, 1, 999), non_negative_float

    p = commands.add_parser("magicbrush", help="MagicBrush's test, single-turn and multi-turn")
    p.set_defaults(run=magicbrush)
    p.add_argument("--steps", type=steps, nargs="+", default=[None], help="one or several (the model's, otherwise 50)")
    p.add_argument("--cfg-text", type=scale, help="guidance scale s_T (the model's, otherwise 7.5)")
    p.add_argument("--cfg-image", type=scale, help="guidance scale s_I (the model's, otherwise 1.5)")
    p.add_argument("--clip", default="openai/clip-vit-base-patch32", help="directory or hub id (%(default)s)")
    p.add_argument("--dino", default="facebook/dino-vits16", help="directory or hub id (%(default)s)")

    p = commands.add_parser("curve", help="direction and image similarity on InstructPix2Pix's test split")
    p.set_defaults(run=curve)
    p.add_argument("--steps", type=steps, default=100, help="(%(default)s)")
    p.add_argument("--cfg-text", type=scale, default=7.5, help="guidance scale s_T (%(default)s)")
    p.add_argument("--cfg-image", type=scale, nargs="+", default=SCALES, help="scales s_I, a point each (1.0 ... 2.2)")
    p.add_argument("--clip", default="openai/clip-vit-large-patch14", help="directory or hub id (%(default)s)")

    for name, p in commands.choices.items():   # what they share
        p.add_argument("data", type=normal_path, help="the directory of the data set")
        p.add_argument("--models", nargs="+", default=[], type=normal_path, help="directories or hub ids")
        p.add_argument("--outputs", nargs="+", type=Path, default=[], help="folders of other editors' images")
        p.add_argument("--output", type=Path, default=Path("outputs") / name,
                       help="of edits, table and picture (%(default)s)")
        p.add_argument("--limit", type=positive_int, help="only the first sessions or samples")
        p.add_argument("--resolution", type=number(int, 16, 2048),
                       help="of the longer side during the edit (the model's, otherwise 512)")
        p.add_argument("--batch-size", type=positive_int, default=8, help="images at once (%(default)s)")
        p.add_argument("--seed", type=seed_int, default=0,
                       help="of the noise, the same for every edit, and of the curve's samples (%(default)s)")
        p.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
        p.add_argument("--precision", choices=DTYPES, help="(fp16 on CUDA, otherwise fp32)")
    return main


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    with errors(p, "choose a smaller --batch-size or --resolution"):
        if not args.models + args.outputs:
            raise ValueError("there is nothing to judge: give --models, --outputs, or both")
        args.precision = args.precision or ("fp16" if args.device.startswith("cuda") else "fp32")
        with claimed(args.output):
            args.run(args)


if __name__ == "__main__":
    main()
