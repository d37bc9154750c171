"""Models in a row, each of which makes the pictures of the one before larger (`diffusion.cascade`)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffjax.diffusion.cascade import downsample
from diffjax.utils import struct
from diffjax.utils.errors import UserError


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
