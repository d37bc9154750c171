"""Cascades: a first stage draws a small picture, and super-resolution stages, each trained by itself, make it larger
(Ho et al. 2021, "Cascaded Diffusion Models").

The conditioning of a super-resolution stage is a low-res picture in [-1, 1] to which noise was added, and how much: the
*noise augmentation level* (section 4.2, Gaussian conditioning augmentation):

    low_res = sqrt(1 - level^2) small + level eps

In training `small` is the training picture at low resolution and the level is random. In sampling `small` is what the
stage before drew, and the level is chosen: its noise hides how drawn pictures differ from training pictures.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffjax.diffusion.process import Keys, Time, expand, unit_noise
from diffjax.utils.errors import UserError


def downsample(x: Float[Array | np.ndarray, "b h w c"], size: int) -> Float[Array | np.ndarray, "b {size} {size} c"]:
    """The mean over each square of h / size pixels a side. Raises `UserError` when `size` does not divide h and w, and
    when x has no four axes.
    """
    if jnp.ndim(x) != 4:
        raise UserError(f"a picture or mask has the shape {jnp.shape(x)}: give (1, height, width, channels)")
    b, h, w, c = x.shape
    if h % size or w % size:
        raise UserError(f"{h} x {w} pixels cannot be reduced to {size}: choose a size that divides both")
    return x.reshape(b, size, h // size, size, w // size, c).mean(axis=(2, 4))


def upsample(x: Float[Array | np.ndarray, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Bicubic interpolation (Keys 1981, a = -1/2)."""
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "cubic")


def augment(small: Float[Array | np.ndarray, "b h w c"], level: Time, keys: Keys) -> Float[Array, "b h w c"]:
    """sqrt(1 - level^2) small + level eps, each picture with noise from its own key."""
    eps = unit_noise(keys, small.shape[1:])
    return expand(jnp.sqrt(1 - jnp.square(level)), small) * small + expand(level, small) * eps


def condition(small: Float[Array | np.ndarray, "b h w c"], size: int, level: Time, keys: Keys) -> dict[str, Array]:
    """The conditioning of a stage of `size` pixels: `low_res`, the augmented picture at its size, and `level`."""
    level = jnp.broadcast_to(jnp.asarray(level, jnp.float32), keys.shape)
    return {"low_res": upsample(augment(jnp.clip(small, -1, 1), level, keys), size), "level": level}


@dataclass(frozen=True)
class LowRes:
    """The conditioning of a stage in training: its training pictures at `size` pixels, with noise augmentation levels
    that are uniform in [0, `max_level`].
    """

    size: int
    max_level: float

    def __post_init__(self):
        if self.size < 1 or not 0 <= self.max_level < 1:
            raise UserError(
                f"low_res has size {self.size} and max_level {self.max_level}: above 0, and from 0 to below 1"
            )

    def __call__(self, x0: Float[Array, "b h w c"], keys: Keys) -> dict[str, Array]:
        """`condition` of each picture; a row depends on its own key only."""
        level_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        level = self.max_level * jax.vmap(jax.random.uniform)(level_keys)
        return condition(downsample(x0, self.size), x0.shape[1], level, noise_keys)
