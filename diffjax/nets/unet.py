"""The pixel U-Net of DDPM (arXiv:2006.11239) and its relatives: what diffusers publishes as UNet2DModel.

Fields carry that class's names and meanings, so that a published configuration is a list of keyword arguments; text
conditioning is our own addition. Parameters are named after the checkpoints' keys.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from diffjax.nets.convolution import Conv
from diffjax.nets.layers import Dense, GroupNorm, ResBlock, UpConv, attention, keep_words, timestep_embedding
from diffjax.utils.errors import UserError

Dtype = Any
Tokens = tuple[Float[Array, "b l d"], Bool[Array, "b l"]] | tuple[()]

zeros = nn.initializers.zeros

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "mish": jax.nn.mish,
}
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def half_size(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """The mean of each 2 x 2 square; an odd last row or column is left out."""
    return nn.avg_pool(x, (2, 2), (2, 2))


def double_size(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Every pixel as a 2 x 2 square."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Attention(nn.Module):
    """Pre-norm attention of an image's pixels over themselves, or over `context` when given, without the residual.

    Heads are `head_dim` wide; `groups=None` leaves the norm out.
    """

    head_dim: int
    groups: int | None
    eps: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b l d"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b h w c"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = x.shape[-1] // self.head_dim

        def project(name: str, y: Array) -> Array:
            y = Dense(heads * self.head_dim, **policy, name=name)(y)
            return y.reshape(*y.shape[:2], heads, self.head_dim)

        y = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.groups is not None:
            y = GroupNorm(self.groups, self.eps, **policy, name="group_norm")(y)
        read = y if context is None else context
        mask = None if mask is None else mask[:, None, None]
        q, k, v = project("to_q", y), project("to_k", read), project("to_v", read)
        if context is not None:
            keep_words(self, q, k, mask, slice(None), slice(None))
        y = attention(q, k, v, mask)
        y = y.reshape(*y.shape[:2], heads * self.head_dim)
        return Dense(x.shape[-1], **policy, kernel_init=zeros, name="to_out_0")(y).reshape(x.shape)


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2; `padding=0` pads a row below and a column to the right instead of all around.

    `emb` is not read: a stage calls all its ways to resize alike.
    """

    padding: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Array | None) -> Float[Array, "b h/2 w/2 c"]:
        padding = ((0, 1), (0, 1)) if self.padding == 0 else self.padding
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Conv(x.shape[-1], (3, 3), strides=2, padding=padding, **policy, name="conv")(x)


class Upsample(nn.Module):
    """Doubled size, then a 3 x 3 convolution; `emb` is not read."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Array | None) -> Float[Array, "b 2*h 2*w c"]:
        return UpConv(x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)


class EmbeddingMLP(nn.Module):
    """`linear_2(silu(linear_1(x)))`."""

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b features"]:
        dense = functools.partial(Dense, self.features, dtype=self.dtype, param_dtype=self.param_dtype)
        return dense(name="linear_2")(nn.silu(dense(name="linear_1")(x)))


class Stage(nn.Module):
    """The layers of one resolution: residual blocks, each given a skip and followed by attention, then a resize.

    `resnet`, `attend`, `cross` and `resize` make those parts; the last three may be `None`.
    """

    layers: int
    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module] | None
    cross: Callable[..., nn.Module] | None
    resize: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"] | None, tokens: Tokens, skips: Sequence[Array] = ()
    ) -> list[Float[Array, "b h2 w2 c2"]]:
        """The output of every layer and of the resize, the last being the stage's own."""
        outputs = []
        for i in range(self.layers):
            x = jnp.concatenate([x, skips[i]], axis=-1) if skips else x
            x = self.resnet(name=f"resnets_{i}")(x, emb)
            if self.attend is not None:
                x = x + self.attend(name=f"attentions_{i}")(x)
            if self.cross is not None:
                x = x + self.cross(name=f"cross_attentions_{i}")(x, *tokens)
            outputs.append(x)
        if self.resize is not None:
            outputs.append(self.resize()(x, emb))
        return outputs


