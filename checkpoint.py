"""Finds, checks, loads and saves the files of models and of runs.

A model is a directory or an id of the hub, with SD 1.5's unet/, vae/, text_encoder/, tokenizer/ and
scheduler/.  Only safetensors are read.  Errors are a ValueError of one line that names the file.
"""
import json
import os
import re
import sys
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from cli import about, check_readable, peak_memory, replace_file, sweep, unfinished
from data import read_json
from pictures import curves, save_png
from unet import SD15, UNet, inflate_conv_in
from vae import SD15_VAE, VAE

NETWORK = "diffusion_pytorch_model"       # the name of the weights of a UNet or VAE
WEIGHTS = f"unet/{NETWORK}", f"vae/{NETWORK}", "text_encoder/model"
# How files of weights are named, in full and in fp16: one file, or shards.  In fp16, the names of
# shards depend on the version of diffusers.
VARIANTS = (("{}.safetensors", "{}-*-of-?????.safetensors"),
            ("{}.fp16.safetensors", "{}-*-of-*.fp16.safetensors", "{}.fp16-*-of-*.safetensors"))
MODEL_INDEX = {
    "_class_name": "StableDiffusionInstructPix2PixPipeline", "requires_safety_checker": False,
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
    "feature_extractor": [None, None], "image_encoder": [None, None]}


# ---- what is supported ------------------------------------------------------------------------

# What each key of a config file may be: a whole number in a range, a number in a Real, a value in a
# tuple (null, false and 0 all mean "without"), a list of what [rule] allows, or with None anything.
Real = namedtuple("Real", "low high")
SIZE, COUNT, WITHOUT = range(1, 65537), range(1, 65), (None,)
RULES = {
    # the networks
    "in_channels": (4, 8), "out_channels": (4,), "latent_channels": (4,),
    "block_out_channels": [range(2, 65537, 2)], "layers_per_block": COUNT,
    "down_block_types": [("CrossAttnDownBlock2D", "DownBlock2D", "DownEncoderBlock2D")],
    "up_block_types": [("CrossAttnUpBlock2D", "UpBlock2D", "UpDecoderBlock2D")],
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "mid_block_add_attention": (True,),
    "mid_block_scale_factor": (1,), "resnet_out_scale_factor": (1,), "downsample_padding": (1,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "transformer_layers_per_block": (1,),
    "use_quant_conv": (True,), "use_post_quant_conv": (True,), "flip_sin_to_cos": (True,),
    "act_fn": ("silu",), "attention_type": ("default",), "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",), "norm_eps": Real(0, 1), "layer_norm_eps": Real(0, 1),
    "scaling_factor": Real(1e-6, 1e6), "cross_attention_dim": SIZE, "hidden_size": SIZE,
    "max_position_embeddings": SIZE, "num_hidden_layers": COUNT, "sample_size": None,
    "force_upcast": None, "addition_embed_type_num_heads": None,
    "norm_num_groups": None, "attention_head_dim": None,                  # see check_widths
    # the scheduler, of which the noise schedule counts: the sampler here is always DDIM
    "beta_schedule": ("scaled_linear",), "beta_start": Real(1e-6, 0.5), "beta_end": Real(1e-6, 0.5),
    "trained_betas": WITHOUT, "rescale_betas_zero_snr": WITHOUT, "clip_sample": WITHOUT,
    "thresholding": WITHOUT, "prediction_type": ("epsilon",), "num_train_timesteps": (1000,),
    "steps_offset": range(2),
    # edit_defaults.json, what a model recommends for its edits
    "steps": range(1, 1000), "text_guidance": Real(0, 1000), "image_guidance": Real(0, 1000),
    "resolution": range(16, 2049)}
CLIP_RULES = {
    "num_attention_heads": COUNT, "dtype": ("float32", "float16", "bfloat16"),
    "bos_token_id": range(65537), "eos_token_id": range(65537), "pad_token_id": range(65537)}
DDIM_RULES = {"timestep_spacing": ("leading",), "set_alpha_to_one": WITHOUT}
PIPELINES = tuple(f"StableDiffusion{kind}Pipeline" for kind in ("", "InstructPix2Pix", "Img2Img"))

def allows(rule, value):
    if isinstance(rule, range):
        return type(value) is int and value in rule
    if isinstance(rule, Real):
        return type(value) in (int, float) and rule.low <= value <= rule.high
    if isinstance(rule, list):
        return type(value) is list and len(value) <= 8 and all(allows(rule[0], v) for v in value)
    return rule is None or (value or None) in rule

