"""Where the cross-attention looks: which words, layers and timesteps make a map A^(i) that finds the edit.

    python -m experiments.attention --model models/toy/baseline

In the toy world the true mask of an edit is known.  A table has three measures of each candidate, by kind of edit: AUC,
the chance that a pixel of the mask has more attention than one outside (0.5 is chance); *which*, the chance that the
object of the edit has more attention, in the mean, than another object, so that a map of all objects is no better than
chance; and the IoU of the mask and what is above half of the map's range.  Each edit is one noise prediction of the
noised input, as in training.  An `add` is judged by its way back and a `remove` by its way there, because what is not
in the image has no place yet; the others by both.  losses.py has the rule that was chosen, that of the tables of
timesteps and of layers.
"""
import argparse
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F

import toy
from cli import Parser, errors, number
from edit import TOY, load_editor
from experiments.truth import edit_mask, iou
from losses import STOP_WORDS, VERBS, content_words, reduce_map

KINDS = ("colour", "shape", "remove", "add")   # the mask of a background is most of the image
T, TIMESTEPS = 500, (100, 300, 500, 700, 900)
RULE = "without the verb, first end token"     # of WORDS; with each word's map by its mean, that of losses.py


# ---- the candidates --------------------------------------------------------------------------------------------------

# {name: which kinds of tokens count}
WORDS = {
    "content words": {"verb", "shape", "other"}, "without the verb": {"shape", "other"},
    RULE: {"shape", "other", "end"}, "the shape": {"shape"}, "first end token": {"end"},
    "end tokens": {"end", "padding"}, "the verb": {"verb"}}


def kinds_of_tokens(tokenizer, texts):
    """The kind of each token of B texts, lists of L strings."""
    found = []
    for row in tokenizer(texts, padding="max_length").input_ids:
        words = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(row)]
        end = row.index(tokenizer.eos_token_id)
        kinds = ["verb" if word in VERBS else "shape" if word in toy.SHAPES else "stop word" if word in STOP_WORDS
                 else "other" for word in words[1:end]]
        found.append(["start", *kinds, "end", *["padding"] * (len(row) - end - 1)])
    return found


def choose(tokens, name):
    """(B, L): 1 for the tokens that count, otherwise 0."""
    return torch.tensor([[float(kind in WORDS[name]) for kind in row] for row in tokens])


def summed(probs, words):
    """(B, heads, h, w, L), (B, L) -> (B, h, w): the sum over the words, the mean over the heads."""
    return (probs * words[:, None, None, None]).sum(-1).mean(1)


def each_head(probs, words):
    """Each head's map of each word is divided by its mean before they are averaged, so that all heads count alike."""
    return reduce_map(probs / probs.mean((2, 3), keepdim=True).clamp_min(1e-6), words)


def standardised(probs, words):
    """Each word's map has mean 0 and deviation 1 before they are averaged."""
    maps = probs.mean(1)
    maps = (maps - maps.mean((1, 2), keepdim=True)) / maps.std((1, 2), keepdim=True).clamp_min(1e-6)
    return (maps * words[:, None, None]).sum(-1) / words.sum(1)[:, None, None]


REDUCTIONS = {"summed": summed, "each word by its mean": reduce_map, "each head by its mean": each_head,
              "each word standardised": standardised}


# ---- the measures ----------------------------------------------------------------------------------------------------

def auc(maps, masks):
    """Of maps (B, S, S) and bool masks (B, S, S): (B,)."""
    scores = []
    for A, mask in zip(maps, masks):
        difference = A[mask][:, None] - A[~mask]                              # (inside, outside)
        scores.append((difference > 0).float().mean() + (difference == 0).float().mean() / 2)
    return torch.stack(scores)


def areas(scene):
    """{object: the bool mask (S, S) of what is seen of it}."""
    empty, *alone = toy.render([replace(scene, objects=objects) for objects in ((), *((o,) for o in scene.objects))])
    return {o: (image != empty).any(0) for o, image in zip(scene.objects, alone)}


def which(maps, objects):
    """Of maps (B, S, S) and, for each of them, the mask of the object of the edit and a list of those of the others:
    (B,), NaN where there are no others."""
    scores = []
    for A, (edited, others) in zip(maps, objects):
        more = [(A[edited].mean() > A[other].mean()).float() for other in others]
        scores.append(torch.stack(more).mean() if more else torch.tensor(torch.nan))
    return torch.stack(scores)


def mean_map(layers):
    """Maps (B, h, w) of several layers -> their mean (B, S, S), each layer divided by its own mean."""
    resized = []
    for A in layers:
        A = A / A.mean((1, 2), keepdim=True).abs().clamp_min(1e-6)
        resized.append(F.interpolate(A[:, None], size=(toy.SIZE, toy.SIZE), mode="bilinear")[:, 0])
    return torch.stack(resized).mean(0)


