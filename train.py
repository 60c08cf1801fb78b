"""Trains the editor by the paper's cycle, or supervised as InstructPix2Pix, the baseline.

    python train.py                                          # the toy world, on a laptop's CPU
    python train.py --objective ip2p --output runs/baseline                  # the toy's baseline
    python train.py --data photos --output runs/photos       # your photographs, a GPU of 24 GB
    python train.py --data photos --train cross-attention --output runs/photos           # 16 GB
    torchrun --nproc-per-node 4 train.py ...                 # four GPUs: four times the batch

The same command continues a run that was stopped.  The folder of a run gets log.csv, curves.png,
pictures, and two models, moving averages: `model`, and `best`, of the lowest validation loss.
"""
import copy
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_run, save_log, save_run
from cli import (DTYPES, Parser, autocast, claimed, default_device, default_precision, device,
                 errors, mean_of_processes, named_float, non_negative_float, normal_path, number,
                 positive_int, seed_int, start_processes)
from data import batches
from edit import TOY, draw_cycle
from losses import WEIGHTS, ClipScorer, content_words, cycle_losses
from pictures import save_png
from shards import is_toy, open_data
from uip2p import TIMESTEPS, EditModel, cycle

SD15, VIT_L = "stable-diffusion-v1-5/stable-diffusion-v1-5", "openai/clip-vit-large-patch14"
ALL_WEIGHTS = WEIGHTS | {"denoise": 1.0}       # L_CEC's, and that of the part that denoises

#             the paper  your data  the toy world      its baseline, --objective ip2p
SETTINGS = {                                   # that depend on the data
    "model":      (SD15,   SD15,   TOY + "/baseline", TOY + "/text2image"),    # where it starts
    "clip":       (VIT_L,  VIT_L,  TOY + "/clip",     None),    # the CLIP of the losses
    "steps":      (11_000, 11_000, 300,               1500),    # of the optimizer
    "batch_size": (768,    8,      8,                 64),      # images in a step
    "lr":         (5e-5,   5e-5,   2e-4,              1e-3),    # InstructPix2Pix: 1e-4, no warm-up
    "resolution": (None,   256,    32,                32),      # InstructPix2Pix has 256
    "weights":    (ALL_WEIGHTS, ALL_WEIGHTS, ALL_WEIGHTS, None),              # of the losses
    "t_min":      (0,      0,      400,               None),    # the smallest t of a forward edit
    "snr_weight": (None,   None,   5,                 5),       # see noise_error
}
LR_WARMUP, WEIGHT_DECAY, MAX_NORM = 100, 0.01, 1.0      # not in the paper, as all that follows
DECAY, AVERAGE_EVERY = 0.9999, 10              # of the moving average; steps between its updates
LOG_EVERY = 50                                 # steps
MAY_CHANGE = ("steps", "output", "save_every", "rank")      # when a stopped run continues


def parse(argv):
    p = Parser("train.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)

    def add(flag, text, default=None, type=normal_path, **kind):
        row = SETTINGS.get(flag[2:].replace("-", "_"))
        shown = f"{row[1]}; toy: {row[2]}; its baseline: {row[3]}" if row else default
        p.add_argument(flag, help=f"{text} (default: {shown})", default=default, type=type, **kind)

    add("--data", "toy, toy:KIND, a folder, '*.tar'; A=3 B mixes them, 3 to 1", ["toy"], nargs="+")
    add("--texts", "a JSONL file with the texts that --data lacks")
    add("--validation", "like --data; if not given: its own split, or the training data")
    add("--output", "the folder of the run", Path("runs/cycle"), type=Path)
    add("--objective", "the paper's, or the supervised one", "cycle", choices=("cycle", "ip2p"))
    add("--model", "directory or hub id of the start")
    add("--clip", "directory or hub id of the CLIP that judges")
    add("--weights", "of the losses, as attn=0", nargs="+", type=named_float)
    add("--warmup", "first steps, denoising alone: text-to-image", 0, type=number(int, 0, 10 ** 9))
    add("--train", "the whole UNet or a part", "all", choices=("all", "cross-attention"))
    add("--steps", "of the optimizer", type=positive_int)
    add("--batch-size", "images in a forward pass", type=positive_int)
    add("--accumulate", "forward passes in a step", 1, type=positive_int)
    add("--resolution", "images are cropped to this square", type=number(int, 16, 2048))
    add("--lr", "learning rate of AdamW", type=non_negative_float)
    add("--cooldown", "last steps, in which --lr falls to 0", 0, type=number(int, 0, 10 ** 9))
    add("--t-min", "the smallest t of a forward edit", type=number(int, 0, TIMESTEPS - 1))
    add("--device", "cpu, cuda, mps", default_device(), type=device)
    add("--precision", "if not given: CPU and toy fp32, GPU bf16 or, without it, fp16", choices=DTYPES)
    add("--seed", "of everything", 0, type=seed_int)
    add("--save-every", "steps between checkpoints and pictures", 500, type=positive_int)
    args = p.parse_args(argv)

    # ---- what the data and the objective decide
    supervised = args.objective == "ip2p"
    toy = is_toy(args.data)
    for name in ("clip", "weights", "warmup", "t_min") if supervised else ():
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} has no effect with --objective ip2p")
    given = dict(args.weights or [])
    for name in given.keys() - ALL_WEIGHTS.keys():
        p.error(f"--weights {name}: the losses are {', '.join(ALL_WEIGHTS)}")
    column = 1 if not toy else 3 if supervised else 2
    for name, row in SETTINGS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, row[column])
    args.weights = None if supervised else ALL_WEIGHTS | given
    args.clip = None if supervised else args.clip
    args.precision = args.precision or ("fp32" if toy else default_precision(args.device))
    return p, args


