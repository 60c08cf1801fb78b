"""Decides the paper's claims in the toy world: trains the editors they compare, several seeds of each, and asks the truth.

    python claims.py                              # five seeds, two trainings side by side: two hours of two cores
    python claims.py --seeds 0 --output runs/one  # one seed: half an hour

Every training has its folder below --output, with scores.json once it is judged: the same command resumes.  The end is
claims.md, .json and .png there.  The CLIP that judges is not the one that trained: another seed, another architecture.
"""
import contextlib
import json
import os
import statistics
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import pretrain
import toy
import train
from cli import Parser, device, positive_int, quiet_transformers, replace_file, seed_int
from losses import ClipScorer
from pictures import grid, save_png
from truth import judge, judge_attention
from uip2p import EditModel

SHOWN, STEPS, SCENES = 6, 15, 150                             # edits in the picture; denoising steps and test scenes of a score
STRONG = dict(text_guidance=3., image_guidance=1.5)           # beside the scales that the toy's models recommend, 1.5 and 1.2
ON = ["--model", "{folder}/baseline/model", "--steps", "300"]
# the paper's weights, and CLIP sees the image as it is; all else is the toy's usual cycle, with the straight-through edit
CYCLE = [*ON, "--sharp", "5", "--views", "0", "--weights"]
RUNS = {"baseline": ("baseline: supervised, on entangled pairs", ["--objective", "ip2p"]),
        "scratch": ("scratch: the cycle from text-to-image, with L_delta", ["--steps", "300"]),
        "base": ("base: from the baseline, L_CLIP + L_recon", [*CYCLE, "1", "0", "0", "1"]),
        "sim": ("sim: + L_sim", [*CYCLE, "1", "0", "1", "1"]),
        "attn": ("attn: + L_attn, the full loss", [*CYCLE, "1", ".5", "1", "1"]),
        # what the cycle's steps would do without the cycle: as many images by the same learning rate
        "denoise": ("denoise: from the baseline, the part that denoises the input",
                    [*ON, "--objective", "identity", "--batch-size", "8", "--lr", "1e-4"]),
        "pairs": ("pairs: from the baseline, more pairs", [*ON, "--objective", "ip2p", "--batch-size", "16", "--lr", "1e-4"])}
FIRST = ("baseline", "scratch")                               # the others start from the baseline
EDITS = ("L1", "L2", "inside", "outside", "done", "right", "CLIP-I", "CLIP-T", "direction")
MORE = ("L1, 5 steps", "L1, 50 steps", "right, 5 steps", "right, 50 steps", "L1, strong", "right, strong", "L1, 3 turns",
        "right, 3 turns", "round trip")
MAPS = ("A_f IoU", "A_f pointing", "A_r IoU", "A_r pointing", "agreement", "mask")


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
    Claim("without supervision, nearer to the true edit than the baseline", "L1 .112 to .062", "L1", -1, "scratch", "baseline"),
    Claim("and it follows more instructions", "figure only", "right", 1, "scratch", "baseline"),
    Claim("the cycle undoes the baseline's bias", "figure only", "outside", -1, "attn", "baseline"),
    Claim("nearer to the true edit", "L1 .112 to .062", "L1", -1, "attn", "baseline"),
    Claim("", "CLIP-I .852 to .932", "CLIP-I", 1, "attn", "baseline"),
    Claim("nearer to the caption", "CLIP-T .276 to .296", "CLIP-T", 1, "attn", "baseline"),
    Claim("and it follows more instructions", "direction .151 to .159", "right", 1, "attn", "baseline"),
    Claim("nearer than by as many steps of denoising alone", "not made", "L1", -1, "attn", "denoise"),
    Claim("and right more often", "not made", "right", 1, "attn", "denoise"),
    Claim("nearer than by as many steps on pairs", "not made", "L1", -1, "attn", "pairs"),
    Claim("and right more often", "not made", "right", 1, "attn", "pairs"),
    Claim("three edits in turn come nearer, too", "L1 .158 to .098", "L1, 3 turns", -1, "attn", "baseline"),
    Claim("and are right more often", "not made", "right, 3 turns", 1, "attn", "baseline"),
    Claim("L_sim preserves more", "L1 .117 to .089", "L1", -1, "sim", "base"),
    Claim("", "CLIP-I .878 to .906", "CLIP-I", 1, "sim", "base"),
    Claim("for less of the caption", "CLIP-T .309 to .301", "CLIP-T", -1, "sim", "base"),
    Claim("L_attn preserves more", "L1 .089 to .062", "L1", -1, "attn", "sim"),
    Claim("", "CLIP-I .906 to .932", "CLIP-I", 1, "attn", "sim"),
    Claim("for less of the caption", "CLIP-T .301 to .296", "CLIP-T", -1, "attn", "sim"),
    Claim("both edits look at the same region", "figure only", "agreement", 1, "attn", "sim"),
    Claim("which is that of the edit: more of it than the whole image is", "figure only", "A_f IoU", 1, "attn", "mask"),
    Claim("5 steps follow as many instructions as 50: they lose less than the baseline's", "figure only", "lost in 5 steps", -1,
          "attn", "baseline"),
    Claim("edits can be undone", "the aim of the training", "round trip", -1, "attn", "baseline"))
