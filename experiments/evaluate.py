"""Measures editors, as tables and pictures: against the truth of the toy world, and by the published protocols.

    python evaluate.py toy --models models/toy runs/baseline/model --scales 1.5:1.2 3:1.5 --steps 5 15 50 --picture steps.png
    python evaluate.py magicbrush MagicBrush/test --models timbrooks/instruct-pix2pix runs/photos/model --steps 5 15 50
    python evaluate.py magicbrush MagicBrush/test --outputs another_editor            # images that are there already
    python evaluate.py curve clip-filtered-dataset --models timbrooks/instruct-pix2pix --limit 2000

magicbrush and curve keep every edited image below --output, and make only those that are missing: the same command resumes.
The first lines of protocols.py say how the files are named, the data's and those of --outputs.
"""
import argparse
import json
import re
from pathlib import Path

import torch
from tqdm import tqdm

import edit
import toy
from cli import (DTYPES, Parser, device, keep_settings, non_negative_float, number, positive_int, quiet_transformers, replace_file,
                 seed_int)
from losses import ClipScorer, clip_direction_loss, clip_similarity_loss, norm
from pictures import grid, load_image, plot, save_png
from protocols import (METRICS, PUBLISHED, PUBLISHED_CURVES, SCALES, Dino, compare, directions, load_judge, mean,
                       read_magicbrush, read_test_split, score)
from truth import judge, judge_attention
from uip2p import EditModel, delta_edit

HERE = Path(__file__).resolve().parent
COLUMNS = ("L1", "L2", "inside", "outside", "done", "right", "CLIP-T", "direction")
ATTENTION = ("A_f IoU", "A_f pointing", "A_r IoU", "A_r pointing")
SHOWN = 8                                                     # edits in a picture


# ---- the truth of the toy world ------------------------------------------------------------------------------------------

def ascend(model, scorer, edits, images, views, steps=60):
    """Images whose latents minimise L_CLIP + L_sim + half the pixel distance to the input, by Adam, with no network in
    between: how far CLIP's gradient itself leads to the edit, and how far to patterns that only fool it."""
    texts = scorer.embed_texts([e.scene.caption for e in edits]), scorer.embed_texts([e.edited.caption for e in edits])
    E_caption, E_edited = (E.repeat(max(views, 1), 1) for E in texts)
    with torch.no_grad():
        z = model.encode(images)                                                          # (B, 4, h, w)
    optimizer, generator = torch.optim.Adam([z.requires_grad_()], lr=.05), torch.Generator().manual_seed(0)
    for _ in range(steps):
        outputs = model.decode(z)
        E_input, E_output = scorer.embed_views((images, outputs), views, generator)
        loss = clip_direction_loss(E_input, E_output, E_caption, E_edited) + clip_similarity_loss(E_output, E_edited) \
            + .5 * norm(outputs - images).mean()
        optimizer.zero_grad()
        (loss * len(images)).backward()
        optimizer.step()
    return model.decode(z).detach().clamp(-1, 1)


@torch.no_grad()
def edit_by_captions(model, edits, images, steps, guidance, generator):
    """What `delta_edit` makes, which is told both captions instead of the instruction: the cycle's `--delta` learns from it."""
    image_latents = model.vae.encode(images)
    z_t = torch.randn(image_latents.shape, generator=generator)
    captions, edited_captions = ([scene.caption for scene in scenes] for scenes in zip(*[(e.scene, e.edited) for e in edits]))
    for step in model.ddim_timesteps(steps):
        t = torch.full((len(edits),), step)
        eps = delta_edit(model, z_t, t, image_latents, captions, edited_captions, guidance)
        z_t = model.ddim_step(z_t, eps, t, steps)
    return model.decode(z_t).clamp(-1, 1)


def scales(text):
    """The argparse type of two guidance scales, text and image."""
    return tuple(map(non_negative_float, text.split(":", 1) if ":" in text else (text, "")))


