"""A campaign of bad inputs over all commands: each must be refused in one line, and leave everything as it was.

    python tests/campaign.py [--only PATTERN]                     # of the names of inputs, as '^edit.*png'

Most inputs follow from rules: values of every option that a parser has, paths of every kind in every place of a path,
and in every file that is read, what bad_inputs.py lists.  Some odd inputs are good, and have to work.

Torch and the commands are imported once.  Each input is tried in a forked process, in a folder of its own, with a time
limit.  What is found is listed with its command and kept with its folder, and the exit status is 1:

    traceback      also a crash, and a refusal that is not told in one line (message), or not in plain words (unclear)
    silent         exit status 0, although the input is bad or the result is wrong
    hang           more than SECONDS
    half-written   a refusal that leaves behind, changes or removes anything
    refused        an input that has to work
"""
import argparse
import collections
import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

if __name__ == "__main__":                                    # before the imports that read it
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import cli
import edit
import train
from bad_inputs import (CONFIGS, FINE, LEGAL, NAMES, PATHS, PLACES, VALUES, content, encoded, good_pictures, replaced,
                        row, scene, tar, value, write)
from experiments import benchmark, claims, evaluate, published, survey
from experiments.published import read_magicbrush
from prepare import instructions, pairs, pretrain
from test_evaluate import answers, instruct_pix2pix, magicbrush
from test_instructions import PROMPT, make_model

COMMANDS = {"edit.py": edit, "train.py": train, "prepare.instructions": instructions, "prepare.pairs": pairs,
            "prepare.pretrain": pretrain, "experiments.evaluate": evaluate, "experiments.claims": claims,
            "experiments.published": published, "experiments.survey": survey, "experiments.benchmark": benchmark}
SECONDS, LETTERS, MEMORY = 60, 1000, 4 * 2 ** 30               # at most, for an input; for a message; bytes
# What only a programmer understands.
INTERNAL = re.compile(r"'NoneType' object|KeyError|has no attribute|not subscriptable|unhashable|unexpected keyword|"
                      r"size_t|error: '\w*'$|error: $|not supported between|positional argument")


@dataclass
class Case:
    """An input of a command.

    make(folder) makes its files.  good(folder, fixtures) says what is wrong with the result of an input that has to
    work; with `may`, it may also be refused.  changes: what a refusal may leave behind, as a pattern."""
    name: str
    command: str
    argv: list
    make: object = None
    good: object = None
    may: bool = False
    changes: str = "$^"
    limit: int = None                                         # bytes of a file: a disk that is full


# ---- one case --------------------------------------------------------------------------------------------------------

def in_child(function, folder, log, limit=None):
    """Runs function() in a forked process, inside of a folder -> its exit status, None if it took too long."""
    reader, writer = os.pipe()                                # a pipe is not part of a disk that is full
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            os.chdir(folder)
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writer, 2)
            sys.stdin, sys.stdout = open(os.devnull), open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            if sys.platform == "linux":                       # root, too, has to obey permissions
                ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            function()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    os.set_blocking(reader, False)
    end, errors = time.monotonic() + SECONDS, b""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(reader, 2 ** 16):
                errors += data
        if done or time.monotonic() > end:
            log.write_bytes(errors)
            os.close(reader)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)                # also what it started
            if not done:
                os.waitpid(pid, 0)
            return os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.005)


def run(fixtures, command, *argv):
    """What a forked process does; a language model has little to read and to write."""
    instructions.PROMPT, instructions.NEW_TOKENS = fixtures / "prompt.txt", 6
    COMMANDS[command].main([str(argument) for argument in argv])


def snapshot(folder):
    """{path: what is there} of all that is in a folder."""
    found = {}
    for path in folder.glob("**/*"):
        whole = path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        found[str(path.relative_to(folder))] = (hashlib.md5(path.read_bytes()).hexdigest() if whole
                                                else oct(path.lstat().st_mode))
    return found


