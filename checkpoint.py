"""Files of models and of runs: finds, checks, loads and saves them.

A model is a directory or an id of the hub, with SD 1.5's unet/, vae/, text_encoder/, tokenizer/ and
scheduler/.  Only safetensors are read.  Errors are a ValueError of one line that names the file.
"""
import json
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from cli import peak_memory, replace_file, sweep, unfinished
from data import parse_json
from pictures import curves, save_png
from unet import SD15, UNet, inflate_conv_in
from vae import SD15_VAE, VAE

NETWORK = "diffusion_pytorch_model"       # the name of the weights of a UNet or VAE
VARIANTS = "", ".fp16"                    # the second one is for repositories without the first

# What unet.py and vae.py are written for.  Keys of a config.json that are not here, nor in SD15 or
# SD15_VAE, nor FREE, must be null, false or 0: they are parts that we do not have.
FIXED_UNET = {
    "act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "downsample_padding": 1, "conv_in_kernel": 3, "conv_out_kernel": 3, "flip_sin_to_cos": True,
    "resnet_out_scale_factor": 1, "resnet_time_scale_shift": "default", "attention_type": "default",
    "time_embedding_type": "positional", "transformer_layers_per_block": 1}
FIXED_VAE = {"act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True,
             "use_post_quant_conv": True}
FIXED_SCHEDULER = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False,
                   "prediction_type": "epsilon", "num_train_timesteps": 1000, "trained_betas": None}
FREE = {"sample_size", "force_upcast", "addition_embed_type_num_heads"}
UNET_BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
VAE_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
# What a model may recommend for its edits, in edit_defaults.json.
DEFAULTS = {"steps": int, "text_guidance": float, "image_guidance": float, "resolution": int}
MODEL_INDEX = {
    "_class_name": "StableDiffusionInstructPix2PixPipeline", "requires_safety_checker": False,
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
    "feature_extractor": [None, None], "image_encoder": [None, None]}


@contextmanager
def about(what):
    """Any error inside becomes a ValueError of one line, which begins with what it is about."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:300]}") from None


# ---- find -------------------------------------------------------------------------------------

def find_model(path_or_id):
    """The directory of a model and the name of its UNet's folder, "unet"; for the directory of a
    UNet inside of a model, that model and its name.  Files of the hub are downloaded once."""
    path, name = Path(path_or_id), str(path_or_id)
    if path.is_dir():
        is_unet = (path / "config.json").is_file() and (path.parent / "vae").is_dir()
        return (path.parent, path.name) if is_unet else (path, "unet")
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"{name} is neither a model directory nor an id of the hub")
    texts = ["tokenizer/*", "scheduler/*.json", "*/config.json", "edit_defaults.json"]
    with about(f"{name} is no local directory, and the hub did not give it"):
        for variant in VARIANTS:
            files = texts + [f"*/*.safetensors.index{variant}.json"]
            for stem in (f"unet/{NETWORK}", f"vae/{NETWORK}", "text_encoder/model"):
                files += [f"{stem}{variant}.safetensors", f"{stem}{variant}-*.safetensors"]
            path = Path(snapshot_download(name, allow_patterns=files))
            if list(path.glob("unet/*.safetensors")):
                break
    return path, "unet"

def read_json(path):
    """The JSON object in a file of a model, as a dict."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {path.parent} is no complete model")
    with about(path):
        return parse_json(path.read_text())

def weight_files(folder, stem):
    """The safetensors files of a part (one, or the shards that an index names), and its variant."""
    for variant in VARIANTS:
        single = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if single.is_file():
            return [single], variant
        if index.is_file():
            with about(f"{index} has no weight_map that names files"):
                shards = sorted(set(read_json(index)["weight_map"].values()))
                return [folder / shard for shard in shards], variant
    for pickle in [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]:
        raise ValueError(f"{pickle} is a pickle, which may run code; if you trust it, convert it "
                         f"with torch.load and safetensors.torch.save_file to {stem}.safetensors")
    raise ValueError(f"{folder} has no {stem}.safetensors")


# ---- check and load ---------------------------------------------------------------------------

def check(config, fixed, numbers):
    """ValueError, which names the key, for a value that is not the fixed one, or no such number."""
    for key, value in fixed.items():
        if (config.get(key, value) or None) != (value or None):   # null, false, 0: "without"
            raise ValueError(f"{key} = {config[key]!r} is not supported, only {value!r}")
    for key, kind in numbers.items():
        if key in config and type(config[key]) not in (int, kind):
            what = "whole number" if kind is int else "number"
            raise ValueError(f"{key} = {config[key]!r} is no {what}")

