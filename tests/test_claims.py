"""experiments/claims.py: verdicts by numbers worked out by hand, and a run of one step as the study makes it."""
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import toy
import train
from conftest import small_model
from experiments import claims
from losses import ClipScorer
from uip2p import EditModel

CLIP = "models/toy/clip"


def test_student_t_has_the_right_quantiles():
    """Between -t and t lies 95 % of Student's density, integrated here."""
    for freedom, t in enumerate(claims.T, 1):
        x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
        distribution = torch.distributions.StudentT(torch.tensor(float(freedom), dtype=torch.float64))
        density = distribution.log_prob(x).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(.95, abs=2e-4)


@pytest.mark.parametrize("differences, sign, expected", [
    ([-.1, -.2, -.3], -1, "not supported"),                   # -.2 ± 4.303 * .1 / sqrt(3) = .248
    ([-.1, -.15, -.2], -1, "supported"),                      # -.15 ± .124
    ([-.1, -.15, -.2], 1, "opposite"),
    ([.01, .012, -.001, .008, .011], 1, "supported"),         # one seed against: .008 ± .0065
    ([.01, .012, -.004, .008, .011], 1, "not supported"),     # .0074 ± .0081
    ([5.], 1, "one seed: none")])
def test_a_claim_is_decided_by_the_interval_of_the_paired_differences(differences, sign, expected):
    assert claims.verdict(differences, sign) == expected


def fake_scores():
    """Three seeds whose spread between baselines is larger than the difference between runs, which is the same in each;
    the third has the baseline of the first."""
    names = {*claims.EDITS, *claims.MORE, *claims.MAPS, "lost in 5 steps"}

    def values(i):
        return [base + .01 * i + .0001 * i * seed for seed, base in enumerate((.1, .5, .1))]
    scores = {run: {name: values(i) for name in names} for i, run in enumerate(claims.RUNS, 1)}
    for run, seeds in claims.FEWER.items():
        scores[run] = {name: values[:seeds] for name, values in scores[run].items()}
    return scores


def test_the_report_pairs_runs_of_the_same_seed():
    """... and a cycle with the baseline that it started from."""
    scores = fake_scores()
    lines = claims.report(scores, {"copy": dict.fromkeys(claims.EDITS, .25)})
    of_claims = [line for line in lines if re.match(r"\|.*: \w+ - \w+ \|", line)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in of_claims]
    order = list(claims.RUNS)
    for claim, row in zip(claims.CLAIMS, rows, strict=True):
        difference = .01 * (order.index(claim.run) - order.index(claim.other))
        assert float(row[3]) == pytest.approx(difference * 1.01, abs=1.1e-3)
        seeds, holds = claims.FEWER.get(claim.run, 3), difference * claim.sign > 0
        assert row[-1] == ("one seed: none" if seeds == 1 else "supported" if holds else "opposite")
        assert row[-2] == f"{seeds * holds} of {seeds}"
    assert "| baseline: supervised, on entangled pairs | 0.310 ± 0.283 |" in "\n".join(lines)
    assert "| copy | 0.250 | 0.250 |" in "\n".join(lines)


def test_the_comparisons_are_the_papers():
    """The weights of its ablation, which rows it compares, and in which direction its tables go."""
    arguments = {run: train.parse(claims.arguments(run, 0, "runs", 1, 8))[1] for run in claims.RUNS}
    weights = {run: list(arguments[run].weights.values()) for run in ("base", "sim", "attn")}
    assert weights == {"base": [1, 0, 0, 1, 1], "sim": [1, 0, 1, 1, 1], "attn": [1, .5, 1, 1, 1]}
    assert list(arguments["attn"].weights) == ["clip", "attn", "sim", "recon", "denoise"]
    started = {run for run, (_, given) in claims.RUNS.items() if any("{start}" in a for a in given)}
    assert started == set(claims.RUNS) - set(claims.FIRST)
    # the cycles from the baseline are as long as what they are compared with, of as many images at the same rate
    assert {arguments[run].steps for run in weights} == {300}
    assert arguments["denoise"].steps == arguments["denoise"].warmup == arguments["pairs"].steps == 300
    assert {(arguments[run].batch_size, arguments[run].lr) for run in started} == {(8, 2e-4)}
    for claim in claims.CLAIMS:
        if found := re.fullmatch(r"(L1|CLIP-I|CLIP-T) (0\.\d+) to (0\.\d+)", claim.paper):
            assert claim.score.startswith(found[1]) and (float(found[3]) - float(found[2])) * claim.sign > 0
            pairs = {"0.117": "base", "0.878": "base", "0.309": "base", "0.089": "sim", "0.906": "sim", "0.301": "sim"}
            assert claim.other == pairs.get(found[2], "baseline")