def attempt(case, folder, fixtures):
    """-> None if all is right, otherwise (the kind of the finding, what is wrong)."""
    folder.mkdir(parents=True)
    if case.make:
        case.make(folder)
    before, log = snapshot(folder), folder.with_name(folder.name + ".err")
    status = in_child(partial(run, fixtures, case.command, *case.argv), folder, log, case.limit)
    after = snapshot(folder)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    errors = log.read_text(errors="replace").strip().split("\n")
    last = errors[-1].replace(f"{fixtures}/", "").replace(f"{ROOT}/", "")
    if status is None:
        return "hang", f"more than {SECONDS} s; {last}"
    if any("Traceback" in line for line in errors) or status < 0:
        return "traceback", f"{last[:300]} (exit status {status})"
    if status == 0:
        if not case.good:
            said = any(line.startswith("skipped ") for line in errors)        # a part of the input, by its name
            return None if said else ("silent", f"exit status 0; {changed[:6]}")
        problem = case.good(folder, fixtures)
        return ("silent", problem) if isinstance(problem, str) else None
    if case.good and not case.may:
        return "refused", last
    if status != 2 or not last.startswith(f"{case.command}: error: ") or len(last) > LETTERS:
        return "message", f"{last[:LETTERS]} (exit status {status}, {len(last)} letters)"
    if INTERNAL.search(last):
        return "unclear", last
    left = [path for path in changed if not re.fullmatch(case.changes, path)]
    full = [path for path in changed if case.limit and (folder / path).is_file()
            and not re.search(r"\.part$|/unfinished/", path) and (folder / path).stat().st_size == case.limit]
    return left + full and ("half-written", f"{(left + full)[:6]} after: {last}")


# ---- what there is ---------------------------------------------------------------------------------------------------

F = "../../fixtures/"                                         # from the folder of a case
CLIP, LINES = F + "toy/clip", json.dumps(row()) + "\n"
TRAIN = ["--model", F + "golden", "--steps", 1, "--batch-size", 1, "--resolution", 16]
TINY = ["--models", F + "golden", "--steps", 1, "--resolution", 16, "--clip", CLIP]
INSTRUCTIONS = ["prepare.instructions", "--model", F + "lm"]
PAIRS = ["prepare.pairs", "--input", F + "lines.jsonl", "--model", F + "toy/text2image", "--clip", CLIP, "--samples", 1,
         "--steps", 1, "--resolution", 32, "--thresholds", 0, 0, 0, 0]
# A good command of each kind.  Its inputs are fixtures, and its last argument is its output.
BASES = {
    "edit": ["edit.py", "--model", F + "golden", "--input", F + "photo.png", "--edit", "make it snow", "--steps", 2,
             "--resolution", 32, "--output", "out.png"],
    "train": ["train.py", *TRAIN, "--data", F + "data", "--clip", CLIP, "--validation", F + "data", "--output", "run"],
    "train-with-texts": ["train.py", *TRAIN, "--data", F + "data", "--clip", CLIP, "--texts", F + "lines.jsonl",
                         "--output", "run"],
    "train-on-a-tar": ["train.py", *TRAIN, "--data", F + "shard.tar", "--clip", CLIP, "--output", "run"],
    "train-on-pairs": ["train.py", *TRAIN, "--data", F + "ip2p", "--objective", "ip2p", "--output", "run"],
    "resume": ["train.py", *TRAIN, "--data", F + "ip2p", "--objective", "ip2p", "--steps", 2, "--output", F + "run"],
    "instructions": [*INSTRUCTIONS, "--input", F + "lines.jsonl", "--output", "o.jsonl"],
    "text": [*INSTRUCTIONS, "--input", F + "captions.txt", "--output", "o.jsonl"],
    "tar": [*INSTRUCTIONS, "--input", F + "shard.tar", "--output", "o.jsonl"],
    "reverse": [*INSTRUCTIONS, "--reverse-only", "--input", F + "lines.jsonl", "--output", "o.jsonl"],
    "pairs": [*PAIRS, "--edits", 1, "--output", "pairs"],
    "more-pairs": [*PAIRS, "--edits", 2, "--output", F + "pairs"],
    "biases": ["prepare.pairs", "--biases", "--edits", 1, "--output", F + "toypairs"],
    "pretrain": ["prepare.pretrain", "--parts", "vae", "--vae-steps", 1, "--output", "toy"],
    "evaluate": ["experiments.evaluate", "--models", F + "toy", "--clip", CLIP, "--scenes", 7, "--steps", 1,
                 "--picture", "p.png"],
    "claims": ["experiments.claims", "--seeds", 0, "--output", "claims"],
    "magicbrush": ["experiments.published", "magicbrush", F + "magicbrush", *TINY, "--dino", F + "dino",
                   "--outputs", F + "ours", "--output", "mb"],
    "curve": ["experiments.published", "curve", F + "ip2p", *TINY, "--cfg-image", 1, "--output", "curve"],
    "page": ["experiments.survey", "page", F + "magicbrush", "--outputs", F + "ours", F + "theirs",
             "--output", "survey.html"],
    "tally": ["experiments.survey", "tally", F + "answers.json", "--key", F + "survey-key.json"],
    "benchmark": ["experiments.benchmark", "--size", "toy", "--budget", 1, "--output", "times.json"],
    "random-model": ["experiments.benchmark", "--size", "toy", "--save", "new"]}
