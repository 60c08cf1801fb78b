"""Edits images as an instruction says.  Without any argument it draws the demo, figure 3.

    python edit.py                                                                # outputs/demo.png
    python edit.py --model MODEL --input photo.jpg --edit "make it snow" --output snow.png
    python edit.py --model MODEL --input photos --edit "make it snow" --output snowy     # a folder
    python edit.py ... --edit "make it snow" --reverse "melt the snow"        # also snow-cycle.png

MODEL is timbrooks/instruct-pix2pix, or one that train.py wrote, as runs/photos/best.
An image is resized for the edit, not cropped, and the result is as large as the input.  Its longer
side is then about --resolution: by the shorter one, a photo would have twice the pixels.  A model
may recommend steps, guidance scales and a resolution (edit_defaults.json); flags overrule them.
Broken images of a folder are skipped and reported, and the exit status is 1.
"""
import math
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F

import toy
from cli import (DTYPES, Parser, check_writable, default_device, device, errors,
                 non_negative_float, number, seed_int, sweep)
from losses import edit_region
from pictures import figure3, find_images, from_pil, load_image, save_png, to_pil
from uip2p import EditModel

TOY = str(Path(__file__).resolve().parent / "models/toy")
DEMO, DEMO_SCENES = Path("outputs/demo.png"), 8
LONGEST_SIDE = 4096                            # pixels of a side while an image is edited


def parser():
    p = Parser("edit.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--input", help="an image, or a folder of images")
    add("--edit", action="append", default=[], help="the instruction; several are applied in turn")
    add("--reverse", action="append", default=[], help="undoes --edit; draws OUTPUT-cycle.png")
    add("--output", help="a .png file, or a folder if the input is one")
    add("--model", default=TOY, help="directory or hub id (%(default)s)")
    add("--steps", type=number(int, 1, 999), help="of denoising (the model's, otherwise 50)")
    add("--cfg-text", type=non_negative_float, help="guidance scale s_T (the model's, or 7.5)")
    add("--cfg-image", type=non_negative_float, help="guidance scale s_I (the model's, or 1.5)")
    add("--resolution", type=number(int, 16, 2048), help="longer side (the model's, or 512)")
    add("--seed", type=seed_int, default=0, help="of the noise of each image (%(default)s)")
    add("--device", type=device, default=default_device(), help="(%(default)s)")
    add("--precision", choices=DTYPES, help="(fp16 on CUDA, otherwise fp32)")
    return p


# ---- what is edited ---------------------------------------------------------------------------

def check_files(args):
    """Finds what is wrong before any work: [(input, output), ...]; [] for the demo."""
    if not (args.input or args.output or args.edit or args.reverse):
        folder = DEMO.parent if DEMO.parent.exists() else Path()
        check_writable(folder)
        sweep(folder, {DEMO.name})
        return []
    for flag in ("input", "edit", "output"):
        if not getattr(args, flag):
            raise ValueError(f"--{flag} is missing; an edit needs --input, --edit and --output")
    if len(args.reverse) not in (0, len(args.edit)):
        raise ValueError(f"{len(args.reverse)} --reverse for {len(args.edit)} --edit: one for each")
    if not all(text.encode().strip() for text in args.edit + args.reverse):   # encode: is it text?
        raise ValueError('an instruction is empty; say what to change: --edit "make it snow"')

    source, target = Path(args.input), Path(args.output)
    if source.is_dir():
        inputs = find_images(source)
        outputs = [target / f"{f.stem}.png" for f in inputs]
        if target.is_file() or target.suffix.lower() == ".png":
            raise ValueError(f"--output {target} is a file, but --input is a folder")
    else:
        inputs, outputs = [source], [target]
        load_image(source)                     # an error, before the model is loaded
        if target.suffix.lower() != ".png":
            raise ValueError(f"--output {target}: give the name of a .png file")
    folder = target if target.is_dir() else target.parent
    check_writable(folder)

    written = outputs + [cycle_file(output) for output in outputs if args.reverse]
    if len(set(written)) < len(written):
        raise ValueError(f"--input {source}: two outputs would have one name; rename an image")
    read = {os.path.realpath(file) for file in inputs}
    for file in written:
        if os.path.realpath(file) in read:
            raise ValueError(f"--output would overwrite the input {file}; choose another name")
        if file.is_dir():
            raise ValueError(f"--output {file} is a folder; choose another name, or remove it")
    sweep(folder, {file.name for file in written})
    return list(zip(inputs, outputs))