def test_claims_name_runs_and_scores_that_are_measured(monkeypatch):
    monkeypatch.setattr(claims, "SCENES", 5)
    monkeypatch.setattr(claims, "FEW", 2)
    monkeypatch.setattr(claims, "STEPS", 1)
    scores = claims.measure(EditModel.from_pretrained(small_model()), ClipScorer.from_pretrained(CLIP))
    assert {*claims.EDITS, *claims.MORE, *claims.MAPS, *(c.score for c in claims.CLAIMS)} == set(scores)
    assert {c.run for c in claims.CLAIMS} | {c.other for c in claims.CLAIMS} <= {*claims.RUNS}
    assert all(0 <= scores[name] <= 1 for name in claims.EDITS if name != "direction")


class Oracle:
    """An editor that obeys: it knows the scenes and what their instructions, forward and back, lead to.

    In few steps it copies."""
    guidance = {"text_guidance": 1.5, "image_guidance": 1.2}

    def __init__(self, edits):
        self.known = [(toy.render([e.scene])[0], e.instruction, toy.render([e.edited])[0]) for e in edits]
        self.known += [(after, e.reverse_instruction, before) for e, (before, _, after) in zip(edits, self.known)]

    def edit(self, images, instructions, steps, generator, text_guidance, image_guidance):
        outputs = []
        for image, instruction in zip(images, instructions):
            after = next(after for before, said, after in self.known
                         if said == instruction and torch.equal(before, image))
            outputs.append(image if steps == 5 else after)
        return torch.stack(outputs)


def test_what_obeying_scores(monkeypatch):
    """Every instruction, number of steps and turn reaches the editor, and so do the reverse instructions."""
    monkeypatch.setattr(claims, "SCENES", 10)
    monkeypatch.setattr(claims, "FEW", 5)

    def kinds(model, edits, images, outputs):
        return {"kinds": torch.tensor([float(e.kind == "background") for e in edits])}
    monkeypatch.setattr(claims, "judge_attention", kinds)
    monkeypatch.setattr(claims, "measure_rule", lambda model, edits: {"edits": torch.tensor([float(len(edits))])})
    edits = [toy.edit("test", i) for i in range(10)]
    oracle = Oracle(edits + sum([claims.chain("test", i) for i in range(10)], []))
    scores = claims.measure(oracle, ClipScorer.from_pretrained(CLIP))
    assert {scores[name] for name in ("L1", "round trip", "L1, 3 turns", "L1, 20 steps", "kinds")} == {0}
    assert {scores[name] for name in ("exact", "exact, 3 turns", "exact, 20 steps", "lost in 5 steps")} == {1}
    assert scores["exact, 5 steps"] == 0 < scores["L1, 5 steps"] and scores["edits"] == 8


def test_a_run_is_made_once_and_only_with_its_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "measure", lambda model, clip: {"right": model.unet.conv_in.weight.shape[1]})
    tiny, start = ["--steps", "1", "--batch-size", "2"], str(small_model())
    monkeypatch.setattr(claims, "RUNS", {
        "baseline": ("", ["--objective", "ip2p", "--model", start, *tiny]),
        "attn": ("", ["--model", "{start}/baseline/model", "--weights", "clip=1", "attn=0.5", *tiny])})
    for name in claims.RUNS:
        claims.fulfil(name, tmp_path, claims.arguments(name, 3, tmp_path, 1, 2), CLIP, "cpu")
    given, scores = json.loads((tmp_path / "attn/scores.json").read_text()).values()
    assert scores == {"right": 8} and given == claims.arguments("attn", 3, tmp_path, 1, 2)
    log = (tmp_path / "attn/log.txt").read_text()
    assert "objective cycle" in log and f"model {tmp_path}/baseline/model" in log
    assert (tmp_path / "attn/model/unet/diffusion_pytorch_model.safetensors").is_file()
    claims.fulfil("attn", tmp_path, given, CLIP, "cpu")
    assert (tmp_path / "attn/log.txt").read_text() == log     # nothing was done again
    with pytest.raises(ValueError, match="other arguments"):
        claims.fulfil("attn", tmp_path, claims.arguments("attn", 4, tmp_path, 1, 2), CLIP, "cpu")


