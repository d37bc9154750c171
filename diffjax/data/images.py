"""From the bytes of a picture file to the square array a network reads."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from diffjax.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened, whatever a file is called: PIL knows more, some of which call other programs."""


def colour(background: str) -> tuple[int, int, int]:
    """(red, green, blue) of a CSS colour, each 0 to 255."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f'data.background="{background}" is no colour; write a name or "#rrggbb"') from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits; PIL's own conversion would clip them."""
    if picture.mode not in ("I", "I;16", "I;16L", "I;16B"):
        return picture
    return Image.fromarray((np.asarray(picture, np.int64).clip(0, 65535) // 257).astype(np.uint8))


def flatten(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture turned as its EXIF tag says, in RGB or grey, its transparent parts in the background colour."""
    picture = _eight_bits(ImageOps.exif_transpose(picture))
    if picture.has_transparency_data:
        canvas = Image.new("RGBA", picture.size, (*background, 255))
        return Image.alpha_composite(canvas, picture.convert("RGBA")).convert("RGB")
    return picture if picture.mode == "L" else picture.convert("RGB")


def shrink(picture: Image.Image, size: int) -> Image.Image:
    """The picture with its shorter side resized to `size`, antialiased, aspect ratio kept."""
    width, height = picture.size
    shorter = min(width, height)
    if shorter == size:
        return picture
    target = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
    return picture.resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0)


def open_picture(data: bytes, size: int) -> Image.Image:
    """The opened file; a JPEG is decoded at a half, a quarter or an eighth where that is still `size` or more.

    Raises `OSError` for bytes that are no picture.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise OSError("no picture in any known format") from error
    picture.draft(None, (size, size))
    return picture


def decode(
    data: bytes,
    size: int,
    *,
    channels: int = 3,
    background: tuple[int, int, int] = (255, 255, 255),
    at: tuple[float, float] = (0.5, 0.5),
    enlarge: bool = False,
) -> UInt8[np.ndarray, "{size} {size} {channels}"]:
    """The picture as a square: shorter side resized to `size`, then cropped at the position `at`.

    `at` is (down, right), each 0 to 1; (0.5, 0.5) is the middle. Raises `UserError` for a picture smaller than `size`
    unless `enlarge`, and whatever PIL raises for bytes that it cannot read.
    """
    picture = open_picture(data, size)
    check_size(picture.size, size, enlarge)
    picture = shrink(flatten(picture, background), size)
    left = round(at[1] * (picture.width - size))
    top = round(at[0] * (picture.height - size))
    picture = picture.crop((left, top, left + size, top + size)).convert("RGB" if channels == 3 else "L")
    return np.asarray(picture, np.uint8).reshape(size, size, channels)


def check_size(found: tuple[int, int], size: int, enlarge: bool, of: str = "a picture") -> None:
    """Raises `UserError` when the shorter side of `found` (width, height) is below `size` and `enlarge` is False."""
    if min(found) < size and not enlarge:
        raise UserError(
            f"{of} is {found[0]} x {found[1]} pixels, smaller than data.size={size}; "
            "lower data.size, leave it out, or set data.enlarge=True"
        )
