"""Cascades: a small picture is drawn, and stages that were trained apart enlarge it (Ho et al. 2021, "Cascaded
Diffusion Models").

A stage is told a low-res picture in [-1, 1] with noise of a known level (section 4.2, Gaussian conditioning
augmentation):

    low = sqrt(1 - level^2) small + level eps

In training `small` is the training picture, shrunk, and the level is random; in sampling it is what the stage before
drew and the level is chosen: it hides what that stage does not draw as a photograph would have it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffjax.diffusion.process import Time, expand
from diffjax.utils import struct
from diffjax.utils.errors import UserError


def shrink(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Means of squares of h / size pixels a side. Raises `UserError` when the size does not divide, and for
    another shape.
    """
    if jnp.ndim(x) != 4:
        raise UserError(f"a picture or mask has the shape {jnp.shape(x)}: give (1, height, width, channels)")
    b, h, w, c = x.shape
    if h % size or w % size:
        raise UserError(f"{h} x {w} pixels cannot be shrunk to {size}: choose a size that divides both")
    return x.reshape(b, size, h // size, size, w // size, c).mean(axis=(2, 4))


def enlarge(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Bicubic interpolation (Keys 1981, a = -1/2)."""
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "cubic")


def augment(small: Float[Array, "b h w c"], level: Time, keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
    """sqrt(1 - level^2) small + level eps, each picture with noise from its own key."""
    eps = jax.vmap(lambda key: jax.random.normal(key, small.shape[1:]))(keys)
    return expand(jnp.sqrt(1 - jnp.square(level)), small) * small + expand(level, small) * eps


def condition(small: Float[Array, "b h w c"], size: int, level: Time, keys: Key[Array, " b"]) -> dict[str, Array]:
    """What a stage of `size` pixels is told: the noised picture at its size, and the level."""
    level = jnp.broadcast_to(jnp.asarray(level, jnp.float32), keys.shape)
    return {"low_res": enlarge(augment(jnp.clip(small, -1, 1), level, keys), size), "level": level}


@dataclass(frozen=True)
class LowRes:
    """How a stage's training pictures become its low-res ones: of `size` pixels, the level uniform in [0, `most`]."""

    size: int
    most: float

    def __post_init__(self):
        if self.size < 1 or not 0 <= self.most < 1:
            raise UserError(f"low_res.size is {self.size} and low_res.most {self.most}: above 0, and from 0 to below 1")

    def __call__(self, x0: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> dict[str, Array]:
        """`condition` of each picture; a row depends on its own key only."""
        level_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        level = self.most * jax.vmap(jax.random.uniform)(level_keys)
        return condition(shrink(x0, self.size), x0.shape[1], level, noise_keys)


@struct.dataclass
class Cascade:
    """Models in a row, each but the first with `low_res` pixels for its input: those of the one before.

    Raises `UserError` for models that do not fit together.
    """

    stages: tuple[Any, ...]

    def __post_init__(self):
        for i, (before, after) in enumerate(zip(self.stages, self.stages[1:]), 1):
            size, channels = before.shape[0], before.shape[-1]
            if not after.low_res:
                raise UserError(f"stage {i + 1} ({after.name}) enlarges nothing: it was trained without low_res")
            if (after.low_res, after.shape[-1]) != (size, channels):
                reads, draws = f"{after.low_res} pixels of {after.shape[-1]} channels", f"{size} of {channels}"
                raise UserError(
                    f"stage {i + 1} ({after.name}) reads {reads} and stage {i} ({before.name}) draws {draws}"
                )
            if after.text is not None and before.text is None:
                raise UserError(
                    f"stage {i + 1} ({after.name}) reads a text and stage {i} ({before.name}) none: train it with text"
                )

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
        """What every stage draws, the last being the picture; stage i has the key `fold_in(key, i)`.

        `low_res` starts at a first stage that enlarges. `image`, of the last stage's size: with `mask` every stage
        draws anew what the mask covers (1) and keeps the rest (0), the last one with an edge of `feather` pixels;
        without, the first stage starts from it as far as `strength` says. `each` are further arguments of every stage's
        `Model.sample`: steps, sampler, guidance, guide, level.
        """
        if image is None and (mask is not None or feather or strength != 1):
            raise UserError("mask, feather and strength say what may change of a picture: give the `image` too")
        if prompt is not None and all(stage.text is None for stage in self.stages):
            raise UserError("no stage of this cascade was trained with text: leave the prompt out")
        drawn: list[Array] = []
        for i, stage in enumerate(self.stages):
            told = dict(each[i]) if each else {}
            if stage.text is not None:
                told["prompt"] = prompt
            if stage.low_res:
                told["low_res"] = drawn[-1] if drawn else low_res
            if image is not None and (mask is not None or i == 0):
                size = stage.shape[0]
                told |= {"image": shrink(image, size), "strength": strength}
                told |= {} if mask is None else {"mask": jnp.ceil(shrink(mask, size))}
                told |= {"feather": feather} if i + 1 == len(self.stages) else {}
            drawn.append(stage.sample(jax.random.fold_in(key, i), num=num, **told))
        return drawn
