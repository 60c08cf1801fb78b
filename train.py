"""Trains the editor by the paper's cycle, or supervised as InstructPix2Pix, the baseline.

    python train.py                                      # the toy world, on the CPU of a laptop
    python train.py --objective ip2p --output runs/baseline              # the toy's baseline
    python train.py --data photos --output runs/photos   # your photographs, one GPU of 24 GB
    python train.py --data photos --train cross-attention --output runs/small      # 16 GB
    torchrun --nproc-per-node 4 train.py ...             # four GPUs: four times the batch

The same command continues a run that was stopped.  The folder of a run gets log.csv, curves.png,
step-*.png (eight edits) and two models: `best`, with the lowest validation loss, and `model`, the
last one.  Both are the moving average of the weights.
"""
import csv
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from checkpoint import load_run, save_run
from cli import (DTYPES, Parser, default_device, default_precision, device,
                 errors, mean_of_processes, named_float, non_negative_float, number, peak_memory,
                 positive_int, replace_file, seed_int, start_processes)
from data import batches
from edit import draw_cycle
from losses import WEIGHTS, ClipScorer, content_words, cycle_losses
from pictures import curves, save_png
from shards import open_data
from uip2p import TIMESTEPS, EditModel, cycle

SD15, VIT_L = "stable-diffusion-v1-5/stable-diffusion-v1-5", "openai/clip-vit-large-patch14"
TOY = str(Path(__file__).resolve().parent / "models/toy")

# The settings that depend on the data.  The paper's are here for comparison only.
#             the paper  your data  the toy world      its baseline, --objective ip2p
SETTINGS = {
    "model":      (SD15,   SD15,   TOY + "/baseline", TOY + "/text2image"),    # where it starts
    "clip":       (VIT_L,  VIT_L,  TOY + "/clip",     None),    # the CLIP of the losses
    "steps":      (11_000, 11_000, 500,               2000),    # of the optimizer
    "batch_size": (768,    8,      16,                64),      # images in a step
    "lr":         (5e-5,   5e-5,   1e-4,              1e-3),    # of AdamW, after LR_WARMUP steps
    "resolution": (None,   256,    32,                32),      # silent; InstructPix2Pix has 256
    "t_min":      (0,      0,      400,               None),    # the smallest t of a forward edit
    "sharp":      (0,      0,      5,                 None),    # see uip2p.cycle
}
# The paper says nothing of these.
LR_WARMUP, WEIGHT_DECAY, MAX_NORM = 100, 0.01, 1.0      # of AdamW; bound of the gradient's norm
DECAY, AVERAGE_EVERY = 0.9999, 10              # of the moving average, updated every 10 steps
LOG_EVERY = 50                                 # steps
MAY_CHANGE = ("steps", "output", "save_every")          # when a run goes on


