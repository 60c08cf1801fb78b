"""Training samples: an image, its caption, and the texts of an edit (table 1 of the paper), from disk or the toy world.

    photos                       a folder of images and metadata.jsonl, one image a line:
        {"image": "boat.jpg", "caption": "a boat on a lake", "instruction": "add mountains",
         "edited_caption": "a boat on a lake with mountains", "reverse_instruction": "remove the mountains"}
    "cc3m/{00000..00331}.tar"    webdataset shards as img2dataset writes them: KEY.jpg, KEY.txt (the caption), KEY.json
    clip-filtered-dataset        InstructPix2Pix's own: seeds.json, DIRECTORY/prompt.json, DIRECTORY/SEED_0.jpg, SEED_1.jpg
    toy                          the toy world

A side file has texts that these lack, one JSON object a line, whose "key" is a folder's "key", a shard's KEY or a DIRECTORY.
NAMES says what else the fields may be called.  An image may have several edits, in several lines of the side file or as
"edits": [{"instruction": ..., ...}, ...]; each time it is drawn, so is one of them.

    python data.py photos        # prints samples a second
"""
import itertools
import json
import random
import re
import sys
import tarfile
import time
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy
from cli import Parser, positive_int
from pictures import load_image

NAMES = {"key": ("key",), "image": ("I_input", "file_name", "image"), "edited_image": ("edited_image",),
         "caption": ("T_input", "original_prompt", "input", "text", "caption"),
         "instruction": ("C_f", "edit_prompt", "edit", "instruction"),
         "edited_caption": ("T_edit", "edited_prompt", "output", "edited_caption"),
         "reverse_instruction": ("C_r", "reverse_instruction")}
TEXTS = ("caption", "instruction", "edited_caption", "reverse_instruction")
LONGEST = 10_000                                              # bytes of a text
LARGEST = 2 ** 26                                             # bytes that are read of a shard's member
BUFFER = 1000                                                 # samples of shards that are shuffled together
IMAGES = ("jpg", "jpeg", "png", "webp")                       # of a shard, whose other members may be of any kind


@dataclass
class Batch:
    """B samples: images (B, 3, H, W), lists of B texts, "" where the baseline does without, its edited images or None."""
    images: torch.Tensor                                      # I_input
    captions: list                                            # T_input
    instructions: list                                        # C_f
    edited_captions: list                                     # T_edit
    reverse_instructions: list                                # C_r
    edited_images: torch.Tensor = None

    def to(self, device):
        edited = self.edited_images
        return Batch(self.images.to(device), self.captions, self.instructions, self.edited_captions,
                     self.reverse_instructions, None if edited is None else edited.to(device))


# ---- texts ---------------------------------------------------------------------------------------------------------------

def parse_json(text):
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return row


def key_and_kind(name):
    """Of a file in a shard, as webdataset has it: its name up to the first dot of the last part, and what is behind the dot."""
    key = re.sub(r"\.[^/]*$", "", name)
    return key, name[len(key) + 1:].lower()


def fields(row):
    """The texts of a JSON object that have one of NAMES, of several the last."""
    found = {name: row[alias] for name, aliases in NAMES.items() for alias in aliases
             if isinstance(row.get(alias), str) and row[alias].strip()}
    if any(len(text.encode()) > LONGEST for text in found.values()):
        raise ValueError(f"a text of more than {LONGEST:,} bytes")
    return found


def read_edits(row, more, needed):
    """The edits that a JSON object describes: its own fields, those of one of its "edits", and those of one of `more`."""
    edits = row.get("edits") or [{}]
    if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        raise ValueError("its edits are no list of JSON objects")
    edits = [fields(row) | fields(edit) | other for edit in edits for other in more]
    if missing := [name for name in needed if any(name not in edit for edit in edits)]:
        raise ValueError(f"no text for {', '.join(missing)}")
    return edits


def read_lines(path, read):
    """[(name of the line, read(its JSON object)), ...] of a JSONL file.  A line for which this is a ValueError is reported
    and skipped; more than 1 % of them are a ValueError that names the first."""
    items, errors = [], []
    with open(path, "rb") as file:
        for i, line in enumerate(file, 1):
            try:
                items.append((f"{path} line {i}", read(parse_json(line))))
            except ValueError as error:
                errors.append(f"{path} line {i}: {error}")
    if not items and not errors:
        raise ValueError(f"{path} is empty")
    if len(errors) > i / 100:
        raise ValueError(f"{errors[0]} ({len(errors)} of {i} lines are broken)")
    for error in errors:
        print(f"skipped {error} ({len(errors)} of {i} lines)", file=sys.stderr)
    return items


