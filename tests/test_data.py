"""The order of samples, and where they come from: folders of images, shards, InstructPix2Pix's tree, mixes."""
import io
import json
import pickle
import random
import shutil
import tarfile
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import shards
import toy
from data import TEXTS, Folder, Source, ToyWorld, batches
from pictures import load_image, save_png, to_pil
from shards import InstructPix2Pix, Mix, Shards, open_data, open_source, read_texts, without_border


class Numbers(Source):
    """A source whose batch is the list of the (epoch, number) it is asked for."""

    def __init__(self):
        super().__init__(range(10), 1, 0, False)

    def __getitems__(self, references):
        return list(references), []


def take(count, batch_size=4, seed=0, **options):
    return list(islice(batches(Numbers(), batch_size, seed, **options), count))


# ---- the order -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])        # of 10 samples: with its end, within, over several epochs
def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own(batch_size):
    order = sum(take(100 // batch_size, batch_size), [])
    epochs = [order[i:i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == [(n, i) for i in range(10)] for n, epoch in enumerate(epochs))
    assert len({tuple(number for _, number in epoch) for epoch in epochs}) == 10


def test_order_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = take(10)
    torch.manual_seed(2)
    assert take(10) == first and take(10, seed=1) != first
    assert take(10, workers=2) == first


@pytest.mark.parametrize("batch_size", [3, 4, 5])
def test_resuming_gives_what_an_uninterrupted_run_gives(batch_size):
    whole = take(20, batch_size)
    for n in range(0, 20):
        assert take(20 - n, batch_size, first=n) == whole[n:]


# ---- the toy world ---------------------------------------------------------------------------------------------------

def of_toy(world, *indices, epoch=0):
    return world.__getitems__([(epoch, i) for i in indices])[0]


def test_toy_world_gives_the_samples_asked_for():
    indices = [7, 0, 3]
    batch = of_toy(ToyWorld("validation", 20, seed=5), *indices)
    edits = [toy.edit("validation", i, 5) for i in indices]
    assert torch.equal(batch.images, toy.render([e.scene for e in edits])) and batch.edited_images is None
    assert batch.captions == [e.scene.caption for e in edits]
    assert batch.edited_captions == [e.edited.caption for e in edits]
    assert batch.instructions == [e.instruction for e in edits]
    assert batch.reverse_instructions == [e.reverse_instruction for e in edits]


@pytest.mark.parametrize("kind", toy.KINDS)
def test_a_toy_world_of_one_kind_has_every_edit_of_that_kind(kind):
    batch = of_toy(ToyWorld("validation", 4, seed=5, kind=kind), 0, 1, 2)
    edits = [edit for edit in (toy.edit("validation", i, 5) for i in range(15)) if edit.kind == kind]
    assert batch.instructions == [edit.instruction for edit in edits]


def test_toy_world_shows_the_same_in_every_epoch():
    first, second = (of_toy(ToyWorld("train", 20, pairs=True), 7, epoch=epoch) for epoch in (0, 1))
    assert torch.equal(first.images, second.images) and torch.equal(first.edited_images, second.edited_images)
    assert first.instructions == second.instructions


def test_toy_pairs_do_not_depend_on_the_batch_and_are_not_the_truth():
    world = ToyWorld("train", 20, pairs=True)
    batch = of_toy(world, 7, 0, 3)
    assert torch.equal(batch.edited_images[2], of_toy(world, 3).edited_images[0])
    truth = toy.render([toy.edit("train", i).edited for i in (7, 0, 3)])
    assert ((batch.edited_images - truth).abs().flatten(1).mean(1) > 0.01).all()


def test_toy_pairs_without_biases_are_true_also_in_another_process(monkeypatch):
    """A world keeps the biases it was opened with: the data's workers on a GPU are new processes."""
    monkeypatch.setattr(toy, "BIASES", (0, 0))
    world = ToyWorld("train", 20, pairs=True)
    monkeypatch.undo()
    shown = of_toy(pickle.loads(pickle.dumps(world)), 7).edited_images
    assert torch.equal(shown, toy.render([toy.edit("train", 7).edited]))


# ---- folders ---------------------------------------------------------------------------------------------------------

def ramps(height, width, blue, over=60):
    """Red grows with x, green with y, both by 1 in `over` pixels: what an image shows says where it was cut out."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x / over, y / over, torch.full_like(x, blue)]) * 2 - 1


def folder(path, rows=1, size=(40, 60), edited_size=None, over=60, **texts):
    """Images and metadata.jsonl with captions "sky 0", "sky 1"...; the edited image is the same with more blue."""
    save_png(ramps(*size, 0.2, over), path / "a.png")
    save_png(ramps(*edited_size or size, 0.8, over), path / "b.png")
    row = {"image": "a.png", "edited_image": "b.png", "instruction": "make it red", "edited_caption": "a red sky",
           "reverse_instruction": "make it blue"}
    lines = [json.dumps(row | {"caption": f"sky {n}"} | texts, ensure_ascii=False) + "\n" for n in range(rows)]
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


def all_of(source, epoch=0):
    """The Batch of all items of a source, none of which is broken."""
    batch, errors = source.__getitems__([(epoch, item) for item in source.items])
    assert errors == []
    return batch


def flipped(images):
    return images[:, 0, 10, -3] < images[:, 0, 10, 3]


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
def test_both_images_of_a_pair_get_the_same_crop_and_flip(tmp_path, size):
    batch = all_of(Folder(folder(tmp_path, 30, size), 32, pairs=True))
    assert batch.images.shape == batch.edited_images.shape == (30, 3, 32, 32)
    before, after = (images[:, :2, 3:-3, 3:-3] for images in (batch.images, batch.edited_images))
    torch.testing.assert_close(before, after, atol=0.03, rtol=0)
    assert (batch.edited_images[:, 2] - batch.images[:, 2]).mean() == pytest.approx(1.2, abs=0.02)
    assert 5 < flipped(batch.images).sum() < 25               # half of the time
    places = batch.images[:, :2].mean((2, 3)).round(decimals=2).unique(dim=0)
    assert len(places) > 8                                    # and cut out at different places
    assert batch.captions == [f"sky {n}" for n in range(30)] and batch.reverse_instructions == ["make it blue"] * 30


def test_pairs_of_unequal_size_are_refused(tmp_path):
    path = folder(tmp_path, edited_size=(80, 120))
    source = Folder(path, 32, pairs=True)
    assert source.__getitems__([(0, source.items[0])]) == (None, [
        f"{path}/metadata.jsonl line 1: the image and the edited image differ in size"])
    assert all_of(Folder(path, 32)).edited_images is None     # where no pairs are asked for it does not matter


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (16, 24), (100, 33)])
def test_images_are_resized_by_the_short_side(tmp_path, size):
    """The crop shows the whole short side, and both directions are enlarged by the same factor."""
    images = all_of(Folder(folder(tmp_path, 4, size, over=max(size)), 32)).images
    per_pixel = min(size) / 32 / max(size) * 2                # how much a ramp grows from one pixel to the next
    for image in images:
        for left_or_top, right_or_bottom in (image[0, 16, [4, 28]], image[1, [4, 28], 16]):
            slope = (right_or_bottom - left_or_top).abs().item() / 24
            assert slope == pytest.approx(per_pixel, rel=0.06)
        short = image[1, :, 16] if size[0] < size[1] else image[0, 16].sort().values
        assert short[0] < -1 + 2 * per_pixel and short[-1] > -1 + 30 * per_pixel


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("word", ["left", "Right"])
def test_no_flip_where_a_text_says_left_or_right(tmp_path, key, word):
    assert not flipped(all_of(Folder(folder(tmp_path, 20, **{key: f"the {word} boat"}), 32)).images).any()


@pytest.mark.parametrize("text", [
    "the boat on the left.", "left-hand side", "on the right, a boat", "the leftmost boat"])
def test_no_flip_where_left_or_right_stands_beside_punctuation(tmp_path, text):
    assert not flipped(all_of(Folder(folder(tmp_path, 20, instruction=text), 32)).images).any()


def test_words_that_contain_left_or_right_do_not_count(tmp_path):
    assert flipped(all_of(Folder(folder(tmp_path, 20, instruction="make it bright, a cleft rock"), 32)).images).any()


def test_crops_depend_on_the_seed_the_epoch_and_the_line_and_on_nothing_else(tmp_path):
    path = folder(tmp_path, 6)
    first = all_of(Folder(path, 32)).images
    assert torch.equal(all_of(Folder(path, 32)).images, first)
    assert not torch.equal(all_of(Folder(path, 32, seed=1)).images, first)
    source = Folder(path, 32)
    assert torch.equal(source.__getitems__([(0, source.items[4])])[0].images[0], first[4])


def test_a_later_epoch_shows_the_same_samples_cut_out_anew(tmp_path):
    folders = Folder(folder(tmp_path, 6), 32)
    first, second = all_of(folders), all_of(folders, epoch=1)
    assert second.captions == first.captions
    assert ((first.images - second.images).abs().flatten(1).amax(1) > 0.01).sum() >= 5


def test_a_text_may_hold_any_character(tmp_path):
    text = "a caf\u00e9\u2028by the sea\x85"                  # two of them end a line for str.splitlines, not for JSON
    assert all_of(Folder(folder(tmp_path, 2, instruction=text), 32)).instructions == [text] * 2


ROW = {"image": "a.png", "caption": "a", "instruction": "b", "edited_caption": "c", "reverse_instruction": "d"}


@pytest.mark.parametrize("lines, pairs, says", [
    (None, False, "metadata.jsonl is missing"),
    ([], False, "is empty"),
    ([ROW, "{oops"], False, "line 2:"), ([ROW, ROW, ROW | {"caption": None}], False, "line 3:.*caption"),
    ([ROW, ROW | {"instruction": "  "}], False, "line 2:.*instruction"),
    ([ROW | {"image": 3}], False, "line 1:.*image"),
    ([{"input_image": "a.png", "caption": "a"}], False, "line 1: no text for image or file_name or I_input"),
    ([ROW, "x" * 2 ** 24], False, "line 2 has more than 16,777,216 bytes"), ([ROW], True, "line 1:.*edited_image"),
    ([ROW, [1]], False, "line 2:"), ([ROW, "", "oops"], False, "line 3:.*1 of 2"),
    (["[" * 100_000], False, "line 1:"), ([ROW | {"edits": 5}], False, "line 1:.*edits"),
    ([ROW | {"edits": ["a"]}], False, "line 1:"), ([ROW | {"caption": "\ud800"}], False, "line 1:"),
    ([ROW | {"edits": [{}, {"caption": "x" * 10_001}]}], False, "line 1:.*10,000"),
])
def test_a_bad_listing_is_refused_by_line(tmp_path, lines, pairs, says):
    if lines is not None:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        Folder(tmp_path, 32, pairs=pairs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad, stops", [(1, False), (2, True)])
def test_one_broken_line_in_a_hundred_is_reported_and_skipped(tmp_path, capsys, bad, stops):
    (tmp_path / "metadata.jsonl").write_text("\n".join(["oops"] * bad + [json.dumps(ROW)] * (100 - bad)))
    if stops:
        with pytest.raises(ValueError, match="line 1: .*2 of 100 are broken"):
            Folder(tmp_path, 32)
    else:
        assert len(Folder(tmp_path, 32).items) == 99
        assert "metadata.jsonl line 1: " in capsys.readouterr().err


def test_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path):
    line = json.dumps(ROW).encode()
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\n \n")
    source = Folder(tmp_path, 32)
    assert [name[-6:] for name, _ in source.items] == ["line 1", "line 3"] and source.items[0][1] == source.items[1][1]


def test_a_listing_may_name_images_outside_of_its_folder(tmp_path):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    folder(tmp_path / "out")
    for image in ("../out/a.png", str(tmp_path / "out/a.png")):
        (tmp_path / "in/metadata.jsonl").write_text(json.dumps(ROW | {"image": image}))
        source = Folder(tmp_path / "in", 32)
        _, (read,) = source.open(random, *source.items[0])
        assert torch.equal(read, load_image(tmp_path / "out/a.png"))


def test_a_path_need_not_be_utf_8(tmp_path):
    path = tmp_path / "caf\udce9"
    path.mkdir()
    assert all_of(Folder(folder(path), 32)).captions == ["sky 0"]


def test_the_papers_names_and_a_list_of_edits(tmp_path):
    folder(tmp_path)
    edits = [{"C_f": f"f{n}", "T_edit": f"t{n}", "C_r": f"r{n}"} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"I_input": "a.png", "T_input": "sky", "edits": edits}))
    drawn = set()
    for epoch in range(30):
        batch = all_of(Folder(tmp_path, 32), epoch)
        drawn |= set(zip(batch.captions, batch.instructions, batch.edited_captions, batch.reverse_instructions))
    assert drawn == {("sky", f"f{n}", f"t{n}", f"r{n}") for n in range(3)}


# ---- webdataset shards -----------------------------------------------------------------------------------------------

EDIT = {"instruction": "make it red", "edited_caption": "a red sky", "reverse_instruction": "make it blue"}


def jpeg(size=(40, 60), kind="JPEG"):
    file = io.BytesIO()
    to_pil(ramps(*size, 0.2)).save(file, kind)
    return file.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def some_shards(path, *sizes, **fields):
    """00000.tar, ... as img2dataset writes them, with so many samples, whose captions are their keys."""
    for shard, size in enumerate(sizes):
        members = []
        for key in (f"{shard:05}{n:04}" for n in range(size)):
            row = json.dumps({"key": key, "caption": key, **EDIT, **fields}).encode()
            members += [(f"{key}.jpg", jpeg()), (f"{key}.json", row), (f"{key}.txt", key.encode())]
        write_shard(path / f"{shard:05}.tar", members)
    return f"{path}/{{00000..{len(sizes) - 1:05}}}.tar"


def one_shard(path, images):
    """A shard of images, {key: bytes}, whose captions are their keys."""
    members = []
    for key, image in images.items():
        row = json.dumps(EDIT | {"caption": key}).encode()
        members += [(f"{key}.jpg", image), (f"{key}.json", row)]
    return write_shard(path, members)


def draw(source, count, batch_size=1, **options):
    """The Batches, and their captions in a list."""
    drawn = list(islice(batches(source, batch_size, 0, **options), count))
    return drawn, [caption for batch in drawn for caption in batch.captions]


def test_an_epoch_of_shards_shows_every_sample_once_in_an_order_of_its_own(tmp_path):
    pattern = some_shards(tmp_path, 5, 3, 6)
    _, order = draw(Shards(pattern, 16), 42)
    epochs = [order[i:i + 14] for i in range(0, 42, 14)]
    keys = [f"{shard:05}{n:04}" for shard, size in enumerate((5, 3, 6)) for n in range(size)]
    assert [sorted(epoch) for epoch in epochs] == [keys] * 3 and len(set(map(tuple, epochs))) == 3
    assert all(sorted(epoch[:4]) != epoch[:4] for epoch in epochs) and len({epoch[0][:5] for epoch in epochs}) > 1


def test_only_samples_that_are_drawn_are_read(tmp_path, monkeypatch):
    source, read, original = Shards(some_shards(tmp_path, 20), 16), [], shards.read_member

    def watched(shard, *place):
        read.append(place)
        return original(shard, *place)
    monkeypatch.setattr(shards, "read_member", watched)
    draw(source, 2, first=57)                                 # in the third epoch
    assert len(read) == 2 * 3                                 # the image and the texts of each


def test_the_files_of_a_sample_may_stand_anywhere_in_a_shard(tmp_path):
    """A shard that is not sorted, and one that a Mac packed, with ._NAME beside each NAME."""
    texts = {"1": json.dumps(EDIT).encode(), "2": json.dumps(EDIT).encode()}
    images = [(f"./{key}.jpg", jpeg()) for key in texts]
    write_shard(tmp_path / "a.tar", [*images, *((f"./{key}.json", text) for key, text in texts.items()),
                                     *((f"./{key}.txt", key.encode()) for key in texts)])
    members = []
    for key, text in texts.items():
        for name, content in ((f"{key}.jpg", jpeg()), (f"{key}.json", text), (f"{key}.txt", key.encode())):
            members += [(f"./._{name}", b"\0\5\x16\7"), (f"./{name}", content)]
    write_shard(tmp_path / "b.tar", members)
    for name in ("a.tar", "b.tar"):
        assert Counter(draw(Shards(f"{tmp_path}/{name}", 16), 6)[1]) == {"1": 3, "2": 3}


def test_shards_that_cannot_be_meant(tmp_path):
    for pattern, says in (("{0..100000000}.tar", "100,000 numbers"), ("{7..3}.tar", "from 1 to"),
                          ("{0..3}.tar.gz", "unpack"), ("a.tgz", "unpack")):
        with pytest.raises(ValueError, match=says):
            open_source(f"{tmp_path}/{pattern}", "train", 16)


def test_a_range_a_pattern_and_a_path_of_shards(tmp_path):
    some_shards(tmp_path, *[1] * 11)

    def found(pattern):
        return [shard[-9:] for shard in Shards(f"{tmp_path}/{pattern}", 16).items]
    assert found("{00008..00010}.tar") == ["00008.tar", "00009.tar", "00010.tar"]
    assert found("0000[1-3].tar") == ["00001.tar", "00002.tar", "00003.tar"]
    assert len(found("*.tar")) == 11 and found("00004.tar") == ["00004.tar"]
    for pattern in ("{00009..00012}.tar", "z*.tar", "00011.tar"):
        with pytest.raises(ValueError, match="there is no such shard"):
            Shards(f"{tmp_path}/{pattern}", 16)


def test_what_a_sample_of_a_shard_may_look_like(tmp_path):
    """Pixels in other formats, the caption in .txt alone, other members, and names that are paths."""
    texts = json.dumps(EDIT | {"caption": None}).encode()
    write_shard(tmp_path / "a.tar", [("1.png", jpeg(kind="PNG")), ("1.json", texts), ("1.txt", b"one"),
                                     ("2.cls", b"7"), ("2.json", texts), ("2.txt", b"two"),
                                     ("2.webp", jpeg(kind="WEBP")),
                                     ("../../3.JPG", jpeg()), ("../../3.json", texts), ("../../3.txt", b"three"),
                                     ("no image.json", texts), ("README", b"?"), ("1.seg.png", jpeg(kind="PNG"))])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    drawn, captions = draw(Shards(f"{tmp_path}/a.tar", 16), 3)
    assert sorted(captions) == ["one", "three", "two"]
    assert [batch.instructions for batch in drawn] == [[EDIT["instruction"]]] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def side_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_texts(path)


def test_a_side_file_adds_texts_and_chooses_the_samples(tmp_path):
    pattern = some_shards(tmp_path, 4, 4, instruction=None, reverse_instruction=None)
    side = side_file(tmp_path / "side.jsonl",
                     {"key": "000000002", "instruction": "one", "reverse_instruction": "eno"},
                     {"key": "000000002", "edits": [{"C_f": "two", "C_r": "owt"}, {"C_f": "three", "C_r": "eerht"}]},
                     {"key": "000010003", "instruction": "four", "reverse_instruction": "ruof"}, {"key": "elsewhere"})
    drawn, captions = draw(Shards(pattern, 16, side=side), 80)
    assert Counter(captions) == {"000000002": 40, "000010003": 40}
    assert {(c, *b.instructions, *b.reverse_instructions) for b, c in zip(drawn, captions)} == {
        ("000000002", "one", "eno"), ("000000002", "two", "owt"), ("000000002", "three", "eerht"),
        ("000010003", "four", "ruof")}
    with pytest.raises(ValueError, match="no image that the side file names"):
        draw(Shards(pattern, 16, side={"elsewhere": [{}]}), 1)


def test_a_folder_may_take_texts_from_a_side_file(tmp_path):
    folder(tmp_path, key="a", reverse_instruction=None)
    side = side_file(tmp_path / "side.jsonl", {"key": "a", "reverse_instruction": "back"})
    assert all_of(Folder(tmp_path, 32, side=side)).reverse_instructions == ["back"]


def test_a_bad_side_file_is_refused_by_line(tmp_path):
    with pytest.raises(ValueError, match="side.jsonl line 2: no text for key"):
        side_file(tmp_path / "side.jsonl", {"key": "a"}, {"instruction": "b"})


def test_shards_are_for_the_cycle(tmp_path):
    with pytest.raises(ValueError, match="no edited images"):
        Shards(some_shards(tmp_path, 1), 16, pairs=True)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (640, 360), (201, 200)])
def test_white_borders_are_cut_off(shape):
    """As img2dataset makes them: the longer side to 256, then white, half of it on each side."""
    width, height = (round(256 * side / max(shape)) for side in shape)
    image, (left, top) = torch.ones(3, 256, 256), ((256 - width) // 2, (256 - height) // 2)
    image[:, top:top + height, left:left + width] = ramps(height, width, 0.2, over=300)
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=95)
    image = load_image("a.jpg", file.getvalue())
    row = {"original_width": shape[0], "original_height": shape[1]}
    cut = without_border(image, row)
    assert (cut[2] < 0).all()                                 # the ramps' blue is 0.2, white's is 1
    assert 0 <= height - cut.shape[1] <= 4 and 0 <= width - cut.shape[2] <= 4
    for row in ({}, {"original_width": "wide", "original_height": 0}, row | {"original_width": None}):
        assert without_border(image, row) is image


def test_what_only_looks_like_a_border_stays():
    """Squares that were cropped from oblong images, and images that kept their shape."""
    oblong = {"original_width": 300, "original_height": 200}
    cropped, kept = ramps(60, 60, 0.2), torch.ones(3, 40, 60)
    for image in (cropped, kept):
        assert torch.equal(without_border(image, oblong), image)
    white = torch.ones(3, 60, 60)
    assert torch.equal(without_border(white, {"original_width": 9, "original_height": 9}), white)
    assert min(without_border(white, {"original_width": 1, "original_height": 9999}).shape) > 0


@pytest.mark.parametrize("word", ["left", "Right"])
def test_no_flip_where_a_side_file_says_left_or_right(tmp_path, word):
    pattern = some_shards(tmp_path, 10, instruction=None)
    for text, flips in ((f"the {word} boat", False), ("the boat", True)):
        side = {f"00000{n:04}": [{"instruction": text}] for n in range(10)}
        (batch,), _ = draw(Shards(pattern, 32, side=side), 1, 10)
        assert flipped(batch.images).any() == flips


# ---- InstructPix2Pix's tree ------------------------------------------------------------------------------------------

def tree(path, count, seeds=(11, 22)):
    """Seeds differ in green, the edited image in blue; the captions are the directories' names."""
    rows = []
    for n in range(count):
        (path / f"{n:07}").mkdir(parents=True)
        prompt = {"caption" if n % 2 else "input": f"{n:07}", "edit": f"edit {n}", "output": f"output {n}"}
        (path / f"{n:07}/prompt.json").write_text(json.dumps(prompt))
        for i, seed in enumerate(seeds):
            for k in (0, 1):
                colour = torch.tensor([0, i * 2 - 1, k * 2 - 1.])[:, None, None].expand(3, 40, 40)
                to_pil(colour).save(path / f"{n:07}/{seed}_{k}.jpg")
        rows.append([f"{n:07}", list(seeds)])
    (path / "seeds.json").write_text(json.dumps(rows))
    return path


def reverse_of(count):
    return {f"{n:07}": [{"key": f"{n:07}", "reverse_instruction": f"reverse {n}"}] for n in range(count)}


def test_the_baseline_of_instruct_pix2pix_needs_no_reverse_instruction(tmp_path):
    source = InstructPix2Pix(tree(tmp_path, 20), "train", 16, pairs=True)
    drawn = [all_of(source, epoch) for epoch in range(10)]
    batch = drawn[0]
    assert batch.captions == [f"{n:07}" for n in range(18)] and batch.reverse_instructions == [""] * 18
    assert batch.instructions == [f"edit {n}" for n in range(18)]
    assert batch.edited_captions == [f"output {n}" for n in range(18)]
    assert (batch.images[:, 2] < -0.9).all() and (batch.edited_images[:, 2] > 0.9).all()
    greens = set()
    for batch in drawn:
        pair = (images[:, 1].mean((1, 2)).round().tolist() for images in (batch.images, batch.edited_images))
        greens |= set(zip(*pair))
    assert greens == {(-1, -1), (1, 1)}                       # both seeds are drawn, the two images of a pair from one


def test_the_splits_of_instruct_pix2pix_and_the_reverse_instructions_of_the_side_file(tmp_path):
    tree(tmp_path, 40, seeds=[1])
    for split, numbers in {"train": range(36), "validation": (36, 37)}.items():
        source = InstructPix2Pix(tmp_path, split, 16, pairs=True)
        assert [item[0].name for item in source.items] == [f"{n:07}" for n in numbers]
    batch = all_of(InstructPix2Pix(tmp_path, "train", 16, side=reverse_of(5)))
    assert batch.reverse_instructions == [f"reverse {n}" for n in range(5)] and batch.edited_images is None
    for split, side in (("train", {}), ("validation", reverse_of(36))):
        with pytest.raises(ValueError, match=f"no directory for {split} of which the side file"):
            InstructPix2Pix(tmp_path, split, 16, side=side)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[["a", 1]]', "{oops", '[["0000000"]]'])
def test_bad_seeds_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "seeds.json").write_text(text)
    with pytest.raises(ValueError, match="seeds.json") as error:
        InstructPix2Pix(tmp_path, "train", 16, pairs=True)
    assert "\n" not in str(error.value)


def test_directories_that_are_not_there_are_counted_at_the_start(tmp_path, capsys):
    tree(tmp_path, 40, seeds=[1])
    for n in (3, 5, 37):
        shutil.rmtree(tmp_path / f"{n:07}")
    source = InstructPix2Pix(tmp_path, "train", 16, pairs=True)
    assert len(all_of(source).captions) == 34 and source.named == 36
    said = capsys.readouterr().out
    assert "2 of 36 directories" in said and "0000003" in said and said.count("\n") == 1
    assert [item[0].name for item in InstructPix2Pix(tmp_path, "validation", 16, pairs=True).items] == ["0000036"]


def test_a_directory_of_which_no_seed_is_named_is_a_broken_sample(tmp_path):
    tree(tmp_path, 1, seeds=[1])
    (tmp_path / "seeds.json").write_text('[["0000000", []], ["0000000", []]]')
    source = InstructPix2Pix(tmp_path, "train", 16, pairs=True)
    _, errors = source.__getitems__([(0, source.items[0])])
    assert "names no pair" in str(errors)


# ---- all of them -----------------------------------------------------------------------------------------------------

def some_source(kind, path):
    """A source of 14 samples."""
    path.mkdir()
    if kind == "mix":
        return Mix([some_source("shards", path / "a"), some_source("folder", path / "b")], [3, 1])
    if kind == "folder":
        return Folder(folder(path, 14), 16)
    if kind == "tree":
        return InstructPix2Pix(tree(path, 16), "train", 16, side=reverse_of(14))
    return Shards(some_shards(path, 5, 3, 6), 16)


KINDS = ("folder", "shards", "tree", "mix")


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_resumes_at_the_very_sample_with_any_number_of_workers(tmp_path, kind):
    source = some_source(kind, tmp_path / "data")
    whole, captions = draw(source, 16, 3)
    assert set(Counter(captions[:42]).values()) == {3} or kind == "mix"
    for first, workers in [(n, 0) for n in range(1, 16)] + [(0, 2), (7, 2)]:
        rest, order = draw(source, 16 - first, 3, first=first, workers=workers)
        assert order == captions[3 * first:]
        assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[first:]))


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_the_samples(tmp_path, kind):
    source, seen = some_source(kind, tmp_path / "data"), []
    for rank in (0, 1):
        seen.append(draw(source, 4, first=0, share=slice(rank, None, 2))[1])      # each has at least 5 of its own
        assert draw(source, 2, first=2, share=slice(rank, None, 2))[1] == seen[-1][2:]
    assert len(set(seen[0] + seen[1])) == 8 if kind != "mix" else not set(seen[0]) & set(seen[1])
    with pytest.raises(ValueError, match="too few for 20 processes"):
        draw(source, 1, share=slice(19, None, 20))