SLOW = {"claims", "benchmark", "pretrain"}                    # their good commands take minutes
# What a good command writes, which is the same where an odd input has no bearing on it.
RESULTS = {"edit": "out.png", "train": "run/model/unet/diffusion_pytorch_model.safetensors"}


def fixtures_in(f):
    """Makes what the bases use in the folder f, from a folder beside those of the cases."""
    shutil.copytree(ROOT / "tests/golden/model", f / "golden")
    shutil.copytree(ROOT / "models/toy", f / "toy")
    scene().save(f / "photo.png")
    photo, text = (f / "photo.png").read_bytes(), json.dumps(row()).encode()
    write({"data/0.png": photo, "data/metadata.jsonl": LINES, "lines.jsonl": LINES,
           "captions.txt": "a dog on a lawn\nan old boat\n", "golden/edit_defaults.json": {"steps": 1},
           "shard.tar": tar({"0.png": photo, "0.txt": b"a circle", "0.json": text})})(f)
    instruct_pix2pix(f / "ip2p")
    sessions = read_magicbrush(magicbrush(f / "magicbrush", (1, 2)))
    for method in ("ours", "theirs"):
        answers(sessions, f / method, lambda session, turn: turn.target)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False).save_pretrained(f / "dino")
    for part in make_model(LlamaConfig, LlamaForCausalLM):
        part.save_pretrained(f / "lm")
    (f / "prompt.txt").write_text(PROMPT)


def results_in(f):
    """Adds what some commands write, for the cases that read it."""
    toy_pairs = ["prepare.pairs", "--edits", 1, "--samples", 1, "--steps", 1,
                 "--thresholds", 0, 0, 0, 0, "--output", "toypairs"]
    for command in (BASES["edit"], BASES["train"], BASES["pairs"], BASES["page"], toy_pairs):
        run(f, *command)
    os.rename("run", f / "reference")
    run(f, *BASES["train-on-pairs"])
    for path in Path.cwd().iterdir():
        path.rename(f / path.name)
    key = json.loads((f / "survey-key.json").read_text())
    picks = {str(n): dict.fromkeys(survey.QUESTIONS, list(item["options"])[:key["pick"]])
             for n, item in enumerate(key["items"])}
    write({"answers.json": {"survey": key["survey"], "person": "a", "answers": picks}})(f)


# ---- how inputs are made ---------------------------------------------------------------------------------------------

def case(base, kind, argv=(), **more):
    command, *rest = BASES[base]
    return Case(f"{base}: {kind}", command, rest + list(argv), **more)


def instead(base, kind, fixture, path, make, **more):
    """The case of a base in which another path, which make(folder) makes, is given instead of a fixture."""
    command, *rest = BASES[base]
    argv = [path if argument == F + fixture else argument for argument in rest]
    return Case(f"{base}: {kind}", command, argv, make, **more)


def at(path, change):
    return lambda folder: change(folder / path)


