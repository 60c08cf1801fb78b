"""The model against diffusers' golden values, its checkpoints, and the identities of its equations."""
import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub._snapshot_download import TreeCacheEntry, write_tree_cache
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attention import Attention
from checkpoint import find_model
from uip2p import EditModel, one_step
from unet import SD15, UNet
from vae import VAE

WEIGHTS = "diffusion_pytorch_model"
UNET, VAE_FILE, TEXT = f"unet/{WEIGHTS}.safetensors", f"vae/{WEIGHTS}.safetensors", "text_encoder/model.safetensors"


def assert_close(out, reference, tolerance=2e-5):
    """Relative error ||out - reference|| / ||reference||, as in golden/check.py."""
    assert out.shape == reference.shape
    error = float((out.double() - reference.double()).norm() / reference.double().norm())
    assert error < tolerance, f"relative error {error:.1e}"


# ---- golden values ---------------------------------------------------------------------------------------------------

def test_text_matches_golden(golden, expected):
    texts = expected["info"]["texts"]                         # capitals, digits, an empty one, one too long
    assert torch.equal(golden.tokenize(texts), expected["text.ids"])
    assert_close(golden.encode_text(texts), expected["text.hidden"])
    for i, text in enumerate(texts):
        assert_close(golden.encode_text([text]), expected["text.hidden"][i:i + 1])


@pytest.mark.parametrize("case", ["unet", "unet_wide"])
def test_unet_matches_golden(golden, expected, case):
    inputs = [expected[f"{case}.{name}"] for name in ("x", "t", "context")]
    eps = golden.unet(*inputs)
    assert_close(eps, expected[f"{case}.eps"])
    for i in range(len(eps)):                                 # each at its own timestep, whatever stands beside it
        assert_close(golden.unet(*(y[i:i + 1] for y in inputs)), expected[f"{case}.eps"][i:i + 1])


@pytest.mark.parametrize("case", ["vae", "vae_wide"])
def test_vae_matches_golden(golden, expected, case):
    assert_close(golden.vae.encode(expected[f"{case}.images"]), expected[f"{case}.mean"])
    assert_close(golden.vae.decode(expected[f"{case}.latents"]), expected[f"{case}.decoded"])


def golden_edit(model, expected, **options):
    instructions = [expected["info"]["edit_text"]]
    return model.edit(expected["edit.image"], instructions, steps=4, noise=expected["edit.noise"], **options)


@pytest.mark.parametrize("s_T, s_I, key", [
    (7.5, 1.5, "7.5_1.5"), (7.5, 1.0, "7.5_1.0"), (1.0, 1.0, "1.0_1.0"), (1.0, 1.5, "1.0_1.5_paper")])
def test_edit_matches_golden(golden, expected, s_T, s_I, key):
    assert_close(golden_edit(golden, expected, text_guidance=s_T, image_guidance=s_I), expected[f"edit.image_{key}"])


def test_edit_of_two_images_matches_golden(golden, expected):
    edited = golden.edit(expected["pair.images"], expected["info"]["pair_texts"], steps=7, text_guidance=6.0,
                         image_guidance=1.3, noise=expected["pair.noise"])
    assert_close(edited, expected["pair.images_out"])


def test_trajectory_matches_golden(golden, expected):
    """Every step of DDIM: the timestep, the latents, the image latents, and the noise of each of the three branches."""
    steps, ends = [], []
    hooks = [golden.unet.register_forward_hook(lambda module, args, eps: steps.append((*args[:3], eps))),
             golden.vae.post_quant_conv.register_forward_hook(lambda module, args, out: ends.append(args[0]))]
    golden_edit(golden, expected, text_guidance=7.5, image_guidance=1.5)
    for hook in hooks:
        hook.remove()
    text, no_text = golden.encode_text([expected["info"]["edit_text"], ""])
    assert [t.unique().tolist() for _, t, _, _ in steps] == [[t] for t in expected["ddim.timesteps"].tolist()]
    for n, (x, _, context, eps) in enumerate(steps):
        seen = set()
        for row in range(len(x)):
            with_image, with_text = x[row, 4:].any().item(), torch.allclose(context[row], text, atol=1e-5)
            assert with_text or torch.allclose(context[row], no_text, atol=1e-5)
            branch = {(True, True): 0, (True, False): 1, (False, False): 2}[with_image, with_text]
            seen.add(branch)
            assert_close(x[row:row + 1, :4], expected["ddim.latents"][n])
            if branch < 2:
                assert_close(x[row:row + 1, 4:], expected["edit.image_latents"])
            assert_close(eps[row], expected["ddim.branch_eps"][n, branch])
        assert seen == {0, 1, 2}
    assert_close(ends[-1] * golden.vae.scaling_factor, expected["ddim.latents"][4])


