"""Writes the texts of edits (table 1 of the paper) for captions, with a local language model; the paper's is a Gemma 2.

    python instructions.py --input captions.txt --output edits.jsonl                               # a caption a line
    python instructions.py --input photos/captions.jsonl --edits 4 --output photos/metadata.jsonl  # "image" is kept
    python instructions.py --input 'cc3m/{00000..00331}.tar' --output cc3m.jsonl                   # with "key": img2dataset
    python instructions.py --input ip2p.jsonl --reverse-only --output reversed.jsonl               # edits without a reverse

The prompt is docs/instructions_prompt.txt: the task, and examples, which also say what kinds of edit there are.  Every
answer is checked; after four bad ones the edit goes to OUTPUT.rejects with the last answer and the reason.  OUTPUT.part
holds what is done until all is: the same command goes on from there.  Only safetensors are read, and no model's code is run.
"""
import argparse
import json
import random
import re
import tarfile
import zlib
from collections import Counter
from itertools import count, groupby, islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import Parser, device, non_negative_float, positive_int, quiet_transformers, replace_file, seed_int
from data import LARGEST, NAMES, TEXTS, expand, key_and_kind, parse_json

PROMPT = Path(__file__).resolve().parent / "docs/instructions_prompt.txt"
TRIES, RETRY_TEMPERATURE = 4, .7                              # greedy decoding would only repeat a rejected answer
ROUND = 8                                                     # batches that are kept together, to ask again in batches
NEW_TOKENS = 256                                              # three texts of the length that CLIP reads

# CLIP reads 75 tokens.  Its tokenizer would be a download; its vocabulary has most English words whole, so 50 words and
# punctuation marks leave half as many again for those that it splits
LONGEST = 50
MARKUP = re.compile(r"[`*<>{}\[\]()|\\#_%\ud800-\udfff]|^\W|^\d+[.)]|^(\w+ )?(instruction|caption|answer|edit|reverse)s?:",
                    re.IGNORECASE)                            # \ud800-\udfff: half of a character
REMOVAL = re.compile(r"(remove|delete|erase|eliminate|clear|get rid|take\b.*\b(off|away|out))\b", re.IGNORECASE)
EARLIER = set("""back undo undone unedited revert restore restored return reset recover again before earlier was were
    original originally previous previously former formerly initial initially anymore""".split())
# words that a caption need not say for a reverse instruction to use them
GENERIC = set("""a an the this that these those it its he him his she her they them their one some and or of to in on at
    by for from with into onto out off up away rid as is are be s look like color colour image picture scene background
    style""".split())


# ---- captions ------------------------------------------------------------------------------------------------------------

def find_files(patterns):
    """The paths of --input: names, patterns like cc3m/*.tar, ranges like cc3m/{00000..00331}.tar."""
    paths = [Path(path) for pattern in patterns for path in expand(pattern)]
    for path in paths:
        if path.suffix not in (".txt", ".jsonl", ".tar") or not path.is_file():
            raise ValueError(f"--input {path}: there is no such .txt, .jsonl or .tar file")
    return paths


def read_rows(path):
    """What a file says, image by image, as dicts: a line of text, an object of JSON, KEY.txt or KEY.json of a shard."""
    if path.suffix == ".tar":
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if member.isfile())
            for key, members in groupby(files, lambda member: key_and_kind(member.name)[0]):
                texts = {kind: tar.extractfile(m).read(LARGEST) for m in members
                         if (kind := key_and_kind(m.name)[1]) in ("txt", "json")}
                caption = texts["txt"].decode() if "txt" in texts else parse_json(texts.get("json", "{}")).get("caption")
                yield {"key": key, "caption": caption}
    else:
        with open(path, "rb") as file:
            for line in file:
                yield {"caption": line.decode()} if path.suffix == ".txt" else parse_json(line)


def read_captions(paths, given):
    """The rows of all files, with the `given` texts under our names and on one line.  A sample of a shard or a line of
    text without caption is passed over, as the web has such; any other text that is not there is a ValueError."""
    for path in paths:
        rows = read_rows(path)
        for number in count(1):
            try:
                if (row := next(rows, None)) is None:
                    break
                for field in given:
                    names = NAMES[field][::-1]
                    name = next((n for n in names if isinstance(row.get(n), str) and row[n].strip()), None)
                    if name is None and (path.suffix == ".jsonl" or field != "caption"):
                        raise ValueError(f"no text for {' or '.join(names)}")
                    row[field] = name and " ".join(row.pop(name).split())
            except (ValueError, tarfile.TarError) as error:
                raise ValueError(f"{path}, entry {number}: {error}") from None
            if row["caption"]:
                yield row


# ---- answers and their checks --------------------------------------------------------------------------------------------

def words(text):
    return re.findall(r"\w+", text.lower())


