"""What the commands share: errors of one line, the types of their numbers, files that are whole or not there."""
import argparse
import json
import math
import os
import resource
import sys

import torch
from transformers.utils import logging

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}           # of --precision


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `COMMAND: error: ...`, without the usage text; exit status 2.  COMMAND is
    the file, also where the first argument names one of its commands."""

    def error(self, message):
        self.exit(2, f"{self.prog.split()[0]}: error: {' '.join(message.split())}\n")


def number(kind, low, high=math.inf):
    """The argparse type of a finite int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'} "
                                             + (f"of at least {low}" if high == math.inf else f"from {low} to {high}"))
        return value
    return parse


positive_int = number(int, 1)
non_negative_float = number(float, 0)
seed_int = number(int, 0, 2 ** 63 - 1)


def device(text):
    """The argparse type of a torch device that works here."""
    try:
        torch.ones(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return text


def peak_memory(where):
    """GiB at the peak so far: what torch had allocated on a GPU, or what the whole process had on a CPU."""
    if where.startswith("cuda"):
        return torch.cuda.max_memory_allocated(where) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def quiet_transformers():
    """No progress bar for the loading of a text encoder, no remark on a text that is too long: the commands say it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def replace_file(path, write):
    """Has write(temporary path) make a file, and gives it its name only when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):                   # torch.save's on a full disk
            raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
        raise


def keep_settings(folder, settings, results):
    """Writes a folder's settings.json; ValueError if there are `results` in it, a glob pattern, that were made with others."""
    file = folder / "settings.json"
    old = json.loads(file.read_text()) if file.is_file() and any(folder.glob(results)) else settings
    if changed := [name for name in settings if old.get(name) != settings[name]]:
        raise ValueError(f"{folder} holds results with another {', '.join(changed)}: choose another --output, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: path.write_text(json.dumps(settings, indent=1)))
