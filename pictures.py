"""Images from and to files, and pictures to look at: figure 3 of the paper, grids, curves.

An image is a tensor (3, H, W) in [-1, 1]; a picture is a pillow image.
"""
import io
import math
import textwrap
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import (ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin,
                 UnidentifiedImageError)

from cli import check_readable, replace_file

MAX_PIXELS = 64_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2       # pillow refuses what has more than twice its maximum
warnings.filterwarnings("ignore", module="PIL")        # about files that viewers show, too
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26        # bytes; some programs keep whole workflows there
Image.init()
Image.ID.remove("EPS")                         # another program, Ghostscript, would draw it
del Image.OPEN["EPS"]
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}     # EXIF's orientation -> Image.Transpose
SRGB = ImageCms.createProfile("sRGB")

SMALLEST, LARGEST = 128, 512                   # pixels of the longer side of a grid's cells
TEXT, GREY, RED, GAP = 13, (110, 110, 110), (200, 60, 30), 8
FONT = ImageFont.load_default(TEXT)
HEAT = torch.tensor([(20, 11, 53), (101, 21, 110), (188, 55, 84),     # from dark to bright yellow
                     (249, 142, 9), (252, 255, 164)]) / 255


# ---- files ------------------------------------------------------------------------------------

def load_image(path, data=None):
    """An image file, or its bytes `data` -> (3, H, W) in [-1, 1], upright, in sRGB, and white where
    it is transparent.  ValueError, in one line, if it is missing, damaged, too large, or no image.
    """
    if data is None:
        check_readable(path)
    stream = open(path, "rb") if data is None else io.BytesIO(data)
    with stream as file:
        start = file.read(12)
        if not start:
            raise ValueError(f"{path} is empty")
        try:
            picture = Image.open(file)
            picture.load()
            return from_pil(over_white(upright(picture)))
        except UnidentifiedImageError:
            problem = "is not an image, or damaged at its beginning"
            if start[4:8] == b"ftyp":          # how HEIC begins, and so do videos
                problem = "is HEIC or a video, which pillow does not read: save it as JPEG"
        except Image.DecompressionBombError:
            problem = f"has more than {MAX_PIXELS:,} pixels; scale it down"
        except Exception as error:             # on damaged files, pillow raises many kinds
            problem = f"cannot be read as an image: {error}"
        raise ValueError(f"{path} {problem}")

def upright(picture):
    """Turns a picture as its EXIF says.  Nothing else is read of EXIF, which is often damaged."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:                          # viewers, too, show such a picture as it is stored
        orientation = None
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture

def over_white(picture):
    """A picture of any mode -> RGB in sRGB, over white."""
    if picture.mode == "F":
        raise ValueError("floating-point values have no range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):           # 16-bit grey, which convert("RGB") clips at 255
        picture = picture.convert("I").point(lambda grey: grey * (1 / 257) + 0.5).convert("L")
    colours = to_srgb(picture)
    if picture.has_transparency_data:
        colours.putalpha(picture.convert("RGBA").getchannel("A"))
        colours = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), colours)
    return colours

def to_srgb(picture):
    """Its colours as sRGB has them.  Without its profile, a phone's red would become paler.  A
    profile that is broken, or of another kind than the picture, is ignored, as viewers do."""
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")
    with suppress(KeyError, OSError, TypeError, ImageCms.PyCMSError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        return ImageCms.profileToProfile(picture.convert(mode), profile, SRGB, outputMode="RGB")
    return picture.convert("RGB")

def from_pil(picture):
    pixels = torch.tensor(numpy.asarray(picture.convert("RGB")))  # (H, W, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1

def to_pil(image):
    pixels = (image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    pixels = pixels.round().byte().permute(1, 2, 0).contiguous()  # (H, W, 3)
    return Image.fromarray(pixels.numpy())

def save_png(image, path, text=None):
    """Writes an image or a picture, whole or not at all, with text chunks {keyword: value}."""
    picture = to_pil(image) if isinstance(image, torch.Tensor) else image
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        # A name of a file may have bytes that are no UTF-8.
        chunks.add_text(key, str(value).encode(errors="backslashreplace").decode())
    replace_file(Path(path), lambda file: picture.save(file, "PNG", pnginfo=chunks))

def find_images(folder):
    """The images of a folder that pillow reads.  What else it holds is counted and named, but for
    hidden files: macOS writes ._NAME, which is no image, beside each NAME on foreign disks."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in known]
    suffixes = Counter(file.suffix.lower() or "without a suffix" for file in files)
    others = [f"{count} {suffix}" for suffix, count in suffixes.items() if suffix not in known]
    if not images:
        raise ValueError(f"{folder} holds no image that pillow reads (save HEIC as JPEG)")
    if others:
        print(f"{folder}: left out is what pillow does not read (save HEIC as JPEG): "
              f"{', '.join(others)}")
    return images


