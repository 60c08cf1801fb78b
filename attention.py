"""The attention layers of the UNet and of the VAE.

A cross-attention layer can return its probabilities: how much each pixel looks at each word.  The
attention loss compares them (A^(i) in the paper; losses.py says which words, heads and layers).
Parameter names are those of the published Stable Diffusion 1.5 and InstructPix2Pix files.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v.

    x: (B, N, query_dim); context: (B, L, context_dim), or None for self-attention
    Returns the output (B, N, query_dim) and, with `capture`, the probabilities (B, heads, N, L) in
    float32, otherwise None.  `bias` is that of q, k and v.
    control: None, or a function (probabilities, is_text) -> the probabilities that are used
        instead; is_text is False for self-attention.  Only Prompt-to-Prompt sets it."""

    def __init__(self, query_dim, context_dim, heads, bias=False):
        super().__init__()
        self.heads, self.control = heads, None
        self.to_q = nn.Linear(query_dim, query_dim, bias=bias)
        self.to_k = nn.Linear(context_dim, query_dim, bias=bias)
        self.to_v = nn.Linear(context_dim, query_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim)])

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)      # (B, heads, N or L, d)

    def forward(self, x, context=None, capture=False):
        is_text = context is not None
        context = context if is_text else x
        q = self.split_heads(self.to_q(x))                            # (B, heads, N, d)
        k = self.split_heads(self.to_k(context))                      # (B, heads, L, d)
        v = self.split_heads(self.to_v(context))                      # (B, heads, L, d)

        # The fused kernel is faster, but it never forms the probabilities.
        if not capture and self.control is None:
            out, probs = F.scaled_dot_product_attention(q, k, v), None
        else:
            scores = q * q.shape[-1] ** -0.5 @ k.mT                   # (B, heads, N, L)
            probs = scores.softmax(dim=-1, dtype=torch.float32)       # sums to 1 over L
            if self.control is not None:
                probs = self.control(probs, is_text)
            out = probs.to(v.dtype) @ v                               # (B, heads, N, d)
        return self.to_out[0](out.transpose(1, 2).flatten(2)), probs  # (B, N, query_dim)


class GEGLU(nn.Module):
    """A linear layer; its first half is gated by the exact GELU of the second (arXiv 2002.05202).

    x (B, N, dim) -> (B, N, inner_dim)"""
    def __init__(self, dim, inner_dim):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with a gate, four times as wide inside.  x (B, N, dim) -> (B, N, dim)"""
    def __init__(self, dim):
        super().__init__()
        # The published files call the last layer net.2, because a dropout once was net.1.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each with a residual.

    x (B, N, dim), context (B, L, context_dim) -> x, and the cross-attention's probabilities"""
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x, context, capture=False):
        x = x + self.attn1(self.norm1(x))[0]                          # (B, N, dim)
        out, probs = self.attn2(self.norm2(x), context, capture)
        x = x + out                                                   # (B, N, dim)
        return x + self.ff(self.norm3(x)), probs


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, with a residual around it.

    x (B, C, h, w), context (B, L, context_dim) -> x (B, C, h, w) and, with `capture`, the
    cross-attention's probabilities (B, heads, h, w, L), otherwise None.  They are returned and not
    stored, because gradient checkpointing computes the layer twice."""

    def __init__(self, channels, context_dim, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context, capture=False):
        size = x.shape[-2:]
        tokens = self.proj_in(self.norm(x)).flatten(2).mT             # (B, h*w, C)
        tokens, probs = self.transformer_blocks[0](tokens, context, capture)
        x = x + self.proj_out(tokens.mT.unflatten(2, size))           # (B, C, h, w)
        if capture:
            probs = probs.unflatten(2, size)                          # (B, heads, h, w, L)
        return x, probs if capture else None