def stems(text):
    """How often each word that names something occurs, without its ending: {"mak": 1, "snow": 1} for "make it snowy"."""
    endings = r"((?<=\w{3})(ies|es|s|y|ing|ed|e)|(?<=\w{4})en)$"                          # but grey is not green
    stripped = [re.sub(endings, "", word) for word in words(text) if word not in GENERIC]
    return Counter(re.sub(r"(.)\1$", r"\1", word) for word in stripped)                   # sunny, sun; dresses, dress


def names_change(instruction, before, after):
    """Whether an instruction names what it brings, a word that `after` has more often than `before`, or if it removes,
    a word that `before` has more often."""
    gone, come = stems(before) - stems(after), stems(after) - stems(before)
    return bool(stems(instruction) & (gone if REMOVAL.match(instruction) else come))


def check(edit):
    """Why an edit, a dict of the four TEXTS, is of no use for the cycle, or None.

    The reverse instruction is carried out on the edited image alone.  So it may not speak of the time before, names
    nothing that no other text names, and what it brings is something that the caption has and the edited caption lacks."""
    caption, instruction, edited, reverse = texts = [edit[name] for name in TEXTS]
    if not all(text.strip() and "\n" not in text for text in texts):
        return "a text is empty or has several lines"
    if any(match[0] not in caption for text in texts[1:] for match in MARKUP.finditer(text)):        # CC12M has <PERSON>
        return "markup is left in a text"
    if any(len(re.findall(r"\w+|[^\w\s]", text)) > LONGEST for text in texts):
        return "a text is longer than CLIP reads"
    if words(caption) == words(edited):
        return "the captions are alike"
    if words(instruction) == words(reverse):
        return "edit and reverse are alike"
    if set(words(reverse)) & EARLIER - set(words(caption)) - set(words(edited)):          # the back seat is no time
        return "the reverse speaks of the time before the edit"
    if set(stems(" ".join(words(reverse)[1:]))) - set(stems(" ".join(texts[:3]))):        # [1:]: it begins with its verb
        return "the reverse names what no other text names"
    if not names_change(reverse, edited, caption):
        return "the reverse does not name what it brings or removes"
    if not names_change(instruction, caption, edited):
        return "the instruction does not name what the captions change"
    return None


def judge(answer, job, wanted):
    """A model's answer -> (None, the edit) if it is good, else (reason, the job with the answer)."""
    try:
        fields = parse_json(answer[max(answer.find("{"), 0):])                            # models like ```json before it
        if set(fields) != set(wanted):
            raise ValueError
        edit = job | {name: text.strip() for name, text in fields.items()}
        reason = check(edit)
    except (ValueError, AttributeError):
        reason = "not one JSON object of the texts asked for"
    return (reason, job | {"reason": reason, "answer": answer}) if reason else (None, edit)


# ---- prompts and the language model --------------------------------------------------------------------------------------

def show(edit, names):
    """The form in which a prompt gives texts and a model answers."""
    return json.dumps({name: edit[name] for name in names}, ensure_ascii=False)


def read_prompt(given, wanted):
    """The prompt file -> (the kinds of edit, the prompt up to the job); a line that begins with { is an example."""
    lines = PROMPT.read_text(encoding="utf-8").splitlines()
    task = "\n".join(line for line in lines if not line.startswith("{")).strip()
    try:
        examples = [parse_json(line) for line in lines if line.startswith("{")]
        shown = [f"Given: {show(example, given)}\nAnswer: {show(example, wanted)}\n\n" for example in examples]
        return list(dict.fromkeys(example["kind"] for example in examples)), f"{task}\n\n{''.join(shown)}"
    except (ValueError, KeyError) as error:
        raise ValueError(f"{PROMPT}: an example is broken: {error}") from None


