"""Makes the parts of the toy model that a UIP2P training starts from: CLIP, VAE and a text-to-image UNet.

    python pretrain.py                       # all three in turn, into models/toy
    python pretrain.py --parts vae           # one of them (text2image needs the other two)

A VAE or CLIP made anew does not fit the editor in models/toy/unet: train that anew too, as docs/trainings.md says.
Real training starts from Stable Diffusion 1.5 and CLIP ViT-L/14 instead; these small ones have the same files in the
same layout and run through the same code.
"""
import copy
import json
import math
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import toy
from cli import Parser, number, positive_int, replace_file
from losses import CLIP_MEAN, CLIP_STD, ClipScorer
from uip2p import TIMESTEPS, EditModel, noise_error, update_average
from unet import UNet
from vae import VAE

HERE = Path(__file__).resolve().parent
PARTS = "clip", "vae", "text2image", "judge"                   # the order in which they are made
WIDTH = 64                                                    # of the text encoder, hence of the UNet's context
TOKENS = 24                                                   # of a text, instead of 77: the longest caption has 17
CLIP = dict(
    projection_dim=64, logit_scale_init_value=math.log(10),
    text_config=dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=4),
    vision_config=dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                       image_size=toy.SIZE, patch_size=4))
JUDGE = dict(                                                 # sees other patches, is wider, and reads with fewer layers
    projection_dim=96, logit_scale_init_value=math.log(10),
    text_config=dict(hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=6),
    vision_config=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=8,
                       image_size=toy.SIZE, patch_size=8))
AUTOENCODER = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1,
    block_out_channels=[24, 48, 64], norm_num_groups=8, act_fn="silu", sample_size=toy.SIZE,
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
TEXT2IMAGE = dict(
    _class_name="UNet2DConditionModel", in_channels=4, out_channels=4, block_out_channels=[32, 64], layers_per_block=1,
    attention_head_dim=2, cross_attention_dim=WIDTH, norm_num_groups=8, sample_size=toy.SIZE // 4,
    down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2)
SCHEDULER = dict(
    _class_name="DDIMScheduler", num_train_timesteps=TIMESTEPS, beta_start=0.00085, beta_end=0.012,
    beta_schedule="scaled_linear", prediction_type="epsilon", steps_offset=1, set_alpha_to_one=False, clip_sample=False,
    timestep_spacing="leading")
EDIT_DEFAULTS = dict(steps=10, text_guidance=1.5, image_guidance=1.2, resolution=toy.SIZE)


def make_tokenizer(path):
    """A CLIP tokenizer (bytes, bytes that end a word, merges) whose merges make each word of the toy world one token."""
    texts = [t for split in toy.SPLITS for i in range(600) for e in [toy.edit(split, i)]
             for t in (e.scene.caption, e.edited.caption, e.instruction, e.reverse_instruction)]
    words = sorted({w for t in texts for w in t.replace(",", " ").split()})
    spelled, merges = [list(w[:-1]) + [w[-1] + "</w>"] for w in words], []
    while pairs := Counter(pair for word in spelled for pair in zip(word, word[1:])):
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for word in spelled:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = ["".join(best)]
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="CLIPTokenizer", model_max_length=TOKENS, bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        unk_token="<|endoftext|>", pad_token="<|endoftext|>"), indent=2))
    return CLIPTokenizer.from_pretrained(path)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2)))


def save_part(module, folder, config):
    write_json(folder / "config.json", config)
    replace_file(folder / "diffusion_pytorch_model.safetensors",
                 lambda temporary: save_file({k: v.half().contiguous() for k, v in module.state_dict().items()}, temporary))


