"""Kills runs of every resumable command at random, starts them again until they are done, and compares what they leave.

    python tests/kills.py                  # 100 kills over all kinds of runs: about half an hour on one core
    python tests/kills.py --kills 20 --kinds pairs pretrain --seed 1

A run is killed (SIGKILL) after a random time, or at a random one of its changes of files: when it opens a file to
write, renames, makes or removes one.  So half of the kills are inside of a save.  After each, the same command is given
again.  In the end, every file must have the bytes of a run that was never killed (of state.pt: its content), and no
other file may be there.  The status is 0 if all is so.  Not for pytest: it takes too long.
"""
import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from PIL import Image
from transformers import Gemma2Config, Gemma2ForCausalLM

import train
from experiments import published
from prepare import instructions, pairs, pretrain
from test_evaluate import instruct_pix2pix
from test_instructions import make_model, PROMPT
from test_train import TOY, TOY_MODEL, TOY_UNET, folder, other_data, same

TINY = ["--batch-size", "1", "--save-every", "1", "--steps", "3"]


def make_kinds(place):
    """{name: (main of a command, its arguments without --output)}; what they read is made in `place`."""
    photos, shards = folder(place / "photos"), other_data("shards", place / "shards")
    (place / "captions.txt").write_text("a dog\ntwo cats\nan old boat\na red barn\na lake\n")
    for part in make_model(Gemma2Config, Gemma2ForCausalLM):
        part.save_pretrained(place / "language")
    tree = instruct_pix2pix(place / "tree", 40)
    clip = ["--clip", TOY / "clip"]
    return {
        "cycle": (train.main, TINY),
        "ip2p": (train.main, [*TINY, "--objective", "ip2p"]),
        "photos": (train.main, [*TINY, *TOY_MODEL, "--data", photos]),
        "shards": (train.main, [*TINY, *TOY_MODEL, *shards]),
        "accumulate": (train.main, [*TINY, "--objective", "ip2p", *TOY_UNET, "--data", photos, "--accumulate", 2]),
        "bf16": (train.main, [*TINY, "--precision", "bf16", "--train", "cross-attention"]),
        "fp16": (train.main, [*TINY, "--objective", "ip2p", "--precision", "fp16"]),
        "pairs": (pairs.main, ["--edits", 4, "--samples", 3, "--steps", 2, "--thresholds", *[0] * 4]),
        "instructions": (instructions.main, ["--model", place / "language", "--input", place / "captions.txt",
                                             "--edits", 2, "--batch-size", 2]),
        "pretrain": (pretrain.main, ["--clip-steps", 2, "--vae-steps", 2, "--text2image-steps", 2]),
        "published": (published.main, ["curve", tree, "--models", TOY, "--steps", 2, "--cfg-image", 1, 2,
                                       "--batch-size", 1, *clip]),
    }


def make_short():
    """Leaves out what only takes time: pictures, validation, long prompts."""
    torch.set_num_threads(1)
    train.LOG_EVERY = train.AVERAGE_EVERY = 1
    train.draw_cycle = lambda *_: Image.new("RGB", (8, 8))
    train.validate = lambda model, *_: model.unet.conv_out.weight.sum().item()
    pretrain.LATENTS, pretrain.TESTED, pretrain.SAVE_EVERY = 2, 4, 1
    instructions.ROUND, instructions.NEW_TOKENS = 2, 6
    instructions.PROMPT = Path(tempfile.mkdtemp()) / "prompt.txt"
    instructions.PROMPT.write_text(PROMPT)


