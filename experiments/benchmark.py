"""What editing and training cost on the machine at hand, with random weights of SD 1.5's size or the toy's: no download.

    python benchmark.py --size toy
    python benchmark.py --size sd15 --output sd15.json
    python benchmark.py --size sd15 --device cuda --budget 420      # what the README calls not measured, in under 8 minutes
    python benchmark.py --save random-sd15                # only writes the model, for edit.py and, with its clip, train.py

FLOPs, and the memory of trainings that are too large for a CPU, are counted on the same networks without data.  The
machine's peak is what a large matrix product reaches.
"""
import argparse
import copy
import functools
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
import weakref
from pathlib import Path

import torch
import transformers
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import train
from cli import DTYPES, Parser, device, peak_memory, positive_int, quiet_transformers, replace_file
from data import Batch
from losses import ClipScorer
from uip2p import TIMESTEPS, EditModel, read_json, update_average
from unet import SD15, UNet
from vae import SD15_VAE, VAE

TOY = Path(__file__).resolve().parent / "models/toy"
TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408)
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
SCALES = {3: (7.5, 1.5), 2: (7.5, 1.), 1: (1., 1.)}           # guidance scales that need so many branches
STEPS = 1, 5, 15, 50
BATCHES = 1, 4, 16, 64, 256                                   # of training, to the largest that fits
REPEATS, FAST, SLOW = 5, 1, 10                                # below FAST s 3 times as many; above SLOW s 1, not warmed up
COLUMNS = "what", "batch", "s", "spread", "images/s", "GiB", "TFLOP", "TFLOP/s", "of peak", "of plain"


def random_model(size, where):
    """(EditModel, ClipScorer) with random float32 weights: the toy's, or InstructPix2Pix's and CLIP ViT-L/14's."""
    torch.manual_seed(0)
    configs = SD15, SD15_VAE, CLIPTextConfig(**TEXT), CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=768)
    length = 77
    if size == "toy":
        configs = (*(read_json(TOY / part / "config.json") for part in ("unet", "vae")),
                   CLIPTextConfig.from_pretrained(TOY / "text_encoder"), CLIPConfig.from_pretrained(TOY / "clip"))
        length = configs[2].max_position_embeddings
    with torch.device(where):
        *parts, clip = (network(config).requires_grad_(False).eval() for network, config in
                        zip((UNet, VAE, CLIPTextModel, CLIPModel), configs))
    tokenizer = CLIPTokenizer.from_pretrained(TOY / "tokenizer", model_max_length=length)
    return EditModel(*parts, tokenizer, {"steps_offset": 1}), ClipScorer(clip, tokenizer)


@torch.no_grad()
def plain_edit(model, images, instructions, steps, text_guidance, image_guidance, noise):
    """The reference: `EditModel.edit` as its equations stand, three branches always, the text projected in every step."""
    image_latents = model.vae.encode(images.to(model.device, model.dtype))
    no_text = model.encode_text([""] * len(images))
    context = torch.cat([model.encode_text(instructions), no_text, no_text])              # (3B, L, D)
    conditions = torch.cat([image_latents, image_latents, torch.zeros_like(image_latents)])
    z_t = noise.to(image_latents)
    for step in model.ddim_timesteps(steps):
        t = torch.full((len(z_t),), step, device=model.device)
        eps = model.unet(torch.cat([z_t.repeat(3, 1, 1, 1), conditions], dim=1), t.repeat(3), context)
        with_text, with_image, without = eps.chunk(3)
        eps = without + image_guidance * (with_image - without) + text_guidance * (with_text - with_image)
        z_t = model.ddim_step(z_t, eps, t, steps)
    return model.decode(z_t).clamp(-1, 1)


def count(run):
    """The FLOPs of run(), which works on the meta device, of explicit attention: that of the fused kernels, too."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that come to be while it is on: `alive` of them are left, `peak` were at most."""
    alive = peak = 0

    def __init__(self):
        super().__init__()
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def free(self, nbytes):
        self.alive -= nbytes


