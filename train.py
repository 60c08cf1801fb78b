"""Trains the editor: by the paper's cycle consistency, supervised as InstructPix2Pix, or only to use its input image.

    python train.py                                             # the toy world, on a laptop's CPU
    python train.py --objective ip2p --output runs/baseline     # the supervised baseline, on entangled pairs
    python train.py --model runs/baseline/model --output runs/improved      # the cycle from the baseline's weights
    python train.py --data photos --output runs/photos          # Stable Diffusion 1.5, on a folder of images
    python train.py --data "cc3m/*.tar" photos --mix 3 1 --texts edits.jsonl --output runs/mix     # all data: see data.py
    torchrun --nproc-per-node 4 train.py ...                    # on several GPUs: 4 times the batch

The same command resumes a run that was stopped.  A run's folder gets log.csv, curves.png, pictures of eight edits
(step-*.png) and two models: `best`, of the lowest validation loss, and `model`, the last.
"""
import copy
import csv
import os
import pickle
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from cli import Parser, device, non_negative_float, number, peak_memory, positive_int, quiet_transformers, replace_file, seed_int
from data import Folder, Mix, Shards, batches, open_source, read_texts
from losses import WEIGHTS, ClipScorer, cycle_losses
from pictures import curves, grid, overlay, save_png
from uip2p import TIMESTEPS, EditModel, cycle, delta_edit, edit_map, noise_error, update_average

HERE = Path(__file__).resolve().parent
# what the paper says, where it does; and what was measured to suit a model a thousand times smaller, in ten minutes
PAPER = dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", clip="openai/clip-vit-large-patch14", resolution=256,
             batch_size=8, steps=11_000, lr=5e-5, weights=list(WEIGHTS.values()), t_min=0, views=0)
TOY = dict(model=str(HERE / "models/toy"), clip=str(HERE / "models/toy/clip"), resolution=32, weights=[3., .2, 2., .5], t_min=400,
           views=2)
TOY_RUNS = {"cycle": dict(batch_size=16, steps=500, lr=1e-4), "ip2p": dict(batch_size=64, steps=2000, lr=1e-3),
            "identity": dict(batch_size=64, steps=800, lr=1e-3)}
FROM_TEXT2IMAGE = dict(identity_steps=300, steps=200, lr=2e-4, t_min=500, delta=5., sharp=5)   # it cannot use an image yet
CYCLE_ONLY = ("clip", "weights", "t_min", "start", "reverse_start", "reencode", "sharp", "views", "identity_steps")
NOT_FOR = {"cycle": (), "identity": CYCLE_ONLY, "ip2p": (*CYCLE_ONLY, "denoise", "delta")}


def learning_rate(step, peak, warmup=100):
    """Linear warm-up, then constant: the paper names only the peak."""
    return peak * min((step + 1) / warmup, 1)


def denoising_loss(model, images, targets, texts, r, generator):
    """||eps - eps_theta(z_t, t, E(c_I), c_T)||^2 of InstructPix2Pix, towards the targets (B, 3, H, W).

    r (B,) in [0, 1) is its conditioning dropout: below .05 no text, to .10 neither, to .15 no image, above that both.
    Its weight is `noise_error`'s."""
    with torch.no_grad():
        mean, logvar = model.vae.moments(targets)
        sample = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        z_0 = model.vae.scaling_factor * sample                                           # (B, 4, h, w)
        image_latents = mean if targets is images else model.vae.encode(images)
        image_latents = image_latents * ((r < .05) | (r >= .15))[:, None, None, None].to(images)
        context = model.encode_text(["" if drop else text for text, drop in zip(texts, r < .10)])
    noise = torch.randn(z_0.shape, generator=generator).to(z_0)
    t = torch.randint(TIMESTEPS, (len(z_0),), generator=generator).to(z_0.device)
    eps = model.unet(torch.cat([model.add_noise(z_0, noise, t), image_latents], dim=1), t, context)
    return noise_error(model, eps, noise, t)


