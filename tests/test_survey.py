"""The user study: a blind page, and the count of its answers."""
import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import survey
from experiments.published import read_magicbrush
from pictures import save_png
from test_evaluate import answers, magicbrush, rewrite

METHODS = ("ours-cc12m", "theirs", "hive")


class Page(HTMLParser):
    """What a browser finds: tags with their attributes, and the visible texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag, attribute):
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """MagicBrush's test, and folders of three methods, whose images are of one grey each and name the method."""
    path = tmp_path_factory.mktemp("survey")
    data = magicbrush(path / "data", (1, 3, 2))
    sessions = json.loads((data / "edit_sessions.json").read_text())
    sessions["1000"][0]["instruction"] = "make <script>alert('it')</script> \"{{PICK}}\" & snow"
    rewrite(data, edit_sessions=sessions)
    for grey, method in enumerate(METHODS):
        save_png(torch.full((3, 24 + 8 * grey, 24), grey - 1.), path / "grey.png", {"model": method})
        answers(read_magicbrush(data), path / method, lambda session, turn: path / "grey.png")
    return data, [path / method for method in METHODS]


def make(folders, output, *flags):
    argv = ["page", folders[0], "--outputs", *folders[1], "--output", output, *flags]
    survey.main([str(argument) for argument in argv])
    return output.read_text(), json.loads(output.with_name(f"{output.stem}-key.json").read_text())


def refuse(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        survey.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("experiments.survey: error: ") and error.count("\n") == 1, error
    return error


def decoded(source):
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))


def test_the_page_is_one_blind_file(tmp_path, folders):
    text, key = make(folders, tmp_path / "study.html")
    page = Page(text)
    assert not re.search("|".join(METHODS) + "|outputs?[0-9]|inde_|1001|https?:|src=.(?!data:)", text)
    assert "make <script>alert('it')</script> \"{{PICK}}\" & snow" in "".join(page.texts)
    assert text.count("<script>") == 1
    assert len(page.all("section", "data-item")) == len(key["items"]) == 6 and key["pick"] == 2
    images, options = page.all("img", "src"), page.all("input", "value")
    assert len(images) == 6 * 4
    # a file that says of itself "model: ours" would tell it
    assert not any("comment" in decoded(image).info or decoded(image).getexif() for image in images)
    sessions = {turn.target.name: turn for session in read_magicbrush(folders[0]) for turn in session}
    orders = set()
    for n, item in enumerate(key["items"]):
        shown, values = images[4 * n:4 * n + 4], options[6 * n:6 * n + 6:2]
        assert decoded(shown[0]).size == Image.open(sessions[item["turn"]].input).size
        assert len({decoded(image).size for image in shown}) == 1             # a method's own size would tell it
        assert values == options[6 * n + 1:6 * n + 6:2] and values == sorted(item["options"])
        for value, image in zip(values, shown[1:]):
            grey = folders[1].index(type(folders[1][0])(item["options"][value])) * 127.5
            assert np.abs(np.asarray(decoded(image), float) - grey).max() <= 1
        orders.add(tuple(item["options"][value] for value in values))
    assert len(orders) > 1 and len({option for item in key["items"] for option in item["options"]}) == 18


def test_a_page_is_a_function_of_the_seed(tmp_path, folders):
    first, key = make(folders, tmp_path / "a.html", "--edits", 3)
    assert make(folders, tmp_path / "b.html", "--edits", 3) == (first, key) and len(key["items"]) == 3
    other, other_key = make(folders, tmp_path / "c.html", "--edits", 3, "--seed", 1)
    assert key["survey"] != other_key["survey"] and key["items"] != other_key["items"]
    fewer, _ = make((folders[0], folders[1][:2]), tmp_path / "d.html", "--edits", 3)
    assert "Choose <b>the best 1</b>" in fewer and "Choose <b>the best 2</b>" in first


