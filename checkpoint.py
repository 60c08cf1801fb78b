"""Files of models and of runs: finds, checks, loads and saves them.

A model is a directory or an id of the hub, in the layout of SD 1.5 and InstructPix2Pix: unet/,
vae/, text_encoder/, tokenizer/, scheduler/.  Only safetensors are read.  All that is wrong with
the files of a model is a ValueError of one line, which names the file.
"""
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from cli import replace_file
from unet import SD15, UNet, inflate_conv_in
from vae import SD15_VAE, VAE

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model"}
VARIANTS = "", ".fp16"                    # the second one is for repositories without the first

# What a model may recommend for its edits, in edit_defaults.json.
DEFAULTS = {"steps": int, "text_guidance": float, "image_guidance": float, "resolution": int}

# Keys that a config.json may have, but only with these values: others mean another architecture.
FIXED_UNET = {
    "act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "mid_block_only_cross_attention": None, "center_input_sample": False, "downsample_padding": 1,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "dropout": 0, "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "flip_sin_to_cos": True,
    "freq_shift": 0, "time_embedding_type": "positional", "time_embedding_dim": None,
    "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "class_embed_type": None, "num_class_embeds": None, "class_embeddings_concat": False,
    "projection_class_embeddings_input_dim": None, "addition_embed_type": None,
    "addition_time_embed_dim": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
    "num_attention_heads": None, "attention_type": "default", "only_cross_attention": False,
    "dual_cross_attention": False, "cross_attention_norm": None, "upcast_attention": False,
    "use_linear_projection": False,
}
FIXED_VAE = {
    "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "shift_factor": None, "latents_mean": None, "latents_std": None,
}
FIXED_SCHEDULER = {
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "trained_betas": None,
    "rescale_betas_zero_snr": False, "num_train_timesteps": 1000,
}
UNET_BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
VAE_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
MODEL_INDEX = {
    "_class_name": "StableDiffusionInstructPix2PixPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
    "feature_extractor": [None, None], "image_encoder": [None, None],
    "requires_safety_checker": False,
}


@contextmanager
def about(what):
    """An error inside becomes a ValueError of one line, which begins with what it is about.

    transformers, tokenizers and safetensors raise many kinds of errors on damaged files."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:300]}") from None


# ---- find -------------------------------------------------------------------------------------

def find_model(path_or_id):
    """The local directory of a model and the name of its UNet's folder.

    The path itself and "unet"; for the directory of a UNet inside of a model, that model and its
    name; for an id of the hub, where its files are, which are downloaded once."""
    path = Path(path_or_id)
    if path.is_dir():
        is_unet = (path / "config.json").is_file() and (path.parent / "vae").is_dir()
        return (path.parent, path.name) if is_unet else (path, "unet")
    is_id = str(path_or_id).count("/") == 1 and not str(path_or_id).startswith((".", "/"))
    if path.exists() or not is_id:
        raise ValueError(f"{path_or_id} is neither a model directory nor a hub id like "
                         "timbrooks/instruct-pix2pix")
    with about(f"{path_or_id} is no local directory, and the hub did not give it"):
        return download(str(path_or_id)), "unet"


def download(name):
    """The directory with the files of a model of the hub; only those that we read."""
    texts = ["tokenizer/*.json", "tokenizer/*.txt", "scheduler/*.json", "*/config.json",
             "edit_defaults.json"]
    for variant in VARIANTS:
        ends = (f"{variant}.safetensors", f".safetensors.index{variant}.json",
                f"{variant}-*.safetensors")
        weights = [f"{part}/{stem}{end}" for part, stem in PARTS.items() for end in ends]
        path = Path(snapshot_download(name, allow_patterns=texts + weights))
        if list(path.glob("unet/*.safetensors")):
            break
    return path


def read_json(path):
    """The JSON object in a file of a model, as a dict."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {path.parent} is not a complete model in the hub's "
                         "layout")
    with about(f"{path} is not valid JSON"):
        content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def weight_files(folder, stem):
    """The safetensors files of a part (one, or the shards that an index names), and its variant."""
    for variant in VARIANTS:
        single = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if single.is_file():
            return [single], variant
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index} has no weight_map that names files")
            return [folder / str(shard) for shard in sorted(set(shards.values()))], variant
    for pickle in [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]:
        raise ValueError(
            f"{pickle} is a pickle, which may run code when it is loaded; convert it where you "
            f"trust it: safetensors.torch.save_file(torch.load('{pickle.name}', "
            f"weights_only=True), '{stem}.safetensors')")
    raise ValueError(f"{folder} has no {stem}.safetensors")


