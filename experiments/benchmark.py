"""What editing and training cost on this machine, with random weights of SD 1.5's size or the toy's: no download.

    python -m experiments.benchmark --size toy
    python -m experiments.benchmark --size sd15 --output sd15.json
    python -m experiments.benchmark --save random-sd15   # only writes the model and its CLIP, for edit.py and train.py

FLOPs are counted on the same networks without data.  The machine's peak is what a large matrix product reaches.
"""
import argparse
import copy
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import train
from checkpoint import new_files
from cli import (DTYPES, Parser, autocast, claimed, default_device, device, errors, peak_memory, positive_int,
                 replace_file)
from data import Batch, read_json
from losses import ClipScorer
from uip2p import TIMESTEPS, EditModel
from unet import SD15, UNet
from vae import SD15_VAE, VAE

TOY = Path(train.TOY)
# the texts and images of CLIP ViT-L/14
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 49408}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "patch_size": 14}
SCALES = 7.5, 1.5                              # guidance of the edits
STEPS = 1, 5, 15, 50                           # of the edits
EDITED = 1, 8                                  # images at once
BATCHES = 1, 4, 8, 16, 64, 256                 # of training, to the largest that fits
BATCH = 16                                     # whose parts are measured
REPEATS, FAST, SLOW = 5, 0.2, 10               # below FAST s 3 times as many; above SLOW s 1, not warmed up
COMPILING = 60                                 # seconds, about, before a compiled edit is fast
COLUMNS = "what", "batch", "s", "spread", "images/s", "GiB", "TFLOP", "TFLOP/s", "of peak", "of plain"
PERCENT = "spread", "of peak", "of plain"


# ---- what is measured ------------------------------------------------------------------------------------------------

def random_model(size, where):
    """(EditModel, ClipScorer) with random float32 weights: the toy's, or InstructPix2Pix's and CLIP ViT-L/14's."""
    torch.manual_seed(0)
    if size == "toy":
        configs = [read_json(TOY / "unet/config.json"), read_json(TOY / "vae/config.json"),
                   CLIPTextConfig.from_pretrained(TOY / "text_encoder"), CLIPConfig.from_pretrained(TOY / "clip")]
    else:
        configs = [SD15, SD15_VAE, CLIPTextConfig(**TEXT),
                   CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=768)]
    with torch.device(where):
        parts = [network(config) for network, config in zip((UNet, VAE, CLIPTextModel, CLIPModel), configs)]
    for part in parts:
        part.requires_grad_(False).eval()
    for part in parts[:2]:
        part.to(memory_format=torch.channels_last)
    unet, vae, text_encoder, clip = parts
    length = text_encoder.config.max_position_embeddings
    tokenizer = CLIPTokenizer.from_pretrained(TOY / "tokenizer", model_max_length=length)
    return EditModel(unet, vae, text_encoder, tokenizer, {"steps_offset": 1}), ClipScorer(clip, tokenizer)