# ---- pictures ---------------------------------------------------------------------------------

def overlay(image, heat):
    """A map `heat` (h, w) in [0, 1], in colours over the greyed image (3, H, W) -> (3, H, W)."""
    heat = heat.detach().float().cpu()[None, None]
    heat = F.interpolate(heat, image.shape[1:], mode="bilinear")[0, 0].clamp(0, 1)
    step = heat * (len(HEAT) - 1)
    low = step.long().clamp(max=len(HEAT) - 2)
    colour = torch.lerp(HEAT[low], HEAT[low + 1], (step - low)[..., None])    # (H, W, 3) in [0, 1]
    grey = image.detach().float().cpu().mean(0)
    return 0.25 * grey + 0.75 * (2 * colour.permute(2, 0, 1) - 1)

def figure3(images, edited, reconstructed, A_f, A_r, labels, true=None):
    """Figure 3 of the paper, a row for each image; in the toy world also the true edit."""
    columns = {"input": images, "edit": edited, "reconstruction": reconstructed,
               "A_f": map(overlay, images, A_f), "A_r": map(overlay, edited, A_r)}
    if true is not None:
        columns["true edit"] = true
    return grid(list(zip(*columns.values())), list(columns), labels)

def grid(rows, columns, labels=None):
    """Rows of images, the titles of their columns, a line of text under each row -> a picture."""
    def cell(image):                           # enlarged so that pixels stay visible, or reduced
        picture = to_pil(image)
        picture = ImageOps.scale(picture, math.ceil(SMALLEST / max(picture.size)), Image.NEAREST)
        picture.thumbnail((LARGEST, LARGEST), Image.LANCZOS)
        return picture

    # ---- sizes
    cells = [[cell(image) for image in row] for row in rows]
    lefts, tops = [GAP], [TEXT + 2 * GAP]      # of each cell, and where the next one would be
    for i, title in enumerate(columns):
        width = max(round(FONT.getlength(title)), *(row[i].width for row in cells))
        lefts.append(lefts[-1] + width + GAP)
    letters = int(lefts[-1] / (0.55 * TEXT))   # in a line
    texts = [textwrap.wrap(label, letters) for label in labels or [""] * len(rows)]
    heights = [max(picture.height for picture in row) for row in cells]
    for height, lines in zip(heights, texts):
        tops.append(tops[-1] + height + len(lines) * (TEXT + 5) + GAP)

    # ---- drawing
    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, columns):
        draw.text((left, GAP / 2), title, "black", FONT)
    for row, height, lines, top in zip(cells, heights, texts, tops):
        for left, picture in zip(lefts, row):
            sheet.paste(picture, (left, top))
        draw.text((GAP, top + height + 1), "\n".join(lines), GREY, FONT)
    return sheet

def curves(columns):
    """{name: [(x, y), ...]} -> a picture with a small plot of each, three in a row."""
    width, height, margin = 300, 160, 70       # pixels of a plot, and what is left of it
    right, down = width + margin + 24, height + 48
    size = right * min(3, len(columns)), down * math.ceil(len(columns) / 3)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, points) in enumerate(columns.items()):
        left, top = i % 3 * right + margin, i // 3 * down + 24
        draw.text((left, top - 3), name, "black", FONT, anchor="lb")
        draw.rectangle((left, top, left + width, top + height), outline=GREY)
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if not points:
            continue
        (x0, x1), (y0, y1) = [(min(values), max(values)) for values in zip(*points)]
        per_x, per_y = width / (x1 - x0 or 1), height / (y1 - y0 or 1)
        draw.line([(left + (x - x0) * per_x, top + (y1 - y) * per_y) for x, y in points], RED, 2)
        for x, y, value, anchor in ((0, height + 4, x0, "lt"), (width, height + 4, x1, "rt"),
                                    (-4, height, y0, "rb"), (-4, 0, y1, "rt")):
            draw.text((left + x, top + y), f"{value:.4g}", GREY, FONT, anchor=anchor)
    return sheet
