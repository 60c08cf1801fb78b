"""The autoencoder of Stable Diffusion 1.5: images to latents of an eighth of their size, and back.

It stays frozen throughout the paper.  Parameter names are those of the published files.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import Attention
from unet import Block, Downsample, ResnetBlock, Upsample, check_size

SD15_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "scaling_factor": 0.18215,           # latents times this have standard deviation 1
}
EPS = 1e-6                               # of every group norm here
PIXELS = 512 ** 2                        # of the images that are encoded or decoded at once


class PixelAttention(Attention):
    """Self-attention over the pixels, one head as wide as the channels: (B, C, h, w) -> same."""
    def __init__(self, channels, groups):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).mT                             # (B, h*w, C)
        out, _ = super().forward(tokens)                                      # (B, h*w, C)
        return x + out.mT.unflatten(2, x.shape[-2:])                          # (B, C, h, w)


def make_block(widths, groups):
    """Residual blocks from each width to the next."""
    block = Block()
    for width_in, width_out in zip(widths, widths[1:]):
        block.resnets.append(ResnetBlock(width_in, width_out, None, groups, EPS))
    return block

def make_mid_block(width, groups):
    block = make_block([width] * 3, groups)
    block.attentions.append(PixelAttention(width, groups))
    return block

def run(block, x):
    """All layers of a block, in order: (B, C, h, w) -> (B, C', h', w')."""
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
            block = make_block([width] + [channel] * c["layers_per_block"], groups)
            width = channel
            if level < len(channels) - 1:
                block.downsamplers.append(Downsample(width, all_sides=False))
            self.down_blocks.append(block)
        self.mid_block = make_mid_block(width, groups)
        self.conv_norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 2 * c["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                                   # (B, C0, H, W)
        for block in self.down_blocks:
            x = run(block, x)                                                 # (B, C, H', W')
        x = run(self.mid_block, x)                                            # (B, C, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                   # (B, 2 * 4, h, w)


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, 3, H, W)."""
    def __init__(self, c):
        super().__init__()
        channels, groups = c["block_out_channels"][::-1], c["norm_num_groups"]
        width = channels[0]
        self.conv_in = nn.Conv2d(c["latent_channels"], width, 3, padding=1)
        self.mid_block = make_mid_block(width, groups)
        self.up_blocks = nn.ModuleList()
        for level, channel in enumerate(channels):
            block = make_block([width] + [channel] * (c["layers_per_block"] + 1), groups)
            width = channel
            if level < len(channels) - 1:
                block.upsamplers.append(Upsample(width))
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, c["out_channels"], 3, padding=1)

    def forward(self, x):
        x = run(self.mid_block, self.conv_in(x))                              # (B, C, h, w)
        for block in self.up_blocks:
            x = run(block, x)                                                 # (B, C', h', w')
        return self.conv_out(F.silu(self.conv_norm_out(x)))                   # (B, 3, H, W)


class VAE(nn.Module):
    """The autoencoder.  config: the keys of SD15_VAE, as in vae/config.json; missing ones are its.

    The latents here are not scaled: the diffusion model's z_0 is `scaling_factor` times them, and
    InstructPix2Pix's image latents are as they are.  With `checkpointing` set, images are decoded
    one by one, and once more in the backward pass: less memory, more time."""

    def __init__(self, config):
        super().__init__()
        self.config = c = {**SD15_VAE, **config}
        self.scaling_factor, self.checkpointing = c["scaling_factor"], False
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c["latent_channels"], 2 * c["latent_channels"], 1)
        self.post_quant_conv = nn.Conv2d(c["latent_channels"], c["latent_channels"], 1)
        self.factor = 2 ** (len(c["block_out_channels"]) - 1)   # 8: image size / size of latents

    def moments(self, images):
        """The posterior of images (B, 3, H, W) in [-1, 1]: mean and log-variance in [-30, 20], each
        (B, latent_channels, h, w).  H and W must be multiples of `factor`."""
        check_size("image", images, self.factor)
        parts = images.split(max(1, PIXELS // images[0, 0].numel()))      # bounds the memory
        moments = torch.cat([self.quant_conv(self.encoder(part)) for part in parts])
        mean, logvar = moments.chunk(2, dim=1)                                # (B, 4, h, w) each
        return mean, logvar.clamp(-30, 20)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> mode of the posterior (B, latent_channels, h, w)."""
        return self.moments(images)[0]

    def decode(self, latents):
        """Latents (B, latent_channels, h, w) -> images (B, 3, H, W), about [-1, 1], not clamped."""
        def decode(part):
            return self.decoder(self.post_quant_conv(part))
        if self.checkpointing:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            return torch.cat([checkpoint(decode, part, **options) for part in latents.split(1)])
        pixels = latents[0, 0].numel() * self.factor ** 2
        return torch.cat([decode(part) for part in latents.split(max(1, PIXELS // pixels))])
