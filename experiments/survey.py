"""The paper's user study: a page that shows people edits by several methods, blind, and the count of their answers.

    python -m experiments.survey page MagicBrush/test --outputs uip2p ip2p hive --output survey.html
    python -m experiments.survey tally answers-*.json --key survey-key.json

The page is one file without links: send it, open it, choose, and send back the answers that it saves.  It holds no name
of a method: who made which image is in the key alone, survey-key.json, which stays at home.  The folders of --outputs
are named as in the first lines of published.py, whose `magicbrush` makes them.
"""
import argparse
import base64
import hashlib
import html
import io
import json
import random
from collections import Counter
from math import sqrt
from pathlib import Path

from PIL import Image

from cli import Parser, about, errors, positive_int, seed_int, unfinished
from data import read_json
from experiments.published import read_magicbrush
from pictures import LARGEST, load_image, to_pil

TEMPLATE = Path(__file__).with_name("survey.html")
QUESTIONS = {"instruction": "follows the instruction best",
             "preservation": "keeps best what the instruction does not name"}


# ---- the page --------------------------------------------------------------------------------------------------------

def picture(path, size=None):
    """An image as <img>, at most LARGEST pixels or of `size`.  It is encoded anew: it says nothing of itself."""
    image, file = to_pil(load_image(path)), io.BytesIO()
    if size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    image.save(file, "JPEG", quality=95, subsampling=0)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{content}">', image.size


def make_section(n, turn, options):
    """The HTML of the n-th edit; options: {random name: the folder of a method}."""
    shown, size = picture(turn.input)
    figures = []
    for option in sorted(options):             # an order that says nothing
        output, _ = picture(options[option] / turn.output("single-turn"), size)
        boxes = [f'<label><input type="checkbox" data-question="{question}" value="{option}">{text}</label>'
                 for question, text in QUESTIONS.items()]
        figures.append(f"<figure>{output}{''.join(boxes)}</figure>")
    return (f'<section data-item="{n}"><h2>{html.escape(turn.instruction)}</h2>\n<figure>{shown}the input</figure>\n'
            f'<div class="options">{"".join(figures)}</div></section>')


def make_page(turns, folders, seed):
    """The page of the single turns' outputs in several folders, and its key, a dict.

    Options have random names of their own in each edit; the page shuffles edits and options for each person."""
    rng, items, sections = random.Random(seed), [], []
    for n, turn in enumerate(turns):
        options = {f"{rng.getrandbits(40):010x}": folder for folder in folders}
        sections.append(make_section(n, turn, options))
        items.append({"turn": turn.target.name, "options": {option: str(f) for option, f in options.items()}})
    pick = min(2, len(folders) - 1)            # the paper asks for the best two of six
    survey = hashlib.sha256("".join(sections).encode()).hexdigest()[:16]
    page = TEMPLATE.read_text()
    for name, value in (("SURVEY", survey), ("PICK", str(pick)), ("SECTIONS", "\n".join(sections))):
        page = page.replace("{{" + name + "}}", value)
    return page, {"survey": survey, "pick": pick, "items": items}


def write_page(args):
    key, folders = args.output.with_name(f"{args.output.stem}-key.json"), sorted(set(args.outputs))
    if args.output.suffix != ".html":
        raise ValueError(f"--output {args.output}: give the name of an .html file")
    for path in (args.output, key):
        if path.exists():
            raise ValueError(f"{path} exists already; answers to it would be lost: choose another --output")
    if len(folders) < 2:
        raise ValueError("--outputs: give two folders or more, of different methods")
    turns = sum(read_magicbrush(args.data), [])
    turns = random.Random(args.seed).sample(turns, min(args.edits, len(turns)))
    for folder in args.outputs:
        for turn in turns:
            if not (folder / turn.output("single-turn")).is_file():
                raise ValueError(f"--outputs: {folder / turn.output('single-turn')} is missing")
    page, answers = make_page(turns, folders, args.seed)
    with about(f"{args.output} cannot be written"), unfinished(key) as new_key, unfinished(args.output) as new_page:
        new_key.write_text(json.dumps(answers, indent=1))
        new_page.write_text(page)
        new_key.rename(key)                    # both or none: no answer can be read without the key
        new_page.rename(args.output)
    print(f"seed {args.seed}, {len(turns)} edits by {len(folders)} methods, the best {answers['pick']} are chosen\n"
          f"{args.output}: send this\n{key}: keep this")


