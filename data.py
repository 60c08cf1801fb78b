"""Training samples: an image, its caption, and the texts of an edit (table 1 of the paper), from disk or the toy world.

A folder holds images and metadata.jsonl, one edit a line:
    {"image": "boat.jpg", "caption": "a boat on a lake", "instruction": "add mountains",
     "edited_caption": "a boat on a lake with mountains", "reverse_instruction": "remove the mountains"}
The supervised baseline needs "edited_image" as well.  Images are (3, H, W) in [-1, 1].
"""
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import toy
from pictures import load_image

TEXTS = ("caption", "instruction", "edited_caption", "reverse_instruction")


@dataclass
class Batch:
    """B samples: images (B, 3, H, W), lists of B texts, and the edited images for the supervised baseline, or None."""
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


class ToyWorld(torch.utils.data.Dataset):
    """Edits of the toy world, rendered when asked for; with `pairs`, also the entangled pairs of the baseline."""

    def __init__(self, split, size, seed=0, pairs=False):
        self.split, self.size, self.seed, self.pairs = split, size, seed, pairs

    def __len__(self):
        return self.size

    def __getitems__(self, indices):
        indices = [i % self.size for i in indices]
        edits = [toy.edit(self.split, i, self.seed) for i in indices]
        pairs = [toy.entangled(e, random.Random(f"{self.seed} {i}")) for e, i in zip(edits, indices)] if self.pairs else []
        return Batch(toy.render([e.scene for e in edits]), [e.scene.caption for e in edits], [e.instruction for e in edits],
                     [e.edited.caption for e in edits], [e.reverse_instruction for e in edits],
                     toy.render(pairs) if self.pairs else None)


class Folder(torch.utils.data.Dataset):
    """A folder of images with metadata.jsonl.  Images are resized by the short side and cropped to a square at random,
    and flipped half of the time, the same for both images of a pair; not where a text says left or right."""

    def __init__(self, path, resolution, seed=0, pairs=False):
        self.path, self.resolution, self.seed, self.pairs = Path(path), resolution, seed, pairs
        listing = self.path / "metadata.jsonl"
        if not listing.is_file():
            raise ValueError(f"{listing} is missing: a data folder holds images and metadata.jsonl, one edit a line")
        needed, self.rows = ("image", *TEXTS, *["edited_image"] * pairs), []
        text = listing.read_text(encoding="utf-8").rstrip("\n")
        for number, line in enumerate(text.split("\n") if text else [], 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{listing} line {number} is not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{listing} line {number} is no JSON object")
            missing = [key for key in needed if not isinstance(row.get(key), str) or not row[key].strip()]
            if missing:
                raise ValueError(f"{listing} line {number} has no text for {', '.join(missing)}")
            self.rows.append(row)
        if not self.rows:
            raise ValueError(f"{listing} is empty")

    def __len__(self):
        return len(self.rows)

    def transform(self, image, row, rng):
        scale = self.resolution / min(image.shape[1:])
        size = [max(self.resolution, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)
        top, left = (rng.randint(0, side - self.resolution) for side in size)
        image = image[:, top:top + self.resolution, left:left + self.resolution]
        says_side = re.search(r"\b(left|right)", " ".join(row[t] for t in TEXTS).lower())
        return image.flip(-1) if rng.random() < .5 and not says_side else image

    def __getitems__(self, indices):
        rows, keys, stacks = [self.rows[i % len(self)] for i in indices], ["image", *["edited_image"] * self.pairs], []
        for row, i in zip(rows, indices):
            images = [load_image(self.path / row[key]) for key in keys]                   # (3, H, W) each
            if len({image.shape for image in images}) > 1:
                raise ValueError(f"{self.path}: {row['image']} and {row['edited_image']} differ in size")
            # a pair draws the same numbers, hence the same crop and flip
            stacks.append([self.transform(image, row, random.Random(f"{self.seed} {i}")) for image in images])
        return Batch(torch.stack([s[0] for s in stacks]), *[[row[key] for row in rows] for key in TEXTS],
                     torch.stack([s[1] for s in stacks]) if self.pairs else None)


def batches(dataset, batch_size, seed, first=0, workers=0):
    """Endless batches from batch number `first` on: a shuffle for each epoch, a pure function of (seed, epoch), so that a
    run that starts again at batch n sees what it would have seen.  An index is epoch * len(dataset) + sample: a dataset may
    crop and flip anew in every epoch."""
    def indices():
        position, order = first * batch_size, None
        while True:
            batch = []
            while len(batch) < batch_size:
                epoch, i = divmod(position, len(dataset))
                if order is None or i == 0:
                    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)).tolist()
                batch.append(epoch * len(dataset) + order[i])
                position += 1
            yield batch
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=indices(), collate_fn=lambda batch: batch,
                                            num_workers=workers))
