"""The order of samples, and folders of images with their texts."""
import json
from itertools import islice

import pytest
import torch

import toy
from data import TEXTS, Folder, ToyWorld, batches
from pictures import save_png


class Numbers(torch.utils.data.Dataset):
    """A data set whose batch is the list of the indices it is asked for."""

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return list(indices)


def take(count, batch_size=4, seed=0, **options):
    return list(islice(batches(Numbers(), batch_size, seed, **options), count))


# ---- the order -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])        # 10 samples: batches end in the middle of an epoch, or span several
def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own(batch_size):
    """An index is epoch * 10 + sample."""
    order = sum(take(100 // batch_size, batch_size), [])
    epochs = [order[i:i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10 * n, 10 * n + 10)) for n, epoch in enumerate(epochs))
    assert len({tuple(index % 10 for index in epoch) for epoch in epochs}) == 10


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


# ---- the toy world -------------------------------------------------------------------------------------------------------

def test_toy_world_gives_the_samples_asked_for():
    indices = [7, 0, 3]
    batch = ToyWorld("validation", 20, seed=5).__getitems__(indices)
    edits = [toy.edit("validation", i, 5) for i in indices]
    assert torch.equal(batch.images, toy.render([e.scene for e in edits])) and batch.edited_images is None
    assert (batch.captions, batch.edited_captions) == ([e.scene.caption for e in edits], [e.edited.caption for e in edits])
    assert (batch.instructions, batch.reverse_instructions) == ([e.instruction for e in edits], [e.reverse_instruction for e in edits])


def test_toy_world_shows_the_same_in_every_epoch():
    batch = ToyWorld("train", 20, pairs=True).__getitems__([7, 27])
    assert torch.equal(*batch.images) and torch.equal(*batch.edited_images) and batch.instructions[0] == batch.instructions[1]


def test_toy_pairs_do_not_depend_on_the_batch_and_are_not_the_truth():
    world = ToyWorld("train", 20, pairs=True)
    batch = world.__getitems__([7, 0, 3])
    assert torch.equal(batch.edited_images[2], world.__getitems__([3]).edited_images[0])
    truth = toy.render([toy.edit("train", i).edited for i in (7, 0, 3)])
    assert ((batch.edited_images - truth).abs().flatten(1).mean(1) > .01).all()


# ---- folders -------------------------------------------------------------------------------------------------------------

def ramps(height, width, blue, over=60):
    """Red grows with x, green with y, both by 1 in `over` pixels: what an image shows says where it was cut out."""
    y, x = torch.meshgrid(torch.arange(height) + .5, torch.arange(width) + .5, indexing="ij")
    return torch.stack([x / over, y / over, torch.full_like(x, blue)]) * 2 - 1


def folder(path, rows=1, size=(40, 60), edited_size=None, over=60, **texts):
    """Images and metadata.jsonl with captions "sky 0", "sky 1"...; the edited image is the same ramps with more blue."""
    save_png(ramps(*size, .2, over), path / "a.png")
    save_png(ramps(*edited_size or size, .8, over), path / "b.png")
    row = {"image": "a.png", "edited_image": "b.png", "instruction": "make it red", "edited_caption": "a red sky",
           "reverse_instruction": "make it blue"}
    (path / "metadata.jsonl").write_text("".join(
        json.dumps(row | {"caption": f"sky {n}"} | texts, ensure_ascii=False) + "\n" for n in range(rows)))
    return path


def all_of(dataset):
    return dataset.__getitems__(list(range(len(dataset))))


def flipped(images):
    return images[:, 0, 10, -3] < images[:, 0, 10, 3]


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
def test_both_images_of_a_pair_get_the_same_crop_and_flip(tmp_path, size):
    batch = all_of(Folder(folder(tmp_path, 30, size), 32, pairs=True))
    assert batch.images.shape == batch.edited_images.shape == (30, 3, 32, 32)
    torch.testing.assert_close(batch.images[:, :2, 3:-3, 3:-3], batch.edited_images[:, :2, 3:-3, 3:-3], atol=.03, rtol=0)
    assert (batch.edited_images[:, 2] - batch.images[:, 2]).mean() == pytest.approx(1.2, abs=.02)
    assert 5 < flipped(batch.images).sum() < 25               # half of the time
    places = batch.images[:, :2].mean((2, 3)).round(decimals=2).unique(dim=0)
    assert len(places) > 8                                    # and cut out at different places
    assert batch.captions == [f"sky {n}" for n in range(30)] and batch.reverse_instructions == ["make it blue"] * 30


def test_pairs_of_unequal_size_are_refused(tmp_path):
    path = folder(tmp_path, edited_size=(80, 120))
    with pytest.raises(ValueError, match="a.png and b.png differ in size"):
        all_of(Folder(path, 32, pairs=True))
    assert all_of(Folder(path, 32)).edited_images is None     # where no pairs are asked for it does not matter


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (16, 24), (100, 33)])
def test_images_are_resized_by_the_short_side(tmp_path, size):
    """The crop shows the whole short side, and both directions are enlarged by the same factor."""
    images = all_of(Folder(folder(tmp_path, 4, size, over=max(size)), 32)).images
    per_pixel = min(size) / 32 / max(size) * 2                # how much a ramp grows from one pixel to the next
    for image in images:
        for slope in ((image[0, 16, 28] - image[0, 16, 4]).abs() / 24, (image[1, 28, 16] - image[1, 4, 16]).abs() / 24):
            assert slope.item() == pytest.approx(per_pixel, rel=.06)
        short = image[1, :, 16] if size[0] < size[1] else image[0, 16].sort().values
        assert short[0] < -1 + 2 * per_pixel and short[-1] > -1 + 30 * per_pixel


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("word", ["left", "Right"])
def test_no_flip_where_a_text_says_left_or_right(tmp_path, key, word):
    assert not flipped(all_of(Folder(folder(tmp_path, 20, **{key: f"the {word} boat"}), 32)).images).any()


