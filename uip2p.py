"""UIP2P, the method: the noise schedule, the loop that edits, and the cycle that trains.

Each function is one equation or one figure of the paper.  The losses are in losses.py, the networks
in unet.py and vae.py; checkpoint.py reads and writes model files.

    model = EditModel.from_pretrained("models/toy")          # or "timbrooks/instruct-pix2pix"
    edited = model.edit(images, ["make the background pink"], **model.guidance)

Shapes: B images of H x W pixels; latents of h x w, in Stable Diffusion an eighth of the image's
sides; L tokens of D numbers each.
"""
from dataclasses import dataclass

import torch
from tqdm import tqdm

import checkpoint

TIMESTEPS = 1000                                 # t is 0 (almost no noise) to 999 (almost only)


class EditModel:
    """An InstructPix2Pix model: UNet, VAE, text encoder, tokenizer and noise schedule."""

    def __init__(self, unet, vae, text_encoder, tokenizer, scheduler, defaults=None):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler, self.defaults = tokenizer, scheduler, defaults or {}
        first, last = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
        betas = torch.linspace(first ** 0.5, last ** 0.5, TIMESTEPS) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0).to(self.device)     # abar_t, (1000,)

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu", dtype=torch.float32):
        """A model in the layout of SD 1.5 and InstructPix2Pix: a directory or an id of the hub.

        A UNet's folder inside of a model, such as models/toy/baseline, is that model with this
        UNet.  ValueError, in one line, if a file is missing or damaged."""
        return cls(*checkpoint.load(path_or_id, device, dtype))

    def save_pretrained(self, path):
        """Writes the model in the layout that it was loaded from."""
        checkpoint.save(self, path)

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @property
    def guidance(self):
        """The guidance scales that the model recommends; otherwise InstructPix2Pix's."""
        return {"text_guidance": self.defaults.get("text_guidance", 7.5),
                "image_guidance": self.defaults.get("image_guidance", 1.5)}

    # ---- texts and images ---------------------------------------------------------------------

    def tokenize(self, texts):
        """List of B strings -> token ids (B, L), cut or padded to L tokens, 77 in SD."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids

    @torch.no_grad()
    def encode_text(self, texts):
        """List of B strings -> context (B, L, D), which the UNet's cross-attention reads."""
        return self.text_encoder(self.tokenize(texts).to(self.device)).last_hidden_state

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> clean latents z_0 (B, 4, h, w), deviation about 1."""
        return self.vae.encode(images) * self.vae.scaling_factor

    def decode(self, z_0):
        """Clean latents z_0 (B, 4, h, w) -> images (B, 3, H, W), not clamped."""
        return self.vae.decode(z_0 / self.vae.scaling_factor)

    # ---- noise schedule -----------------------------------------------------------------------

    def add_noise(self, z_0, noise, t):
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, for t (B,)."""
        abar = self.alphas_cumprod[t][:, None, None, None]                    # (B, 1, 1, 1)
        z_t = abar.sqrt() * z_0 + (1 - abar).sqrt() * noise
        return z_t.to(torch.result_type(z_0, noise))

    def predict_z0(self, z_t, eps, t):
        """The same equation solved for z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
        abar = self.alphas_cumprod[t][:, None, None, None]                    # (B, 1, 1, 1)
        return ((z_t - (1 - abar).sqrt() * eps) / abar.sqrt()).to(z_t.dtype)

    # ---- editing ------------------------------------------------------------------------------

    def guided_noise(self, z_t, t, image, text, no_text, s_T, s_I):
        """InstructPix2Pix's guidance with two scales (its equation 3), of three predictions e:

        e = e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, T) - e(I, 0))

        I is the image, T the text; 0 stands for none: latents of zeros, an empty text."""
        image = torch.cat([image, image, torch.zeros_like(image)])            # (3B, 4, h, w)
        x = torch.cat([z_t.repeat(3, 1, 1, 1), image], dim=1)                 # (3B, 8, h, w)
        context = torch.cat([text, no_text, no_text])                         # (3B, L, D)
        e_image_text, e_image, e_none = self.unet(x, t.repeat(3), context).chunk(3)
        return e_none + s_I * (e_image - e_none) + s_T * (e_image_text - e_image)

    def ddim_timesteps(self, steps):
        """DDIM's timesteps, descending: multiples of the stride 1000 // steps, plus the offset."""
        offset = self.scheduler.get("steps_offset", 1)
        if not 1 <= steps <= TIMESTEPS - offset:
            raise ValueError(f"steps must be from 1 to {TIMESTEPS - offset}, not {steps}")
        return [i * (TIMESTEPS // steps) + offset for i in reversed(range(steps))]

    def ddim_step(self, z_t, eps, t, stride):
        """DDIM with eta = 0: estimate z_0, then add the predicted noise again, but less of it."""
        z_0 = self.predict_z0(z_t, eps, t)
        return self.add_noise(z_0, eps, (t - stride).clamp(min=0))            # z_(t - stride)

    @torch.no_grad()
    def sample(self, image, instructions, noise, steps, text_guidance, image_guidance,
               progress=False):
        """The loop of an edit, from noise z_T (B, 4, h, w) to clean latents z_0.

        image: unscaled latents (B, 4, h, w) of the images; instructions: list of B strings"""
        text, no_text = self.encode_text([*instructions, ""]).split([len(noise), 1])
        no_text = no_text.expand_as(text)                                     # (B, L, D)
        z_t = noise
        for t in tqdm(self.ddim_timesteps(steps), "denoising", disable=not progress, leave=None):
            t = torch.full((len(z_t),), t, device=self.device)
            eps = self.guided_noise(z_t, t, image, text, no_text, text_guidance, image_guidance)
            z_t = self.ddim_step(z_t, eps, t, stride=TIMESTEPS // steps)
        return z_t

    def edit(self, images, instructions, steps=50, text_guidance=7.5, image_guidance=1.5,
             noise=None, generator=None, progress=False):
        """Images (B, 3, H, W) in [-1, 1] and B instructions -> edited images, same shape and range.

        noise (B, 4, h, w): the start; None: drawn on the CPU, for the same image on every device"""
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} images but {len(instructions)} instructions")
        with torch.inference_mode():                                          # faster than no_grad
            image = self.vae.encode(images.to(self.device, self.dtype))       # (B, 4, h, w)
            if noise is None:
                noise = torch.randn(image.shape, generator=generator)
            z_0 = self.sample(image, instructions, noise.to(image), steps, text_guidance,
                              image_guidance, progress)
            edited = self.decode(z_0).clamp(-1, 1)
        return edited.clone()                            # which may take part in a gradient again


# ---- the cycle --------------------------------------------------------------------------------

@dataclass
class Cycle:
    """Figure 3 of the paper: what one round trip leaves for the losses."""
    edited: torch.Tensor                         # I_edit   (B, 3, H, W)
    reconstructed: torch.Tensor                  # I_recon  (B, 3, H, W)
    forward_maps: list                           # A_f      (B, heads, h', w', L) for each layer
    reverse_maps: list                           # A_r


def one_step(model, z_t, t, image, context, maps):
    """The paper's edit: "a single noise prediction" eps, and the clean latents z_0 that it implies.

    The paper does not say how this stays stable at large t.  Here z_0 is clamped to +-4, which is
    four standard deviations; and dz_0 / d eps = sqrt(1 - abar) / sqrt(abar), up to 14.6, is scaled
    to be at most 1.  All latents are (B, 4, h, w)."""
    eps = model.unet(torch.cat([z_t, image], dim=1), t, context, maps)
    z_0 = model.predict_z0(z_t, eps, t).clamp(-4, 4)
    abar = model.alphas_cumprod[t][:, None, None, None]                       # (B, 1, 1, 1)
    factor = (abar / (1 - abar)).sqrt().clamp(max=1).to(z_0)
    return torch.lerp(z_0.detach(), z_0, factor)     # the value is z_0, the gradient times factor

def cycle(model, images, instructions, reverse_instructions, t, t_hat, noise):
    """The paper's round trip: (I_input, C_f) -> I_edit, then (I_edit, C_r) -> I_recon.

    images: (B, 3, H, W) in [-1, 1]; instructions, reverse_instructions: lists of B strings
    t, t_hat: (B,), timesteps of the two edits, drawn independently; noise: (2, B, 4, h, w)
    The lists of maps A_f and A_r are filled by `one_step`."""
    scale = model.vae.scaling_factor
    A_f, A_r = [], []
    with torch.no_grad():
        z_input = model.encode(images)                                        # (B, 4, h, w)
    C_f, C_r = model.encode_text(instructions + reverse_instructions).chunk(2)    # (B, L, D)

    # The forward edit.  The paper does not say what is noised: here the latents of the input.
    z_t = model.add_noise(z_input, noise[0], t)
    z_edit = one_step(model, z_t, t, z_input / scale, C_f, A_f)               # (B, 4, h, w)

    # The reverse edit.  Its target is the input, so the input is noised again, with its own t_hat.
    z_t_hat = model.add_noise(z_input, noise[1], t_hat)
    z_recon = one_step(model, z_t_hat, t_hat, z_edit / scale, C_r, A_r)       # (B, 4, h, w)
    return Cycle(model.decode(z_edit), model.decode(z_recon), A_f, A_r)
