"""What the commands share: errors of one line, whole files, kinds of numbers, the machine."""
import argparse
import fcntl
import math
import os
import re
import resource
import secrets
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `COMMAND: error: ...`, with exit status 2."""
    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        for flag, text in zip(argv, [*argv[1:], "none"]):
            # As a path, it would be the folder that one is in.
            if not text or re.fullmatch("--[a-z-]+=", flag):
                self.error(f"what follows {flag} is empty")
        return super().parse_args(argv)

    def error(self, message):
        self.end(2, f"error: {message}")

    def end(self, status, message):
        for bar in list(getattr(tqdm, "_instances", ())):         # the line is not that of a bar
            bar.close()
        self.exit(status, f"{self.prog.split()[0]}: {' '.join(message.split())}\n")


@contextmanager
def errors(parser, advice="choose a smaller --batch-size"):
    """What is wrong with files or values ends the command in one line, and so does Ctrl-C.
    advice: what to do if the memory is too small."""
    logging.set_verbosity_error()                     # the commands say themselves what they load
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
    try:
        yield
    except (RuntimeError, MemoryError) as error:      # torch and numpy say it in many ways
        if "out of memory" not in str(error) and "allocate" not in str(error):
            raise
        parser.error(f"the memory is too small; {advice}")
    except (ValueError, OSError, SafetensorError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.end(130, "stopped by Ctrl-C")

@contextmanager
def about(what):
    """Any error inside becomes a ValueError of one line, which begins with what it is about."""
    try:
        yield
    except Exception as error:
        cause = getattr(error, "strerror", None) or error         # without a number and a path
        raise ValueError(f"{what}: {' '.join(str(cause).split())[:300]}") from None


# ---- files ------------------------------------------------------------------------------------

def check_readable(path):
    """ValueError, in one line, if a file cannot be read because it is missing or only a pointer."""
    if not os.path.isfile(path):                      # of a pipe, the end would never come
        raise ValueError(f"{path} is missing, or not a file")
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(f"{path} is only a pointer of git-lfs: run `git lfs pull` beside it")

@contextmanager
def unfinished(path):
    """A temporary path beside `path`, for a new file or folder.  Unless it is renamed, it goes."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        yield temporary
    finally:
        remove(temporary)

def sweep(folder, names=None):
    """Removes what killed processes left unfinished in a folder, of all names or of some."""
    for path in folder.glob(f"*.tmp-{'[0-9a-f]' * 8}"):
        if names is None or path.stem in names:
            remove(path)

def remove(path):
    shutil.rmtree(path, ignore_errors=True)           # a folder
    path.unlink(missing_ok=True)                      # a file

def replace_file(path, write):
    """Lets write(temporary path) make a file, and gives it its name only when it is whole.
    ValueError names the file and the cause."""
    with about(f"{path} cannot be written"), unfinished(path) as temporary:
        write(temporary)
        os.replace(temporary, path)

def check_writable(folder):
    with about(f"cannot write in {folder}"):
        tempfile.TemporaryFile(dir=folder).close()

@contextmanager
def claimed(folder, *inside):
    """Inside, the folder of a run is there, can be written, and is this process's alone.

    inside: names of folders that will be in it.  What is there is not touched, and a new folder
    that stays empty is removed: a command may still be refused."""
    if dist.is_initialized() and dist.get_rank() > 0:
        yield                                         # the first process claims it for all
        return
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    with about(f"--output {folder}: choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for place in (folder, *(folder / name for name in inside)):
            if place.exists():
                check_writable(place)
        try:
            yield
        finally:
            with suppress(OSError):                   # it is not empty
                for place in new:
                    place.rmdir()

@contextmanager
def locked(path):
    """Inside, no other process can lock this file or folder.  A lock ends with its process."""
    descriptor = os.open(path, os.O_RDONLY)
    LOCKS.add(descriptor)
    try:
        with about(f"{path} is in use by another process; wait, or choose another --output"):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        LOCKS.remove(descriptor)
        os.close(descriptor)

# Descriptors.  Forked workers close them: they may outlive a killed process, and keep its locks.
LOCKS = set()
os.register_at_fork(after_in_child=lambda: [os.close(lock) for lock in LOCKS])


# ---- argparse types ---------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """The type of a finite int or float from low to high."""
    name = "a whole number" if kind is int else "a number"
    bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")
    return parse

positive_int = number(int, 1, 10 ** 9)
seed_int = number(int, 0, 2 ** 63 - 1)
non_negative_float = number(float, 0, 1000)

def normal_path(text):
    """The type of a path, which has one spelling when a run goes on: "photos/" is "photos".
    "./toy" stays, as "toy" is the toy world, and so does "./a/b", as "a/b" may be on the hub."""
    start = "./" if text.startswith("./") else ""
    return start + os.path.normpath(text)

def named_float(text):
    """The type of NAME=VALUE, a pair of a name and a float of at least 0."""
    name, _, value = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, non_negative_float(value)

def device(text):
    """The type of a torch device that works here."""
    try:
        torch.ones(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {problem}") from None
    return text


# ---- the machine ------------------------------------------------------------------------------

def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"

def default_precision(where):
    """bf16 only where the GPU computes it: on others (T4, V100, RTX 20xx) torch emulates it."""
    if not where.startswith("cuda"):
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

def autocast(args):
    """Forward passes on --device in --precision."""
    kind = torch.device(args.device).type
    return torch.autocast(kind, DTYPES[args.precision], enabled=args.precision != "fp32")

def peak_memory(where):
    """GiB at the peak so far: of torch on a GPU, of the whole process on a CPU."""
    if where.startswith("cuda"):
        return torch.cuda.max_memory_allocated(where) / 2 ** 30
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def start_processes():
    """Joins the processes of torchrun, each with a GPU of its own.  -> (rank, how many)"""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(timeout=timedelta(hours=2))           # they wait while the first saves
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="ignore")       # the first alone prints
    return dist.get_rank(), dist.get_world_size()

def mean_of_processes(tensors):
    """Each tensor becomes its mean over the processes of torchrun, by one message for all."""
    if dist.is_initialized():
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))
