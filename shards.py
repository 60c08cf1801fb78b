"""Sources of large data sets, and `open_data`, which finds out what the arguments name.

    toy, toy:colour             the toy world, all its edits or those of one kind
    "cc3m/{00000..00331}.tar"   shards of img2dataset: KEY.jpg, KEY.txt (the caption), KEY.json
    clip-filtered-dataset       InstructPix2Pix's tree: seeds.json, DIR/prompt.json, DIR/SEED_0.jpg

A side file (--texts) adds texts: a JSON object a line, whose "key" is KEY, DIR or a folder's "key".
"""
import itertools
import json
import random
import re
import tarfile
from glob import glob
from pathlib import Path

import toy
from cli import check_readable, named_float
from data import Folder, Source, ToyWorld, parse_json, read_edits, read_json, read_lines
from pictures import load_image

LARGEST = 2 ** 26                              # bytes that are read of a member of a shard
MOST_SHARDS = 100_000                          # of a range
IMAGES = ("jpg", "jpeg", "png", "webp")        # of a shard; its other members may be of any kind


def is_toy(sources):
    """Whether --data names nothing but the toy world."""
    return all(re.split("[:=]", source)[0] == "toy" for source in sources)

def open_source(path, split, resolution, seed=0, pairs=False, side={}):
    """The source that is at `path`.  side: the texts of a side file, as `read_texts` gives them."""
    name, _, kind = path.partition(":")
    if name == "toy":
        if path != "toy" and kind not in toy.KINDS:
            raise ValueError(f"{path}: the kinds of edits are {', '.join(toy.KINDS)}")
        return ToyWorld(split, 1_000_000 if split == "train" else 64, seed, pairs, kind)
    if re.search(r"\.(tar\.\w+|tgz)$", path):
        raise ValueError(f"{path}: unpack compressed shards to .tar, for instance by gunzip")
    if path.endswith(".tar"):
        return Shards(path, resolution, seed, pairs, side)
    if (Path(path) / "seeds.json").is_file():
        return InstructPix2Pix(path, split, resolution, seed, pairs, side)
    return Folder(path, resolution, seed, pairs, side)

def open_data(args):
    """The training and the validation data that the arguments of train.py name."""
    if args.texts and is_toy(args.data):
        raise ValueError("--texts has no effect with --data toy")
    if any(is_toy([source]) for source in args.data) and args.resolution != toy.SIZE:
        raise ValueError(f"--data toy has images of --resolution {toy.SIZE}")
    side = read_texts(args.texts) if args.texts else {}
    pairs = args.objective == "ip2p"

    def open_mix(sources, split):
        named = [named_float(source) if "=" in source else (source, 1.0) for source in sources]
        if not all(weight for _, weight in named):
            raise ValueError(f"--data {' '.join(sources)}: a weight must be more than 0")
        return Mix([open_source(path, split, args.resolution, args.seed, pairs, side)
                    for path, _ in named], [weight for _, weight in named])
    validation = open_mix([args.validation] if args.validation else args.data, "validation")
    if not args.validation and any(isinstance(s, (Folder, Shards)) for s in validation.sources):
        print("validation on the training data, which has no split of its own: see --validation")
    return open_mix(args.data, "train"), validation

def read_texts(path):
    """A side file -> {key: its edits}, all in memory, about 1 GB for a million lines."""
    texts = {}
    for _, edits in read_lines(path, lambda row: read_edits(row, [{}], ["key"])):
        texts.setdefault(edits[0]["key"], []).extend(edits)
    return texts


class Mix(Source):
    """Samples of several sources, in the proportions of their weights."""
    def __init__(self, sources, weights):
        self.sources, self.weights, self.pairs = sources, weights, sources[0].pairs

    def order(self, seed, first, share=slice(None)):
        rng, places = random.Random(seed), range(len(self.sources))
        drawn = rng.choices(places, self.weights, k=first)
        orders = [s.order(seed, drawn.count(i), share) for i, s in enumerate(self.sources)]
        while True:
            i, = rng.choices(places, self.weights)
            yield i, *next(orders[i])

    def load(self, i, epoch, item):
        return self.sources[i].load(epoch, item)


class InstructPix2Pix(Source):
    """InstructPix2Pix's data as it is on disk.  Each time a directory is drawn, so is one of its
    seeds.  It has no reverse instructions: the cycle uses the directories that `side` names.
    Directories that are not there are counted and left out: the published seeds.json names
    thousands that are in no archive.  named: the number of all that it names."""
    SPLITS = {"train": (0, 0.9), "validation": (0.9, 0.9 + 0.05), "test": (0.9 + 0.05, 1),
              "all": (0, 1)}

    def __init__(self, path, split, resolution, seed=0, pairs=False, side={}):
        listing = Path(path) / "seeds.json"
        check_readable(listing)
        try:
            rows = json.loads(listing.read_bytes())
            begin, end = [int(part * len(rows)) for part in self.SPLITS[split]]
            named = [(Path(path) / name, list(seeds), side.get(name, [{}]))
                     for name, seeds in rows[begin:end] if pairs or name in side]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{listing} is no JSON list of [directory, [seeds]]") from None
        missing = {item[0] for item in named if not item[0].is_dir()}
        items = [item for item in named if item[0] not in missing]
        self.named = len(named)
        if missing:
            print(f"{listing}, {split}: {len(missing)} of {len(named)} directories are not there "
                  f"and left out, the first is {min(missing)}; is all unpacked?")
        if not items:
            needs = "" if pairs else " of which the side file (--texts) has a reverse instruction"
            raise ValueError(f"{listing} has no directory for {split}{needs}")
        super().__init__(items, resolution, seed, pairs)

    def open(self, rng, path, seeds, more):
        edits = read_edits(read_json(path / "prompt.json"), more, self.needed)
        if not seeds:
            raise ValueError("seeds.json names no pair of it")
        seed = rng.choice(seeds)
        names = [f"{seed}_{i}.jpg" for i in range(2 if self.pairs else 1)]
        return rng.choice(edits), [load_image(path / name) for name in names]