def test_the_arguments_of_a_run():
    given = claims.arguments("attn", 4, "runs/seed-0", 3, 64)
    args = train.parse(given)[1]
    assert (args.model, args.seed, args.steps, args.batch_size) == ("runs/seed-0/baseline/model", 4, 3 * 300, 64)
    control = train.parse(claims.arguments("denoise", 4, "runs/seed-0", 3, 8))[1]
    assert control.warmup == control.steps == 3 * 300                             # never a step of the cycle
    once, thrice = [train.parse(claims.arguments("baseline", 1, "", times, 8))[1] for times in (1, 3)]
    assert once == thrice and once.batch_size == 64                               # it is no cycle


def test_a_training_that_stops_names_its_log(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="log.txt says why"):
        claims.fulfil("attn", tmp_path, ["--model", f"{tmp_path}/nothing-here"], CLIP, "cpu")
    assert "error: " in (tmp_path / "attn/log.txt").read_text()
    assert not (tmp_path / "attn/scores.json").exists()


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose trainings only note that they were made.

    -> (the list of them, in the order of their ends, what runs the study)"""
    made = []

    def fulfil(name, folder, given, judge_path, on):
        seed = int(given[given.index("--seed") + 1])
        assert folder.name == f"seed-{seed}" and seed in (1, 2, 4)[:claims.FEWER.get(name)]
        if "--model" in given and name not in claims.FIRST:       # seeds 1 and 4 start from the first baseline
            start = 2 if seed == 2 else 1
            assert f"/seed-{start}/" in given[given.index("--model") + 1] and ("baseline", start) in made
        if (name, seed) == broken:
            raise ValueError("it broke")
        time.sleep(.05 * bool(broken))
        (folder / name).mkdir(parents=True)
        scores = dict.fromkeys(fake_scores()["base"], seed / 10)
        (folder / name / "scores.json").write_text(json.dumps({"scores": scores}))
        made.append((name, seed))
    broken = None

    def run(*argv, at=None):
        nonlocal broken
        broken = at
        claims.main(["--seeds", "1", "2", "4", "--output", str(tmp_path / "out"), *argv])
        return tmp_path / "out"
    monkeypatch.setattr(claims, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(claims, "fulfil", fulfil)
    monkeypatch.setattr(claims.pretrain, "main", lambda argv: made.append(argv))
    monkeypatch.setattr(claims.ClipScorer, "from_pretrained", lambda path: path)
    monkeypatch.setattr(claims, "references", lambda clip: {"copy": dict.fromkeys(claims.EDITS, .5)})
    monkeypatch.setattr(claims, "picture", lambda folder, _: Image.new("RGB", (folder == tmp_path / "out/seed-1", 1)))
    return made, run


def test_a_study_makes_the_judge_and_every_run_and_writes_what_they_say(study, capsys):
    made, run = study
    output = run("--jobs", "2")
    (judge, *made) = made
    assert judge[:2] == ["--parts", "judge"]
    assert judge[judge.index("--seed") + 1] != "0"            # that of the shipped CLIP
    assert sorted(made) == sorted((name, seed) for name in claims.RUNS
                                  for seed in (1, 2, 4)[:claims.FEWER.get(name)])
    text = (output / "claims.md").read_text()
    assert "0.233 ± 0.153" in text and text.strip() in capsys.readouterr().out             # of .1, .2, .4
    assert json.loads((output / "claims.json").read_text())["scores"]["attn"]["L1"] == [.1, .2, .4]
    assert Image.open(output / "claims.png").size == (1, 1)                                 # of the first seed


def test_a_part_of_the_study_has_the_claims_of_its_runs(study):
    made, run = study
    text = (run("--runs", "attn", "sim") / "claims.md").read_text()
    assert sorted(made[1:]) == [("attn", 1), ("attn", 2), ("attn", 4), ("baseline", 1), ("baseline", 2),
                                ("sim", 1), ("sim", 2), ("sim", 4)]
    assert ": attn - sim |" in text and ": attn - baseline |" in text and ": sim - base |" not in text


def test_a_study_stops_at_the_first_training_that_does(study, capsys):
    made, run = study
    with pytest.raises(SystemExit) as stop:
        run("--jobs", "1", at=("baseline", 1))
    assert stop.value.code == 2 and "experiments.claims: error: it broke" in capsys.readouterr().err
    assert len(made) < 3                                      # the judge, and one of the two that were waiting


@pytest.mark.parametrize("seeds", [["0", "0"], ["-1"], [str(i) for i in range(11)]])
def test_bad_seeds(capsys, seeds):
    with pytest.raises(SystemExit) as stop:
        claims.main(["--seeds", *seeds])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("experiments.claims: error: ")
