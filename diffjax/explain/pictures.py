"""Arrays as pictures of a page: noise, heat maps, and the bytes that the page carries."""

import base64
import io

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from diffjax.utils import image

SMALL = 96
"""Pixels a side up to which a picture is embedded exactly, as PNG; above, as WebP, made smaller if need be."""

# Dark violet, red, orange, pale yellow: the light of each is even, so that it is read without colours too.
HEAT = np.array([[20, 11, 52], [101, 21, 110], [183, 55, 84], [237, 105, 37], [252, 180, 36], [252, 255, 164]], float)


def uri(pixels: UInt8[np.ndarray, "h w c"], longest: int) -> str:
    """A `data:` address with the picture in it, at most `longest` pixels a side where it is not small."""
    if max(pixels.shape[:2]) <= SMALL:
        return f"data:image/png;base64,{base64.b64encode(image.png(pixels)).decode()}"
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=78)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def state(x: Float[Array | np.ndarray, "h w c"], alpha: float, sigma: float) -> UInt8[np.ndarray, "h w c"]:
    """A noised picture: divided by alpha + sigma, so that it is neither pale nor burnt at any time."""
    return image.to_uint8(np.asarray(x, np.float32) / np.float32(alpha + sigma))


def noise(eps: Float[Array | np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Noise of unit variance: grey is 0, black and white are two standard deviations."""
    return image.to_uint8(np.asarray(eps, np.float32) / 2)


def heat(values: Float[np.ndarray, "rows columns"], size: tuple[int, int], most: float) -> UInt8[np.ndarray, "h w 3"]:
    """Numbers from 0 (dark) to `most` (bright), each a soft patch of a picture of that height and width."""
    height, width = size
    share = np.clip(np.asarray(values, np.float32) / (most or 1.0), 0, 1)
    soft = Image.fromarray(share).resize((width, height), Image.Resampling.BILINEAR)
    place = np.asarray(soft) * (len(HEAT) - 1)
    low = np.clip(np.floor(place).astype(int), 0, len(HEAT) - 2)
    part = (place - low)[..., None]
    return np.round(HEAT[low] * (1 - part) + HEAT[low + 1] * part).astype(np.uint8)


def coloured(pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in three channels."""
    return pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels


def veiled(pixels: UInt8[np.ndarray, "h w c"], over: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """A heat map with the picture's light shining through it."""
    light = coloured(pixels).mean(axis=-1, keepdims=True)
    return np.round(0.7 * over + 0.3 * light).astype(np.uint8)
