"""UIP2P's model: Stable Diffusion's parts as InstructPix2Pix joins them, guided DDIM sampling (`EditModel.edit`), and
the paper's cycle of one forward and one reverse edit (`cycle`).

    model = EditModel.from_pretrained("models/toy")          # or "timbrooks/instruct-pix2pix"
    edited = model.edit(images, ["make the background pink"])
"""
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from attention import edit_region
from unet import UNet
from vae import VAE, modern_names

STOP_WORDS = set("a an the this that it its his her their and or of to in on at by for from with into as is are be".split())
TIMESTEPS = 1000                                              # Stable Diffusion's t is in 0 .. 999
DEFAULTS = dict(steps=int, text_guidance=float, image_guidance=float, resolution=int)     # what a model may recommend
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def find_model(path_or_id):
    """The local directory of a model: the path itself, or where the hub's files are, safetensors only, downloaded once."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(path_or_id).startswith(".") or str(path_or_id).count("/") != 1:
        raise ValueError(f"{path_or_id} is neither a model directory nor a hub id like timbrooks/instruct-pix2pix")
    texts = ["tokenizer/*.json", "tokenizer/*.txt", "scheduler/*.json", "*/config.json", "edit_defaults.json"]
    try:
        for variant in ("", ".fp16"):                         # the second only where a repository has no other
            path = Path(snapshot_download(str(path_or_id), allow_patterns=texts + [
                f"{part}/{stem}{end}" for part, stem in WEIGHTS.items() for end in
                (f"{variant}.safetensors", f".safetensors.index{variant}.json", f"{variant}-*.safetensors")]))
            if list(path.glob("unet/*.safetensors")):
                break
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{path_or_id} is no local directory, and the hub did not give it: "
                         f"{str(error).splitlines()[0]}") from None
    return path


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is not a complete model in the hub's layout") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def weight_files(folder, stem):
    """(the safetensors files of a model part: one, or the shards that an index names; their variant, None or "fp16")."""
    for variant in (None, "fp16"):
        name = f"{stem}.{variant}" if variant else stem
        index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"], variant
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not shards or not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                raise ValueError(f"{index} has no weight_map that names files")
            return [folder / shard for shard in sorted(set(shards.values()))], variant
    pickles = [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]
    if pickles:
        raise ValueError(f"{pickles[0]} is a pickle, which may run code when loaded; convert it where you trust it: safetensors"
                         f".torch.save_file(torch.load('{pickles[0].name}', weights_only=True), '{stem}.safetensors')")
    raise ValueError(f"{folder} has no {stem}.safetensors")


def load_part(network, folder, adapt):
    """Builds network(config) from the config.json of a folder and fills it, strictly, from its safetensors.  `adapt`
    may change (config, state dict) before.  ValueError names the file and what is wrong with it."""
    state, config = {}, read_json(folder / "config.json")
    for file in weight_files(folder, "diffusion_pytorch_model")[0]:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    try:
        config, state = adapt(config, state)
        with torch.device("meta"):                            # no memory or time for weights that are replaced at once
            module = network(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"{folder}: the weights do not fit config.json: {lines[1].strip()[:300]}") from None
    return module


def with_image_channels(config, state):
    """A text-to-image UNet becomes InstructPix2Pix's: as many input channels again, for the image latents, at zero."""
    latents, channels = config.get("out_channels", 4), config.get("in_channels", 4)
    if channels not in (latents, 2 * latents):
        raise ValueError(f"a UNet of {channels} input channels is no editor, which has {2 * latents}, and no text-to-image model")
    if channels == latents and "conv_in.weight" in state:
        weight = state["conv_in.weight"]                                                  # (C, 4, 3, 3)
        state["conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)    # (C, 8, 3, 3)
        config = config | {"in_channels": 2 * latents}
    return config, state


@torch.no_grad()
def update_average(average, weights, step, decay=.9999, steps=1):
    """The exponential moving average of a list of tensors, warmed up as InstructPix2Pix does: min(decay, (1 + n) / (10 + n)).

    steps: since the last update.  The average may lie on another device than the weights."""
    weight = 1 - min(decay, (1 + step) / (10 + step)) ** steps
    for a, w in zip(average, weights):
        a.lerp_(w.to(a.device), weight)


class EditModel:
    """InstructPix2Pix's parts: `unet`, `vae`, `text_encoder`, `tokenizer`, and the noise schedule's `alphas_cumprod`."""

    def __init__(self, unet, vae, text_encoder, tokenizer, scheduler, defaults=None):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler, self.defaults = scheduler, defaults or {}
        for key, value in (("beta_schedule", "scaled_linear"), ("prediction_type", "epsilon"), ("trained_betas", None),
                           ("rescale_betas_zero_snr", False), ("num_train_timesteps", TIMESTEPS)):
            if scheduler.get(key, value) != value:
                raise ValueError(f"scheduler config: {key} = {scheduler[key]!r} is not supported, only {value!r}")
        for key, kind in (("beta_start", float), ("beta_end", float), ("steps_offset", int)):
            if type(scheduler.get(key, 0)) not in (int, kind):
                raise ValueError(f"scheduler config: {key} = {scheduler[key]!r} is no {'whole ' * (kind is int)}number")
        betas = torch.linspace(scheduler.get("beta_start", 0.00085) ** .5, scheduler.get("beta_end", 0.012) ** .5, TIMESTEPS) ** 2
        for module in (unet, vae):
            module.to(memory_format=torch.channels_last)      # in which convolutions and attention are faster
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).to(self.device)                 # (1000,), abar_t

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu", dtype=torch.float32, unet="unet"):
        """Loads a model in the hub's layout of SD 1.5 and InstructPix2Pix; `unet` names the UNet's subfolder.
        Raises ValueError, in one line, for anything that is not a complete model of that architecture."""
        path = find_model(path_or_id)
        unet = load_part(UNet, path / unet, with_image_channels)
        vae = load_part(VAE, path / "vae", lambda config, state: (config, modern_names(state)))
        scheduler = read_json(path / "scheduler/scheduler_config.json")
        _, variant = weight_files(path / "text_encoder", "model")
        read_json(path / "text_encoder/config.json")
        if not any((path / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise ValueError(f"{path / 'tokenizer'} has no vocab.json: {path} is not a complete model in the hub's layout")
        try:
            text_encoder, report = CLIPTextModel.from_pretrained(
                path / "text_encoder", variant=variant, use_safetensors=True, dtype=dtype, output_loading_info=True)
            tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
        except Exception as error:                            # transformers and tokenizers raise many kinds
            raise ValueError(f"{path}: the weights of the text encoder do not fit its config.json, or its tokenizer is "
                             f"damaged: {str(error).splitlines()[0]}") from None
        if report["missing_keys"]:
            raise ValueError(f"{path / 'text_encoder'} lacks weights: {sorted(report['missing_keys'])[0]}")
        width = unet.config["cross_attention_dim"]
        if text_encoder.config.hidden_size != width:
            raise ValueError(f"{path}: the text encoder's width is {text_encoder.config.hidden_size}, but the UNet takes {width}")
        file = path / "edit_defaults.json"
        defaults = read_json(file) if file.is_file() else {}
        for name, value in defaults.items():
            if name not in DEFAULTS or type(value) not in (int, DEFAULTS[name]):
                raise ValueError(f"{file}: {name} = {value!r}: a model may recommend {', '.join(DEFAULTS)}, as numbers, and the "
                                 "first and the last as whole ones")
        for module in (unet, vae, text_encoder):
            module.to(device, dtype).requires_grad_(False).eval()
        return cls(unet, vae, text_encoder, tokenizer, scheduler, defaults)

    def save_pretrained(self, path):
        """Writes the model in the layout it was loaded from, each file under a temporary name first."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path) as temporary:
            new = Path(temporary)
            self.text_encoder.config.save_pretrained(new / "text_encoder")
            save_file({f"text_model.{k}": v.contiguous() for k, v in self.text_encoder.state_dict().items()},
                      new / "text_encoder/model.safetensors", {"format": "pt"})  # the prefix that every library reads
            self.tokenizer.save_pretrained(new / "tokenizer")
            self.tokenizer.backend_tokenizer.model.save(str(new / "tokenizer"))       # vocab.json, which older libraries read
            for name, module in (("unet", self.unet), ("vae", self.vae)):
                (new / name).mkdir()
                (new / name / "config.json").write_text(json.dumps(
                    {"_class_name": {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[name]} | module.config, indent=2))
                save_file({k: v.contiguous() for k, v in module.state_dict().items()},
                          new / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            (new / "scheduler").mkdir()
            (new / "scheduler/scheduler_config.json").write_text(json.dumps(self.scheduler, indent=2))
            (new / "model_index.json").write_text(json.dumps({
                "_class_name": "StableDiffusionInstructPix2PixPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None],
                "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False}, indent=2))
            if self.defaults:
                (new / "edit_defaults.json").write_text(json.dumps(self.defaults, indent=2))
            for file in [f for f in new.rglob("*") if f.is_file()]:
                target = path / file.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @property
    def guidance(self):
        """The guidance scales that the model recommends, else those of InstructPix2Pix."""
        return {k: self.defaults.get(k, usual) for k, usual in (("text_guidance", 7.5), ("image_guidance", 1.5))}

    @property
    def vae_factor(self):
        """How many times smaller latents are than images: 8 in Stable Diffusion."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def tokenize(self, texts):
        """List of B strings -> token ids (B, L): start, text (cut to fit), end, and padding with the end token.  L is the
        tokenizer's model_max_length, 77 in Stable Diffusion."""
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    @torch.no_grad()
    def encode_text(self, texts):
        """List of B strings -> context (B, L, D), the text encoder's last hidden state after its final layer norm."""
        return self.text_encoder(self.tokenize(texts).to(self.device)).last_hidden_state

    def content_tokens(self, texts):
        """(B, L) of 0 and 1: the tokens that carry an instruction, without start and end, stop words and punctuation."""
        specials = set(self.tokenizer.all_special_tokens)

        def carries(token):
            word = token.removesuffix("</w>")                 # a piece without </w> is the beginning of a longer word
            is_stop_word = token.endswith("</w>") and word in STOP_WORDS
            return token not in specials and not is_stop_word and any(map(str.isalnum, word))
        ids = self.tokenize(texts).tolist()
        return torch.tensor([[float(carries(t)) for t in self.tokenizer.convert_ids_to_tokens(row)] for row in ids],
                            device=self.device)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> z_0, the clean latents at unit variance (B, 4, h, w)."""
        return self.vae.encode(images) * self.vae.scaling_factor

    def decode(self, z_0):
        """The inverse: z_0 (B, 4, h, w) -> images (B, 3, H, W), not clamped."""
        return self.vae.decode(z_0 / self.vae.scaling_factor)

    def add_noise(self, z_0, noise, t):
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, for t (B,)."""
        abar = self.alphas_cumprod[t][:, None, None, None]    # float32: in bfloat16, 1 - abar_1 would be 0
        dtype = torch.result_type(z_0, noise)                 # under autocast, latents are bfloat16 and noise is not
        return abar.sqrt().to(dtype) * z_0 + (1 - abar).sqrt().to(dtype) * noise

    def remove_noise(self, z_t, eps, t):
        """The one-step estimate of the clean latents, z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
        abar = self.alphas_cumprod[t][:, None, None, None]
        return (z_t - (1 - abar).sqrt().to(z_t) * eps) / abar.sqrt().to(z_t)

    def ddim_timesteps(self, steps):
        """The timesteps of DDIM, descending: multiples of the stride 1000 // steps, shifted by steps_offset."""
        offset = self.scheduler.get("steps_offset", 1)
        if not 1 <= steps <= TIMESTEPS - offset:
            raise ValueError(f"steps must be between 1 and {TIMESTEPS - offset}, not {steps}")
        return [i * (TIMESTEPS // steps) + offset for i in reversed(range(steps))]

    def ddim_step(self, z_t, eps, t, steps):
        """One of `steps` steps of DDIM (eta 0) by the noise prediction eps: z_t (B, 4, h, w) at t, (B,) or (1,), -> z_(t - stride)."""
        z_0 = self.remove_noise(z_t, eps, t)
        return self.add_noise(z_0, eps, (t - TIMESTEPS // steps).clamp(min=0))

    @torch.no_grad()
    def edit(self, images, instructions, steps=50, text_guidance=7.5, image_guidance=1.5, noise=None, generator=None,
             progress=False):
        """Edits images by DDIM (eta 0) with the two guidance scales of InstructPix2Pix.

        images: (B, 3, H, W) in [-1, 1]; instructions: list of B strings
        noise: (B, 4, h, w), the start; else drawn from `generator` (a CPU generator, so that every device gives one image)
        Returns the edited images (B, 3, H, W), clamped to [-1, 1]."""
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} images but {len(instructions)} instructions")
        image_latents = self.vae.encode(images.to(self.device, self.dtype))
        if noise is None:
            noise = torch.randn(image_latents.shape, generator=generator)
        z_0 = self.sample(image_latents, instructions, noise.to(image_latents), steps, text_guidance, image_guidance, progress)
        return self.decode(z_0).clamp(-1, 1)

    @torch.no_grad()
    def sample(self, image_latents, instructions, z_t, steps, text_guidance, image_guidance, progress=False, control=None):
        """The loop of `edit`: unscaled latents of the images and noise z_T (B, 4, h, w) -> clean latents z_0 (B, 4, h, w).
        control: if not None, a function of the share of the steps that is done -> the UNet's `control` in the next."""
        text = self.encode_text([*instructions, ""])                                      # (B + 1, L, D)
        text, no_text = text[:-1], text[-1:].expand(len(z_t), -1, -1)
        no_image = torch.zeros_like(image_latents)
        # e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0)), as one weight for each of the three branches
        branches = [b for b in ((text_guidance, image_latents, text),
                                (image_guidance - text_guidance, image_latents, no_text),
                                (1 - image_guidance, no_image, no_text)) if b[0] != 0]
        weights = [weight for weight, _, _ in branches]
        conditions = torch.cat([image for _, image, _ in branches])                       # (n*B, 4, h, w)
        context = self.unet.text_cache(torch.cat([text for _, _, text in branches]))      # the text is the same in every step
        timesteps = torch.tensor(self.ddim_timesteps(steps), device=self.device)          # no step waits for the host
        for i, t in enumerate(tqdm(timesteps, "denoising", disable=not progress, leave=None)):
            x = torch.cat([z_t.repeat(len(branches), 1, 1, 1), conditions], dim=1)        # (n*B, 8, h, w)
            eps = self.unet(x, t.expand(len(x)), context, control=control and control(i / steps))  # (n*B, 4, h, w)
            eps = sum(w * e for w, e in zip(weights, eps.chunk(len(branches))))           # (B, 4, h, w)
            z_t = self.ddim_step(z_t, eps, t[None], steps)
        return z_t


def noise_error(model, eps, noise, t):
    """The mean of ||eps - noise||^2, for predictions eps (B, 4, h, w) at t (B,), weighted by 1 / SNR, at most 5.

    A departure: Stable Diffusion and InstructPix2Pix weigh all t alike.  Divided by the SNR it is the error of z_0."""
    abar = model.alphas_cumprod[t]
    weight = ((1 - abar) / abar).clamp(max=5)
    return (weight * (eps.float() - noise.float()).square().mean((1, 2, 3))).mean()


@dataclass
class Cycle:
    """What one round trip leaves for the losses: images (B, 3, H, W), and the attention maps of every layer."""
    edited: torch.Tensor                                      # I_edit
    reconstructed: torch.Tensor                               # I_recon
    forward_maps: list                                        # A_f, one (B, heads, h, w, L) a layer
    reverse_maps: list                                        # A_r
    z_t: torch.Tensor                                         # the noisy latents (B, 4, h, w) of the forward edit
    eps: torch.Tensor                                         # and the noise predicted there


def one_step(model, z_t, t, image_latents, context, maps=None):
    """A single noise prediction eps, and the clean latents it means: the paper's edit.  Both (B, 4, h, w), differentiable."""
    eps = model.unet(torch.cat([z_t, image_latents], dim=1), t, context, maps)
    z_0 = model.remove_noise(z_t, eps, t).clamp(-4, 4)        # the paper does not say; beyond it there is no gradient
    # at large t the estimate multiplies an error of eps by up to 14, and would its gradient: that is divided out again
    abar = model.alphas_cumprod[t][:, None, None, None]
    return eps, torch.lerp(z_0.detach(), z_0, (abar / (1 - abar)).sqrt().clamp(max=1).to(z_0))


def cycle(model, images, instructions, reverse_instructions, t, t_hat, noise, start="source", reverse_start="source",
          reencode=False, sharp=0):
    """The paper's round trip: (I_input, C_f) -> I_edit, then (I_edit, C_r) -> I_recon, one noise prediction each.

    images: (B, 3, H, W) in [-1, 1]; instructions C_f, reverse_instructions C_r: lists of B strings
    t, t_hat: (B,) timesteps of the forward and of the reverse edit; noise: (2, B, 4, h, w)
    Of what the paper does not say: start, what is noised for the forward edit ("source", the input's latents, or nothing:
    "noise"); reverse_start, for the reverse edit ("source", towards which it goes, or "edit"); reencode: whether the
    reverse edit sees E(D(z_edit)), the image, instead of z_edit; sharp: if not 0, I_edit is an edit sampled in so many
    steps, with the gradient of the one-step estimate.  Gradients flow through both edits."""
    scale = model.vae.scaling_factor
    with torch.no_grad():
        z_input = model.encode(images)                                                    # (B, 4, h, w)
    C_f, C_r = model.encode_text(instructions + reverse_instructions).chunk(2)            # (B, L, D)
    A_f, A_r = [], []

    z_t = model.add_noise(z_input, noise[0], t) if start == "source" else noise[0]
    eps, z_edit = one_step(model, z_t, t, z_input / scale, C_f, A_f)                      # (B, 4, h, w)
    if sharp:                                                 # straight-through (arXiv 2606.03911): no blur for CLIP and C_r
        sampled = model.sample(z_input / scale, instructions, noise[0], sharp, **model.guidance)
        z_edit = sampled + z_edit - z_edit.detach()
    I_edit = model.decode(z_edit)                                                         # (B, 3, H, W)

    z_back = model.add_noise(z_input if reverse_start == "source" else z_edit, noise[1], t_hat)
    _, z_recon = one_step(model, z_back, t_hat, model.vae.encode(I_edit) if reencode else z_edit / scale, C_r, A_r)
    return Cycle(I_edit, model.decode(z_recon), A_f, A_r, z_t, eps)


@torch.no_grad()
def delta_edit(model, z_t, t, image_latents, captions, edited_captions, guidance=2.):
    """The noise (B, 4, h, w) that predicts the edit without its instruction, from both captions:

        e(z_t, I, 0) + s (e(z_t, 0, T_edit) - e(z_t, 0, T_input))

    The first branch keeps the image, the difference of the others is the edit (Delta Denoising Score, arXiv 2304.07090).
    All three are learned without edited images."""
    no_image = torch.zeros_like(image_latents)
    x = torch.cat([z_t.repeat(3, 1, 1, 1), torch.cat([image_latents, no_image, no_image])], dim=1)
    context = model.encode_text([""] * len(z_t) + edited_captions + captions)
    kept, edited, unedited = model.unet(x, t.repeat(3), context).chunk(3)
    return kept + guidance * (edited - unedited)


def edit_map(model, images, edited, instructions, t=500):
    """Where an instruction acts, for pictures: one noise prediction on the edited images, noised to t.

    images and edited (B, 3, H, W) -> (B, H, W) in [0, 1]; see `attention.edit_region`."""
    images, edited = (i.to(model.device, model.dtype) for i in (images, edited))
    maps, z_0 = [], model.encode(edited)
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0)).to(z_0)
    t = torch.full((len(images),), t, device=model.device)
    with torch.no_grad():
        one_step(model, model.add_noise(z_0, noise, t), t, model.vae.encode(images), model.encode_text(instructions), maps)
    return edit_region(maps, model.content_tokens(instructions), images.shape[-2:])