class MidBlock(nn.Module):
    """Residual block, attention, residual block, each result divided by `scale`."""

    scale: float
    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module] | None
    cross: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"] | None, tokens: Tokens
    ) -> Float[Array, "b h w c"]:
        x = self.resnet(name="resnets_0")(x, emb) / self.scale
        if self.attend is not None:
            x = (x + self.attend(name="attentions_0")(x)) / self.scale
        if self.cross is not None:
            x = x + self.cross(name="cross_attentions_0")(x, *tokens)
        return self.resnet(name="resnets_1")(x, emb) / self.scale


class UNet(nn.Module):
    """`y(x, t)`, the shape of `x` but for `out_channels`; the defaults are DDPM's CIFAR-10 network (35.7 M parameters).

    `t` is what the network was trained to read: the step 0..999 of a published model. Attention heads are
    `attention_head_dim` wide, `None` meaning one head. The class table has `num_class_embeds` rows; the label -1 reads
    the last one, which is where classifier-free training keeps the null class. With `class_embed_type="timestep"`
    labels are embedded as times are, with `"identity"` they are vectors as wide as the time embedding.

    Text: with `context_width`, every attention layer is followed by attention over the token states `context`, masked
    by `mask`; with `pooled_width`, `pooled` joins the time embedding. A row whose mask is all False has learned null
    values in their place. `remat` recomputes residual blocks and attention in the backward pass; `out_dtype` is the
    output's. `dropout` acts when a "dropout" key is given.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: float = 1
    flip_sin_to_cos: bool = False
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 0
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = None
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-6
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = None
    context_width: int = 0
    pooled_width: int = 0
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    out_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b l d"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
        label: Int[Array, " b"] | Float[Array, "b e"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """The network's output. Raises `UserError` when the size does not halve evenly or a condition is missing."""
        levels = len(self.block_out_channels)
        if x.shape[1] % self.multiple or x.shape[2] % self.multiple:
            raise UserError(f"images of {x.shape[1]} x {x.shape[2]} pixels: give multiples of {self.multiple}")
        has_text = None if mask is None else jnp.any(mask, axis=1)
        emb = self._embed_time(t) + self._embed_label(label) + self._embed_pooled(pooled, has_text)
        tokens = self._tokens(context, mask, has_text)
        conv = functools.partial(Conv, kernel_size=(3, 3), padding=1, **self._policy())

        x = (2 * x - 1 if self.center_input_sample else x).astype(self.dtype)
        skips = [conv(self.block_out_channels[0], name="conv_in")(x)]
        for i in range(levels):
            skips += self._down_stage(i)(skips[-1], emb, tokens)
        y = skips[-1]
        if self.mid_block_type is not None:
            y = self._mid_block()(y, emb, tokens)
        for i in range(levels):
            y = self._up_stage(i)(y, emb, tokens, [skips.pop() for _ in range(self.layers_per_block + 1)])[-1]
        y = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, **self._policy(), name="conv_norm_out")(y))
        return conv(self.out_channels, kernel_init=zeros, name="conv_out")(y).astype(self.out_dtype)

    @property
    def multiple(self) -> int:
        """Of what number of pixels each side of a picture is a multiple."""
        return 2 ** (len(self.block_out_channels) - 1)

    def _policy(self) -> dict[str, Dtype]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _embedding(self, name: str) -> EmbeddingMLP:
        width = self.time_embedding_dim or 4 * self.block_out_channels[0]
        return EmbeddingMLP(width, **self._policy(), name=name)

    def _sinusoids(self, t: Float[Array, " b"]) -> Float[Array, "b c"]:
        return timestep_embedding(
            t, self.block_out_channels[0], flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )

    def _embed_time(self, t: Float[Array, " b"]) -> Float[Array, "b e"]:
        return self._embedding("time_embedding")(self._sinusoids(t))

    def _embed_label(self, label: Array | None) -> Float[Array, "b e"] | float:
        if self.class_embed_type is None and self.num_class_embeds is None:
            return 0.0
        if label is None:
            raise UserError("this model is conditional on a class: give a label for every image")
        if self.class_embed_type == "identity":
            return label.astype(self.dtype)
        if self.class_embed_type == "timestep":
            return self._embedding("class_embedding")(self._sinusoids(label))
        width = self.time_embedding_dim or 4 * self.block_out_channels[0]
        normal = nn.initializers.normal(1.0)
        rows = self.param("class_embedding", normal, (self.num_class_embeds, width), self.param_dtype)
        return jnp.asarray(rows)[label].astype(self.dtype)

    def _embed_pooled(self, pooled: Array | None, has_text: Array | None) -> Float[Array, "b e"] | float:
        if not self.pooled_width:
            return 0.0
        if pooled is None:
            raise UserError("this model reads a pooled text vector: give `pooled`")
        emb = self._embedding("pooled_embedding")(pooled)
        null = self.param("null_pooled", nn.initializers.normal(0.02), emb.shape[1:], self.param_dtype)
        if has_text is None:
            return emb
        return jnp.where(has_text[:, None], emb, jnp.broadcast_to(null, emb.shape).astype(emb.dtype))

    def _tokens(self, context: Array | None, mask: Array | None, has_text: Array | None) -> Tokens:
        """The token states to attend to; where a row has none, the learned null token. Nothing without text."""
        if not self.context_width:
            return ()
        if context is None:
            raise UserError("this model reads a text: give `context` and `mask`")
        null = self.param("null_token", nn.initializers.normal(0.02), (self.context_width,), self.param_dtype)
        if mask is None or has_text is None:
            return context.astype(self.dtype), jnp.ones(context.shape[:2], bool)
        context = jnp.where(has_text[:, None, None], context, null).astype(self.dtype)
        return context, mask | (~has_text[:, None] & (jnp.arange(mask.shape[1]) == 0))

    def _resnet(self, features: int, **changes: Any) -> Callable[..., nn.Module]:
        return functools.partial(
            nn.remat(ResBlock) if self.remat else ResBlock,
            features,
            self.norm_num_groups,
            self.norm_eps,
            "scale_shift" if self.resnet_time_scale_shift == "scale_shift" else "add",
            ACTIVATIONS[self.act_fn],
            dropout=self.dropout,
            **self._policy(),
            **changes,
        )

    def _attention(self, features: int, groups: int | None) -> Callable[..., nn.Module]:
        kind = nn.remat(Attention) if self.remat else Attention
        return functools.partial(kind, self.attention_head_dim or features, groups, self.norm_eps, **self._policy())

    def _stage(
        self, block: str, features: int, layers: int, resize: Callable[..., nn.Module] | None, name: str
    ) -> Stage:
        attend = self._attention(features, self.norm_num_groups) if block.startswith("Attn") else None
        cross = attend if self.context_width else None
        return Stage(layers, self._resnet(features), attend, cross, resize, name=name)

    def _down_stage(self, i: int) -> Stage:
        block, features = self.down_block_types[i], self.block_out_channels[i]
        resize = functools.partial(Downsample, self.downsample_padding, **self._policy(), name="downsamplers_0")
        if block.startswith("Resnet") or (block.startswith("Attn") and self.downsample_type == "resnet"):
            resize = self._resnet(features, resample=half_size, name="downsamplers_0")
        last = i == len(self.block_out_channels) - 1
        return self._stage(block, features, self.layers_per_block, None if last else resize, f"down_blocks_{i}")

    def _up_stage(self, i: int) -> Stage:
        block, features = self.up_block_types[i], self.block_out_channels[-1 - i]
        resize = functools.partial(Upsample, **self._policy(), name="upsamplers_0")
        if block.startswith("Resnet") or (block.startswith("Attn") and self.upsample_type == "resnet"):
            resize = self._resnet(features, resample=double_size, name="upsamplers_0")
        last = i == len(self.block_out_channels) - 1
        return self._stage(block, features, self.layers_per_block + 1, None if last else resize, f"up_blocks_{i}")

    def _mid_block(self) -> MidBlock:
        features, groups = self.block_out_channels[-1], self.attn_norm_num_groups
        if groups is None and self.resnet_time_scale_shift == "default":
            groups = self.norm_num_groups
        attend = self._attention(features, groups)
        cross = attend if self.context_width else None
        return MidBlock(
            self.mid_block_scale_factor,
            self._resnet(features),
            attend if self.add_attention else None,
            cross,
            name="mid_block",
        )