def watch_changes(place, count, die_at):
    """Counts in the shared array `count` the changes of files below `place`, and kills this process at one of them."""
    def hook(event, given):
        if event == "open":
            is_change = bool(given[2] & (os.O_WRONLY | os.O_RDWR))
        else:
            is_change = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if is_change and str(given[0]).startswith(place):
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def run(main, argv, place, die_after=None, die_at=None):
    """Gives a command in a process of its own -> (its status, negative if it was killed, its changes, its seconds)."""
    count, began = torch.zeros(1, dtype=torch.int64).share_memory_(), time.time()
    child = os.fork()
    if child == 0:
        status = 1
        with open(place.with_name("log.txt"), "w") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                watch_changes(str(place), count, die_at)
                try:
                    main([str(argument) for argument in argv])
                    status = 0
                except SystemExit as stop:
                    status = stop.code
        os._exit(status)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), int(count), time.time() - began
        if die_after and time.time() - began > die_after:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def contents(place):
    """{name: bytes, or what is in a state.pt} of all files, and the names of all folders."""
    found = {}
    for path in place.rglob("*"):
        found[str(path.relative_to(place))] = None if path.is_dir() else path.read_bytes()
        if path.name == "state.pt":
            found[str(path.relative_to(place))] = torch.load(path, weights_only=True)
    return found


def is_mixed(place, old, new):
    """Whether a folder holds some parts of an old model and some of a new one; what is unfinished does not count."""
    now = contents(place)

    def has_of(side, other):
        own = [name for name in side if side[name] is not None and side[name] != other.get(name)]
        return any(now.get(name) == side[name] for name in own)
    return has_of(old, new) and has_of(new, old)


def test_kind(name, main, argv, kills, place, rng):
    """Makes kills of runs of a kind -> the lines that say what was wrong."""
    output = {"instructions": "edits.jsonl"}.get(name, "")
    def given(where):
        return [*argv, "--output", where / output]

    # ---- a run that is never killed
    place.mkdir()
    whole, problems, total, restarts = place / "whole", [], 0, 0
    whole.mkdir()
    status, changes, seconds = run(main, given(whole), whole)
    if status:
        return [f"{name}: it ends with status {status}: {(place / 'log.txt').read_text()[-500:]}"]
    expected, old = contents(whole), {}
    if name == "pretrain":                     # it replaces a model that is there
        old_place = place / "old"
        old_place.mkdir()
        run(main, [*given(old_place), "--seed", 1], old_place)
        old = contents(old_place)

    # ---- those that are
    inside = 0
    while total < kills:
        killed = place / "killed"
        if old:
            shutil.copytree(old_place, killed)
        else:
            killed.mkdir()
        for _ in range(rng.randint(1, 3)):
            how = rng.choice([{"die_after": rng.uniform(0, seconds)}, {"die_at": rng.randint(1, changes)}])
            status, *_ = run(main, given(killed), killed, **how)
            if status >= 0:                    # it ended before
                break
            total, inside = total + 1, inside + ("die_at" in how)
            if old and is_mixed(killed, old, expected):
                problems.append(f"{name}: old and new parts are mixed after {how}")
        if status != 0 or name == "pretrain":
            status, *_ = run(main, given(killed), killed)
            restarts += 1
        if status and not (name == "instructions" and (killed / output).exists()):
            problems.append(f"{name}: status {status} after a kill: {(place / 'log.txt').read_text()[-500:]}")
        found = contents(killed)
        for file in sorted(found.keys() | expected.keys()):
            if file not in found or file not in expected:
                problems.append(f"{name}: {file} is {'missing' if file in expected else 'left behind'}")
            elif not same(found[file], expected[file]):
                problems.append(f"{name}: {file} differs")
        shutil.rmtree(killed)
    print(f"{name}: {total} kills, {inside} of them at a change of files (of {changes} in a run of {seconds:.0f} s), "
          f"{restarts} last starts, {len(problems)} problems", *problems, sep="\n", flush=True)
    return problems


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100, help="at least so many, over all kinds (%(default)s)")
    p.add_argument("--kinds", nargs="+", help="some of them (all)")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = p.parse_args()
    make_short()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as place:
        place, problems = Path(place), []
        kinds = make_kinds(place)
        names = args.kinds or list(kinds)
        for name in names:
            rng = random.Random(f"{args.seed} {name}")
            kills = -(-args.kills // len(names))
            problems += test_kind(name, *kinds[name], kills, place / f"kind-{name}", rng)
    print(f"{len(problems)} problems" if problems else "all ended as if they had not been killed")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