class Table:
    """Times what it is given while `budget` seconds last, prints it line by line, and keeps it for the JSON file."""

    def __init__(self, where, budget):
        self.where, self.cuda, self.rows, self.end = where, where.startswith("cuda"), [], time.time() + budget
        print(f"{COLUMNS[0]:44}" + "".join(f"{name:>10}" for name in COLUMNS[1:]))

    def machine(self, dtype):
        """Measures the machine's peaks in a precision, by a large matrix product and a large copy."""
        self.peak = self.bandwidth = self.rate = float("inf")  # FLOP/s, bytes/s; FLOP/s of the line before, to plan by
        n, nbytes = (8192, 2 ** 31) if self.cuda else (2048, 2 ** 28)
        a, b = torch.randn(2, n, n, device=self.where).to(dtype)
        source, target = torch.empty(2, nbytes, dtype=torch.uint8, device=self.where)
        self.line(f"matrix product of {n}x{n}, {dtype}", None, lambda: a @ b, 2 * n ** 3)
        self.peak = 2 * n ** 3 / self.fastest
        self.line(f"copy of {nbytes / 2 ** 30:g} GiB", None, lambda: target.copy_(source))
        self.bandwidth = 2 * nbytes / self.fastest
        self.rate = self.peak / 2
        print(f"the machine's peak: {self.peak / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:.3g} GB/s", flush=True)

    def seconds(self, run):
        start = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.synchronize(self.where)
        return time.perf_counter() - start

    def line(self, what, batch, run, flops=0, nbytes=0, reserve=0):
        """Measures run(); returns the median of its seconds, or None where it does not fit into memory or would not end
        `reserve` seconds before the time is up.  flops, nbytes: what it computes or moves."""
        return self.lines(batch, [(what, lambda: None, run, flops)], nbytes, reserve)[0]

    def lines(self, batch, entries, nbytes=0, reserve=0):
        """The same for several (what, prepare, run, flops), in turns, as a machine may be slow for a while; the first of
        several is *plain*, to which the others are compared turn by turn."""
        guess, left = sum(flops for *_, flops in entries) / self.rate, self.end - reserve - time.time()
        repeats = 3 * REPEATS if guess < FAST * len(entries) else REPEATS
        slow = guess > SLOW * len(entries) or guess * (1 + repeats) > left
        turns = ["warm-up"] * (len(entries) > 1 or not slow) + ["measured"] * (1 if slow else repeats)
        skipped = {"skipped": "not measured: no time"} if guess and guess > left else {}
        rows = [{"what": what, "batch": batch, "times": []} | skipped for what, *_ in entries]
        for turn, (row, (_, prepare, run, _)) in itertools.product(turns, zip(rows, entries)):
            if "skipped" in row or slow and turn == "warm-up" and row is not rows[0]:      # of what is slow, only plain is warm
                continue
            prepare()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.where)
            elif os.path.exists("/proc/self/clear_refs"):
                Path("/proc/self/clear_refs").write_text("5")  # Linux begins a new peak
            try:
                s = self.seconds(run)
            except torch.OutOfMemoryError:
                row["skipped"] = "does not fit"
            else:
                row["times"] += [s] * (turn == "measured")
                row["GiB"] = peak_memory(self.where)
        plain = rows[0]["times"] if len(rows) > 1 else []
        for row, (*_, flops) in zip(rows, entries):
            times = row.pop("times")
            if "skipped" not in row:
                s, self.fastest = statistics.median(times), min(times)
                self.rate = flops / s if flops else self.rate
                row |= {"s": s, "spread": (max(times) - min(times)) / s if len(times) > 1 else None,
                        "images/s": batch and batch / s, "TFLOP": flops / 1e12 or None, "TFLOP/s": flops / s / 1e12 or None,
                        "of peak": (flops / self.peak + nbytes / self.bandwidth) / s or None,
                        "of plain": statistics.median(t / p for t, p in zip(times, plain)) if plain and row is not rows[0] else None}
            self.add(row)
        return [row.get("s") for row in rows]

    def add(self, row):
        """Prints and keeps a row: a dict of some of the COLUMNS, or with "skipped", why it has none."""
        self.rows.append(row)
        cells = [row["skipped"]] if "skipped" in row else [
            "" if row.get(name) is None else f"{row[name]:.0%}" if name in ("spread", "of peak", "of plain") else f"{row[name]:.3g}"
            for name in COLUMNS[2:]]
        print(f"{row['what']:44}{row['batch'] or '':>10}" + "".join(f" {cell:>9}" for cell in cells), flush=True)

    def bottleneck(self, whole, parts):
        """Prints and keeps which of the parts, [(what, times in the whole, seconds)], takes the largest share of the whole."""
        if not all(s for _, _, s in parts):                   # there was no time for one
            return
        parts = [(times * s, what) for what, times, s in parts]
        share, what = max(parts)[0] / sum(s for s, _ in parts), max(parts)[1]
        row = next(r for r in reversed(self.rows) if r["what"] == what)
        self.rows.append({"bottleneck of": whole, "is": what, "share": share})
        print(f"the bottleneck of {whole}: {what}, {share:.0%} of the time, at {row['of peak']:.0%} of the machine's peak")