def check(file, config, rules, others=None):
    """ValueError, which names the file and the key, for a value that its rule does not allow.
    others: the rule of all keys that have none, except those that begin with _."""
    for key, value in config.items():
        rule = rules.get(key, None if key.startswith("_") else others)
        if not allows(rule, value):
            raise ValueError(f"{file}: {key} = {value!r:.60} is not supported, only {rule}, as in "
                             "Stable Diffusion 1.x and InstructPix2Pix")

def check_widths(file, config):
    """The same for widths that do not divide into groups of a norm, or into attention heads."""
    widths = config["block_out_channels"]
    for key in ("norm_num_groups", "attention_head_dim"):
        n = config.get(key, 1)
        n = n if isinstance(n, list) else [n] * len(widths)
        if not allows([SIZE], n) or len(n) != len(widths) or any(w % i for w, i in zip(widths, n)):
            raise ValueError(f"{file}: {key} = {n} does not divide block_out_channels = {widths}")


# ---- find and read ----------------------------------------------------------------------------

def find_model(path_or_id):
    """The directory of a model and the name of its UNet's folder, "unet"; for the directory of a
    UNet inside of a model, that model and its name."""
    path = find(path_or_id, WEIGHTS)
    is_unet = (path / "config.json").is_file() and (path.parent / "vae").is_dir()
    return (path.parent, path.name) if is_unet else (path, "unet")

def find(path_or_id, weights):
    """The directory of a model.  From the hub come, once, its texts and each of `weights` (as
    "FOLDER/NAME"), in full or, if there is nothing else, in fp16; no pickle."""
    path, name = Path(path_or_id), str(path_or_id)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"{name} is neither a model directory nor an id of the hub")
    with about(f"{name} is no local directory, and the hub did not give it"):
        for stem in weights:
            for variant in VARIANTS:
                files = [pattern.format(stem) for pattern in variant]
                path = download(name, ["*.json", "*.txt", *files])
                if any(list(path.glob(file)) for file in files):
                    break
    return path

def download(name, patterns):
    """A directory with files of the hub; offline, with those of them that the cache has."""
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        if not getattr(error, "snapshot_path", None):
            raise
        return Path(error.snapshot_path)          # what it lacks is named when it is read

def weight_files(folder, stem):
    """The safetensors files of a part: one, or all shards."""
    for pattern in sum(VARIANTS, ()):
        files = sorted(folder.glob(pattern.format(stem)))
        if files:
            count = re.search(r"-of-0*(\d+)", files[0].name)
            if count and len(files) != int(count[1]):
                raise ValueError(f"{files[0]}: of such files only {len(files)} are there")
            return files
    raise ValueError(f"{folder}/{stem}.safetensors is missing.  Pickles (.bin, .ckpt, .pt) are not "
                     "read, because they may run code: docs/data.md says how to convert them once")

def read_config(path, others=None, **rules):
    """The JSON object in a file of a model, as a dict whose values RULES and `rules` allow."""
    config = read_json(path)
    check(path, config, RULES | rules, others)
    return config

def read_weights(folder, stem):
    """The state dict of a part, of floats."""
    state = {}
    for file in weight_files(folder, stem):
        check_readable(file)
        with about(f"{file} cannot be read"):
            state |= load_file(file)
    for name, weight in state.items():
        is_float = weight.is_floating_point() or name.endswith("position_ids")    # 0, 1, 2, ..., 76
        if not is_float:
            raise ValueError(f"{folder}: {name} is quantised, {weight.dtype}, not of floats")
    return state


# ---- load -------------------------------------------------------------------------------------

