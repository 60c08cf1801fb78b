"""The attention layers of the UNet and the VAE, the capture of the cross-attention maps that the
attention loss compares (A^(i) in the paper), and the map of the edited region made from them.
Parameter names are those of the published Stable Diffusion 1.5 and InstructPix2Pix files."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    """Multi-head attention, softmax(q kᵀ / √d) v.

    x (B, N, query_dim), context (B, L, context_dim), x itself if None -> output (B, N, query_dim) and,
    if `capture`, the probabilities (B, heads, N, L) in float32, else None. `bias` is that of q, k and v.
    In place of a context may stand its `keys_values`, which save time where one text serves many steps.
    `control`, if not None, maps (probabilities, whether they are a text's) to those that are used instead."""

    def __init__(self, query_dim, context_dim, heads, bias=False):
        super().__init__()
        if query_dim % heads:
            raise ValueError(f"attention: {query_dim} channels do not divide into {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=bias)
        self.to_k = nn.Linear(context_dim, query_dim, bias=bias)
        self.to_v = nn.Linear(context_dim, query_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim)])

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                  # (B, heads, N or L, d)

    def keys_values(self, context):
        """What attention uses of a context (B, L, context_dim): a pair k, v of (B, heads, L, d)."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def forward(self, x, context=None, capture=False, control=None):
        is_text, context = context is not None, x if context is None else context
        q = self.split_heads(self.to_q(x))                                        # (B, heads, N, d)
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        probs = None
        if capture or control:  # the fused kernel never forms the probabilities, so they are computed in the open
            probs = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1, dtype=torch.float32)  # (B, heads, N, L)
            probs = control(probs, is_text) if control else probs
            out = probs.to(v.dtype) @ v                                           # (B, heads, N, d)
        else:
            out = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, N, d)
        return self.to_out[0](out.transpose(1, 2).flatten(2)), probs              # (B, N, query_dim)


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the exact (erf) GELU of its second (arXiv 2002.05202)."""

    def __init__(self, dim, inner_dim):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim), gated, four times as wide inside."""

    def __init__(self, dim):
        super().__init__()
        # the checkpoints number the linear layer 2: a dropout of rate 0 stood at 1
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normalised before and added after.

    x (B, N, dim), context (B, L, context_dim) -> x and, if `capture`, the cross-attention's probabilities."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x, context, capture=False, control=None):
        x = x + self.attn1(self.norm1(x), control=control)[0]
        out, probs = self.attn2(self.norm2(x), context, capture, control)
        x = x + out
        return x + self.ff(self.norm3(x)), probs


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, with a residual around it.

    x (B, C, h, w), context (B, L, context_dim) -> x (B, C, h, w) and, if `capture`, the cross-attention map
    (B, heads, h, w, L), which sums to 1 over L, else None. The map is returned, not stored, so that the layer
    stays a pure function and may be recomputed by gradient checkpointing."""

    def __init__(self, channels, context_dim, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context, capture=False, control=None):
        size = x.shape[-2:]
        tokens = self.proj_in(self.norm(x)).flatten(2).mT                         # (B, h*w, C)
        tokens, probs = self.transformer_blocks[0](tokens, context, capture, control)
        x = x + self.proj_out(tokens.mT.unflatten(2, size))                       # (B, C, h, w)
        return x, probs.unflatten(2, size) if capture else None                   # map (B, heads, h, w, L)


def token_maps(maps, token_mask):
    """A^(i) of the attention loss: the share of attention that each pixel pays to the instruction's content words.

    maps: list of (B, heads, h, w, L), one per cross-attention layer, as UNet.forward captures them
    token_mask: (B, L), 1 for the tokens that count and 0 for the others
    Returns a list of (B, h, w) in [0, 1]: per layer, the mean over heads of the sum over the tokens that count."""
    # the paper does not say which tokens; the sum over all of them is 1 at every pixel, a loss of nothing
    return [(m * token_mask.to(m)[:, None, None, None]).sum(-1).mean(1) for m in maps]


def edit_region(maps, token_mask, size):
    """Where the instruction acts: token_maps, resized and averaged over layers, stretched to [0, 1] per image.

    maps and token_mask as in token_maps, size (H, W) -> (B, H, W). It is the attention part of LIME
    (arXiv 2312.09256), without its segmentation; a map that is the same everywhere becomes 0."""
    layers = [F.interpolate(m[:, None], size, mode="bilinear")[:, 0] for m in token_maps(maps, token_mask)]
    region = torch.stack(layers).mean(0)                                          # (B, H, W)
    low, high = region.amin((1, 2), keepdim=True), region.amax((1, 2), keepdim=True)
    return (region - low) / (high - low).clamp_min(1e-6)
