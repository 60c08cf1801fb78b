"""Writes the texts of edits (table 1 of the paper) for captions, with a local language model.  The paper's is Gemma 2.

    python -m prepare.instructions --input captions.txt --output edits.jsonl                 # a caption a line
    python -m prepare.instructions --input photos/captions.jsonl --edits 4 \\
        --output photos/metadata.jsonl                                # keeps "image", so that the folder is a data set
    python -m prepare.instructions --input 'cc3m/{00000..00331}.tar' --output cc3m.jsonl     # with "key": img2dataset's
    python -m prepare.instructions --input clip-filtered-dataset --reverse-only \\
        --output reversed.jsonl                                       # InstructPix2Pix's edits, which lack a reverse

What is read is kept in memory.  Broken lines and samples are skipped and reported.
The prompt is instructions_prompt.txt, beside this file: the task, and examples, which also say what kinds of edit there
are.  Every answer is checked.  After four bad ones the edit goes to OUTPUT.rejects, with the last answer and the
reason.  OUTPUT.part holds what is done until all is: the same command goes on from there.  Only safetensors are read,
and no code that comes with a model is run.
"""
import argparse
import json
import random
import re
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import (Parser, about, default_device, device, errors, locked, non_negative_float, normal_path, positive_int,
                 replace_file, seed_int, sweep)
from data import NAMES, TEXTS, parse_json, read_edits, read_entries, read_json, text_lines
from shards import InstructPix2Pix, expand, read_headers, read_member

PROMPT = Path(__file__).resolve().parent / "instructions_prompt.txt"
TRIES, RETRY_TEMPERATURE = 4, 0.7         # without sampling, a model would only repeat the answer that was rejected
ROUND = 8                                 # batches that are kept together: so bad answers are asked again in batches
NEW_TOKENS = 256                          # of an answer: three texts of the length that CLIP reads
GIVEN_TOKENS = 256                        # of the texts that a prompt gives, at most

TOO_LONG = f"the given texts have more than {GIVEN_TOKENS} tokens"

# CLIP reads 75 tokens.  Its tokenizer would have to be downloaded.  Its vocabulary has most English words whole, so 50
# words and punctuation marks leave half as many again for the words that it splits.
LONGEST = 50
# The last two codes are the ends of the range of half characters.
MARKUP = re.compile(r"[`*<>{}\[\]()|\\#_%\ud800-\udfff]|^\W|^\d+[.)]"
                    r"|^(\w+ )?(instruction|caption|answer|edit|reverse)s?:", re.IGNORECASE)
REMOVAL = re.compile(r"(remove|delete|erase|eliminate|clear|get rid|take\b.*\b(off|away|out))\b", re.IGNORECASE)
EARLIER = set("""undo undone unedited revert restore restored return reset recover again before earlier was were
    original originally previous previously former formerly initial initially anymore""".split())
# Words that a reverse instruction may use although no caption says them.
GENERIC = set("""a an the this that these those it its he him his her she they them their one some and or of to in on at
    by for from with into onto out off up away rid as is are be s look like color colour image picture scene background
    style""".split())


# ---- captions ------------------------------------------------------------------------------------------------------

def find_files(patterns):
    """The paths of --input: names, patterns like cc3m/*.tar, ranges like cc3m/{00000..00331}.tar."""
    paths = []
    for pattern in patterns:
        paths += [Path(path) for path in expand(pattern)]
    for path in paths:
        is_file = path.suffix in (".txt", ".jsonl", ".tar") and path.is_file()
        if not is_file and not (path / "seeds.json").is_file():
            raise ValueError(f"--input {path}: there is no such .txt, .jsonl or .tar, nor a folder with seeds.json")
    return paths


def read_sample(shard, key, places):
    """The key and the caption of a sample of a shard, from KEY.txt or, if there is none, KEY.json."""
    files = {kind: read_member(shard, *places[kind]) for kind in ("txt", "json") if kind in places}
    if "txt" in files:
        caption = files["txt"].decode("utf-8-sig")
    else:
        caption = parse_json(files.get("json", b"{}")).get("caption")
    return {"key": key, "caption": caption}


def read_line(line):
    return {"caption": line.decode()}


def read_folder(folder):
    """The key and the texts of a directory of InstructPix2Pix."""
    return read_json(folder / "prompt.json") | {"key": folder.name}


def fail(problem):
    raise ValueError(problem)


