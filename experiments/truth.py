"""What the truth of the toy world says of edited images: whether they show the true edited scene, how far they are from
it, inside the mask of the edit and outside, and whether the attention maps point there.

A picture is read back as a scene (`read_scenes`), so the strict score asks no network.  evaluate.py and claims.py print
the scores.
"""
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch
from torch.nn.functional import cosine_similarity

import toy
from losses import edit_region


# ---- reading a scene back from its picture ---------------------------------------------------------------------------

SHADES = [-0.12, -0.08, -0.04, 0.0, 0.04, 0.08, 0.12]
FAINTEST = 20                                  # what the smallest, faintest object changes: a sum of squares


@lru_cache(maxsize=1)
def all_backgrounds():
    """Empty scenes, of every background and shade, and their pictures (N, 3, S, S)."""
    scenes = [toy.Scene(name, shade, ()) for name in toy.BACKGROUNDS for shade in product(SHADES, SHADES)]
    return scenes, toy.render(scenes)


@lru_cache(maxsize=1)
def all_objects():
    """M white objects of every shape and size at whole pixels; how far they cover each pixel, (P, M); its square."""
    objects = []
    for radius in (4.5, 5.25, 6.0, 6.75, 7.5):
        places = range(int(radius), toy.SIZE - int(radius) + 1)
        objects += [toy.Object((255, 255, 255), *rest, radius) for rest in product(toy.SHAPES, places, places)]
    on_black = [toy.Scene((0, 0, 0), (0.0, 0.0), (o,)) for o in objects]
    parts = [toy.render(on_black[i:i + 1000])[:, 0].flatten(1) for i in range(0, len(on_black), 1000)]
    cover = (torch.cat(parts) / 2 + 0.5).T.contiguous()                       # (P, M)
    return objects, cover, cover.square()


def read_scenes(images):
    """The scenes that pictures (B, 3, S, S) show, a list, by matching pursuit: the background that the nearest third of
    the pixels fits best, then up to four objects that do not overlap, each the one that lowers the squared error most.
    What explains less than half of the faintest object is none."""
    empty, pictures = all_backgrounds()
    objects, cover, square = all_objects()
    places = torch.tensor([(o.x, o.y, o.radius) for o in objects])            # (M, 3)
    rgb = torch.tensor([toy.RGB[colour] for colour in toy.COLOURS]) / 127.5 - 1
    images, pictures = images.flatten(2), pictures.flatten(2)                 # (B, 3, P) and (N, 3, P), of P pixels

    errors = ((pictures - image).abs().mean(1) for image in images)           # (N, P) each
    rows = [error.kthvalue(error.shape[1] // 3, dim=1).values.argmin().item() for error in errors]
    scenes, drawn, free = [empty[row] for row in rows], pictures[rows], torch.ones(len(images), len(objects))
    for _ in range(4):
        # The error |image - drawn|^2 falls by 2 cover <image - drawn, d> - cover^2 |d|^2, where d = rgb - drawn.
        d = rgb[:, :, None] - drawn[:, None]                                  # (B, 6, 3, P)
        along = ((images - drawn)[:, None] * d).sum(2)                        # (B, 6, P)
        gain = 2 * along @ cover - d.square().sum(2) @ square                 # (B, 6, M)
        gain, best = (gain * free[:, None]).flatten(1).max(1)
        for b in (gain >= FAINTEST / 2).nonzero().flatten().tolist():
            colour, row = divmod(best[b].item(), len(objects))
            found = replace(objects[row], colour=list(toy.COLOURS)[colour])
            scenes[b] = replace(scenes[b], objects=scenes[b].objects + (found,))
            drawn[b] += cover[:, row] * d[b, colour]
            free[b] *= (places[:, :2] - places[row, :2]).norm(dim=1) > places[:, 2] + found.radius - 2
    return scenes


def is_clean(scene, image):
    """Whether a picture (3, S, S) shows nothing beside a scene: of the background, half is off by less than 0.05, and
    all but 12 pixels by less than 0.12.  Near objects, nothing is compared: their edges are off by half a pixel."""
    y, x = torch.meshgrid(*[torch.arange(toy.SIZE) + 0.5] * 2, indexing="ij")
    far = torch.ones(toy.SIZE, toy.SIZE, dtype=torch.bool)
    for o in scene.objects:
        far &= ((x - o.x) ** 2 + (y - o.y) ** 2).sqrt() > 1.15 * o.radius + 2
    error = (toy.render([scene])[0] - image).abs().mean(0)[far] / 2
    return error.median() < 0.05 and (error > 0.12).sum() < 12


def is_there(o, edit, scene):
    """Whether a scene shows an object of the true edited one: within 3 pixels, or anywhere if the edit adds it."""
    anywhere = edit.kind == "add" and o is edit.edited.objects[-1]
    return any(found.name == o.name and (anywhere or max(abs(found.x - o.x), abs(found.y - o.y)) <= 3)
               for found in scene.objects)


def judge_scenes(edits, outputs):
    """The strict scores of edited images (B, 3, S, S): a dict of tensors (B,).

    exact: 1 if the output shows the true edited scene: its background, its objects, each with its colour and shape and
        within 3 pixels of its place, and nothing else.  What an `add` adds may be anywhere.
    objects: the share of these objects that are there; 1 for none in a scene that should have none."""
    exact, objects = [], []
    for edit, scene, output in zip(edits, read_scenes(outputs), outputs):
        there = [is_there(o, edit, scene) for o in edit.edited.objects]
        as_many = len(scene.objects) == len(there)
        same_background = scene.background == edit.edited.background
        exact.append(all(there) and as_many and same_background and is_clean(scene, output))
        objects.append(sum(there) / len(there) if there else as_many)
    return {"exact": torch.tensor(exact).float(), "objects": torch.tensor(objects).float()}


# ---- distances to the true edit --------------------------------------------------------------------------------------

def edit_mask(images, edited):
    """Where an edit changes an image: (B, 3, H, W) twice -> bool (B, 1, H, W)."""
    return (images - edited).abs().amax(1, keepdim=True) > 0.06


def nearest_truth(edits, outputs):
    """The true edited images (B, 3, S, S); of an `add`, which names no place, the one nearest to the output."""
    truths = []
    for edit, output in zip(edits, outputs):
        candidates = toy.render(toy.truths(edit))
        distances = (candidates - output).abs().mean((1, 2, 3))
        truths.append(candidates[distances.argmin()])
    return torch.stack(truths)


def mean_inside(values, mask):
    """The mean of values (B, 3, H, W) where the mask (B, 1, H, W) is true: (B,)."""
    return (values * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3))).clamp_min(1)


