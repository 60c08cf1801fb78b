"""What the commands share: errors of one line, kinds of numbers, the machine, whole files."""
import argparse
import math
import os
import resource
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers.utils import logging

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `COMMAND: error: ...`, with exit status 2."""
    def error(self, message):
        self.exit(2, f"{self.prog.split()[0]}: error: {' '.join(message.split())}\n")


@contextmanager
def errors(parser, args, advice="choose a smaller --batch-size"):
    """What is wrong with files or values ends the command in one line; advice: if memory ends."""
    logging.set_verbosity_error()                     # the commands say themselves what they load
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
    try:
        yield
    except torch.OutOfMemoryError:
        parser.error(f"the memory of {args.device} is too small; {advice}")
    except (ValueError, OSError, SafetensorError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))

def replace_file(path, write):
    """Lets write(temporary path) make a file, and gives it its name only when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:                     # torch.save's, on a full disk
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
    finally:
        temporary.unlink(missing_ok=True)


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

positive_int, seed_int = number(int, 1), number(int, 0, 2 ** 63 - 1)
non_negative_float = number(float, 0)

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
    """Each tensor becomes its mean over the processes of torchrun."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