# ---- check ------------------------------------------------------------------------------------

def check_fixed(config, fixed):
    for key, value in fixed.items():
        if (config.get(key, value) or None) != (value or None):   # null, false, 0 mean "without"
            raise ValueError(f"{key} = {config[key]!r} is not supported, only {value!r}")


def check_network(config, defaults, fixed, blocks):
    """ValueError, which names the key, for a config.json that unet.py or vae.py cannot build."""
    check_fixed(config, fixed)
    full = {**defaults, **config}
    levels = len(full["block_out_channels"])
    for key, default in defaults.items():
        several = key == "attention_head_dim" and isinstance(full[key], list)
        if type(default) is int and type(full[key]) is not int and not several:
            raise ValueError(f"{key} = {full[key]!r} is not supported, only a whole number")
    for key, supported in blocks.items():
        kinds = full.get(key, [supported[0]] * levels)
        if len(kinds) != levels or not set(kinds) <= set(supported):
            raise ValueError(f"{key} = {kinds!r} is not supported, only {levels} (as many as "
                             f"block_out_channels) of {', '.join(supported)}")
    if "attention_head_dim" in full:
        heads = full["attention_head_dim"]
        several = heads if isinstance(heads, list) else [heads] * levels
        if len(several) != levels or any(type(h) is not int or h < 1 for h in several):
            raise ValueError(f"attention_head_dim = {heads!r} is not supported, only one or "
                             f"{levels} whole numbers")
        for width, h in zip(full["block_out_channels"], several):
            if width % h:
                raise ValueError(f"{width} channels do not divide into {h} heads")


def check_scheduler(config):
    check_fixed(config, FIXED_SCHEDULER)
    for key, kind in {"beta_start": float, "beta_end": float, "steps_offset": int}.items():
        if type(config.get(key, 0)) not in (int, kind):
            what = "whole number" if kind is int else "number"
            raise ValueError(f"{key} = {config[key]!r} is no {what}")


def check_defaults(defaults):
    for name, value in defaults.items():
        if name not in DEFAULTS or type(value) not in (int, DEFAULTS[name]):
            raise ValueError(f"{name} = {value!r}: a model may recommend {', '.join(DEFAULTS)}, as "
                             "numbers, the first and the last whole")


# ---- load -------------------------------------------------------------------------------------

def load(path_or_id, device, dtype):
    """The arguments of EditModel: frozen networks on a device, a tokenizer and two configs."""
    path, unet_name = find_model(path_or_id)
    unet, vae = load_unet(path / unet_name), load_vae(path / "vae")
    text_encoder, tokenizer = load_text(path, dtype)
    width = unet.config["cross_attention_dim"]
    if text_encoder.config.hidden_size != width:
        raise ValueError(f"{path}: the text encoder's width is {text_encoder.config.hidden_size}, "
                         f"but the UNet takes {width}")
    scheduler = read_json(path / "scheduler/scheduler_config.json")
    with about(path / "scheduler/scheduler_config.json"):
        check_scheduler(scheduler)
    file, defaults = path / "edit_defaults.json", {}
    if file.is_file():
        defaults = read_json(file)
        with about(file):
            check_defaults(defaults)

    for module in (unet, vae, text_encoder):
        module.to(device, dtype).requires_grad_(False).eval()
    for module in (unet, vae):
        module.to(memory_format=torch.channels_last)      # convolutions are faster in this layout
    return unet, vae, text_encoder, tokenizer, scheduler, defaults


def load_unet(folder):
    config, state = load_state(folder)
    with about(folder / "config.json"):
        check_network(config, SD15, FIXED_UNET, UNET_BLOCKS)
        config, state = inflate_conv_in(config, state)
    return fill(UNet, folder, config, state)


def load_vae(folder):
    config, state = load_state(folder)
    with about(folder / "config.json"):
        check_network(config, SD15_VAE, FIXED_VAE, VAE_BLOCKS)
    return fill(VAE, folder, config, modern_names(state))


def load_state(folder):
    """config.json and the state dict of a network's folder."""
    state, config = {}, read_json(folder / "config.json")
    for file in weight_files(folder, "diffusion_pytorch_model")[0]:
        with about(f"{file} cannot be read"):
            state |= load_file(file)
    return config, state


