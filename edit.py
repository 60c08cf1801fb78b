"""Edits images as an instruction says. Without any argument it draws the demo: figure 3 of the paper, in the toy world.

    python edit.py                                                                                 # outputs/demo.png
    python edit.py --input scene.png --edit "make the background pink" --output pink.png
    python edit.py --input photo.jpg --edit "make it snow" --edit "add a dog" --output o.png --model timbrooks/instruct-pix2pix
    python edit.py --input photos --edit "make it snow" --output snowy --model runs/photos/best   # all images of a folder
    python edit.py --input photo.jpg --edit "make it snow" --reverse "melt the snow" --output snow.png   # + snow-cycle.png

An image is resized for the edit, not cropped, and the result is as large as the input.  Where a model recommends steps,
guidance scales or a resolution (edit_defaults.json), they replace the defaults below; flags replace both.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import toy
from cli import DTYPES, Parser, device, non_negative_float, number, quiet_transformers, seed_int
from pictures import from_pil, grid, load_image, overlay, save_png, to_pil
from uip2p import EditModel, edit_map

HERE = Path(__file__).resolve().parent
DEMO, DEMO_SCENES = Path("outputs/demo.png"), 8
COLUMNS = ("input", "edit", "reconstruction", "A_f", "A_r")   # of figure 3
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
LONGEST = 4096                                                # pixels of a side while it is edited
BATCH = 8 * 512 ** 2                                          # pixels that are edited at once


def parser():
    p = Parser("edit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", help="an image, or a folder of images")
    p.add_argument("--edit", action="append", default=[], help="instruction; several are applied in turn")
    p.add_argument("--reverse", action="append", default=[], help="undoes the --edit; the cycle is drawn, OUTPUT-cycle.png")
    p.add_argument("--output", help="a .png file, or a folder if the input is one")
    p.add_argument("--model", default=HERE / "models/toy", help="directory or hub id (%(default)s)")
    p.add_argument("--steps", type=number(int, 1, 999), default=50, help="denoising steps (%(default)s)")
    p.add_argument("--cfg-text", type=non_negative_float, default=7.5, help="guidance scale s_T of the text (%(default)s)")
    p.add_argument("--cfg-image", type=non_negative_float, default=1.5, help="guidance scale s_I of the image (%(default)s)")
    p.add_argument("--resolution", type=number(int, 16, 2048), default=512, help="of the shorter side, inside (%(default)s)")
    p.add_argument("--seed", type=seed_int, default=0, help="of the noise, the same for every image and turn (%(default)s)")
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    p.add_argument("--precision", choices=DTYPES, help="(fp16 on CUDA, else fp32)")
    p.add_argument("--compile", action="store_true", help="compile the UNet: a long warm-up, then faster steps")
    return p


def check_files(args):
    """Finds, before any work, what is wrong with the files -> [(input, output, size of the input)]; [] for the demo."""
    if args.input is None and args.output is None and not (args.edit or args.reverse):
        DEMO.parent.mkdir(exist_ok=True)
        check_writable(DEMO.parent)
        return []
    for flag in ("input", "edit", "output"):
        if not getattr(args, flag):
            raise ValueError(f"--{flag} is missing; an edit needs --input, --edit and --output, the demo none of them")
    if args.reverse and len(args.reverse) != len(args.edit):
        raise ValueError(f"{len(args.reverse)} --reverse for {len(args.edit)} --edit: give one for each, or none")
    if not all(text.encode().strip() for text in args.edit + args.reverse):  # encode: ValueError if it is not text
        raise ValueError("an instruction is empty; say what to change, as in --edit \"make it snow\"")
    source, target = Path(args.input), Path(args.output)
    if source.is_dir():
        inputs = sorted(f for f in source.iterdir() if f.suffix.lower() in SUFFIXES)
        outputs = [target / f"{f.stem}.png" for f in inputs]
        if not inputs:
            raise ValueError(f"--input {source} holds no image ({' '.join(sorted(SUFFIXES))})")
        if target.exists() and not target.is_dir():
            raise ValueError(f"--output {target} is a file, but --input is a folder: name a folder")
        check_writable(target if target.is_dir() else target.parent)
    else:
        inputs, outputs = [source], [target]
        if target.suffix.lower() != ".png":
            raise ValueError(f"--output {target}: give the name of a .png file, without loss and with the settings inside")
        check_writable(target.parent)
    written = outputs + [cycle_file(f) for f in outputs] * bool(args.reverse)
    if len(set(written)) < len(written):
        raise ValueError(f"--input {source}: two outputs would have one name; rename images that differ only in the suffix")
    if both := {f.resolve() for f in inputs} & {f.resolve() for f in written}:
        raise ValueError(f"--output would overwrite the input {min(both)}; choose another name")
    if folders := [f for f in written if f.is_dir()]:
        raise ValueError(f"--output {folders[0]} is a folder; choose another name, or remove it")
    return [(i, o, tuple(load_image(i).shape[1:])) for i, o in zip(inputs, outputs)]


def check_writable(folder):
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output: cannot write in {folder}: {error.strerror}") from None


def cycle_file(output):
    return output.with_name(f"{output.stem}-cycle.png")


def edit_size(model, name, size, resolution):
    """The size (H, W) of an image during the edit: the shorter side about `resolution`, both multiples of what the
    model halves."""
    multiple = model.vae_factor * 2 ** (len(model.unet.config["block_out_channels"]) - 1)        # 64 in Stable Diffusion
    height, width = (multiple * max(1, round(side * resolution / min(size) / multiple)) for side in size)
    if max(height, width) > LONGEST:
        raise ValueError(f"{name}, of {size[1]}x{size[0]}, would be edited at {width}x{height}, more than {LONGEST} pixels "
                         "a side; choose a smaller --resolution, or cut the image")
    return height, width


def stack(model, images, size):
    """Images of any sizes -> one batch (B, 3, *size), nothing cropped."""
    images = [F.interpolate(image[None], size, mode="bicubic", antialias=True).clamp(-1, 1) for image in images]
    return torch.cat(images).to(model.device, model.dtype)


def edit(model, images, instructions, size, args):
    """Edits each image (3, H, W) at `size`, and gives it back at its own size, in the 256 steps that a file would have."""
    # each image starts from the noise that it would have alone
    latent = model.vae.config["latent_channels"], *(side // model.vae_factor for side in size)
    noise = torch.randn(1, *latent, generator=torch.Generator().manual_seed(args.seed)).expand(len(images), -1, -1, -1)
    edited = model.edit(stack(model, images, size), instructions, args.steps, args.cfg_text, args.cfg_image, noise,
                        progress=True)
    if not edited.isfinite().all():
        raise ValueError(f"the model computes no numbers (NaN) in {args.precision}; try --precision fp32")
    edited = edited.float().cpu()[:, None]                                                      # (B, 1, 3, *size)
    return [from_pil(to_pil(F.interpolate(e, image.shape[1:], mode="bicubic", antialias=True)[0]))
            for e, image in zip(edited, images)]


def warm_up(model, count, size, args):
    """With --compile, an edit of one step, which compiles the UNet for so many images of a size."""
    if args.compile:
        started = time.time()
        try:
            edit(model, [torch.zeros(3, *size)] * count, [""] * count, size, argparse.Namespace(**vars(args) | {"steps": 1}))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"--compile does not work here: {str(error).splitlines()[0]}") from None
        print(f"compiled in {time.time() - started:.0f} s", flush=True)


def cycle_rows(model, images, edited, instructions, reverse_instructions, size, args):
    """The rows of figure 3: input, edit, reconstruction (the edit undone), where each instruction acts, A_f and A_r."""
    undone = edit(model, edited, reverse_instructions, size, args)
    before, after, back = (stack(model, i, size) for i in (images, edited, undone))
    forward_maps = edit_map(model, before, after, instructions)
    reverse_maps = edit_map(model, after, back, reverse_instructions)
    return [[i, e, u, overlay(i, a_f), overlay(e, a_r)]
            for i, e, u, a_f, a_r in zip(images, edited, undone, forward_maps, reverse_maps)]


def demo(model, args, settings):
    samples = [toy.edit("test", i) for i in range(DEMO_SCENES)]
    size = edit_size(model, "the scene", (toy.SIZE, toy.SIZE), args.resolution)
    images, truths = toy.render([s.scene for s in samples]), toy.render([s.edited for s in samples])
    warm_up(model, len(images), size, args)
    instructions, reverse_instructions = [s.instruction for s in samples], [s.reverse_instruction for s in samples]
    edited = edit(model, images, instructions, size, args)
    rows = cycle_rows(model, images, edited, instructions, reverse_instructions, size, args)
    labels = [f"{s.instruction}; and back: {s.reverse_instruction}" for s in samples]
    save_png(grid([[*row, truth] for row, truth in zip(rows, truths)], (*COLUMNS, "true edit"), labels), DEMO, settings)
    print(f"{DEMO}: {len(samples)} scenes that training never saw, edited and edited back")


def edit_files(model, jobs, args, settings):
    """Edits the files of check_files, as many at once as have one size."""
    sizes = [edit_size(model, source, size, args.resolution) for source, _, size in jobs]
    for size in sorted(set(sizes)):
        same = [job for job, other in zip(jobs, sizes) if other == size]
        print(f"{len(same)} image{'s' * (len(same) > 1)} at {size[1]}x{size[0]}")
        at_once = max(1, min(16, BATCH // (size[0] * size[1])))
        warm_up(model, min(at_once, len(same)), size, args)
        for first in range(0, len(same), at_once):
            batch = same[first:first + at_once]
            images, figures = [load_image(source) for source, _, _ in batch], [[] for _ in batch]
            for turn, instruction in enumerate(args.edit):
                edited = edit(model, images, [instruction] * len(batch), size, args)
                if args.reverse:
                    texts = [instruction] * len(batch), [args.reverse[turn]] * len(batch)
                    for figure, row in zip(figures, cycle_rows(model, images, edited, *texts, size, args)):
                        figure.append(row)
                images = edited
            for (source, output, _), image, figure in zip(batch, images, figures):
                output.parent.mkdir(exist_ok=True)
                save_png(image, output, settings)
                print(output)
                if args.reverse:
                    labels = [f"{there}; and back: {back}" for there, back in zip(args.edit, args.reverse)]
                    save_png(grid(figure, COLUMNS, labels), cycle_file(output), settings)
                    print(cycle_file(output))


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    quiet_transformers()
    try:
        jobs = check_files(args)
        args.precision = args.precision or ("fp16" if args.device.startswith("cuda") else "fp32")
        model = EditModel.from_pretrained(args.model, args.device, DTYPES[args.precision])
        if args.compile:
            model.unet.compile(mode="reduce-overhead")        # on CUDA with CUDA graphs: no launches from the host
        flags = {"text_guidance": "cfg_text", "image_guidance": "cfg_image"}
        # as texts they are checked like flags, and flags go before them
        p.set_defaults(**{flags.get(k, k): str(v) for k, v in model.defaults.items()}, precision=args.precision)
        args = p.parse_args(argv)
        settings = {k: getattr(args, k) for k in
                    ("model", "device", "precision", "seed", "steps", "cfg_text", "cfg_image", "resolution")}
        print(", ".join(f"{k} {v}" for k, v in settings.items()), flush=True)
        for text in args.edit + args.reverse:
            ids = model.tokenizer(text).input_ids
            longest = model.tokenizer.model_max_length        # with the start and the end
            if len(ids) > longest:
                print(f"edit.py: warning: an instruction has more than {longest - 2} tokens; what is cut and not followed: "
                      f"{model.tokenizer.decode(ids[longest - 1:-1])!r}", file=sys.stderr)
        if jobs:
            edit_files(model, jobs, args, settings | {"edit": "\n".join(args.edit)})
        else:
            demo(model, args, settings)
    except torch.OutOfMemoryError:
        p.error(f"the memory of {args.device} is too small; choose a smaller --resolution")
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
