"""edit.py as a user runs it, on the tiny random model of golden/, whose images mean nothing."""
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageCms, ImageOps

import edit
from pictures import from_pil, load_image, save_png

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/golden/model"
FAST = ["--model", str(MODEL), "--steps", "2", "--resolution", "16"]
WORDS = ["--edit", "make it snow"]


def picture(path, size=(24, 16), mode="RGB", **save):
    """A file with a random picture, the same at each call."""
    noise = torch.randint(256, (*size[::-1], 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy(), "RGBA").convert(mode).save(path, **save)
    return path


def run(source, output, *flags):
    edit.main(["--input", str(source), "--output", str(output), *FAST, *map(str, flags)])
    return output.read_bytes() if output.is_file() else None


def refuse(capsys, *argv):
    """The message of a run that must fail with one line and status 2."""
    with pytest.raises(SystemExit) as stop:
        edit.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("edit.py: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("size, mode", [
    ((37, 23), "RGB"), ((16, 41), "RGBA"), ((5, 9), "L"), ((33, 20), "P"), ((20, 20), "I;16")])
def test_the_output_is_as_large_as_the_input(tmp_path, size, mode):
    source = tmp_path / "in.png"
    if mode == "I;16":
        Image.new(mode, size, 40_000).save(source)
    else:
        picture(source, size, mode)
    run(source, tmp_path / "out.png", *WORDS)
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == size and out.mode == "RGB"


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                          # stored lying on its side
    upright = load_image(picture(tmp_path / "plain.png", (30, 20))).rot90(-1, (1, 2))
    rotated = load_image(picture(tmp_path / "exif.png", (30, 20), exif=exif))
    assert torch.equal(upright, rotated)
    run(tmp_path / "exif.png", tmp_path / "out.png", *WORDS)
    assert load_image(tmp_path / "out.png").shape == (3, 30, 20)

    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 1).all()
    Image.new("I;16", (4, 4), 65535 // 2).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").abs().max() < 0.01


def p3_profile():
    """Display P3, as phones embed it: pillow's sRGB with other primaries."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
                 b"bXYZ": (0.15710, 0.06657, 0.78407)}
    for entry in range(132, 132 + 12 * struct.unpack_from(">I", profile, 128)[0], 12):
        name, offset, _ = struct.unpack_from(">4sII", profile, entry)
        if name in primaries:
            struct.pack_into(">3i", profile, offset + 8, *(round(x * 65536) for x in primaries[name]))
    return bytes(profile)


def cmyk_profile():
    """A printer whose inks are all grey: L* falls from 100 to 0 with K, and C, M and Y do nothing."""
    ramp = bytes(range(256))
    grid = b"".join(bytes([255 * (1 - n % 2), 128, 128]) for n in range(16))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + grid + ramp * 3
    head = struct.pack(">I4sI4s4s4s12x4s28x3i48x", 144 + len(lut), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ",
                       b"acsp", 63190, 65536, 54061)
    return head + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


@pytest.mark.parametrize("mode, colour, profile, shown", [
    ("RGB", (234, 51, 35), p3_profile(), (255, 0, 0)), ("RGBA", (234, 51, 35, 255), p3_profile(), (255, 0, 0)),
    ("RGBA", (234, 51, 35, 0), p3_profile(), (255, 255, 255)), ("P", (234, 51, 35), p3_profile(), (255, 0, 0)),
    ("RGB", (120, 130, 140), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), (120, 130, 140)),
    ("CMYK", (255, 255, 255, 0), cmyk_profile(), (255, 255, 255)), ("CMYK", (0, 0, 0, 255), cmyk_profile(), (0, 0, 0)),
    # what is broken, or of another kind than the picture, is ignored
    ("RGB", (234, 51, 35), b"no profile", (234, 51, 35)), ("RGB", (234, 51, 35), p3_profile()[:300], (234, 51, 35)),
    ("RGB", (234, 51, 35), cmyk_profile(), (234, 51, 35)), ("L", 100, p3_profile(), (100, 100, 100)),
    ("CMYK", (0, 255, 255, 0), p3_profile(), (255, 0, 0)),
])
def test_colours_are_those_of_the_embedded_profile(tmp_path, mode, colour, profile, shown):
    if mode == "P":
        image = Image.new("RGB", (8, 8), colour).quantize()
    else:
        image = Image.new(mode, (8, 8), colour)
    image.save(tmp_path / "in.tif", icc_profile=profile)
    pixels = (load_image(tmp_path / "in.tif") + 1) * 127.5
    assert (pixels - torch.tensor(shown)[:, None, None]).abs().max() <= 2, pixels[:, 0, 0]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("kind, extra, turned", [
    # the second field, the resolution, is -1/0, which pillow cannot write again
    ("JPEG", struct.pack("<H", 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHII", 0x11a, 10, 1, 38)
     + bytes(4) + struct.pack("<ii", -1, 0), True),
    ("PNG", chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06"), False),
    ("PNG", chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{node}" * 400_000)), False),
    ("PNG", chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(range(256)) * 8200)), False),
])
def test_damaged_exif_and_long_texts_do_not_matter(kind, extra, turned):
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, kind)
    content, place = file.getvalue(), 33                      # behind the header of a PNG
    if kind == "JPEG":
        exif = b"Exif\0\0II*\0\x08\0\0\0" + extra
        extra, place = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif, 2
    image = load_image("in", content[:place] + extra + content[place:])
    assert image.shape == ((3, 6, 4) if turned else (3, 4, 6))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_as_pillow_turns_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = load_image(picture(tmp_path / "exif.png", (30, 20), exif=exif))
    with Image.open(tmp_path / "exif.png") as file:
        assert torch.equal(turned, from_pil(ImageOps.exif_transpose(file)))


def test_saved_images_are_read_back_exactly(tmp_path):
    image = load_image(picture(tmp_path / "a.png"))
    save_png(image, tmp_path / "b.png", {"edit": "make it ❄", "model": "caf\udce9"})
    assert torch.equal(load_image(tmp_path / "b.png"), image)
    assert Image.open(tmp_path / "b.png").text == {"edit": "make it ❄", "model": "caf\\udce9"}


@pytest.mark.parametrize("size, published, ours", [                          # (W, H), of 512
    ((512, 512), (512, 512), (512, 512)), ((1024, 768), (512, 384), (512, 384)), ((640, 427), (512, 384), (576, 384)),
    ((427, 640), (384, 512), (384, 576)), ((500, 333), (576, 384), (576, 384)), ((1920, 1080), (512, 320), (576, 320)),
    ((513, 1025), (320, 576), (320, 640)), ((300, 97), (576, 192), (576, 192)), ((98, 98), (448, 448), (512, 512))])
def test_the_longer_side_of_an_edit_is_about_the_resolution(size, published, ours):
    """The published sizes are what edit_cli.py of InstructPix2Pix and MagicBrush's script compute."""
    sd = SimpleNamespace(vae=SimpleNamespace(factor=8), unet=SimpleNamespace(down_blocks=range(4)))
    assert edit.edit_size(sd, "a photo", size[::-1], 512) == ours[::-1]
    assert edit.edit_size(sd, "a photo", size[::-1], 512, math.floor) == published[::-1]


def test_one_command_has_one_result_and_says_its_settings(tmp_path, capsys):
    source = picture(tmp_path / "in.png")
    first = run(source, tmp_path / "a.png", *WORDS)
    said = capsys.readouterr()
    assert first == run(source, tmp_path / "b.png", *WORDS)
    seen = [load_image(source), load_image(tmp_path / "a.png")]
    for flags in ((), ("--seed", 1), ("--steps", 3), ("--cfg-text", 2), ("--cfg-image", 3), ("--resolution", 32)):
        run(source, tmp_path / "c.png", "--edit", "make it rain", *flags)
        image = load_image(tmp_path / "c.png")
        assert not any(torch.equal(image, other) for other in seen), flags
        seen.append(image)
    for setting in ("seed 0", "steps 2", "cfg_text 7.5", "cfg_image 1.5", "device cpu", "precision fp32", "24x16"):
        assert setting in said.out
    assert str(MODEL) in said.out
    assert "Loading" not in said.err
    assert Image.open(tmp_path / "a.png").text | {"model": ""} == {
        "model": "", "device": "cpu", "precision": "fp32", "seed": "0", "steps": "2", "cfg_text": "7.5",
        "cfg_image": "1.5", "resolution": "16", "edit": "make it snow"}


def test_several_edits_are_single_runs_in_turn(tmp_path):
    source = picture(tmp_path / "in.png", (37, 23))
    run(source, tmp_path / "1.png", *WORDS)
    run(tmp_path / "1.png", tmp_path / "2.png", "--edit", "add a dog")
    run(source, tmp_path / "both.png", *WORDS, "--edit", "add a dog")
    first, second, both = (load_image(tmp_path / f"{name}.png") for name in ("1", "2", "both"))
    assert torch.equal(second, both) and not torch.equal(first, both)


def test_a_folder_is_edited_image_by_image(tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("a.png", (24, 16)), ("b.jpg", (24, 16)), ("c.webp", (16, 31))):
        picture(tmp_path / "in" / name, size)
    (tmp_path / "in/notes.txt").write_text("no image")
    run(tmp_path / "in", tmp_path / "out", *WORDS, "--reverse", "remove the snow")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "a-cycle.png", "a.png", "b-cycle.png", "b.png", "c-cycle.png", "c.png"]
    for name in ("a.png", "b.jpg", "c.webp"):                 # as alone, up to the rounding of a larger batch
        run(tmp_path / "in" / name, tmp_path / "alone.png", *WORDS)
        together = load_image((tmp_path / "out" / name).with_suffix(".png"))
        assert (together - load_image(tmp_path / "alone.png")).abs().max() <= 2.1 / 255