def test_a_mix_keeps_its_proportions(tmp_path):
    _, captions = draw(some_source("mix", tmp_path / "data"), 40, 10)
    assert 270 < sum(caption.startswith("0000") for caption in captions) < 330


def test_a_path_says_what_it_is(tmp_path):
    for name in ("folder", "tree"):
        (tmp_path / name).mkdir()
    assert isinstance(open_source(str(folder(tmp_path / "folder")), "train", 16), Folder)
    assert isinstance(open_source(str(tree(tmp_path / "tree", 2)), "train", 16, pairs=True), InstructPix2Pix)
    assert isinstance(open_source(some_shards(tmp_path, 2), "train", 16), Shards)
    assert isinstance(open_source("toy", "train", 32), ToyWorld) and open_source("toy:add", "train", 32).kind == "add"
    with pytest.raises(ValueError, match="elsewhere/metadata.jsonl is missing"):
        open_source("elsewhere", "train", 16)


def test_the_data_of_a_command_are_mixed_in_proportion(tmp_path, capsys):
    """A=3 B has three samples of A for one of B, in training and in validation; and so have B A=3 and A=1.5 B=0.5."""
    for name, caption in (("a", "of a"), ("b", "of b")):
        (tmp_path / name).mkdir()
        folder(tmp_path / name, 4, caption=caption)
    a, b = tmp_path / "a", tmp_path / "b"
    for sources in ([f"{a}=3", str(b)], [str(b), f"{a}=3"], [f"{a}=1.5", f"{b}=0.5"]):
        args = SimpleNamespace(data=sources, texts=None, validation=None, objective="cycle", resolution=16, seed=0)
        for source in open_data(args):
            _, captions = draw(source, 20, 10)
            assert 130 < captions.count("of a") < 170 and len(captions) == 200
    assert "validation on the training data" in capsys.readouterr().out
    args.validation, args.objective = str(b), "ip2p"
    train, validation = open_data(args)
    (batch,), captions = draw(validation, 1, 8)
    assert set(captions) == {"of b"} and batch.edited_images is not None
    assert set(draw(train, 1, 20)[1]) == {"of a", "of b"}
    assert capsys.readouterr().out == ""


