"""What the truth of the toy world says of edited images: how far they are from the true edit, inside its mask and
outside, and whether the attention maps point there.  evaluate.py and claims.py print it.
"""
import torch
from torch.nn.functional import cosine_similarity

import toy
from losses import edit_region


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
    return finite({
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
    """Whether the attention maps A_f and A_r point at the true edit: a dict of tensors (B,).

    IoU: of the true mask and what is above half of the map's range; pointing: 1 if the largest value is in the mask;
    agreement: the IoU of A_f and A_r; mask: the true one's share of the image, which a point at random would hit."""
    mask = edit_mask(images, nearest_truth(edits, outputs))[:, 0]                         # (B, S, S)
    forward, back = [e.instruction for e in edits], [e.reverse_instruction for e in edits]
    maps = {"A_f": edit_region(model, images, outputs, forward).cpu(),                    # (B, S, S) each
            "A_r": edit_region(model, outputs, images, back).cpu()}
    marked = {name: region > 0.5 for name, region in maps.items()}
    scores = {"agreement": iou(marked["A_f"], marked["A_r"]), "mask": mask.float().mean((1, 2))}
    for name, region in maps.items():
        highest = region.flatten(1).argmax(1, keepdim=True)
        scores[f"{name} IoU"] = iou(marked[name], mask)
        scores[f"{name} pointing"] = mask.flatten(1).gather(1, highest)[:, 0].float()
    return scores