@torch.no_grad()
def plain_edit(model, images, instructions, steps, text_guidance, image_guidance, noise):
    """The reference, `EditModel.edit` in one function."""
    image = model.vae.encode(images.to(model.device, model.dtype))            # (B, 4, h, w)
    no_text = model.encode_text([""] * len(images))
    context = torch.cat([model.encode_text(instructions), no_text, no_text])  # (3B, L, D)
    image = torch.cat([image, image, torch.zeros_like(image)])                # (3B, 4, h, w)
    z_t = noise.to(image)
    for t in model.ddim_timesteps(steps):
        t = torch.full((len(z_t),), t, device=model.device)
        x = torch.cat([z_t.repeat(3, 1, 1, 1), image], dim=1)                 # (3B, 8, h, w)
        e_image_text, e_image, e_none = model.unet(x, t.repeat(3), context).chunk(3)
        eps = e_none + image_guidance * (e_image - e_none) + text_guidance * (e_image_text - e_image)
        z_t = model.ddim_step(z_t, eps, t, TIMESTEPS // steps)
    return model.decode(z_t).clamp(-1, 1)


def count(run):
    """The FLOPs of run(), which works on the meta device; the fused attention counts as the explicit one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


# ---- the table -------------------------------------------------------------------------------------------------------

class Table:
    """Times what it is given while `budget` seconds last, prints it line by line, and keeps it for the JSON file."""

    def __init__(self, where, budget):
        self.where, self.cuda, self.rows, self.end = where, where.startswith("cuda"), [], time.time() + budget
        print(f"{COLUMNS[0]:44}" + "".join(f"{name:>10}" for name in COLUMNS[1:]))

    def machine(self, dtype):
        """Measures the machine's peak in a precision, by a large matrix product."""
        self.peak = self.rate = float("inf")   # FLOP/s: the peak, and those of the line before, to plan by
        n = 8192 if self.cuda else 2048
        a, b = torch.randn(2, n, n, device=self.where).to(dtype)
        self.line(f"matrix product of {n}x{n}, {dtype}", None, lambda: a @ b, 2 * n ** 3)
        self.peak = 2 * n ** 3 / self.fastest
        self.rate = self.peak / 2
        print(f"the machine's peak: {self.peak / 1e12:.3g} TFLOP/s", flush=True)

    def line(self, what, batch, run, flops=0, reserve=0):
        """Measures run(), which computes so many FLOPs: the median of its seconds, or None if it does not fit into
        memory or would not end `reserve` seconds before the time is up."""
        return self.lines(batch, [(what, lambda: None, run, flops)], reserve)[0]

    def lines(self, batch, entries, reserve=0):
        """The same for several (what, prepare, run, flops), in turns, because a machine may be slow for a while.  The
        first of several is *plain*: the others are compared with it, turn by turn."""
        # ---- how often
        guess, left = sum(flops for *_, flops in entries) / self.rate, self.end - reserve - time.time()
        repeats = 3 * REPEATS if guess < FAST * len(entries) else REPEATS
        slow = guess > SLOW * len(entries) or guess * (1 + repeats) > left
        rows = [{"what": what, "batch": batch, "times": []} for what, *_ in entries]
        if guess and guess > left:
            for row in rows:
                row["skipped"] = "not measured: no time"
        everything = list(zip(rows, entries))
        warmed = everything
        if slow:                               # of several, only plain is warmed up
            repeats, warmed = 1, everything[:1] if len(entries) > 1 else []

        # ---- run
        for turn in [warmed] + [everything] * repeats:
            for row, (_, prepare, run, _) in turn:
                if "skipped" not in row:
                    prepare()
                    self.measure(row, run)
        for row, _ in warmed:
            row["times"] = row["times"][1:]

        # ---- print
        plain = rows[0]["times"]
        for row, (*_, flops) in everything:
            if "skipped" not in row:
                self.fill(row, flops)
                if row is not rows[0] and plain:
                    row["of plain"] = statistics.median(t / p for t, p in zip(row["times"], plain))
            self.add(row)
        return [row.get("s") for row in rows]

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize(self.where)

    def seconds(self, run):
        self.wait()                            # for what prepared it
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def measure(self, row, run):
        """Adds the seconds of run() to the times of a row, with the peak of the memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.where)
        elif os.path.exists("/proc/self/clear_refs"):
            Path("/proc/self/clear_refs").write_text("5")         # Linux begins a new peak
        try:
            row["times"].append(self.seconds(run))
            row["GiB"] = peak_memory(self.where)
        except torch.OutOfMemoryError:
            row["skipped"] = "does not fit"

    def fill(self, row, flops):
        """The columns that follow from the times of a row."""
        times = row["times"]
        row["s"] = s = statistics.median(times)
        self.fastest = min(times)
        if len(times) > 1:
            row["spread"] = (max(times) - min(times)) / s
        if row["batch"]:
            row["images/s"] = row["batch"] / s
        if flops:
            self.rate = flops / s
            row |= {"TFLOP": flops / 1e12, "TFLOP/s": self.rate / 1e12, "of peak": self.rate / self.peak or None}

    def add(self, row):
        """Prints and keeps a row: some of the COLUMNS, or why it is skipped."""
        del row["times"]
        self.rows.append(row)
        cells = []
        for name in COLUMNS[2:]:
            value, kind = row.get(name), ".0%" if name in PERCENT else ".3g"
            cells.append("" if value is None else f"{value:{kind}}")
        if "skipped" in row:
            cells = [row["skipped"]]
        print(f"{row['what']:44}{row['batch'] or '':>10}" + "".join(f" {cell:>9}" for cell in cells), flush=True)

    def bottleneck(self, whole, parts):
        """Prints and keeps which of the parts, [(what, times in the whole, seconds)], takes the largest share."""
        if not all(seconds for _, _, seconds in parts):           # there was no time for one
            return
        costs = {what: times * seconds for what, times, seconds in parts}
        largest = max(costs, key=costs.get)
        share = costs[largest] / sum(costs.values())
        self.rows.append({"bottleneck of": whole, "is": largest, "share": share})
        print(f"the bottleneck of {whole}: {largest}, {share:.0%} of the time")


# ---- training --------------------------------------------------------------------------------------------------------

def training_parts(args):
    """The loss of a training step, and what it consists of, {name: (how often, function)}.  Each is a function of a
    model, a CLIP and the number of images; the images are empty."""
    def zeros(model, batch, channels, side):
        return torch.zeros(batch, channels, side, side, device=model.device, requires_grad=True)

    def loss(model, clip, batch):
        images, texts = zeros(model, batch, 3, args.resolution).detach(), ["make it snow"] * batch
        samples = Batch(images, texts, texts, texts, texts)
        return train.compute_losses(model, clip, samples, args, torch.Generator())["loss"]

    def unet(model, clip, batch):
        x = zeros(model, batch, 8, args.resolution // model.vae.factor)
        t = torch.full((batch,), 500, device=model.device)
        return model.unet(x, t, model.encode_text(["make it snow"] * batch), [])

    def decode(model, clip, batch):
        return model.vae.decode(zeros(model, batch, 4, args.resolution // model.vae.factor))

    def embed(model, clip, batch):
        return clip.embed_images(zeros(model, batch, 3, args.resolution))

    # Two edits and the denoising.
    return loss, {"UNet and its backward": (3, unet), "VAE decode and its backward": (2, decode),
                  "CLIP and its backward": (3, embed)}


def backward(args, part, model, clip, batch):
    with autocast(args):
        loss = part(model, clip, batch).float().square().mean()
    loss.backward()


def training(table, size, which, batches, parts_of, reserve):
    """The lines of train.py's step of the cycle, of 256x256 or the toy's 32x32; for the batch `parts_of` its parts."""
    # ---- the networks
    gc.collect()                               # those of the lines before
    flags = [] if size == "toy" else ["--data", "photos", "--precision", "bf16"]
    _, args = train.parse(["--device", table.where, "--train", which, *flags])
    meta, real = random_model(size, "meta"), random_model(size, table.where)
    meta[1].clip.set_attn_implementation("eager")                 # the other asks for values
    train.prepare(*meta, argparse.Namespace(**vars(args) | {"precision": "fp32"}))    # autocast leaves meta as it is
    weights = train.prepare(*real, args)
    average = copy.deepcopy(real[0].unet).to("cpu")
    optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=train.WEIGHT_DECAY, fused=True)
    loss, parts = training_parts(args)

    def cost(part):
        return count(lambda: backward(args, part, *meta, 2)) / 2

    def update():
        torch.nn.utils.clip_grad_norm_(weights, train.MAX_NORM)
        optimizer.step()

    def step(batch):
        backward(args, loss, *real, batch)
        update()
        optimizer.zero_grad()

    # ---- measuring
    name, flops = f"training step, {which}", cost(loss)
    for batch in batches:
        if not table.line(name, batch, functools.partial(step, batch), batch * flops, reserve):
            break
        if batch == parts_of:
            measured = []
            for what, (times, part) in parts.items():
                run = functools.partial(backward, args, part, *real, batch)
                measured.append((what, times, table.line(what, batch, run, batch * cost(part), reserve)))
            measured.append(("clipping, AdamW", 1, table.line("clipping, AdamW", batch, update)))
            table.bottleneck(f"{name}, batch {batch}", measured)
    table.line(f"moving average on the host, each {train.AVERAGE_EVERY}th step", None,
               lambda: train.update_average(average, real[0].unet, 1))


# ---- editing ---------------------------------------------------------------------------------------------------------

def edit_parts(table, model, meta, side):
    """The lines of the parts of an edit -> the FLOPs of the UNet, of encoding and of decoding, each for one image."""
    latent = side // model.vae.factor

    def zeros(m, *shape):
        return torch.zeros(shape, device=m.device, dtype=m.dtype)

    def unet(m, batch):
        context = zeros(m, batch, m.tokenizer.model_max_length, m.unet.config["cross_attention_dim"])
        return m.unet(zeros(m, batch, 8, latent, latent), torch.full((batch,), 500, device=m.device), context)

    def encode(m, batch):
        return m.vae.encode(zeros(m, batch, 3, side, side))

    def decode(m, batch):
        return m.vae.decode(zeros(m, batch, 4, latent, latent))

    parts = []
    with torch.no_grad():
        cost = {part: count(lambda: part(meta, 1)) for part in (unet, encode, decode)}
        for what, batch, times, part in (("UNet forward", 1, 0, unet), ("UNet forward, three branches", 3, 50, unet),
                                         ("VAE encode", 1, 1, encode), ("VAE decode", 1, 1, decode)):
            run = functools.partial(part, model, batch)
            parts.append((what, times, table.line(what, batch, run, batch * cost[part])))
    table.bottleneck("an edit of 50 steps", parts)
    return cost.values()


def edits(table, size, dtype):
    """The lines of editing, of 512x512 or the toy's 32x32."""
    gc.collect()
    (model, _), (meta, _) = random_model(size, table.where), random_model(size, "meta")
    side = 32 if size == "toy" else 512

    def to(layout, dtype):
        for part in (model.unet, model.vae, model.text_encoder):
            part.to(dtype)
        for part in (model.unet, model.vae):
            part.to(memory_format=layout)

    contiguous = functools.partial(to, torch.contiguous_format, dtype)
    channels_last = functools.partial(to, torch.channels_last, dtype)
    channels_last()
    unet, encode, decode = edit_parts(table, model, meta, side)

    def entry(what, prepare, run, batch, steps):
        noise = torch.zeros(batch, 4, side // model.vae.factor, side // model.vae.factor)
        inputs = torch.zeros(batch, 3, side, side), ["make it snow"] * batch, steps, *SCALES, noise
        flops = batch * (3 * steps * unet + encode + decode)
        return f"{what}, {steps} steps", prepare, functools.partial(run, *inputs), flops

    variants = [("plain loop", contiguous, functools.partial(plain_edit, model)), ("edit", channels_last, model.edit)]
    if not table.cuda and dtype == torch.float32:
        variants.append(("bf16 edit", functools.partial(to, torch.channels_last, torch.bfloat16), model.edit))
    for batch in EDITED:
        for steps in STEPS:
            table.lines(batch, [entry(*variant, batch, steps) for variant in variants])

    # ---- compiled
    if (table.cuda or size == "toy") and time.time() + COMPILING < table.end:
        channels_last()
        model.unet.compile(mode="reduce-overhead")
        *_, first, _ = entry("", None, model.edit, 1, 1)
        print(f"compiled in {table.seconds(first):.0f} s")
        for steps in STEPS[1::2]:
            table.lines(1, [entry("compiled edit", channels_last, model.edit, 1, steps)])


# ---- the command -----------------------------------------------------------------------------------------------------

def header(args):
    """The hardware, driver and versions, as a dict."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    facts = {"CPU": cpu, "threads": torch.get_num_threads(), "load before": os.getloadavg()[0]}
    if args.device.startswith("cuda"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {"GPU": torch.cuda.get_device_name(args.device), "CUDA": torch.version.cuda,
                  "driver": subprocess.check_output(command, text=True).split()[0]}
    return facts | {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__, "size": args.size, "precision of editing": args.precision}


def save(size, folder):
    """Writes the random model, and its CLIP into clip/."""
    model, scorer = random_model(size, "cpu")
    model.save_pretrained(folder)
    with new_files(folder / "clip") as new:
        scorer.clip.save_pretrained(new)
        scorer.tokenizer.save_pretrained(new)


def measure(args):
    cuda, toy = args.device.startswith("cuda"), args.size == "toy"
    facts = header(args)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    table = Table(args.device, args.budget)
    table.machine(DTYPES["fp32" if toy else "bf16"])                          # train.py's precision
    trainings = [("cross-attention", (1, 8, BATCH), None), ("all", BATCHES, BATCH)]
    if not cuda and not toy:
        print("not measured: training all, and larger batches, for which a laptop is too small")
        trainings = [("cross-attention", (1,), 1)]
    for which, batches, parts_of in trainings:
        try:
            training(table, args.size, which, batches, parts_of, reserve=0.4 * args.budget)
        except torch.OutOfMemoryError:
            print(f"not measured: training {which}, which does not fit")
    table.machine(DTYPES[args.precision])
    edits(table, args.size, DTYPES[args.precision])
    if args.output:
        text = json.dumps({"machine": facts, "rows": table.rows}, indent=1)
        replace_file(args.output, lambda path: path.write_text(text))


def main(argv=None):
    p = Parser("experiments.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=("sd15", "toy"), default="sd15", help="of the networks (%(default)s)")
    p.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    p.add_argument("--precision", choices=DTYPES, help="of editing (fp16 on CUDA, otherwise fp32)")
    p.add_argument("--budget", type=positive_int, default=480,
                   help="seconds; what does not fit is not measured (%(default)s)")
    p.add_argument("--output", type=Path, help="a .json file")
    p.add_argument("--save", type=Path, help="only writes the random model into this folder, and its CLIP into clip/")
    args = p.parse_args(argv)
    for name in ("device", "precision", "budget", "output"):
        if args.save and getattr(args, name) != p.get_default(name):
            p.error(f"--{name} has no effect with --save")
    args.precision = args.precision or ("fp16" if args.device.startswith("cuda") else "fp32")
    with errors(p):
        if args.output and (args.output.is_dir() or not args.output.parent.is_dir()):
            raise ValueError(f"--output {args.output} is no file in a folder that exists")
        if args.save:
            with claimed(args.save):
                save(args.size, args.save)
        else:
            measure(args)


if __name__ == "__main__":
    main()
