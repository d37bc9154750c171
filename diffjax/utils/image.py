"""Pictures: from floats to bytes, PNG files that say how they were made, and sheets of many.

A picture is uint8 (h, w, c), c 1 or 3; a network's images are float NHWC in [-1, 1].
"""

import functools
import io
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from diffjax.utils import files
from diffjax.utils.errors import UserError

Pictures = UInt8[np.ndarray, "n h w c"]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GAP = 2
VISIBLE = 112
LARGEST = 6000
TEXT_SIZE, LINE, LINES = 12, 15, 2
BACKGROUND, INK = 255, (40, 40, 40)
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "msyh.ttc",
    "msgothic.ttc",
    "Arial Unicode.ttf",
)
NO_CHARACTER = "\U0010ffff"

LAST_PART = b"\0\0\0\0IEND\xaeB`\x82"
"""How every PNG file ends, which `PngImageFile.verify` does not look at."""


def to_uint8(images: Float[Array | np.ndarray, "... h w c"]) -> UInt8[np.ndarray, "... h w c"]:
    """round(255 clip(x / 2 + 1/2, 0, 1)), halves to even, as the published pipelines round.

    Raises `UserError` where a value is not finite, since a byte for it would be a wrong picture.
    """
    scaled = np.asarray(images, np.float32) / 2 + np.float32(0.5)
    if not np.isfinite(scaled).all():
        raise UserError("a picture has values that are not finite (NaN or infinite): nothing can be shown of it")
    return np.round(scaled.clip(0, 1) * np.float32(255)).astype(np.uint8)


def from_uint8(pictures: UInt8[np.ndarray, "... h w c"]) -> Float[np.ndarray, "... h w c"]:
    """Bytes to [-1, 1]: x / 127.5 - 1."""
    return np.asarray(pictures, np.float32) / np.float32(127.5) - 1


