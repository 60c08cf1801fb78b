"""Training samples (table 1 of the paper): a batch, the toy world, a folder; more in shards.py.

A folder holds images and metadata.jsonl, a JSON object a line; NAMES has other names of the fields:

    {"image": "boat.jpg", "caption": "a boat on a lake", "instruction": "add mountains",
     "edited_caption": "a boat on a lake with mountains", "reverse_instruction": "remove them"}

An image may have several edits, in "edits", a list of such objects: one is drawn each time.
The image may lie outside of the folder: "../boat.jpg" and "/photos/boat.jpg" are read, too.
"""
import codecs
import itertools
import json
import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy
from cli import about, check_readable
from pictures import load_image

NAMES = {"key": ("key",), "image": ("I_input", "file_name", "image"),
         "edited_image": ("edited_image",), "reverse_instruction": ("C_r", "reverse_instruction"),
         "caption": ("T_input", "original_prompt", "input", "text", "caption"),
         "instruction": ("C_f", "edit_prompt", "edit", "instruction"),
         "edited_caption": ("T_edit", "edited_prompt", "output", "edited_caption")}
TEXTS = ("caption", "instruction", "edited_caption", "reverse_instruction")
LONGEST_TEXT, LONGEST_LINE = 10_000, 2 ** 24   # bytes


@dataclass
class Batch:
    """B samples.  The supervised baseline has edited images, and "" for texts that it lacks."""
    images: torch.Tensor                       # I_input (B, 3, H, W) in [-1, 1]
    captions: list                             # T_input, B strings
    instructions: list                         # C_f
    edited_captions: list                      # T_edit
    reverse_instructions: list                 # C_r
    edited_images: torch.Tensor = None         # (B, 3, H, W), or None

    def to(self, device):
        edited = None if self.edited_images is None else self.edited_images.to(device)
        return replace(self, images=self.images.to(device), edited_images=edited)


# ---- texts ------------------------------------------------------------------------------------

def parse_json(text):
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return row

def read_json(path):
    """The JSON object in a file, as a dict.  ValueError, in one line, which names the file."""
    check_readable(path)
    with about(path):
        return parse_json(path.read_bytes())

def fields(row):
    """The texts of a JSON object that have one of NAMES; if there are several, the last."""
    found = {name: row[alias] for name, aliases in NAMES.items() for alias in aliases
             if isinstance(row.get(alias), str) and row[alias].strip()}
    if any(len(text.encode()) > LONGEST_TEXT for text in found.values()):
        raise ValueError(f"a text of more than {LONGEST_TEXT:,} bytes")
    return found

def read_edits(row, more, needed):
    """The edits of a JSON object, dicts of texts: its own fields, joined with those of each of its
    "edits" and of each of `more` (from a side file).  ValueError if one of `needed` is missing."""
    edits = row.get("edits") or [{}]
    if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        raise ValueError("its edits are no list of JSON objects")
    edits = [fields(row) | fields(edit) | other for edit in edits for other in more]
    for name in needed:
        if any(name not in edit for edit in edits):
            raise ValueError(f"no text for {' or '.join(NAMES[name][::-1])}")
    return edits

def read_entries(entries, read):
    """[(name, read(entry)), ...] of the entries of a file, pairs of a name and what `read` takes.
    An entry for which this is a ValueError or an OSError is reported and skipped; more than 1 % are
    a ValueError, which names the first."""
    items, broken = [], []
    for name, entry in entries:
        try:
            items.append((name, read(entry)))
        except (ValueError, OSError) as error:
            broken.append(f"{name}: {error}")
    count = len(items) + len(broken)
    if len(broken) > count / 100:
        raise ValueError(f"{broken[0]} ({len(broken)} of {count} are broken)")
    for error in broken:
        print(f"skipped {error} ({len(broken)} of {count})", file=sys.stderr)
    return items

def text_lines(path):
    """(its name, its bytes) of each line that is not blank, without a byte order mark."""
    check_readable(path)
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise ValueError(f"{path} line {number} has more than {LONGEST_LINE:,} bytes")
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if line:
                yield f"{path} line {number}", line

def read_lines(path, read):
    """The entries of a JSONL file; `read` takes the JSON object of a line."""
    items = read_entries(text_lines(path), lambda line: read(parse_json(line)))
    if not items:
        raise ValueError(f"{path} is empty")
    return items


# ---- sources ----------------------------------------------------------------------------------

