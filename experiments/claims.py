"""Decides the paper's claims in the toy world: trains the editors they compare, several seeds of each, and judges them.

    python -m experiments.claims                              # five seeds, two trainings side by side: some hours
    python -m experiments.claims --runs base sim attn                          # only what each loss adds
    python -m experiments.claims --seeds 0 --times 3 --output runs/longer      # one seed, thrice the steps

Every training has its folder below --output, with scores.json once it is judged: the same command resumes.  The end is
claims.md, .json and .png there.  The CLIP that judges is not the one that trained: it has another seed and another
architecture.
"""
import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import toy
import train
from cli import (Parser, about, claimed, default_device, device, errors, number, positive_int, replace_file, seed_int,
                 sweep)
from data import read_json
from edit import load_editor
from experiments.attention import measure_rule
from experiments.truth import finite, judge, judge_attention
from losses import ClipScorer
from pictures import grid, save_png
from prepare import pretrain
from uip2p import EditModel

JUDGE = Path("judge/judge")                    # the CLIP that judges, in the folder of all
STEPS, SCENES = 10, 150                        # denoising steps and test scenes of a score
FEW = 50                                       # scenes of other numbers of steps, and of several edits
SHOWN = 6                                      # edits in the picture

# {run: (its title, the arguments of train.py)}.  All else is as the toy's usual training has it.
ON = ["--model", "{start}/baseline/model", "--steps", "300"]
RUNS = {
    "baseline": ("baseline: supervised, on entangled pairs", ["--objective", "ip2p", "--steps", "3000"]),
    "scratch": ("scratch: the cycle from text-to-image, after steps of denoising",
                ["--model", f"{train.TOY}/text2image", "--warmup", "1000", "--steps", "3750"]),
    "base": ("base: from the baseline, L_CLIP + L_recon",
             [*ON, "--weights", "clip=1", "attn=0", "sim=0", "recon=1"]),
    "sim": ("sim: + L_sim", [*ON, "--weights", "clip=1", "attn=0", "sim=1", "recon=1"]),
    "attn": ("attn: + L_attn, the full loss", [*ON, "--weights", "clip=1", "attn=0.5", "sim=1", "recon=1"]),
    # What the cycle's steps would do without the cycle: as many images by the same learning rate.
    "denoise": ("denoise: from the baseline, the part that denoises the input", [*ON, "--warmup", "300"]),
    "pairs": ("pairs: from the baseline, more pairs",
              [*ON, "--objective", "ip2p", "--lr", "2e-4"]),
}
FIRST = [run for run, (_, given) in RUNS.items() if "{start}/baseline/model" not in given]    # others: from a baseline
FEWER = {"baseline": 2, "scratch": 1, "denoise": 2, "pairs": 2}       # of how many of the seeds

# the columns of the report
EDITS = ("exact", "objects", "L1", "L2", "inside", "outside", "done", "right", "CLIP-I", "CLIP-T", "direction")
MORE = ("exact, 5 steps", "exact, 20 steps", "L1, 5 steps", "L1, 20 steps", "exact, 3 turns", "L1, 3 turns",
        "round trip")
MAPS = ("AUC", "which", "A_f IoU", "A_r IoU", "agreement")


@dataclass(frozen=True)
class Claim:
    """That a score is lower (sign -1) or higher (1) for `run` than for `other`, and what the paper has for it."""
    text: str
    paper: str
    score: str
    sign: int
    run: str
    other: str


