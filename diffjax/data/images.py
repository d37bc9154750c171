"""From the bytes of a picture file to the square array a network reads."""

import contextlib
import functools
import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageColor, ImageOps, JpegImagePlugin, UnidentifiedImageError

from diffjax.utils.errors import UserError

SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .avif .avifs .jp2 .j2k .jpx .pbm .pgm .ppm .pnm "
    ".pfm .heic .heif .hif .jxl .ico .tga .psd .svg .exr .hdr .dng .cr2 .cr3 .nef .arw .orf .raf .rw2".split()
)
"""How the names of pictures end, also of those in formats that are not read: these are left out by name."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is opened, whatever a file is called: PIL knows more, some of which call other programs."""

READ = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or PPM"
"""The same in words."""

HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SCALED_TO_16_BITS = ("PNG", "PPM")
GREY = ("1", "L", "LA", "La")
PNG = b"\x89PNG\r\n\x1a\n"
MOST_PIXELS = 178_000_000
"""What is decoded at most; a larger JPEG is decoded at a half, a quarter or an eighth."""

warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is an error, or nothing


def colour(background: str) -> tuple[int, int, int]:
    """(red, green, blue) of a CSS colour, each 0 to 255."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f'data.background="{background}" is no colour; write a name or "#rrggbb"') from error


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this PIL was built with, and HEIF where the package pillow-heif is installed."""
    Image.init()
    found = tuple(name for name in FORMATS if name in Image.OPEN)
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]  no extra installs it
    except ImportError:
        return found
    pillow_heif.register_heif_opener()
    return (*found, "HEIF")


def looks_like_picture(head: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of a picture in one of `FORMATS`, or HEIF."""
    if head.startswith(
        (PNG, b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
    ):
        return True
    boxed = head[4:12] in (b"ftypavif", b"ftypavis", *(b"ftyp" + kind for kind in HEIF))
    named = (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or (head[:2] == b"BM" and head[6:10] == bytes(4))
    return boxed or named or re.match(rb"P[1-6f]\s+[\d#]", head, re.IGNORECASE) is not None


def _without_text(data: bytes) -> bytes:
    """A PNG without its texts, of which PIL reads only so much and then refuses the picture."""
    if not data.startswith(PNG):
        return data
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def open_picture(data: bytes, size: int) -> Image.Image:
    """The opened file; a JPEG is decoded at a half, a quarter or an eighth where that is still `size` or more.

    Raises `OSError` for bytes that are no picture, or one of more than `MOST_PIXELS`.
    """
    if not data:
        raise OSError("the file is empty")
    try:
        picture = Image.open(io.BytesIO(_without_text(data)), formats=formats())
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:12] in HEIF:
            raise OSError("HEIF is read once pillow-heif is installed: pip install pillow-heif") from error
        raise OSError("no picture in any known format") from error
    except Image.DecompressionBombError as error:
        if not data.startswith(b"\xff\xd8"):
            raise OSError(f"has more than {MOST_PIXELS // 10**6} million pixels: make it smaller") from error
        picture = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    picture.draft(None, (size, size))
    if picture.width * picture.height > MOST_PIXELS:
        raise OSError(f"has more than {MOST_PIXELS // 10**6} million pixels: make it smaller")
    return picture


def frames(picture: Image.Image) -> int:
    """How many pictures a file holds; a photograph's previews are not counted."""
    return 1 if picture.format in ("JPEG", "MPO", "HEIF") else getattr(picture, "n_frames", 1)


def _turn(picture: Image.Image) -> None:
    """Turn a picture as its EXIF tag says, if that can be read."""
    with contextlib.suppress(Exception):  # a broken tag raises nearly anything and says nothing
        ImageOps.exif_transpose(picture, in_place=True)


def _grey(picture: Image.Image) -> Image.Image | None:
    """A picture of whole numbers above 255, or of floats in [0, 1], in 8 bits with its transparency; None for
    any other.

    PIL's own conversions would clip them. Raises `ValueError` where it is not known which number is white.
    """
    tags: Any = getattr(picture, "tag_v2", {})
    if picture.mode in SIXTEEN_BITS or (picture.mode == "I" and picture.format in SCALED_TO_16_BITS):
        bits = tags.get(258, (16,))[0]
        values = np.asarray(picture, np.int64).clip(0, 2**bits - 1)
        grey = (values * 65535 // (2**bits - 1) // 257).astype(np.uint8)
    elif picture.mode == "F":
        values = np.asarray(picture, np.float32)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"floats from {values.min():g} to {values.max():g}: only those from 0 to 1 have a known white"
            )
        grey = np.round(values * 255).astype(np.uint8)
    elif picture.mode == "I":
        raise ValueError("whole numbers of 32 bits, of which nobody says which is white: save it with 8 or 16 bits")
    else:
        return None
    made = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)
    if (clear := picture.info.get("transparency")) is not None:
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours of a picture as sRGB has them; those of a profile that cannot be read are taken for sRGB already."""
    if picture.mode != "LAB" and not profile:
        return picture
    try:
        own = (
            ImageCms.createProfile("LAB")
            if picture.mode == "LAB"
            else ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        )
        if picture.mode != "LAB" and "srgb" in ImageCms.getProfileDescription(own).lower():
            return picture
        to = "RGBA" if picture.mode == "RGBA" else "RGB"
        found = ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode=to)
    except (ImageCms.PyCMSError, OSError):
        return picture
    if found is None:
        return picture
    return found.convert("L") if picture.mode == "L" else found


def flatten(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture turned as its EXIF tag says, in RGB or grey (sRGB), its transparent parts in the background colour.

    Raises `ValueError` for numbers or colours whose meaning is not known, and whatever PIL raises for broken files.
    """
    picture.load()
    _turn(picture)
    profile = picture.info.get("icc_profile")
    picture = _grey(picture) or picture
    grey = picture.mode in GREY
    picture = picture.convert("LA") if picture.mode == "La" else picture
    if clear := picture.has_transparency_data:
        picture = picture.convert("RGBA")
    elif grey:
        picture = picture.convert("L")
    elif picture.mode not in ("RGB", "CMYK", "LAB"):
        picture = picture.convert("RGB")
    picture = _in_srgb(picture, profile)
    if clear:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture)
    return picture.convert("L" if grey and len({*background} if clear else {0}) == 1 else "RGB")