def print_header(title):
    columns = [f"{measure} {kind}" for measure, kind in product(("AUC", "which", "IoU"), (*KINDS, "mean"))]
    print(f"\n| {title} | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")


def print_row(name, maps, masks, objects, kinds):
    """A line of a table of maps (B, S, S): the means of each kind, and the mean of these."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    measures = auc(maps, masks), which(maps, objects), iou(maps > (low + high) / 2, masks)
    cells = []
    for values in measures:
        means = [values[[kind == wanted for kind in kinds]].nanmean().item() for wanted in KINDS]
        cells += [f"{value:.2f}" for value in (*means, sum(means) / len(means))]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


# ---- the study -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def capture(model, inputs, conditions, texts, t):
    """The probabilities of all layers, a list of (B, heads, h, w, L), in one noise prediction of noised inputs."""
    z_0, maps = model.encode(inputs.to(model.device)), []                     # (B, 4, h, w)
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(t)).to(z_0)
    t = torch.full((len(z_0),), t, device=z_0.device)
    x = torch.cat([model.add_noise(z_0, noise, t), model.vae.encode(conditions.to(z_0))], dim=1)
    model.unet(x, t, model.encode_text(texts), maps)
    return [probs.cpu() for probs in maps]


def looks(edits):
    """What the attention is asked for in edits of an object, there and back.

    -> (inputs and conditions, (N, 3, S, S) each, and N texts), (true masks (N, S, S), objects as in `which`, kinds)"""
    there, back = [e for e in edits if e.kind != "add"], [e for e in edits if e.kind != "remove"]
    kinds = [e.kind for e in there + back]
    inputs, edited = toy.render([e.scene for e in there + back]), toy.render([e.edited for e in there + back])
    conditions = torch.cat([inputs[:len(there)], edited[len(there):]])
    texts = [e.instruction for e in there] + [e.reverse_instruction for e in back]
    objects = []
    for scene, other in [(e.scene, e.edited) for e in there] + [(e.edited, e.scene) for e in back]:
        seen = areas(scene)
        (changed,) = seen.keys() - set(other.objects)
        objects.append((seen.pop(changed), list(seen.values())))
    return (inputs, conditions, texts), (edit_mask(inputs, edited)[:, 0], objects, kinds)


def measure_rule(model, edits):
    """The measures of the rule of losses.py: {"AUC": (N,), "which": (M,), M where there are other objects}."""
    (inputs, conditions, texts), (masks, objects, _) = looks(edits)
    words = content_words(model.tokenizer, model.tokenize(texts))
    maps = mean_map([reduce_map(probs, words) for probs in capture(model, inputs, conditions, texts, T)])
    found = which(maps, objects)
    return {"AUC": auc(maps, masks), "which": found[found.isfinite()]}


def study(args):
    model = load_editor(args.model)
    edits = [edit for edit in (toy.edit("validation", i) for i in range(args.scenes)) if edit.kind != "background"]
    (inputs, conditions, texts), truth = looks(edits)
    tokens = kinds_of_tokens(model.tokenizer, texts)
    captured = {t: capture(model, inputs, conditions, texts, t) for t in TIMESTEPS}
    print(f"{args.model}, {len(texts)} edits, there and back")

    # ---- words and reductions, then timesteps and layers of one of them
    print_header(f"words, t = {T}, all layers")
    for (name, reduce), chosen in product(REDUCTIONS.items(), WORDS):
        words = choose(tokens, chosen)
        print_row(f"{chosen}, {name}", mean_map([reduce(probs, words) for probs in captured[T]]), *truth)
    words = choose(tokens, RULE)
    reduced = {t: [reduce_map(probs, words) for probs in maps] for t, maps in captured.items()}
    print_header("the rule: timesteps, all layers")
    for t, layers in reduced.items():
        print_row(f"t = {t}", mean_map(layers), *truth)
    print_header(f"the rule: layers, t = {T}")
    layers = reduced[T]
    for side in sorted({A.shape[1] for A in layers}):
        print_row(f"all of {side}x{side}", mean_map([A for A in layers if A.shape[1] == side]), *truth)
    for i, A in enumerate(layers):
        print_row(f"layer {i}, {A.shape[1]}x{A.shape[2]}", mean_map([A]), *truth)


def main(argv=None):
    p = Parser("experiments.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=f"{TOY}/baseline", help="directory of a toy model (%(default)s)")
    p.add_argument("--scenes", type=number(int, 5, 10_000), default=250, help="of validation (%(default)s)")
    args = p.parse_args(argv)
    with errors(p):
        study(args)


if __name__ == "__main__":
    main()
