"""The four losses of UIP2P, on CLIP embeddings, attention maps and pixels, by the names the paper gives them.

Images are (B, 3, H, W) in [-1, 1]; every loss is a mean over the batch, so that its weight means the same at any size.
"""
import torch
import torch.nn.functional as F
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPTokenizer

from attention import token_maps

WEIGHTS = {"clip": 1.0, "attn": 0.5, "sim": 1.0, "recon": 1.0}       # of L_CEC: the paper's

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """A frozen CLIP as E: images and texts -> unit vectors.  Differentiable in the images."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer = clip.eval().requires_grad_(False), tokenizer
        self.size = clip.config.vision_config.image_size
        self.mean, self.std = (torch.tensor(v, device=clip.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu"):
        """A CLIP of the hub's layout, for instance openai/clip-vit-large-patch14, whose text encoder is SD 1.5's."""
        try:
            clip, report = CLIPModel.from_pretrained(path_or_id, use_safetensors=True, dtype=torch.float32,
                                                     output_loading_info=True)
            tokenizer = CLIPTokenizer.from_pretrained(path_or_id)
        except Exception as error:                            # transformers and tokenizers raise many kinds
            raise ValueError(f"{path_or_id} is no whole CLIP: {str(error).splitlines()[0]}") from None
        if report["missing_keys"]:
            raise ValueError(f"{path_or_id} lacks weights: {sorted(report['missing_keys'])[0]}")
        if len(tokenizer) <= 2:                               # transformers makes an empty one where its files are missing
            raise ValueError(f"{path_or_id} has no tokenizer")
        return cls(clip.to(device), tokenizer)

    def embed_images(self, images):
        """(B, 3, H, W) in [-1, 1] -> E_I (B, D): the short side resized, the centre cropped, CLIP's normalisation."""
        height, width = images.shape[-2:]
        size = [max(self.size, side * self.size // min(height, width)) for side in (height, width)]
        images = F.interpolate(images, size, mode="bicubic", antialias=True) if size != [height, width] else images
        top, left = ((side - self.size) // 2 for side in size)
        images = images[:, :, top:top + self.size, left:left + self.size] / 2 + .5
        features = self.clip.get_image_features(((images - self.mean) / self.std).to(self.clip.dtype))
        return F.normalize(features.pooler_output.float(), dim=-1)

    def embed_views(self, images, views, generator=None):
        """A list of batches (B, 3, H, W) -> as many of embeddings (views * B, D): of random `view`s, all batches shifted alike,
        each with noise of its own; with views = 0 (B, D), of the images as they are."""
        shown = [view(torch.cat(images), generator) for _ in range(views)] or [torch.cat(images)]
        return map(torch.cat, zip(*[self.embed_images(s).chunk(len(images)) for s in shown]))

    @torch.no_grad()
    def embed_texts(self, texts):
        """List of B strings -> E_T (B, D); longer texts are cut as the tokenizer says."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        return F.normalize(self.clip.get_text_features(**tokens).pooler_output.float(), dim=-1)


def view(images, generator=None):
    """The images (B, 3, H, W) shifted together by up to a quarter of a side, with noise of a random strength each.

    CLIP's gradient on an image as it is soon leads to patterns that please CLIP and nobody else; what it says of many views
    at once is more often the edit (`evaluate.py toy --ascent`).  The paper does not say; random crops are usual elsewhere."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [width // 4, width // 4, height // 4, height // 4], mode="replicate")
    top, left = (torch.randint(side // 4 * 2 + 1, (), generator=generator) for side in (height, width))
    strength = .5 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = strength * torch.randn(images.shape, generator=generator)
    return padded[:, :, top:top + height, left:left + width] + noise.to(images)


def norm(x):
    """||x||_2 of each sample, divided by the root of its number of values, so that no weight depends on the resolution
    (the paper does not say; the README's table has the mean square).  (B, ...) -> (B,)."""
    return (x.flatten(1).float().square().mean(1) + 1e-8).sqrt()


def clip_direction_loss(E_input, E_edit, E_caption, E_edited_caption):
    """L_CLIP = 1 - cos(E_Iedit - E_Iinput, E_Tedit - E_Tinput): the image moves as its caption does."""
    return (1 - cosine_similarity(E_edit - E_input, E_edited_caption - E_caption)).mean()


def clip_similarity_loss(E_edit, E_edited_caption):
    """L_sim = 1 - cos(E_Iedit, E_Tedit): the edited image shows what the edited caption says."""
    return (1 - cosine_similarity(E_edit, E_edited_caption)).mean()


def attention_loss(forward_maps, reverse_maps):
    """L_attn = sum_i ||A_f^(i) - A_r^(i)||_2: both edits look at the same region.  Lists of (B, h, w), a layer each.

    The paper does not say how A is scaled.  Here each map is divided by its mean, or both would agree by fading to zero.
    The sum over i is a mean here, so that the loss does not grow with the number of layers."""
    def relative(m):
        return m / m.mean((1, 2), keepdim=True).clamp_min(1e-6)
    pairs = list(zip(forward_maps, reverse_maps, strict=True))
    return sum(norm(relative(f) - relative(r)).mean() for f, r in pairs) / len(pairs)


def reconstruction_loss(images, reconstructed, E_input, E_recon):
    """L_recon = ||I_input - I_recon||_2 + 1 - cos(E_Iinput, E_Irecon): undone, the edit leaves the input."""
    return norm(images - reconstructed).mean() + (1 - cosine_similarity(E_input, E_recon)).mean()


def cycle_losses(scorer, images, captions, edited_captions, cycle, forward_tokens, reverse_tokens, weights=WEIGHTS,
                 views=0, generator=None):
    """The four losses of one round trip and their weighted sum, L_CEC: a dict of scalars clip, sim, attn, recon, cec.

    images (B, 3, H, W); captions and edited_captions: lists of B strings; cycle: uip2p.Cycle
    forward_tokens, reverse_tokens: (B, L), the content tokens of the two instructions
    views: of how many random views CLIP's losses are the mean; 0 for the images as they are"""
    E_input, E_edit, E_recon = scorer.embed_views((images, cycle.edited, cycle.reconstructed), views, generator)
    E_caption, E_edited_caption = (E.repeat(max(views, 1), 1) for E in scorer.embed_texts(captions + edited_captions).chunk(2))
    losses = {
        "clip": clip_direction_loss(E_input, E_edit, E_caption, E_edited_caption),
        "sim": clip_similarity_loss(E_edit, E_edited_caption),
        "attn": attention_loss(token_maps(cycle.forward_maps, forward_tokens), token_maps(cycle.reverse_maps, reverse_tokens)),
        "recon": reconstruction_loss(images, cycle.reconstructed, E_input, E_recon)}
    return losses | {"cec": sum(weights[name] * loss for name, loss in losses.items())}