CLAIMS = (
    Claim("without supervision, nearer to the true edit than the baseline", "L1 0.112 to 0.062", "L1", -1,
          "scratch", "baseline"),
    Claim("and it follows more instructions", "figure only", "exact", 1, "scratch", "baseline"),
    Claim("the cycle undoes the baseline's bias", "figure only", "outside", -1, "attn", "baseline"),
    Claim("nearer to the true edit", "L1 0.112 to 0.062", "L1", -1, "attn", "baseline"),
    Claim("", "CLIP-I 0.852 to 0.932", "CLIP-I", 1, "attn", "baseline"),
    Claim("nearer to the caption", "CLIP-T 0.276 to 0.296", "CLIP-T", 1, "attn", "baseline"),
    Claim("and it follows more instructions", "direction 0.151 to 0.159", "exact", 1, "attn", "baseline"),
    Claim("nearer than by as many steps of denoising alone", "not made", "L1", -1, "attn", "denoise"),
    Claim("and exact more often", "not made", "exact", 1, "attn", "denoise"),
    Claim("nearer than by as many steps on pairs", "not made", "L1", -1, "attn", "pairs"),
    Claim("and exact more often", "not made", "exact", 1, "attn", "pairs"),
    Claim("three edits in turn come nearer, too", "L1 0.158 to 0.098", "L1, 3 turns", -1, "attn", "baseline"),
    Claim("and are exact more often", "not made", "exact, 3 turns", 1, "attn", "baseline"),
    Claim("L_sim preserves more", "L1 0.117 to 0.089", "L1", -1, "sim", "base"),
    Claim("and more edits are exact", "not made", "exact", 1, "sim", "base"),
    Claim("", "CLIP-I 0.878 to 0.906", "CLIP-I", 1, "sim", "base"),
    Claim("for less of the caption", "CLIP-T 0.309 to 0.301", "CLIP-T", -1, "sim", "base"),
    Claim("L_attn preserves more", "L1 0.089 to 0.062", "L1", -1, "attn", "sim"),
    Claim("and more edits are exact", "not made", "exact", 1, "attn", "sim"),
    Claim("", "CLIP-I 0.906 to 0.932", "CLIP-I", 1, "attn", "sim"),
    Claim("for less of the caption", "CLIP-T 0.301 to 0.296", "CLIP-T", -1, "attn", "sim"),
    Claim("both edits look at the same region", "figure only", "agreement", 1, "attn", "sim"),
    Claim("which is more that of the edit", "figure only", "AUC", 1, "attn", "sim"),
    Claim("and not that of other objects", "figure only", "which", 1, "attn", "sim"),
    Claim("5 steps follow as many instructions as 20: they lose less than the baseline's", "figure only",
          "lost in 5 steps", -1, "attn", "baseline"),
    Claim("edits can be undone", "the aim of the training", "round trip", -1, "attn", "baseline"))
# of Student's t, 97.5 %, for 2 to 10 seeds
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ---- the scores of one editor ----------------------------------------------------------------------------------------

def chain(split, index, turns=3, seed=0):
    """A list of edits in turn, each of the scene that the one before leaves.

    None is an `add`, which names no place: so what all of them should leave is one scene.  Every edited scene has an
    object, for the next edit."""
    rng = random.Random(f"{seed} {split} {index} chain")
    while True:
        scene, edits = toy.edit(split, index, seed).scene, []
        for kind in rng.sample(toy.KINDS[:-1], turns):
            if len(scene.objects) == 0 or (kind == "remove" and len(scene.objects) == 1):
                continue
            made = toy.random_edit(rng, scene, kind)
            if made is not None:
                edits.append(made)
                scene = made.edited
        if len(edits) == turns:
            return edits


def sample(model, images, instructions, steps=STEPS, seed=0, **scales):
    """Edits, 50 at once, at the guidance scales that the model recommends unless others are given."""
    generator, scales = torch.Generator().manual_seed(seed), model.guidance | scales
    parts = []
    for i in range(0, len(images), 50):
        part = images[i:i + 50], instructions[i:i + 50]
        parts.append(model.edit(*part, steps, generator=generator, **scales).cpu())
    return torch.cat(parts)


def measure(model, clip):
    """{score: its mean over the test scenes} of an editor."""
    edits = [toy.edit("test", i) for i in range(SCENES)]
    images, instructions = toy.render([e.scene for e in edits]), [e.instruction for e in edits]
    outputs = sample(model, images, instructions)
    scores = judge(edits, images, outputs, clip)

    # ---- other numbers of steps
    for steps in (5, 20):
        others = judge(edits[:FEW], images[:FEW], sample(model, images[:FEW], instructions[:FEW], steps), clip)
        scores |= {f"{score}, {steps} steps": others[score] for score in ("L1", "exact")}
    scores["lost in 5 steps"] = scores["exact, 20 steps"] - scores["exact, 5 steps"]

    # ---- the way back
    undone = sample(model, outputs[:FEW], [e.reverse_instruction for e in edits[:FEW]], seed=1)
    scores["round trip"] = (undone - images[:FEW]).abs().mean((1, 2, 3)) / 2

    # ---- attention, but not of edits of the background, whose mask is most of the image
    local = [i for i, e in enumerate(edits) if e.kind != "background"]
    scores |= judge_attention(model, [edits[i] for i in local], images[local], outputs[local])
    scores |= measure_rule(model, [edits[i] for i in local])

    scores |= measure_turns(model, clip)
    return {name: values.mean().item() for name, values in finite(scores).items()}


def measure_turns(model, clip):
    """The scores of three edits in turn."""
    chains = [chain("test", i) for i in range(FEW)]
    whole = [toy.Edit("chain", edits[0].scene, edits[-1].edited, "", "", "") for edits in chains]
    images = outputs = toy.render([edit.scene for edit in whole])
    for turn, edits in enumerate(zip(*chains)):
        outputs = sample(model, outputs, [e.instruction for e in edits], seed=turn)
    scores = judge(whole, images, outputs, clip)
    return {f"{score}, 3 turns": scores[score] for score in ("L1", "exact")}


