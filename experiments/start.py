"""What a model knows before the cycle: what its image is for, and what its text is for.

    python -m experiments.start --models models/toy/text2image models/toy/baseline

The first table has the error of z_0 in one noise prediction, as in *denoise* of log.csv, of validation inputs given the
image alone, nothing, or the caption alone, and of true edits given image and instruction.  A model that is as good with
nothing as with the image alone ignores its image.

The second has what is drawn for an instruction alone, without an image: the share of drawings that show what the edit
makes, and what it takes away, by kind of edit.  A model of captions reads "make the red circle blue" as a red circle.

The third has the forward edits of the cycle, each a single noise prediction: the share that is exact, by timestep.
"""
import argparse

import torch

import toy
from cli import Parser, errors, number
from edit import TOY
from experiments.truth import judge_scenes, read_scenes
from train import SETTINGS, denoising_loss
from uip2p import EditModel, one_step

# {what is given: a number r that makes denoising_loss drop the rest}
GIVEN = {"image": 0.01, "nothing": 0.07, "caption": 0.12, "image and instruction": 0.5}
STEPS = 10                                     # of a drawing
TIMES = 450, 600, 750, 900                     # t of the forward edits; training has 400 to 999, sampling begins at 901


def denoising_errors(model, edits):
    """A number for each line of GIVEN, all with the same noise and timesteps."""
    inputs, edited = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    found = []
    for given, r in GIVEN.items():
        is_edit = given == "image and instruction"
        texts = [e.instruction if is_edit else e.scene.caption for e in edits]
        found.append(denoising_loss(model, inputs, edited if is_edit else inputs, texts, torch.full((len(edits),), r),
                                    torch.Generator().manual_seed(0), SETTINGS["snr_weight"][2]).item())
    return found


def draw(model, texts):
    """What a model draws for B texts, without an image: (B, 3, S, S)."""
    side = toy.SIZE // model.vae.factor
    noise = torch.randn(len(texts), 4, side, side, generator=torch.Generator().manual_seed(0))
    return model.decode(model.sample(torch.zeros_like(noise), texts, noise, STEPS, **model.guidance)).clamp(-1, 1)


def names(scene):
    """Of a scene's objects and of its background."""
    return {o.name for o in scene.objects} | {scene.background}


def cells(edits, drawn, wanted):
    """The share of drawn scenes that show one of the names which `wanted` says of their edit, for each kind of edit;
    empty where it says none."""
    shares = []
    for kind in toy.KINDS:
        asked = [(wanted(edit), names(scene)) for edit, scene in zip(edits, drawn) if edit.kind == kind]
        found = [bool(those & shown) for those, shown in asked if those]
        shares.append(f"{sum(found) / len(found):.2f}" if found else "")
    return " | ".join(shares)


def forward_edits(model, edits, t):
    """I_edit of the cycle at timestep t, (B, 3, S, S); always the same noise."""
    z_input, t = model.encode(toy.render([e.scene for e in edits])), torch.full((len(edits),), t)     # (B, 4, h, w)
    z_t = model.add_noise(z_input, torch.randn(z_input.shape, generator=torch.Generator().manual_seed(0)), t)
    instructions = model.encode_text([e.instruction for e in edits])
    z_edit = one_step(model, z_t, t, z_input / model.vae.scaling_factor, instructions, [])
    return model.decode(z_edit).clamp(-1, 1)


@torch.no_grad()
def study(args):
    models = {path: EditModel.from_pretrained(path) for path in args.models}
    edits = [toy.edit("validation", i) for i in range(args.scenes)]

    print(f"the error of z_0, {len(edits)} validation scenes\n\n| model | " + " | ".join(GIVEN) + " |")
    print("|---" * (1 + len(GIVEN)) + "|")
    for path, model in models.items():
        row = " | ".join(f"{error:.4f}" for error in denoising_errors(model, edits))
        print(f"| {path} | {row} |", flush=True)

    print("\n| drawn for an instruction alone | shows | " + " | ".join(toy.KINDS) + " |")
    print("|---" * (2 + len(toy.KINDS)) + "|")
    for path, model in models.items():
        drawn = read_scenes(draw(model, [e.instruction for e in edits]))
        made = cells(edits, drawn, lambda edit: names(edit.edited) - names(edit.scene))
        gone = cells(edits, drawn, lambda edit: names(edit.scene) - names(edit.edited))
        print(f"| {path} | what the edit makes | {made} |\n| {path} | what it takes away | {gone} |", flush=True)

    print("\n| exact in one noise prediction | " + " | ".join(f"t = {t}" for t in TIMES) + " |")
    print("|---" * (1 + len(TIMES)) + "|")
    for path, model in models.items():
        shares = [judge_scenes(edits, forward_edits(model, edits, t))["exact"].mean() for t in TIMES]
        print(f"| {path} | " + " | ".join(f"{share:.2f}" for share in shares) + " |", flush=True)


def main(argv=None):
    p = Parser("experiments.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=[f"{TOY}/text2image"], help="directories of toy models")
    p.add_argument("--scenes", type=number(int, 5, 10_000), default=250, help="of validation (%(default)s)")
    args = p.parse_args(argv)
    with errors(p):
        study(args)


if __name__ == "__main__":
    main()