# ---- webdataset shards ------------------------------------------------------------------------

def expand(pattern):
    """The paths of a pattern like cc3m/*.tar, or of a range like cc3m/{00000..00331}.tar."""
    patterns, braces = [pattern], re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces:
        first, last = braces.groups()
        if not 0 <= int(last) - int(first) < MOST_SHARDS:
            raise ValueError(f"{pattern}: a range has from 1 to {MOST_SHARDS:,} numbers")
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        patterns = [pattern.replace(braces[0], number) for number in numbers]
    return [path for p in patterns for path in sorted(glob(p)) or [p]]

def read_headers(shard):
    """The samples of a tar file, {key: {kind: (offset, bytes)}}, and what is wrong with it or "".
    A name is KEY.KIND, KEY without a dot in its last part.  The files of a sample may stand
    anywhere.  Of files of one name, the last counts, as for tar.  Hidden ones do not: macOS packs
    ._NAME beside each NAME."""
    samples = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key = re.sub(r"\.[^/]*$", "", member.name)
                if member.isreg() and not Path(member.name).name.startswith("."):
                    kind = member.name[len(key) + 1:].lower()
                    place = member.offset_data, min(member.size, LARGEST)
                    samples.setdefault(key, {})[kind] = place
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):    # tarfile takes a damaged header for the end
                raise tarfile.ReadError("unexpected end of data")
    except Exception as error:                 # on damaged archives, tarfile raises many kinds
        return samples, str(error) or repr(error)
    return samples, ""

def read_member(shard, offset, size):
    with open(shard, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ValueError("unexpected end of data")
    return content


class Shards(Source):
    """Tar files, which are never extracted; with a side file, the samples that it names.  Workers
    read and decode samples: the order does not depend on their number."""
    def __init__(self, pattern, resolution, seed=0, pairs=False, side={}):
        if pairs:
            raise ValueError(f"{pattern}: shards have no edited images, as the baseline needs")
        super().__init__(expand(pattern), resolution, seed, pairs)
        self.pattern, self.side = pattern, side
        for shard in self.items:
            if not Path(shard).is_file():
                raise ValueError(f"{shard}: there is no such shard")

    def order(self, seed, first, share=slice(None)):
        """The shards, and then the samples of each, in an order that depends on seed and epoch.
        Only headers are read."""
        for epoch in itertools.count():
            rng = random.Random(f"{seed} {epoch}")
            total = 0
            for i in self.shuffled(seed, epoch, share):
                samples = self.samples(self.items[i])
                rng.shuffle(samples)
                yield from ((epoch, item) for item in samples[first:])
                first = max(first - len(samples), 0)
                total += len(samples)
            if not total:
                what = "image that the side file names" if self.side else "image"
                raise ValueError(f"{self.pattern} has no {what} ({', '.join(IMAGES)})")

    def samples(self, shard):
        """[(name, shard, places in it, edits by the side file), ...] of the samples that have an
        image; if the shard is damaged, the last is (name, shard, what is wrong, [])."""
        samples, problem = read_headers(shard)
        items = [(f"{shard} {key!r}", shard, places, self.side.get(key, [{}]))
                 for key, places in samples.items()
                 if not places.keys().isdisjoint(IMAGES) and (not self.side or key in self.side)]
        if problem:
            items.append((shard, shard, problem, []))
        return items

    def open(self, rng, name, shard, places, more):
        if isinstance(places, str):
            raise ValueError(places)
        kind = next(kind for kind in IMAGES if kind in places)
        files = {k: read_member(shard, *places[k]) for k in (kind, "txt", "json") if k in places}
        row = parse_json(files.get("json", b"{}"))
        caption = files.get("txt", b"").decode("utf-8-sig", errors="replace")
        edits = read_edits({"text": caption} | row, more, self.needed)
        return rng.choice(edits), [without_border(load_image(f"its .{kind}", files[kind]), row)]


def without_border(image, row):
    """Cuts off the white with which img2dataset makes images square, because the reconstruction
    would learn it.  row: the sample's .json, which has the original shape."""
    width, height = row.get("original_width"), row.get("original_height")
    known = all(isinstance(length, int) and length > 0 for length in (width, height))
    side = image.shape[1]
    if not known or width == height or side != image.shape[2]:
        return image
    dim = 1 if width > height else 2
    turned = image.transpose(1, dim)                   # the white is at the top and at the bottom
    border = side * (1 - min(width, height) / max(width, height)) / 2
    rows = [*range(int(border / 2)), *range(side - int(border / 2), side)]
    if border >= 2 and turned[:, rows].mean() <= 0.8:  # it was cropped, not padded
        return image
    cut = min(int(border) + 2, (side - 1) // 2)
    return turned[:, cut:side - cut].transpose(1, dim)