# of Student's t, 97.5 %, for 2 to 10 seeds
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ---- one training --------------------------------------------------------------------------------------------------------

def fulfil(name, folder, seed, judge_path, on):
    """Trains a run of a seed and judges it; what is there is kept.  All output goes into the run's log.txt."""
    output = folder / name
    given = [a.format(folder=folder) for a in RUNS[name][1]] + ["--seed", str(seed), "--precision", "bf16", "--device", on]
    file = output / "scores.json"
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if not file.is_file():
            quiet_transformers()
            try:
                train.main([*given, "--output", str(output)])
            except SystemExit:
                raise ValueError(f"a training stopped; the end of {output / 'log.txt'} says why") from None
            scores = measure(EditModel.from_pretrained(output / "model", on), ClipScorer.from_pretrained(judge_path))
            replace_file(file, lambda temporary: temporary.write_text(json.dumps({"given": given, "scores": scores}, indent=1)))
    if json.loads(file.read_text())["given"] != given:
        raise ValueError(f"{output} holds a run with other arguments: choose another --output, or remove it")


def sample(model, images, instructions, steps=STEPS, seed=0, **scales):
    """Edits, 50 at once, at the guidance scales that the model recommends unless others are given."""
    generator, scales = torch.Generator().manual_seed(seed), model.guidance | scales
    parts = [model.edit(images[i:i + 50], instructions[i:i + 50], steps, generator=generator, **scales).cpu()
             for i in range(0, len(images), 50)]
    return torch.cat(parts)


def measure(model, scorer):
    """{score: its mean over the test scenes} of an editor."""
    edits = [toy.edit("test", i) for i in range(SCENES)]
    instructions, images = [e.instruction for e in edits], toy.render([e.scene for e in edits])
    outputs = sample(model, images, instructions)
    every = judge(edits, images, outputs, scorer)
    for name, settings in (("5 steps", dict(steps=5)), ("50 steps", dict(steps=50)), ("strong", STRONG)):
        scores = judge(edits, images, sample(model, images, instructions, **settings), scorer)
        every |= {f"{score}, {name}": scores[score] for score in ("L1", "right")}
    every["lost in 5 steps"] = every["right, 50 steps"] - every["right, 5 steps"]
    undone = sample(model, outputs, [e.reverse_instruction for e in edits], seed=1)
    every["round trip"] = (undone - images).abs().mean((1, 2, 3)) / 2

    local = [i for i, e in enumerate(edits) if e.kind != "background"]    # whose mask is most of the image
    every |= judge_attention(model, [edits[i] for i in local], images[local], outputs[local])

    chains = [toy.chain("test", i) for i in range(SCENES)]
    whole = [toy.Edit("chain", chain[0].scene, chain[-1].edited, "", "", "") for chain in chains]
    images = outputs = toy.render([chain[0].scene for chain in chains])
    for turn, made in enumerate(zip(*chains)):
        outputs = sample(model, outputs, [e.instruction for e in made], seed=turn)
    scores = judge(whole, images, outputs, scorer)
    every |= {f"{score}, 3 turns": scores[score] for score in ("L1", "right")}
    return {name: values.mean().item() for name, values in every.items()}


# ---- all of them, and what they say --------------------------------------------------------------------------------------

def spread(values):
    """'mean ± standard deviation' over the seeds."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def margin(differences):
    """Half of the 95 % interval of a mean over two seeds or more, by Student's t."""
    return T[len(differences) - 2] * statistics.stdev(differences) / len(differences) ** .5


def verdict(differences, sign):
    """Of a claim, from run - other of each seed: whether the interval of their mean leaves zero, and on which side."""
    if len(differences) < 2:
        return "one seed: none"
    mean = statistics.mean(differences)
    if abs(mean) <= margin(differences):
        return "not supported"
    return "supported" if mean * sign > 0 else "opposite"


