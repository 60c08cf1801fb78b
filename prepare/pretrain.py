"""Makes the parts of the toy model that a training starts from: CLIP, VAE and a text-to-image UNet.

    python -m prepare.pretrain                       # all three in turn, into models/toy
    python -m prepare.pretrain --parts vae           # one of them (text2image needs the other two)

The same command goes on where it was stopped; what it has made so far is in the folder `unfinished` of the model.
A CLIP or VAE made anew does not fit the UNets in models/toy/unet and models/toy/baseline: train these anew, too, as
docs/evidence.md says.  Real trainings start from Stable Diffusion 1.5 and CLIP ViT-L/14 instead.  These small ones
have the same files in the same layout, and run through the same code.
"""
import copy
import json
import math
import random
import shutil
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import toy
from checkpoint import load_run, save_network, save_run, write_json
from cli import Parser, about, claimed, errors, number, positive_int, remove, replace_file, sweep, unfinished
from data import read_json
from experiments.truth import is_clean, read_scenes
from losses import ClipScorer
from train import SETTINGS, noise_error, update_average
from uip2p import TIMESTEPS, EditModel
from unet import UNet
from vae import VAE

TOY = Path(__file__).resolve().parent.parent / "models/toy"
# The parts in the order in which they are made, and the files and folders of each.
PARTS = {"clip": ("tokenizer", "clip", "text_encoder"), "vae": ("vae",),
         "text2image": ("scheduler", "edit_defaults.json", "text2image"), "judge": ("judge",)}
WIDTH = 64                                # of the text encoder, hence of the UNet's context
TOKENS = 24                               # of a text, instead of 77: the longest caption has 17
SAVE_EVERY = 250                          # steps of a training, which goes on from there
BATCH = 64                                # edits, each with two scenes; of the VAE a quarter
LATENTS = 500                             # batches of scenes that text2image learns from
TESTED = 100                              # scenes that a part is tested with
SAMPLED = 20                              # steps of the images that text2image is tested with

# ---- sizes, and the recommendations of the toy's models ------------------------------------------------------------

CLIP = {
    "projection_dim": 64, "logit_scale_init_value": math.log(10),
    "text_config": {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3,
                    "num_attention_heads": 4},
    "vision_config": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                      "image_size": toy.SIZE, "patch_size": 4},
}
JUDGE = {                                 # sees other patches, is wider, and reads with fewer layers
    "projection_dim": 96, "logit_scale_init_value": math.log(10),
    "text_config": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6},
    "vision_config": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8,
                      "image_size": toy.SIZE, "patch_size": 8},
}
AUTOENCODER = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1,
    "block_out_channels": [32, 64], "norm_num_groups": 8, "act_fn": "silu", "sample_size": toy.SIZE,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}
TEXT2IMAGE = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [48, 96], "layers_per_block": 1,
    "attention_head_dim": 3, "cross_attention_dim": WIDTH, "norm_num_groups": 8, "sample_size": toy.SIZE // 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": TIMESTEPS, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "steps_offset": 1, "set_alpha_to_one": False,
    "clip_sample": False, "timestep_spacing": "leading",
}
EDIT_DEFAULTS = {"steps": 10, "text_guidance": 1.5, "image_guidance": 1.2, "resolution": toy.SIZE}


# ---- what the parts share ------------------------------------------------------------------------------------------