def evaluate_toy(args):
    if args.picture and not Path(args.picture).parent.is_dir():
        raise ValueError(f"--picture {args.picture}: there is no such folder")
    scorer = ClipScorer.from_pretrained(args.clip)
    models = {path: EditModel.from_pretrained(path) for path in args.models}
    edits = [toy.edit(args.split, i) for i in range(args.scenes)]
    images, truth = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    print(f"{args.scenes} {args.split} scenes, seed {args.seed}\n")
    shown = COLUMNS + ATTENTION * args.attention
    print("| model | s_T, s_I, steps | " + " | ".join(shown) + " |\n|---|---|" + "---|" * len(shown))
    columns = {"input": images}                               # of the picture

    def report(name, settings, outputs, editor=None):
        scores = judge(edits, images, outputs, scorer)
        if args.attention and editor:
            scores |= judge_attention(editor, edits, images, outputs)
        groups = {name: range(len(edits))}
        if args.kinds:
            groups |= {f"{name}, {kind}": range(k, len(edits), len(toy.KINDS)) for k, kind in enumerate(toy.KINDS)}
        for label, rows in groups.items():
            means = " | ".join(f"{scores[c][list(rows)].mean():.3f}" if c in scores else "" for c in shown)
            print(f"| {label} | {settings} | {means} |", flush=True)

    report("copy of the input", "", images)
    for n, (path, model) in enumerate(models.items()):
        if n == 0:
            with torch.no_grad():
                through = model.decode(model.encode(truth)).clamp(-1, 1)
            report("true edit through the VAE", "", through)
            if args.ascent:
                for views in (0, 2):
                    report(f"CLIP ascent on the latents, {views} views", "", ascend(model, scorer, edits, images, views))
        for steps in args.steps:
            for s_T, s_I in args.scales:
                generator = torch.Generator().manual_seed(args.seed)
                outputs = model.edit(images, [e.instruction for e in edits], steps, s_T, s_I, generator=generator)
                report(path, f"{s_T:g}, {s_I:g}, {steps}", outputs, model)
                columns[f"{path}: {s_T:g}, {s_I:g}, {steps}"] = outputs
            for guidance in args.captions:
                outputs = edit_by_captions(model, edits, images, steps, guidance, torch.Generator().manual_seed(args.seed))
                report(f"{path}, told both captions", f"s = {guidance:g}, {steps}", outputs)
    if args.picture:
        columns["true edit"] = truth
        rows = list(zip(*columns.values()))[:SHOWN]
        save_png(grid(rows, columns, [e.instruction for e in edits[:SHOWN]]), args.picture)


# ---- the edits of the published protocols --------------------------------------------------------------------------------

def begin(model, path, args, **given):
    """The folder of a model's edits with the settings `given` (steps, cfg_text, cfg_image), and all their settings: the
    flags, else what the model recommends, else edit.py's.  ValueError if the folder has edits with other settings."""
    usual = {name: edit.parser().get_default(name) for name in ("steps", "cfg_text", "cfg_image", "resolution")}
    names = {"text_guidance": "cfg_text", "image_guidance": "cfg_image"}
    settings = usual | {names.get(name, name): value for name, value in model.defaults.items()}
    settings |= {name: value for name, value in (given | {"resolution": args.resolution}).items() if value is not None}
    # a model that was trained further under the same name has another sum, but not one that is summed in another order
    weights = sum(p.cpu().double().abs().sum().item() for p in model.unet.parameters())
    settings |= {"model": path, "weights": f"{weights:.9g}", "data": args.data, "seed": args.seed, "device": args.device,
                 "precision": args.precision, "batch_size": args.batch_size}
    scales = "{steps}-steps-{cfg_text:g}-{cfg_image:g}".format(**settings)
    folder = args.output / re.sub(r"[^\w.]+", "-", path).strip("-.") / scales
    keep_settings(folder, settings, "**/*.png")
    print(", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    return folder, argparse.Namespace(**settings)


def make_edits(model, settings, jobs):
    """Edits (output, input, instruction), paths and a text, batch by batch, and saves the outputs.

    A batch that is there is skipped, one of which a part is there made again: outputs do not depend on interruptions."""
    for first in tqdm(range(0, len(jobs), settings.batch_size), f"batches of {settings.batch_size} edits"):
        batch = jobs[first:first + settings.batch_size]
        if all(output.is_file() for output, _, _ in batch):
            continue
        by_size = {}
        for output, source, instruction in batch:
            image = load_image(source)
            size = edit.edit_size(model, source, image.shape[1:], settings.resolution)
            by_size.setdefault(size, []).append((output, image, instruction))
        for size, same in by_size.items():
            outputs, images, instructions = zip(*same)
            for output, image in zip(outputs, edit.edit(model, images, instructions, size, settings)):
                output.parent.mkdir(exist_ok=True)
                save_png(image, output)


def check_files(files):
    """ValueError if another editor's outputs are not all there."""
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"--outputs: {len(missing)} of {len(files)} images are missing, the first is {missing[0]}")