# ---- the architecture ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network, config, parameters", [
    (UNet, SD15, 859_532_484), (UNet, SD15 | {"in_channels": 4}, 859_520_964), (VAE, {}, 83_653_863)])
def test_parameter_counts_of_the_published_models(network, config, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in network(config).parameters()) == parameters


@pytest.mark.parametrize("key, value", [("attention_head_dim", 5), ("attention_head_dim", [8, 8]),
                                        ("norm_num_groups", 3)])
def test_widths_that_do_not_divide_are_refused(checkpoint, key, value):
    edit_json(checkpoint / "unet/config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"unet/config.json: {key} = .* block_out_channels = \[16, 32, 32\]"):
        EditModel.from_pretrained(checkpoint)


@pytest.mark.parametrize("part, config", [
    ("unet", {"use_linear_projection": True}), ("unet", {"act_fn": "gelu"}),
    ("unet", {"layers_per_block": [1, 2, 2, 2]}),
    ("unet", {"down_block_types": ["AttnDownBlock2D"] * 4}), ("vae", {"use_quant_conv": False}),
    ("vae", {"shift_factor": 0.1}), ("unet", {"cross_attention_dim": [32] * 3}), ("unet", {"norm_num_groups": 0}),
    ("unet", {"norm_num_groups": -8}), ("unet", {"norm_eps": float("nan")}), ("unet", {"norm_eps": "1e-5"}),
    ("unet", {"layers_per_block": True}), ("unet", {"layers_per_block": 10 ** 9}), ("unet", {"out_channels": 3}),
    ("unet", {"attention_head_dim": 0}), ("unet", {"attention_head_dim": [8, 8, -8]}),
    ("unet", {"attention_head_dim": "8"}), ("unet", {"block_out_channels": [16, 32, 10 ** 9]}),
    ("unet", {"block_out_channels": 16}), ("unet", {"block_out_channels": [17, 32, 32]}),
    
    ("vae", {"in_channels": 4}), ("vae", {"latent_channels": 16}), ("vae", {"norm_num_groups": 2.5}),
    ("vae", {"scaling_factor": float("inf")}), ("vae", {"scaling_factor": 0}), ("vae", {"scaling_factor": "0.18"}),
    ("text_encoder", {"num_hidden_layers": -1}), ("text_encoder", {"layer_norm_eps": -1}),
    ("text_encoder", {"hidden_size": 10 ** 9}), ("text_encoder", {"max_position_embeddings": 0})], ids=str)
def test_another_architecture_is_refused(checkpoint, part, config):
    edit_json(checkpoint / part / "config.json", **config)
    with pytest.raises(ValueError, match=f"{part}/config.json: {min(config)} = "):
        EditModel.from_pretrained(checkpoint)


def unet_inputs(expected, rows=2):
    return [expected[f"unet.{name}"][:rows] for name in ("x", "t", "context")]


def test_sizes_that_cannot_be_halved_are_refused(golden, expected):
    x, t, context = unet_inputs(expected)
    with pytest.raises(ValueError, match="14x16"):
        golden.unet(x[:, :, :14], t, context)
    with pytest.raises(ValueError, match="33x32"):
        golden.vae.encode(torch.zeros(1, 3, 33, 32))


def test_attention_maps_sum_to_one_and_capture_changes_nothing(golden, expected):
    inputs, maps = unet_inputs(expected), []
    eps = golden.unet(*inputs, maps)
    sides = [16, 16, 8, 8, 4, 8, 8, 8, 16, 16, 16]            # down, middle, up
    assert [tuple(m.shape[2:4]) for m in maps] == [(side, side) for side in sides]
    for m in maps:
        assert m.shape[:2] == (2, 8) and m.shape[-1] == 77
        torch.testing.assert_close(m.sum(-1), torch.ones_like(m[..., 0]))
    assert_close(eps, golden.unet(*inputs), 5e-6)


@torch.no_grad()
def test_control_replaces_the_probabilities():
    layer, self_layer = Attention(8, 6, heads=2), Attention(8, 8, heads=2)
    x, context, seen = torch.randn(1, 5, 8), torch.randn(1, 3, 6), []
    plain, probs = layer(x, context, capture=True)
    assert_close(layer(x, context)[0], plain, 1e-6)

    def second_token(probs, is_text):
        seen.append((probs, is_text))
        return torch.zeros_like(probs).index_fill(-1, torch.tensor(1), 1)
    layer.control = self_layer.control = second_token
    out, used = layer(x, context, capture=True)
    assert_close(out, layer.to_out[0](layer.to_v(context)[:, 1:2]).expand(1, 5, 8), 1e-6)
    assert (used[..., 1] == 1).all() and torch.equal(seen[0][0], probs)
    self_layer(x)
    assert [is_text for _, is_text in seen] == [True, False]


def test_texts_are_encoded_once_and_no_step_waits_for_the_host(golden, expected):
    texts, syncs, counts = [], [], []

    class Syncs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:            # a tensor's value is asked for
                syncs.append(1)
            return func(*args, **kwargs or {})
    hook = golden.text_encoder.register_forward_hook(lambda *args: texts.append(1))
    for steps in (2, 5):
        syncs.clear()
        with Syncs():
            golden.sample(torch.zeros(1, 4, 8, 8), ["make it snow"], torch.zeros(1, 4, 8, 8), steps, 7.5, 1.5)
        counts.append(len(syncs))
    hook.remove()
    assert len(texts) == 2 and counts[0] == counts[1]


def test_a_large_batch_passes_the_vae_in_parts(golden, expected, monkeypatch):
    images, latents = (expected[f"vae.{name}"].repeat(3, 1, 1, 1)[:3] for name in ("images", "latents"))
    whole, parts = (golden.vae.encode(images), golden.vae.decode(latents)), []
    monkeypatch.setattr("vae.PIXELS", 2 * images[0, 0].numel() + 1)
    hooks = [module.register_forward_hook(lambda module, args, out: parts.append(len(out)))
             for module in (golden.vae.encoder, golden.vae.decoder)]
    assert_close(golden.vae.encode(images), whole[0], 1e-5)
    assert_close(golden.vae.decode(latents), whole[1], 1e-5)
    for hook in hooks:
        hook.remove()
    assert parts == [2, 1, 2, 1]


def test_checkpointing_recomputes_and_gives_the_same_gradients(expected, checkpoint):
    unet = EditModel.from_pretrained(checkpoint).unet.train().requires_grad_(True)
    block, calls, results = unet.down_blocks[0].resnets[0].conv1, [], []
    block.register_forward_pre_hook(lambda module, args: calls.append(1))
    for unet.checkpointing in (False, True):
        maps, before = [], len(calls)
        eps = unet(*unet_inputs(expected), maps)
        unet.zero_grad()
        (eps.square().mean() + sum(m[..., 3].square().mean() for m in maps)).backward()
        results.append((len(calls) - before, len(maps), [p.grad.clone() for p in unet.parameters()]))
    assert [r[:2] for r in results] == [(1, 11), (2, 11)]
    torch.testing.assert_close(results[0][2], results[1][2])


def test_checkpointing_decodes_image_by_image_and_once_more(checkpoint):
    vae = EditModel.from_pretrained(checkpoint).vae
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    calls, gradients = [], []
    vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for vae.checkpointing in (False, True):
        gradients += torch.autograd.grad(vae.decode(z).square().sum(), z)
    assert calls == [3] + [1] * 6
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=0)          # of gradients up to 3


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def edit_json(file, **changes):
    """Changes keys of a JSON file; None removes one."""
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(file, change):
    state = load_file(file)
    save_file({k: v.contiguous() for k, v in (change(state) or state).items()}, file, {"format": "pt"})


