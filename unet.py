"""The UNet of Stable Diffusion 1.5, which predicts the noise eps(z_t, t, image, text).

In InstructPix2Pix it has 8 input channels: the noisy latents, then the latents of the image to edit
(`inflate_conv_in`).  All sizes come from config.json; parameter names are those of published files.
"""
import math
from itertools import zip_longest

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import SpatialTransformer

SD15 = {                                        # Stable Diffusion 1.5 itself has 4 input channels
    "in_channels": 8, "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "attention_head_dim": 8,                    # the NUMBER of heads, in this family of checkpoints
    "cross_attention_dim": 768, "norm_num_groups": 32, "norm_eps": 1e-5,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def inflate_conv_in(config, state):
    """4 to 8 channels: a text-to-image UNet becomes InstructPix2Pix's, which also sees an image.

    The new input weights start at zero; the rest is copied, the bias too (its section 3.2).
    config: unet/config.json; state: the state dict.  A UNet of 8 channels stays as it is."""
    if config.get("in_channels", 4) == 4:
        weight = state["conv_in.weight"]                                      # (C, 4, 3, 3)
        weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)         # (C, 8, 3, 3)
        config, state = config | {"in_channels": 8}, state | {"conv_in.weight": weight}
    return config, state

def check_size(what, x, multiple):
    """ValueError unless height and width of x (B, C, H, W) are multiples of a number."""
    height, width = x.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(f"{what} of {height}x{width}: both must be multiples of {multiple}")


# ---- layers, which the VAE uses too -----------------------------------------------------------

class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after a group norm and SiLU, with a residual around them.

    x (B, in_channels, h, w), temb (B, time_dim) -> (B, out_channels, h, w); in the VAE, which has
    no timestep, time_dim is None."""
    def __init__(self, in_channels, out_channels, time_dim, groups, eps):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb=None):
        y = self.conv1(F.silu(self.norm1(x)))                                 # (B, out, h, w)
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(temb)[:, :, None, None]                # (B, out, h, w)
        y = self.conv2(F.silu(self.norm2(y)))                                 # (B, out, h, w)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)                                         # (B, out, h, w)
        return x + y


class Downsample(nn.Module):
    """Halves height and width.  The UNet pads all sides by 1, the VAE only right and bottom."""
    def __init__(self, channels, all_sides=True):
        super().__init__()
        self.all_sides = all_sides
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if all_sides else 0)

    def forward(self, x):
        if not self.all_sides:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """The layers of one resolution, under the names of the published files."""
    def __init__(self):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layers(self):
        """Pairs of a residual block and the attention after it, None where there is none."""
        return zip_longest(self.resnets, self.attentions)


class TimestepEmbedding(nn.Module):
    """t (B,), from 0 to 999 -> (B, time_dim): cosines and sines of t, then two layers."""
    def __init__(self, dim, time_dim):
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, t):
        # Always in float32: bfloat16 cannot tell timestep 998 from 999.
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / half)  # (B, dim / 2)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)                # (B, dim)
        waves = waves.to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))                    # (B, time_dim)


# ---- the network ------------------------------------------------------------------------------

class UNet(nn.Module):
    """The UNet.  config: the keys of SD15, as in unet/config.json; missing ones are SD15's.

    With `checkpointing`, training keeps only the input of each layer and computes the rest again in
    the backward pass: less memory, a third more time."""
    def __init__(self, config):
        super().__init__()
        self.config = c = {**SD15, **config}
        self.checkpointing = False
        channels, layers = c["block_out_channels"], c["layers_per_block"]
        levels, time_dim = len(channels), 4 * channels[0]
        groups, heads = c["norm_num_groups"], c["attention_head_dim"]

        def transformer(level):
            h = heads if isinstance(heads, int) else heads[level]
            return SpatialTransformer(channels[level], c["cross_attention_dim"], h, groups)

        def make_block(level, widths_in, kind):
            block, width = Block(), channels[level]
            for width_in in widths_in:
                block.resnets.append(ResnetBlock(width_in, width, time_dim, groups, c["norm_eps"]))
                if kind.startswith("CrossAttn"):
                    block.attentions.append(transformer(level))
            return block

        self.conv_in = nn.Conv2d(c["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)

        # down; `skips` are the channels of the skip connections
        width, skips = channels[0], [channels[0]]
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(c["down_block_types"]):
            block = make_block(level, [width] + [channels[level]] * (layers - 1), kind)
            width = channels[level]
            skips += [width] * layers
            if level < levels - 1:
                block.downsamplers.append(Downsample(width))
                skips.append(width)
            self.down_blocks.append(block)

        # middle: one attention, between two residual blocks
        self.mid_block = make_block(-1, [width, width], "MidBlock")
        self.mid_block.attentions.append(transformer(-1))

        # up; each residual block also sees a skip connection
        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(levels)), c["up_block_types"]):
            widths_in = [width] + [channels[level]] * layers
            block = make_block(level, [w + skips.pop() for w in widths_in], kind)
            width = channels[level]
            if level > 0:
                block.upsamplers.append(Upsample(width))
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(groups, width, c["norm_eps"])
        self.conv_out = nn.Conv2d(width, c["out_channels"], 3, padding=1)

    def forward(self, x, t, context, maps=None):
        """Predicts the noise eps (B, 4, h, w).

        x: (B, 8, h, w), the noisy latents, then the image's; h, w multiples of 2^(levels - 1)
        t: (B,), from 0 to 999; context: (B, L, D), the text encoder's last hidden state
        maps: None, or a list, to which every cross-attention layer appends its probabilities
            (B, heads, h', w', L), in the order down, middle, up; they carry gradients"""
        check_size("latents", x, 2 ** (len(self.down_blocks) - 1))
        temb = F.silu(self.time_embedding(t))                                 # (B, time_dim)
        x = self.conv_in(x)                                                   # (B, C0, h, w)

        skips = [x]
        for block in self.down_blocks:
            for resnet, attention in block.layers():
                x = self.layer(resnet, attention, x, temb, context, maps)     # (B, C, h', w')
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)                                             # (B, C, h'/2, w'/2)
                skips.append(x)

        for resnet, attention in self.mid_block.layers():
            x = self.layer(resnet, attention, x, temb, context, maps)         # (B, C, h', w')

        for block in self.up_blocks:
            for resnet, attention in block.layers():
                x = torch.cat([x, skips.pop()], dim=1)                        # (B, C + C', h', w')
                x = self.layer(resnet, attention, x, temb, context, maps)     # (B, C, h', w')
            for upsample in block.upsamplers:
                x = upsample(x)                                               # (B, C, 2h', 2w')

        return self.conv_out(F.silu(self.conv_norm_out(x)))                   # (B, 4, h, w)

    def layer(self, resnet, attention, x, temb, context, maps):
        """A residual block and the attention after it, if there is one: x -> (B, C, h', w')."""
        x = self.run(resnet, x, temb)
        if attention is not None:
            x, probs = self.run(attention, x, context, maps is not None)
            if maps is not None:      # here, because `run` may compute the layer a second time
                maps.append(probs)
        return x

    def run(self, module, *args):
        if self.checkpointing and self.training:              # no dropout: no random state to keep
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return module(*args)
