"""What the truth of the toy world says of edited images: how far they are from the true edit, inside its mask and outside, and
whether the attention maps point there.  evaluate.py and claims.py print it.
"""
import torch
from torch.nn.functional import cosine_similarity

import toy
from uip2p import edit_map


def nearest_truth(edits, outputs):
    """The true edited images (B, 3, S, S); of an `add`, which names no place, the one nearest to the output."""
    truths = []
    for edit, output in zip(edits, outputs):
        candidates = toy.render(toy.truths(edit))
        truths.append(candidates[(candidates - output).abs().mean((1, 2, 3)).argmin()])
    return torch.stack(truths)


@torch.no_grad()
def judge(edits, images, outputs, scorer):
    """Scores edited images by the truth: a dict of tensors (B,).  L1 and L2 in the range 0-1; `scorer` is a CLIP.

    done: CLIP finds the output nearer to the edited caption than to the input's.
    right: inside the edit's mask, the output is nearer to the true edit than to the input."""
    truth = nearest_truth(edits, outputs)
    mask = toy.edit_mask(images, truth)
    def mean(values, where):
        return (values * where).sum((1, 2, 3)) / (where.sum((1, 2, 3)) * 3).clamp_min(1)
    error = (outputs - truth).abs() / 2
    E_input, E_output = scorer.embed_images(images), scorer.embed_images(outputs)
    E_caption = scorer.embed_texts([e.scene.caption for e in edits])
    E_edited = scorer.embed_texts([e.edited.caption for e in edits])
    return {"L1": error.mean((1, 2, 3)), "L2": error.square().mean((1, 2, 3)),
            "inside": mean(error, mask), "outside": mean(error, ~mask),
            "done": ((E_output * E_edited).sum(1) > (E_output * E_caption).sum(1)).float(),
            "right": (mean(error, mask) < mean((outputs - images).abs() / 2, mask)).float(),
            "CLIP-I": (E_output * scorer.embed_images(truth)).sum(1),
            "CLIP-T": (E_output * E_edited).sum(1),
            "direction": cosine_similarity(E_output - E_input, E_edited - E_caption)}


def judge_attention(model, edits, images, outputs):
    """Whether the attention maps point at the true edit: a dict of tensors (B,), of A_f and of A_r.

    IoU: of the true mask and what of the map is above half of its range; pointing: whether its largest value is in the mask;
    agreement: the IoU of A_f and A_r; mask: the true one's share of the image, which a point at random would hit."""
    mask = toy.edit_mask(images, nearest_truth(edits, outputs))[:, 0]                     # (B, S, S)
    # what each edit leads to is noised, to the middle of the schedule
    maps = {"A_f": edit_map(model, images, outputs, [e.instruction for e in edits]).cpu(),
            "A_r": edit_map(model, outputs, images, [e.reverse_instruction for e in edits]).cpu()}
    def iou(a, b):
        return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp_min(1)
    marked = {name: region > .5 for name, region in maps.items()}
    scores = {"agreement": iou(*marked.values()), "mask": mask.float().mean((1, 2))}
    for name, region in maps.items():
        highest = region.flatten(1).argmax(1, keepdim=True)
        scores[f"{name} IoU"] = iou(marked[name], mask)
        scores[f"{name} pointing"] = mask.flatten(1).gather(1, highest)[:, 0].float()
    return scores
