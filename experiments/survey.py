"""The paper's user study: a page that shows people edits by several methods, blind, and the count of their answers.

    python survey.py page MagicBrush/test --outputs uip2p ip2p hive --output survey.html      # and survey-key.json
    python survey.py tally answers-*.json --key survey-key.json

The page is one file without links: send it, open it, choose, and send back the answers that it saves.  It holds no name of
a method: who made which image is in the key alone, which stays at home.  The folders of --outputs are named as in the first
lines of protocols.py; `evaluate.py magicbrush` makes them.
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

from cli import Parser, positive_int, replace_file, seed_int
from data import parse_json
from pictures import LARGEST, load_image, to_pil
from protocols import read_magicbrush

TEMPLATE = Path(__file__).resolve().parent / "docs/survey.html"
QUESTIONS = {"instruction": "follows the instruction best", "preservation": "keeps best what the instruction does not name"}


# ---- the page ------------------------------------------------------------------------------------------------------------

def picture(path, size=None):
    """An image as <img>, at most LARGEST pixels or of `size`, encoded anew: without the file's name or what it says of itself."""
    image, file = to_pil(load_image(path)), io.BytesIO()
    image = image.resize(size, Image.Resampling.LANCZOS) if size else image
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    image.save(file, "JPEG", quality=95, subsampling=0)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">', image.size


def make_page(turns, folders, seed):
    """The page of the single turns' outputs in several folders, and its key: {"survey", "pick", "items": [{"turn", "options"}]}.

    Options have random names of their own in each item; the page shuffles items and options once more for each person."""
    rng, items, sections = random.Random(seed), [], []
    for n, turn in enumerate(turns):
        options = {f"{rng.getrandbits(40):010x}": folder for folder in folders}
        shown, size = picture(turn.input)
        figures = []
        for option in sorted(options):                        # an order that says nothing
            boxes = "".join(f'<label><input type="checkbox" data-question="{question}" value="{option}">{text}</label>'
                            for question, text in QUESTIONS.items())
            figures.append(f"<figure>{picture(options[option] / turn.output('single-turn'), size)[0]}{boxes}</figure>")
        sections.append(f'<section data-item="{n}"><h2>{html.escape(turn.instruction)}</h2>\n<figure>{shown}the input</figure>\n'
                        f'<div class="options">{"".join(figures)}</div></section>')
        items.append({"turn": turn.target.name, "options": {option: str(folder) for option, folder in options.items()}})
    pick, page = min(2, len(folders) - 1), TEMPLATE.read_text()           # the paper asks for the best two of six
    survey = hashlib.sha256("".join(sections).encode()).hexdigest()[:16]
    for name, value in (("SURVEY", survey), ("PICK", str(pick)), ("SECTIONS", "\n".join(sections))):
        page = page.replace("{{" + name + "}}", value)
    return page, {"survey": survey, "pick": pick, "items": items}


def write_page(args):
    key = args.output.with_name(f"{args.output.stem}-key.json")
    if args.output.suffix != ".html":
        raise ValueError(f"--output {args.output}: give the name of an .html file")
    if taken := [path for path in (args.output, key) if path.exists()]:
        raise ValueError(f"{taken[0]} exists already; answers to it would be lost: choose another --output")
    if len(set(args.outputs)) < 2:
        raise ValueError("--outputs: give two folders or more, of different methods")
    turns = [turn for session in read_magicbrush(args.data) for turn in session]
    turns = random.Random(args.seed).sample(turns, min(args.edits, len(turns)))
    for folder in args.outputs:
        for turn in turns:
            if not (folder / turn.output("single-turn")).is_file():
                raise ValueError(f"--outputs: {folder / turn.output('single-turn')} is missing")
    page, answers = make_page(turns, sorted(set(args.outputs)), args.seed)
    replace_file(key, lambda temporary: temporary.write_text(json.dumps(answers, indent=1)))
    replace_file(args.output, lambda temporary: temporary.write_text(page))
    print(f"seed {args.seed}, {len(turns)} edits by {len(set(args.outputs))} methods, the best {answers['pick']} are chosen\n"
          f"{args.output}: send this\n{key}: keep this")