def read_rows(path):
    """What a file says, image by image, each as a name and a function that reads it, a dict: of a sample of a shard, a
    line of text, an object of JSON, or a directory of InstructPix2Pix."""
    if path.is_dir():
        for folder, *_ in InstructPix2Pix(path, "all", 0, pairs=True).items:
            yield folder, partial(read_folder, folder)
    elif path.suffix == ".tar":
        samples, problem = read_headers(path)
        for key, places in samples.items():
            yield f"{path} {key!r}", partial(read_sample, path, key, places)
        if problem:
            yield path, partial(fail, problem)
    else:
        read = parse_json if path.suffix == ".jsonl" else read_line
        for name, line in text_lines(path):
            yield name, partial(read, line)


def rename(row, given, may_lack):
    """A row in which the `given` texts have our names and are on one line each.  ValueError for a text that is not
    there, unless the row may lack it: then it is None."""
    needed = [name for name in given if name not in may_lack]
    texts, = read_edits(row | {"edits": None}, [{}], needed)
    aliases = {alias for name in given for alias in NAMES[name]}
    renamed = {name: " ".join(texts[name].split()) if name in texts else None for name in given}
    return {name: value for name, value in row.items() if name not in aliases} | renamed


def read_captions(paths, given):
    """The rows of all files, with the `given` texts under our names.  A sample of a shard or a line of text without a
    caption is passed over, as the web has such samples.  Any other text that is missing makes a row a broken one."""
    rows = []
    for path in paths:
        may_lack = ("caption",) if path.suffix == ".tar" else ()
        read = read_entries(read_rows(path), lambda row: rename(row(), given, may_lack))
        rows += [row for _, row in read if row["caption"]]
    return rows


# ---- answers and their checks --------------------------------------------------------------------------------------

def words(text):
    return re.findall(r"\w+", text.lower())


def stems(text):
    """How often each word that names something occurs, without its ending: "make it snowy" -> {"mak": 1, "snow": 1}."""
    endings = r"((?<=\w{3})(ies|es|s|y|ing|ed|e)|(?<=\w{4})en)$"              # but grey is not green
    counts = Counter()
    for word in words(text):
        if word not in GENERIC:
            stem = re.sub(endings, "", word)
            counts[re.sub(r"(.)\1$", r"\1", stem)] += 1                      # sunny, sun; dresses, dress
    return counts


def names_change(instruction, before, after):
    """Whether an instruction names what it brings, a word that `after` has more often than `before`; or if it removes,
    a word that `before` has more often."""
    if REMOVAL.match(instruction):
        changed = stems(before) - stems(after)
    else:
        changed = stems(after) - stems(before)
    return bool(stems(instruction) & changed)


def check(edit):
    """Why an edit, a dict of the four TEXTS, is of no use for the cycle, or None.

    The reverse instruction is carried out on the edited image alone.  So it may not speak of the time before, and it
    names nothing that no other text names.  What it brings is something that the caption has and the edited caption
    lacks.  "back" may stand beside it, as in the paper's examples ("add the car back"), but not instead of it."""
    texts = [edit[name] for name in TEXTS]
    caption, instruction, edited, reverse = texts

    # ---- the form of the texts
    if not all(text.strip() and "\n" not in text for text in texts):
        return "a text is empty or has several lines"
    for text in texts[1:]:
        if any(match[0] not in caption for match in MARKUP.finditer(text)):   # CC12M has <PERSON>
            return "markup is left in a text"
    if any(len(re.findall(r"\w+|[^\w\s]", text)) > LONGEST for text in texts):
        return "a text is longer than CLIP reads"
    if words(caption) == words(edited):
        return "the captions are alike"
    if words(instruction) == words(reverse):
        return "edit and reverse are alike"

    # ---- what they say
    if set(words(reverse)) & EARLIER - set(words(caption)) - set(words(edited)):          # the back seat is no time
        return "the reverse speaks of the time before the edit"
    named = stems(" ".join(words(reverse)[1:]))                               # it begins with its verb
    if set(named) - set(stems(" ".join(texts[:3]))) - {"back"}:
        return "the reverse names what no other text names"
    if not names_change(reverse, edited, caption):
        return "the reverse does not name what it brings or removes"
    if not names_change(instruction, caption, edited):
        return "the instruction does not name what the captions change"
    return None


def judge(answer, job, wanted):
    """A model's answer -> (None, the edit) if it is good, otherwise (the reason, the job with the answer)."""
    start = max(answer.find("{"), 0)                          # models like to write ```json before it
    try:
        texts = parse_json(answer[start:])
        if set(texts) != set(wanted):
            raise ValueError
        edit = job | {name: text.strip() for name, text in texts.items()}
        reason = check(edit)
    except (ValueError, AttributeError):
        reason = "not one JSON object of the texts asked for"
    if reason:
        return reason, job | {"reason": reason, "answer": answer}
    return None, edit


# ---- prompts and the language model --------------------------------------------------------------------------------

