"""The published protocols: which images are edited, with what their edits are compared and how, and what the papers report.

    MagicBrush's test    images/ID/{ID-input.png, ID-output1.png, ...}, edit_turns.json, edit_sessions.json,
                         global_descriptions.json, local_descriptions.json (or local_captions.json)
    an editor's folder   ID/ID_1.png the first turn; from the second on ID/ID_inde_N.png, made from the true input, and
                         ID/ID_iter_N.png, made from the editor's own last output: the names of MagicBrush's own scripts
    InstructPix2Pix's    the last .05 of seeds.json, see data.py
    an editor's folder   one folder for each point of the curve, of any name, with DIRECTORY_SEED.png
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import ViTModel

from data import TEXTS, InstructPix2Pix, parse_json, read_edits
from pictures import load_image

METRICS = ("L1", "L2", "CLIP-I", "DINO", "CLIP-T global", "CLIP-T local")
SCALES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)                  # s_I of the curve, at s_T = 7.5

# UIP2P's tables.  It does not say which captions its CLIP-T takes; as its own exceed what the true edits have with the local
# ones, these are probably the global ones
PUBLISHED = {
    "single-turn": {"HIVE": (.1092, .0341, .8519, .7500, .2752), "IP2P": (.1122, .0371, .8524, .7428, .2764),
                    "UIP2P, IP2P data": (.0722, .0193, .9243, .8876, .2944),
                    "UIP2P, CC3M": (.0680, .0183, .9262, .8924, .2966), "UIP2P, CC12M": (.0619, .0174, .9318, .9039, .2964)},
    "multi-turn": {"HIVE": (.1521, .0557, .8004, .6463, .2673), "IP2P": (.1584, .0598, .7924, .6177, .2726),
                   "UIP2P, IP2P data": (.1104, .0358, .8779, .8041, .2892),
                   "UIP2P, CC3M": (.1040, .0337, .8816, .8130, .2909), "UIP2P, CC12M": (.0976, .0323, .8857, .8235, .2901)}}
# (direction, image similarity) at s_I = 2.2 and 1.0, read off UIP2P's figure
PUBLISHED_CURVES = {"IP2P": [(.048, .95), (.151, .80)], "UIP2P, IP2P data": [(.125, .895), (.182, .858)],
                    "UIP2P, CC3M": [(.122, .908), (.176, .862)], "UIP2P, CC12M": [(.094, .933), (.159, .891)]}


# ---- MagicBrush ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Turn:
    """One edit of a session, the number-th from 1: the true input and output, and the output's captions, "" without one."""
    id: str
    number: int
    input: Path
    target: Path
    instruction: str
    captions: tuple                                           # global, local

    def output(self, setting):
        """The name of its output in an editor's folder."""
        kind = {"single-turn": "inde_", "multi-turn": "iter_"}[setting] if self.number > 1 else ""
        return f"{self.id}/{self.id}_{kind}{self.number}.png"


def read_listing(path, kind):
    """A JSON file that holds a `kind`, list or dict, of such entries as MagicBrush's have."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: MagicBrush's test is a folder with images/ and its four JSON files") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{path} holds no JSON {'object' if kind is dict else 'list'}, or an empty one")
    return content


def read_turn(path, listing, id, number, row, captions):
    """A Turn from its row of a listing.  Names are ID-input.png or ID-outputN.png, so that none leads out of images/ID."""
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
        raise ValueError(f"{listing}: turn {number} of {id!r} has no instruction")
    files = []
    for key in ("input", "output"):
        name = row.get(key)
        if not isinstance(name, str) or not re.fullmatch(r"\w+-(input|output\d+)\.png", name) or name.split("-")[0] != id:
            raise ValueError(f"{listing}: the {key} of turn {number} of {id!r} is {name!r}, not ID-input.png or ID-outputN.png")
        files.append(path / "images" / id / name)
        if not files[-1].is_file():
            raise ValueError(f"{files[-1]} is missing, which {listing.name} names")
    found = [texts.get(id, {}).get(row["output"]) for texts in captions]
    return Turn(id, number, *files, row["instruction"], tuple(c.strip() if isinstance(c, str) else "" for c in found))


def read_magicbrush(path):
    """MagicBrush's test -> its sessions, lists of Turn.  All of it is checked: ValueError names the file."""
    path, captions = Path(path), []
    local = "local_captions.json" if (path / "local_captions.json").is_file() else "local_descriptions.json"
    for name in ("global_descriptions.json", local):
        captions.append(read_listing(path / name, dict))
        if not all(isinstance(texts, dict) for texts in captions[-1].values()):
            raise ValueError(f"{path / name} is no {{ID: {{file: caption}}}}")
    listing, sessions = path / "edit_sessions.json", []
    for id, rows in read_listing(listing, dict).items():
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{listing}: {id!r} is no list of turns")
        sessions.append([read_turn(path, listing, id, n, row, captions) for n, row in enumerate(rows, 1)])
    rows = read_listing(path / "edit_turns.json", list)
    listed = sorted(str(row.get("output")) if isinstance(row, dict) else "" for row in rows)
    if listed != sorted(turn.target.name for session in sessions for turn in session):
        raise ValueError(f"{path / 'edit_turns.json'} does not list the turns of {listing.name}")
    return sessions


# ---- InstructPix2Pix -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sample:
    """A sample of InstructPix2Pix's test split, its first seed: the image, and its captions before and after the edit."""
    output: str                                               # its name in the folder of a point of the curve
    input: Path
    instruction: str
    captions: tuple