# ---- the losses of one batch ------------------------------------------------------------------

def compute_losses(model, clip, batch, args, generator, warming_up=False):
    """What a batch minimises, "loss", and its parts: a dict of scalars."""
    images = batch.images
    r = torch.rand(len(images), generator=generator)
    with autocast(args):
        if args.objective == "ip2p":
            return {"loss": denoising_loss(model, images, batch.edited_images, batch.instructions,
                                           r, generator, args.snr_weight)}
        losses = {} if warming_up else round_trip_losses(model, clip, batch, args, generator)
        # Guidance also needs e(z, I, 0) and e(z, 0, 0); the paper does not say what trains them.
        # Here the input is denoised, a third each from only the image, nothing, only the caption.
        losses["denoise"] = denoising_loss(model, images, images, batch.captions, 0.15 * r,
                                           generator, args.snr_weight)
        losses["loss"] = args.weights["denoise"] * losses["denoise"] + losses.get("cec", 0)
        return losses

def round_trip_losses(model, clip, batch, args, generator):
    """The losses of the paper for a forward and a reverse edit, each a single noise prediction;
    their timesteps t and t_hat are drawn independently."""
    B, h, w = len(batch.images), *[side // model.vae.factor for side in batch.images.shape[2:]]
    noise = torch.randn(2, B, 4, h, w, generator=generator).to(batch.images)
    t = torch.randint(args.t_min, TIMESTEPS, (B,), generator=generator).to(model.device)
    t_hat = torch.randint(TIMESTEPS, (B,), generator=generator).to(model.device)
    trip = cycle(model, batch.images, batch.instructions, batch.reverse_instructions, t, t_hat,
                 noise)
    words = [content_words(model.tokenizer, model.tokenize(texts))
             for texts in (batch.instructions, batch.reverse_instructions)]
    return cycle_losses(clip, batch.images, batch.captions, batch.edited_captions, trip, *words,
                        args.weights)

def denoising_loss(model, images, targets, texts, r, generator, snr_weight=None):
    """InstructPix2Pix's ||eps - e(z_t, t, E(c_I), c_T)||^2, with its conditioning dropout.

    images c_I and targets, whose latents are noised, (B, 3, H, W); texts c_T; r (B,) in [0, 1):
    below 0.05 the text is dropped, from there to 0.10 both, from there to 0.15 the image."""
    with torch.no_grad():
        mean, logvar = model.vae.moments(targets)                             # (B, 4, h, w) each
        sample = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        z_0 = model.vae.scaling_factor * sample
        image = model.vae.encode(images)                                      # (B, 4, h, w)
        image[(r >= 0.05) & (r < 0.15)] = 0
        context = model.encode_text(["" if x < 0.10 else text for text, x in zip(texts, r)])
    noise = torch.randn(z_0.shape, generator=generator).to(z_0)
    t = torch.randint(TIMESTEPS, (len(z_0),), generator=generator).to(model.device)
    x = torch.cat([model.add_noise(z_0, noise, t), image], dim=1)             # (B, 8, h, w)
    return noise_error(model, model.unet(x, t, context), noise, t, snr_weight)

def noise_error(model, eps, noise, t, snr_weight=None):
    """The mean of ||eps - noise||^2 for eps (B, 4, h, w) at t (B,), as InstructPix2Pix has it.
    Weights of 1 / SNR = (1 - abar) / abar, at most snr_weight, make it the error of z_0."""
    error = (eps.float() - noise.float()).square().mean((1, 2, 3))            # (B,)
    if snr_weight is not None:
        error = error * (1 / model.alphas_cumprod[t] - 1).clamp(max=snr_weight)
    return error.mean()


# ---- the run ----------------------------------------------------------------------------------

def prepare(model, clip, args):
    """What trains stays in float32; what is frozen gets args.precision.  Returns what trains."""
    for name, weight in model.unet.train().named_parameters():
        in_part = ".attn2." in name or name.startswith("conv_in.")
        weight.requires_grad_(args.train == "all" or in_part)
    for network in filter(None, (model.unet, model.vae, model.text_encoder, clip and clip.clip)):
        for weight in network.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(DTYPES[args.precision])
    model.unet.checkpointing = model.vae.checkpointing = not is_toy(args.data)    # saves memory
    return [weight for weight in model.unet.parameters() if weight.requires_grad]

def add_gradients(run, model, clip, loader, scaler, args):
    """Adds up the gradients of the next batches, each with random numbers of its own."""
    for part in range(args.accumulate):
        seed = (args.seed * 1_000_003 + run.step) * args.accumulate + part
        generator = torch.Generator().manual_seed((seed * args.processes + args.rank) % 2 ** 63)
        batch = next(loader).to(args.device)
        losses = compute_losses(model, clip, batch, args, generator, run.step < args.warmup)
        scaler.scale(losses["loss"] / args.accumulate).backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        mean_of_processes(losses.values())
        for name, loss in losses.items():
            run.losses.setdefault(name, []).append(loss.item())

@torch.no_grad()
def update_average(average, unet, step, steps=1):
    """The moving average of a UNet after `step` steps, `steps` of them since its last update.  Its
    decay is InstructPix2Pix's: min(DECAY, (1 + n) / (10 + n))."""
    decay = min(DECAY, (1 + step) / (10 + step)) ** steps
    for a, weight in zip(average.parameters(), unet.parameters()):
        if weight.requires_grad:
            a.lerp_(weight.to(a.device), 1 - decay)

@torch.no_grad()
def validate(model, clip, data, args):
    """The loss on the first validation batches, with the same noise and t every time."""
    total = 0
    for n, batch in zip(range(4), batches(data, args.batch_size, seed=0)):
        generator = torch.Generator().manual_seed(n)
        losses = compute_losses(model, clip, batch.to(args.device), args, generator)
        total += losses.get("cec", losses["loss"]).item() / 4
    return total

def save(run, model, average, clip, data, shown, args):
    """Writes the average as `model`, and as `best` if its loss is the lowest; draws eight edits."""
    judged = copy.copy(model)
    judged.unet = average.unet.to(args.device)
    score = validate(judged, clip, data, args)
    tqdm.write(f"step {run.step}: validation loss {score:.4f}")
    with autocast(args):
        picture = draw_cycle(judged, shown.images, shown.instructions, shown.reverse_instructions)
    save_png(picture, args.output / f"step-{run.step:06d}.png")
    average.unet.to("cpu")
    average.save_pretrained(args.output / "model")
    if score < run.best:
        average.save_pretrained(args.output / "best")
        run.best = score

def train(args):
    # ---- data
    train_data, validation_data = open_data(args)
    shown = next(batches(validation_data, 8, seed=0)).to(args.device)         # in the pictures

    # ---- model
    model = EditModel.from_pretrained(args.model, args.device)
    average = EditModel.from_pretrained(args.model)     # of the weights, to be saved
    clip = ClipScorer.from_pretrained(args.clip, args.device) if args.clip else None
    trained = prepare(model, clip, args)
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")

    # ---- resume
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    parts = {"unet": model.unet, "average": average.unet, "optimizer": optimizer, "scaler": scaler}
    run = Namespace(step=0, averaged=0, rows=[], losses={}, best=float("inf"))
    vars(run).update(load_run(args.output, settings, parts))
    print(f"{sum(w.numel() for w in trained):,} parameters train, from step {run.step}; "
          + ", ".join(f"{name} {value}" for name, value in vars(args).items()))
    loader = batches(train_data, args.batch_size, args.seed, first=run.step * args.accumulate,
                     workers=4 if args.device.startswith("cuda") else 0,
                     share=slice(args.rank, None, args.processes))

    # ---- train
    bar = tqdm(total=args.steps, initial=run.step, desc="train", disable=args.rank > 0)
    while run.step < args.steps:
        add_gradients(run, model, clip, loader, scaler, args)
        mean_of_processes(weight.grad for weight in trained)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((run.step + 1) / LR_WARMUP, 1,
                                        (args.steps - run.step) / max(args.cooldown, 1))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        if not norm.isfinite() and scaler.get_scale() <= 1:       # fp16 first lowers its scale
            raise ValueError(f"no finite gradient at step {run.step + 1}: choose a smaller --lr")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.step += 1
        bar.update()

        saves = run.step % args.save_every == 0 or run.step == args.steps
        if saves or run.step % AVERAGE_EVERY == 0:
            update_average(average.unet, model.unet, run.step, run.step - run.averaged)
            run.averaged = run.step
        if run.step % LOG_EVERY == 0:
            save_log(args, run)
        if args.rank == 0 and saves:
            save(run, model, average, clip, validation_data, shown, args)
            save_run(args.output, settings, parts, vars(run))

def main(argv=None):
    processes = start_processes()                       # before anything else uses a GPU
    p, args = parse(argv)
    args.rank, args.processes = processes
    advice = "choose a smaller --batch-size, or --train cross-attention"
    with errors(p, advice), claimed(args.output, "model", "best"):
        train(args)


if __name__ == "__main__":
    main()
