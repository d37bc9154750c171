"""What a network sees in a picture: its own activations, in the middle of it, as one vector.

Two pictures that show the same thing in another place are far apart pixel by pixel; such vectors are near each other.
No other network is needed for them, and nothing is downloaded. Every picture is shown to the network with the same
noise, of sigma / alpha = 1/3, without text or class where it can do without, and the vector is the mean over places of
what the layer in the middle says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.explain.subject import Subject
from diffjax.utils import image

STACK, MIDDLE = "blocks", "mid_block"
"""Names in the networks of `nets/`: of a stack of layers, whose middle one counts, and of what lies in the middle."""

LOGSNR = 2 * math.log(3)
AT_ONCE = 32


@dataclass(frozen=True)
class Middle:
    """`module.apply` that returns what its middle says, (b, ..., c), in place of its output; nothing of one without."""

    module: nn.Module

    def __call__(self, params: Any, x: Array, t: Array, **cond: Array) -> list[Array]:
        given = {"capture_intermediates": _is_middle, "mutable": ["intermediates"]}
        _, kept = self.module.apply({"params": params}, x, t, **cond, **given)
        named = jax.tree_util.tree_leaves_with_path(kept)
        found = [([key.key for key in path if hasattr(key, "key")], leaf) for path, leaf in named]
        return [leaf[len(leaf) // 2] if STACK in names else leaf for names, leaf in found if "__call__" in names]


def _is_middle(module: nn.Module, method: str) -> bool:
    return module.name in (STACK, MIDDLE) and method == "__call__"


@jax.jit
def _seen(denoiser: Denoiser, x: Array, t: Array, cond: Any) -> Float[Array, "b d"]:
    (layer,) = denoiser.network(x, t, cond)
    return layer.reshape(len(x), -1, layer.shape[-1]).mean(axis=1)


Features = Callable[[UInt8[np.ndarray, "n h w c"]], Float[np.ndarray, "n d"]]


def of(subject: Subject) -> Features | None:
    """The function from pictures to vectors; None where the network's middle is not known, or reads no pixels."""
    denoiser = subject.model.denoiser
    if not isinstance(denoiser, Denoiser) or subject.model.decode is not None:
        return None
    if not isinstance(denoiser.apply, Apply):
        return None
    middle = replace(denoiser, apply=Middle(denoiser.apply.module))
    cond = subject.inputs(subject.recipe(guidance=1.0), "" if subject.is_conditional else None).cond
    process, size = denoiser.process, subject.model.shape
    t = process.inverse(jnp.float32(LOGSNR))
    noise = process.sigma(t) * jax.random.normal(jax.random.key(0), size)
    cond = jax.tree.map(lambda row: jnp.repeat(jnp.asarray(row), AT_ONCE, axis=0), cond)
    if len(jax.tree.leaves(jax.eval_shape(middle.network, jnp.zeros((AT_ONCE, *size)), t, cond))) != 1:
        return None

    def features(pixels: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
        x = process.alpha(t) * jnp.asarray(image.from_uint8(pixels)) + noise
        filled = jnp.pad(x, ((0, -len(x) % AT_ONCE), *[(0, 0)] * 3)).reshape(-1, AT_ONCE, *size)
        return np.concatenate([_seen(middle, part, t, cond) for part in filled])[: len(x)]

    return features