def damage(fixture, name, change, copy):
    """make of a copy of a fixture, in which change(path) has changed the file or folder `name`."""
    def make(folder):
        source = folder / F / fixture
        if source.is_file():
            shutil.copy(source, folder / copy)
        else:
            shutil.copytree(source, folder / copy, copy_function=os.link)
        file = folder / copy / name
        if file.is_file():                                    # the others stay links
            file.unlink()
            shutil.copy(source / name, file)
        change(file)
    return make


# ---- the cases -------------------------------------------------------------------------------------------------------

def as_if_whole(folder, f):
    """The judge of odd inputs: what has no bearing on the result is good."""
    for file in RESULTS.values():
        if (folder / file).is_file() and result(folder / file) == result(f / file.replace("run/", "reference/")):
            return None
    return "the result is another one than that of the undamaged input, and nothing is said"


def result(path):
    """The pixels of a picture, without the settings in it; the bytes of another file."""
    if path.suffix != ".png":
        return path.read_bytes()
    with Image.open(path) as picture:
        return picture.tobytes()


def has_size(size):
    def good(folder, f):
        with Image.open(folder / "out.png") as picture:
            return None if picture.size == size else f"out.png is of {picture.size}, not {size}"
    return good


def of_files():
    """Each place of a file with each kind of path and of content."""
    for base, fixture, names, changes in PLACES:
        judge = {"good": as_if_whole, "may": True} if base in RESULTS and fixture != "data" else {}
        copy = "copy" + Path(fixture).suffix
        for name in names:
            changes = {kind: content(new) if isinstance(new, bytes) else new for kind, new in changes.items()}
            for kind, change in (changes | {kind: replaced(make) for kind, make in PATHS.items() if name}).items():
                if not FINE.search(f"{fixture} {name} {kind}"):
                    yield instead(base, " ".join(filter(None, (fixture, name, kind))), fixture, copy,
                                  damage(fixture, name, change, copy), **judge)
    for file in CONFIGS:
        for key, old in json.loads((ROOT / "tests/golden/model" / file).read_text()).items():
            for new in ["x"] if old in (None, False) else VALUES:
                for new in [new, [new] * len(old)] if isinstance(old, list) else [new]:
                    if (key, str(new)) not in LEGAL:
                        yield instead("edit", f"{file} {key} {str(new)[:9]}", "golden", "copy", damage(
                            "golden", file, value(key, new), "copy"), good=as_if_whole, may=True)
    for key, new in [*itertools.product(("steps", "resolution"), (10 ** 6, 1.5, *VALUES, True)),
                     *itertools.product(("text_guidance", "image_guidance"), ("x", -1, 1e308, math.nan, None, [])),
                     ("more", 1)]:
        for base in ("edit", "train"):
            yield instead(base, f"edit_defaults.json {key} {str(new)[:9]}", "golden", "copy",
                          damage("golden", "edit_defaults.json", value(key, new), "copy"))
    for file, key in (("survey-key.json", "survey"), ("survey-key.json", "pick"), ("survey-key.json", "items"),
                      ("answers.json", "survey"), ("answers.json", "answers")):
        for new in [*VALUES, None, {}, [None], [{"options": []}], {"0": {"instruction": [[]]}}]:
            yield instead("tally", f"{file} {key} {str(new)[:20]}", file, "copy.json",
                          damage(file, "", value(key, new), "copy.json"))
    yield instead("edit", "a text encoder of fewer layers than its file", "golden", "copy", damage(
        "golden", "text_encoder/config.json", value("num_hidden_layers", 1), "copy"))


