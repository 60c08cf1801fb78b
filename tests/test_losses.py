"""The four losses against values computed here by other means, CLIP's preprocessing against that of transformers, and
the gradient of the whole cycle."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer,
                          CLIPVisionConfig)

import losses
from conftest import GOLDEN
from losses import (ClipScorer, attention_loss, clip_direction_loss, clip_similarity_loss, content_words, cycle_losses,
                    edit_region, reconstruction_loss, reduce_map)
from uip2p import Cycle, EditModel, cycle


@pytest.fixture(scope="module")
def scorer():
    """A random CLIP of images of 32x32 in patches of 8, with the golden model's tokenizer."""
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = CLIPTextConfig(vocab_size=694, bos_token_id=692, eos_token_id=693, pad_token_id=693, **size)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **size)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    return ClipScorer(CLIPModel(config), CLIPTokenizer.from_pretrained(GOLDEN / "model/tokenizer"))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def embeddings(count, rows=3, dim=5):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, dim, generator=generator) for _ in range(count)]


# ---- the four losses -------------------------------------------------------------------------------------------------

def test_clip_direction_loss_by_hand():
    I_in, I_edit, T_in, T_edit = embeddings(4)
    by_hand = [1 - cosine([e - i for e, i in zip(I_edit[b].tolist(), I_in[b].tolist())],
                          [e - i for e, i in zip(T_edit[b].tolist(), T_in[b].tolist())]) for b in range(3)]
    assert clip_direction_loss(I_in, I_edit, T_in, T_edit).item() == pytest.approx(sum(by_hand) / 3, rel=1e-5)


@pytest.mark.parametrize("factor, loss", [(1, 0), (0.1, 0), (-3, 2)])
def test_clip_direction_loss_of_perfect_and_opposite_edits(factor, loss):
    I_in, T_in, T_edit = embeddings(3)
    I_edit = I_in + factor * (T_edit - T_in)
    assert clip_direction_loss(I_in, I_edit, T_in, T_edit).item() == pytest.approx(loss, abs=1e-5)


def test_clip_similarity_loss():
    I_edit, T_edit = embeddings(2)
    by_hand = sum(1 - cosine(I_edit[b].tolist(), T_edit[b].tolist()) for b in range(3)) / 3
    assert clip_similarity_loss(I_edit, T_edit).item() == pytest.approx(by_hand, rel=1e-5)
    assert clip_similarity_loss(2 * T_edit, T_edit).item() == pytest.approx(0, abs=1e-5)
    assert clip_similarity_loss(-T_edit, T_edit).item() == pytest.approx(2, abs=1e-5)