def shrink(picture: Image.Image, size: int) -> Image.Image:
    """The picture with its shorter side resized to `size`, antialiased, aspect ratio kept."""
    width, height = picture.size
    shorter = min(width, height)
    if shorter == size:
        return picture
    target = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
    return picture.resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0)


def decode(
    data: bytes,
    size: int,
    *,
    channels: int = 3,
    background: tuple[int, int, int] = (255, 255, 255),
    at: tuple[float, float] = (0.5, 0.5),
    enlarge: bool = False,
) -> UInt8[np.ndarray, "{size} {size} {channels}"]:
    """The picture as a square: cropped at the position `at`, then resized to `size`.

    `at` is (down, right), each 0 to 1; (0.5, 0.5) is the middle. Raises `UserError` for a picture smaller than `size`
    unless `enlarge`, and whatever PIL raises for bytes that it cannot read.
    """
    picture = open_picture(data, size)
    check_size(picture.size, size, enlarge)
    picture = flatten(picture, background)
    scale = min(picture.size) / size
    top, left = (scale * round(part * (side / scale - size)) for part, side in zip(at, (picture.height, picture.width)))
    box = (left, top, min(left + scale * size, picture.width), min(top + scale * size, picture.height))
    picture = picture.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.asarray(picture.convert("RGB" if channels == 3 else "L"), np.uint8).reshape(size, size, channels)


def check_size(found: tuple[int, int], size: int, enlarge: bool, of: str = "a picture") -> None:
    """Raises `UserError` when the shorter side of `found` (width, height) is below `size` and `enlarge` is False."""
    if min(found) < size and not enlarge:
        raise UserError(
            f"{of} is {found[0]} x {found[1]} pixels, smaller than data.size={size}; "
            "lower data.size, leave it out, or set data.enlarge=True"
        )


def read(path: str | Path, size: tuple[int, int], channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Any picture file, its middle cropped to the shape of `size` (height, width) and resized to it, transparency
    on white.

    Raises `UserError` when it is no picture.
    """
    try:
        opened = open_picture(Path(path).read_bytes(), max(size))
        picture = flatten(opened, (255, 255, 255)).convert("RGB" if channels == 3 else "L")
    except MemoryError:
        raise
    except Exception as error:  # a broken file raises nearly anything
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is no picture that can be read ({why}): give a PNG, JPEG or WebP file") from error
    height, width = size
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - scale * width) / 2, (picture.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(picture, np.uint8).reshape(height, width, channels)