def cycle_file(output):
    return output.with_name(f"{output.stem}-cycle.png")

def warn_of_cut_texts(model, texts):
    longest = model.tokenizer.model_max_length - 2                # without the start and the end
    for text in texts:
        cut = model.tokenizer.decode(model.tokenizer(text).input_ids[1 + longest:-1])
        if cut:
            print(f"edit.py: warning: an instruction has more than {longest} tokens; what is cut "
                  f"and not followed: {cut!r}", file=sys.stderr)

def load_editor(path_or_id, where="cpu", precision="fp32"):
    """A model that edits.  A text-to-image model is refused: its weights for the image are 0."""
    model = EditModel.from_pretrained(path_or_id, where, DTYPES[precision])
    if not model.unet.conv_in.weight[:, 4:].any():
        raise ValueError(f"{path_or_id} is a text-to-image model, which does not look at an image: "
                         "choose an editor, or make one of it by train.py --model")
    return model


# ---- editing ----------------------------------------------------------------------------------

def recommended(model):
    """The settings of an edit that a model recommends, otherwise the usual ones."""
    return {"steps": model.defaults.get("steps", 50),
            "cfg_text": float(model.guidance["text_guidance"]),
            "cfg_image": float(model.guidance["image_guidance"]),
            "resolution": model.defaults.get("resolution", 512)}

def edit_size(model, name, size, resolution, whole=round):
    """The size (H, W) of an image during the edit: multiples of how much the model reduces a side,
    64 in Stable Diffusion.  As in InstructPix2Pix's program the longer side is about `resolution`,
    and the shorter one is rounded up.  whole: how the longer one is rounded."""
    multiple = model.vae.factor * 2 ** (len(model.unet.down_blocks) - 1)
    factor = resolution / max(size)
    factor = math.ceil(min(size) * factor / multiple) * multiple / min(size)
    height, width = [multiple * max(1, whole(side * factor / multiple)) for side in size]
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"{name}, of {size[1]}x{size[0]}, would be edited at {width}x{height}; at "
                         f"most {LONGEST_SIDE} a side: it is too long and thin, cut it")
    return height, width

def resize(images, size):
    """Images (3, H, W) of any sizes -> (B, 3, *size); nothing is cropped."""
    resized = [F.interpolate(image[None], size, mode="bicubic", antialias=True) for image in images]
    return torch.cat(resized).clamp(-1, 1)