def test_reduce_map_by_hand():
    probs = torch.rand(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    words = torch.tensor([[0.0, 1, 0, 1, 0], [0, 0, 1, 0, 0]])
    A = reduce_map(probs, words)
    assert A.shape == (2, 2, 4)
    means = {word: sum(probs[0, :, :, :, word].flatten().tolist()) / 24 for word in (1, 3)}
    for y in range(2):
        for x in range(4):
            by_hand = sum(sum(probs[0, :, y, x, word].tolist()) / 3 / mean for word, mean in means.items()) / 2
            assert A[0, y, x].item() == pytest.approx(by_hand, rel=1e-5)
    torch.testing.assert_close(A.mean((1, 2)), torch.ones(2))


def test_words_count_alike_however_much_attention_they_have():
    probs = torch.rand(1, 3, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    words, strength = torch.tensor([[0.0, 1, 0, 1, 0]]), torch.tensor([1, 0.1, 1, 2, 1])
    torch.testing.assert_close(reduce_map(probs * strength, words), reduce_map(probs, words))


def test_content_words(golden):
    def mask_of(texts):
        return content_words(golden.tokenizer, golden.tokenize(texts))

    def kept(text):
        ids, mask = golden.tokenize([text])[0], mask_of([text])[0]
        assert set(mask.tolist()) <= {0.0, 1.0} and mask.shape == (77,)
        return golden.tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
    words, end = golden.tokenizer.tokenize, ["<|endoftext|>"]
    assert kept("Make the sky red!") == words("sky") + words("red") + end
    assert kept("add 2 hills, to the left of it...") == words("2") + words("hills") + words("left") + end
    assert kept("") == kept("the , of") == kept("make it") == end
    assert "a" in words("animal") and kept("animal") == words("animal") + end      # the piece 'a' is not the word 'a'
    assert words("rabbit")[-1] == "it</w>" and kept("see the rabbit") == words("see") + words("rabbit") + end
    assert mask_of(["red", "the sky"]).sum(1).tolist() == [len(words("red")) + 1, len(words("sky")) + 1]


def distance(f, r):
    """||f - r|| of two maps of mean 0 and deviation 0.1, as a root mean square: their correlation says it."""
    return 0.1 * math.sqrt(2 - 2 * np.corrcoef(np.ravel(f).astype(np.float64), np.ravel(r).astype(np.float64))[0, 1])


def random_maps(seed, sides=(2, 4)):
    maps = [torch.rand(2, side, side, generator=torch.Generator().manual_seed(seed)) for side in sides]
    return [m / m.mean((1, 2), keepdim=True) for m in maps]


def test_attention_loss_by_hand():
    """A mean over layers and over the batch."""
    f, r = random_maps(0), random_maps(1)
    by_hand = sum(distance(f[layer][b], r[layer][b]) for layer in range(2) for b in range(2)) / 4
    assert attention_loss(f, r).item() == pytest.approx(by_hand, rel=1e-4)
    assert attention_loss(f, f).item() == pytest.approx(0, abs=2e-4)
    assert attention_loss(f, r).item() == pytest.approx(attention_loss(r, f).item())
    with pytest.raises(ValueError):
        attention_loss(f, r[:1])


def test_attention_loss_compares_where_and_not_how_much_or_how_finely():
    """Maps that fade, or become flatter, do not agree better; a map that is flat agrees with none."""
    f, r = random_maps(0), random_maps(1)
    loss = attention_loss(f, r).item()
    strength = torch.tensor([0.2, 7.])[:, None, None]          # another for each sample
    assert attention_loss([m * strength for m in f], [m * 0.3 for m in r]).item() == pytest.approx(loss, rel=1e-3)
    assert attention_loss([1 + (m - 1) * 0.1 for m in f], r).item() == pytest.approx(loss, rel=1e-3)
    assert attention_loss([torch.ones_like(m) for m in f], r).item() == pytest.approx(0.1, rel=1e-3)
    assert attention_loss([m * 0.1 for m in f], f).item() == pytest.approx(0, abs=2e-4)
    finer = [[m.repeat_interleave(2, 1).repeat_interleave(2, 2) for m in maps] for maps in (f, r)]
    assert attention_loss(*finer).item() == pytest.approx(loss, rel=1e-4)
    assert attention_loss(f * 3, r * 3).item() == pytest.approx(loss, rel=1e-4)               # three times the layers


def test_reconstruction_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    images, reconstructed = torch.rand(2, 3, 3, 4, 4, generator=generator)
    E_in, E_recon = embeddings(2)
    by_hand = [math.sqrt(sum(d * d for d in (images[b] - reconstructed[b]).flatten().tolist()) / 48)
               + 1 - cosine(E_in[b].tolist(), E_recon[b].tolist()) for b in range(3)]
    assert reconstruction_loss(images, reconstructed, E_in, E_recon).item() == pytest.approx(sum(by_hand) / 3, rel=1e-4)
    assert reconstruction_loss(images, images, E_in, E_in).item() == pytest.approx(0, abs=1e-3)
    larger = [x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in (images, reconstructed)]
    pixels_alone = reconstruction_loss(images, reconstructed, E_in, E_in).item()
    assert reconstruction_loss(*larger, E_in, E_in).item() == pytest.approx(pixels_alone, rel=1e-4)


def test_losses_have_finite_gradients_where_they_are_zero():
    """The root of 0 has none, and an edit that changes nothing has no direction: both are where training starts."""
    maps, images, E = (torch.rand(1, *size).requires_grad_() for size in ((4, 4), (3, 4, 4), (5,)))
    fixed = E.detach()
    (attention_loss([maps], [maps.detach()]) + reconstruction_loss(images.detach(), images, fixed, E)
     + clip_direction_loss(fixed, E, torch.zeros(1, 5), torch.ones(1, 5))).backward()
    assert all(x.grad.isfinite().all() for x in (maps, images, E))


def test_a_flat_map_leaves_the_gradient_small():
    flat = (1 + 1e-7 * torch.rand(1, 4, 4)).requires_grad_()
    attention_loss([flat], [torch.rand(1, 4, 4)]).backward()
    assert flat.grad.abs().max() < 100


def test_edit_region_finds_the_pixels_of_the_words(golden, monkeypatch):
    coarse, fine = (torch.full((2, 4, side, side, 77), 1 / 128) for side in (8, 16))
    words = torch.zeros(2, 77)
    coarse[0, :, 2:4, 4:6, 5] = fine[0, :, 4:8, 8:12, 5] = 0.9
    words[:, 5] = 1
    monkeypatch.setattr(golden.unet, "forward", lambda x, t, context, maps: maps.extend([coarse, fine]))
    monkeypatch.setattr(losses, "content_words", lambda tokenizer, ids: words)
    region = edit_region(golden, torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32), ["a", "b"])
    assert region.shape == (2, 32, 32) and region.min() == 0 and region.max() == 1
    assert region[0, 8:16, 16:24].mean() > 0.6 and region[0, 20:].max() == 0
    assert not region[1].any()                                # the same everywhere: nowhere in particular


# ---- CLIP ------------------------------------------------------------------------------------------------------------

def picture(height, width):
    """A smooth uint8 image within [40, 215], so that neither bicubic filter overshoots."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(9 * x * y)]
    return np.stack([127.5 + 87 * w for w in waves], -1).round().astype(np.uint8)


def preprocessed(scorer, images):
    """What ClipScorer gives to CLIP."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])
    hook = scorer.clip.vision_model.register_forward_pre_hook(keep, with_kwargs=True)
    scorer.embed_images(images)
    hook.remove()
    return seen[0]


def clips_own(pixels, size=32):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(Image.fromarray(pixels), return_tensors="pt").pixel_values


@pytest.mark.parametrize("height, width", [
    (64, 96), (75, 50), (32, 32), (32, 45), (24, 40), (101, 50), (98, 120)])
def test_preprocessing_is_clips_own(scorer, height, width):
    """Halves, unrounded and rounded sides, nothing to resize, and (24, 40) is enlarged."""
    pixels = picture(height, width)
    ours = preprocessed(scorer, torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    # one grey level is 0.0146 after normalisation; the processor rounds to whole levels
    torch.testing.assert_close(ours, clips_own(pixels), atol=0.016, rtol=0)


def test_embeddings_are_clips_own(scorer):
    pixels, texts = picture(64, 96), ["a red circle", "a boat on a lake, with mountains"]
    with torch.no_grad():
        tokens = scorer.tokenizer(texts, padding=True, return_tensors="pt")
        image = scorer.clip.get_image_features(clips_own(pixels)).pooler_output
        text = scorer.clip.get_text_features(**tokens).pooler_output
    ours, both = scorer.embed_images(torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1), scorer.embed_texts(texts)
    assert cosine(ours[0].tolist(), image[0].tolist()) > 0.999
    torch.testing.assert_close(both, text / text.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(scorer.embed_texts(texts[:1]), both[:1])      # padding has no part in it
    assert scorer.embed_texts(["lake " * 200]).isfinite().all()
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(1))


def test_a_clip_on_disk_loads_the_same_and_incomplete_is_refused(scorer, tmp_path):
    scorer.clip.save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ClipScorer.from_pretrained(tmp_path).embed_images(images), scorer.embed_images(images))
    state = {k: v for k, v in scorer.clip.state_dict().items() if k != "visual_projection.weight"}
    scorer.clip.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="visual_projection"):
        ClipScorer.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read: .*header"):
        ClipScorer.from_pretrained(tmp_path)