def of_paths():
    """Each input and each output with each kind of path, and each input with what fits other inputs."""
    others = "toy/clip", "lm", "shard.tar", "photo.png", "data", "golden", "toy/text2image", "lines.jsonl"
    fits = {"golden": ("toy/text2image",), "toy/text2image": ("golden",), "toy": ("golden",), "dino": ("toy/clip",),
            "data": ("shard.tar",), "shard.tar": ("data",), "ip2p": ("data",),
            "captions.txt": ("lines.jsonl", "shard.tar")}
    captions = ("instructions", "shard.tar"), ("tar", "lines.jsonl")      # may be in either
    seen = set()
    for base, (command, *argv) in BASES.items():
        for fixture in dict.fromkeys(str(argument)[len(F):] for argument in argv if str(argument).startswith(F)):
            suffix, flag = Path(fixture).suffix, argv[argv.index(F + fixture) - 1]
            if (command, flag, suffix) in seen or flag == "--output":
                continue
            seen.add((command, flag, suffix))
            for kind, make in PATHS.items():
                path = kind + suffix
                yield instead(base, f"{flag} {kind}", fixture, path, at(path, make))
            for name in NAMES:
                yield instead(base, f"{flag} {name[-9:]!a}", fixture, name and name + suffix, None)
            for other in others:
                if (base, other) in captions:
                    continue
                if other != fixture and (other not in fits.get(fixture, ()) or base == "edit"):
                    yield instead(base, f"{flag} is {other}", fixture, F + other, None)
        flag, suffix = argv[-2], Path(str(argv[-1])).suffix
        if (command, suffix) in seen or str(argv[-1]).startswith(F):
            continue
        seen.add((command, suffix))
        for kind in ("loop", "folder") if suffix else ("loop", "empty", "fifo", "null"):
            path, more = kind + suffix, {}
            if kind == "loop" and suffix:                     # a file may be written in the place of the link
                more = {"may": True, "good": lambda folder, f, path=path: (folder / path).is_file() or "no file"}
            yield case(base, f"output {kind}", [flag, path], make=at(path, PATHS[kind]), **more)
        for name in ("", F + "photo.png/out" + suffix, "n" * 300 + suffix, "/proc/none/out" + suffix):
            yield case(base, f"output {name[-18:]!a}", [flag, name])
        yield case(base, "output in a closed folder", [flag, "closed/out" + suffix], make=lambda folder: (
            (folder / "closed").mkdir(), (folder / "closed").chmod(0o555)))


def options(base):
    """The options that a command's parser has."""
    def stop(parser, *args):
        raise StopIteration(parser)
    with mock.patch.object(cli.Parser, "parse_args", stop):
        try:
            COMMANDS[BASES[base][0]].main([])
        except StopIteration as stopped:
            parser = stopped.value
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices[BASES[base][1]]
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


# Commands of values that do not go together, and values that are out of range only for what they are of.
TOGETHER = """
    edit --resolution 15; edit --resolution 2049; edit --steps 1000; edit --reverse a --reverse b; edit --output out.jpg
    edit --output ../../fixtures/photo.png; edit --input ../../fixtures/data; edit --cfg-text 1e300
    train --data toy; train --data =1; train --data toy=x; train --data ../../fixtures/data=nan; train --data a=b=0
    train --weights no=1; train --weights attn; train --weights attn=nan; train --resolution 17
    train --objective ip2p; train --data toy --texts x; train --data x{0..100000000}.tar; train --lr 1e30
    train --data ../../fixtures/data=0; train --resolution 1000000; train --data a.tar.gz; train --data nobody/nothing
    train-on-pairs --weights attn=1; train-on-pairs --warmup 1; train-on-pairs --clip x
    instructions --edits 2 --reverse-only; instructions --edits 99; instructions --input x{0..100000000}.tar
    instructions --input ../../fixtures/photo.png; pairs --biases; pairs --steps 1000
    pairs --resolution 33; pairs --cfg-text 0.5; pairs --thresholds 1 2; pairs --thresholds 1 1 1 nan; pairs --edits 0
    pretrain --parts unet; pretrain --parts text2image; pretrain --seed 8589934592; pretrain --clip-steps 5
    evaluate --steps 1000; evaluate --scales 1; evaluate --scales 1:; evaluate --scales 1:nan; evaluate --picture x.jpg
    evaluate --scales 1e300:1; evaluate --picture a/x.png
    claims --seeds 1 1; claims --seeds 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; claims --seeds 9223372036854775808
    magicbrush --models --outputs; magicbrush --steps 1000; magicbrush --cfg-text 1e300; magicbrush --resolution 15
    magicbrush --outputs ../../fixtures/ip2p
    curve --outputs ../../fixtures/ours; curve --models; curve --steps 1000
    page --outputs ../../fixtures/ours; page --outputs ../../fixtures/ours ../../fixtures/ours; page --output x.txt
    tally ../../fixtures/answers.json; benchmark --save x; benchmark --size big; random-model --budget 2
    resume --seed 1; resume --lr 1e-3; resume --batch-size 2; resume --train cross-attention; resume --accumulate 2
    resume --precision bf16; resume --resolution 32; more-pairs --seed 1; more-pairs --cfg-text 2
"""