def parse(argv):
    p = Parser("train.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)

    def add(flag, text, default=None, **kind):
        row = SETTINGS.get(flag[2:].replace("-", "_"))
        shown = f"{row[1]}; toy: {row[2]}; its baseline: {row[3]}" if row else default
        p.add_argument(flag, help=f"{text} (default: {shown})", default=default, **kind)

    add("--data", "'toy', a folder, 'DIR/*.tar', InstructPix2Pix's tree; A=3 B mixes them 3 to 1",
        ["toy"], nargs="+", metavar="SOURCE[=WEIGHT]")
    add("--texts", "a JSONL file with the texts that --data lacks")
    add("--validation", "like --data; none: its own split, otherwise the training data")
    add("--output", "the folder of the run", Path("runs/cycle"), type=Path)
    add("--objective", "the paper's, or the supervised one", "cycle", choices=("cycle", "ip2p"))
    add("--model", "directory or hub id of the start")
    add("--clip", "directory or hub id of the CLIP that judges")
    add("--weights", f"of the losses: {WEIGHTS}", [], nargs="+", type=named_float,
        metavar="NAME=VALUE")
    add("--warmup", "first steps with denoising alone, for text-to-image models", 0,
        type=number(int, 0))
    add("--sharp", "steps of a sampled edit; 0: the one-step estimate", type=number(int, 0, 999))
    add("--train", "the whole UNet or a part", "all", choices=("all", "cross-attention"))
    add("--steps", "of the optimizer", type=positive_int)
    add("--batch-size", "images in a forward pass", type=positive_int)
    add("--accumulate", "forward passes in a step", 1, type=positive_int)
    add("--resolution", "images are cropped to this square", type=positive_int)
    add("--lr", "learning rate of AdamW", type=non_negative_float)
    add("--device", "cpu, cuda, mps", default_device(), type=device)
    add("--precision", "none: bf16 if the GPU has it, otherwise fp16; CPU: fp32", choices=DTYPES)
    add("--seed", "of everything", 0, type=seed_int)
    add("--save-every", "steps between checkpoints and pictures", 500, type=positive_int)
    args = p.parse_args(argv)

    # ---- what fits together
    toy = args.data == ["toy"]
    for name in ("clip", "weights", "warmup", "sharp"):
        if args.objective == "ip2p" and getattr(args, name):
            p.error(f"--{name} has no effect with --objective ip2p")
    if args.texts and toy:
        p.error("--texts has no effect with --data toy")
    for name, _ in args.weights:
        if name not in WEIGHTS:
            p.error(f"--weights {name}: the losses are {', '.join(WEIGHTS)}")
    args.weights = WEIGHTS | dict(args.weights)
    for name, (_, yours, of_toy, of_baseline) in SETTINGS.items():
        if getattr(args, name, None) is None:
            of_toy = of_baseline if args.objective == "ip2p" else of_toy
            setattr(args, name, of_toy if toy else yours)
    if args.objective == "ip2p":
        args.clip = None
    if "toy" in args.data and args.resolution != SETTINGS["resolution"][2]:
        p.error(f"--data toy has images of --resolution {SETTINGS['resolution'][2]}")
    args.precision = args.precision or default_precision(args.device)
    return p, args


# ---- the losses of one batch ------------------------------------------------------------------

def autocast(args):
    kind, dtype = torch.device(args.device).type, DTYPES[args.precision]
    return torch.autocast(kind, dtype, enabled=args.precision != "fp32")


def compute_losses(model, clip, batch, args, generator, warming_up=False):
    """What a batch minimises, "loss", and its parts: a dict of scalars."""
    with autocast(args):
        r = torch.rand(len(batch.images), generator=generator)
        if args.objective == "ip2p":
            return {"loss": denoising_loss(model, batch.images, batch.edited_images,
                                           batch.instructions, r, generator)}
        losses = {} if warming_up else round_trip_losses(model, clip, batch, args, generator)

        # Guidance also needs e(z, I, 0) and e(z, 0, 0), which the cycle never visits; the paper
        # does not say how they stay usable.  Here the input itself is denoised, given the image,
        # nothing, or the caption: a third of the samples each.
        losses["denoise"] = denoising_loss(model, batch.images, batch.images, batch.captions,
                                           0.15 * r, generator)
        losses["loss"] = losses["denoise"] + losses.get("cec", 0)
        return losses


def round_trip_losses(model, clip, batch, args, generator):
    """The four losses of the paper and L_CEC of one forward and one reverse edit, each a single
    noise prediction; their timesteps t and t_hat are drawn independently."""
    B, h, w = len(batch.images), *[side // model.vae.factor for side in batch.images.shape[2:]]
    noise = torch.randn(2, B, 4, h, w, generator=generator).to(batch.images)
    t = torch.randint(args.t_min, TIMESTEPS, (B,), generator=generator).to(model.device)
    t_hat = torch.randint(TIMESTEPS, (B,), generator=generator).to(model.device)
    trip = cycle(model, batch.images, batch.instructions, batch.reverse_instructions, t, t_hat,
                 noise, args.sharp)
    forward_words = content_words(model.tokenizer, model.tokenize(batch.instructions))
    reverse_words = content_words(model.tokenizer, model.tokenize(batch.reverse_instructions))
    return cycle_losses(clip, batch.images, batch.captions, batch.edited_captions, trip,
                        forward_words, reverse_words, args.weights)


def denoising_loss(model, images, targets, texts, r, generator):
    """InstructPix2Pix's ||eps - e(z_t, t, E(c_I), c_T)||^2, with its conditioning dropout.

    images c_I and targets (B, 3, H, W); texts c_T; r (B,) in [0, 1): below 0.05 the text is
    dropped, from there to 0.10 both, from there to 0.15 the image."""
    drop_text, drop_image = r < 0.10, (r >= 0.05) & (r < 0.15)
    with torch.no_grad():
        mean, logvar = model.vae.moments(targets)                             # (B, 4, h, w) each
        sample = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        z_0 = model.vae.scaling_factor * sample
        image = model.vae.encode(images)                                      # (B, 4, h, w)
        image[drop_image] = 0
        context = model.encode_text(["" if drop else text for text, drop in zip(texts, drop_text)])
    noise = torch.randn(z_0.shape, generator=generator).to(z_0)
    t = torch.randint(TIMESTEPS, (len(z_0),), generator=generator).to(model.device)
    x = torch.cat([model.add_noise(z_0, noise, t), image], dim=1)             # (B, 8, h, w)
    return noise_error(model, model.unet(x, t, context), noise, t)


def noise_error(model, eps, noise, t):
    """The mean of ||eps - noise||^2 for eps (B, 4, h, w) at t (B,), weighted by 1 / SNR, at most 5:
    with that weight it is the error of z_0.  InstructPix2Pix weighs all t alike."""
    abar = model.alphas_cumprod[t]
    weight = ((1 - abar) / abar).clamp(max=5)                                 # (B,)
    return (weight * (eps.float() - noise.float()).square().mean((1, 2, 3))).mean()


# ---- the parts of a run -----------------------------------------------------------------------

def prepare(model, clip, args):
    """Sets what trains, in float32, and what is frozen, in args.precision.  Returns the weights
    that train and their moving average, which lies in the memory of the host."""
    for name, weight in model.unet.train().named_parameters():
        in_part = ".attn2." in name or name.startswith("conv_in.")
        weight.requires_grad_(args.train == "all" or in_part)
    everything = [*model.unet.parameters(), *model.vae.parameters(), *model.text_encoder.parameters()]
    for weight in everything + (list(clip.clip.parameters()) if clip else []):
        if not weight.requires_grad:
            weight.data = weight.data.to(DTYPES[args.precision])
    # Real data has large networks: less memory for more time.
    model.unet.checkpointing = model.vae.checkpointing = args.data != ["toy"]
    weights = [weight for weight in model.unet.parameters() if weight.requires_grad]
    return weights, [weight.detach().to("cpu", copy=True) for weight in weights]


@torch.no_grad()
def update_average(average, weights, step, steps=1):
    """The moving average of the weights after `step` steps, `steps` since its last update.  Its
    decay is InstructPix2Pix's: min(DECAY, (1 + n) / (10 + n))."""
    decay = min(DECAY, (1 + step) / (10 + step)) ** steps
    for a, w in zip(average, weights):
        a.lerp_(w.to(a.device), 1 - decay)


def exchange(weights, average):
    """The network gets its moving average; the second time, its weights again."""
    for w, a in zip(weights, average):
        w.data, a.data = a.data.to(w.device), w.data.to(a.device)


def add_gradients(model, clip, loader, scaler, args, step, rank, processes):
    """The gradient of the next batches, each with random numbers of its own -> their losses."""
    losses = {}
    for part in range(args.accumulate):
        seed = ((args.seed * 1_000_003 + step) * args.accumulate + part) * processes + rank
        generator = torch.Generator().manual_seed(seed % 2 ** 63)
        batch = next(loader).to(args.device)
        found = compute_losses(model, clip, batch, args, generator, step < args.warmup)
        scaler.scale(found["loss"] / args.accumulate).backward()
        for name, loss in found.items():
            losses[name] = losses.get(name, 0) + loss.detach() / args.accumulate
    mean_of_processes(losses.values())
    return losses


def update(weights, optimizer, scaler, lr):
    """A step of AdamW.  ValueError where the gradient is not finite; in fp16, such a step is left
    out and the scale of the loss falls, until that is of no use."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    mean_of_processes(weight.grad for weight in weights)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
    if not norm.isfinite() and scaler.get_scale() <= 1:
        raise ValueError("the gradient is not finite: choose a smaller --lr and another --output")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def log(run, args, processes):
    """Adds the means of the losses since the last row to log.csv and curves.png."""
    row = {"step": run.step, "images": run.step * args.batch_size * args.accumulate * processes}
    row |= {name: round(torch.stack(values).mean().item(), 4) for name, values in run.losses.items()}
    run.rows, run.losses = [*run.rows, row], {}
    text = ", ".join(f"{name} {value}" for name, value in row.items())
    tqdm.write(f"{text}, {peak_memory(args.device):.1f} GiB")
    names = list(dict.fromkeys(name for row in run.rows for name in row))

    def write(temporary):
        with open(temporary, "w", newline="") as file:
            table = csv.DictWriter(file, names)       # what a warm-up step lacks stays empty
            table.writeheader()
            table.writerows(run.rows)
    replace_file(args.output / "log.csv", write)
    lines = {n: [(row["step"], row[n]) for row in run.rows if n in row] for n in names[2:]}
    save_png(curves(lines), args.output / "curves.png")


@torch.no_grad()
def validate(model, clip, data, args):
    """The loss on the first validation batches, with the same noise and t every time."""
    losses = []
    for n, batch in zip(range(4), batches(data, args.batch_size, seed=0)):
        generator = torch.Generator().manual_seed(n)
        found = compute_losses(model, clip, batch.to(args.device), args, generator)
        losses.append(found.get("cec", found["loss"]).item())
    return sum(losses) / len(losses)


def save_models(run, model, clip, data, shown, args):
    """Validates the model, writes it as `model`, as `best` if it is, and draws eight edits."""
    score = validate(model, clip, data, args)
    tqdm.write(f"step {run.step}: validation loss {score:.4f}")
    whole = EditModel.from_pretrained(args.model)     # the frozen parts as they are in its files
    whole.unet = model.unet
    whole.save_pretrained(args.output / "model")
    if score < run.best:
        whole.save_pretrained(args.output / "best")
    run.best = min(run.best, score)
    settings = SimpleNamespace(steps=model.defaults.get("steps", 10), seed=0, precision=args.precision,
                               cfg_text=model.guidance["text_guidance"], cfg_image=model.guidance["image_guidance"])
    with autocast(args):
        picture = draw_cycle(model, shown.images, shown.instructions, shown.reverse_instructions, settings)
    save_png(picture, args.output / f"step-{run.step:06d}.png")


# ---- the run ----------------------------------------------------------------------------------

def train(args, rank, processes):
    # ---- data
    train_data, validation_data = open_data(args)
    shown = next(batches(validation_data, 8, seed=0)).to(args.device)         # in the pictures

    # ---- model
    model = EditModel.from_pretrained(args.model, args.device)
    clip = ClipScorer.from_pretrained(args.clip, args.device) if args.clip else None
    weights, average = prepare(model, clip, args)
    optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")

    # ---- resume
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    parts = {"unet": model.unet, "optimizer": optimizer, "scaler": scaler}
    run = SimpleNamespace(step=0, rows=[], losses={}, best=float("inf"), average=average)
    vars(run).update(load_run(args.output, settings, parts))
    print(f"{sum(w.numel() for w in weights):,} parameters train, from step {run.step}; "
          + ", ".join(f"{name} {value}" for name, value in vars(args).items()))
    loader = batches(train_data, args.batch_size, args.seed, first=run.step * args.accumulate,
                     workers=4 if args.device.startswith("cuda") else 0,
                     share=slice(rank, None, processes))

    # ---- train
    progress = tqdm(total=args.steps, initial=run.step, desc="train", disable=rank > 0)
    averaged = run.step
    while run.step < args.steps:
        losses = add_gradients(model, clip, loader, scaler, args, run.step, rank, processes)
        lr = args.lr * min((run.step + 1) / LR_WARMUP, 1)         # the paper names only the peak
        update(weights, optimizer, scaler, lr)
        run.step += 1
        progress.update()
        for name, loss in losses.items():
            run.losses.setdefault(name, []).append(loss)

        saves = run.step % args.save_every == 0 or run.step == args.steps
        if saves or run.step % AVERAGE_EVERY == 0:
            update_average(run.average, weights, run.step, run.step - averaged)
            averaged = run.step
        if rank == 0 and run.step % LOG_EVERY == 0:
            log(run, args, processes)
        if rank == 0 and saves:
            exchange(weights, run.average)
            save_models(run, model, clip, validation_data, shown, args)
            exchange(weights, run.average)
            save_run(args.output, settings, parts, vars(run))
    mean_of_processes([torch.zeros(1, device=args.device)])       # nobody ends before all is written


def main(argv=None):
    rank, processes = start_processes()
    p, args = parse(argv)
    with errors(p, args, "choose a smaller --batch-size, or --train cross-attention"):
        train(args, rank, processes)


if __name__ == "__main__":
    main()