@pytest.mark.parametrize("text", ["the boat on the left.", "left-hand side", "on the right, a boat", "the leftmost boat"])
def test_no_flip_where_left_or_right_stands_beside_punctuation(tmp_path, text):
    assert not flipped(all_of(Folder(folder(tmp_path, 20, instruction=text), 32)).images).any()


def test_words_that_contain_left_or_right_do_not_count(tmp_path):
    assert flipped(all_of(Folder(folder(tmp_path, 20, instruction="make it bright, a cleft rock"), 32)).images).any()


def test_crops_depend_on_the_seed_and_the_index_and_on_nothing_else(tmp_path):
    path = folder(tmp_path, 6)
    first = all_of(Folder(path, 32)).images
    assert torch.equal(all_of(Folder(path, 32)).images, first) and not torch.equal(all_of(Folder(path, 32, seed=1)).images, first)
    assert torch.equal(Folder(path, 32).__getitems__([4]).images[0], first[4])


def test_a_later_epoch_shows_the_same_samples_cut_out_anew(tmp_path):
    folders = Folder(folder(tmp_path, 6), 32)
    first, second = folders.__getitems__([0, 1, 2, 3, 4, 5]), folders.__getitems__([6, 7, 8, 9, 10, 11])
    assert second.captions == first.captions
    assert ((first.images - second.images).abs().flatten(1).amax(1) > .01).sum() >= 5


def test_a_text_may_hold_any_character(tmp_path):
    text = "a caf\u00e9\u2028by the sea\x85"                  # U+2028 and U+0085 end a line for str.splitlines, not for JSON
    assert all_of(Folder(folder(tmp_path, 2, instruction=text), 32)).instructions == [text] * 2


ROW = {"image": "a.png", "caption": "a", "instruction": "b", "edited_caption": "c", "reverse_instruction": "d"}


@pytest.mark.parametrize("lines, pairs, says", [
    (None, False, "metadata.jsonl is missing"),
    ([], False, "is empty"),
    ([ROW, "{oops"], False, "line 2 "), ([ROW, ROW, ROW | {"caption": None}], False, "line 3 .*caption"),
    ([ROW, ROW | {"instruction": "  "}], False, "line 2 .*instruction"), ([ROW | {"image": 3}], False, "line 1 .*image"),
    ([ROW], True, "line 1 .*edited_image"), ([ROW, [1]], False, "line 2 "), ([ROW, "", ROW], False, "line 2 "),
])
def test_a_bad_listing_is_refused_by_line(tmp_path, lines, pairs, says):
    if lines is not None:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        Folder(tmp_path, 32, pairs=pairs)
    assert "\n" not in str(error.value)


def test_a_missing_image_is_named(tmp_path):
    path = folder(tmp_path)
    (path / "a.png").unlink()
    with pytest.raises(ValueError, match="a.png"):
        all_of(Folder(path, 32))
