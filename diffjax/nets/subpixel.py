"""A small network for super-resolution stages, cheap enough for a CPU: all its work is done on the small
picture's grid.

Squares of pixels become channels and, at the end, pixels again (Shi et al. 2016, "sub-pixel convolution"); between them
stand residual blocks of one width (EDSR, arXiv:1707.02921) that are told the time and the level of noise.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from diffjax.nets.convolution import Conv
from diffjax.nets.imagen import fold, unfold
from diffjax.nets.layers import Dense, ResBlock, timestep_embedding
from diffjax.utils.errors import UserError

Dtype = Any


class SubPixel(nn.Module):
    """`low_res + f(x, low_res, t, level)`: made for x0, which it finds at its start to be the upsampled picture.

    `patch` x `patch` pixels of `x` and of `low_res` are one place of `depth` blocks that are `width` wide. The output
    is float32. Raises `UserError` for a size that is no multiple of `patch`, and without a low-res picture.
    """

    patch: int = 4
    width: int = 64
    depth: int = 6
    groups: int = 8
    low_res: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        low_res: Float[Array, "b h w c"] | None = None,
        level: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        if low_res is None or level is None:
            raise UserError("network subpixel is for super-resolution only: give the experiment a low_res")
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UserError(f"{x.shape[1]} x {x.shape[2]} pixels do not cut into patches of {self.patch}: change one")
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(Conv, kernel_size=(3, 3), padding=1, **policy)
        emb = self._embedding(t, "time") + self._embedding(1000 * level, "level")
        pixels = fold(jnp.concatenate([x, low_res], axis=-1), self.patch)
        y = conv(self.width, name="conv_in")(pixels.astype(self.dtype))
        for i in range(self.depth):
            block = ResBlock(self.width, self.groups, time_embedding="scale_shift", **policy, name=f"blocks_{i}")
            y = block(y, emb)
        y = conv(self.patch**2 * x.shape[-1], kernel_init=nn.initializers.zeros, name="conv_out")(nn.silu(y))
        return low_res + unfold(y.astype(jnp.float32), self.patch)

    @property
    def multiple(self) -> int:
        """Of what number of pixels each side of a picture is a multiple."""
        return self.patch

    def _embedding(self, t: Float[Array, " b"], name: str) -> Float[Array, "b c"]:
        dense = functools.partial(Dense, self.width, dtype=self.dtype, param_dtype=self.param_dtype)
        return dense(name=f"{name}_2")(nn.silu(dense(name=f"{name}_1")(timestep_embedding(t, self.width))))