def check_network(config, defaults, fixed, blocks):
    """The same for a config.json that unet.py or vae.py cannot build."""
    full = defaults | config
    channels, heads = full["block_out_channels"], full.pop("attention_head_dim", 1)
    others = {key for key in config if key[:1] != "_"} - defaults.keys() - blocks.keys() - FREE
    numbers = {key: int for key, value in defaults.items() if type(value) is int}
    check(full, dict.fromkeys(others) | fixed, numbers)
    for key, supported in blocks.items():
        kinds = full.get(key, supported[:1] * len(channels))
        if len(kinds) != len(channels) or not set(kinds) <= set(supported):
            raise ValueError(f"{key} = {kinds}: only {len(channels)} of {supported} are supported")
    heads = heads if isinstance(heads, list) else [heads] * len(channels)
    for width, h in zip(channels, heads, strict=True):
        if type(h) is not int or h < 1 or width % h:
            raise ValueError(f"attention_head_dim: {width} channels do not divide into {h!r} heads")

def load(path_or_id, device, dtype):
    """The arguments of EditModel: frozen networks on a device, a tokenizer and two configs."""
    path, unet_name = find_model(path_or_id)
    unet = load_network(UNet, path / unet_name, SD15, FIXED_UNET, UNET_BLOCKS, inflate_conv_in)
    vae = load_network(VAE, path / "vae", SD15_VAE, FIXED_VAE, VAE_BLOCKS, modern_names)
    folder = path / "text_encoder"
    variant = weight_files(folder, "model")[1].removeprefix(".") or None
    read_json(folder / "config.json")
    text_encoder, tokenizer = load_clip_part(CLIPTextModel, "text encoder", folder,
                                             path / "tokenizer", dtype, variant)
    width, wanted = text_encoder.config.hidden_size, unet.config["cross_attention_dim"]
    if width != wanted:
        raise ValueError(f"{path}: the text encoder's width is {width}, the UNet takes {wanted}")
    scheduler = read_json(path / "scheduler/scheduler_config.json")
    with about(path / "scheduler/scheduler_config.json"):
        numbers = {"beta_start": float, "beta_end": float, "steps_offset": int}
        check(scheduler, FIXED_SCHEDULER, numbers)
    file = path / "edit_defaults.json"
    defaults = read_json(file) if file.is_file() else {}
    with about(f"{file}: a model may recommend {', '.join(DEFAULTS)}"):
        check(defaults, dict.fromkeys(defaults.keys() - DEFAULTS.keys()), DEFAULTS)
    for module in (unet, vae, text_encoder):              # convolutions are faster channels_last
        module.to(device, dtype, memory_format=torch.channels_last).requires_grad_(False).eval()
    return unet, vae, text_encoder, tokenizer, scheduler, defaults

def load_network(network, folder, defaults, fixed, blocks, adapt):
    """network(config) with the weights of its folder, strictly, after adapt(config, state dict)."""
    state, config = {}, read_json(folder / "config.json")
    for file in weight_files(folder, NETWORK)[0]:
        with about(f"{file} cannot be read"):
            state |= load_file(file)
    with about(folder / "config.json"), torch.device("meta"):     # no memory for weights yet
        check_network(config, defaults, fixed, blocks)
        config, state = adapt(config, state)
        module = network(config)
    with about(f"{folder}: the weights do not fit config.json"):
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

def load_clip_part(network, what, path, tokenizer_path, dtype, variant=None):
    """A network of transformers, of which no weight is missing, and a tokenizer."""
    with about(f"{path}: weights and config.json make no whole {what}"):
        module, report = network.from_pretrained(
            path, variant=variant, use_safetensors=True, dtype=dtype, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"it lacks {min(report['missing_keys'])}")
    with about(f"{tokenizer_path}: the tokenizer is missing or damaged"):
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_path)
        if len(tokenizer) <= 2:                 # transformers makes an empty one without its files
            raise ValueError("vocab.json has no words")
    return module, tokenizer

def load_clip(path_or_id, device):
    """The arguments of ClipScorer: a CLIP in the hub's layout, and its tokenizer."""
    clip, tokenizer = load_clip_part(CLIPModel, "CLIP", path_or_id, path_or_id, torch.float32)
    return clip.to(device), tokenizer


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
            torch.save(state, stream)                 # a zip archive, as torch writes it
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
    file, state = folder / "state.pt", {"run": {}}
    if file.exists():
        with about(f"{file} is damaged, or not of this program; remove it to start again"):
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