def load(path_or_id, device, dtype):
    """The arguments of EditModel: frozen networks on a device, a tokenizer and two configs."""
    path, unet_name = find_model(path_or_id)
    index, recommended = path / "model_index.json", path / "edit_defaults.json"
    if index.is_file():
        read_config(index, _class_name=PIPELINES)
    unet = load_network(UNet, path / unet_name, SD15, inflate_conv_in)
    vae = load_network(VAE, path / "vae", SD15_VAE, modern_names,
                       in_channels=(3,), out_channels=(3,))
    text_encoder = load_transformer(CLIPTextModel, path / "text_encoder", dtype)
    tokenizer = load_tokenizer(path / "tokenizer", text_encoder.config)
    width, wanted = text_encoder.config.hidden_size, unet.config["cross_attention_dim"]
    if width != wanted:
        raise ValueError(f"{path}: the text encoder's width is {width}, the UNet takes {wanted}")
    scheduler = read_config(path / "scheduler/scheduler_config.json")
    if scheduler.get("_class_name") == "DDIMScheduler":   # the spacing of others is their own
        check(path / "scheduler/scheduler_config.json", scheduler, DDIM_RULES)
    defaults = read_config(recommended, WITHOUT) if recommended.is_file() else {}
    for module in (unet, vae, text_encoder):              # convolutions are faster channels_last
        module.to(device, dtype, memory_format=torch.channels_last).requires_grad_(False).eval()
    return unet, vae, text_encoder, tokenizer, scheduler, defaults

def load_network(network, folder, defaults, adapt, **rules):
    """network(config) with the weights of its folder, strictly, after adapt(config, state dict)."""
    config = read_config(folder / "config.json", WITHOUT, **rules)
    check_widths(folder / "config.json", defaults | config)
    state = read_weights(folder, NETWORK)
    with about(f"{folder}: the weights do not fit config.json"):
        config, state = adapt(config, state)
        with torch.device("meta"):                                # no memory for weights yet
            module = network(config)
        module.load_state_dict(state, assign=True)
    return module

def modern_names(config, state):
    """A VAE's attention by today's names and as matrices; old files have 1x1 convolutions."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for key in [key for key in state if ".attentions." in key]:
        module, name, kind = key.rsplit(".", 2)                   # kind: weight or bias
        tensor = state.pop(key)
        state[f"{module}.{names.get(name, name)}.{kind}"] = tensor.reshape(tensor.shape[:2])
    return config, state

def load_transformer(network, folder, dtype=torch.float32, **options):
    """A network of transformers with the weights of its folder: none is missing, no layer left."""
    config, state = read_config(folder / "config.json"), read_weights(folder, "model")
    text = config.get("text_config", config)                      # of CLIP, or of its text encoder
    if isinstance(text, dict):
        given = {key: value for key, value in text.items() if value is not None}
        check(folder / "config.json", given, RULES | CLIP_RULES)
    with about(f"{folder}: weights and config.json make no whole {network.__name__}"):
        config = network.config_class.from_dict(config)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in network(config, **options).parameters())
        if size > 2 * sum(weight.numel() for weight in state.values()):   # would fill the memory
            raise ValueError(f"config.json describes {size:,} weights, many more than there are")
        module, report = network.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **options)
        layers = {key for key in report["unexpected_keys"] if ".layer" in key}
        for key in sorted(report["missing_keys"] | layers):
            raise ValueError(f"only one of them has {key}")
    return module

def load_tokenizer(folder, encoder):
    """The tokenizer of a text encoder with the config `encoder`, to which its tokens must fit."""
    with about(f"{folder}: the tokenizer is missing, damaged, or not the text encoder's"):
        for file in folder.glob("[!.]*.*"):          # no hidden folder
            check_readable(file)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        ids = tokenizer.get_vocab()               # three without files: transformers makes them up
        longest = tokenizer.model_max_length
        if type(longest) is int:                  # huge, where its files say nothing
            longest = min(longest, encoder.max_position_embeddings)
        fits = len(ids) > 3 and max(ids.values()) < encoder.vocab_size
        if not fits or not allows(SIZE[2:], longest):
            raise ValueError(f"its {len(ids)} tokens reach number {max(ids.values())} of "
                             f"{encoder.vocab_size}, texts have {longest!r} tokens")
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        if len(ids) > 512 + len(merges) + len(tokenizer.get_added_vocab()):   # 512: single bytes
            raise ValueError("merges.txt lacks lines: words would fall into letters")
    tokenizer.model_max_length = longest
    for name in tokenizer.get_added_vocab():
        if f"{name}_1" in ids:
            print(f"{folder}: {name!r} is a textual inversion of several vectors; only those "
                  f"count that a text names, as '{name} {name}_1'", file=sys.stderr)
    return tokenizer

def load_clip(path_or_id, device):
    """The arguments of ClipScorer: a CLIP in the hub's layout, and its tokenizer."""
    folder = find(path_or_id, ["model"])
    clip = load_transformer(CLIPModel, folder)
    return clip.to(device), load_tokenizer(folder, clip.config.text_config)