def make_tokenizer(folder):
    """A CLIP tokenizer (bytes, bytes that end a word, merges) in which each word of the toy world is one token."""
    # ---- the words, and the merges that join their letters; the most frequent pair comes first
    words = set()
    for split in toy.SPLITS:
        for edit in (toy.edit(split, i) for i in range(600)):
            texts = edit.scene.caption, edit.edited.caption, edit.instruction, edit.reverse_instruction
            words.update(" ".join(texts).replace(",", " ").split())
    spelled, merges = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)], []
    while any(len(word) > 1 for word in spelled):
        pairs = Counter()
        for word in spelled:
            pairs.update(zip(word, word[1:]))
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for word in spelled:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = ["".join(best)]

    # ---- the files
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    write_json({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
               folder / "tokenizer_config.json")
    return CLIPTokenizer.from_pretrained(folder)


def autocast(args):
    return torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")


def train(model, loss_of, steps, lr, folder, args, average=None):
    """Minimises loss_of(step): AdamW, linear warm-up over 100 steps, then a half cosine down to zero.

    folder: of the part that is made; what is done so far is kept beside it, in `<name>.run`
    average: a copy of the model, which becomes the moving average of the weights"""
    # ---- begin or go on
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    kept, settings = folder.with_name(f"{folder.name}.run"), {"model": folder.name}
    parts = {"model": model, "optimizer": optimizer} | ({"average": average} if average else {})
    kept.mkdir(exist_ok=True)
    done = load_run(kept, settings, parts).get("step", 0)

    # ---- train
    progress = trange(done, steps, initial=done, total=steps, desc=folder.name)
    for step in progress:
        torch.manual_seed(args.seed * 1_000_003 + step)
        random.seed(args.seed * 1_000_003 + step)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, cosine)
        with autocast(args):
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if average:
            update_average(average, model, step + 1)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % SAVE_EVERY == 0:
            save_run(kept, settings, parts, {"step": step + 1})


def scenes_of_edits(step, size):
    """The scenes before `size` edits, then those after them; each step has other ones."""
    edits = [toy.edit("train", step * size + i) for i in range(size)]
    return [edit.scene for edit in edits] + [edit.edited for edit in edits]


# ---- the parts -----------------------------------------------------------------------------------------------------

def degrade(images):
    """Blurs images (B, 3, H, W) and adds noise, each image by another amount.  So the embedding stays meaningful where
    the losses need it: for one-step estimates, which are blurred."""
    B = len(images)
    blurred = F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, torch.rand(B, 1, 1, 1))
    return images + 0.2 * torch.rand(B, 1, 1, 1) * torch.randn_like(images)


def contents(scene):
    """What a caption says of a scene, whatever its order."""
    return scene.background, sorted(o.name for o in scene.objects)


def same_contents(scenes):
    """(B, B): 1 where two scenes have the same objects and background, otherwise 0; each row divided by its sum."""
    said = [contents(scene) for scene in scenes]
    same = torch.tensor([[float(a == b) for b in said] for a in said])
    return same / same.sum(1, keepdim=True)