def read_texts(path):
    """A side file -> {key: its edits}, all in memory, about 1 GB for a million lines."""
    texts = {}
    for _, edits in read_lines(path, lambda row: read_edits(row, [{}], ["key"])):
        texts.setdefault(edits[0]["key"], []).extend(edits)
    return texts


# ---- images --------------------------------------------------------------------------------------------------------------

def without_border(image, row):
    """Cuts off the white with which img2dataset makes images square (resize_mode 'border', its default), because
    reconstruction would learn it.  `row` is the sample's .json, without whose original shape nothing is cut."""
    width, height, side = row.get("original_width"), row.get("original_height"), image.shape[1]
    if side != image.shape[2] or width == height or not all(isinstance(x, int) and x > 0 for x in (width, height)):
        return image
    if width < height:
        return without_border(image.transpose(1, 2), {"original_width": height, "original_height": width}).transpose(1, 2)
    border = side * (1 - height / width) / 2                  # at top and bottom
    outside = image[:, [*range(int(border / 2)), *range(side - int(border / 2), side)]]
    cut = min(int(border) + 2, (side - 1) // 2)
    # where it is not white, the image was not padded but cropped to a square
    return image[:, cut:side - cut] if border < 2 or outside.mean() > .8 else image


def transform(images, resolution, may_flip, rng):
    """(n, 3, H, W) -> (n, 3, resolution, resolution), all in the same way: the largest square at a random place, flipped
    half of the time."""
    side = min(images.shape[2:])
    top, left = (rng.randint(0, length - side) for length in images.shape[2:])
    images = images[:, :, top:top + side, left:left + side]
    images = F.interpolate(images, (resolution, resolution), mode="bicubic", antialias=True).clamp(-1, 1)
    return images.flip(-1) if may_flip and rng.random() < .5 else images


# ---- sources -------------------------------------------------------------------------------------------------------------

def shuffled(n, seed, epoch, share):
    """A share, a slice, of range(n) in an order that is a pure function of (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)
    order = torch.randperm(n, generator=generator).tolist()[share]
    if not order:
        raise ValueError(f"{n} samples or shards are too few for {share.step} processes")
    return order


class Source(torch.utils.data.Dataset):
    """Samples for the cycle, or with `pairs` for the supervised baseline.

    `items` say where they are, tuples of a name and more.  A subclass has open(rng, *item) -> one of the item's edits and
    its images, each (3, H, W) in [-1, 1]; ValueError or OSError if it is broken."""

    def __init__(self, items, resolution, seed, pairs):
        self.items, self.resolution, self.seed, self.pairs = items, resolution, seed, pairs
        self.needed = ("instruction",) if pairs else TEXTS

    def order(self, seed, first, share=slice(None)):
        """Endless (epoch, item) from position `first` of a share on."""
        n = len(self.items)
        epoch, first = divmod(first, len(shuffled(n, seed, 0, share)))
        for epoch in itertools.count(epoch):
            yield from ((epoch, self.items[i]) for i in shuffled(n, seed, epoch, share)[first:])
            first = 0

    def load(self, epoch, item):
        """-> the image and, with `pairs`, the edited one (1 or 2, 3, H, W), cut out anew in every epoch; the four texts."""
        rng = random.Random(f"{self.seed} {epoch} {item[0]}")
        edit, images = self.open(rng, *item)
        if len({image.shape for image in images}) > 1:
            raise ValueError("the image and the edited image differ in size")
        texts = [edit.get(name, "") for name in TEXTS]
        says_side = re.search(r"\b(left|right)", " ".join(texts).lower())
        return transform(torch.stack(images), self.resolution, not says_side, rng), texts

    def __getitems__(self, references):
        """Some of `order` -> (their Batch, what is wrong with those that are broken).  Good ones are repeated in the place
        of broken ones; without a good one the Batch is None."""
        samples, errors = [], []
        for reference in references:
            try:
                samples.append(self.load(*reference))
            except (ValueError, OSError) as error:
                errors.append(f"{reference[-1][0]}: {error}")
        if not samples:
            return None, errors
        images, texts = zip(*(samples * len(references))[:len(references)])
        return Batch(torch.stack([i[0] for i in images]), *map(list, zip(*texts)),
                     torch.stack([i[1] for i in images]) if self.pairs else None), errors


class ToyWorld(Source):
    """Edits of the toy world, rendered when asked for; with `pairs`, also the entangled pairs of the baseline."""

    def __init__(self, split, size, seed=0, pairs=False):
        super().__init__(range(size), toy.SIZE, seed, pairs)
        self.split = split

    def load(self, epoch, index):
        edit = toy.edit(self.split, index, self.seed)
        scenes = [edit.scene] + [toy.entangled(edit, random.Random(f"{self.seed} {index}"))] * self.pairs
        return toy.render(scenes), [edit.scene.caption, edit.instruction, edit.edited.caption, edit.reverse_instruction]


class Folder(Source):
    """A folder of images with metadata.jsonl."""

    def __init__(self, path, resolution, seed=0, pairs=False, side={}):
        super().__init__([], resolution, seed, pairs)
        self.path, self.images, listing = Path(path), ("image", *["edited_image"] * pairs), Path(path) / "metadata.jsonl"
        if not listing.is_file():
            raise ValueError(f"{listing} is missing: a data folder holds images and metadata.jsonl, one image a line")
        needed = self.images + self.needed
        self.items = read_lines(listing, lambda row: read_edits(row, side.get(fields(row).get("key"), [{}]), needed))

    def open(self, rng, name, edits):
        edit = rng.choice(edits)
        return edit, [load_image(self.path / edit[key]) for key in self.images]


class InstructPix2Pix(Source):
    """InstructPix2Pix's data as it is on disk: .9 of the directories for training, the next .05 for validation, the others
    for the test.  Each time a directory is drawn, so is one of its seeds.  It has no reverse instructions: the cycle uses
    those that `side` names."""
    SPLITS = {"train": (0, .9), "validation": (.9, .9 + .05), "test": (.9 + .05, 1)}

    def __init__(self, path, split, resolution, seed=0, pairs=False, side={}):
        listing = Path(path) / "seeds.json"
        try:
            rows = json.loads(listing.read_bytes())
            begin, end = (int(part * len(rows)) for part in self.SPLITS[split])
            items = [(Path(path) / name, list(seeds), side.get(name, [{}])) for name, seeds in rows[begin:end]
                     if pairs or name in side]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{listing} is no JSON list of [directory, [seeds]]") from None
        if not items:
            raise ValueError(f"{listing} has no directory for {split}" + " of which the side file (--texts) has the reverse "
                             "instruction, which the cycle needs" * (not pairs))
        super().__init__(items, resolution, seed, pairs)

    def open(self, rng, path, seeds, more):
        edits = read_edits(parse_json((path / "prompt.json").read_bytes()), more, self.needed)
        if not seeds:
            raise ValueError("seeds.json names no pair of it")
        seed = rng.choice(seeds)
        return rng.choice(edits), [load_image(path / f"{seed}_{i}.jpg") for i in range(1 + self.pairs)]


def expand(pattern):
    """The paths that a pattern like cc3m/*.tar, or a range like cc3m/{00000..00331}.tar, stands for; a plain path itself."""
    patterns = [pattern]
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = range(int(braces[1]), int(braces[2]) + 1)
        patterns = [pattern.replace(braces[0], str(n).zfill(len(braces[1]))) for n in numbers]
    return [path for p in patterns for path in sorted(glob(p)) or [p]]


class Shards(Source):
    """Tar files named by a path, a pattern, or a range {00000..00331}; with a side file, those of the samples that it names.

    They are read from beginning to end and never extracted; what they call their members are keys, never paths.  The workers
    only decode what is read here, so the order does not depend on their number."""

    def __init__(self, pattern, resolution, seed=0, pairs=False, side={}):
        if pairs:
            raise ValueError(f"{pattern}: shards have no edited images, which the supervised baseline needs")
        super().__init__(expand(pattern), resolution, seed, pairs)
        self.pattern, self.side = pattern, side
        if missing := [shard for shard in self.items if not Path(shard).is_file()]:
            raise ValueError(f"{missing[0]}: there is no such shard")

    def order(self, seed, first, share=slice(None)):
        """As of every source; of what lies before `first`, only headers are read."""
        for epoch in itertools.count():
            shards = [self.items[i] for i in shuffled(len(self.items), seed, epoch, share)]
            samples, rng, empty = self.samples(shards, first // BUFFER * BUFFER), random.Random(f"{seed} {epoch}"), True
            while block := list(itertools.islice(samples, BUFFER)):
                rng.shuffle(block)
                yield from ((epoch, item) for item in block[first:])
                first, empty = max(first - len(block), 0), False
            if empty:
                raise ValueError(f"{self.pattern} has no image" + " that the side file names" * bool(self.side))

    def samples(self, shards, start):
        """(name, {kind: bytes} or what is wrong, edits of the side file) for each sample; None for the first `start`."""
        count = itertools.count()
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as tar:
                    members = (member for member in tar if member.isreg())
                    for key, group in itertools.groupby(members, lambda member: key_and_kind(member.name)[0]):
                        group = {key_and_kind(member.name)[1]: member for member in group}
                        if group.keys().isdisjoint(IMAGES) or self.side and key not in self.side:
                            continue
                        if next(count) < start:
                            yield None
                        else:
                            kinds = group.keys() & {*IMAGES, "txt", "json"}
                            files = {kind: tar.extractfile(group[kind]).read(LARGEST) for kind in kinds}
                            yield f"{shard} {key!r}", files, self.side.get(key, [{}])
                    tar.fileobj.seek(tar.offset)
                    if tar.fileobj.read(512) != bytes(512):   # tarfile takes a damaged header for the end
                        raise tarfile.ReadError("unexpected end of data")
            except Exception as error:                        # on damaged archives, tarfile raises all sorts
                yield None if next(count) < start else (shard, str(error), None)

    def open(self, rng, name, files, more):
        if isinstance(files, str):
            raise ValueError(files)
        row = parse_json(files.get("json", b"{}"))
        edits = read_edits({"text": files.get("txt", b"").decode(errors="replace")} | row, more, self.needed)
        kind = next(kind for kind in IMAGES if kind in files)
        return rng.choice(edits), [without_border(load_image(f"its .{kind}", files[kind]), row)]


class Mix(Source):
    """Samples of several sources, in the proportions of their weights."""

    def __init__(self, sources, weights):
        self.sources, self.weights, self.pairs = sources, weights, sources[0].pairs

    def order(self, seed, first, share=slice(None)):
        rng, places = random.Random(seed), range(len(self.sources))
        drawn = rng.choices(places, self.weights, k=first)
        orders = [source.order(seed, drawn.count(i), share) for i, source in enumerate(self.sources)]
        while True:
            i, = rng.choices(places, self.weights)
            yield i, *next(orders[i])

    def load(self, i, epoch, item):
        return self.sources[i].load(epoch, item)


def open_source(path, split, resolution, seed=0, pairs=False, side={}):
    """The source at `path`, one of those in this file's first lines; `side` as from read_texts."""
    if path == "toy":
        return ToyWorld(split, 1_000_000 if split == "train" else 64, seed, pairs)
    if path.endswith(".tar"):
        return Shards(path, resolution, seed, pairs, side)
    if (Path(path) / "seeds.json").is_file():
        return InstructPix2Pix(path, split, resolution, seed, pairs, side)
    return Folder(path, resolution, seed, pairs, side)


def batches(source, batch_size, seed, first=0, workers=0, share=slice(None)):
    """Endless batches from batch number `first` on, in the source's order, a pure function of (seed, epoch), so that a run
    that starts again at batch n sees what it would have seen.  share: of several processes, one's samples or shards.

    A broken sample is reported and skipped; more than 1 % of them, if more than ten, are a ValueError."""
    order = source.order(seed, first * batch_size, share)
    references = iter(lambda: list(itertools.islice(order, batch_size)), [])
    loader = torch.utils.data.DataLoader(source, batch_sampler=references, collate_fn=tuple, num_workers=workers)
    seen = broken = owed = 0
    for batch, errors in loader:
        seen, broken = seen + batch_size, broken + len(errors)
        for error in errors:
            tqdm.write(f"skipped {error} ({broken} of {seen} samples so far)", file=sys.stderr)
        if broken > max(10, seen / 100):
            raise ValueError(f"{broken} of {seen} samples are broken; the last is {error}")
        owed += 1
        if batch:                                             # which replaces those before it that are broken as a whole
            yield from [batch] * owed
            owed = 0


def main():
    p = Parser("data.py", description="Prints how many samples a second a source gives on one core.")
    p.add_argument("source", help="as train.py's --data")
    p.add_argument("--texts", help="its side file")
    p.add_argument("--resolution", type=positive_int, default=256)
    args = p.parse_args()
    torch.set_num_threads(1)
    try:
        source = open_source(args.source, "train", args.resolution, side=read_texts(args.texts) if args.texts else {})
        loader, started, count = batches(source, 8, seed=0), time.time(), 0
        while time.time() < started + 10:
            count += len(next(loader).images)
    except (ValueError, OSError) as error:
        p.error(str(error))
    print(f"{count / (time.time() - started):.0f} samples/s at {args.resolution}x{args.resolution}")


if __name__ == "__main__":
    main()