def iou(a, b):
    """Intersection over union of masks (B, H, W): (B,)."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp_min(1)


def finite(scores):
    """The scores, tensors (B,), themselves.  ValueError if one is no number, which a comparison would hide."""
    for name, values in scores.items():
        bad = sum(~values.isfinite()).item()
        if bad:
            raise ValueError(f"the {name} of {bad} of {len(values)} edits is no number (NaN)")
    return scores


@torch.no_grad()
def judge(edits, images, outputs, clip):
    """Scores edited images (B, 3, S, S) by the truth: a dict of tensors (B,).  clip: a ClipScorer.

    exact, objects: see `judge_scenes`.
    L1, L2: the distance to the true edit, in the range 0 to 1; inside and outside: L1 there, by the edit's mask.
    done: 1 if CLIP finds the output nearer to the edited caption than to the input's.
    right: 1 if inside the mask the output is nearer to the true edit than to the input.
    CLIP-I, CLIP-T, direction: cosines, with the true edit, the edited caption, and the change of the caption."""
    truth = nearest_truth(edits, outputs)
    mask = edit_mask(images, truth)
    error, change = (outputs - truth).abs() / 2, (outputs - images).abs() / 2
    E_input, E_output, E_truth = clip.embed_images(torch.cat([images, outputs, truth])).chunk(3)
    E_caption = clip.embed_texts([e.scene.caption for e in edits])
    E_edited_caption = clip.embed_texts([e.edited.caption for e in edits])
    match, old_match = (E_output * E_edited_caption).sum(1), (E_output * E_caption).sum(1)
    return finite(judge_scenes(edits, outputs) | {
            "L1": error.mean((1, 2, 3)),
            "L2": error.square().mean((1, 2, 3)),
            "inside": mean_inside(error, mask),
            "outside": mean_inside(error, ~mask),
            "done": (match > old_match).float(),
            "right": (mean_inside(error, mask) < mean_inside(change, mask)).float(),
            "CLIP-I": (E_output * E_truth).sum(1),
            "CLIP-T": match,
            "direction": cosine_similarity(E_output - E_input, E_edited_caption - E_caption)})


def judge_attention(model, edits, images, outputs):
    """The IoU, of what is above half of their ranges, of the attention maps A_f and A_r with the true mask of the edit,
    and with each other, the agreement: a dict of tensors (B,)."""
    mask = edit_mask(images, nearest_truth(edits, outputs))[:, 0]                         # (B, S, S)
    forward, back = [e.instruction for e in edits], [e.reverse_instruction for e in edits]
    images, outputs = images.to(model.device), outputs.to(model.device)
    A_f = edit_region(model, images, outputs, forward).cpu() > 0.5                        # (B, S, S)
    A_r = edit_region(model, outputs, images, back).cpu() > 0.5                           # (B, S, S)
    return {"A_f IoU": iou(A_f, mask), "A_r IoU": iou(A_r, mask), "agreement": iou(A_f, A_r)}
