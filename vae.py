"""The autoencoder of Stable Diffusion 1.5: images to latents of an eighth of their size (in the published
model), and back. Frozen throughout the paper; parameter names are those of the published checkpoints."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import Attention
from unet import Block, Downsample, ResnetBlock, Upsample, check_size, complete_config

SD15_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,  # brings latents to unit variance; absent from the published config.json
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
FIXED = {"act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
         "shift_factor": None, "latents_mean": None, "latents_std": None}
BLOCK_TYPES = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
EPS = 1e-6  # of every group norm here
PIXELS = 512 ** 2  # of the images that are encoded or decoded at once, or a single one


class PixelAttention(Attention):
    """Self-attention over the pixels, one head as wide as the channels: x (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).mT                                 # (B, h*w, C)
        out, _ = super().forward(tokens)
        return x + out.mT.unflatten(2, x.shape[-2:])                              # (B, C, h, w)


def mid_block(channels, groups):
    block = Block()
    block.resnets.extend(ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2))
    block.attentions.append(PixelAttention(channels, groups))
    return block


def run(block, x):
    """All layers of a block, in order; (B, C, h, w) -> (B, C', h', w')."""
    for resnet, attention in block.layers():
        x = resnet(x)
        if attention is not None:
            x = attention(x)
    for resample in [*block.downsamplers, *block.upsamplers]:
        x = resample(x)
    return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, 2 * latent_channels, h, w)."""

    def __init__(self, c):
        super().__init__()
        channels, groups = c["block_out_channels"], c["norm_num_groups"]
        width = channels[0]
        self.conv_in = nn.Conv2d(c["in_channels"], width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, channel in enumerate(channels):
            block = Block()
            for _ in range(c["layers_per_block"]):
                block.resnets.append(ResnetBlock(width, channel, None, groups, EPS))
                width = channel
            if level < len(channels) - 1:
                block.downsamplers.append(Downsample(width, all_sides=False))
            self.down_blocks.append(block)
        self.mid_block = mid_block(width, groups)
        self.conv_norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 2 * c["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                                       # (B, C0, H, W)
        for block in self.down_blocks:
            x = run(block, x)                                                     # (B, C, H', W')
        x = run(self.mid_block, x)                                                # (B, C, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                       # (B, 2 * latent, h, w)


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, 3, H, W)."""

    def __init__(self, c):
        super().__init__()
        channels, groups = c["block_out_channels"][::-1], c["norm_num_groups"]
        width = channels[0]
        self.conv_in = nn.Conv2d(c["latent_channels"], width, 3, padding=1)
        self.mid_block = mid_block(width, groups)
        self.up_blocks = nn.ModuleList()
        for level, channel in enumerate(channels):
            block = Block()
            for _ in range(c["layers_per_block"] + 1):
                block.resnets.append(ResnetBlock(width, channel, None, groups, EPS))
                width = channel
            if level < len(channels) - 1:
                block.upsamplers.append(Upsample(width))
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, c["out_channels"], 3, padding=1)

    def forward(self, x):
        x = run(self.mid_block, self.conv_in(x))                                  # (B, C, h, w)
        for block in self.up_blocks:
            x = run(block, x)                                                     # (B, C', h', w')
        return self.conv_out(F.silu(self.conv_norm_out(x)))                       # (B, 3, H, W)


def in_parts(network, x, pixels):
    """network(x) for some of the batch x at a time, images of so many pixels each: memory does not grow with the batch."""
    return torch.cat([network(part) for part in x.split(max(1, PIXELS // pixels))])


class VAE(nn.Module):
    """The autoencoder. config: a dict with the keys of SD15_VAE, as in vae/config.json; what is missing is taken
    from SD15_VAE, what this file does not implement is a ValueError. Latents are unscaled here: the diffusion
    model's z_0 is `scaling_factor` times the latents, while InstructPix2Pix's image latents stay as they are.
    With `checkpointing` set, images are decoded one by one and once more in the backward pass: less memory."""

    def __init__(self, config):
        super().__init__()
        if "block_out_channels" in config:  # there is one kind of block: a config need not name it at each level
            levels = len(config["block_out_channels"])
            config = {**{key: list(kinds) * levels for key, kinds in BLOCK_TYPES.items()}, **config}
        self.config = c = complete_config("vae", config, SD15_VAE, FIXED, BLOCK_TYPES)
        self.scaling_factor, self.checkpointing = c["scaling_factor"], False
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c["latent_channels"], 2 * c["latent_channels"], 1)
        self.post_quant_conv = nn.Conv2d(c["latent_channels"], c["latent_channels"], 1)

    def moments(self, images):
        """The posterior of images (B, 3, H, W) in [-1, 1]: mean and log-variance, clamped to [-30, 20], each
        (B, latent_channels, h, w). H and W must be multiples of 2^(levels - 1), 8 in the published model."""
        check_size("image", images, len(self.encoder.down_blocks))
        moments = in_parts(lambda x: self.quant_conv(self.encoder(x)), images, images.shape[-2] * images.shape[-1])
        mean, logvar = moments.chunk(2, dim=1)                                    # (B, latent, h, w) each
        return mean, logvar.clamp(-30, 20)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> the mode of the posterior (B, latent_channels, h, w), unscaled."""
        return self.moments(images)[0]

    def decode(self, latents):
        """Unscaled latents (B, latent_channels, h, w) -> images (B, 3, H, W), about [-1, 1], not clamped."""
        pixels = latents.shape[-2] * latents.shape[-1] * 4 ** (len(self.decoder.up_blocks) - 1)
        def decoder(z):
            return self.decoder(self.post_quant_conv(z))
        if self.checkpointing:
            return torch.cat([checkpoint(decoder, z, use_reentrant=False, preserve_rng_state=False) for z in latents.split(1)])
        return in_parts(decoder, latents, pixels)


def modern_names(state_dict):
    """A VAE's state dict with the attention's old names (query, key, value, proj_attn) replaced by today's, and its
    weights, which some files have as 1x1 convolutions (C, C, 1, 1), as (C, C). Others are passed through."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    modern = {}
    for key, tensor in state_dict.items():
        if ".attentions." in key:
            module, name, kind = key.rsplit(".", 2)                               # kind: weight or bias
            key = f"{module}.{names.get(name, name)}.{kind}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        modern[key] = tensor
    return modern
