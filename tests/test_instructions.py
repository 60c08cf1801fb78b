"""prepare.instructions as a user runs it, with language models of a few thousand weights; its checks on recorded
answers."""
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import toy
from data import TEXTS, Folder
from pictures import save_png
from prepare import instructions
from prepare.instructions import check, find_files, generate, judge, load, read_captions, read_prompt, show

ANSWERS = Path(__file__).parent / "answers.jsonl"
GOOD = dict(zip(TEXTS, ("a red barn in the snow", "paint the barn blue",
                        "a blue barn in the snow", "paint the barn red")))
# as Gemma 2's: a user and a model who take turns, and no system
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<start_of_turn>{{
'model' if message.role == 'assistant' else 'user' }}
{{ message.content }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
PROMPT = "Complete it.\n\n" + "".join(json.dumps({"kind": kind} | GOOD) + "\n" for kind in ("colour", "paint"))
# what the model of the fixture `knowing` answers; the last is rejected
KNOWN = {"a dog on a lawn": ("make the dog a cat", "a cat on a lawn", "make the cat a dog"),
         "an old boat": ("add a flag to the boat", "an old boat with a flag", "remove the flag"),
         "two cups on a table": ("make the cups golden", "two golden cups on a table", "undo it")}
ACCEPTED = [dict(zip(TEXTS, (caption, *KNOWN[caption]))) for caption in list(KNOWN)[:2]]


def make_model(config, model, template=None):
    """A tiny random model and a tokenizer whose words are those of the tests."""
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([PROMPT, str(KNOWN)], trainers.BpeTrainer(
        special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        additional_special_tokens=specials[3:], chat_template=template, padding_side="left")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32, num_attention_heads=2)
    config = config(vocab_size=len(tokenizer), num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=2,
                    **sizes)
    return model(config), tokenizer


@pytest.fixture(autouse=True)
def short(tmp_path, monkeypatch):
    """A short prompt and short rounds."""
    monkeypatch.setattr(instructions, "PROMPT", tmp_path / "prompt.txt")
    monkeypatch.setattr(instructions, "ROUND", 2)
    monkeypatch.setattr(instructions, "NEW_TOKENS", 60)
    instructions.PROMPT.write_text(PROMPT)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def ask(caption, kind):
    """What the command asks a model."""
    given = "caption", "kind"
    return f"{read_prompt(given, TEXTS[1:])[1]}Given: {show({'caption': caption, 'kind': kind}, given)}\nAnswer:"


@pytest.fixture
def knowing(folders):
    """A chat model with the template of Gemma 2 that has learnt KNOWN by heart, trained once."""
    if not (folders / "knowing").exists():
        model, tokenizer = make_model(LlamaConfig, LlamaForCausalLM, TEMPLATE)
        texts = [tokenizer.apply_chat_template(
            [{"role": "user", "content": ask(caption, kind)},
             {"role": "assistant", "content": json.dumps(dict(zip(TEXTS[1:], answer)))}], tokenize=False)
            for caption, answer in KNOWN.items() for kind in ("colour", "paint")]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        answers = torch.arange(batch.input_ids.shape[1]) >= batch.input_ids.shape[1] - 60
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(120):
            model(**batch, labels=batch.input_ids.masked_fill(~answers, -100)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folders / "knowing")
        tokenizer.save_pretrained(folders / "knowing")
    return folders / "knowing"


@pytest.fixture
def guessing(folders, monkeypatch):
    """A random Gemma 2 without a chat template; its answers are short."""
    monkeypatch.setattr(instructions, "NEW_TOKENS", 6)
    if not (folders / "guessing").exists():
        for part in make_model(Gemma2Config, Gemma2ForCausalLM):
            part.save_pretrained(folders / "guessing")
    return folders / "guessing"


def run(model, source, output, *flags):
    instructions.main(["--model", str(model), "--input", str(source), "--output", str(output), "--batch-size", "2",
                       "--device", "cpu", *map(str, flags)])
    written = output, Path(f"{output}.rejects")
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in written]