def training_args(size, where, which, small):
    """train.py's arguments for --train which; small: in little memory."""
    return train.parse(["--device", where, "--train", which, *["--checkpointing", "--ema-on-host"] * small,
                        *([] if size == "toy" else ["--data", "random", "--precision", "bf16"])])[1]


def step_loss(model, scorer, args, batch):
    """What a step of train.py minimises, of empty images."""
    images, texts = torch.zeros(batch, 3, args.resolution, args.resolution, device=model.device), ["make it snow"] * batch
    return train.compute_losses(model, scorer, Batch(images, *[texts] * 4), args, torch.Generator())["loss"]


def training_memory(table, which, small, batches):
    """The lines of what the tensors of SD 1.5's training step take on the device at its peak: counted, without computing them.

    By the rules of a CPU's autocast; a GPU needs more for its libraries, fragmentation, and norms, which it has in float32."""
    args = training_args("sd15", "cpu", which, small)
    model, scorer = random_model("sd15", "meta")
    args.ema_on_host = False                                  # that average is deleted below
    train.prepare(model, scorer, args)                        # sets the precision of each part
    with Memory() as memory:
        with FakeTensorMode(allow_non_fake_inputs=True):      # autocast and AdamW know these, but no meta tensors
            for part in (model.unet, model.vae, model.text_encoder, scorer.clip):
                part.to_empty(device="cpu")
        model.alphas_cumprod, scorer.mean, scorer.std = torch.ones(TIMESTEPS), torch.ones(3, 1, 1), torch.ones(3, 1, 1)
        trained, average, optimizer = train.prepare(model, scorer, argparse.Namespace(**vars(args) | {"precision": "fp32"}))
        if small:
            del average
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()                                      # makes its state
        for batch in batches:
            optimizer.zero_grad()
            memory.peak = memory.alive
            step_loss(model, scorer, args, batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
            optimizer.step()
            table.add({"what": f"its tensors, {which}{', checkpointing' * small}", "batch": batch, "GiB": memory.peak / 2 ** 30})


def training(table, size, which, small, batches, parts_of, reserve):
    """The lines of the cycle's training step, of 256x256 or the toy's 32x32; for the batch `parts_of` also its parts.

    small: in little memory, with checkpointing and the moving average on the host."""
    gc.collect()                                              # the networks of the lines before
    args = training_args(size, table.where, which, small)
    meta, real = random_model(size, "meta"), random_model(size, table.where)
    meta[1].clip.set_attn_implementation("eager")             # the other asks for values
    no_data = {"precision": "fp32", "ema_on_host": False}     # nor does autocast know meta tensors
    train.prepare(*meta, argparse.Namespace(**vars(args) | no_data))
    trained, average, optimizer = train.prepare(*real, args)
    factor = real[0].vae_factor

    def zeros(model, batch, channels, side):
        return torch.zeros(batch, channels, side, side, device=model.device, requires_grad=True)

    def losses(model, scorer, batch):
        return step_loss(model, scorer, args, batch)

    def unet(model, scorer, batch):
        t = torch.full((batch,), 500, device=model.device)
        return model.unet(zeros(model, batch, 8, args.resolution // factor), t, model.encode_text(["make it snow"] * batch), [])

    def decode(model, scorer, batch):
        return model.vae.decode(zeros(model, batch, 4, args.resolution // factor))

    def clip(model, scorer, batch):
        return scorer.embed_images(zeros(model, batch, 3, args.resolution))

    def backward(part, model, scorer, batch):
        with train.attention_kernel(args):
            with train.autocast(args):
                loss = part(model, scorer, batch).float().square().mean()
            loss.backward()

    def update():
        torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
        optimizer.step()
        if not small:
            update_average(average, trained, 0)

    def step(batch):
        backward(losses, *real, batch)
        update()
        optimizer.zero_grad()

    name, flops = f"training step, {which}{', checkpointing' * small}", count(lambda: backward(losses, *meta, 2)) / 2
    for batch in batches:
        if not table.line(name, batch, lambda: step(batch), batch * flops, reserve=reserve):
            break
        if batch == parts_of:
            parts = [(what, times, table.line(what, batch, lambda: backward(part, *real, batch),
                                              count(lambda: backward(part, *meta, 2)) / 2 * batch, reserve=reserve))
                     for what, times, part in (("UNet and its backward", 2.5, unet), ("VAE decode and its backward", 2, decode),
                                               ("CLIP and its backward", 3 * max(args.views, 1), clip))]
            # clipping moves a weight's 4 bytes 3 times, AdamW 7, the average 3
            moved, what = 4 * sum(p.numel() for p in trained), f"clipping, AdamW{', moving average' * (not small)}"
            update_line = what, 1, table.line(what, batch, update, nbytes=(10 if small else 13) * moved)
            table.bottleneck(f"{name}, batch {batch}", [*parts, update_line])
    if small:
        table.line("moving average on the host, each 10th step", None, lambda: update_average(average, trained, 0))


def edits(table, size, dtype):
    """The lines of editing, of 512x512 or the toy's 32x32."""
    gc.collect()
    (model, _), (meta, _) = random_model(size, table.where), random_model(size, "meta")

    def to(layout, precision=dtype):
        for part in (model.unet, model.vae, model.text_encoder):
            part.to(precision)
        model.unet.to(memory_format=layout), model.vae.to(memory_format=layout)

    contiguous, channels_last = (functools.partial(to, layout) for layout in (torch.contiguous_format, torch.channels_last))
    channels_last()
    side = 32 if size == "toy" else 512
    latent = 4, side // model.vae_factor, side // model.vae_factor

    def zeros(m, *shape):
        return torch.zeros(shape, device=m.device, dtype=m.dtype)

    def unet(m, batch):
        return m.unet(zeros(m, batch, 8, *latent[1:]), torch.full((batch,), 500, device=m.device),
                      zeros(m, batch, m.tokenizer.model_max_length, m.unet.config["cross_attention_dim"]))

    def encode(m, batch):
        return m.vae.encode(zeros(m, batch, 3, side, side))

    def decode(m, batch):
        return m.vae.decode(zeros(m, batch, *latent))

    with torch.no_grad():
        cost = {part: count(lambda: part(meta, 1)) for part in (unet, encode, decode)}
        parts = [(what, times, table.line(what, batch, lambda: part(model, batch), batch * cost[part]))
                 for what, batch, times, part in (("UNet forward", 1, 0, unet), ("UNet forward, three branches", 3, 50, unet),
                                                  ("VAE encode", 1, 1, encode), ("VAE decode", 1, 1, decode))]
    table.bottleneck("an edit of 50 steps", parts)

    if compiling := table.cuda or size == "toy":
        compiled = copy.copy(model)
        compiled.unet = copy.deepcopy(model.unet)
        compiled.unet.compile(mode="reduce-overhead")
        print(f"compiled in {table.seconds(lambda: compiled.edit(torch.zeros(1, 3, side, side), ['make it snow'], 1)):.0f} s")

    for batch, steps in itertools.product((1, 8), STEPS):
        variants = [("plain loop", contiguous, functools.partial(plain_edit, model), 3), ("contiguous edit", contiguous, model.edit, 3),
                    *(("edit", channels_last, model.edit, branches) for branches in (3, 2, 1))]
        if not table.cuda and dtype == torch.float32:
            variants.append(("bf16 edit", functools.partial(to, torch.channels_last, torch.bfloat16), model.edit, 3))
        if compiling and batch == 1 and steps in STEPS[1::2]:
            variants.append(("compiled edit", channels_last, compiled.edit, 3))
        images, noise, texts = torch.zeros(batch, 3, side, side), torch.zeros(batch, *latent), ["make it snow"] * batch
        table.lines(batch, [(f"{what}, {steps} steps, {branches} branches", prepare,
                             functools.partial(run, images, texts, steps, *SCALES[branches], noise),
                             batch * (steps * branches * cost[unet] + cost[encode] + cost[decode]))
                            for what, prepare, run, branches in variants])


def header(args):
    """The hardware, driver and versions, as a dict."""
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else []
    facts = {"CPU": cpu[0] if cpu else platform.processor(), "threads": torch.get_num_threads(),
             "load before": os.getloadavg()[0]}
    if args.device.startswith("cuda"):
        driver = subprocess.check_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True)
        facts |= {"GPU": torch.cuda.get_device_name(args.device), "CUDA": torch.version.cuda, "driver": driver.split()[0]}
    return facts | {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__, "size": args.size, "precision of editing": args.precision}


def main(argv=None):
    p = Parser("benchmark.py", description=__doc__.split("\n")[0])
    p.add_argument("--size", choices=("sd15", "toy"), default="sd15")
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=DTYPES, help="of editing (fp16 on CUDA, else fp32)")
    p.add_argument("--budget", type=positive_int, default=480, help="seconds; what does not fit is not measured (%(default)s)")
    p.add_argument("--output", type=Path, help="a .json file")
    p.add_argument("--save", type=Path, help="only writes the random model into this folder, and its CLIP into clip/")
    args = p.parse_args(argv)
    for name in ("device", "precision", "budget", "output"):
        if args.save and getattr(args, name) != p.get_default(name):
            p.error(f"--{name} has no effect with --save")
    quiet_transformers()
    cuda, toy = args.device.startswith("cuda"), args.size == "toy"
    args.precision = args.precision or ("fp16" if cuda else "fp32")
    if args.output and (args.output.is_dir() or not args.output.parent.is_dir()):
        p.error(f"--output {args.output} is no file in a folder that exists")
    if args.save:
        try:
            args.save.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            p.error(f"--save {error}")
        model, scorer = random_model(args.size, "cpu")
        model.save_pretrained(args.save)
        scorer.clip.save_pretrained(args.save / "clip")
        scorer.tokenizer.save_pretrained(args.save / "clip")
        return
    facts = header(args)
    print("\n".join(f"{k}: {v}" for k, v in facts.items()))
    table, rest = Table(args.device, args.budget), args.budget * .6
    table.machine(DTYPES["fp32" if toy and not cuda else "bf16"])                         # train.py's precision
    if cuda or toy:
        trainings = (("cross-attention", cuda, (1, 16), None), ("all", True, BATCHES if cuda else (16,), None),
                     ("all", False, BATCHES, 16))
    else:
        print("not measured: training all, and other batches, for which a laptop is too small: their memory is counted below")
        trainings = ("cross-attention", True, (1,), 1),
    for which, small, batches, parts_of in trainings:
        try:
            training(table, args.size, which, small, batches, parts_of, rest)
        except torch.OutOfMemoryError:
            print(f"not measured: training {which}, which does not fit")
    table.machine(DTYPES[args.precision])
    edits(table, args.size, DTYPES[args.precision])
    if not cuda and not toy:
        for which, small, batches in (("cross-attention", True, (1, 8)), ("all", True, (1, 4, 8)), ("all", False, (4,))):
            training_memory(table, which, small, batches)
    if args.output:
        replace_file(args.output, lambda path: path.write_text(json.dumps({"machine": facts, "rows": table.rows}, indent=1)))


if __name__ == "__main__":
    main()