# ---- the count -------------------------------------------------------------------------------------------------------

def wilson(chosen, shown, z=1.96):
    """Wilson's 95 % interval of a rate, `chosen` times of `shown`."""
    rate = chosen / shown
    middle = rate + z * z / (2 * shown)
    half = z * sqrt(rate * (1 - rate) / shown + z * z / (4 * shown * shown))
    return (middle - half) / (1 + z * z / shown), (middle + half) / (1 + z * z / shown)


def read_key(path):
    """The key of a survey.  ValueError if it is none, or damaged."""
    key = read_json(path)
    try:
        options = [set(item["options"].values()) for item in key["items"]]
        methods = options[0]
        is_whole = type(key["survey"]) is str and all(other == methods for other in options)
        is_whole = is_whole and key["pick"] in range(1, len(methods) + 1) and all(type(m) is str for m in methods)
    except (AttributeError, IndexError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"--key {path} is no key of a survey, or damaged: edits, options and choices do not fit")
    return key


def chosen_methods(file, answers, key, n, question):
    """The methods that a file of answers chooses in the n-th edit.  ValueError unless they are as many as asked for."""
    options = key["items"][n]["options"]
    try:
        picked = answers["answers"][str(n)][question]
        methods = {options[option] for option in picked}
    except (KeyError, TypeError):
        raise ValueError(f"{file} has no answer, or an unknown one, to question {question!r} of edit {n}") from None
    if len(methods) != key["pick"] or len(picked) != key["pick"]:
        raise ValueError(f"{file}: {len(picked)} options are chosen in edit {n}, not {key['pick']}")
    return methods


def count(key, files):
    """{question: Counter of how often each method was chosen} from a key and files of answers."""
    chosen, people = {question: Counter() for question in QUESTIONS}, set()
    for file in files:
        answers = read_json(file)
        if answers.get("survey") != key["survey"]:
            raise ValueError(f"{file} answers another survey than the key's, {key['survey']}")
        if str(answers.get("person")) in people:
            raise ValueError(f"{file} has the answers of another file once more")
        people.add(str(answers.get("person")))
        for question, counter in chosen.items():
            for n in range(len(key["items"])):
                counter.update(chosen_methods(file, answers, key, n, question))
    return chosen


def tally(args):
    key = read_key(args.key)
    shown = len(args.answers) * len(key["items"])
    methods = sorted(key["items"][0]["options"].values())
    chosen = count(key, args.answers)
    print(f"{len(args.answers)} people, {len(key['items'])} edits, the best {key['pick']} of {len(methods)}; chance is "
          f"{1 / len(methods):.1%}.  Share of all choices, with Wilson's 95 % interval, which takes all answers as "
          f"independent.\n\n| method | {' | '.join(QUESTIONS)} |\n|---|---|---|")
    for method in methods:
        cells = []
        for question in QUESTIONS:
            times = chosen[question][method]
            rates = times / shown, *wilson(times, shown)
            # A method is chosen or not each time it is shown; the shares of all methods together are 1.
            share, low, high = [rate / key["pick"] for rate in rates]
            cells.append(f"{share:.1%} ({low:.1%} to {high:.1%})")
        print(f"| {method} | {' | '.join(cells)} |")
    print("| UIP2P, published (52 people, 15 edits, two of six) | 22% | 20% |\n| IP2P, published | 8% | 12% |")


def main(argv=None):
    main = Parser("experiments.survey", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    p = commands.add_parser("page", help="make the page and its key")
    p.add_argument("data", help="MagicBrush's test")
    p.add_argument("--outputs", nargs="+", type=Path, required=True, help="folders of methods' images")
    p.add_argument("--output", type=Path, default=Path("survey.html"),
                   help="an .html file; its key is beside it (%(default)s)")
    p.add_argument("--edits", type=positive_int, default=15, help="how many, drawn from all turns (%(default)s)")
    p.add_argument("--seed", type=seed_int, default=0, help="of the edits and of the options' names (%(default)s)")
    p.set_defaults(run=write_page)
    p = commands.add_parser("tally", help="count the answers")
    p.add_argument("answers", nargs="+", type=Path, help="the files that the page saved")
    p.add_argument("--key", type=Path, default=Path("survey-key.json"), help="(%(default)s)")
    p.set_defaults(run=tally)
    args = main.parse_args(argv)
    with errors(main):
        args.run(args)


if __name__ == "__main__":
    main()
