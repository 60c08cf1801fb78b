"""The four losses of UIP2P and their weighted sum L_CEC, by the names that the paper gives them.

E_x is the CLIP embedding of image or text x, A^(i) the attention map of layer i.  Images are
(B, 3, H, W) in [-1, 1].  Every loss is a mean over the batch.  To try a loss of your own: write a
function, add a line to `cycle_losses` and an entry to WEIGHTS; `train.py --weights` changes it.
"""
import torch
import torch.nn.functional as F
from torch.nn.functional import cosine_similarity

import checkpoint

WEIGHTS = {"clip": 1.0, "attn": 0.5, "sim": 1.0, "recon": 1.0}                # the paper's

# Words that name nothing, and verbs of instructions, which the background looks at, not the object.
STOP_WORDS = set("a an the this that it its his her their and or of to in on at by for from with "
                 "into as is are be".split())
VERBS = set("add apply change convert delete draw erase get give have insert let make move paint "
            "place put remove replace set show swap take transform turn use".split())


# ---- the equations of the paper ---------------------------------------------------------------

def clip_direction_loss(E_input, E_edit, E_caption, E_edited_caption):
    """L_CLIP = 1 - cos(E_Iedit - E_Iinput, E_Tedit - E_Tinput): the image changes in the direction
    in which its caption changes.  All E: (B, D)."""
    return (1 - cosine_similarity(E_edit - E_input, E_edited_caption - E_caption)).mean()

def clip_similarity_loss(E_edit, E_edited_caption):
    """L_sim = 1 - cos(E_Iedit, E_Tedit): the edited image shows what the edited caption says."""
    return (1 - cosine_similarity(E_edit, E_edited_caption)).mean()

def attention_loss(forward_maps, reverse_maps):
    """L_attn = sum_i ||A_f^(i) - A_r^(i)||_2: both edits look at the same region.

    forward_maps, reverse_maps: lists of (B, h, w), one map for each layer i
    The paper does not say how A is scaled.  Here each map gets the mean 0 and the deviation 0.1.
    If maps are only divided by their means, both become flat: they agree by looking nowhere.  The
    larger the deviation, the sooner both move to what does not change (docs/evidence.md).  The sum
    over i is a mean here, so that the weight does not depend on the number of layers."""
    loss = 0
    for A_f, A_r in zip(forward_maps, reverse_maps, strict=True):
        loss = loss + rms(standardise(A_f) - standardise(A_r)).mean()
    return loss / len(forward_maps)

def reconstruction_loss(images, reconstructed, E_input, E_recon):
    """L_recon = ||I_input - I_recon||_2 + 1 - cos(E_Iinput, E_Irecon): the reverse edit brings back
    the pixels and the meaning of the input."""
    return rms(images - reconstructed).mean() + (1 - cosine_similarity(E_input, E_recon)).mean()

def cycle_losses(clip, images, captions, edited_captions, cycle, forward_words, reverse_words,
                 weights=WEIGHTS):
    """The losses of one round trip and L_CEC, their weighted sum "cec": a dict of scalars.

    clip: a ClipScorer; captions, edited_captions: lists of B strings; cycle: a uip2p.Cycle
    forward_words, reverse_words: (B, L), the `content_words` of the two instructions"""
    E_input, E_edit, E_recon = clip.embed_images(
        torch.cat([images, cycle.edited, cycle.reconstructed])).chunk(3)      # (B, D) each
    E_caption, E_edited_caption = clip.embed_texts(captions + edited_captions).chunk(2)
    A_f = [reduce_map(probs, forward_words) for probs in cycle.forward_maps]  # (B, h, w) each
    A_r = [reduce_map(probs, reverse_words) for probs in cycle.reverse_maps]

    losses = {
        "clip": clip_direction_loss(E_input, E_edit, E_caption, E_edited_caption),
        "sim": clip_similarity_loss(E_edit, E_edited_caption),
        "attn": attention_loss(A_f, A_r),
        "recon": reconstruction_loss(images, cycle.reconstructed, E_input, E_recon),
    }
    losses["cec"] = sum(weights[name] * loss for name, loss in losses.items())
    return losses


# ---- what the equations are made of -----------------------------------------------------------

def rms(x):
    """||x||_2 of each sample, divided by the root of its size: (B, ...) -> (B,).

    The paper does not say how its norms are scaled; like this, all resolutions are comparable."""
    return (x.flatten(1).float().square().mean(1) + 1e-8).sqrt()