# ---- the cycle -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained():
    model = EditModel.from_pretrained(GOLDEN / "model")
    model.unet.requires_grad_(True)
    return model


FORWARD, REVERSE = ["make the sky red", "add a tree"], ["make the sky blue", "remove the tree"]
CAPTIONS, EDITED = ["a blue sky", "a field"], ["a red sky", "a field with a tree"]


def round_trip(model, images):
    noise = torch.randn(2, len(images), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return cycle(model, images, FORWARD, REVERSE, torch.tensor([50, 150]), torch.tensor([100, 20]), noise)


def words_of(model):
    """The content words of both instructions."""
    return [content_words(model.tokenizer, model.tokenize(texts)) for texts in (FORWARD, REVERSE)]


def test_the_cycle_is_two_one_step_edits(trained, expected):
    """The forward edit sees I_input and C_f, the reverse edit sees I_edit and C_r; each is one noise prediction."""
    calls, images = [], expected["vae.images"]
    hook = trained.unet.register_forward_hook(lambda module, args, eps: calls.append((*args[:3], eps)))
    trip = round_trip(trained, images)
    hook.remove()
    (x_f, t_f, C_f, eps_f), (x_r, t_r, C_r, eps_r) = calls
    assert t_f.tolist() == [50, 150] and t_r.tolist() == [100, 20]
    assert torch.equal(C_f, trained.encode_text(FORWARD)) and torch.equal(C_r, trained.encode_text(REVERSE))
    torch.testing.assert_close(x_f[:, 4:], trained.vae.encode(images))
    z_edit, z_recon = trained.predict_z0(x_f[:, :4], eps_f, t_f), trained.predict_z0(x_r[:, :4], eps_r, t_r)
    assert max(z_edit.abs().max(), z_recon.abs().max()) < 3.5    # so that the bound on clean latents plays no part here
    torch.testing.assert_close(trip.edited, trained.decode(z_edit), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trip.reconstructed, trained.decode(z_recon), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x_r[:, 4:] * trained.vae.scaling_factor, z_edit, atol=1e-4, rtol=1e-4)
    assert len(trip.forward_maps) == len(trip.reverse_maps) == 11


def test_what_the_cycle_noises_and_sees(trained, expected):
    """The choices that the paper leaves open: both edits begin at the noised input, with noise and timesteps of their
    own, and the reverse edit sees the clean latents of the forward edit, not the encoded image."""
    calls, images = [], expected["vae.images"]
    hook = trained.unet.register_forward_hook(lambda module, args, eps: calls.append((*args[:2], eps)))
    round_trip(trained, images)
    hook.remove()
    (x_f, t_f, eps_f), (x_r, t_r, _) = calls
    noise = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z_input, z_edit = trained.encode(images), trained.predict_z0(x_f[:, :4], eps_f, t_f).clamp(-4, 4)
    begun, back = trained.add_noise(z_input, noise[0], t_f), trained.add_noise(z_input, noise[1], t_r)
    seen = z_edit / trained.vae.scaling_factor
    for found, by_hand in ((x_f[:, :4], begun), (x_r[:, :4], back), (x_r[:, 4:], seen)):
        torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)