def report(scores, references):
    """The lines of claims.md, from {run: {score: [a value for each seed]}} and {what is no run: {score: value}}."""
    seeds = len(scores["baseline"]["L1"])
    def table(columns, rows):
        return ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|",
                *(f"| {name} | " + " | ".join(spread(row[c]) for c in columns) + " |" for name, row in rows.items()), ""]
    rows = {title: scores[run] for run, (title, _) in RUNS.items()}
    lines = [f"{seeds} seeds of the training, mean ± standard deviation over them; the same for all are the CLIP, VAE and UNet that",
             f"they start from, the judge and its {SCENES} held-out scenes.  {STEPS} steps unless a column says otherwise.", "",
             *table(EDITS, {name: {c: [row[c]] for c in EDITS} for name, row in references.items()} | rows),
             *table(MORE, rows), *table(MAPS, rows),
             f"Verdicts by 95 % intervals (Student's t, paired by seed); of {len(CLAIMS)} such, one would miss by chance.", "",
             "| claim | the paper | score, of - | mean | 95 % | seeds for it | verdict |", "|---|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        other = scores[claim.run]["mask"] if claim.other == "mask" else scores[claim.other][claim.score]
        differences = [a - b for a, b in zip(scores[claim.run][claim.score], other)]
        either_side = f"± {margin(differences):.3f}" if seeds > 1 else ""
        agree = sum(d * claim.sign > 0 for d in differences)
        lines.append(f"| {claim.text} | {claim.paper} | {claim.score}: {claim.run} - {claim.other} | "
                     f"{statistics.mean(differences):+.3f} | {either_side} | {agree} of {seeds} | {verdict(differences, claim.sign)} |")
    return lines


def references(scorer):
    """What copying the input scores, and the true edit that only went through the VAE."""
    edits = [toy.edit("test", i) for i in range(SCENES)]
    images, truth = toy.render([e.scene for e in edits]), toy.render([e.edited for e in edits])
    model = EditModel.from_pretrained(train.TOY["model"])
    with torch.no_grad():
        outputs = {"copy of the input": images, "true edit through the VAE": model.decode(model.encode(truth)).clamp(-1, 1)}
    return {name: {score: values.mean().item() for score, values in judge(edits, images, output, scorer).items()}
            for name, output in outputs.items()}


def picture(folder):
    """The first test scenes, as each run of a seed edits them."""
    edits = [toy.edit("test", i) for i in range(SHOWN)]
    images, instructions = toy.render([e.scene for e in edits]), [e.instruction for e in edits]
    columns = {"input": images}
    columns |= {name: sample(EditModel.from_pretrained(folder / name / "model"), images, instructions) for name in RUNS}
    columns["true edit"] = toy.render([e.edited for e in edits])
    return grid(list(zip(*columns.values())), columns, instructions)


def study(args):
    judge_path = args.output / "judge"
    print(f"{len(args.seeds)} seeds of {len(RUNS)} trainings, {args.jobs} side by side on {args.device}, below {args.output}")
    if not (judge_path / "model.safetensors").is_file():
        pretrain.main(["--parts", "judge", "--seed", "1", "--precision", "bf16", "--output", str(args.output)])
    folders = {seed: args.output / f"seed-{seed}" for seed in args.seeds}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(os.cpu_count() // args.jobs, 1)))     # of each training
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with (ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool,
          tqdm(total=len(RUNS) * len(folders), desc="trainings") as bar):
        def begin(names, seed):
            return {pool.submit(fulfil, name, folders[seed], seed, judge_path, args.device): (name, seed) for name in names}
        jobs = {}
        for seed in args.seeds:
            jobs |= begin(FIRST, seed)
        while jobs:
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                name, seed = jobs.pop(job)
                if job.exception():
                    pool.shutdown(cancel_futures=True)        # those that have begun still end
                    raise job.exception()
                bar.update()
                if name == "baseline":
                    jobs |= begin([run for run in RUNS if run not in FIRST], seed)
    scores = {}
    for run in RUNS:
        rows = [json.loads((folder / run / "scores.json").read_text())["scores"] for folder in folders.values()]
        scores[run] = {name: [row[name] for row in rows] for name in rows[0]}
    lines = report(scores, references(ClipScorer.from_pretrained(judge_path)))
    for suffix, text in (("md", "\n".join(lines)), ("json", json.dumps({"seeds": args.seeds, "scores": scores}, indent=1))):
        replace_file(args.output / f"claims.{suffix}", lambda temporary: temporary.write_text(text + "\n"))
    save_png(picture(folders[args.seeds[0]]), args.output / "claims.png")
    print("\n" + "\n".join(lines))


def main(argv=None):
    p = Parser("claims.py", description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=seed_int, nargs="+", default=list(range(5)), help="of the trainings (0 1 2 3 4)")
    p.add_argument("--jobs", type=positive_int, default=2, help="trainings side by side (%(default)s)")
    p.add_argument("--output", type=Path, default=Path("runs/claims"), help="(%(default)s)")
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = p.parse_args(argv)
    if not len(set(args.seeds)) == len(args.seeds) <= len(T) + 1:
        p.error(f"--seeds: up to {len(T) + 1} different ones")
    quiet_transformers()
    try:
        study(args)
    except (ValueError, OSError, BrokenProcessPool) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