def standardise(A):
    """Maps (B, h, w) of mean 1 -> of mean 0 and deviation 0.1.  What deviates by less than 1 %
    counts as flat, and is not stretched as far."""
    A = A - A.mean((1, 2), keepdim=True)                                      # (B, h, w)
    return 0.1 * A / rms(A).clamp_min(0.01)[:, None, None]

def content_words(tokenizer, ids):
    """Token ids (B, L) -> (B, L) of 0 and 1: 1 for a word that names something, and for the first
    end token, which sums up the text; 0 for start, padding, verbs, stop words and punctuation."""
    mask, special = torch.zeros(ids.shape), set(tokenizer.all_special_ids)
    for b, row in enumerate(ids.tolist()):
        mask[b, row.index(tokenizer.eos_token_id)] = 1
        begins = True                                 # whether the next piece begins a word
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(row)):
            if row[i] in special:
                continue
            word = token.removesuffix("</w>")         # "</w>" marks the end of a word
            names_nothing = begins and token != word and (word in STOP_WORDS or word in VERBS)
            if any(map(str.isalnum, word)) and not names_nothing:
                mask[b, i] = 1
            begins = token != word
    return mask

def reduce_map(probs, words):
    """A^(i), one map for each image, from the probabilities (B, heads, h, w, L) of layer i.  All
    cross-attention layers of the UNet are used.  words: (B, L) of 0 and 1, the content words

    The two instructions have different tokens, so the tokens are averaged before the maps are
    compared, and so are the heads.  The paper does not say how.  Each word's map is divided by its
    mean first; otherwise the words with the most attention would decide.  LIME's code (arXiv
    2312.09256, same first author) takes the same words, but the layers of 16x16 and 32x32 pixels
    alone, and divides by nothing."""
    words, maps = words.to(probs)[:, None, None], probs.mean(1)               # (B, h, w, L)
    maps = maps / maps.mean((1, 2), keepdim=True).clamp_min(1e-6)
    return (maps * words).sum(-1) / words.sum(-1)                             # (B, h, w)

@torch.no_grad()
def edit_region(model, images, edited, instructions, t=500):
    """Where an instruction acts, for pictures: the maps A^(i) of one noise prediction are resized,
    averaged over all layers, and stretched to [0, 1].  images, edited (B, 3, H, W) -> (B, H, W).
    The edited images are noised, as in sampling.  This is our own, not LIME's localisation."""
    z_0 = model.encode(edited)                                                # (B, 4, h, w)
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0)).to(z_0)
    t = torch.full((len(z_0),), t, device=z_0.device)
    x = torch.cat([model.add_noise(z_0, noise, t), model.vae.encode(images)], dim=1)
    words = content_words(model.tokenizer, model.tokenize(instructions))
    maps = []
    model.unet(x, t, model.encode_text(instructions), maps)
    layers = [reduce_map(probs, words)[:, None] for probs in maps]            # (B, 1, h', w') each
    layers = [F.interpolate(A, images.shape[-2:], mode="bilinear") for A in layers]
    region = torch.stack(layers).mean(0)[:, 0]                                # (B, H, W)
    low, high = region.amin((1, 2), keepdim=True), region.amax((1, 2), keepdim=True)
    return (region - low) / (high - low).clamp_min(1e-6)


class ClipScorer:
    """A frozen CLIP as E: images and texts -> unit vectors.  It is differentiable in the images."""
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer = clip.eval().requires_grad_(False), tokenizer
        self.size = clip.config.vision_config.image_size
        self.mean = torch.tensor(self.MEAN, device=clip.device)[:, None, None]
        self.std = torch.tensor(self.STD, device=clip.device)[:, None, None]

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu"):
        """A CLIP in the hub's layout.  SD 1.5's text encoder is openai/clip-vit-large-patch14's."""
        return cls(*checkpoint.load_clip(path_or_id, device))

    def embed_images(self, images):
        """(B, 3, H, W) in [-1, 1] -> E_I (B, D).  Resized, cropped and normalised as CLIP does."""
        height, width = images.shape[-2:]
        size = [max(self.size, side * self.size // min(height, width)) for side in (height, width)]
        if size != [height, width]:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        images = images[:, :, top:top + self.size, left:left + self.size] / 2 + 0.5
        images = ((images - self.mean) / self.std).to(self.clip.dtype)
        features = self.clip.get_image_features(images).pooler_output         # (B, D)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts):
        """List of B strings -> E_T (B, D).  Longer texts are cut."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features = self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output
        return F.normalize(features.float(), dim=-1)