def test_the_map_of_an_edit_is_made_where_it_leads(trained, expected):
    """The edited image is what is noised, the input is what the UNet is shown, and the words are the instruction's."""
    calls, images = [], expected["vae.images"]
    hook = trained.unet.register_forward_pre_hook(lambda module, args: calls.append(args))
    region = edit_region(trained, images, images.flip(3), FORWARD, t=200)
    hook.remove()
    ((x, t, context, maps),) = calls
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x[:, :4], trained.add_noise(trained.encode(images.flip(3)), noise, t))
    torch.testing.assert_close(x[:, 4:], trained.vae.encode(images))
    assert t.tolist() == [200, 200] and torch.equal(context, trained.encode_text(FORWARD))
    layers = [F.interpolate(reduce_map(probs, words_of(trained)[0])[:, None], images.shape[-2:], mode="bilinear")
              for probs in maps]
    assert len(layers) == 11
    for b, mean in enumerate(torch.stack(layers).mean(0)[:, 0]):
        torch.testing.assert_close(region[b], (mean - mean.min()) / (mean.max() - mean.min()))


def test_the_reconstructions_gradient_flows_through_both_edits(trained, scorer, expected):
    calls, images = [], expected["vae.images"]

    def keep(module, args, eps):
        eps.retain_grad()
        calls.append(eps)
    hook = trained.unet.register_forward_hook(keep)
    trip = round_trip(trained, images)
    hook.remove()
    only = {"clip": 0, "sim": 0, "attn": 0, "recon": 1}
    trained.unet.zero_grad()
    cycle_losses(scorer, images, CAPTIONS, EDITED, trip, *words_of(trained), only)["cec"].backward()
    assert len(calls) == 2
    for eps in calls:
        assert all(eps.grad[row].abs().sum() > 0 for row in range(2))
    assert all(p.grad.abs().sum() > 0 for p in (trained.unet.conv_in.weight, trained.unet.conv_out.weight))
    for part in (trained.vae, trained.text_encoder, scorer.clip):
        assert all(p.grad is None for p in part.parameters())