class Source(torch.utils.data.Dataset):
    """Samples for the cycle, or with `pairs` for the supervised baseline.

    items: a list of tuples, a name and what else `open` needs to find a sample."""
    def __init__(self, items, resolution, seed, pairs):
        self.items, self.resolution, self.seed, self.pairs = items, resolution, seed, pairs
        self.needed = ("instruction",) if pairs else TEXTS

    def open(self, rng, *item):
        """One edit of an item, a dict of texts, and its images, (3, H, W) in [-1, 1] each.
        ValueError or OSError if the item is broken."""
        raise NotImplementedError

    def shuffled(self, seed, epoch, share):
        """The indices (N,) of the items that `share`, a slice, selects, in an order that depends on
        seed and epoch."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)
        n = len(self.items)
        order = torch.randperm(n, generator=generator).numpy()[share]
        if not len(order):
            raise ValueError(f"{n} samples or shards are too few for {share.step} processes")
        return order

    def order(self, seed, first, share=slice(None)):
        """Endless (epoch, item), from position `first` on.  share: a slice, which selects the
        items of one of several processes."""
        epoch, first = divmod(first, len(self.shuffled(seed, 0, share)))
        for epoch in itertools.count(epoch):
            for i in self.shuffled(seed, epoch, share)[first:]:
                yield epoch, self.items[i]
            first = 0

    def load(self, epoch, item):
        """The image, with `pairs` also the edited one, (1 or 2, 3, H, W), and the four TEXTS.  In
        each epoch, a square is cut out at another place, and flipped half of the time."""
        name = f"{self.seed} {epoch} {item[0]}"
        rng = random.Random(name.encode(errors="surrogateescape"))    # a path may be no UTF-8
        edit, images = self.open(rng, *item)
        if len({image.shape for image in images}) > 1:
            raise ValueError("the image and the edited image differ in size")
        side = min(images[0].shape[1:])
        top, left = [rng.randint(0, length - side) for length in images[0].shape[1:]]
        images = torch.stack(images)[:, :, top:top + side, left:left + side]
        images = F.interpolate(images, self.resolution, mode="bicubic", antialias=True).clamp(-1, 1)
        texts = [edit.get(name, "") for name in TEXTS]
        names_a_side = re.search(r"\b(left|right)", " ".join(texts).lower())
        if not names_a_side and rng.random() < 0.5:
            images = images.flip(-1)
        return images, texts

    def __getitems__(self, references):
        """Some (epoch, item) -> their Batch, and what is wrong with broken ones, in whose places
        good ones are repeated.  Without a good one, the Batch is None."""
        samples, errors = [], []
        for reference in references:
            try:
                samples.append(self.load(*reference))
            except (ValueError, OSError) as error:
                errors.append(f"{reference[-1][0]}: {error}")
        if not samples:
            return None, errors
        images, texts = zip(*(samples * len(references))[:len(references)])
        edited = torch.stack([pair[1] for pair in images]) if self.pairs else None
        return Batch(torch.stack([i[0] for i in images]), *map(list, zip(*texts)), edited), errors


class ToyWorld(Source):
    """Edits of the toy world, rendered when they are asked for; with `pairs`, entangled pairs.
    kind: one of toy.KINDS, or "" for all in turn."""
    def __init__(self, split, size, seed=0, pairs=False, kind=""):
        super().__init__(range(size), toy.SIZE, seed, pairs)
        self.split, self.biases, self.kind = split, toy.BIASES, kind

    def load(self, epoch, index):
        if self.kind:
            index = index * len(toy.KINDS) + toy.KINDS.index(self.kind)
        edit = toy.edit(self.split, index, self.seed)
        scenes = [edit.scene]
        if self.pairs:
            rng = random.Random(f"{self.seed} {index}")
            scenes.append(toy.entangled(edit, rng, self.biases))
        texts = edit.scene.caption, edit.instruction, edit.edited.caption, edit.reverse_instruction
        return toy.render(scenes), texts


class Folder(Source):
    """A folder of images with metadata.jsonl.  side: more texts, {key: edits}, see shards.py."""
    def __init__(self, path, resolution, seed=0, pairs=False, side={}):
        super().__init__([], resolution, seed, pairs)
        self.path, listing = Path(path), Path(path) / "metadata.jsonl"
        self.images = ("image", "edited_image") if pairs else ("image",)
        if not listing.is_file():
            raise ValueError(f"{listing} is missing: it says what is in the images of a folder")
        self.items = read_lines(listing, lambda row: read_edits(
            row, side.get(fields(row).get("key"), [{}]), self.images + self.needed))

    def open(self, rng, name, edits):
        edit = rng.choice(edits)
        return edit, [load_image(self.path / edit[key]) for key in self.images]


def batches(source, batch_size, seed, first=0, workers=0, share=slice(None)):
    """Endless batches from number `first` on: a run that starts again sees what it would have seen.
    share: a slice, of the samples or shards, for one of several processes.  Broken samples are
    reported and skipped; more than 1 % of them, if more than ten, are a ValueError."""
    order = source.order(seed, first * batch_size, share)
    references = iter(lambda: list(itertools.islice(order, batch_size)), [])      # batch by batch
    loader = torch.utils.data.DataLoader(source, batch_sampler=references, collate_fn=tuple,
                                         num_workers=workers)
    seen = broken = owed = 0
    for batch, errors in loader:
        seen, broken = seen + batch_size, broken + len(errors)
        for error in errors:
            tqdm.write(f"skipped {error} ({broken} of {seen} samples so far)", file=sys.stderr)
        if broken > max(10, seen / 100):
            raise ValueError(f"{broken} of {seen} samples are broken; the last is {errors[-1]}")
        owed += 1
        if batch:                              # it replaces batches before it without good samples
            yield from [batch] * owed
            owed = 0
