"""Cascades: a first stage draws a small picture, and super-resolution stages, each trained by itself, make it larger
(Ho et al. 2021, "Cascaded Diffusion Models").

The conditioning of a super-resolution stage is a low-res picture in [-1, 1] to which noise was added, and how much: the
*noise augmentation level* (section 4.2, Gaussian conditioning augmentation):

    low_res = sqrt(1 - level^2) small + level eps

In training `small` is the training picture at low resolution and the level is random. In sampling `small` is what the
stage before drew, and the level is chosen: its noise hides how drawn pictures differ from training pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffjax.diffusion.process import Keys, Time, expand, unit_noise
from diffjax.utils import struct
from diffjax.utils.errors import UserError


def downsample(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """The mean over each square of h / size pixels a side. Raises `UserError` when `size` does not divide h and w, and
    when x has no four axes.
    """
    if jnp.ndim(x) != 4:
        raise UserError(f"a picture or mask has the shape {jnp.shape(x)}: give (1, height, width, channels)")
    b, h, w, c = x.shape
    if h % size or w % size:
        raise UserError(f"{h} x {w} pixels cannot be reduced to {size}: choose a size that divides both")
    return x.reshape(b, size, h // size, size, w // size, c).mean(axis=(2, 4))


def upsample(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Bicubic interpolation (Keys 1981, a = -1/2)."""
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "cubic")


def augment(small: Float[Array, "b h w c"], level: Time, keys: Keys) -> Float[Array, "b h w c"]:
    """sqrt(1 - level^2) small + level eps, each picture with noise from its own key."""
    eps = unit_noise(keys, small.shape[1:])
    return expand(jnp.sqrt(1 - jnp.square(level)), small) * small + expand(level, small) * eps


def condition(small: Float[Array, "b h w c"], size: int, level: Time, keys: Keys) -> dict[str, Array]:
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


@struct.dataclass
class Cascade:
    """Models (`diffjax.load`) that draw one after the other: each but the first reads the pictures of the one before,
    `low_res` pixels a side.

    Raises `UserError` for models that do not fit together.
    """

    stages: tuple[Any, ...]

    def __post_init__(self):
        for i, (before, after) in enumerate(zip(self.stages, self.stages[1:]), 1):
            reader, drawer = f"stage {i + 1} ({after.name})", f"stage {i} ({before.name})"
            if not after.low_res:
                raise UserError(f"{reader} reads no pictures: it was trained without low_res")
            if (after.low_res, after.shape[-1]) != (before.shape[0], before.shape[-1]):
                reads = f"{after.low_res} pixels of {after.shape[-1]} channels"
                raise UserError(f"{reader} reads {reads} and {drawer} draws {before.shape[0]} of {before.shape[-1]}")
            if after.text is not None and before.text is None:
                raise UserError(f"{reader} reads a text and {drawer} none: train it with text")

    def sample(
        self,
        key: Key[Array, ""],
        *,
        num: int = 1,
        prompt: str | list[str] | None = None,
        low_res: Float[Array, "#b h w c"] | None = None,
        image: Float[Array, "#b h w c"] | None = None,
        mask: Float[Array, "#b h w 1"] | None = None,
        feather: int | None = None,
        strength: float = 1.0,
        each: Sequence[dict[str, Any]] = (),
    ) -> list[Float[Array, "num h w c"]]:
        """The pictures of every stage, the last stage's being the result; stage i has the key `fold_in(key, i)`.

        `low_res` are the pictures that the first stage reads, if it is a super-resolution stage itself. `image` has the
        last stage's size. With a `mask` every stage draws anew where the mask is 1 and keeps the image where it is 0,
        the last stage with an edge of `feather` pixels; without a mask the first stage starts from the image, noised
        according to `strength`. `each` holds further arguments of `Model.sample` for each stage: steps, sampler,
        guidance, guide, level.
        """
        if image is None and (mask is not None or feather or strength != 1):
            raise UserError("mask, feather and strength say what may change of a picture: give the `image` too")
        if prompt is not None and all(stage.text is None for stage in self.stages):
            raise UserError("no stage of this cascade was trained with text: leave the prompt out")
        drawn: list[Array] = []
        for i, stage in enumerate(self.stages):
            given = dict(each[i]) if each else {}
            given |= {} if stage.text is None else {"prompt": prompt}
            given |= {"low_res": drawn[-1] if drawn else low_res} if stage.low_res else {}
            if image is not None and (mask is not None or i == 0):
                size = stage.shape[0]
                given |= {"image": downsample(image, size), "strength": strength}
                given |= {} if mask is None else {"mask": jnp.ceil(downsample(mask, size))}
                given |= {"feather": feather} if i + 1 == len(self.stages) else {}
            drawn.append(stage.sample(jax.random.fold_in(key, i), num=num, **given))
        return drawn