def test_attention_loss_trains_both_edits(trained, scorer, expected):
    images = expected["vae.images"]
    trip = round_trip(trained, images)
    maps = trip.forward_maps + trip.reverse_maps
    for m in maps:
        m.retain_grad()
    cycle_losses(scorer, images, CAPTIONS, EDITED, trip, *words_of(trained))["attn"].backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)


def test_L_CEC_joins_the_right_inputs_with_the_papers_weights(scorer):
    """Each loss of `cycle_losses` is the loss of those embeddings and maps that its equation names."""
    generator = torch.Generator().manual_seed(0)
    images, edited, reconstructed = torch.rand(3, 2, 3, 32, 32, generator=generator) * 2 - 1
    forward, reverse = ([torch.rand(2, 4, 4, 4, 77, generator=generator).softmax(-1)] for _ in range(2))
    words = [torch.randint(0, 2, (2, 77), generator=generator).float() for _ in range(2)]
    trip = Cycle(edited, reconstructed, forward, reverse)
    out = cycle_losses(scorer, images, CAPTIONS, EDITED, trip, *words)
    named = {"in": images, "edit": edited, "recon": reconstructed}
    E = {name: scorer.embed_images(x).tolist() for name, x in named.items()}
    T, T_edit = scorer.embed_texts(CAPTIONS).tolist(), scorer.embed_texts(EDITED).tolist()

    def mean(per_sample):
        return sum(per_sample(b) for b in range(2)) / 2

    def minus(a, b):
        return [x - y for x, y in zip(a, b)]

    def rms(x):
        return math.sqrt(x.square().mean().item())
    by_hand = {
        "clip": mean(lambda b: 1 - cosine(minus(E["edit"][b], E["in"][b]), minus(T_edit[b], T[b]))),
        "sim": mean(lambda b: 1 - cosine(E["edit"][b], T_edit[b])),
        "attn": mean(lambda b: distance(*(reduce_map(p[0], w)[b] for p, w in zip((forward, reverse), words)))),
        "recon": mean(lambda b: rms(images[b] - reconstructed[b]) + 1 - cosine(E["in"][b], E["recon"][b]))}
    assert out.keys() == {*by_hand, "cec"}
    for name, value in by_hand.items():
        assert out[name].item() == pytest.approx(value, rel=1e-3), name
    assert losses.WEIGHTS == {"clip": 1, "attn": 0.5, "sim": 1, "recon": 1}
    cec = by_hand["clip"] + 0.5 * by_hand["attn"] + by_hand["sim"] + by_hand["recon"]
    assert out["cec"].item() == pytest.approx(cec, rel=1e-3)
    weights = {"clip": 2, "attn": 3, "sim": 5, "recon": 0}
    weighted = cycle_losses(scorer, images, CAPTIONS, EDITED, trip, *words, weights)
    cec = 2 * by_hand["clip"] + 3 * by_hand["attn"] + 5 * by_hand["sim"]
    assert weighted["cec"].item() == pytest.approx(cec, rel=1e-3)