def round_trip_losses(model, scorer, batch, args, generator):
    """The four losses of the paper and their sum, L_CEC, of one forward and one reverse edit: a dict of scalars."""
    B, sides = len(batch.images), [side // model.vae_factor for side in batch.images.shape[-2:]]
    noise = torch.randn(2, B, model.vae.config["latent_channels"], *sides, generator=generator).to(batch.images)
    t = torch.randint(args.t_min, TIMESTEPS, (B,), generator=generator).to(model.device)
    t_hat = torch.randint(TIMESTEPS, (B,), generator=generator).to(model.device)
    trip = cycle(model, batch.images, batch.instructions, batch.reverse_instructions, t, t_hat, noise,
                 args.start, args.reverse_start, args.reencode, args.sharp)
    losses = cycle_losses(scorer, batch.images, batch.captions, batch.edited_captions, trip,
                          model.content_tokens(batch.instructions), model.content_tokens(batch.reverse_instructions),
                          dict(zip(WEIGHTS, args.weights)), args.views, generator)
    if args.delta:
        losses["delta"] = delta_loss(model, batch, model.vae.encode(batch.images), trip.z_t, t, trip.eps)
    return losses


def delta_loss(model, batch, image_latents, z_t, t, eps):
    """||eps - `delta_edit`||^2, weighted by `noise_error`: the instruction, in the edit's noise prediction eps (B, 4, h, w) at
    z_t and t, does what the captions do in the model as the training found it."""
    target = delta_edit(model.start, z_t, t, image_latents, batch.captions, batch.edited_captions)
    return noise_error(model, eps, target, t)


def prepare(model, scorer, args):
    """Sets what trains, in float32, and what is frozen, in args.precision.  Returns the weights that train, their
    moving average and optimizer."""
    unet = model.unet.train()
    unet.checkpointing = model.vae.checkpointing = args.checkpointing
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(args.train == "all" or ".attn2." in name or name.startswith("conv_in."))
    trained = [p for p in unet.parameters() if p.requires_grad]
    frozen = [model.vae, model.text_encoder, *([scorer.clip] if scorer else [])]
    if args.delta:
        model.start = copy.copy(model)                        # as it is now, for good
        model.start.unet = copy.deepcopy(unet).requires_grad_(False).eval()
        frozen.append(model.start.unet)
    if args.precision == "bf16":
        for module in frozen:
            module.bfloat16()
        for parameter in unet.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    average = [p.detach().to("cpu" if args.ema_on_host else p.device, copy=True) for p in trained]
    return trained, average, torch.optim.AdamW(trained, args.lr, weight_decay=.01, fused=True)


def exchange(weights, average):
    """The network gets its moving average; the second time, its weights again."""
    for w, a in zip(weights, average):
        w.data, a.data = a.data.to(w.device), w.data.to(a.device)


def mean_of_processes(tensors):
    """Each tensor becomes its mean over the processes of torchrun."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def attention_kernel(args):
    """Explicit attention is faster than the fused kernel where sequences are short, as on the toy's CPU."""
    return nullcontext() if args.device.startswith("cuda") else sdpa_kernel(SDPBackend.MATH)


def compute_losses(model, scorer, batch, args, generator):
    """What the objective minimises, "loss", and its parts: a dict of scalars."""
    with autocast(args):
        B = len(batch.images)
        if args.objective == "ip2p":
            r = torch.rand(B, generator=generator)
            return {"loss": denoising_loss(model, batch.images, batch.edited_images, batch.instructions, r, generator)}
        losses = round_trip_losses(model, scorer, batch, args, generator) if args.objective == "cycle" else {}
        # the input itself as target, with the image, with nothing, or with the caption as condition, a third each: it keeps
        # what the cycle never visits, e(z, c_I, 0) and e(z, 0, 0) of guidance; how the paper does, it does not say
        if args.denoise:
            n = max(B // 2, 1) if args.objective == "cycle" else B
            r = .15 * torch.rand(n, generator=generator)
            inputs = batch.images[:n]
            losses["denoise"] = denoising_loss(model, inputs, inputs, batch.captions[:n], r, generator)
        if args.objective == "identity" and args.delta:
            image_latents = model.vae.encode(batch.images)
            noise = torch.randn(image_latents.shape, generator=generator).to(image_latents)
            t = torch.randint(TIMESTEPS, (B,), generator=generator).to(model.device)
            z_t = model.add_noise(model.vae.scaling_factor * image_latents, noise, t)
            eps = model.unet(torch.cat([z_t, image_latents], dim=1), t, model.encode_text(batch.instructions))
            losses["delta"] = delta_loss(model, batch, image_latents, z_t, t, eps)
        weights = {"cec": 1, "denoise": args.denoise, "delta": args.delta}
        return losses | {"loss": sum(weight * losses[name] for name, weight in weights.items() if name in losses)}


@torch.no_grad()
def validate(model, scorer, dataset, args):
    """The losses on the validation samples, with the same noise and timesteps every time."""
    totals = {}
    for n, batch in zip(range(4), batches(dataset, args.batch_size, seed=0)):
        generator = torch.Generator().manual_seed(n)
        for name, loss in compute_losses(model, scorer, batch.to(model.device), args, generator).items():
            totals[name] = totals.get(name, 0) + loss.item() / 4
    return totals


def figure(model, batch):
    """Rows of figure 3: input, edit, reconstruction, A_f, A_r.  Edits are sampled as the model recommends, else in 10 steps."""
    settings = {"steps": model.defaults.get("steps", 10)} | model.guidance
    edited = model.edit(batch.images, batch.instructions, generator=torch.Generator().manual_seed(0), **settings)
    undone = model.edit(edited, batch.reverse_instructions, generator=torch.Generator().manual_seed(1), **settings)
    A_f = edit_map(model, batch.images, edited, batch.instructions)
    A_r = edit_map(model, edited, undone, batch.reverse_instructions)
    rows = [[i, e, u, overlay(i, f), overlay(e, r)] for i, e, u, f, r in
            zip(*[x.float().cpu() for x in (batch.images, edited, undone, A_f, A_r)])]
    return grid(rows, ("input", "edit", "reconstruction", "A_f", "A_r"), batch.instructions)


def write_log(path, rows):
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    replace_file(path / "log.csv", write)
    curves({name: [(row["step"], row[name]) for row in rows] for name in rows[0] if name not in ("step", "images")},
           path / "curves.png")


def parse(argv):
    p = Parser("train.py", description=__doc__.split("\n")[0])
    p.add_argument("--objective", choices=("cycle", "ip2p", "identity"), default="cycle",
                   help="cycle consistency, supervised pairs, or denoising the input given itself")
    p.add_argument("--train", choices=("all", "cross-attention"), default="all",
                   help="the whole UNet, or its cross-attention and input convolution: the rest stays, in --precision")
    p.add_argument("--model", help="directory or hub id to start from (default: the toy model, or Stable Diffusion 1.5)")
    p.add_argument("--unet", help="subfolder of the UNet to start from (default: unet; of the toy model, text2image)")
    p.add_argument("--clip", help="directory or hub id of the CLIP that judges")
    p.add_argument("--data", nargs="+", default=["toy"], help="'toy', a folder, shards 'DIR/*.tar', InstructPix2Pix's tree")
    p.add_argument("--mix", nargs="+", type=non_negative_float, default=[1.0], help="weights of several --data")
    p.add_argument("--texts", help="JSONL file of texts that --data lacks")
    p.add_argument("--validation", help="like --data (default: its own split; where it has none, the training data itself)")
    p.add_argument("--output", type=Path, default=Path("runs/cycle"))
    p.add_argument("--steps", type=positive_int, help="optimizer steps")
    p.add_argument("--batch-size", type=positive_int, help="images a forward pass")
    p.add_argument("--accumulate", type=positive_int, default=1, help="forward passes an optimizer step")
    p.add_argument("--resolution", type=positive_int, help="images are cropped to this square")
    p.add_argument("--lr", type=non_negative_float, help="AdamW's learning rate")
    p.add_argument("--clip-grad", type=number(float, 1e-6), default=1.0, help="bound of the gradient's norm")
    p.add_argument("--ema", type=number(float, 0, 1), default=.9999, help="decay of the weights' moving average")
    p.add_argument("--ema-on-host", action="store_true",
                   help="keep that average in the host's memory, not the GPU's, and update it every tenth step")
    p.add_argument("--weights", type=non_negative_float, nargs=4, metavar=("CLIP", "ATTN", "SIM", "RECON"), help="of the losses")
    p.add_argument("--denoise", type=non_negative_float, default=1.0,
                   help="weight of denoising half of the inputs, as `compute_losses` says")
    p.add_argument("--delta", type=non_negative_float, default=0.,
                   help="weight of `delta_loss`: to edit as the UNet of the start does when it is told both captions")
    p.add_argument("--t-min", type=number(int, 0, 999), help="smallest timestep of the forward edit")
    p.add_argument("--start", choices=("source", "noise"), default="source", help="what is noised for the forward edit")
    p.add_argument("--reverse-start", choices=("source", "edit"), default="source", help="what is noised for the reverse edit")
    p.add_argument("--reencode", action="store_true", help="the reverse edit sees E(D(z_edit)) instead of z_edit")
    p.add_argument("--sharp", type=number(int, 0, 999), default=0,
                   help="steps of a sampled edit that stands for the one-step estimate")
    p.add_argument("--views", type=number(int, 0, 64), help="random views of an image that CLIP judges; 0 for the image as it is")
    p.add_argument("--identity-steps", type=number(int, 0), default=0,
                   help="first, so many of --objective identity with its defaults, and as many with --delta (300 from text2image)")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="of the forward passes (default: bf16 on CUDA, else fp32)")
    p.add_argument("--workers", type=number(int, 0), default=4 if torch.cuda.is_available() else 0,
                   help="processes that load images (4 beside a GPU, else 0)")
    p.add_argument("--seed", type=seed_int, default=0)
    p.add_argument("--log-every", type=positive_int, default=50)
    p.add_argument("--save-every", type=positive_int, default=500, help="steps between checkpoints, validations and pictures")
    args = p.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != p.get_default(name)}
    if unused := given & set(NOT_FOR[args.objective]):
        p.error(f"--{min(unused).replace('_', '-')} has no effect on --objective {args.objective}")
    if len(args.data) != len(args.mix):
        p.error(f"--data names {len(args.data)} sources, --mix {len(args.mix)} weights (quote what has {{..}} or *)")
    if args.texts and args.data == ["toy"]:
        p.error("--texts has no effect on --data toy")
    defaults = TOY | TOY_RUNS[args.objective] if args.data == ["toy"] else PAPER
    from_toy = Path(args.model or defaults["model"]).resolve() == Path(TOY["model"])
    defaults = {"unet": "text2image" if from_toy else "unet"} | defaults
    if args.objective == "cycle" and (args.unet or defaults["unet"]) == "text2image":
        defaults |= FROM_TEXT2IMAGE
    p.set_defaults(**defaults)
    args = p.parse_args(argv)
    if not args.denoise and (args.objective == "identity" or args.identity_steps):
        p.error("--denoise 0 leaves the identity training nothing to learn")
    if "toy" in args.data and args.resolution != TOY["resolution"]:
        p.error(f"--data toy has images of --resolution {TOY['resolution']}")
    args.precision = args.precision or ("bf16" if args.device.startswith("cuda") else "fp32")
    return p, args


