"""The pictures that show how far a training is."""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from diffjax.diffusion import cascade
from diffjax.models.model import Model
from diffjax.train.facts import Seen
from diffjax.utils import image


class Preview(NamedTuple):
    """Pictures in [-1, 1] that are shown in so many columns, each above what is said of it, if anything is."""

    images: Float[np.ndarray, "n h w c"]
    columns: int
    captions: list[str]


def square(model: Model, key: Key[Array, ""], num: int, **given: Any) -> Preview:
    """`num` pictures in about as many rows as columns; `given` are further arguments of `Model.sample`."""
    return Preview(np.asarray(model.sample(key, num=num, **given)), math.isqrt(num - 1) + 1, [])


def comparison(model: Model, key: Key[Array, ""], seen: Seen) -> Preview:
    """What a super-resolution stage draws of the pictures it has seen, `beside` them."""
    truth = jnp.asarray(image.from_uint8(seen.image))
    small = jnp.asarray(cascade.downsample(truth, model.low_res))
    text: dict[str, Any] = {} if model.text is None else {"prompt": seen.caption}
    return beside(small, model.sample(key, num=len(truth), low_res=small, **text), truth)


def beside(
    small: Float[Array | np.ndarray, "n s s c"],
    drawn: Float[Array | np.ndarray, "n h w c"],
    truth: Float[Array | np.ndarray, "n h w c"],
) -> Preview:
    """A row for each low-res picture: itself, bicubic interpolation, what was drawn of it, and the truth, with the PSNR
    of each.
    """
    size, factor = truth.shape[1], truth.shape[1] // small.shape[1]
    given = np.asarray(small).repeat(factor, axis=1).repeat(factor, axis=2)
    rows = np.stack([given, cascade.upsample(small, size), drawn, truth], axis=1)
    pictures = image.to_uint8(rows)
    quality = image.psnr(pictures[:, :3], pictures[:, 3:])
    named = [
        [f"{name} {value:.1f} dB" for name, value in zip(("given", "bicubic", "ours"), row)] + ["truth"]
        for row in quality
    ]
    return Preview(rows.reshape(-1, *truth.shape[1:]), 4, list(itertools.chain.from_iterable(named)))