def show(edit, names):
    """The form in which a prompt gives texts and a model answers."""
    return json.dumps({name: edit[name] for name in names}, ensure_ascii=False)


def read_prompt(given, wanted):
    """The prompt file -> (the kinds of edit, the prompt up to the job).  A line that begins with { is an example."""
    lines = PROMPT.read_text(encoding="utf-8").splitlines()
    task = "\n".join(line for line in lines if not line.startswith("{")).strip()
    try:
        examples = [parse_json(line) for line in lines if line.startswith("{")]
        shown = [f"Given: {show(example, given)}\nAnswer: {show(example, wanted)}\n\n" for example in examples]
        kinds = list(dict.fromkeys(example["kind"] for example in examples))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{PROMPT}: an example is broken: {error}") from None
    return kinds, f"{task}\n\n{''.join(shown)}"


def load(path_or_id, device):
    """(model, tokenizer) of any causal language model in the hub's layout."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, padding_side="left", trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            path_or_id, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except Exception as error:                # transformers raises many kinds, and says what is wrong
        raise ValueError(f"--model {path_or_id} cannot be loaded: {str(error)[:300]}") from None
    if "}" not in tokenizer.get_vocab():      # transformers makes an empty one where its files are missing
        raise ValueError(f"--model {path_or_id} has no tokenizer")
    if report["missing_keys"]:
        raise ValueError(f"--model {path_or_id} lacks weights: {min(report['missing_keys'])}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def generate(model, tokenizer, prompts, temperature):
    """What the model answers to each of B prompts, up to the end of a JSON object."""
    if tokenizer.chat_template:               # one turn of the user: Gemma 2 knows no system role
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True,
                                               return_tensors="pt")
    else:
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    sampling = {"do_sample": False}
    if temperature > 0.001:                   # below it, numbers of the sampling overflow
        sampling = {"do_sample": True, "temperature": temperature}
    try:
        output = model.generate(**inputs.to(model.device), **sampling, max_new_tokens=NEW_TOKENS, stop_strings=["}"],
                                tokenizer=tokenizer)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ValueError("--model writes no text: its weights are no numbers") from None
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)


# ---- the command ---------------------------------------------------------------------------------------------------

def make_jobs(rows, kinds, args):
    """What is known of each edit that a model shall complete: with --reverse-only all but the reverse instruction,
    otherwise a caption and a kind of edit."""
    for n, row in enumerate(rows):
        if args.reverse_only:
            yield row
        else:
            for kind in random.Random(f"{args.seed} {n}").sample(kinds, args.edits):
                yield row | {"kind": kind}


def resume(part, header, size, total):
    """The number of edits that `part` holds.  It is cut after its last whole round, as only a round can be repeated."""
    with open(part, "r+b") as file:
        begun = file.readline().decode(errors="replace")
        if begun != header and header.startswith(begun):          # it is new, or a kill cut its first line
            file.truncate(0)
            return 0
        if begun != header:
            raise ValueError(f"{part} was begun by another command: {begun.strip()}; give that one, or remove the file")
        done, end = 0, file.tell()
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and (number % size == 0 or number == total):
                done, end = number, file.tell()
        file.truncate(end)
    return done


def ask(model, tokenizer, prompt, jobs, done, args, progress):
    """Asks for the edits of a round, and again for those that are bad -> what `judge` says of each.

    done: the number of edits before this round"""
    given, wanted = fields(args)
    results = [("not asked yet", None)] * len(jobs)
    for i, tokens in enumerate(tokenizer([show(job, given) for job in jobs]).input_ids):
        if len(tokens) > GIVEN_TOKENS:        # it is not asked: it may not fit, and CLIP would not read it whole
            results[i] = (TOO_LONG, jobs[i] | {"reason": TOO_LONG, "answer": ""})
            progress.update()
    for attempt in range(TRIES):
        # A seed for each try of a round: a run that was stopped ends as one that was not.
        torch.manual_seed(random.Random(f"{args.seed} {done} {attempt}").getrandbits(63))
        temperature = args.temperature
        if attempt > 0 and temperature == 0:
            temperature = RETRY_TEMPERATURE
        rejected = [i for i, (reason, _) in enumerate(results) if reason not in (None, TOO_LONG)]
        for start in range(0, len(rejected), args.batch_size):
            asked = rejected[start:start + args.batch_size]
            prompts = [f"{prompt}Given: {show(jobs[i], given)}\nAnswer:" for i in asked]
            for i, answer in zip(asked, generate(model, tokenizer, prompts, temperature)):
                results[i] = judge(answer, jobs[i], wanted)
                if results[i][0] is None or attempt == TRIES - 1:
                    progress.update()
    return results


def fields(args):
    """The names of the texts that a prompt gives, and of those that a model shall write."""
    return (TEXTS[:3], TEXTS[3:]) if args.reverse_only else (("caption", "kind"), TEXTS[1:])


def finish(part, output, rejects, total):
    """Writes the good edits and the rejects of a part file, which is then removed, and prints their numbers."""
    with about(f"{part} is damaged; remove it to start again"), open(part, encoding="utf-8") as file:
        results = [(reason, dict(edit)) for reason, edit in map(json.loads, islice(file, 1, None))]
    for path, is_reject in ((rejects, True), (output, False)):
        kept = [json.dumps(edit, ensure_ascii=False) + "\n" for reason, edit in results if bool(reason) == is_reject]
        replace_file(path, lambda temporary: temporary.write_text("".join(kept), "utf-8", "backslashreplace"))
    part.unlink()
    reasons = Counter(reason for reason, _ in results)
    print(f"{output}: {reasons[None]} of {total} edits; the others are in {rejects}")
    for reason, number in reasons.most_common():
        print(f"{number:8} {number / total:6.1%}  {reason or 'accepted'}")


@contextmanager
def claimed_part(output):
    """Inside, the part file of an output is there, can be written, and is this process's alone.  It is removed if it
    stays empty: the command may still be refused."""
    part = output.with_name(output.name + ".part")
    if output.exists() and not part.exists():
        raise ValueError(f"--output {output} exists already; choose another name, or remove it")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no such folder")
    open(part, "ab").close()
    with locked(part):
        try:
            yield part
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()


def run(args, part):
    # ---- the files and the prompt
    paths, (kinds, prompt) = find_files(args.input), read_prompt(*fields(args))
    rejects = args.output.with_name(args.output.name + ".rejects")
    if args.edits > len(kinds):
        raise ValueError(f"--edits {args.edits}: {PROMPT} shows only {len(kinds)} kinds of edit, {', '.join(kinds)}")
    rows = read_captions(paths, TEXTS[:3] if args.reverse_only else TEXTS[:1])
    total = len(rows) * args.edits
    if not total:
        raise ValueError("--input holds no caption")

    # ---- the model
    model, tokenizer = load(args.model, args.device)
    longest = getattr(model.config, "max_position_embeddings", float("inf"))
    if len(tokenizer(prompt).input_ids) + GIVEN_TOKENS + NEW_TOKENS > longest:
        raise ValueError(f"--model {args.model} reads {longest} tokens, too few for {PROMPT}, a caption and an answer")

    # ---- what is done
    settings = {name: str(value) for name, value in vars(args).items() if name != "output"}
    settings |= {"prompt": zlib.crc32(prompt.encode()), "total": total}
    size = ROUND * args.batch_size
    header = json.dumps(settings) + "\n"
    done = resume(part, header, size, total)
    sweep(part.parent, {args.output.name, rejects.name})
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{said}, done {done}, dtype {model.dtype}", flush=True)

    # ---- what is not
    jobs = islice(make_jobs(rows, kinds, args), done, None)
    with tqdm(total=total, initial=done, unit="edit") as progress:
        for batch in iter(lambda: list(islice(jobs, size)), []):
            results = ask(model, tokenizer, prompt, batch, done, args, progress)
            # A lone half character in a field that is kept, as in a URL, is written as JSON writes it: \ud800.
            with about(f"{part} cannot be written"), open(part, "a", 1, "utf-8", "backslashreplace") as file:
                if file.tell() == 0:
                    file.write(header)
                file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            done += len(batch)
    finish(part, args.output, rejects, total)


def main(argv=None):
    p = Parser("prepare.instructions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, type=normal_path, help="captions: .txt, .jsonl, .tar")
    p.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    p.add_argument("--model", default="google/gemma-2-2b-it", type=normal_path,
                   help="directory or hub id of a language model (%(default)s)")
    p.add_argument("--edits", type=positive_int, help="edits of each caption, each of another kind (1)")
    p.add_argument("--reverse-only", action="store_true",
                   help="captions, instructions and edited captions are given")
    p.add_argument("--temperature", type=non_negative_float, default=0.7,
                   help="0: always the likeliest word (%(default)s)")
    p.add_argument("--batch-size", type=positive_int, default=16, help="answers at once (%(default)s)")
    p.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    p.add_argument("--seed", type=seed_int, default=0, help="of the kinds and of the sampling (%(default)s)")
    args = p.parse_args(argv)
    if args.edits and args.reverse_only:
        p.error("--edits has no effect on --reverse-only")
    args.edits = args.edits or 1
    with errors(p), claimed_part(args.output) as part:
        run(args, part)


if __name__ == "__main__":
    main()