def write(folder, name, lines, rows, picture):
    """Prints a table, and keeps it as NAME.md, its numbers as NAME.jsonl and a picture as NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".md", lines), (".jsonl", [json.dumps(row) for row in rows])):
        replace_file(folder / (name + suffix), lambda temporary: temporary.write_text("\n".join(text) + "\n"))
    save_png(picture, folder / f"{name}.png")
    print("\n" + "\n".join(lines) + f"\n\n{folder / name}.md, .jsonl, .png")


def extent(done, total, what):
    """What of a data set was used, for the table."""
    return f"all {total} {what}" if done == total else f"ONLY {done} of {total} {what} (--limit), not the published protocol"


def magicbrush(args):
    sessions = read_magicbrush(args.data)
    used = sessions[:args.limit]
    # every turn from its true input; of a chain of edits, the last
    judged = {"single-turn": [turn for session in used for turn in session], "multi-turn": [session[-1] for session in used]}
    def outputs(folder):
        return {setting: [folder / turn.output(setting) for turn in turns] for setting, turns in judged.items()}
    others = {str(folder): outputs(folder) for folder in args.outputs}
    for files in others.values():
        check_files(sum(files.values(), []))
    clip, dino = load_judge(ClipScorer, args.clip, args.device), load_judge(Dino, args.dino, args.device)
    methods = {"copy of the input": {"single-turn": [turn.input for turn in judged["single-turn"]],
                                     "multi-turn": [session[0].input for session in used]}}
    for path in args.models:
        model = EditModel.from_pretrained(path, args.device, DTYPES[args.precision])
        for steps in args.steps:
            folder, settings = begin(model, path, args, steps=steps, cfg_text=args.cfg_text, cfg_image=args.cfg_image)
            single, multi = ({turn: folder / turn.output(setting) for s in used for turn in s} for setting in judged)
            make_edits(model, settings, [(output, turn.input, turn.instruction) for turn, output in single.items()])
            for n in range(1, max(map(len, used))):           # the second turns of all sessions, then the third
                make_edits(model, settings, [(multi[s[n]], multi[s[n - 1]], s[n].instruction) for s in used if len(s) > n])
            methods[f"{path}, {settings.steps} steps"] = outputs(folder)
    methods |= others

    lines = [f"MagicBrush test, {extent(len(used), len(sessions), 'sessions')}; CLIP {args.clip}, DINO {args.dino}", "",
             f"| setting | method | {' | '.join(METRICS)} |", "|---|---|" + "---|" * len(METRICS)]
    rows = []
    for setting, turns in judged.items():
        for method, values in PUBLISHED[setting].items():
            lines.append(f"| {setting} | {method}, published | {' | '.join(f'{v:.4f}' for v in values)} ? | |")
        for method, files in methods.items():
            jobs = [(file, turn.target, turn.captions) for file, turn in zip(files[setting], turns)]
            scores = score(jobs, args.batch_size, lambda *batch: compare(*batch, clip, dino))
            lines.append(f"| {setting} | {method} | {' | '.join(f'{mean(scores, name):.4f}' for name in METRICS)} |")
            rows += [{"setting": setting, "method": method, "output": turn.output(setting)} | row
                     for turn, row in zip(turns, scores)]
    lines += ["", "?: the paper does not say which captions its CLIP-T takes; probably the global ones."]
    for setting, turns in judged.items():
        without = ", ".join(f"{sum(not turn.captions[i] for turn in turns)} {kind}" for i, kind in enumerate(("global", "local")))
        lines.append(f"Captions missing or empty, left out of CLIP-T: {setting}, of {len(turns)}: {without}.")
    shown = [[load_image(file) for file in (*(files["single-turn"][i] for files in methods.values()), turn.target)]
             for i, turn in enumerate(judged["single-turn"][:SHOWN])]
    labels = [turn.instruction for turn in judged["single-turn"][:SHOWN]]
    write(args.output, "magicbrush", lines, rows, grid(shown, [*methods, "true edit"], labels))


def curve(args):
    samples, total = read_test_split(args.data, args.limit)
    # {an editor: {a point of its curve: the folder of its outputs}}
    others = {str(folder): {f.name: f for f in sorted(folder.iterdir()) if f.is_dir()} for folder in args.outputs}
    for folder, points in others.items():
        check_files([f / sample.output for f in points.values() or [Path(folder) / "POINT"] for sample in samples])
    clip, editors = load_judge(ClipScorer, args.clip, args.device), {}
    for path in args.models:
        model = EditModel.from_pretrained(path, args.device, DTYPES[args.precision])
        for s_I in args.cfg_image:
            folder, settings = begin(model, path, args, steps=args.steps, cfg_text=args.cfg_text, cfg_image=s_I)
            make_edits(model, settings, [(folder / s.output, s.input, s.instruction) for s in samples])
            editors.setdefault(path, {})[f"s_I = {s_I}"] = folder

    lines = [f"InstructPix2Pix test split, {extent(len(samples), total, 'samples')}; CLIP {args.clip}", "",
             "| method | point | direction similarity | image similarity |", "|---|---|---|---|"]
    for method, points in PUBLISHED_CURVES.items():
        for end, (x, y) in zip(("s_I = 2.2", "s_I = 1.0"), points):
            lines.append(f"| {method}, read off the published figure | {end} | {x:.3f} | {y:.3f} |")
    rows = []
    for method, points in (editors | others).items():
        for point, folder in points.items():
            jobs = [(sample.input, folder / sample.output, sample.captions) for sample in samples]
            scores = score(jobs, args.batch_size, lambda *batch: directions(*batch, clip))
            rows.append({"method": method, "point": point, "samples": len(samples), "of": total,
                         "direction": mean(scores, "direction"), "image": mean(scores, "image")})
            lines.append(f"| {method} | {point} | {rows[-1]['direction']:.3f} | {rows[-1]['image']:.3f} |")
    measured = {m: [(row["direction"], row["image"]) for row in rows if row["method"] == m] for m in editors | others}
    published = {f"{method}, published": points for method, points in PUBLISHED_CURVES.items()}
    write(args.output, "curve", lines, rows, plot(measured, published, ("direction similarity", "image similarity")))


# ---- the commands --------------------------------------------------------------------------------------------------------

def parser():
    main = Parser("evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    p = commands.add_parser("toy", help="against the true edits of the toy world")
    p.add_argument("--models", nargs="*", default=[str(HERE / "models/toy")], help="directories of toy models")
    p.add_argument("--clip", default=str(HERE / "models/toy/clip"), help="the CLIP of done, CLIP-T and direction")
    p.add_argument("--split", choices=("validation", "test"), default="test", help="of the toy world (%(default)s)")
    p.add_argument("--scenes", type=positive_int, default=500, help="how many of its scenes (%(default)s)")
    p.add_argument("--steps", type=positive_int, nargs="+", default=[10], help="denoising steps, one or several")
    p.add_argument("--scales", nargs="+", type=scales, default=[(1.5, 1.2)], metavar="TEXT:IMAGE", help="guidance, as 1.5:1.2")
    p.add_argument("--seed", type=seed_int, default=0, help="of the noise that the edits start from")
    p.add_argument("--ascent", action="store_true", help="also what CLIP's gradient alone makes of the latents")
    p.add_argument("--captions", type=non_negative_float, nargs="+", default=[], metavar="GUIDANCE",
                   help="also the edits that both captions make, without an instruction")
    p.add_argument("--attention", action="store_true", help="also how far the attention maps point at the true edit")
    p.add_argument("--kinds", action="store_true", help="also a row for each kind of edit")
    p.add_argument("--picture", help="a .png file, for the first scenes")
    p.set_defaults(run=evaluate_toy)

    for name, run, help in (("magicbrush", magicbrush, "MagicBrush's test, single-turn and multi-turn"),
                            ("curve", curve, "direction and image similarity on InstructPix2Pix's test split")):
        p = commands.add_parser(name, help=help)
        steps, scale = number(int, 1, 999), non_negative_float
        p.add_argument("data", help="the directory of the data set")
        p.add_argument("--models", nargs="+", default=[], help="directories or hub ids")
        p.add_argument("--outputs", nargs="+", type=Path, default=[], help="folders of other editors' images")
        p.add_argument("--output", type=Path, default=Path("outputs") / name, help="of edits, table and picture (%(default)s)")
        p.add_argument("--limit", type=positive_int, help="only the first sessions or samples")
        if name == "magicbrush":
            p.add_argument("--steps", type=steps, nargs="+", default=[None], help="one or several (the model's, else 50)")
            p.add_argument("--cfg-text", type=scale, help="guidance scale s_T (the model's, else 7.5)")
            p.add_argument("--cfg-image", type=scale, help="guidance scale s_I (the model's, else 1.5)")
            p.add_argument("--clip", default="openai/clip-vit-base-patch32", help="directory or hub id (%(default)s)")
            p.add_argument("--dino", default="facebook/dino-vits16", help="directory or hub id (%(default)s)")
        else:
            p.add_argument("--steps", type=steps, default=50, help="(%(default)s)")
            p.add_argument("--cfg-text", type=scale, default=7.5, help="guidance scale s_T (%(default)s)")
            p.add_argument("--cfg-image", type=scale, nargs="+", default=SCALES, help="scales s_I, a point each (1.0 ... 2.2)")
            p.add_argument("--clip", default="openai/clip-vit-large-patch14", help="directory or hub id (%(default)s)")
        p.add_argument("--resolution", type=number(int, 16, 2048), help="of the shorter side, inside (the model's, else 512)")
        p.add_argument("--batch-size", type=positive_int, default=8, help="images at once (%(default)s)")
        p.add_argument("--seed", type=seed_int, default=0, help="of the noise, the same for every edit (%(default)s)")
        p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
        p.add_argument("--precision", choices=DTYPES, help="(fp16 on CUDA, else fp32)")
        p.set_defaults(run=run)
    return main


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    quiet_transformers()
    try:
        if args.command != "toy":
            if not args.models + args.outputs:
                raise ValueError("there is nothing to judge: give --models, --outputs, or both")
            args.precision = args.precision or ("fp16" if args.device.startswith("cuda") else "fp32")
        args.run(args)
    except torch.OutOfMemoryError:
        p.error(f"the memory of {args.device} is too small; choose a smaller --batch-size or --resolution")
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
