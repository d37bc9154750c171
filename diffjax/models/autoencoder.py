"""Between pictures and the latents that a diffusion model sees: `(z - shift) scaling` of an autoencoder's own z."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffjax.nets.vae import AutoencoderKL, tiled_decode, tiled_encode
from diffjax.utils import struct

TILE = 128
"""Latent cells to a side up to which a picture is coded in one call."""


@struct.dataclass
class Coder:
    """An autoencoder and its parameters."""

    params: Any
    module: AutoencoderKL = struct.field(pytree_node=False)

    @property
    def shift(self) -> float:
        """What is taken from z."""
        return self.module.shift_factor or 0.0


@struct.dataclass
class Encode(Coder):
    """Images to latents: the mean of their distribution."""

    def __call__(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b h/f w/f c"]:
        return (tiled_encode(self.module, self.params, images, TILE)[0] - self.shift) * self.module.scaling_factor


@struct.dataclass
class Decode(Coder):
    """Latents to images, about [-1, 1] and not clamped."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[np.ndarray, "b h*f w*f 3"]:
        return tiled_decode(self.module, self.params, x / self.module.scaling_factor + self.shift, TILE)


class Preview:
    """Latents to small pictures, one pixel a cell: the linear map that fits best what `encode` makes of
    smooth colours.
    """

    def __init__(self, encode: Encode):
        self.encode = encode

    @functools.cached_property
    def matrix(self) -> Float[np.ndarray, "c+1 3"]:
        """Latents and 1 to colours, by least squares; found once, by one call of the encoder."""
        factor, side = self.encode.module.factor, 32
        images = colours(side * factor)
        means = images.reshape(side, factor, side, factor, 3).mean((1, 3)).reshape(-1, 3)
        return np.linalg.lstsq(_with_one(self.encode(images[None])).reshape(len(means), -1), means, rcond=1e-4)[0]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[np.ndarray, "b h w 3"]:
        return np.clip(_with_one(np.asarray(x)) @ self.matrix, -1, 1)


def colours(size: int) -> Float[np.ndarray, "size size 3"]:
    """A picture of random colours in soft patches of several sizes."""
    random = np.random.default_rng(0)
    layers = [random.normal(size=(n, n, 3)).astype(np.float32) for n in (2, 4, 8, 16)]
    return np.tanh(sum(np.asarray(jax.image.resize(jnp.asarray(layer), (size, size, 3), "cubic")) for layer in layers))


def _with_one(x: Float[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b h w c+1"]:
    return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)
