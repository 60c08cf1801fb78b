"""The UNet of Stable Diffusion 1.5, which predicts the noise eps(z_t, t, image, text). InstructPix2Pix gives it
8 input channels: the noisy latents, then the latents of the image to edit. All sizes come from the config;
parameter names are those of the published checkpoints, so that loading is one strict load_state_dict."""
import math
from itertools import repeat, zip_longest

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import SpatialTransformer, TransformerBlock

SD15 = {  # as InstructPix2Pix has it; Stable Diffusion 1.5 itself has 4 input channels
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,  # in this family of checkpoints the NUMBER of heads, at every level
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}

FIXED = {  # what a config may say but not change: other values mean another architecture
    "act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "mid_block_only_cross_attention": None, "center_input_sample": False, "downsample_padding": 1,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "dropout": 0, "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "flip_sin_to_cos": True, "freq_shift": 0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "class_embed_type": None, "num_class_embeds": None,
    "class_embeddings_concat": False, "projection_class_embeddings_input_dim": None, "addition_embed_type": None,
    "addition_time_embed_dim": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None, "num_attention_heads": None,
    "attention_type": "default", "only_cross_attention": False, "dual_cross_attention": False,
    "cross_attention_norm": None, "upcast_attention": False, "use_linear_projection": False,
}
BLOCK_TYPES = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def complete_config(name, config, defaults, fixed, block_types):
    """The config with its missing keys filled from `defaults`. Raises ValueError, naming the key, if a key of
    `fixed` has another value, a block type is not in `block_types`, or a size is not of its default's kind."""
    full = {**defaults, **config}
    for key, value in fixed.items():
        if (full.get(key, value) or None) != (value or None):  # null, false and 0 all mean "without"
            raise ValueError(f"{name} config: {key} = {full[key]!r} is not supported, only {value!r}")
    for key, default in defaults.items():
        if type(default) is int and type(full[key]) is not int and key != "attention_head_dim":
            raise ValueError(f"{name} config: {key} = {full[key]!r} is not supported, only a whole number")
    for key, supported in block_types.items():
        levels = len(full["block_out_channels"])
        if len(full[key]) != levels or not set(full[key]) <= set(supported):
            raise ValueError(f"{name} config: {key} = {full[key]!r} is not supported, "
                             f"only {levels} (as many as block_out_channels) of {', '.join(supported)}")
    return full


def check_size(what, x, levels):
    """Raises ValueError unless height and width of x (B, C, H, W) can be halved levels - 1 times."""
    multiple = 2 ** (levels - 1)
    if x.shape[-2] % multiple or x.shape[-1] % multiple:
        raise ValueError(f"{what} of {x.shape[-2]}x{x.shape[-1]}: height and width must be multiples of {multiple}")


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after a group norm and SiLU, with a residual around them.

    x (B, in_channels, h, w), temb (B, time_dim) -> (B, out_channels, h, w); the VAE has no time: time_dim None."""

    def __init__(self, in_channels, out_channels, time_dim, groups, eps):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x, temb=None):
        y = self.conv1(F.silu(self.norm1(x)))                                     # (B, out, h, w)
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(temb)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width. The UNet pads all sides by 1, the VAE only right and bottom."""

    def __init__(self, channels, all_sides=True):
        super().__init__()
        self.all_sides = all_sides
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if all_sides else 0)

    def forward(self, x):
        return self.conv(x if self.all_sides else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """Holds the layers of one resolution under the checkpoint's names; who owns the block says how they run."""

    def __init__(self):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layers(self):
        """Pairs of a residual block and the attention after it, None where there is none."""
        return zip_longest(self.resnets, self.attentions)


class TimestepEmbedding(nn.Module):
    """t (B,), 0 to 999 -> (B, time_dim): cosines and sines at `dim` / 2 frequencies each, then two layers."""

    def __init__(self, dim, time_dim):
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, t):
        # in float32 whatever the weights are: bfloat16 cannot tell timestep 998 from 999
        half = self.dim // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.float()[:, None] * freqs                                       # (B, dim / 2)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)                    # (B, dim)
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))