# ---- the report ------------------------------------------------------------------------------------------------------

def spread(values):
    """'mean ± standard deviation' over the seeds."""
    text = f"{statistics.mean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def margin(differences):
    """Half of the 95 % interval of a mean over two seeds or more, by Student's t."""
    return T[len(differences) - 2] * statistics.stdev(differences) / len(differences) ** 0.5


def verdict(differences, sign):
    """Of a claim, from run - other of each seed: whether the interval of their mean leaves zero, and to which side."""
    if len(differences) < 2:
        return "one seed: none"
    mean = statistics.mean(differences)
    if abs(mean) <= margin(differences):
        return "not supported"
    return "supported" if mean * sign > 0 else "opposite"


def table(columns, rows):
    """The lines of a table of {name: {column: [a value for each seed]}}."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(spread(row[column]) for column in columns) + " |")
    return [*lines, ""]


def report(scores, references):
    """The lines of claims.md, from {run: {score: [a value for each seed]}} and {what is no run: {score: value}}."""
    seeds = max(len(row["L1"]) for row in scores.values())
    claims = [claim for claim in CLAIMS if {claim.run, claim.other} <= scores.keys()]
    rows = {RUNS[run][0]: row for run, row in scores.items()}
    single = {name: {column: [row[column]] for column in EDITS} for name, row in references.items()}
    few = ", ".join(f"{run} {len(scores[run]['L1'])}" for run in FEWER if run in scores)
    lines = [f"Seeds of the training: {seeds} ({few}), mean ± standard deviation; {SCENES} held-out scenes,",
             f"{STEPS} steps; in the second table the first {FEW} scenes.  The same for all are the CLIP, VAE and UNet",
             "that they start from, and the judge.", "",
             *table(EDITS, single | rows), *table(MORE, rows), *table(MAPS, rows),
             "The column *the paper* has MagicBrush's photographs, judged by CLIP ViT-B/32, after 11,000 steps of 768 "
             "images; its baseline", "is InstructPix2Pix.  So only the sign of a difference can be compared with it, "
             "not its size.", "",
             f"Verdicts by 95 % intervals (Student's t, paired by seed); of {len(claims)} such, one would miss by "
             "chance.  Where a run has", "fewer seeds, each is compared with several, and the interval leaves out how "
             "it varies itself.", "",
             "| claim | the paper | score, of - | mean | 95 % | seeds for it | verdict |", "|---" * 7 + "|"]
    for claim in claims:
        pairs = zip(scores[claim.run][claim.score], itertools.cycle(scores[claim.other][claim.score]))
        differences = [ours - other for ours, other in pairs]     # of fewer seeds: of the same baseline
        either_side = f"± {margin(differences):.3f}" if len(differences) > 1 else ""
        agree = sum(difference * claim.sign > 0 for difference in differences)
        lines.append(f"| {claim.text} | {claim.paper} | {claim.score}: {claim.run} - {claim.other} | "
                     f"{statistics.mean(differences):+.3f} | {either_side} | {agree} of {len(differences)} | "
                     f"{verdict(differences, claim.sign)} |")
    return lines


def references(clip):
    """What copying the input scores, and the true edit that only went through the VAE."""
    edits = [toy.edit("test", i) for i in range(SCENES)]
    images, truth = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    model = EditModel.from_pretrained(train.TOY)
    with torch.no_grad():
        through = model.decode(model.encode(truth)).clamp(-1, 1)
    found = {}
    for name, outputs in (("copy of the input", images), ("true edit through the VAE", through)):
        scores = judge(edits, images, outputs, clip)
        found[name] = {score: values.mean().item() for score, values in scores.items()}
    return found


def picture(folder, runs):
    """The first test scenes, as each run of the first seed edits them."""
    edits = [toy.edit("test", i) for i in range(SHOWN)]
    images, instructions = toy.render([e.scene for e in edits]), [e.instruction for e in edits]
    columns = {"input": images}
    for name in runs:
        model = load_editor(folder / name / "model")
        columns[name] = sample(model, images, instructions)
    columns["true edit"] = toy.render([e.edited for e in edits])
    return grid(list(zip(*columns.values())), list(columns), instructions)


# ---- the trainings ---------------------------------------------------------------------------------------------------

def arguments(name, seed, start, times, batch_size):
    """The arguments of train.py for a run, from the baseline in the folder `start`.  times: of RUNS' steps, and
    batch_size: images in a step, of all but the baseline."""
    given = [argument.replace("{start}", str(start)) for argument in RUNS[name][1]]
    if name != "baseline":
        for flag in {"--steps", "--warmup"}.intersection(given):
            at = given.index(flag) + 1
            given[at] = str(int(given[at]) * times)
        given += ["--batch-size", str(batch_size)]
    return [*given, "--seed", str(seed), "--save-every", "150"]


def fulfil(name, folder, given, judge_path, on):
    """Trains a run and judges it; what is there is kept.  All output goes into the run's log.txt."""
    output = folder / name
    file = output / "scores.json"
    output.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        with open(output / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                train.main([*given, "--device", on, "--output", str(output)])
            except SystemExit:
                raise ValueError(f"a training stopped; the end of {output / 'log.txt'} says why") from None
            clip = ClipScorer.from_pretrained(judge_path)
            scores = measure(load_editor(output / "model", on), clip)
        content = json.dumps({"given": given, "scores": scores}, indent=1)
        replace_file(file, lambda temporary: temporary.write_text(content))
    if read_json(file).get("given") != given:
        raise ValueError(f"{output} holds a run with other arguments: choose another --output, or remove it")


def train_all(folders, args):
    """Trains and judges all runs of all seeds; folders: {seed: its folder}.  The first that fails ends it."""
    baselines = itertools.cycle(list(folders)[:FEWER["baseline"]])
    starts = dict(zip(folders, baselines))     # {seed: that of its baseline}
    wanted = [(name, seed) for name in args.runs for seed in list(folders)[:FEWER.get(name)]]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(os.cpu_count() // args.jobs, 1)))        # of each training
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    jobs = {}                                  # {a training: its run and seed}
    with (ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool,
          tqdm(total=len(wanted), desc="trainings") as bar):

        def begin(runs):
            for name, seed in runs:
                given = arguments(name, seed, folders[starts[seed]], args.times, args.batch_size)
                job = pool.submit(fulfil, name, folders[seed], given, args.output / JUDGE, args.device)
                jobs[job] = name, seed

        begin([(name, seed) for name, seed in wanted if name in FIRST])
        try:
            while jobs:
                for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                    name, seed = jobs.pop(job)
                    job.result()                                  # or its error
                    bar.update()
                    if name == "baseline":
                        begin([(run, of) for run, of in wanted if run not in FIRST and starts[of] == seed])
        finally:
            pool.shutdown(cancel_futures=True)                    # after an error, those that have begun still end


def study(args):
    print(f"seeds {', '.join(map(str, args.seeds))} of {len(args.runs)} trainings, {args.jobs} side by side on "
          f"{args.device}, below {args.output}")
    sweep(args.output)
    if not (args.output / JUDGE / "model.safetensors").is_file():
        pretrain.main(["--parts", "judge", "--seed", "1", "--output", str(args.output / JUDGE.parent)])
    folders = {seed: args.output / f"seed-{seed}" for seed in args.seeds}
    train_all(folders, args)

    scores = {}
    for run in args.runs:
        of = args.seeds[:FEWER.get(run)]
        files = [folders[seed] / run / "scores.json" for seed in of]
        with about(f"a scores.json of {run} is damaged; remove it, and it is made again"):
            rows = [read_json(file)["scores"] for file in files]
            scores[run] = {name: [row[name] for row in rows] for name in rows[0]}
    lines = report(scores, references(ClipScorer.from_pretrained(args.output / JUDGE)))
    content = json.dumps({"seeds": args.seeds, "scores": scores}, indent=1)
    for suffix, text in (("md", "\n".join(lines)), ("json", content)):
        replace_file(args.output / f"claims.{suffix}", lambda temporary: temporary.write_text(text + "\n"))
    save_png(picture(folders[args.seeds[0]], args.runs), args.output / "claims.png")
    print("\n" + "\n".join(lines))


def main(argv=None):
    p = Parser("experiments.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=seed_int, nargs="+", default=list(range(5)), help="of the trainings (0 1 2 3 4)")
    p.add_argument("--runs", choices=RUNS, nargs="+", default=list(RUNS), metavar="RUN",
                   help=f"of {', '.join(RUNS)}, and the baseline (all)")
    p.add_argument("--times", type=number(int, 1, 100), default=1, help="the steps of the cycles (%(default)s)")
    p.add_argument("--batch-size", type=positive_int, default=8, help="images in a step of the cycles (%(default)s)")
    p.add_argument("--jobs", type=number(int, 1, 64), default=2, help="trainings side by side (%(default)s)")
    p.add_argument("--output", type=Path, default=Path("runs/claims"), help="(%(default)s)")
    p.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    args = p.parse_args(argv)
    if not len(set(args.seeds)) == len(args.seeds) <= len(T) + 1:
        p.error(f"--seeds: up to {len(T) + 1} different ones")
    args.runs = [run for run in RUNS if run == "baseline" or run in args.runs]
    with errors(p), claimed(args.output):
        try:
            study(args)
        except BrokenProcessPool as error:
            raise ValueError(str(error)) from None


if __name__ == "__main__":
    main()