def train(model, loss_of, steps, lr, precision, name):
    """Minimises loss_of(step): AdamW, linear warm-up over 100 steps, then a half cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=.01)
    progress = trange(steps, desc=name)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, .5 + .5 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")


def batch_of_edits(step, size, split="train"):
    return [toy.edit(split, step * size + i) for i in range(size)]


def pretrain_clip(folder, tokenizer, config, steps, precision):
    """Contrastive training on (image, caption).  A batch holds scenes and their edits, so that near neighbours must be
    told apart; images that share a caption are no negatives of each other.  Blur and noise on the images keep the
    embedding meaningful where the losses need it: on one-step estimates, which are blurred."""
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                   pad_token_id=tokenizer.eos_token_id, vocab_size=len(tokenizer))
    clip = CLIPModel._from_config(CLIPConfig(**config | dict(text_config=config["text_config"] | special)),
                                  attn_implementation="eager")
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))

    def similarities(scenes, images):
        tokens = tokenizer([s.caption for s in scenes], padding=True, return_tensors="pt")
        return clip(**tokens, pixel_values=(images / 2 + .5 - mean) / std).logits_per_image.float()

    def loss_of(step):
        edits = batch_of_edits(step, 64)
        scenes = [e.scene for e in edits] + [e.edited for e in edits]
        images = toy.render(scenes)
        blurred = F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, 1)
        images = torch.lerp(images, blurred, torch.rand(len(images), 1, 1, 1))
        images = images + .2 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
        names = [(s.background, *sorted(o.name for o in s.objects)) for s in scenes]
        same = torch.tensor([[a == b for b in names] for a in names]).float()
        same = same / same.sum(1, keepdim=True)
        logits = similarities(scenes, images)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    train(clip, loss_of, steps, 1e-3, precision, folder.name)
    temporary = folder.with_name(f"{folder.name}.tmp")
    clip.eval().half().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)                                  # whole, or not there
    scenes = list({s.caption: s for s in (toy.edit("test", i).scene for i in range(400))}.values())[:100]
    with torch.no_grad():
        found = similarities(scenes, toy.render(scenes)).argmax(1) == torch.arange(100)
    print(f"{folder.name}: the right one among the captions of 100 test scenes in {found.float().mean():.0%}")
    return clip


def pretrain_vae(path, steps, precision):
    """L1 reconstruction and a small KL term; the latents' scale is measured at the end, as Stable Diffusion's 0.18215 was."""
    vae = VAE(AUTOENCODER)

    def loss_of(step):
        edits = batch_of_edits(step, 32)
        images = toy.render([e.scene for e in edits] + [e.edited for e in edits])
        mean, logvar = (m.float() for m in vae.moments(images))
        decoded = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean))
        kl = (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
        return (decoded.float() - images).abs().mean() + 5e-4 * kl

    train(vae, loss_of, steps, 2e-3, precision, "vae")
    with torch.no_grad():
        images = toy.render([toy.edit("test", i).edited for i in range(500)])
        latents = vae.encode(images)
        error = (vae.decode(latents) - images).abs().mean() / 2
    save_part(vae, path / "vae", AUTOENCODER | dict(scaling_factor=round(1 / latents.std().item(), 5)))
    print(f"VAE: L1 {error:.4f} on 500 test scenes (range 0-1), standard deviation of the latents {latents.std():.3f}")


def pretrain_text2image(path, steps, precision):
    """Denoising with the caption as condition, a tenth of the captions dropped for guidance; kept is the moving average.
    The latents of the scenes are computed once, before."""
    unet = UNet(TEXT2IMAGE).to(memory_format=torch.channels_last)
    write_json(path / "scheduler/scheduler_config.json", SCHEDULER)
    write_json(path / "edit_defaults.json", EDIT_DEFAULTS)
    with tempfile.TemporaryDirectory(dir=path) as start:      # for the other parts alone: what is in text2image/ stays
        save_part(unet, Path(start), TEXT2IMAGE)
        model = EditModel.from_pretrained(path, unet=Path(start).name)
    ema = copy.deepcopy(unet)
    average = list(ema.parameters())
    captions, latents = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for part in trange(500, desc="latents"):
            scenes = [scene for e in batch_of_edits(part, 64) for scene in (e.scene, e.edited)]
            captions += [scene.caption for scene in scenes]
            latents.append(model.encode(toy.render(scenes)).float())
    latents = torch.cat(latents)                                                          # (64000, 4, 8, 8)

    def loss_of(step):
        rows = torch.randint(len(latents), (128,))
        context = model.encode_text([captions[i] if random.random() > .1 else "" for i in rows])
        z_0 = latents[rows]
        noise, t = torch.randn_like(z_0), torch.randint(TIMESTEPS, (len(z_0),))
        update_average(average, unet.parameters(), step)
        return noise_error(model, unet(model.add_noise(z_0, noise, t), t, context), noise, t)

    train(unet, loss_of, steps, 1e-3, precision, "text2image")
    save_part(ema, path / "text2image", TEXT2IMAGE)
    model = EditModel.from_pretrained(path, unet="text2image")
    scorer = ClipScorer.from_pretrained(path / "clip")
    scenes = [toy.edit("test", i).scene for i in range(100)]
    captions = [s.caption for s in scenes]
    generated = model.edit(toy.render(scenes), captions, steps=20, text_guidance=3., image_guidance=1.)
    with torch.no_grad():
        found = (scorer.embed_images(generated) @ scorer.embed_texts(captions).T).argmax(1)
    print(f"text2image: CLIP finds the right one among 100 captions for {(found == torch.arange(100)).float().mean():.0%}")


def make(args):
    for part in sorted(set(args.parts), key=PARTS.index):
        torch.manual_seed(args.seed)
        random.seed(args.seed)
        if part == "clip":
            tokenizer = make_tokenizer(args.output / "tokenizer")
            clip = pretrain_clip(args.output / "clip", tokenizer, CLIP, args.clip_steps, args.precision)
            clip.text_model.save_pretrained(args.output / "text_encoder")
        if part == "vae":
            pretrain_vae(args.output, args.vae_steps, args.precision)
        if part == "text2image":
            pretrain_text2image(args.output, args.text2image_steps, args.precision)
        if part == "judge":
            pretrain_clip(args.output / "judge", make_tokenizer(args.output / "judge"), JUDGE, args.clip_steps, args.precision)


def main(argv=None):
    p = Parser("pretrain.py", description=__doc__.split("\n")[0])
    p.add_argument("--output", type=Path, default=HERE / "models/toy")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3],
                   help="a judge is a second CLIP, which no training sees (claims.py)")
    p.add_argument("--clip-steps", type=positive_int, default=2500, help="also of the judge")
    p.add_argument("--vae-steps", type=positive_int, default=2500)
    p.add_argument("--text2image-steps", type=positive_int, default=5000)
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is faster where the CPU has AMX")
    p.add_argument("--seed", type=number(int, 0, 2 ** 32), default=0)
    args = p.parse_args(argv)
    if "text2image" in args.parts:
        for part in ("clip", "vae"):
            if part not in args.parts and not list((args.output / part).glob("*.safetensors")):
                p.error(f"text2image needs {args.output / part}: make it first, with --parts {part}")
    try:
        make(args)
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