# ---- the count -----------------------------------------------------------------------------------------------------------

def wilson(chosen, shown, z=1.96):
    """Wilson's 95 % interval of a rate, `chosen` times of `shown`."""
    rate = chosen / shown
    middle, half = rate + z * z / (2 * shown), z * sqrt(rate * (1 - rate) / shown + z * z / (4 * shown * shown))
    return tuple((middle + sign * half) / (1 + z * z / shown) for sign in (-1, 1))


def read(path):
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def count(key, files):
    """{question: Counter of how often each method was chosen} from a key and files of answers, each of which must be whole."""
    chosen, people = {question: Counter() for question in QUESTIONS}, set()
    for file in files:
        answers = read(file)
        if answers.get("survey") != key["survey"]:
            raise ValueError(f"{file} answers another survey than the key's, {key['survey']}")
        if str(answers.get("person")) in people:
            raise ValueError(f"{file} has the answers of another file once more")
        people.add(str(answers.get("person")))
        for question, counter in chosen.items():
            for n, item in enumerate(key["items"]):
                try:
                    picked = answers["answers"][str(n)][question]
                    methods = {item["options"][option] for option in picked}
                except (KeyError, TypeError):
                    raise ValueError(f"{file} has no answer, or an unknown one, to question {question!r} of edit {n}") from None
                if len(methods) != key["pick"] or len(picked) != key["pick"]:
                    raise ValueError(f"{file}: {len(picked)} options are chosen in edit {n}, not {key['pick']}")
                counter.update(methods)
    return chosen


def tally(args):
    key = read(args.key)
    if not {"survey", "pick", "items"} <= key.keys():
        raise ValueError(f"--key {args.key} is no key of a survey")
    shown = len(args.answers) * len(key["items"])
    methods = sorted(key["items"][0]["options"].values())
    print(f"{len(args.answers)} people, {len(key['items'])} edits, the best {key['pick']} of {len(methods)}; chance is "
          f"{1 / len(methods):.1%}.  Share of all choices, with Wilson's 95 % interval, which takes all answers as independent.")
    print(f"\n| method | {' | '.join(QUESTIONS)} |\n|---|---|---|")
    chosen = count(key, args.answers)
    for method in methods:
        cells = []
        for question in QUESTIONS:
            # a method is chosen or not each time it is shown; all shares together are 1
            share = [rate / key["pick"] for rate in (chosen[question][method] / shown, *wilson(chosen[question][method], shown))]
            cells.append("{:.1%} ({:.1%} to {:.1%})".format(*share))
        print(f"| {method} | {' | '.join(cells)} |")
    print("| UIP2P, published (52 people, 15 edits, two of six) | 22% | 20% |\n| IP2P, published | 8% | 12% |")


def main(argv=None):
    main = Parser("survey.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    p = commands.add_parser("page", help="make the page and its key")
    p.add_argument("data", help="MagicBrush's test")
    p.add_argument("--outputs", nargs="+", type=Path, required=True, help="folders of methods' images")
    p.add_argument("--output", type=Path, default=Path("survey.html"), help="an .html file; its key is beside it (%(default)s)")
    p.add_argument("--edits", type=positive_int, default=15, help="how many, drawn from all turns (%(default)s)")
    p.add_argument("--seed", type=seed_int, default=0, help="of the edits and of the options' names (%(default)s)")
    p.set_defaults(run=write_page)
    p = commands.add_parser("tally", help="count the answers")
    p.add_argument("answers", nargs="+", type=Path, help="the files that the page saved")
    p.add_argument("--key", type=Path, default=Path("survey-key.json"), help="(%(default)s)")
    p.set_defaults(run=tally)
    args = main.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        main.error(str(error))


if __name__ == "__main__":
    main()
