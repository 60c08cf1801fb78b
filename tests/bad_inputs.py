"""What can be wrong with files of every kind: the material of campaign.py.

A dict names what is wrong.  Its values are bytes, or a change: a function of the path of a whole file, which it
damages.
"""
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import tarfile

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import toy
from data import TEXTS


# ---- whole files -----------------------------------------------------------------------------------------------------

def encoded(picture, form="PNG", **how):
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


def scene(size=32):
    return Image.effect_noise((size, size - 8), 90).convert("RGB")


def row(**changes):
    """A line of metadata.jsonl."""
    sample = toy.edit("train", 1)
    texts = sample.scene.caption, sample.instruction, sample.edited.caption, sample.reverse_instruction
    return {"image": "0.png", "key": "0"} | dict(zip(TEXTS, texts)) | changes


def tar(members, mode="w", **fields):
    """The bytes of a tar of {name: bytes}; fields: of all of its headers."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, content in fields.items():
                setattr(member, field, content)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write(files):
    """make of {path: bytes, text, or what is written as JSON}."""
    def make(folder):
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            content = content if isinstance(content, (bytes, str)) else json.dumps(content)
            (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return make


# ---- changes ---------------------------------------------------------------------------------------------------------

def content(data):
    """change: other bytes in a file, or data(the old ones)."""
    return lambda path: path.write_bytes(data(path.read_bytes()) if callable(data) else data)


def value(key, new):
    """change: another value under a key of a JSON file."""
    return lambda path: path.write_text(json.dumps(
        json.loads(path.read_text() if path.is_file() else "{}") | {key: new}))


def tensors(change):
    """change: change(tensors, the first name) of a safetensors file."""
    def apply(path):
        state = load_file(path)
        path.unlink()
        change(state, min(state))
        save_file(state, path)
    return apply


def state(change):
    """change: change(the dict) of a run's state.pt."""
    def apply(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return apply


def replaced(make):
    """change: what make(path) makes, instead of what is there."""
    def change(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)
    return change


# ---- what is wrong --------------------------------------------------------------------------------------------------

# What a path may be.
PATHS = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x89\xff\0\x1a garbage \xc3\x28\n" * 99),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "fifo": lambda path: os.mkfifo(path),
    "null": lambda path: path.symlink_to("/dev/null"),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "unreadable": lambda path: (path.write_bytes(b"x"), path.chmod(0)),
    "closed": lambda path: (path.mkdir(), path.chmod(0))}