def test_a_folder_as_people_have_it(tmp_path, capsys):
    """What pillow reads is edited, whatever its name; what it does not is counted; broken images stop no others."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, kind in (("a.jfif", "JPEG"), ("b.AVIF", "AVIF"), ("c.jp2", "JPEG2000"), ("d.jpe", "JPEG")):
        picture(source / name, format=kind)
    picture(tmp_path / "e.png")
    shutil.move(tmp_path / "e.png", os.fsencode(source) + b"/caf\xe9.png")      # no UTF-8
    for name in ("._a.jfif", ".hidden.png", "notes.txt", "1.HEIC", "2.heic"):
        (source / name).write_bytes(b"\0\5\x16\7")
    run(source, output, *WORDS)                               # ends without a status
    assert sorted(os.listdir(os.fsencode(output))) == [b"a.png", b"b.png", b"c.png", b"caf\xe9.png", b"d.png"]
    said = capsys.readouterr().out
    assert "(save HEIC as JPEG): 2 .heic, 1 .txt" in said and "caf\\udce9.png" in said

    (source / "b.AVIF").write_bytes((source / "a.jfif").read_bytes()[:500])
    picture(source / "c.jp2", (1, 600), format="PNG")         # too long for an edit
    shutil.rmtree(output)
    with pytest.raises(SystemExit) as stop:
        run(source, output, *WORDS)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.endswith("edit.py: error: 2 of 5 images are broken, see above\n")
    assert "skipped " in said and "b.AVIF cannot be read" in said and "c.jp2, of 1x600" in said
    assert sorted(os.listdir(os.fsencode(output))) == [b"a.png", b"caf\xe9.png", b"d.png"]


def test_heic_is_told_to_be_saved_as_jpeg(tmp_path, capsys):
    (tmp_path / "1.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    for source in (tmp_path / "1.heic", tmp_path):
        error = refuse(capsys, "--input", source, "--output", tmp_path / "out.png", *FAST, *WORDS)
        assert "JPEG" in error and "damaged" not in error


def test_no_picture_starts_another_program(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ghostscript.eps")
    shutil.copy(tmp_path / "ghostscript.eps", tmp_path / "photo.jpg")
    for name in ("ghostscript.eps", "photo.jpg"):
        with pytest.raises(ValueError, match="is not an image"):
            load_image(tmp_path / name)


def test_reverse_draws_the_cycle_and_does_not_change_the_edit(tmp_path):
    source = picture(tmp_path / "in.png")
    turns = *WORDS, "--edit", "add a dog"
    run(source, tmp_path / "plain.png", *turns)
    run(source, tmp_path / "out.png", *turns, "--reverse", "remove the snow", "--reverse", "remove the dog")
    assert torch.equal(load_image(tmp_path / "plain.png"), load_image(tmp_path / "out.png"))
    one = run(source, tmp_path / "one.png", *WORDS, "--reverse", "remove the snow")
    assert one
    with Image.open(tmp_path / "out-cycle.png") as two_rows, Image.open(tmp_path / "one-cycle.png") as one_row:
        assert two_rows.width == one_row.width > 5 * 100 and two_rows.height > one_row.height + 64


def test_without_arguments_the_demo_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/demo.png.tmp-0123abcd").touch()      # of a demo that was killed
    edit.main(FAST)
    assert "outputs/demo.png" in capsys.readouterr().out and os.listdir("outputs") == ["demo.png"]
    with Image.open("outputs/demo.png") as sheet:
        assert sheet.width > 6 * 100 and sheet.height > 8 * 100


def test_the_models_recommendations_are_defaults(tmp_path, capsys):
    source, model = picture(tmp_path / "in.png"), shutil.copytree(MODEL, tmp_path / "model")
    files = ["--input", source, "--output", tmp_path / "out.png", *WORDS, "--model", model]
    (model / "edit_defaults.json").write_text(json.dumps({"steps": 3, "text_guidance": 2, "resolution": 24}))
    edit.main([*map(str, files), "--steps", "1"])
    assert "steps 1, cfg_text 2.0, cfg_image 1.5, resolution 24" in capsys.readouterr().out
    for wrong, word in (({"steps": "many"}, "many"), ({"speed": 3}, "speed"), ({"steps": 2.5}, "2.5"),
                        ({"steps": 0}, "steps = 0"), ({"steps": 1000}, "steps = 1000"),
                        ({"text_guidance": float("nan")}, "text_guidance = nan"), ({"resolution": 8}, "= 8"),
                        ({"image_guidance": 1e308}, "image_guidance = 1e+308"), ({"text_guidance": -1}, "= -1")):
        (model / "edit_defaults.json").write_text(json.dumps(wrong))
        assert word in refuse(capsys, *files)


def test_what_is_cut_of_a_long_instruction_is_said(tmp_path, capsys):
    run(picture(tmp_path / "in.png"), tmp_path / "out.png", "--edit", "a " * 75 + "dog")
    assert "'dog'" in capsys.readouterr().err
    run(tmp_path / "in.png", tmp_path / "out.png", "--edit", "a " * 75)
    assert "warning" not in capsys.readouterr().err


def bad_models(folder):
    """(directory, a word of the message) of models that cannot be used."""
    def copy(name):
        return shutil.copytree(MODEL, folder / name)
    (folder / "empty").mkdir()
    yield folder / "empty", "config.json"
    yield folder / "absent/of/here", "neither"
    (copy("incomplete") / "vae/diffusion_pytorch_model.safetensors").unlink()
    yield folder / "incomplete", "vae"
    weights = copy("truncated") / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    yield folder / "truncated", "unet"
    weights = copy("pickle") / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    yield folder / "pickle", "pickle"
    config = copy("shape") / "unet/config.json"
    config.write_text(config.read_text().replace("16,", "24,"))
    yield folder / "shape", "unet"
    shutil.rmtree(copy("wordless") / "tokenizer")
    yield folder / "wordless", "tokenizer"
    yield edit.TOY + "/text2image", "text-to-image"            # which would not look at the image


def test_bad_models_are_refused(tmp_path, capsys):
    files = "--input", picture(tmp_path / "in.png"), "--output", tmp_path / "out.png", *WORDS
    for model, word in bad_models(tmp_path):
        assert word in refuse(capsys, *files, "--model", model)
    assert not (tmp_path / "out.png").exists()


def test_bad_images_are_refused(tmp_path, capsys):
    good = picture(tmp_path / "good.png", (64, 64))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1")
    for suffix in ("png", "jpg"):
        whole = picture(tmp_path / f"whole.{suffix}", (64, 64)).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[:len(whole) // 2])
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    Image.new("1", (20000, 8000)).save(tmp_path / "bigger.png")
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")
    picture(tmp_path / "long.png", (1, 600))
    for name, word in (("absent.png", "missing"), ("empty.png", "empty"), ("text.png", "not an image"),
                       ("pointer.png", "git lfs pull"),
                       ("cut.png", "cut.png"), ("cut.jpg", "truncated"), ("bomb.png", "64,000,000"),
                       ("bigger.png", "64,000,000"),
                       ("float.tif", "16 bits"), ("long.png", "long.png, of 1x600")):
        assert word in refuse(capsys, "--input", tmp_path / name, "--output", tmp_path / "out.png", *FAST, *WORDS)
    for name, other in (("loop.png", "pool.png"), ("pool.png", "loop.png")):
        (tmp_path / name).symlink_to(other)
    assert "is missing" in refuse(capsys, "--input", tmp_path / "loop.png", "--output", tmp_path / "out.png", *WORDS)
    (tmp_path / "folder").mkdir()
    shutil.copy(good, tmp_path / "folder/a.png")
    shutil.copy(good, tmp_path / "folder/a.bmp")
    assert "one name" in refuse(capsys, "--input", tmp_path / "folder", "--output", tmp_path / "out", *FAST, *WORDS)
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "out").exists()


def test_bad_arguments_are_refused(tmp_path, capsys):
    source, output, folder = picture(tmp_path / "in.png"), tmp_path / "out.png", tmp_path / "folder"
    folder.mkdir()
    good = "--input", source, "--output", output, *WORDS, *FAST
    for flag in ("--steps", "--cfg-text", "--cfg-image", "--resolution", "--seed"):
        for value in ("nan", "inf", "-1", "many", ""):
            assert flag in refuse(capsys, *good, f"{flag}={value}")
    for flags, word in ((("--steps", 0), "--steps"), (("--steps", 2.5), "--steps"), (("--steps", 1000), "--steps"),
                        (("--resolution", 15), "2048"), (("--resolution", 4000), "2048"),
                        (("--device", "abacus"), "abacus"), (("--device", "meta"), "meta"),
                        (("--precision", "fp8"), "fp8"),
                        (("--edit", " "), "empty"), (("--edit", "\udcff"), "codec"), (("--fast",), "--fast"),
                        (("--reverse", "a", "--reverse", "b"), "2 --reverse for 1 --edit"),
                        (("--reverse", ""), "empty"), (("--output=",), "--output= is empty"),
                        (("--output", tmp_path / "out.gif"), ".png"), (("--output", folder), ".png"),
                        (("--output", tmp_path / "no/out.png"), "cannot write"), (("--output", source), "overwrite"),
                        (("--output", folder / "../in.png"), "overwrite"),
                        (("--input", folder, "--output", folder), "holds no image"),
                        (("--input", tmp_path, "--output", tmp_path), "overwrite"),
                        (("--input", tmp_path, "--output", source), "is a file")):
        assert word in refuse(capsys, *good, *flags)
    for missing in ("--input", "--output", "--edit"):
        given = {"--input": source, "--output": output, "--edit": "make it snow"}
        del given[missing]
        assert f"{missing} is missing" in refuse(capsys, *FAST, *[word for pair in given.items() for word in pair])
    picture(tmp_path / "a-cycle.png")
    assert "a-cycle.png" in refuse(capsys, "--input", tmp_path / "a-cycle.png", "--output", tmp_path / "a.png",
                                   *FAST, *WORDS, "--reverse", "melt it")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a-cycle.png", "folder", "in.png"]


@pytest.mark.parametrize("precision, advised", [("fp32", False), ("bf16", True)])
def test_a_model_without_numbers_is_said_with_advice_that_helps(tmp_path, capsys, monkeypatch, precision, advised):
    monkeypatch.setattr(edit.EditModel, "edit", lambda self, images, *_, **__: images * torch.nan)
    with pytest.raises(SystemExit):
        run(picture(tmp_path / "in.png"), tmp_path / "out.png", *WORDS, "--precision", precision)
    error = capsys.readouterr().err
    assert "no numbers (NaN)" in error and ("--precision fp32" in error) == advised


def test_as_a_program(tmp_path):
    def program(*argv):
        return subprocess.run([sys.executable, ROOT / "edit.py", *argv], cwd=tmp_path, capture_output=True, text=True)
    picture(tmp_path / "in.png", (17, 29))
    done = program("--input", "in.png", "--output", "out.png", *WORDS, *FAST, "--precision", "bf16")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "out.png", done.stderr
    assert load_image(tmp_path / "out.png").shape == (3, 29, 17)
    failed = program("--input", "absent.png", "--output", "no.png", *WORDS)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "edit.py: error: absent.png is missing, or not a file\n"