def of_options():
    """Each option with values that it cannot have, and TOGETHER."""
    seen = set()
    for base in BASES:
        for action in options(base):
            flag, values = action.option_strings[0], [""]
            if (BASES[base][0], flag) in seen:
                continue
            seen.add((BASES[base][0], flag))
            if action.choices or action.type is cli.device:
                values = ["", "x", "cuda:99", "meta", "cpu:x", "\udcff"]
            elif action.type not in (None, Path):
                values = ["", "x", "nan", "inf", "-1", "1e999", "9" * 320, "0x10", "\udcff"]
            for value in values if action.nargs != 0 else ():
                yield case(base, f"{flag} {value[:12]!a}", [flag, value])
            yield case(base, f"{flag} without a value", [flag] if action.nargs != 0 else [f"{flag}=1"])
    for base, *argv in map(str.split, filter(None, re.split(r";|\n", TOGETHER.strip()))):
        fixture = BASES[base][-1][len(F):] if base in ("resume", "more-pairs") else None
        if fixture:                                           # it stands in their output
            again = instead(base, f"goes on with {' '.join(argv)}", fixture, "copy",
                            damage(fixture, "", lambda path: None, "copy"))
            again.argv += argv
            yield again
        else:
            yield case(base, " ".join(argv), argv)
    yield Case("edit: --input alone", "edit.py", ["--input", F + "photo.png"])
    yield Case("edit: --reverse alone", "edit.py", ["--reverse", "x"])
    yield Case("edit: the demo with a model that is missing", "edit.py", ["--model", "nowhere"])
    for command in ("prepare.instructions", "experiments.published", "experiments.survey"):
        yield Case(f"{command}: nothing", command, [])


def of_results():
    """What is in the way of a result, and a disk that is full: files end after so many bytes."""
    for name in ("model", "best", "step-000002.png", "state.pt"):
        wrong = replaced(PATHS["folder" if "." in name else "empty"])
        yield instead("resume", f"in the way of {name}", "run", "copy", damage("run", name, wrong, "copy"))
        new = name.replace("2", "1")
        yield case("train", f"in the way of a new {new}", make=lambda folder, new=new, wrong=wrong: (
            (folder / "run").mkdir(), wrong(folder / "run" / new)))
    for kind, text in {"of another command": "{}\n", "garbage": b"\xff\xfe\n", "cut": '{"a'}.items():
        yield case("instructions", f"a part file {kind}", make=write({"o.jsonl.part": text}))
    for base, name in (("instructions", "o.jsonl"), ("page", "survey.html"), ("page", "survey-key.json")):
        yield case(base, f"{name} is there", make=write({name: "x"}))
    kept = {"train": r"run|run/(log\.csv|curves\.png|step-\d+\.png|model|best|(model|best)/[a-z_]+(/[\w.]+)?)",
            "pairs": r"pairs|pairs/settings.json|pairs/\d+(/.*)?", "magicbrush": "mb.*", "curve": "curve.*",
            "instructions": r"o\.jsonl\.(part|rejects)", "random-model": "new", "pretrain": "toy.*"}
    for base, *limits in (("edit", 200), ("train", 200, 5000, 10 ** 5), ("instructions", 200), ("pairs", 200),
                          ("evaluate", 200), ("magicbrush", 200), ("curve", 200), ("page", 200, 5000),
                          ("random-model", 200, 5000, 10 ** 5), ("pretrain", 200)):
        for limit in limits:
            yield case(base, f"a full disk after {limit} bytes", limit=limit, changes=kept.get(base, "$^"))