def replies(path, key, *choices):
    """Files of answers: each choice a pair of functions item -> methods, for the two questions."""
    files = []
    for person, pair in enumerate(choices):
        chosen = {}
        for n, item in enumerate(key["items"]):
            option = {method: name for name, method in item["options"].items()}
            chosen[str(n)] = {q: [option[str(m)] for m in pick(n)] for q, pick in zip(survey.QUESTIONS, pair)}
        files.append(path / f"answers-{person}.json")
        files[-1].write_text(json.dumps({"survey": key["survey"], "person": str(person), "answers": chosen}))
    return files


def test_the_count(tmp_path, folders, capsys):
    _, key = make(folders, tmp_path / "study.html")
    ours, theirs, hive = folders[1]
    files = replies(tmp_path, key, (lambda n: (ours, theirs), lambda n: (hive, ours)),
                    (lambda n: (ours, hive) if n else (theirs, hive), lambda n: (hive, theirs)))
    assert survey.count(key, files) == {"instruction": {str(ours): 11, str(theirs): 7, str(hive): 6},
                                        "preservation": {str(ours): 6, str(theirs): 6, str(hive): 12}}
    capsys.readouterr()
    survey.main(["tally", *map(str, files), "--key", str(tmp_path / "study-key.json")])
    said = capsys.readouterr().out
    assert "2 people, 6 edits, the best 2 of 3; chance is 33.3%" in said
    assert f"| {ours} | 45.8% (32.3% to 49.3%) | 25.0% (12.7% to 37.3%) |" in said


def test_wilsons_interval():
    assert survey.wilson(8, 10) == pytest.approx((.4902, .9433), abs=1e-4)    # the textbook's
    low, high = survey.wilson(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(3.8416 / 23.8416, abs=1e-4)


def test_bad_answers_and_arguments_are_refused(tmp_path, folders, capsys):
    _, key = make(folders, tmp_path / "study.html")
    good, = replies(tmp_path, key, [lambda n: folders[1][:2]] * 2)
    tally = ["tally", "--key", tmp_path / "study-key.json"]
    whole = json.loads(good.read_text())
    capsys.readouterr()
    assert "once more" in refuse(capsys, *tally, good, good)
    for n, (change, words) in enumerate((
            ({"survey": "another"}, "another survey"), ({"answers": {}}, "no answer"), ({"answers": []}, "no answer"),
            ({"answers": whole["answers"] | {"0": {"instruction": ["x", "y"]}}}, "unknown one"),
            ({"answers": whole["answers"] | {"3": {q: [] for q in survey.QUESTIONS}}}, "0 options"))):
        bad = tmp_path / f"bad{n}.json"
        bad.write_text(json.dumps(whole | {"person": "another"} | change))
        assert words in refuse(capsys, *tally, good, bad)
    bad.write_text("[]")
    assert "no JSON object" in refuse(capsys, *tally, bad) and "no key" in refuse(capsys, "tally", good, "--key", good)
    assert "missing" in refuse(capsys, *tally, tmp_path / "no.json")
    items = key["items"]
    for change in ({"pick": 0}, {"pick": 9}, {"pick": "2"}, {"items": []}, {"items": [1]}, {"items": {}}, {"survey": 1},
                   {"items": [{"options": {"a": []}}]}, {"items": [*items, {"options": {"a": "b"}}]}):
        (tmp_path / "key.json").write_text(json.dumps(key | change))
        assert "key.json is no key of" in refuse(capsys, "tally", good, "--key", tmp_path / "key.json")
    page = ["page", folders[0], "--outputs", *folders[1]]
    assert "exists already" in refuse(capsys, *page, "--output", tmp_path / "study.html")
    assert ".html" in refuse(capsys, *page, "--output", tmp_path / "a.png")
    assert "two folders" in refuse(capsys, *page[:4], folders[1][0], "--output", tmp_path / "a.html")
    flags = "--output", tmp_path / "a.html", "--edits", 1, "--seed", 3
    assert "_1.png is missing" in refuse(capsys, *page, tmp_path, *flags)
    assert "missing" in refuse(capsys, "page", tmp_path, "--outputs", *folders[1], "--output", tmp_path / "a.html")
    assert not list(tmp_path.glob("a*.html")) and not list(tmp_path.glob("a-key*"))