NAMES = ["", "n" * 300, "two\nlines", "caf\udce9", "../../fixtures/photo.png/x"]
VALUES = ["x", -1, 0, 10 ** 30, math.nan, []]               # under a key of a JSON file
# Values that a model may well have, although they change the edit.
LEGAL = {("norm_eps", "0"), ("layer_norm_eps", "0"), ("steps_offset", "0"), ("beta_start", "0")}
DOCUMENTS = {"cut": content(lambda old: old[:len(old) // 2]), "list": content(b"[]"), "null": content(b"null"),
             "number": content(b"7"), "list of null": content(b"[null]"), "lists": content(b"[[[]]]"),
             "deep": content(b'{"a":' * 100_000), "UTF-16": content(lambda old: b"\xff\xfe" + old),
             "object": content(b"{}"), "object of null": content(b'{"1000": null, "items": null, "a": null}')}
WEIGHTS = {
    "cut": content(lambda old: old[:len(old) // 2]), "cut in the header": content(lambda old: old[:100]),
    "a huge header": content(lambda old: b"\xff" * 7 + b"\x0f" + old[8:]), "a web page": content(b"<html>404</html>"),
    "an LFS pointer": content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "a pickle": content(pickle.dumps({"a": 1})), "a pickle beside": lambda path: path.rename(path.with_suffix(".bin")),
    "other shapes": tensors(lambda state, name: state.update({name: state[name][..., None]})),
    "a tensor less": tensors(lambda state, name: state.pop(name)),
    "a tensor more": tensors(lambda state, name: state.update(more=torch.ones(2))),
    "NaN": tensors(lambda state, name: [tensor.fill_(math.nan) for tensor in state.values()]),
    "int8": tensors(lambda state, name: state.update({key: t.to(torch.int8) for key, t in state.items()})),
    "no tensors": tensors(lambda state, name: state.clear())}
PART = {f"a broken index, {new[:30]!a}": lambda path, new=new: (
    path.unlink(), path.with_name(path.stem + ".safetensors.index.json").write_bytes(new)) for new in (
        b"[]", b"{}", b'{"weight_map": [1]}', b'{"weight_map": {"a": "none.safetensors"}}', b'{"weight_map": {"a": 7}}',
        b'{"weight_map": {"a": "../../../photo.png"}}', b'{"weight_map": {', b"[" * 100_000)}
VOCABULARY = {kind: content(new) for kind, new in {
    "texts": b'{"a": "b"}', "one word": b'{"a": 0}', "large ids": lambda old: json.dumps(
        {word: n + 10 ** 6 for word, n in json.loads(old).items()}).encode()}.items()}


def pictures():
    """{name: bytes} of what is no whole picture, or none that can be read."""
    png, found = encoded(scene()), {}
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        found[f"{form} cut in its header"] = encoded(scene(64), form)[:14]
        if form != "GIF":                                     # its format does not know its length
            found[f"{form} cut in half"] = (lambda whole: whole[:len(whole) // 2])(encoded(scene(64), form))
    return found | {
        "PNG of no pixels": png[:16] + bytes(8) + png[24:], "PNG without pixels": png[:33] + png[-12:],
        "PNG of 2^31 pixels a side": png[:16] + b"\x7f\xff\xff\xff" * 2 + png[24:],
        "PNG with another sum": png[:60] + bytes(9) + png[69:], "too large": encoded(Image.new("1", (9000, 9000))),
        "floating-point TIFF": encoded(Image.new("F", (8, 8)), "TIFF"), "zeros": bytes(4096),
        "web page": b"<!DOCTYPE html><html><body>404</body></html>", "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', "pickle": pickle.dumps({"a": 1})}


def good_pictures():
    """(name, bytes, the size that the edit has to have)"""
    turned, text = Image.Exif(), PngImagePlugin.PngInfo()
    turned[274] = 6
    text.add_text("note", "x" * 2_000_000)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        yield f"mode {mode}", encoded(Image.new(mode, (32, 24))), (32, 24)
    yield "a JPEG by its content, CMYK", encoded(Image.new("CMYK", (32, 24)), "JPEG"), (32, 24)
    yield "on its side", encoded(scene(), "JPEG", exif=turned), (24, 32)
    yield "a broken profile", encoded(scene(), icc_profile=b"broken"), (32, 24)
    yield "broken EXIF", encoded(scene(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), (32, 24)
    yield "two megabytes of text", encoded(scene(), pnginfo=text), (32, 24)
    yield "animated", encoded(scene(), "GIF", save_all=True, append_images=[scene()]), (32, 24)
    yield "one pixel", encoded(Image.new("RGB", (1, 1))), (1, 1)


def lines(needed=()):
    """{name: bytes} of lines of JSONL that cannot be used where the texts `needed` are."""
    found = {text[:20]: text.encode() for text in (
        '{"image": "0.pn', "[]", "null", "7", '"a"', "{} {}", "[" * 100_000, '{"a":' * 100_000, "{'image': '0.png'}",
        '{"seed": ' + "9" * 9999 + "}")}
    found["not UTF-8"] = b'{"image": "0.png", "caption": "caf\xe9"}'
    for key in needed:
        found[f"no {key}"] = json.dumps({k: v for k, v in row().items() if k != key}).encode()
        for new in ("", " \t", 7, None, ["a"], {"a": 1}, "\ud800", "word " * 200_000):
            found[f"{key} {str(new)[:8]!a}"] = json.dumps(row(**{key: new})).encode()
    return found


def archives():
    """{name: bytes} of tars that are damaged, or have nothing to train on."""
    photo, text = encoded(scene()), json.dumps(row()).encode()
    pair = {"0.png": photo, "0.json": text}
    whole, links = tar(pair | {"1.png": photo, "1.json": text}), dict.fromkeys(("0.png", "0.txt"), b"")
    return {"cut in a header": whole[:700], "cut in a file": whole[:1300], "of no member": tar({}), "a picture": photo,
            "a damaged header": whole.replace(b"1.png", b"1.pn\xff"), "zeros": bytes(10240),
            "of a huge file": whole.replace(b"%011o" % len(photo), b"77777777777"), "compressed": tar(pair, "w:gz"),
            "of links": tar(links, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "of hard links": tar(links, type=tarfile.LNKTYPE, linkname="0.txt"),
            "of FIFOs": tar(links, type=tarfile.FIFOTYPE), "of folders": tar(links, type=tarfile.DIRTYPE),
            "of deep JSON": tar({"0.png": photo, "0.json": b"[" * 100_000})}


def states():
    """{name: change} of a run's state.pt."""
    found = {kind: WEIGHTS[kind] for kind in ("cut", "a pickle", "a web page")}
    found |= {"a zip of nothing": content(b"PK\5\6" + bytes(18)), "a list": lambda path: torch.save([1, 2], path),
              "a run without step": state(lambda all: all["run"].pop("step"))}
    for place in (0.3, 0.6, 0.9):
        def flip(old, place=place):
            n = int(place * len(old))
            return old[:n] + bytes([old[n] ^ 64]) + old[n + 1:]
        found[f"a flipped bit at {place}"] = content(flip)
    for key in ("settings", "parts", "run"):
        found[f"no {key}"] = state(lambda all, key=key: all.pop(key))
        for new in ({}, None, 7, {"step": "x"}, {"unet": {}}):
            found[f"{key} {new}"] = state(lambda all, key=key, new=new: all.update({key: new}))
    for key, new in itertools.product(("step", "rows", "losses", "best"), (None, "x", -1, math.nan)):
        found[f"run {key} {new}"] = state(lambda all, key=key, new=new: all["run"].update({key: new}))
    for part in ("unet", "average", "optimizer"):
        found[f"no {part}"] = state(lambda all, part=part: all["parts"].pop(part))
        found[f"{part} of other values"] = state(lambda all, part=part: all["parts"][part].update(
            dict.fromkeys(all["parts"][part], torch.ones(2))))
    return found


# Which files of which fixture a base of campaign.py reads, and what may be wrong with them besides their kind of path.
CONFIGS = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
           "tokenizer/tokenizer_config.json"]
NETWORK, LINE = "diffusion_pytorch_model.safetensors", json.dumps(row()).encode() + b"\n"
PLACES = [
    ("edit", "golden", CONFIGS, DOCUMENTS), ("edit", "golden", [f"unet/{NETWORK}", f"vae/{NETWORK}"], WEIGHTS | PART),
    ("edit", "golden", ["text_encoder/model.safetensors"], WEIGHTS | PART),
    ("edit", "golden", ["tokenizer/vocab.json"], DOCUMENTS | VOCABULARY),
    ("edit", "golden", ["unet", "scheduler", "tokenizer/merges.txt"], {}),
    ("edit", "photo.png", [""], pictures()), ("train", "data", ["0.png"], pictures()),
    ("train", "data", ["metadata.jsonl"], {name: LINE + line for name, line in lines(TEXTS).items()}),
    ("train-with-texts", "lines.jsonl", [""], {name: LINE + line for name, line in lines().items()}),
    ("instructions", "lines.jsonl", [""], {name: LINE + line for name, line in lines(TEXTS[:1]).items()}),
    ("reverse", "lines.jsonl", [""], {name: LINE + line for name, line in lines(TEXTS[:3]).items()}),
    ("pairs", "lines.jsonl", [""], {name: LINE + line for name, line in lines(TEXTS[:3]).items()}),
    ("train-on-a-tar", "shard.tar", [""], archives()), ("tar", "shard.tar", [""], archives()),
    ("train", "toy/clip", ["model.safetensors"], WEIGHTS), ("train", "toy/clip", ["config.json"], DOCUMENTS),
    ("train-on-pairs", "ip2p", ["seeds.json"], DOCUMENTS), ("curve", "ip2p", ["seeds.json", "0000038/prompt.json"],
                                                            DOCUMENTS),
    ("magicbrush", "magicbrush", ["edit_sessions.json", "global_descriptions.json", "local_descriptions.json"],
     DOCUMENTS), ("page", "magicbrush", ["edit_sessions.json", "images/1000/1000-input.png"], {}),
    ("magicbrush", "ours", ["1000/1000_1.png"], pictures()), ("page", "ours", ["1000/1000_1.png"], {}),
    ("tally", "answers.json", [""], DOCUMENTS), ("tally", "survey-key.json", [""], DOCUMENTS),
    ("resume", "run", ["state.pt"], states()), ("more-pairs", "pairs", ["settings.json"], DOCUMENTS),
    ("more-pairs", "pairs", ["0000000/prompt.json"], DOCUMENTS), ("biases", "toypairs", ["0000000/metadata.jsonl"],
                                                                 DOCUMENTS),
    ("instructions", "lm", ["config.json", "tokenizer.json"], DOCUMENTS), ("instructions", "lm", ["model.safetensors"],
                                                                          WEIGHTS)]
# What is well in these places, because it is not there, or nothing is said in it that is read; or transformers says it.
FINE = re.compile(r"lm model.safetensors (a tensor more|int8)|lm tokenizer.json number|"
                  r"metadata.jsonl (cut|empty)|state.pt missing|"
                  r"settings.json missing|(tokenizer|scheduler)_config.json (missing|empty|object)")