def good_inputs():
    """What has to work."""
    for base, (*_, output) in BASES.items():
        if base not in SLOW and not str(output).startswith(F):
            yield case(base, "good", good=lambda folder, f, output=output: (
                None if (folder / output).exists() else f"{output} is missing"))
    for name, data, size in good_pictures():
        yield case("edit", f"good picture, {name}", ["--input", "a.jpg"], make=write({"a.jpg": data}),
                   good=has_size(size))
    line, photo = LINES.encode().strip(), encoded(scene())
    for name, form in {"blank lines": b"\n%s\n\n%s\n \n", "byte order mark": b"\xef\xbb\xbf%s\n%s\n",
                       "CRLF": b"%s\r\n%s\r\n", "no last end": b"%s\n%s"}.items():
        yield case("train", f"good lines, {name}", ["--data", "d"], good=lambda folder, f: None,
                   make=write({"d/0.png": photo, "d/metadata.jsonl": form % (line, line)}))
        for base, texts in (("instructions", line), ("text", b"an old boat")):
            file = "d" + Path(BASES[base][-3]).suffix
            yield case(base, f"good lines, {name}", ["--input", file], make=write({file: form % (texts, texts)}),
                       good=lambda folder, f: None if (folder / "o.jsonl").is_file() else "nothing is written")
    mac = tar({"./._0.png": b"x", "./._0.json": b"x", "./0.png": photo, "./0.json": line})
    yield case("train-on-a-tar", "good, names that begin with a dot", ["--data", "a.tar"], make=write({"a.tar": mac}),
               good=lambda folder, f: None)


def cases():
    groups = (good_inputs, of_options, of_paths, of_files, of_results)
    return list({case.name: case for group in groups for case in group()}.values())


# ---- the campaign ----------------------------------------------------------------------------------------------------

def prepare(base, parts):
    """Makes the fixtures in base/fixtures."""
    for folder in ("fixtures", "cases/setup"):
        (base / folder).mkdir(parents=True)
    for make in parts:
        if in_child(partial(make, base / "fixtures"), base / "cases/setup", base / "setup.err") != 0:
            raise RuntimeError((base / "setup.err").read_text())


def remove(folder):
    for path in [folder, *folder.glob("**/")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def try_case(base, number, case):
    """-> (the kind of a finding, what is wrong), or None; then the folder of the case is removed."""
    folder = base / f"cases/{number:04d}"
    finding = attempt(case, folder, base / "fixtures")
    if not finding:
        remove(folder)
    return finding


def campaign(base, chosen, tell=lambda finding: None, parts=(fixtures_in, results_in)):
    """Tries cases in a folder -> the findings: (kind, what is wrong, number, case)."""
    prepare(base, parts)
    before, findings = snapshot(base / "fixtures"), []
    for number, case in enumerate(chosen):
        finding = try_case(base, number, case)
        if finding:
            findings.append((*finding, number, case))
            tell(findings[-1])
    if snapshot(base / "fixtures") != before:
        findings.append(("half-written", "a command changed its inputs", 0, chosen[0]))
    return findings


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="a pattern: inputs whose names have it")
    args = p.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in cases() if re.search(args.only, case.name)]
    base, begun = Path(tempfile.mkdtemp(prefix="campaign-")), time.monotonic()
    print(f"{len(chosen)} inputs, in {base}", flush=True)

    def tell(finding):
        kind, text, number, case = finding
        command = shlex.join([case.command, *map(str, case.argv)])
        print(f"{kind}: {case.name}\n    {text}\n    {number:04d}: {ascii(command)[1:-1][:400]}", flush=True)

    findings = campaign(base, chosen, tell)
    counts = collections.Counter(kind for kind, *_ in findings)
    kinds = ("traceback", "silent", "hang", "half-written", "message", "unclear", "refused")
    print(f"\n{len(chosen)} inputs in {time.monotonic() - begun:.0f} s: "
          + ", ".join(f"{counts[kind]} {kind}" for kind in kinds))
    if not findings:
        remove(base)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