def psnr(a: UInt8[np.ndarray, "... h w c"], b: UInt8[np.ndarray, "... h w c"]) -> Float[np.ndarray, "..."]:
    """Peak signal-to-noise ratio of pictures in dB, 10 log10(255^2 / mean (a - b)^2), one for each; equal ones
    give inf.
    """
    error = np.mean((np.asarray(a, np.float64) - b) ** 2, axis=(-3, -2, -1))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def png(picture: UInt8[np.ndarray, "h w c"], text: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a PNG file with `text` in its metadata (iTXt); the same input gives the same bytes."""
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    data = io.BytesIO()
    _pil(picture).save(data, "PNG", pnginfo=info)
    return data.getvalue()


def write_png(path: str | Path, picture: UInt8[np.ndarray, "h w c"], text: Mapping[str, str] | None = None) -> None:
    """Write `png(picture, text)`, all of it or nothing. Raises `UserError` where it cannot be written."""
    files.write_atomic(path, png(picture, text))


def read_png(path: str | Path | BinaryIO) -> tuple[UInt8[np.ndarray, "h w c"], dict[str, str]]:
    """A picture and its metadata as `write_png` wrote them."""
    with PngImageFile(path) as file:
        return _array(file), dict(file.text)


def is_whole(path: str | Path) -> bool:
    """Whether there is a PNG file that has all of its parts, each as its checksum says."""
    try:
        with PngImageFile(path) as file:
            file.verify()
        return Path(path).read_bytes().endswith(LAST_PART)
    except Exception:  # whatever the reader of a damaged file stumbles over
        return False


def sheet(pictures: Pictures, columns: int, captions: Sequence[str] = ()) -> UInt8[np.ndarray, "h w 3"]:
    """All pictures row by row with thin white gaps, each above its caption, if there are captions.

    Small pictures are enlarged by whole numbers, pixels staying squares, until they and their captions can be seen; the
    sheet's longer side stays under 6,000 pixels.
    """
    pictures = _bounded(_visible(pictures), columns)
    n, height, width = pictures.shape[:3]
    below = LINE * LINES if captions else 0
    down, right = height + below + GAP, width + GAP
    rows = -(-n // columns)
    canvas = Image.new("RGB", (columns * right - GAP, rows * down - GAP), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        x, y = i % columns * right, i // columns * down
        canvas.paste(_pil(picture), (x, y))
        if captions:
            _write(draw, captions[i], x, y + height, width)
    return _array(canvas)


def stack(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures of any size one below the other, white beside those that are narrower."""
    width = max(picture.shape[1] for picture in pictures)
    sides = [((0, 0), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.concatenate([np.pad(p, side, constant_values=BACKGROUND) for p, side in zip(pictures, sides)])


def _visible(pictures: Pictures) -> Pictures:
    factor = max(1, -(-VISIBLE // pictures.shape[2]))
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


def _bounded(pictures: Pictures, columns: int) -> Pictures:
    """The pictures, shrunk where the sheet would be too large."""
    n, height, width = pictures.shape[:3]
    scale = LARGEST / max(columns * width, -(-n // columns) * height)
    if scale >= 1:
        return pictures
    target = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.stack([_array(_pil(picture).resize(target, Image.Resampling.BOX)) for picture in pictures])


def _write(draw: ImageDraw.ImageDraw, caption: str, x: int, y: int, width: int) -> None:
    """The caption in the middle under a picture, broken into lines, what does not fit left out."""
    caption, font = _legible(caption)
    for number, line in enumerate(_lines(caption, lambda text: font.getlength(text) <= width)):
        left = x + (width - font.getlength(line)) / 2
        draw.text((round(left), y + number * LINE), line, INK, font)


def _legible(text: str) -> tuple[str, Font]:
    """The text and a font that shows it; characters that no font here shows are replaced by their names."""
    for font in _fonts():
        if all(_shows(font, character) for character in text):
            return text, font
    font = _signs()
    said = "".join(c if _shows(font, c) and unicodedata.category(c) != "Cf" else f" {_name(c)} " for c in text)
    return re.sub(r" (?=[,.;:!?])", "", " ".join(said.split())), font


def _fonts() -> Iterator[Font]:
    """Pillow's own font, which is Latin, Greek and Cyrillic; what this machine may have; the one of many signs."""
    yield from filter(None, map(_font, ("", *SYSTEM_FONTS)))
    yield _signs()


@functools.cache
def _signs() -> Font:
    """The font that comes with matplotlib, which has many signs."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", TEXT_SIZE)


@functools.cache
def _font(name: str) -> Font | None:
    try:
        return ImageFont.truetype(name, TEXT_SIZE) if name else ImageFont.load_default(TEXT_SIZE)
    except OSError:
        return None


@functools.cache
def _shows(font: Font, character: str) -> bool:
    return [*font.getmask(character)] != [*font.getmask(NO_CHARACTER)]


def _name(character: str) -> str:
    """`dog face` for a pictograph, nothing for what only changes its neighbour, else the number, U+732B."""
    kind = unicodedata.category(character)
    if kind in ("Cf", "Mn", "Me"):
        return ""
    return unicodedata.name(character, "").lower() if kind == "So" else f"U+{ord(character):04X}"


def _lines(text: str, fits) -> list[str]:
    lines, words = [], text.split()
    while words and len(lines) < LINES:
        count = max((n for n in range(1, len(words) + 1) if fits(" ".join(words[:n]))), default=1)
        last = len(lines) == LINES - 1 and count < len(words)
        lines.append(_cut(" ".join(words if last else words[:count]), fits))
        words = words[count:]
    return lines


def _cut(line: str, fits) -> str:
    if fits(line):
        return line
    return next((f"{line[:n]}..." for n in range(len(line) - 1, 0, -1) if fits(f"{line[:n]}...")), "")


def _pil(picture: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _array(picture: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    pixels = np.asarray(picture, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels
