"""Images from and to files, and pictures to look at: attention overlays, grids of images, curves.

An image is a tensor (3, H, W) in [-1, 1]; a picture is a pillow image.
"""
import io
import math
import os
import textwrap
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

MAX_PIXELS = 64_000_000
# pillow refuses what has more than twice this number of pixels, and warns, which would be no news, from once
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

SMALLEST, LARGEST = 128, 512                                  # pixels of a grid's cells, their longer side
TEXT, GREY, GAP = 13, (110, 110, 110), 8
FONT = ImageFont.load_default(TEXT)
COLOURS = ((200, 60, 30), (30, 90, 180), (20, 130, 70), (150, 60, 160), (190, 130, 0), (80, 80, 80), (0, 140, 150))
HEAT = torch.tensor([(20, 11, 53), (101, 21, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]) / 255  # as 'inferno'


def load_image(path, data=None):
    """An image file of any kind, or its bytes `data`, which `path` then only names -> (3, H, W) in [-1, 1], upright as its
    EXIF data says, transparency over white.  ValueError, in one line, for what is missing, damaged, larger than MAX_PIXELS,
    or no image."""
    path = Path(path)
    if data is None and not path.is_file():
        raise ValueError(f"{path}: there is no such image file")
    if data == b"" or data is None and not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has 0 bytes")
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as file:
            picture = ImageOps.exif_transpose(file)           # decodes it whole
        if picture.mode == "F":
            raise ValueError("its floating-point values have no known range; save it with 8 or 16 bits")
        if picture.mode.startswith("I"):                      # 16-bit grey, which convert("RGB") would clip at 255
            picture = picture.convert("I").point(lambda value: value * (1 / 257) + .5).convert("L")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return from_pil(picture)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image, or damaged at its beginning") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:                                # on damaged files, pillow's decoders raise all sorts
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def from_pil(picture):
    picture = picture.convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1) / 127.5 - 1


def to_pil(image):
    pixels = (image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    pixels = pixels.round().byte().permute(1, 2, 0).contiguous()                              # (H, W, 3)
    return Image.fromarray(pixels.numpy())


def save_png(image, path, text=None):
    """Writes an image or a picture, with the text chunks {keyword: value}, under a temporary name first."""
    picture = to_pil(image) if isinstance(image, torch.Tensor) else image
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, str(value))
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        picture.save(temporary, "PNG", pnginfo=chunks)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def overlay(image, heat):
    """A map `heat` (h, w) in [0, 1], stretched over the greyed image (3, H, W) -> (3, H, W): dark 0, bright yellow 1."""
    heat = F.interpolate(heat.detach().float().cpu()[None, None], image.shape[1:], mode="bilinear")[0, 0].clamp(0, 1)
    step = heat * (len(HEAT) - 1)
    low = step.long().clamp(max=len(HEAT) - 2)
    colour = torch.lerp(HEAT[low], HEAT[low + 1], (step - low)[..., None]).permute(2, 0, 1)       # (3, H, W) in [0, 1]
    return .25 * image.detach().float().cpu().mean(0) + .75 * (2 * colour - 1)


def grid(rows, columns, labels=None):
    """Rows, each a list of images, one a column; the columns' titles; a line of text under each row -> a picture.
    Small images are enlarged without smoothing, so that a toy scene's pixels are seen, and large ones reduced."""
    def cell(image):
        picture = to_pil(image)
        picture = ImageOps.scale(picture, math.ceil(SMALLEST / max(picture.size)), Image.Resampling.NEAREST)
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        return picture
    cells = [[cell(image) for image in row] for row in rows]
    widths = [max([round(FONT.getlength(title)), *(row[i].width for row in cells)]) for i, title in enumerate(columns)]
    width = sum(widths) + GAP * (len(widths) + 1)
    labels = ["\n".join(textwrap.wrap(label, int(width / (.55 * TEXT)))) for label in labels or [""] * len(rows)]
    heights = [max(c.height for c in row) + (label.count("\n") + 1) * (TEXT + 5) * bool(label) + GAP
               for row, label in zip(cells, labels)]
    sheet = Image.new("RGB", (width, TEXT + 2 * GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [GAP * (i + 1) + sum(widths[:i]) for i in range(len(widths))]
    for left, title in zip(lefts, columns):
        draw.text((left, GAP / 2), title, "black", FONT)
    top = TEXT + 2 * GAP
    for row, label, height in zip(cells, labels, heights):
        for left, picture in zip(lefts, row):
            sheet.paste(picture, (left, top))
        draw.text((GAP, top + max(c.height for c in row) + 1), label, GREY, FONT)
        top += height
    return sheet


def curves(columns, path, size=(300, 160), margin=(70, 24)):
    """Draws {name: [(x, y), ...]} as one small plot a name, three in a row, the ends of its axes labelled, into a PNG."""
    panel, across = (size[0] + margin[0] + margin[1], size[1] + 2 * margin[1]), min(3, len(columns))
    sheet = Image.new("RGB", (panel[0] * across, panel[1] * math.ceil(len(columns) / across)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, points) in enumerate(columns.items()):
        left, top = i % across * panel[0] + margin[0], i // across * panel[1] + margin[1]
        right, bottom = left + size[0], top + size[1]
        draw.text((left, top - 3), name, "black", FONT, anchor="lb")
        draw.rectangle((left, top, right, bottom), outline=GREY)
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if not points:
            continue
        (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points))
        draw.line([(left + (x - x0) / (x1 - x0 or 1) * size[0], bottom - (y - y0) / (y1 - y0 or 1) * size[1])
                   for x, y in points], (200, 60, 30), 2)
        for x, y, value, anchor in ((left, bottom + 4, x0, "lt"), (right, bottom + 4, x1, "rt"),
                                    (left - 4, bottom, y0, "rb"), (left - 4, top, y1, "rt")):
            draw.text((x, y), f"{value:.4g}", GREY, FONT, anchor=anchor)
    save_png(sheet, path)


def plot(measured, published, axes, size=(560, 400), margin=60):
    """One plot of {name: [(x, y), ...]}: measured lines with dots, published ones thin with rings; axes: (of x, of y)."""
    points = [point for lines in (measured, published) for line in lines.values() for point in line]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points))
    def place(x, y):
        return margin + (x - x0) / (x1 - x0 or 1) * size[0], margin + (y1 - y) / (y1 - y0 or 1) * size[1]
    names = [*measured, *published]
    sheet = Image.new("RGB", (size[0] + 2 * margin, size[1] + 2 * margin + (TEXT + 5) * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((margin - 10, margin - 10, margin + size[0] + 10, margin + size[1] + 10), outline=GREY)
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        draw.text((place(x, y)[0], margin + size[1] + 14), f"{x:.3f}", GREY, FONT, anchor="mt")
        draw.text((margin - 14, place(x, y)[1]), f"{y:.2f}", GREY, FONT, anchor="rm")
    draw.text((margin + size[0] / 2, margin + size[1] + 32), axes[0], "black", FONT, anchor="mt")
    draw.text((margin - 10, margin - 16), axes[1], "black", FONT, anchor="lb")
    for i, (name, line) in enumerate((measured | published).items()):
        colour, thin, top = COLOURS[i % len(COLOURS)], name in published, 2 * margin + size[1] + (TEXT + 5) * i
        draw.line([place(*point) for point in line], colour, 1 if thin else 3)
        for x, y in [place(*point) for point in line] + [(margin, top)]:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), "white" if thin else colour, colour)
        draw.text((margin + 12, top), name, colour, FONT, anchor="lm")
    return sheet