def pretrain_clip(folder, tokenizer, config, args):
    """Contrastive training on images and captions.  A batch holds scenes and their edits, so that near neighbours must
    be told apart.  Images that share a caption are no negatives of each other."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    config = CLIPConfig(**config | {"text_config": config["text_config"] | special})
    clip = CLIPModel._from_config(config, attn_implementation="eager")
    mean, std = (torch.tensor(v)[:, None, None] for v in (ClipScorer.MEAN, ClipScorer.STD))

    def similarities(scenes, images):
        tokens = tokenizer([scene.caption for scene in scenes], padding=True, return_tensors="pt")
        images = (images / 2 + 0.5 - mean) / std                              # (B, 3, H, W)
        return clip(**tokens, pixel_values=images).logits_per_image.float()   # (B, B)

    def loss_of(step):
        scenes = scenes_of_edits(step, BATCH)
        logits = similarities(scenes, degrade(toy.render(scenes)))            # (B, B)
        same = same_contents(scenes)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    # ---- train and save
    train(clip, loss_of, args.clip_steps, 1e-3, folder, args)
    clip.eval().half()
    with about(f"{folder} cannot be written"):
        clip.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    # ---- test
    scenes = {scene.caption: scene for scene in (toy.edit("test", i).scene for i in range(4 * TESTED))}
    scenes = list(scenes.values())[:TESTED]
    with torch.no_grad():
        found = similarities(scenes, toy.render(scenes)).argmax(1) == torch.arange(TESTED)
    print(f"{folder.name}: the right one among the captions of {TESTED} test scenes in {found.float().mean():.0%}")
    return clip


def any_colours(scene):
    """The scene in colours that have no name; half of the scenes keep theirs."""
    def colour():
        return tuple(random.uniform(0, 255) for _ in range(3))

    if random.random() < 0.5:
        return scene
    objects = tuple(replace(o, colour=colour()) for o in scene.objects)
    return replace(scene, background=colour(), objects=objects)


def pretrain_vae(path, args):
    """L1 reconstruction and a small KL term, of all colours: the entangled pairs have tints, and a VAE that has only
    seen the named colours would show them as others of these.  The scale of the latents is measured at the end, as
    Stable Diffusion's 0.18215 was."""
    vae = VAE(AUTOENCODER)

    def loss_of(step):
        images = toy.render([any_colours(scene) for scene in scenes_of_edits(step, BATCH // 4)])
        mean, logvar = (moment.float() for moment in vae.moments(images))     # (B, 4, h, w) each
        decoded = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean))
        kl = (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
        return (decoded.float() - images).abs().mean() + 5e-4 * kl

    train(vae, loss_of, args.vae_steps, 2e-3, path / "vae", args)
    edits, rng = [toy.edit("test", i) for i in range(5 * TESTED)], random.Random(0)
    with torch.no_grad():
        images = toy.render([edit.edited for edit in edits] + [toy.entangled(edit, rng) for edit in edits])
        latents = vae.encode(images)                                          # (2N, 4, h, w)
        true, tinted = ((vae.decode(latents) - images).abs().mean((1, 2, 3)) / 2).chunk(2)
    deviation = latents.chunk(2)[0].std().item()
    vae.config["scaling_factor"] = round(1 / deviation, 5)
    with about(f"{path / 'vae'} cannot be written"):
        save_network(vae.half(), path / "vae")
    print(f"VAE: L1 {true.mean():.4f} on {len(edits)} test scenes (range 0-1), {tinted.mean():.4f} on their entangled "
          f"pairs; deviation of the latents {deviation:.3f}")


def pretrain_text2image(path, args):
    """Denoising with the caption as condition; a tenth of the captions is dropped, for guidance.  What is kept is the
    moving average of the weights.  The latents of the scenes are computed once, before."""
    # ---- the model
    write_json(SCHEDULER, path / "scheduler/scheduler_config.json")
    write_json(EDIT_DEFAULTS, path / "edit_defaults.json")
    unet = UNet(TEXT2IMAGE).to(memory_format=torch.channels_last)
    average = copy.deepcopy(unet)
    with tempfile.TemporaryDirectory(dir=path) as untrained:      # only for the other parts of the model
        save_network(unet, Path(untrained))
        model = EditModel.from_pretrained(untrained)

    # ---- the data
    captions, latents = [], []
    with torch.no_grad(), autocast(args):
        for part in trange(LATENTS, desc="latents"):
            scenes = scenes_of_edits(part, BATCH)
            captions += [scene.caption for scene in scenes]
            latents.append(model.encode(toy.render(scenes)).float())
    latents = torch.cat(latents)                                              # (N, 4, h, w)

    def loss_of(step):
        rows = torch.randint(len(latents), (BATCH,))
        context = model.encode_text([captions[i] if random.random() > 0.1 else "" for i in rows])
        z_0 = latents[rows]                                                   # (B, 4, h, w)
        noise = torch.randn_like(z_0)
        t = torch.randint(TIMESTEPS, (len(z_0),))
        eps = unet(model.add_noise(z_0, noise, t), t, context)
        return noise_error(model, eps, noise, t, SETTINGS["snr_weight"][3])

    # ---- train and save
    train(unet, loss_of, args.text2image_steps, 2e-3, path / "text2image", args, average)
    with about(f"{path / 'text2image'} cannot be written"):
        save_network(average.half(), path / "text2image")

    # ---- test: the generated images are read back
    model = EditModel.from_pretrained(path / "text2image")
    for split in ("validation", "test"):
        scenes = [toy.edit(split, i).scene for i in range(TESTED)]
        generated = model.edit(toy.render(scenes), [scene.caption for scene in scenes], SAMPLED, text_guidance=3.0,
                               image_guidance=1.0)
        shown = [contents(found) == contents(scene) and is_clean(found, image)
                 for scene, found, image in zip(scenes, read_scenes(generated), generated)]
        print(f"text2image: {sum(shown) / TESTED:.0%} of {TESTED} images show what the caption says, and nothing else "
              f"({split} captions)")


# ---- the command ---------------------------------------------------------------------------------------------------

def make_part(part, folder, args):
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    if part == "clip":
        clip = pretrain_clip(folder / "clip", make_tokenizer(folder / "tokenizer"), CLIP, args)
        with about(f"{folder / 'text_encoder'} cannot be written"):
            clip.text_model.save_pretrained(folder / "text_encoder")
    if part == "vae":
        pretrain_vae(folder, args)
    if part == "text2image":
        pretrain_text2image(folder, args)
    if part == "judge":
        pretrain_clip(folder / "judge", make_tokenizer(folder / "judge"), JUDGE, args)


def make(args):
    # ---- begin or go on
    new = args.output / "unfinished"
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    sweep(args.output)
    new.mkdir(exist_ok=True)
    if not (new / "settings.json").exists():
        replace_file(new / "settings.json", lambda file: write_json(settings, file))
    if read_json(new / "settings.json") != settings:
        raise ValueError(f"{new} was begun with other options (see its settings.json); go on with those, or remove it")

    # ---- the parts that are asked for, beside those that they need and that are there
    for part, names in PARTS.items():
        if part in args.parts:
            if (new / f"{part}.run").exists() or not (new / names[-1]).exists():
                make_part(part, new, args)
                remove(new / f"{part}.run")
        elif part != "judge" and "text2image" in args.parts:
            for name in names:
                shutil.copytree(args.output / name, new / name, dirs_exist_ok=True)

    # ---- in their place.  All old ones go first: what a kill leaves lacks parts, and does not load.
    made = [name for part in args.parts for name in PARTS[part]]
    with unfinished(args.output / "parts") as ready:
        new.rename(ready)
        (ready / "old").mkdir()
        for name in made:
            if (args.output / name).exists():
                (args.output / name).rename(ready / "old" / name)
        for name in made:
            (ready / name).rename(args.output / name)


def main(argv=None):
    p = Parser("prepare.pretrain", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, default=TOY, help="the folder of the model (%(default)s)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS)[:3],
                   help="a judge is a second CLIP, which no training sees (experiments.claims)")
    p.add_argument("--clip-steps", type=positive_int, default=2500, help="also of the judge (%(default)s)")
    p.add_argument("--vae-steps", type=positive_int, default=4500, help="(%(default)s)")
    p.add_argument("--text2image-steps", type=positive_int, default=3600, help="(%(default)s)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                   help="bf16 is faster where the CPU has AMX (%(default)s)")
    p.add_argument("--seed", type=number(int, 0, 2 ** 32), default=0, help="of everything (%(default)s)")
    args = p.parse_args(argv)
    args.parts = sorted(set(args.parts))
    for part, name in (("clip", "clip_steps"), ("vae", "vae_steps"), ("text2image", "text2image_steps")):
        asked = part in args.parts or part == "clip" and "judge" in args.parts
        if not asked and getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} has no effect without --parts {part}")
    if "text2image" in args.parts:
        for part in ("clip", "vae"):
            if part not in args.parts and not list((args.output / part).glob("*.safetensors")):
                p.error(f"text2image needs {args.output / part}: make it first, with --parts {part}")
    with errors(p), claimed(args.output):
        make(args)


if __name__ == "__main__":
    main()