# ---- save -------------------------------------------------------------------------------------

@contextmanager
def new_files(path):
    """A new folder; its files go to `path` when all are written.  ValueError if one cannot be."""
    with about(f"{path} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with unfinished(path / "new") as new:
            new.mkdir()
            yield new
            for file in new.glob("**/*.*"):
                target = path / file.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)

def save(model, path):
    """Writes a model in the hub's layout."""
    with new_files(Path(path)) as new:
        save_network(model.unet, new / "unet")
        save_network(model.vae, new / "vae")
        model.text_encoder.config.save_pretrained(new / "text_encoder")
        save_weights(model.text_encoder, new / "text_encoder/model.safetensors", "text_model.")
        model.tokenizer.save_pretrained(new / "tokenizer")
        model.tokenizer.backend_tokenizer.model.save(str(new / "tokenizer"))      # vocab.json
        write_json(model.scheduler, new / "scheduler/scheduler_config.json")
        write_json(MODEL_INDEX, new / "model_index.json")
        if model.defaults:
            write_json(model.defaults, new / "edit_defaults.json")

def save_network(module, folder):
    """A UNet or VAE, under the names that other libraries read."""
    class_name = "UNet2DConditionModel" if isinstance(module, UNet) else "AutoencoderKL"
    write_json({"_class_name": class_name} | module.config, folder / "config.json")
    save_weights(module, folder / f"{NETWORK}.safetensors")

def save_weights(module, file, prefix=""):
    state = {prefix + name: weight.contiguous() for name, weight in module.state_dict().items()}
    save_file(state, file, {"format": "pt"})

def write_json(content, file):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2))


# ---- a run ------------------------------------------------------------------------------------

def save_run(folder, settings, parts, run):
    """Writes state.pt: settings and numbers of a run (dicts), and parts that have a state_dict."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state = {"settings": settings, "parts": state, "run": run}

    def write(file):
        with open(file, "wb") as stream:
            try:
                torch.save(state, stream)             # a zip archive, as torch writes it
            except RuntimeError as error:             # which hides that the disk is full
                raise error.__context__ or error
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = seal(archive)
    replace_file(folder / "state.pt", write)

def seal(archive):
    """A checksum of the checksums of all parts of an archive, which tells that we wrote it."""
    names = [(part.filename, part.CRC) for part in archive.infolist()]
    return b"%08x" % zlib.crc32(repr(names).encode())

def save_log(args, run):
    """Adds a row to log.csv and curves.png: the means of run.losses since the last row."""
    images = run.step * args.batch_size * args.accumulate * args.processes
    means = {name: round(sum(x) / len(x), 4) for name, x in run.losses.items()}
    row = {"step": run.step, "images": images} | means
    run.rows, run.losses = run.rows + [row], {}
    if args.rank > 0:                             # the first process of torchrun writes for all
        return
    text = ", ".join(f"{name} {value}" for name, value in row.items())
    tqdm.write(f"{text}, {peak_memory(args.device):.1f} GiB")
    names = list(dict.fromkeys(name for row in run.rows for name in row))
    lines = [names] + [[row.get(name, "") for name in names] for row in run.rows]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    replace_file(args.output / "log.csv", lambda file: file.write_text(text))
    points = {n: [(row["step"], row[n]) for row in run.rows if n in row] for n in names[2:]}
    save_png(curves(points), args.output / "curves.png")

def load_run(folder, settings, parts):
    """Gives the parts what `save_run` wrote -> the numbers; {} for a new run.  ValueError if the
    file is damaged, or the run was begun with other settings.  Then nothing is touched; otherwise
    what a killed run left unfinished goes."""
    file = folder / "state.pt"
    state = {"run": {}}                           # of a new run
    if os.path.lexists(file):                     # also a link that leads nowhere
        with about(f"{file} is damaged, or not of this program; remove it to start again"):
            check_readable(file)
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() or archive.comment != seal(archive):
                    raise ValueError("its checksum is wrong")
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for name, value in settings.items():
            old = state["settings"].get(name)
            if old != value:
                raise ValueError(f"{folder} holds a run with another {name}, {old}, not {value}: "
                                 "choose another --output")
        with about(f"{file} does not fit the model {settings['model']}, which has changed"):
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
    for place in (folder, folder / "model", folder / "best"):
        sweep(place)
    return state["run"]