def rename_vae_attention(state):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    def old(key):
        for new, name in names.items():
            key = key.replace(f".{new}.", f".{name}.") if ".attentions." in key else key
        return key
    return {old(k): v[:, :, None, None] if old(k) != k and k.endswith("weight") else v for k, v in state.items()}


def shard_unet(path):
    state = load_file(path / f"unet/{WEIGHTS}.safetensors")
    (path / f"unet/{WEIGHTS}.safetensors").unlink()
    where = {}
    for number in (1, 2):
        name = f"{WEIGHTS}-0000{number}-of-00002.safetensors"
        part = {k: v for i, (k, v) in enumerate(sorted(state.items())) if i % 2 == number - 1}
        save_file(part, path / "unet" / name)
        where |= dict.fromkeys(part, name)
    (path / f"unet/{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def variant(path):
    for part, stem in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model")):
        (path / part / f"{stem}.safetensors").rename(path / part / f"{stem}.fp16.safetensors")


def old_configs(path):
    """Only the keys that the published files have, and their other scheduler."""
    edit_json(path / "vae/config.json", scaling_factor=None, shift_factor=None, use_quant_conv=None,
              use_post_quant_conv=None, latents_mean=None, latents_std=None, mid_block_add_attention=None,
              force_upcast=None)
    edit_json(path / "scheduler/scheduler_config.json", _class_name="PNDMScheduler", skip_prk_steps=True,
              timestep_spacing=None, prediction_type=None, rescale_betas_zero_snr=None)
    kept = ("act_fn", "attention_head_dim", "block_out_channels", "center_input_sample", "cross_attention_dim",
            "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels",
            "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups", "out_channels", "sample_size",
            "up_block_types")
    config = json.loads((path / "unet/config.json").read_text())
    (path / "unet/config.json").write_text(json.dumps({key: config[key] for key in kept}))


def shard(file, number, index):
    """Two shards instead of a file.  number: how a shard is called; index: its JSON file."""
    state = load_file(file)
    file.unlink()
    names = [file.with_name(f"{file.name.split('.')[0]}{number.format(n)}.safetensors") for n in (1, 2)]
    for n, name in enumerate(names):
        save_file({key: w for i, (key, w) in enumerate(sorted(state.items())) if i % 2 == n}, name)
    where = {key: names[i % 2].name for i, key in enumerate(sorted(state))}
    file.with_name(file.name + index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


NEW_SHARDS, OLD_SHARDS = (".fp16-0000{}-of-00002", ".index.fp16.json"), ("-0000{}-of-00002.fp16", ".fp16.index.json")


def fp16_vae_and_shards(path, names=OLD_SHARDS):
    """A UNet in shards, a VAE of fp16, and a text encoder in full."""
    shard(path / UNET, *names)
    (path / VAE_FILE).rename(path / f"vae/{WEIGHTS}.fp16.safetensors")


def no_length(path):
    edit_json(path / "tokenizer/tokenizer_config.json", model_max_length=None)


def rename_text_weights(state):
    return {name.removeprefix("text_model."): weight for name, weight in state.items()}


@pytest.mark.parametrize("change", [
    shard_unet, variant, old_configs, no_length, fp16_vae_and_shards,
    lambda path: fp16_vae_and_shards(path, NEW_SHARDS),
    lambda path: (path / "tokenizer/tokenizer_config.json").unlink(),
    lambda path: edit_weights(path / f"vae/{WEIGHTS}.safetensors", rename_vae_attention),
    lambda path: edit_weights(path / "text_encoder/model.safetensors",
                              lambda s: s | {"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    lambda path: edit_weights(path / "text_encoder/model.safetensors", rename_text_weights),
], ids=["shards", "fp16-names", "old-configs", "no-length", "old-fp16-shards", "fp16-shards", "no-tokenizer-config",
       "old-vae-attention", "position-ids", "no-text_model-prefix"])
def test_checkpoints_as_found_in_the_wild_load_the_same(checkpoint, expected, change):
    change(checkpoint)
    model = EditModel.from_pretrained(checkpoint)
    assert_close(golden_edit(model, expected, text_guidance=7.5, image_guidance=1.5), expected["edit.image_7.5_1.5"])


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Makes offline caches of t/NAME, of a folder's files: `cached` and, that the hub alone has, `others`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def fill(name, folder, others):
        repository, commit = tmp_path / f"models--t--{name}", "0123456789" * 4
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(commit)
        cached = [str(file.relative_to(folder)) for file in folder.rglob("*.*")]
        entry = TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
        write_tree_cache(str(repository), commit, dict.fromkeys([*cached, *others], entry))
    return fill


@pytest.mark.parametrize("change", [lambda path: None, variant, fp16_vae_and_shards], ids=["full", "fp16", "mixed"])
def test_what_another_library_left_in_the_cache_loads_offline(checkpoint, expected, hub_cache, change):
    change(checkpoint)
    full = [UNET, VAE_FILE, TEXT]
    others = [file for file in full if not (checkpoint / file).exists()]
    others += [file.replace(".safetensors", ".fp16.safetensors") for file in full if (checkpoint / file).exists()]
    hub_cache("model", checkpoint, [*others, "safety_checker/config.json", "tokenizer/added_tokens.json"])
    model = EditModel.from_pretrained("t/model")
    assert_close(golden_edit(model, expected), expected["edit.image_7.5_1.5"])


def test_what_a_cache_lacks_is_named(checkpoint, hub_cache):
    (checkpoint / VAE_FILE).unlink()
    hub_cache("model", checkpoint, [VAE_FILE])
    with pytest.raises(ValueError, match=f"{VAE_FILE} is missing"):
        EditModel.from_pretrained("t/model")
    with pytest.raises(ValueError, match="^t/nothing is no local directory, and the hub did not give it"):
        EditModel.from_pretrained("t/nothing")


def test_of_the_hub_only_what_is_read_is_downloaded(checkpoint, tmp_path, monkeypatch):
    """Full weights before fp16, no pickles; a part that has fp16 alone is taken so."""
    for file in (UNET, TEXT):
        shutil.copy(checkpoint / file, checkpoint / file.replace(".safetensors", ".fp16.safetensors"))
        (checkpoint / file).with_suffix(".bin").write_text("a pickle")
        (checkpoint / file).with_suffix(".non_ema.safetensors").write_text("others")
    (checkpoint / VAE_FILE).rename(checkpoint / f"vae/{WEIGHTS}.fp16.safetensors")
    (checkpoint / "v1-5-pruned.safetensors").write_text("all in one file")

    def snapshot_download(name, allow_patterns):
        files = [str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*.*")]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkpoint / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")
    monkeypatch.setattr("checkpoint.snapshot_download", snapshot_download)
    EditModel.from_pretrained("some/model")
    weights = {str(file.relative_to(tmp_path / "cache")) for file in (tmp_path / "cache").rglob("*.*")
               if file.suffix not in (".json", ".txt")}
    assert weights == {UNET, TEXT, f"vae/{WEIGHTS}.fp16.safetensors"}


def test_a_textual_inversion_of_several_vectors_is_said(checkpoint, golden, capsys):
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<dog>"])
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer.*reach number 696 of 694"):       # the text encoder lacks them
        EditModel.from_pretrained(checkpoint)
    grown = copy.deepcopy(golden.text_encoder)
    grown.resize_token_embeddings(697)
    grown.save_pretrained(checkpoint / "text_encoder")
    EditModel.from_pretrained(checkpoint)
    said = capsys.readouterr().err
    assert "'<cat> <cat>_1'" in said and "<dog>" not in said


def test_half_precision_weights_are_converted(checkpoint, expected):
    for file in checkpoint.rglob("*.safetensors"):
        edit_weights(file, lambda state: {k: v.half() for k, v in state.items()})
    model = EditModel.from_pretrained(checkpoint, dtype=torch.float32)
    for part in (model.unet, model.vae, model.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert_close(model.unet(*unet_inputs(expected)), expected["unet.eps"][:2], 5e-3)


def test_text_to_image_unet_gets_zero_image_channels(checkpoint, expected):
    file = checkpoint / f"unet/{WEIGHTS}.safetensors"
    edit_weights(file, lambda state: state | {"conv_in.weight": state["conv_in.weight"][:, :4]})
    edit_json(checkpoint / "unet/config.json", in_channels=4)
    model, published = EditModel.from_pretrained(checkpoint), load_file(file)
    weight = model.unet.conv_in.weight
    assert torch.equal(weight[:, :4], published["conv_in.weight"])
    assert weight.shape[1] == 8 and not weight[:, 4:].any()
    assert torch.equal(model.unet.conv_in.bias, published["conv_in.bias"])
    x, t, context = unet_inputs(expected)
    other = torch.cat([x[:, :4], torch.randn_like(x[:, 4:])], dim=1)
    assert torch.equal(model.unet(x, t, context), model.unet(other, t, context))          # the image is not seen yet


def test_the_folder_of_a_unet_is_the_model_with_that_unet(checkpoint, golden, expected, tmp_path):
    shutil.copytree(checkpoint / "unet", checkpoint / "other")
    edit_weights(checkpoint / f"other/{WEIGHTS}.safetensors", lambda state: state | {"conv_out.bias": torch.ones(4)})
    (checkpoint / "edit_defaults.json").write_text('{"steps": 7}')
    other = EditModel.from_pretrained(checkpoint / "other")
    assert (other.unet.conv_out.bias == 1).all() and other.defaults == {"steps": 7}
    assert torch.equal(other.unet.conv_in.weight, golden.unet.conv_in.weight)
    assert torch.equal(other.vae.decode(expected["vae.latents"]), golden.vae.decode(expected["vae.latents"]))
    for path in (checkpoint, checkpoint / "unet", f"{checkpoint}/unet/"):
        assert find_model(path) == (checkpoint, "unet")
        assert torch.equal(EditModel.from_pretrained(path).unet.conv_out.bias, golden.unet.conv_out.bias)
    other.save_pretrained(tmp_path / "saved")                 # a model of its own, with this UNet as its only one
    assert not (tmp_path / "saved/other").exists()
    assert (EditModel.from_pretrained(tmp_path / "saved").unet.conv_out.bias == 1).all()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_the_folder_of_another_part_is_no_model(checkpoint, part):
    with pytest.raises(ValueError, match=part) as error:
        EditModel.from_pretrained(checkpoint / part)
    assert "\n" not in str(error.value)


def test_what_is_saved_is_loaded_again(golden, expected, tmp_path):
    golden.save_pretrained(tmp_path / "new/model")
    saved = tmp_path / "new/model"
    files = {str(f.relative_to(saved)) for f in saved.rglob("*") if f.is_file()}
    networks = {f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", f"{WEIGHTS}.safetensors")}
    assert networks | {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
                       "text_encoder/config.json", "text_encoder/model.safetensors"} <= files
    assert {f.name for f in saved.iterdir()} == {
        "model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert all(key.startswith("text_model.") and not key.startswith("text_model.text_model.")
               for key in load_file(saved / "text_encoder/model.safetensors"))
    again = EditModel.from_pretrained(saved)
    texts = expected["info"]["texts"]
    assert torch.equal(again.tokenize(texts), expected["text.ids"])
    assert torch.equal(again.encode_text(texts), golden.encode_text(texts))
    assert torch.equal(golden_edit(again, expected), golden_edit(golden, expected))
    golden.save_pretrained(saved)                             # over an old one
    assert torch.equal(golden_edit(EditModel.from_pretrained(saved), expected), golden_edit(golden, expected))


def truncate(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def pickle_only(file):
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def drop(key):
    return lambda file: edit_weights(file, lambda state: {k: v for k, v in state.items() if k != key})


def reshape(key):
    return lambda file: edit_weights(file, lambda state: state.update({key: state[key][:-1]}))


def narrow(folder):
    CLIPTextModel(CLIPTextConfig.from_pretrained(folder, hidden_size=16)).save_pretrained(folder)


def index_without_map(folder):
    (weights,) = folder.glob("*.safetensors")
    weights.rename(folder / "elsewhere.safetensors")
    weights.with_suffix(".safetensors.index.json").write_text('{"metadata": {}}')


def point(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def turn(key, change):
    """Changes one weight."""
    return lambda file: edit_weights(file, lambda state: state | {key: change(state[key])})


def more_layers(file):
    edit_weights(file, lambda s: s | {key.replace("layers.1", "layers.2"): w.clone() for key, w in s.items()})


def deep(file):
    file.write_text('{"a": ' * 100_000)


def no_vocabulary(folder):
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def changed(**keys):
    return lambda file: edit_json(file, **keys)


def without_a_shard(folder):
    shard_unet(folder.parent)
    (folder / f"{WEIGHTS}-00002-of-00002.safetensors").unlink()


def empty(folder):
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


NORM, SCHEDULER = "text_model.final_layer_norm.weight", "scheduler/scheduler_config.json"


@pytest.mark.parametrize("target, damage, says", [
    (UNET, pickle_only, "docs/data.md says how to convert"), (TEXT, pickle_only, f"{TEXT} is missing.  Pickles"),
    *[(part, shutil.rmtree, part) for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")],
    (UNET, drop("conv_out.bias"), "conv_out.bias"), (VAE_FILE, drop("quant_conv.bias"), "quant_conv.bias"),
    (TEXT, drop(NORM), "final_layer_norm.weight"),
    (UNET, reshape("conv_out.bias"), "conv_out.bias"), (VAE_FILE, reshape("quant_conv.weight"), "quant_conv.weight"),
    (TEXT, reshape(NORM), "text_encoder"),
    (UNET, lambda f: edit_weights(f, lambda s: s | {"surplus": torch.zeros(1)}), "surplus"),
    (UNET, truncate, UNET), (VAE_FILE, truncate, VAE_FILE), (TEXT, truncate, TEXT),
    ("unet/config.json", truncate, "unet/config.json"),
    ("unet/config.json", changed(act_fn="gelu"), "unet/config.json"),
    ("vae/config.json", lambda f: f.write_text("[1]"), "vae/config.json"), ("text_encoder", narrow, "width is 16"),
    ("unet", index_without_map, "unet"), ("vae", index_without_map, "vae"),
    ("text_encoder", index_without_map, "text_encoder"), ("tokenizer", no_vocabulary, "tokenizer"),
    ("tokenizer/vocab.json", lambda f: f.unlink(), "tokenizer"), ("tokenizer/vocab.json", truncate, "tokenizer"),
    ("tokenizer/tokenizer.json", lambda f: f.write_text("{}"), "tokenizer"),
    ("text_encoder/config.json", changed(hidden_size="64"), "hidden_size = '64'"),
    (SCHEDULER, changed(prediction_type="v_prediction"), "prediction_type"),
    (SCHEDULER, changed(beta_schedule="linear"), "beta_schedule"),
    (SCHEDULER, changed(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    (SCHEDULER, changed(beta_start="small"), "beta_start"),
    (SCHEDULER, changed(steps_offset=1.0), "steps_offset = 1.0"),
    (SCHEDULER, changed(num_train_timesteps=500), "num_train_timesteps"),
    ("unet/config.json", changed(in_channels=9), "in_channels = 9"),         # one for inpainting
    *[(file, point, "git lfs pull") for file in (UNET, TEXT, "vae/config.json", "tokenizer/vocab.json", SCHEDULER)],
    *[(file, deep, file) for file in ("unet/config.json", "text_encoder/config.json", SCHEDULER)],
    *[("tokenizer/merges.txt", change, "merges.txt lacks lines") for change in (
        lambda f: f.write_text("".join(f.read_text().splitlines(True)[:90])), lambda f: f.write_text(""))],
    *[("text_encoder/config.json", changed(**{key: value}), f"{key} = {value!r}") for key, value in (
        ("dtype", "x"), ("eos_token_id", 10 ** 8), ("eos_token_id", []), ("num_attention_heads", -1))],
    (TEXT, more_layers, "encoder.layers.2"), ("text_encoder/config.json", changed(num_hidden_layers=1), "layers.1"),
    ("text_encoder/config.json", changed(hidden_size=16384), "many more than there are"),
    ("text_encoder/config.json", changed(vocab_size=600), "text_encoder"),
    ("tokenizer/tokenizer_config.json", changed(model_max_length=-1), "texts have -1 tokens"),
    ("tokenizer/tokenizer_config.json", changed(model_max_length="77"), "texts have '77' tokens"),
    (UNET, turn("conv_out.weight", lambda w: w.to(torch.int8)), "conv_out.weight is quantised, torch.int8"),
    (TEXT, turn(NORM, lambda w: w.to(torch.int8)), "final_layer_norm.weight is quantised, torch.int8"),
    *[(SCHEDULER, changed(**{key: value}), f"{key} = {value}") for key, value in {
        "beta_end": -1, "beta_start": -0.1, "steps_offset": -5, "clip_sample": True, "thresholding": True}.items()],
    *[(SCHEDULER, changed(_class_name="DDIMScheduler", **{key: value}), f"{key} = {value!r}") for key, value in {
        "timestep_spacing": "trailing", "set_alpha_to_one": True}.items()],
    ("model_index.json", changed(_class_name="StableDiffusionXLPipeline"), "StableDiffusionXLPipeline"),
    ("model_index.json", changed(_class_name="PixArtAlphaPipeline"), "PixArtAlphaPipeline"),
    ("unet", without_a_shard, "00001-of-00002.safetensors: of such files only 1"), ("", empty, "model"),
    ("", lambda d: (shutil.rmtree(d), d.write_text("a file")), "model"),
    ("", shutil.rmtree, "model"),
], ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""))
def test_a_bad_checkpoint_is_refused_in_one_line(checkpoint, target, damage, says):
    damage(checkpoint / target)
    with pytest.raises(ValueError) as error:
        EditModel.from_pretrained(checkpoint)
    message = str(error.value)
    assert says in message and "\n" not in message and str(checkpoint) in message


# ---- sampling --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("s_T, s_I", [(1, 1), (7.5, 1), (1.5, 1.5), (7.5, 1.5), (1, 1.5), (0, 0.5)])
def test_edit_follows_equation_3(golden, expected, s_T, s_I):
    rows = []
    hook = golden.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    edited = golden.edit(expected["edit.image"], ["turn it red"], steps=2, text_guidance=s_T, image_guidance=s_I,
                         noise=expected["edit.noise"])
    hook.remove()
    assert rows == [3] * 2                                    # the three predictions of a step are one call

    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0).float()
    image, z = golden.vae.encode(expected["edit.image"]), expected["edit.noise"]
    text, no_text = golden.encode_text(["turn it red"]), golden.encode_text([""])
    for t, before in ((501, 1), (1, 0)):

        def e(image, text):
            return golden.unet(torch.cat([z, image], 1), torch.tensor([t]), text)
        none = e(torch.zeros_like(image), no_text)
        eps = none + s_I * (e(image, no_text) - none) + s_T * (e(image, text) - e(image, no_text))
        z_0 = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        z = abar[before].sqrt() * z_0 + (1 - abar[before]).sqrt() * eps
    assert_close(edited, golden.vae.decode(z / 0.18215).clamp(-1, 1))


def test_edit_of_a_batch_is_that_of_its_images(golden, expected):
    images, texts, noise = expected["pair.images"], expected["info"]["pair_texts"], expected["pair.noise"]
    batch = golden.edit(images, texts, steps=3, noise=noise)
    for i in range(2):
        assert_close(batch[i:i + 1], golden.edit(images[i:i + 1], texts[i:i + 1], steps=3, noise=noise[i:i + 1]))
    assert not torch.allclose(batch, golden.edit(images, texts[::-1], steps=3, noise=noise), atol=1e-3)


def test_edit_depends_on_the_seed_and_on_nothing_else(golden, expected):
    def edit(seed):
        torch.rand(3)                                         # the global generator has no part in it
        return golden.edit(expected["edit.image"], ["x"], steps=2, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(edit(1), edit(1)) and not torch.equal(edit(1), edit(2))
    assert edit(1).abs().max() <= 1


def test_the_guidance_is_what_the_model_recommends(golden, monkeypatch):
    assert golden.guidance == {"text_guidance": 7.5, "image_guidance": 1.5}
    for defaults in ({"text_guidance": 3}, {"image_guidance": 1}, {"steps": 7}):
        monkeypatch.setattr(golden, "defaults", defaults)
        assert golden.guidance == {name: defaults.get(name, usual) for name, usual in
                                   {"text_guidance": 7.5, "image_guidance": 1.5}.items()}


@pytest.mark.parametrize("steps, first, last", [(50, 981, 1), (10, 901, 1), (3, 667, 1), (1, 1, 1), (999, 999, 1)])
def test_ddim_timesteps(golden, steps, first, last):
    timesteps = golden.ddim_timesteps(steps)
    assert (len(timesteps), timesteps[0], timesteps[-1]) == (steps, first, last)
    assert {a - b for a, b in zip(timesteps, timesteps[1:])} <= {1000 // steps}


def test_the_spacing_of_another_sampler_is_its_own(golden, checkpoint):
    changed(_class_name="EulerDiscreteScheduler", timestep_spacing="linspace")(checkpoint / SCHEDULER)
    assert EditModel.from_pretrained(checkpoint).ddim_timesteps(4) == golden.ddim_timesteps(4)


@pytest.mark.parametrize("steps", [0, -1, 1000])              # of 1000, the first would be at timestep 1000
def test_impossible_step_counts_are_refused(golden, expected, steps):
    with pytest.raises(ValueError, match="steps"):
        golden.edit(expected["edit.image"], ["x"], steps=steps)


@pytest.mark.parametrize("images, texts", [(1, 2), (2, 1)])
def test_unequal_numbers_of_images_and_instructions_are_refused(golden, images, texts):
    with pytest.raises(ValueError, match=f"{images} images but {texts} instructions"):
        golden.edit(torch.zeros(images, 3, 32, 32), ["x"] * texts)


def test_schedule_is_stable_diffusions(golden):
    abar = golden.alphas_cumprod
    assert len(abar) == 1000 and abar[0].item() == pytest.approx(1 - 0.00085, rel=1e-6)
    assert abar[999].item() == pytest.approx(0.0046602, rel=1e-4)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_noise_is_removed_as_it_was_added(golden, t):
    z_0, noise = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([t, 300, 999 - t])
    z_t = golden.add_noise(z_0, noise, t)
    torch.testing.assert_close(golden.predict_z0(z_t, noise, t), z_0, rtol=1e-3, atol=1e-4)
    rounded = z_0.bfloat16()                                  # as the VAE's latents are under autocast
    z_t = golden.add_noise(rounded, noise, t)
    torch.testing.assert_close(golden.predict_z0(z_t, noise, t), rounded.float(), rtol=1e-3, atol=1e-4)
    ones, zeros = torch.ones_like(z_0), torch.zeros_like(z_0)
    for row in range(3):                                      # variance is preserved, and each row has its own timestep
        signal, share = (golden.add_noise(*pair, t)[row].mean() for pair in ((ones, zeros), (zeros, ones)))
        assert signal ** 2 == pytest.approx(golden.alphas_cumprod[t[row]].item(), rel=1e-4)
        assert signal ** 2 + share ** 2 == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("t", [1, 200, 500, 999])
def test_the_one_step_estimate_is_bounded_and_its_gradient_does_not_grow(golden, t):
    """z_0 = (z_t - sqrt(1 - abar) eps) / sqrt(abar), within +-4; the derivative by eps is at most 1."""
    eps, maps = torch.full((1, 4, 2, 2), 0.1, requires_grad=True), []
    model = SimpleNamespace(unet=lambda x, t, context, maps: maps.append("A") or eps, predict_z0=golden.predict_z0,
                            alphas_cumprod=golden.alphas_cumprod)
    image, steps, abar = torch.zeros(1, 4, 2, 2), torch.tensor([t]), golden.alphas_cumprod[t].item()
    z_0 = one_step(model, torch.full((1, 4, 2, 2), 0.2), steps, image, None, maps)
    assert maps == ["A"]
    ratio = (1 - abar) ** 0.5 / abar ** 0.5
    torch.testing.assert_close(z_0, torch.full_like(z_0, 0.2 / abar ** 0.5 - 0.1 * ratio))
    z_0.sum().backward()
    torch.testing.assert_close(eps.grad, torch.full_like(eps, -min(ratio, 1)))
    assert one_step(model, torch.full((1, 4, 2, 2), 90.0), steps, image, None, maps).unique().item() == 4


def test_noise_has_its_share_in_half_precision(golden):
    """In bfloat16 abar_1 is 1, but the share of the noise is 4 %."""
    one, t = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.tensor([1])
    zero = torch.zeros_like(one)
    share = (1 - golden.alphas_cumprod[1]).sqrt().item()
    assert golden.add_noise(zero, one, t).item() == pytest.approx(share, rel=0.01)
    assert golden.predict_z0(zero, one, t).item() == pytest.approx(-share, rel=0.01)


def test_an_edit_may_take_part_in_a_gradient(golden, expected):
    """It is computed in inference mode, whose tensors may not."""
    weight = torch.ones(1, requires_grad=True)
    (golden.edit(expected["edit.image"], ["x"], steps=1) * weight).square().sum().backward()
    assert weight.grad.item() > 0
