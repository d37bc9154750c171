"""The autoencoder of latent diffusion (arXiv:2112.10752, section 3.1): what diffusers publishes as AutoencoderKL.

Fields carry that class's names and meanings; parameters are named after the checkpoints' keys. Images too large for one
call are coded tile by tile, with the same result.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from diffjax.nets import tiles
from diffjax.nets.convolution import Conv
from diffjax.nets.layers import Dense, GroupNorm, ResBlock
from diffjax.nets.unet import Attention, Downsample, MidBlock, Stage, Upsample
from diffjax.utils.errors import UserError

Dtype = Any
EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


class Half(nn.Module):
    """What encoder and decoder share: the makers of their parts."""

    channels: int
    block_out_channels: tuple[int, ...]
    layers: int
    groups: int
    attend: bool
    remat: bool
    dtype: Dtype
    param_dtype: Dtype

    def _policy(self) -> dict[str, Dtype]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _conv(self, features: int) -> Conv:
        return Conv(features, (3, 3), padding=1, **self._policy())

    def _norm(self) -> GroupNorm:
        return GroupNorm(self.groups, EPS, **self._policy())

    def _resnet(self, features: int) -> Callable[..., nn.Module]:
        kind = nn.remat(ResBlock) if self.remat else ResBlock
        return functools.partial(kind, features, self.groups, EPS, **self._policy())

    def _mid(self) -> MidBlock:
        features = self.block_out_channels[-1]
        attend = functools.partial(Attention, features, self.groups, EPS, **self._policy())
        return MidBlock(1.0, self._resnet(features), attend if self.attend else None, None)

    def _stages(self, widths: tuple[int, ...], layers: int, resize: Callable[..., nn.Module]) -> list[Stage]:
        last = len(widths) - 1
        return [
            Stage(layers, self._resnet(width), None, None, None if i == last else resize)
            for i, width in enumerate(widths)
        ]


class Encoder(Half):
    """Images to the mean and log-variance of their latents, `channels` each."""

    def setup(self) -> None:
        resize = functools.partial(Downsample, 0, **self._policy(), name="downsamplers_0")
        self.conv_in = self._conv(self.block_out_channels[0])
        self.down_blocks = self._stages(self.block_out_channels, self.layers, resize)
        self.mid_block = self._mid()
        self.conv_norm_out = self._norm()
        self.conv_out = self._conv(2 * self.channels)

    def outer(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/f w/f d"]:
        """The part whose reach is bounded: all resolutions on the way down."""
        x = self.conv_in(x.astype(self.dtype))
        for stage in self.down_blocks:
            x = stage(x, None, ())[-1]
        return x

    def inner(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w 2*c"]:
        """The part in which every place sees every other."""
        return self.conv_out(nn.silu(self.conv_norm_out(self.mid_block(x, None, ()))))


class Decoder(Half):
    """Latents to images of `channels` colours."""

    def setup(self) -> None:
        widths = self.block_out_channels[::-1]
        resize = functools.partial(Upsample, **self._policy(), name="upsamplers_0")
        self.conv_in = self._conv(widths[0])
        self.mid_block = self._mid()
        self.up_blocks = self._stages(widths, self.layers + 1, resize)
        self.conv_norm_out = self._norm()
        self.conv_out = self._conv(self.channels)

    def inner(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The part in which every place sees every other."""
        return self.mid_block(self.conv_in(z.astype(self.dtype)), None, ())

    def outer(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h*f w*f c"]:
        """The part whose reach is bounded: all resolutions on the way up."""
        for stage in self.up_blocks:
            x = stage(x, None, ())[-1]
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """`encode(x) -> (mean, logvar)` and `decode(z) -> x`, called as `module.apply(..., method="encode")`.

    `factor` pixels make one latent cell on a side. Latents are the network's own; a diffusion model sees
    `(z - shift_factor) scaling_factor`. The defaults are SD3.5's (83.8 M parameters).
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 1.5305
    shift_factor: float | None = 0.0609
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    out_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shared = (self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.mid_block_add_attention)
        self.encoder = Encoder(self.latent_channels, *shared, self.remat, **policy)
        self.decoder = Decoder(self.out_channels, *shared, self.remat, **policy)
        if self.use_quant_conv:
            self.quant_conv = Dense(2 * self.latent_channels, **policy)
        if self.use_post_quant_conv:
            self.post_quant_conv = Dense(self.latent_channels, **policy)

    @property
    def factor(self) -> int:
        """Pixels to one latent cell, on each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def reach(self) -> int:
        """Latent cells, rounded up, that a pixel hears of in each direction through the outer half of the decoder.

        A convolution reaches one place of its resolution; the encoder's outer half reaches less far.
        """
        levels = len(self.block_out_channels)
        blocks = 2 * (self.layers_per_block + 1) * sum(2.0**-i for i in range(levels))
        return math.ceil(blocks + sum(2.0**-i for i in range(1, levels)) + 2.0 ** (1 - levels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w out"]:
        """The image decoded from its mean latent."""
        return self.decode(self.encode(x)[0])

    def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h/f w/f l"], Float[Array, "b h/f w/f l"]]:
        """Mean and log-variance, the latter within [-30, 20]. Raises `UserError` unless `factor` divides the size."""
        if x.shape[1] % self.factor or x.shape[2] % self.factor:
            raise UserError(f"images of {x.shape[1]} x {x.shape[2]} pixels: give multiples of {self.factor}")
        return self.encode_inner(self.encode_outer(x))

    def encode_outer(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/f w/f d"]:
        """The first half of `encode`."""
        return self.encoder.outer(x)

    def encode_inner(self, x: Float[Array, "b h w d"]) -> tuple[Float[Array, "b h w l"], Float[Array, "b h w l"]]:
        """The second half of `encode`."""
        x = self.encoder.inner(x)
        x = self.quant_conv(x) if self.use_quant_conv else x
        mean, logvar = jnp.split(x.astype(self.out_dtype), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Float[Array, "b h w l"]) -> Float[Array, "b h*f w*f out"]:
        """The image, about [-1, 1] and not clamped."""
        return self.decode_outer(self.decode_inner(z))

    def decode_inner(self, z: Float[Array, "b h w l"]) -> Float[Array, "b h w d"]:
        """The first half of `decode`."""
        return self.decoder.inner(self.post_quant_conv(z) if self.use_post_quant_conv else z)

    def decode_outer(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h*f w*f out"]:
        """The second half of `decode`."""
        return self.decoder.outer(x).astype(self.out_dtype)


def tiled_decode(
    module: AutoencoderKL, params: Any, z: Float[Array, "b h w l"], tile: int = 64
) -> Float[np.ndarray, "b h*f w*f out"]:
    """`decode` of latents of any size in tiles of `tile` x `tile` cells, put together in host memory.

    Attention is over all cells at once; the rest is `tiles.run`: several passes over tiles, and no seams.
    """
    if max(z.shape[1:3]) <= tile:
        return np.asarray(tiles.whole(module, "decode", params, z))
    x = tiles.whole(module, "decode_inner", params, z)
    return tiles.run(module, "decode_outer", params, x, tile, module.reach, (1, module.factor))


def tiled_encode(
    module: AutoencoderKL, params: Any, x: Float[Array | np.ndarray, "b h w c"], tile: int = 64
) -> tuple[Float[np.ndarray, "b h/f w/f l"], Float[np.ndarray, "b h/f w/f l"]]:
    """`encode` of images of any size in tiles of `tile` x `tile` latent cells; as `tiled_decode`."""
    if max(x.shape[1:3]) <= tile * module.factor:
        return jax.tree.map(np.asarray, tiles.whole(module, "encode", params, x))
    y = tiles.run(module, "encode_outer", params, x, tile, module.reach, (module.factor, 1))
    return jax.tree.map(np.asarray, tiles.whole(module, "encode_inner", params, y))