class UNet(nn.Module):
    """The conditioned UNet. config: a dict with the keys of SD15, as in unet/config.json; what is missing is taken
    from SD15, what this file does not implement is a ValueError. With `checkpointing` set, training keeps only each
    layer's input and recomputes the rest in the backward pass: less memory, about a third more time."""

    def __init__(self, config):
        super().__init__()
        self.config = c = complete_config("unet", config, SD15, FIXED, BLOCK_TYPES)
        self.checkpointing = False
        channels, layers, groups = c["block_out_channels"], c["layers_per_block"], c["norm_num_groups"]
        levels, time_dim = len(channels), 4 * channels[0]
        heads = c["attention_head_dim"]
        heads = [heads] * levels if isinstance(heads, int) else heads
        if not isinstance(heads, (list, tuple)) or len(heads) != levels:
            raise ValueError(f"unet config: attention_head_dim = {heads!r} is not supported, only one or {levels} ints")

        def resnet(width_in, width_out):
            return ResnetBlock(width_in, width_out, time_dim, groups, c["norm_eps"])

        def transformer(level):
            return SpatialTransformer(channels[level], c["cross_attention_dim"], heads[level], groups)

        self.conv_in = nn.Conv2d(c["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)

        width, skips = channels[0], [channels[0]]  # channels so far, and of what the way down leaves for the way up
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(c["down_block_types"]):
            block = Block()
            for _ in range(layers):
                block.resnets.append(resnet(width, channels[level]))
                if kind.startswith("CrossAttn"):
                    block.attentions.append(transformer(level))
                width = channels[level]
                skips.append(width)
            if level < levels - 1:
                block.downsamplers.append(Downsample(width))
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = Block()
        self.mid_block.resnets.extend([resnet(width, width), resnet(width, width)])
        self.mid_block.attentions.append(transformer(-1))

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(levels)), c["up_block_types"]):
            block = Block()
            for _ in range(layers + 1):
                block.resnets.append(resnet(width + skips.pop(), channels[level]))
                if kind.startswith("CrossAttn"):
                    block.attentions.append(transformer(level))
                width = channels[level]
            if level > 0:
                block.upsamplers.append(Upsample(width))
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(groups, width, c["norm_eps"])
        self.conv_out = nn.Conv2d(width, c["out_channels"], 3, padding=1)

    def text_cache(self, context):
        """The keys and values of a context (B, L, D) in every cross-attention layer, in the order in which they run: a list
        that `forward` takes in its place."""
        return [m.attn2.keys_values(context) for m in self.modules() if isinstance(m, TransformerBlock)]

    def forward(self, x, t, context, maps=None, control=None):
        """Predicts the noise.

        x: (B, 8, h, w), the noisy latents, then the image latents; h and w multiples of 2^(levels - 1)
        t: (B,) training timesteps, 0 to 999
        context: (B, L, D), the text encoder's last hidden state; L is 77; or its `text_cache`
        maps: a list, to which every cross-attention layer's map (B, heads, h', w', L) is appended, in the order
            down, middle, up; they carry gradients. None: not computed, and faster.
        control: if not None, what changes the probabilities of every attention layer; see attention.Attention
        Returns eps (B, 4, h, w)."""
        check_size("latents", x, len(self.down_blocks))
        temb = F.silu(self.time_embedding(t))  # every residual block begins with this SiLU: once is enough
        x = self.conv_in(x)                                                       # (B, C0, h, w)
        contexts = iter(context) if isinstance(context, list) else repeat(context)  # of each cross-attention layer

        skips = [x]
        for block in self.down_blocks:
            for resnet, attention in block.layers():
                x = self.layer(resnet, attention, x, temb, contexts, maps, control)  # (B, C, h', w')
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)                                                 # (B, C, h'/2, w'/2)
                skips.append(x)

        for resnet, attention in self.mid_block.layers():
            x = self.layer(resnet, attention, x, temb, contexts, maps, control)

        for block in self.up_blocks:
            for resnet, attention in block.layers():
                x = torch.cat([x, skips.pop()], dim=1)                            # (B, C + skip's, h', w')
                x = self.layer(resnet, attention, x, temb, contexts, maps, control)  # (B, C, h', w')
            for upsample in block.upsamplers:
                x = upsample(x)                                                   # (B, C, 2h', 2w')

        return self.conv_out(F.silu(self.conv_norm_out(x)))                       # (B, 4, h, w)

    def layer(self, resnet, attention, x, temb, contexts, maps, control):
        """A residual block and, if not None, the attention after it, whose map goes to `maps`, if not None.
        contexts: an iterator, one for each cross-attention layer."""
        x = self.run(resnet, x, temb)
        if attention is not None:
            x, attention_map = self.run(attention, x, next(contexts), maps is not None, control)
            if maps is not None:  # appended here, outside the recomputed part, which runs twice
                maps.append(attention_map)
        return x

    def run(self, module, *args):
        if self.checkpointing and self.training:  # there is no dropout: no random state to keep
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return module(*args)