def load(path_or_id, device):
    """(model, tokenizer) of any causal language model in the hub's layout."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, padding_side="left", trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            path_or_id, dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True)
    except Exception as error:                                # transformers raises many kinds, and says what is wrong
        raise ValueError(f"--model {path_or_id} cannot be loaded: {str(error)[:300]}") from None
    if "}" not in tokenizer.get_vocab():                      # transformers makes an empty one where its files are missing
        raise ValueError(f"--model {path_or_id} has no tokenizer")
    if report["missing_keys"]:
        raise ValueError(f"--model {path_or_id} lacks weights: {min(report['missing_keys'])}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def generate(model, tokenizer, prompts, temperature):
    """What the model answers to each of B prompts, up to the end of a JSON object."""
    if tokenizer.chat_template:                               # one turn of the user: Gemma 2 knows no system role
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True,
                                               return_tensors="pt")
    else:
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = model.generate(**inputs.to(model.device), **sampling, max_new_tokens=NEW_TOKENS, stop_strings=["}"],
                            tokenizer=tokenizer)
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)


# ---- the command ---------------------------------------------------------------------------------------------------------

def resume(part, header, size, total):
    """The number of edits that `part` holds, cut after its last whole round, as only a round can be repeated."""
    if not part.exists():
        replace_file(part, lambda path: path.write_text(header, encoding="utf-8"))
    with open(part, "r+b") as file:
        if (begun := file.readline().decode()) != header:
            raise ValueError(f"{part} was begun by another command: {begun.strip()}; give that one, or remove the file")
        done, end = 0, file.tell()
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and (number % size == 0 or number == total):
                done, end = number, file.tell()
        file.truncate(end)
    return done


def run(args):
    given, wanted = (TEXTS[:3], TEXTS[3:]) if args.reverse_only else (("caption", "kind"), TEXTS[1:])
    paths, (kinds, prompt) = find_files(args.input), read_prompt(given, wanted)
    part, rejects = (args.output.with_name(args.output.name + end) for end in (".part", ".rejects"))
    if args.output.exists() and not part.exists():
        raise ValueError(f"--output {args.output} exists already; choose another name, or remove it")
    if not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no such folder")
    if args.edits > len(kinds):
        raise ValueError(f"--edits {args.edits}: {PROMPT} shows only {len(kinds)} kinds of edit, {', '.join(kinds)}")

    def jobs():
        for n, row in enumerate(read_captions(paths, TEXTS[:3] if args.reverse_only else TEXTS[:1])):
            chosen = random.Random(f"{args.seed} {n}").sample(kinds, args.edits)
            yield from [row] if args.reverse_only else [row | {"kind": kind} for kind in chosen]
    total = sum(1 for _ in jobs())                            # reads all input, so that bad input is found before any work
    if not total:
        raise ValueError("--input holds no caption")
    model, tokenizer = load(args.model, args.device)
    longest = getattr(model.config, "max_position_embeddings", float("inf"))
    if len(tokenizer(prompt).input_ids) + 2 * NEW_TOKENS > longest:
        raise ValueError(f"--model {args.model} reads {longest} tokens, too few for {PROMPT}, a caption and an answer")
    settings = {name: str(value) for name, value in vars(args).items() if name != "output"}
    settings |= {"prompt": zlib.crc32(prompt.encode()), "total": total}
    size = ROUND * args.batch_size
    done = resume(part, json.dumps(settings) + "\n", size, total)
    print(", ".join(f"{k} {v}" for k, v in settings.items()) + f", done {done}, dtype {model.dtype}", flush=True)

    work = islice(jobs(), done, None)
    with open(part, "a", encoding="utf-8") as file, tqdm(total=total, initial=done, unit="edit") as progress:
        while batch := list(islice(work, size)):
            results = [("not asked yet", None)] * len(batch)
            for attempt in range(TRIES):
                # a seed for each try of a round, so that a run that was stopped ends as one that was not
                torch.manual_seed(random.Random(f"{args.seed} {done} {attempt}").getrandbits(63))
                temperature = args.temperature or (RETRY_TEMPERATURE if attempt else 0)
                rejected = [i for i, (reason, _) in enumerate(results) if reason]
                for start in range(0, len(rejected), args.batch_size):
                    asked = rejected[start:start + args.batch_size]
                    prompts = [f"{prompt}Given: {show(batch[i], given)}\nAnswer:" for i in asked]
                    for i, answer in zip(asked, generate(model, tokenizer, prompts, temperature)):
                        results[i] = judge(answer, batch[i], wanted)
                        progress.update(results[i][0] is None or attempt == TRIES - 1)
            file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            file.flush()
            done += len(batch)

    with open(part, encoding="utf-8") as file:
        results = [json.loads(line) for line in islice(file, 1, None)]
    for path, rejected in ((rejects, True), (args.output, False)):
        kept = [json.dumps(edit, ensure_ascii=False) + "\n" for reason, edit in results if bool(reason) == rejected]
        replace_file(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))
    part.unlink()
    reasons = Counter(reason for reason, _ in results)
    print(f"{args.output}: {reasons[None]} of {total} edits; the others are in {rejects}")
    for reason, number in reasons.most_common():
        print(f"{number:8} {number / total:6.1%}  {reason or 'accepted'}")


def main(argv=None):
    p = Parser("instructions.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, help="captions: .txt, .jsonl, .tar")
    p.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    p.add_argument("--model", default="google/gemma-2-2b-it", help="directory or hub id of a language model (%(default)s)")
    p.add_argument("--edits", type=positive_int, help="edits of each caption, each of another kind (1)")
    p.add_argument("--reverse-only", action="store_true", help="captions, instructions and edited captions are given")
    p.add_argument("--temperature", type=non_negative_float, default=.7, help="0: always the likeliest word (%(default)s)")
    p.add_argument("--batch-size", type=positive_int, default=16, help="answers at once (%(default)s)")
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    p.add_argument("--seed", type=seed_int, default=0, help="of the kinds and of the sampling (%(default)s)")
    args = p.parse_args(argv)
    if args.edits and args.reverse_only:
        p.error("--edits has no effect on --reverse-only")
    args.edits = args.edits or 1
    quiet_transformers()
    try:
        run(args)
    except torch.OutOfMemoryError:
        p.error(f"the memory of {args.device} is too small; choose a smaller --batch-size")
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