def read_test_split(path, limit):
    """-> the first `limit` (or all) Samples of InstructPix2Pix's test split, and how many it has."""
    items, samples = InstructPix2Pix(path, "test", 0, pairs=True).items, []
    for folder, seeds, _ in items[:limit]:
        if folder.parent != Path(path) or not seeds or not re.fullmatch(r"\w+", f"{folder.name}_{seeds[0]}"):
            raise ValueError(f"{path}/seeds.json: {folder.name!r} has no seed, or its name is not one of a directory in {path}")
        try:
            edit, = read_edits(parse_json((folder / "prompt.json").read_bytes()), [{}], TEXTS[:3])
        except ValueError as error:
            raise ValueError(f"{folder / 'prompt.json'}: {error}") from None
        image = folder / f"{seeds[0]}_0.jpg"
        if not image.is_file():
            raise ValueError(f"{image} is missing, which seeds.json names")
        samples.append(Sample(f"{folder.name}_{seeds[0]}.png", image, edit["instruction"],
                              (edit["caption"], edit["edited_caption"])))
    return samples, len(items)


# ---- metrics -------------------------------------------------------------------------------------------------------------

def preprocess(image, resize, crop):
    """(3, H, W) in [-1, 1] -> (3, crop, crop) in [-1, 1], as image processors do it: the short side resized to `resize`,
    bicubic, first along the rows and then along the columns, each time in the 256 steps of a file, and the centre cut out."""
    height, width = image.shape[1:]
    new_height, new_width = (side * resize // min(height, width) for side in (height, width))
    for size in ((height, new_width), (new_height, new_width)):
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        image = ((image + 1) * 127.5).round() / 127.5 - 1
    top, left = (new_height - crop) // 2, (new_width - crop) // 2
    return image[:, top:top + crop, left:left + crop]


class Dino:
    """DINO's ViT as image embeddings: the class token, normalised.  Images are resized to 256 and cut to 224."""
    MEAN, STD = (.485, .456, .406), (.229, .224, .225)        # ImageNet's

    def __init__(self, vit):
        self.vit, self.size = vit.eval(), vit.config.image_size

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu"):
        vit, report = ViTModel.from_pretrained(path_or_id, add_pooling_layer=False, use_safetensors=True,
                                               output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{path_or_id} lacks weights: {sorted(report['missing_keys'])[0]}")
        return cls(vit.to(device))

    def embed_images(self, images):
        """List of (3, H, W) in [-1, 1] -> unit vectors (B, D)."""
        shown = torch.stack([preprocess(image, self.size * 256 // 224, self.size) for image in images]).to(self.vit.device)
        mean, std = (torch.tensor(v, device=self.vit.device)[:, None, None] for v in (self.MEAN, self.STD))
        return F.normalize(self.vit((shown / 2 + .5 - mean) / std).last_hidden_state[:, 0], dim=-1)


def clip_embed(clip, images):
    """List of (3, H, W) in [-1, 1] -> unit vectors (B, D) of a ClipScorer, which takes what is of its size as it is.
    InstructPix2Pix's released script gives CLIP images in [-1, 1] instead of [0, 1] before its normalisation; not here."""
    return clip.embed_images(torch.stack([preprocess(image, clip.size, clip.size) for image in images]).to(clip.clip.device))


def load_judge(kind, path_or_id, device):
    """A ClipScorer or Dino."""
    try:
        return kind.from_pretrained(path_or_id, device)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path_or_id} cannot be loaded by {kind.__name__}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def compare(outputs, targets, captions, clip, dino):
    """MagicBrush's metrics of B pairs of images (3, H, W) in [-1, 1] with the targets' captions -> B dicts of METRICS.

    L1 and L2 are of images in [0, 1], the output resized to the target's size; L2 has no root.  CLIP-T is None where there
    is no caption."""
    E_output, E_target = clip_embed(clip, outputs), clip_embed(clip, targets)
    dinos = (dino.embed_images(outputs) * dino.embed_images(targets)).sum(1)
    rows = []
    for output, target, texts, E_o, E_t, d in zip(outputs, targets, captions, E_output, E_target, dinos):
        resized = F.interpolate(output[None], target.shape[1:], mode="bicubic", antialias=True)[0].clamp(-1, 1)
        error = (resized - target).abs() / 2
        matches = [(E_o @ clip.embed_texts([text])[0]).item() if text else None for text in texts]
        values = error.mean().item(), error.square().mean().item(), (E_o @ E_t).item(), d.item(), *matches
        rows.append(dict(zip(METRICS, values)))
    return rows


@torch.no_grad()
def directions(inputs, outputs, captions, clip):
    """The curve's two numbers of B edits, images (3, H, W) in [-1, 1], captions (before, after) -> B dicts:
    direction = cos(E_I1 - E_I0, E_T1 - E_T0), image = cos(E_I0, E_I1)."""
    E_I0, E_I1 = clip_embed(clip, inputs), clip_embed(clip, outputs)
    E_T0, E_T1 = (clip.embed_texts(list(texts)) for texts in zip(*captions))
    direction, image = cosine_similarity(E_I1 - E_I0, E_T1 - E_T0), (E_I0 * E_I1).sum(1)
    return [{"direction": d, "image": i} for d, i in zip(direction.tolist(), image.tolist())]


def score(jobs, batch_size, function):
    """The rows of `compare` or `directions`, as function(images, ..., texts), for jobs (path, ..., texts), batch by batch."""
    rows = []
    for first in tqdm(range(0, len(jobs), batch_size), f"scores of {batch_size} images"):
        *paths, texts = zip(*jobs[first:first + batch_size])
        rows += function(*[[load_image(path) for path in column] for column in paths], texts)
    return rows


def mean(rows, name):
    """The mean of what the rows have under a name, without those that have None."""
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else float("nan")