def fill(network, folder, config, state):
    """network(config) with the weights of its state dict, strictly."""
    with about(folder / "config.json"), torch.device("meta"):     # no memory for weights yet
        module = network(config)
    with about(f"{folder}: the weights do not fit config.json"):
        module.load_state_dict(state, assign=True)
    return module


def modern_names(state):
    """A VAE's state dict; the old names of its attention, query, key, value and proj_attn, become
    today's, and 1x1 convolutions (C, C, 1, 1), which some files have there, matrices (C, C)."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    modern = {}
    for key, tensor in state.items():
        if ".attentions." in key:
            module, name, kind = key.rsplit(".", 2)               # kind: weight or bias
            key = f"{module}.{names.get(name, name)}.{kind}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        modern[key] = tensor
    return modern


def load_text(path, dtype):
    """The text encoder and the tokenizer of a model."""
    folder = path / "text_encoder"
    _, variant = weight_files(folder, "model")
    read_json(folder / "config.json")
    if not any((path / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ValueError(f"{path / 'tokenizer'} has no vocab.json: {path} is not a complete model "
                         "in the hub's layout")
    with about(f"{folder}: the weights of the text encoder do not fit its config.json"):
        text_encoder, report = CLIPTextModel.from_pretrained(
            folder, variant=variant.removeprefix(".") or None, use_safetensors=True, dtype=dtype,
            output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{folder} lacks weights: {min(report['missing_keys'])}")
    with about(f"{path / 'tokenizer'} is damaged"):
        return text_encoder, CLIPTokenizer.from_pretrained(path / "tokenizer")


def load_clip(path_or_id, device):
    """The arguments of ClipScorer: a CLIP in the hub's layout, and its tokenizer."""
    with about(f"{path_or_id} is no whole CLIP"):
        clip, report = CLIPModel.from_pretrained(
            path_or_id, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(path_or_id)
    if report["missing_keys"]:
        raise ValueError(f"{path_or_id} lacks weights: {min(report['missing_keys'])}")
    if len(tokenizer) <= 2:                     # transformers makes an empty one without its files
        raise ValueError(f"{path_or_id} has no tokenizer")
    return clip.to(device), tokenizer


# ---- save -------------------------------------------------------------------------------------

def save(model, path):
    """Writes a model in the hub's layout, each file under a temporary name first."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as temporary:
        new = Path(temporary)
        model.text_encoder.config.save_pretrained(new / "text_encoder")
        state = model.text_encoder.state_dict()
        state = {f"text_model.{name}": weight for name, weight in state.items()}  # all read these
        save_weights(state, new / "text_encoder/model.safetensors")
        model.tokenizer.save_pretrained(new / "tokenizer")
        model.tokenizer.backend_tokenizer.model.save(str(new / "tokenizer"))      # vocab.json
        save_network(model.unet, new / "unet")
        save_network(model.vae, new / "vae")
        write_json(model.scheduler, new / "scheduler/scheduler_config.json")
        write_json(MODEL_INDEX, new / "model_index.json")
        if model.defaults:
            write_json(model.defaults, new / "edit_defaults.json")
        for file in [f for f in new.rglob("*") if f.is_file()]:
            target = path / file.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)


def save_network(module, folder):
    """A UNet or VAE under the names that other libraries read."""
    class_name = "UNet2DConditionModel" if isinstance(module, UNet) else "AutoencoderKL"
    write_json({"_class_name": class_name} | module.config, folder / "config.json")
    save_weights(module.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def save_weights(state, file):
    save_file({name: weight.contiguous() for name, weight in state.items()}, file, {"format": "pt"})


def write_json(content, file):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2))


# ---- a run ------------------------------------------------------------------------------------

def save_run(folder, settings, parts, run):
    """Writes state.pt: the settings of a run, the state of its parts (a dict of what has a
    state_dict), and its numbers (a dict of tensors, lists and numbers)."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state = {"settings": settings, "parts": state, "run": run}
    replace_file(folder / "state.pt", lambda file: torch.save(state, file))


def load_run(folder, settings, parts):
    """What `save_run` has written: the parts get their state, its numbers are returned, {} for a
    new run.  ValueError for a damaged file, or a run that was begun with other settings."""
    file = folder / "state.pt"
    if not file.exists():
        return {}
    with about(f"{file} is damaged; remove it to start again"):
        state = torch.load(file, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        old = state["settings"].get(name)
        if old != value:
            raise ValueError(f"{folder} holds a run with another --{name.replace('_', '-')}, {old}: "
                             "choose another --output, or remove it")
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return state["run"]