def open_data(path, split, args, side={}):
    return open_source(path, split, args.resolution, args.seed, args.objective == "ip2p", side)


def run(args):
    side = read_texts(args.texts) if args.texts else {}
    train = Mix([open_data(path, "train", args, side) for path in args.data], args.mix)
    if args.validation:
        validation = open_data(args.validation, "validation", args, side)
    else:
        validation = Mix([open_data(path, "validation", args, side) for path in args.data], args.mix)
        if any(isinstance(source, (Folder, Shards)) for source in validation.sources):
            print("validation on the training data itself, which has no split of its own: --validation names other data")
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = EditModel.from_pretrained(args.model, args.device, unet=args.unet)
    scorer = ClipScorer.from_pretrained(args.clip, args.device) if args.objective == "cycle" else None
    args.output.mkdir(parents=True, exist_ok=True)
    if args.identity_steps:                                   # first what the image is for, then what a text may do to it
        del model
        for stage in ("identity", "delta")[:2 if args.delta else 1]:
            before = copy.copy(args)
            vars(before).update(TOY_RUNS["identity"] if args.data == ["toy"] else {}, objective="identity", identity_steps=0,
                                delta=float(stage == "delta"), steps=args.identity_steps, output=args.output / stage)
            if stage == "delta":
                before.model, before.unet = str(args.output / "identity/model"), "unet"
            run(before)
        model = EditModel.from_pretrained(before.output / "model", args.device)
    saved = copy.copy(model)                                  # with the frozen parts as they came
    saved.vae, saved.text_encoder = (copy.deepcopy(part).cpu() for part in (model.vae, model.text_encoder))
    unet, (trained, average, optimizer) = model.unet, prepare(model, scorer, args)
    average, every = average if rank == 0 else [], 10 if args.ema_on_host else 1
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("steps", "output", "log_every", "save_every", "workers")}
    first, rows, best, sums = 0, [], float("inf"), {}
    state_file = args.output / "state.pt"
    if state_file.exists():
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{state_file} is damaged ({str(error).splitlines()[0]}); remove it to start again") from None
        changed = [k for k in settings if settings[k] != state["settings"].get(k)]
        if changed:
            raise ValueError(f"{args.output} holds a run with another --{changed[0].replace('_', '-')} "
                             f"({state['settings'].get(changed[0])}): choose another --output, or remove it")
        unet.load_state_dict(state["unet"])
        for a, ema in zip(average, state["ema"]):
            a.copy_(ema)
        optimizer.load_state_dict(state["optimizer"])
        first, rows, best, sums = state["step"], state["rows"], state["best"], state["sums"]
        del state
    print(f"{args.objective} training of {sum(p.numel() for p in trained):,} parameters on {args.device}, "
          f"{args.precision}, from step {first}; " + ", ".join(f"{k} {v}" for k, v in vars(args).items()))

    loader = batches(train, args.batch_size, args.seed, first * args.accumulate, args.workers, slice(rank, None, args.processes))
    shown = next(batches(validation, 8, seed=0)).to(args.device)
    started, progress = time.time(), tqdm(total=args.steps, initial=first, desc="train", disable=rank > 0)
    averaged = first                                          # the step of the average's last update
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr)
        for part in range(args.accumulate):
            # parts and processes count alike: P processes do what one does with P times the --accumulate
            seed = ((args.seed * 1_000_003 + step) * args.accumulate + part) * args.processes + rank
            generator = torch.Generator().manual_seed(seed % 2 ** 63)
            losses = compute_losses(model, scorer, next(loader).to(args.device), args, generator)
            (losses["loss"] / args.accumulate).backward()
            losses = {name: loss.detach() for name, loss in losses.items()}
            mean_of_processes(losses.values())
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss / args.accumulate
        mean_of_processes(p.grad for p in trained)
        if not torch.nn.utils.clip_grad_norm_(trained, args.clip_grad).isfinite():
            raise ValueError(f"the gradient is not finite at step {step + 1}; go on from the last checkpoint, "
                             f"--model {args.output / 'model'}, with a smaller --lr and another --output")
        optimizer.step()
        optimizer.zero_grad()
        progress.update()
        done = step + 1
        saves = done % args.save_every == 0 or done == args.steps
        if done % every == 0 or saves:
            update_average(average, trained, step, args.ema, done - averaged)
            averaged = done
        if done % args.log_every == 0:
            images = done * args.batch_size * args.accumulate * args.processes
            rate = images / done * (done - first) / (time.time() - started)
            steps = done - (rows[-1]["step"] if rows else 0)
            rows.append({"step": done, "images": images} | {k: round(v.item() / steps, 4) for k, v in sums.items()})
            tqdm.write(", ".join(f"{k} {v}" for k, v in rows[-1].items()) + f", {rate:.1f} images/s, "
                       f"{peak_memory(args.device):.1f} GiB")
            sums = {}
        if rank == 0 and saves:
            exchange(trained, average)
            score = validate(model, scorer, validation, args)
            score = score["cec" if args.objective == "cycle" else "loss"]
            tqdm.write(f"step {done}: validation {'L_CEC' if args.objective == 'cycle' else 'loss'} {score:.4f}")
            for name in ("best", "model") if score < best else ("model",):
                saved.save_pretrained(args.output / name)
            with autocast(args):
                picture = figure(model, shown)
            save_png(picture, args.output / f"step-{done:06d}.png")
            exchange(trained, average)
            best = min(best, score)
            if rows:
                write_log(args.output, rows)
            replace_file(state_file, lambda path: torch.save(
                {"unet": unet.state_dict(), "ema": average, "optimizer": optimizer.state_dict(), "step": done,
                 "rows": rows, "best": best, "sums": sums, "settings": settings}, path))
    if dist.is_initialized():
        dist.barrier()                                        # nobody reads or ends before all is written


def main(argv=None):
    processes = int(os.environ.get("WORLD_SIZE", 1))          # more than one under torchrun
    if processes > 1 and torch.cuda.is_available():           # before anything else uses the first GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    parser, args = parse(argv)
    quiet_transformers()
    args.processes = processes
    try:
        if processes > 1:
            if args.device not in ("cpu", "cuda"):
                raise ValueError(f"--device {args.device}: of several processes, torchrun gives each its GPU")
            backend = "nccl" if args.device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))      # others wait while the first one saves
            if dist.get_rank():                               # the first alone writes and prints
                sys.stdout = open(os.devnull, "w")
        with attention_kernel(args):                          # around the backward pass, too, which may recompute
            run(args)
    except torch.OutOfMemoryError:
        parser.error(f"the memory of {args.device} is too small; choose a smaller --batch-size and a larger --accumulate")
    except (ValueError, OSError, SafetensorError) as error:   # the last on a full disk
        parser.error(str(error))


if __name__ == "__main__":
    main()