def refuse(capsys, *argv):
    """The message of a run that must fail with one line and status 2."""
    with pytest.raises(SystemExit) as stop:
        instructions.main(["--device", "cpu", *map(str, argv)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("prepare.instructions: error: ") and error.count("\n") == 1, error
    return error


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# ---- the checks ----------------------------------------------------------------------------------------------------

def test_verdicts_on_recorded_answers():
    """Answers of the kinds that language models give, written and judged by hand before the checks were: an answer is
    good if whoever sees only the edited image can follow the reverse, and then has what the input's caption says.  The
    checks do not get all of them right; those that they get wrong stay here."""
    table, mistakes = Counter(), []
    for case in map(json.loads, ANSWERS.read_text().splitlines()):
        reason, _ = judge(case["answer"], {"caption": case["caption"]}, TEXTS[1:])
        table[case["good"], reason is None] += 1
        if case["good"] != (reason is None):
            mistakes.append(f"{'judged good, but ' + reason if reason else 'judged bad'}: {case['why']}")
    print("\n            accepted  rejected")
    for good in (True, False):
        print(f"judged {'good' if good else 'bad ':5}{table[good, True]:8}{table[good, False]:10}")
    print("\n".join(mistakes))                               # shown by pytest -s
    assert table == {(True, True): 41, (True, False): 10, (False, True): 6, (False, False): 57}


def test_the_papers_examples():
    paper = [("A man wearing a denim jacket", "make the jacket a rain coat",
              "A man wearing a rain coat", "make the coat a denim jacket"),
             ("A sofa in the living room", "add pillows",
              "A sofa in the living room with pillows", "remove the pillows"),
             ("Person on the cover of a magazine", "make the person a cat",
              "Cat on the cover of the magazine", "make the cat a person"),
             ("A tourist rests against a concrete wall", "give him a backpack",
              "A tourist with a backpack rests against a concrete wall", "remove his backpack"),
             ("A dog sitting on a couch", "move the dog to the floor",
              "A dog sitting on the floor", "move the dog back to the couch"),
             ("A car parked on the street", "remove the car",
              "An empty street", "add the car back"),
             ("A black car parked on the street", "change the car color to red",      # the captions are ours
              "A red car parked on the street", "change the car color back to black")]
    assert [check(dict(zip(TEXTS, texts))) for texts in paper] == [None] * 7
    for texts, useless in zip(paper[4:], ("move the dog back", "bring it back", "change the car color back")):
        reason = check(dict(zip(TEXTS, texts)) | {"reverse_instruction": useless})
        assert reason == "the reverse does not name what it brings or removes", useless
    no_caption_says_it = dict(zip(TEXTS, paper[6])) | {"caption": "A car parked on the street"}
    assert check(no_caption_says_it) == "the reverse names what no other text names"


def test_the_toy_worlds_edits_are_good():
    """Their words are few and come up again and again."""
    for edit in (toy.edit("train", i) for i in range(500)):
        texts = edit.scene.caption, edit.instruction, edit.edited.caption, edit.reverse_instruction
        assert check(dict(zip(TEXTS, texts))) is None, texts


@pytest.mark.parametrize("change, reason", [
    ({}, None),
    ({"edited_caption": "a <blue> barn in the snow"}, "markup"),
    ({"caption": "a red barn of <PERSON>", "edited_caption": "a blue barn of <PERSON>"}, None),
    ({"instruction": ""}, "empty"),
    ({"instruction": "paint the barn blue\nand so on"}, "several lines"),
    ({"edited_caption": "a blue barn in the snow, " + "far " * 43}, None),
    ({"edited_caption": "a blue barn in the snow, " + "far " * 44}, "longer"),
    ({"edited_caption": "A red barn, in the snow."}, "captions are alike"),
    ({"reverse_instruction": "Paint the barn blue."}, "edit and reverse"),
    ({"reverse_instruction": "paint the barn red again"}, "time before"),
    ({"reverse_instruction": "Restore the red barn"}, "time before"),
    ({"caption": "a red barn in the back", "edited_caption": "a blue barn in the back",
      "reverse_instruction": "paint the barn in the back red"}, None),
    ({"reverse_instruction": "paint the barn red and white"}, "no other text"),
    ({"reverse_instruction": "paint the barn"}, "brings or removes"),
    ({"reverse_instruction": "remove the red barn"}, "brings or removes"),
    ({"edited_caption": "a red barn in the snow with a blue door", "instruction": "add a blue door",
      "reverse_instruction": "take the blue door away"}, None),
    ({"edited_caption": "a red barn in the snow with a blue door", "instruction": "add a blue door",
      "reverse_instruction": "bring the blue door"}, "brings or removes"),
    ({"reverse_instruction": "get rid of the blue", "edited_caption": "a red barn in the blue snow",
      "instruction": "paint the snow blue"}, None),
    ({"caption": "a green barn in the snow", "edited_caption": "a grey barn in the snow",
      "instruction": "paint the barn grey", "reverse_instruction": "paint the barn green"}, None),
    ({"instruction": "paint the snow green"}, "captions change")])
def test_each_check(change, reason):
    found = check(GOOD | change)
    assert found is None if reason is None else found and reason in found, found


def test_an_answer_is_one_object_of_the_texts_asked_for():
    job, fields = {"caption": GOOD["caption"], "image": "barn.jpg"}, {name: GOOD[name] for name in TEXTS[1:]}
    assert judge(json.dumps(fields), job, TEXTS[1:]) == (None, job | fields)
    spaced = json.dumps(fields | {"instruction": " paint the barn blue "}, indent=1)
    for before in (" ", "```json\n", "Sure! Here it is: "):
        assert judge(f"{before}{spaced}\n", job, TEXTS[1:]) == (None, job | fields)
    for answer in ("", "[]", json.dumps(fields)[:-1], json.dumps(fields | {"note": ""}), f"{json.dumps(fields)} I hope",
                   json.dumps(fields | {"instruction": 1}), "[" * 100_000, json.dumps({"instruction": "paint it blue"}),
                   str(fields)):
        reason, record = judge(answer, job, TEXTS[1:])
        assert "JSON" in reason and record == job | {"reason": reason, "answer": answer}
    assert "markup" in judge(json.dumps(fields | {"instruction": "paint it blue \ud83d"}), job, TEXTS[1:])[0]


def test_the_prompts_examples_pass_the_checks(monkeypatch):
    monkeypatch.undo()
    examples = [json.loads(line) for line in instructions.PROMPT.read_text().splitlines() if line.startswith("{")]
    assert len(examples) >= 8 and [check(example) for example in examples] == [None] * len(examples)
    kinds, prompt = read_prompt(("caption", "kind"), TEXTS[1:])
    assert len(kinds) >= 6 and all(f"\n{kind}: " in prompt for kind in kinds)
    assert prompt.count("\nGiven: {\"caption\": ") == prompt.count("\nAnswer: {\"instruction\": ") == len(examples)


# ---- captions in ---------------------------------------------------------------------------------------------------

def test_captions_are_read_from_text_json_and_shards(tmp_path):
    write(tmp_path / "a.txt", "a dog", "", "  two \t cats ")
    write(tmp_path / "b.jsonl", {"image": "1.jpg", "caption": "a\ndog"}, {"file_name": "2.jpg", "text": "two cats"})
    image = b"\xff\xd8"
    shard(tmp_path / "00009.tar", {
        "1.jpg": image, "1.json": b'{"caption": "not this"}', "1.txt": "a crêpe".encode(),
        "./x/2.jpg": image, "x/3.json": b'{"caption": "a page", "key": "3"}', "x/3.jpg": image})
    shard(tmp_path / "00010.tar", {"4.json": b'{"caption": null}', "5.txt": b" \n", "6.jpg": image, "7.txt": b"a fox"})

    def read(*patterns):
        return list(read_captions(find_files([str(tmp_path / p) for p in patterns]), TEXTS[:1]))
    assert read("a.txt") == [{"caption": "a dog"}, {"caption": "two cats"}]
    assert read("b.jsonl") == [{"image": "1.jpg", "caption": "a dog"}, {"file_name": "2.jpg", "caption": "two cats"}]
    samples = ("1", "a crêpe"), ("x/3", "a page"), ("7", "a fox")
    shards = [{"key": key, "caption": caption} for key, caption in samples]
    assert read("{00009..00010}.tar") == read("*.tar") == read("00009.tar", "00010.tar") == shards
    assert read("a.txt", "*.tar")[1:3] == [{"caption": "two cats"}, shards[0]]


def test_texts_as_people_have_them(tmp_path, capsys):
    """Blank lines, a byte order mark, ._NAME in a shard, one that is not sorted; one broken of a hundred is skipped."""
    dogs = [f"dog {n}" for n in range(99)]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa boat\r\n\r\na dog\n")
    write(tmp_path / "half.jsonl", *({"caption": dog} for dog in dogs), "", {"caption": "\ud800"})
    write(tmp_path / "long.jsonl", *({"caption": dog} for dog in dogs), {"caption": "word " * 200_000})
    members = {f"{n}.txt": dog.encode() for n, dog in enumerate(dogs)}
    shard(tmp_path / "mac.tar", {f"./{prefix}{name}": b"\xff" if prefix else text for name, text in members.items()
                                 for prefix in ("._", "")})
    shard(tmp_path / "unsorted.tar", {f"{n}.jpg": b"x" for n in range(99)} | members)
    shard(tmp_path / "latin.tar", members | {"100.txt": b"\xe9"})
    shard(tmp_path / "ab.tar", members | {"x.txt": b""})
    damaged = bytearray((tmp_path / "ab.tar").read_bytes())
    with tarfile.open(tmp_path / "ab.tar") as tar:
        start = tar.getmember("x.txt").offset
    damaged[start:start + 512] = b"x" * 512
    (tmp_path / "damaged.tar").write_bytes(damaged)
    assert read_captions([tmp_path / "a.txt"], TEXTS[:1]) == [{"caption": "a boat"}, {"caption": "a dog"}]
    for name, broken in (("half.jsonl", "line 101"), ("long.jsonl", "more than 10,000 bytes"), ("mac.tar", ""),
                         ("unsorted.tar", ""), ("latin.tar", "latin.tar '100'"), ("damaged.tar", "unexpected end")):
        assert [row["caption"] for row in read_captions([tmp_path / name], TEXTS[:1])] == dogs, name
        err = capsys.readouterr().err
        assert broken in err and bool(broken) == ("(1 of 100)" in err), name


def test_what_no_model_reads_whole_is_not_asked_and_odd_fields_are_kept(guessing, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(instructions, "GIVEN_TOKENS", 40)
    monkeypatch.setattr(instructions, "generate", lambda model, tokenizer, prompts, _: asked.extend(prompts) or
                        [json.dumps({name: GOOD[name] for name in TEXTS[1:]})] * len(prompts))
    source = write(tmp_path / "in.jsonl", {"caption": "far " * 100}, {"caption": GOOD["caption"], "url": "\ud800"})
    edits, rejects = run(guessing, source, tmp_path / "out.jsonl")
    assert len(asked) == 1 and [row["url"] for row in edits] == ["\ud800"]
    assert [row["reason"] for row in rejects] == [instructions.TOO_LONG]


def test_the_folder_of_instruct_pix2pix_is_read(tmp_path, capsys):
    for name in ("0000001", "0000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompt.json").write_text(json.dumps({"input": name, "edit": "b", "output": "c"}))
    (tmp_path / "seeds.json").write_text(json.dumps([["0000001", [1]], ["0000002", []], ["0000003", [2]]]))
    assert read_captions(find_files([str(tmp_path)]), TEXTS[:3]) == [
        {"caption": name, "instruction": "b", "edited_caption": "c", "key": name} for name in ("0000001", "0000002")]
    assert "1 of 3 directories" in capsys.readouterr().out


def test_instruct_pix2pix_is_read_by_its_names(tmp_path):
    write(tmp_path / "a.jsonl", dict(zip(("input", "edit", "output"), GOOD.values())),
          {"original_prompt": "a", "edit_prompt": "b", "edited_prompt": "c", "url": "d"})
    first, second = read_captions([tmp_path / "a.jsonl"], TEXTS[:3])
    assert first == {name: GOOD[name] for name in TEXTS[:3]}
    assert second == {"caption": "a", "instruction": "b", "edited_caption": "c", "url": "d"}


# ---- the language model --------------------------------------------------------------------------------------------

def test_prompts_are_padded_on_the_left_and_answered_alone_as_together(guessing):
    model, tokenizer = load(guessing, "cpu")
    prompts = ["add a dog", "paint the red barn in the snow blue, paint the barn red", "a"]
    together = generate(model, tokenizer, prompts, 0)
    assert together == [generate(model, tokenizer, [prompt], 0)[0] for prompt in prompts] and len(set(together)) == 3
    torch.manual_seed(0)
    sampled = generate(model, tokenizer, prompts, 1.)
    assert sampled != together
    torch.manual_seed(0)
    assert generate(model, tokenizer, prompts, 1.) == sampled


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_prompt_is_one_turn_of_the_user_where_the_model_knows_turns(guessing, monkeypatch, template):
    (model, tokenizer), seen = load(guessing, "cpu"), []
    tokenizer.chat_template = template
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs["input_ids"]) or real(**inputs))
    generate(model, tokenizer, ["paint it red"], 0)
    assert tokenizer.decode(seen[0][0]) == (
        "<bos><start_of_turn>user\npaint it red<end_of_turn>\n<start_of_turn>model\n" if template else "paint it red")


def test_an_answer_ends_with_its_brace(knowing):
    model, tokenizer = load(knowing, "cpu")
    answers = generate(model, tokenizer, [ask(caption, "paint") for caption in KNOWN], 0)
    assert [json.loads(answer) for answer in answers] == [
        dict(zip(TEXTS[1:], answer)) for answer in KNOWN.values()]


# ---- the command ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0, .1])
def test_captions_in_edits_out(knowing, tmp_path, capsys, temperature):
    output = tmp_path / "edits.jsonl"
    edits, rejects = run(knowing, write(tmp_path / "captions.txt", *KNOWN), output, "--temperature", temperature)
    assert [{name: edit[name] for name in TEXTS} for edit in edits] == ACCEPTED
    [reject] = rejects
    assert reject["caption"] == "two cups on a table"
    assert reject["reason"] == "the reverse speaks of the time before the edit"
    assert json.loads(reject["answer"])["reverse_instruction"] == "undo it"
    said = capsys.readouterr().out
    for words in ("seed 0", "total 3", "device cpu", "float32", "2 of 3 edits", "66.7%  accepted",
                  "33.3%  the reverse"):
        assert words in said
    names = ["captions.txt", "edits.jsonl", "edits.jsonl.rejects", "prompt.txt"]
    assert sorted(f.name for f in tmp_path.iterdir()) == names


def test_several_edits_of_a_caption_are_of_different_kinds(knowing, tmp_path):
    edits, _ = run(knowing, write(tmp_path / "captions.txt", *KNOWN), tmp_path / "edits.jsonl", "--edits", 2)
    assert sorted((edit["caption"], edit["kind"]) for edit in edits) == [
        (edit["caption"], kind) for edit in ACCEPTED for kind in ("colour", "paint")]


def test_the_output_is_a_data_set(knowing, tmp_path):
    names = [f"{n}.png" for n in range(len(KNOWN))]
    for name in names:
        save_png(torch.zeros(3, 16, 16), tmp_path / name)
    rows = [{"image": name, "text": caption} for name, caption in zip(names, KNOWN)]
    source = write(tmp_path / "captions.jsonl", *rows)
    run(knowing, source, tmp_path / "metadata.jsonl")
    source = Folder(tmp_path, 16)
    batch, _ = source.__getitems__([(0, item) for item in source.items])
    texts = batch.captions, batch.instructions, batch.edited_captions, batch.reverse_instructions
    assert [dict(zip(TEXTS, edit)) for edit in zip(*texts)] == ACCEPTED


def test_reverse_only_asks_for_the_reverse(guessing, tmp_path, monkeypatch):
    prompts = []
    def answer(model, tokenizer, asked, temperature):
        prompts.extend(asked)
        return ['{"reverse_instruction": "paint the barn red"}'] * len(asked)
    monkeypatch.setattr(instructions, "generate", answer)
    row = {"input": GOOD["caption"], "edit": GOOD["instruction"], "output": GOOD["edited_caption"], "key": "7"}
    edits, rejects = run(guessing, write(tmp_path / "ip2p.jsonl", row), tmp_path / "out.jsonl", "--reverse-only")
    assert edits == [GOOD | {"key": "7"}] and not rejects
    assert prompts[0].endswith('\nGiven: {"caption": "a red barn in the snow", "instruction": "paint the barn blue", '
                               '"edited_caption": "a blue barn in the snow"}\nAnswer:')
    assert '\nAnswer: {"reverse_instruction": "paint the barn red"}\n' in prompts[0]


@pytest.mark.parametrize("temperature", [0, 1.])
def test_what_is_rejected_is_asked_again_and_sampled(guessing, tmp_path, monkeypatch, temperature):
    asked, answers, drawn = [], [], []

    def answer(model, tokenizer, prompts, temperature):
        asked.append((len(prompts), temperature))
        drawn.append(torch.rand(()).item())
        return [answers[0]] * len(prompts) if len(asked) > 4 else ["no"] * len(prompts)
    monkeypatch.setattr(instructions, "generate", answer)
    source = write(tmp_path / "captions.txt", *[GOOD["caption"]] * 3)
    answers[:] = [json.dumps({name: GOOD[name] for name in TEXTS[1:]})]                   # good at the third try
    edits, rejects = run(guessing, source, tmp_path / "good.jsonl", "--temperature", temperature)
    again = temperature or .7
    assert len(edits) == 3 and not rejects
    assert asked == [(2, temperature), (1, temperature), *[(2, again), (1, again)] * 2]
    assert len(set(drawn)) == len(drawn)                      # no try repeats another
    asked[:], answers[:] = [], ["never"]
    edits, rejects = run(guessing, source, tmp_path / "bad.jsonl", "--temperature", temperature)
    assert not edits and asked == [(2, temperature), (1, temperature), *[(2, again), (1, again)] * 3]
    assert [reject["answer"] for reject in rejects] == ["never"] * 3


def test_a_run_that_was_stopped_ends_as_one_that_was_not(guessing, tmp_path, monkeypatch):
    """10 edits in rounds of 4, 4 and 2, which take 8, 8 and 4 calls; all are guesses, recorded among the rejects."""
    source = write(tmp_path / "captions.txt", *["two dogs"] * 5)
    _, whole = run(guessing, source, tmp_path / "whole.jsonl", "--edits", 2)
    assert len(whole) == len({reject["answer"] for reject in whole}) == 10
    assert run(guessing, source, tmp_path / "other.jsonl", "--edits", 2, "--seed", 1)[1] != whole

    def stop(name, method, after):
        """Runs until the `after`-th call of a function -> the lines of the .part file; the first says the settings."""
        calls = iter(range(after))
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            real = getattr(*method)

            def interrupted(first, *args, **kwargs):
                is_another_file = isinstance(first, Path) and first.suffix != ".part"
                if not is_another_file and next(calls, None) is None:
                    raise KeyboardInterrupt
                return real(first, *args, **kwargs)
            patch.setattr(*method, interrupted)
            run(guessing, source, tmp_path / f"{name}.jsonl", "--edits", 2)
        part = tmp_path / f"{name}.jsonl.part"
        return part.read_bytes().splitlines(keepends=True) if part.exists() else []

    for after, done in ((0, 0), (7, 0), (8, 4), (11, 4), (16, 8), (19, 8)):
        lines = stop(after, (instructions, "generate"), after)
        assert len(lines) == (1 + done if done else 0) and not (tmp_path / f"{after}.jsonl").exists()
        if after == 11:                                       # a line and a half of the next round, too
            (tmp_path / "11.jsonl.part").write_bytes(b"".join(lines) + lines[1] + lines[2][:20])
        if after == 19:                                       # stopped in the middle of a line
            (tmp_path / "19.jsonl.part").write_bytes(b"".join(lines)[:-5])
    assert len(stop("written", (Path, "unlink"), 0)) == 11
    for name in (0, 7, 8, 11, 16, 19, "written"):
        assert run(guessing, source, tmp_path / f"{name}.jsonl", "--edits", 2) == [[], whole], name
        assert not (tmp_path / f"{name}.jsonl.part").exists()


def test_a_run_goes_on_with_its_own_command_only(guessing, tmp_path, monkeypatch, capsys):
    source, output = write(tmp_path / "captions.txt", "a dog"), tmp_path / "edits.jsonl"
    good = "--model", guessing, "--input", source, "--output", output, "--batch-size", 2
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(instructions, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run(guessing, source, output)
    capsys.readouterr()
    assert "begun by another command" in refuse(capsys, *good, "--seed", 1)
    instructions.PROMPT.write_text(PROMPT.replace("Complete", "Finish"))
    assert "begun by another command" in refuse(capsys, *good)
    output.with_name("edits.jsonl.part").unlink()
    run(guessing, source, output)
    before = output.read_bytes()
    capsys.readouterr()
    assert "exists already" in refuse(capsys, *good) and output.read_bytes() == before


def test_bad_input_is_refused(guessing, tmp_path, capsys):
    good, output = write(tmp_path / "good.txt", "a dog"), tmp_path / "out.jsonl"
    whole = shard(tmp_path / "whole.tar", {f"{n}.jpg": b"x" * 2000 for n in range(9)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    (tmp_path / "latin.txt").write_bytes(b"a dog\na cr\xeape\n")
    shard(tmp_path / "odd.tar", {"1.txt": b"a dog", "2.json": b"[]"})
    for name, content in (("empty.txt", []), ("blank.txt", ["", " "]), ("broken.jsonl", [{"caption": "a dog"}, "{"]),
                          ("list.jsonl", ["[]"]), ("deep.jsonl", ["[" * 100_000]),
                          ("wordless.jsonl", [{"caption": ""}]), ("a.csv", ["caption"])):
        write(tmp_path / name, *content)
    for name, word in (("absent.txt", "no such"), ("a.csv", ".txt, .jsonl or .tar"), ("*.png", "no such"),
                       (".", "no such"), ("{0..1}.tar", "0.tar"), ("empty.txt", "no caption"),
                       ("blank.txt", "no caption"),
                       ("broken.jsonl", "broken.jsonl line 2"), ("list.jsonl", "no JSON object"),
                       ("deep.jsonl", "deep.jsonl line 1"),
                       ("wordless.jsonl", "no text for caption or text"), ("latin.txt", "latin.txt line 2"),
                       ("cut.tar", "cut.tar"), ("odd.tar", "odd.tar '2'")):
        assert word in refuse(capsys, "--model", guessing, "--input", tmp_path / name, "--output", output), name
    good = "--model", guessing, "--input", good, "--output", output
    assert "no text for instruction" in refuse(capsys, *good, "--reverse-only")
    for flags, word in ((("--edits", 3), "2 kinds of edit, colour, paint"), (("--edits", 0), "--edits"),
                        (("--edits", 1, "--reverse-only"), "no effect"), (("--temperature", -1), "--temperature"),
                        (("--batch-size", 0), "--batch-size"), (("--seed", "x"), "--seed"), (("--fast",), "--fast"),
                        (("--device", "abacus"), "abacus"),
                        (("--output", tmp_path / "no/out.jsonl"), "no such folder")):
        assert word in refuse(capsys, *good, *flags)
    for example, word in (("{", "broken"), (json.dumps(GOOD), "kind"), ("[]\n{}", "broken")):
        write(instructions.PROMPT, example)
        assert word in refuse(capsys, *good)
    assert not list(tmp_path.glob("out*"))


def test_bad_models_are_refused(guessing, tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "captions.txt", "a dog")

    def copy(name):
        return Path(shutil.copytree(guessing, tmp_path / name))
    (tmp_path / "empty").mkdir()
    weights = copy("pickle") / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    weights = copy("partial") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    for file in copy("wordless").glob("tokenizer*"):
        file.unlink()
    config = copy("short") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 50}))
    for name, word in (("absent", "absent"), ("empty", "empty"), ("pickle", "safetensors"), ("truncated", "truncated"),
                       ("partial", "model.norm.weight"), ("wordless", "no tokenizer"), ("short", "reads 50 tokens")):
        assert word in refuse(capsys, "--model", tmp_path / name, "--input", source, "--output", tmp_path / "out"), name
    assert not list(tmp_path.glob("out*"))


def test_a_second_process_is_refused(guessing, tmp_path, capsys):
    source, output = write(tmp_path / "captions.txt", "a dog"), tmp_path / "edits.jsonl"
    good = "--model", guessing, "--input", source, "--output", output
    with instructions.claimed_part(output) as part:
        assert f"{part} is in use by another process" in refuse(capsys, *good)
        assert part.exists()
    assert not part.exists()                                  # it stayed empty


def test_a_part_file_that_was_cut_in_its_first_line_or_damaged(guessing, tmp_path, capsys):
    source, output = write(tmp_path / "captions.txt", "a dog"), tmp_path / "edits.jsonl"
    good = "--model", guessing, "--input", source, "--output", output, "--batch-size", 2
    part = output.with_name("edits.jsonl.part")
    part.write_text('{"input": "[')
    (tmp_path / "edits.jsonl.rejects.tmp-01234567").touch()
    (tmp_path / "other.jsonl.tmp-01234567").touch()           # of another run, in the same folder
    run(guessing, source, output)
    assert sorted(file.name for file in tmp_path.glob("*.*")) == [
        "captions.txt", "edits.jsonl", "edits.jsonl.rejects", "other.jsonl.tmp-01234567", "prompt.txt"]
    output.unlink()
    part.write_text("something else")
    capsys.readouterr()
    assert "begun by another command" in refuse(capsys, *good) and part.read_text() == "something else"