# ---- what is broken --------------------------------------------------------------------------------------------------

def test_a_broken_image_is_reported_and_the_order_of_the_others_stays(tmp_path, capsys):
    keys = [f"{n:04}" for n in range(12)]
    broken = {"0003": jpeg()[:200], "0007": b"", "0008": b"<html>"}
    one_shard(tmp_path / "a.tar", {key: broken.get(key, jpeg()) for key in keys})
    source = Shards(f"{tmp_path}/a.tar", 16)
    order = [item[0][-5:-1] for _, item in islice(source.order(0, 0), 24)]
    for batch_size in (1, 4):                                 # with 1, batches that are broken as a whole
        _, captions = draw(source, 24 // batch_size, batch_size)
        assert Counter(captions).keys() == set(keys) - set(broken) and len(captions) == 24
        assert batch_size > 1 or all(a == b for a, b in zip(captions, order) if b not in broken)
        for first in range(24 // batch_size):
            assert draw(source, 24 // batch_size - first, batch_size, first=first)[1] == captions[first * batch_size:]
    err = capsys.readouterr().err
    assert all(f"{tmp_path}/a.tar '{key}': its .jpg " in err for key in broken) and "(3 of 12 samples so far)" in err


def test_more_than_one_broken_sample_in_a_hundred_stops(tmp_path):
    one_shard(tmp_path / "a.tar", {str(n): jpeg((16, 16)) if n % 75 else b"broken" for n in range(150)})
    with pytest.raises(ValueError, match="11 of 7.. samples are broken; the last is .*a.tar '(0|75)'") as error:
        draw(Shards(f"{tmp_path}/a.tar", 16), 1000)
    assert "\n" not in str(error.value)


def test_a_source_without_a_good_sample_stops(tmp_path):
    pattern = some_shards(tmp_path, 5, instruction=None)
    with pytest.raises(ValueError, match="11 of 11 samples are broken; .* no text for instruction"):
        draw(Shards(pattern, 16), 1)
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match="11 of 11 samples are broken"):
        draw(Shards(f"{tmp_path}/b.tar", 16), 1)
    write_shard(tmp_path / "c.tar", [])
    with pytest.raises(ValueError, match="has no image"):
        draw(Shards(f"{tmp_path}/c.tar", 16), 1)


@pytest.mark.parametrize("damage", ["in an image", "in a header", "before the end", "a header"])
def test_the_whole_samples_of_a_truncated_shard_are_used(tmp_path, capsys, damage):
    pattern = some_shards(tmp_path, 6)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        start, last = tar.getmember("000000004.jpg"), tar.getmember("000000005.txt")
    content = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes({
        "in an image": content[:start.offset_data + 300], "in a header": content[:start.offset + 100],
        "before the end": content[:last.offset_data + 512],
        "a header": content[:start.offset] + b"x" * 512 + content[start.offset + 512:]}[damage])
    whole = 6 if damage == "before the end" else 4
    _, captions = draw(Shards(pattern, 16), whole + 1)
    assert set(captions) == {f"00000{n:04}" for n in range(whole)}
    assert "00000.tar: unexpected end of data" in capsys.readouterr().err


def test_members_are_read_up_to_a_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "LARGEST", 500)
    one_shard(tmp_path / "a.tar", {"0": jpeg((16, 16), "WEBP"), "1": jpeg((300, 300))})
    assert set(draw(Shards(f"{tmp_path}/a.tar", 16), 8)[1]) == {"0"}
    assert "a.tar '1': its .jpg" in capsys.readouterr().err


def test_a_missing_image_is_named(tmp_path):
    path = folder(tmp_path)
    (path / "a.png").unlink()
    with pytest.raises(ValueError, match="a.png"):
        draw(Folder(path, 32), 1)