def edit(model, images, instructions, size, args, progress=True):
    """Edits each image (3, H, W) at `size` and gives it back at its own size, rounded to the 256
    steps of a file.  All of them start from the same noise."""
    latent = [model.vae.config["latent_channels"], *(side // model.vae.factor for side in size)]
    noise = torch.randn(1, *latent, generator=torch.Generator().manual_seed(args.seed))
    noise = noise.expand(len(images), -1, -1, -1)
    edited = model.edit(resize(images, size), instructions, args.steps, args.cfg_text,
                        args.cfg_image, noise, progress=progress)
    if not edited.isfinite().all():
        advice = "" if model.dtype == torch.float32 else "; try --precision fp32"
        raise ValueError(f"the model computes no numbers (NaN){advice}")
    edited = [resize([e], image.shape[1:])[0] for e, image in zip(edited.float().cpu(), images)]
    return [from_pil(to_pil(image)) for image in edited]

def round_trip(model, images, edited, forward, back, size, args, progress=True):
    """The rows of figure 3: [(input, edit, the edit undone, A_f, A_r, both instructions), ...]"""
    undone = edit(model, edited, back, size, args, progress)
    before, after, last = [resize(step, size).to(model.device, model.dtype)
                           for step in (images, edited, undone)]
    A_f = edit_region(model, before, after, forward)
    A_r = edit_region(model, after, last, back)
    labels = [f"{f}; and back: {b}" for f, b in zip(forward, back)]
    return list(zip(images, edited, undone, A_f, A_r, labels))

def draw_cycle(model, images, forward, back, args=None, true=None):
    """Figure 3 of images (B, 3, H, W) and B instructions there and back.  args: the settings of
    the edits; None: what the model recommends, in at most 10 steps, and without a bar."""
    progress = args is not None
    if args is None:
        args = Namespace(**recommended(model), seed=0)
        args.steps = min(args.steps, 10)
    size = edit_size(model, "an image", images.shape[2:], max(images.shape[2:]))
    images = list(images.cpu())
    edited = edit(model, images, forward, size, args, progress)
    rows = round_trip(model, images, edited, forward, back, size, args, progress)
    return figure3(*zip(*rows), true=true)


# ---- the commands -----------------------------------------------------------------------------

def demo(model, args, settings):
    """Figure 3 of the first test scenes of the toy world, with the true edits."""
    samples = [toy.edit("test", i) for i in range(DEMO_SCENES)]
    images = toy.render([sample.scene for sample in samples])
    true = toy.render([sample.edited for sample in samples])
    forward = [sample.instruction for sample in samples]
    back = [sample.reverse_instruction for sample in samples]
    DEMO.parent.mkdir(exist_ok=True)
    save_png(draw_cycle(model, images, forward, back, args, true), DEMO, settings)
    print(f"{DEMO}: {len(samples)} scenes that training never saw, edited and edited back")

def edit_file(model, image, size, output, args, settings):
    """Edits one image at `size` by all instructions in turn, and writes the outputs."""
    rows = []
    for turn, text in enumerate(args.edit):
        edited = edit(model, [image], [text], size, args)
        if args.reverse:
            rows += round_trip(model, [image], edited, [text], [args.reverse[turn]], size, args)
        image = edited[0]
    output.parent.mkdir(exist_ok=True)
    save_png(image, output, settings)
    print(output)
    if args.reverse:
        save_png(figure3(*zip(*rows)), cycle_file(output), settings)
        print(cycle_file(output))

def edit_files(model, files, args, settings):
    """Edits [(input, output), ...].  -> how many inputs are broken.  Of several, they are reported
    and skipped; one alone is an error."""
    broken = 0
    for source, output in files:
        try:
            image = load_image(source)
            size = edit_size(model, source, image.shape[1:], args.resolution)
        except (ValueError, OSError) as error:
            if len(files) == 1:
                raise
            print(f"skipped {error}", file=sys.stderr)
            broken += 1
        else:
            print(f"{source} at {size[1]}x{size[0]}")
            edit_file(model, image, size, output, args, settings)
    return broken

def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    with errors(p, "choose a smaller --resolution"):
        files = check_files(args)
        if args.precision is None:
            args.precision = "fp16" if args.device.startswith("cuda") else "fp32"
        model = load_editor(args.model, args.device, args.precision)
        for name, value in recommended(model).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        names = "model device precision seed steps cfg_text cfg_image resolution".split()
        settings = {name: getattr(args, name) for name in names}
        print(", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
        warn_of_cut_texts(model, args.edit + args.reverse)
        if not files:
            demo(model, args, settings)
            return
        settings["edit"] = "\n".join(args.edit)
        broken = edit_files(model, files, args, settings)
        if broken:
            p.end(1, f"error: {broken} of {len(files)} images are broken, see above")


if __name__ == "__main__":
    main()
