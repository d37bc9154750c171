"""The U-Nets of Imagen (arXiv:2205.11487, appendix B): a base network, and efficient ones for super-resolution.

Text enters twice: image positions attend to the token states, and the states, pooled by attention, join the time
embedding. `MINIMAGEN_BASE` and `MINIMAGEN_SUPER` are the widths that MinImagen published.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from diffjax.nets.convolution import Conv
from diffjax.nets.layers import Dense, ResBlock, RMSNorm, UpConv, attention, keep_words, timestep_embedding
from diffjax.utils.errors import UserError

Dtype = Any
Tokens = tuple[Float[Array, "b l d"], Bool[Array, "b l"]] | tuple[()]

zeros = nn.initializers.zeros
normal = nn.initializers.normal(0.02)

SKIP = 2**-0.5

# MinImagen's number of residual blocks leaves out the one that reads the text.
MINIMAGEN_BASE = {
    "dim": 512,
    "mults": (1, 2, 3, 4),
    "blocks": (4, 4, 4, 4),
    "attention": (False, True, True, True),
    "cross_attention": (False, True, True, True),
}
MINIMAGEN_SUPER = {
    "dim": 128,
    "mults": (1, 2, 4, 8),
    "blocks": (3, 5, 9, 9),
    "attention": (False, False, False, True),
    "cross_attention": (False, False, False, True),
    "efficient": True,
}
TINY_BASE = {
    "dim": 16,
    "mults": (1, 2),
    "blocks": (1, 2),
    "attention": (False, True),
    "cross_attention": (False, True),
    "heads": 2,
    "head_dim": 16,
}
TINY_SUPER = TINY_BASE | {"blocks": (1, 1), "attention": (False, False), "efficient": True}


def fold(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h/p w/p p*p*c"]:
    """Each square of `patch` x `patch` pixels as one."""
    return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unfold(x: Float[Array, "b h w p*p*c"], patch: int) -> Float[Array, "b h*p w*p c"]:
    """The inverse of `fold`."""
    return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)


class Attention(nn.Module):
    """Pre-norm attention of an image's positions over themselves, or over tokens, the first of which is the null token,
    without the residual; 0 at the start.
    """

    heads: int
    head_dim: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        tokens: Float[Array, "b l d"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b n c"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.heads * self.head_dim
        y = RMSNorm(**policy, name="norm")(x)
        read = {"q": y, "k": y if tokens is None else tokens, "v": y if tokens is None else tokens}
        q, k, v = (
            Dense(width, use_bias=False, **policy, name=name)(z).reshape(*z.shape[:2], self.heads, self.head_dim)
            for name, z in read.items()
        )
        seen = None if mask is None else mask[:, None, None]
        if tokens is not None:
            keep_words(self, q, k, seen, slice(None), slice(1, None))
        y = attention(q, k, v, seen)
        return Dense(x.shape[-1], kernel_init=zeros, **policy, name="out")(y.reshape(*y.shape[:2], width))


class Mixer(nn.Module):
    """What follows a residual block: attention over the text, and self-attention with a feed-forward of twice
    the width.
    """

    heads: int
    head_dim: int
    over_text: bool
    over_image: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], tokens: Tokens) -> Float[Array, "b h w c"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = functools.partial(Attention, self.heads, self.head_dim, **policy)
        y, width = x.reshape(x.shape[0], -1, x.shape[-1]), x.shape[-1]
        if self.over_text:
            y = y + attend(name="cross_attention")(y, *tokens)
        if self.over_image:
            y = y + attend(name="attention")(y)
            z = Dense(2 * width, **policy, name="ff_in")(RMSNorm(**policy, name="ff_norm")(y))
            y = y + Dense(width, kernel_init=zeros, **policy, name="ff_out")(nn.gelu(z))
        return y.reshape(x.shape)


class Level(nn.Module):
    """The residual blocks of one resolution: the first is followed by attention over the text, the last by
    self-attention.

    `resnet` and `mixer` make the parts.
    """

    blocks: int
    over_text: bool
    over_image: bool
    resnet: Callable[..., nn.Module]
    mixer: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], tokens: Tokens, skips: Sequence[Array] = ()
    ) -> list[Float[Array, "b h w c2"]]:
        """What each block gives, the last being the level's own; with `skips`, each block reads one of them."""
        outputs = []
        for i in range(self.blocks):
            x = jnp.concatenate([x, SKIP * skips[i]], axis=-1) if skips else x
            x = self.resnet(name=f"resnets_{i}")(x, emb)
            ways = self.over_text and i == 0, self.over_image and i == self.blocks - 1
            if any(ways):
                x = self.mixer(*ways, name=f"mixers_{i}")(x, tokens)
            outputs.append(x)
        return outputs


class TextPool(nn.Module):
    """Token states to one vector: a learned query attends to them, then a layer of two."""

    features: int
    heads: int
    head_dim: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Float[Array, "b features"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query = self.param("query", nn.initializers.normal(1.0), (1, 1, tokens.shape[-1]), self.param_dtype)
        query = jnp.broadcast_to(query, (len(tokens), 1, tokens.shape[-1]))
        read = {"q": query, "k": tokens, "v": tokens}
        q, k, v = (
            Dense(self.heads * self.head_dim, use_bias=False, **policy, name=name)(z).reshape(
                *z.shape[:2], self.heads, self.head_dim
            )
            for name, z in read.items()
        )
        y = RMSNorm(**policy, name="norm")(attention(q, k, v, mask[:, None, None]).reshape(len(tokens), -1))
        y = nn.silu(Dense(self.features, **policy, name="linear_1")(y))
        return Dense(self.features, **policy, name="linear_2")(y)


class ImagenUNet(nn.Module):
    """`y(x, t)`, the shape of `x`, as wide as `dim * mults[i]` behind level i; the output is float32.

    `blocks`, `attention` and `cross_attention` are given for each level. `efficient` halves before a level's blocks and
    doubles after them instead of the reverse, so that none runs at full resolution (appendix B.1). `patch` folds
    squares of pixels into channels before all else, for machines that are slow.

    Text: with `context_width`, the token states `context`; beside those that `mask` shows, a learned null token is
    always there, and alone in a row whose mask is False throughout. The network pools the states itself: `pooled` is
    not read. Classes: `label` in [0, classes), or -1 for the learned null class. With `low_res`, `low_res` is a picture
    of the size of `x` that stands beside it and `level` the noise in it, in [0, 1]. `remat` recomputes blocks in the
    backward pass.

    Raises `UserError` for a size that does not halve evenly, and for a missing condition.
    """

    dim: int = 128
    mults: tuple[int, ...] = (1, 2, 4, 8)
    blocks: tuple[int, ...] = (3, 3, 3, 3)
    attention: tuple[bool, ...] = (False, False, False, True)
    cross_attention: tuple[bool, ...] = (False, False, False, True)
    efficient: bool = False
    patch: int = 1
    heads: int = 8
    head_dim: int = 64
    groups: int = 8
    context_width: int = 0
    classes: int = 0
    low_res: bool = False
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b l d"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
        label: Int[Array, " b"] | None = None,
        low_res: Float[Array, "b h w c"] | None = None,
        level: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        self._check(x)
        tokens = self._tokens(context, mask)
        emb = self._embedding(t, "time") + self._embed_text(tokens) + self._embed_label(label)
        pixels = x
        if self.low_res:
            if low_res is None or level is None:
                raise UserError("this network draws from low-res pictures: give `low_res` and `level`")
            emb = emb + self._embedding(1000 * level, "level")
            pixels = jnp.concatenate([x, low_res], axis=-1)
        first = self._stem(fold(pixels, self.patch).astype(self.dtype))
        y = self._up(self._down(first, emb, tokens), emb, tokens)
        y = self._resnet(self.dim)(name="last_block")(jnp.concatenate([y, SKIP * first], axis=-1), emb)
        y = self._conv(self.patch**2 * x.shape[-1], 3, kernel_init=zeros, name="conv_out")(y)
        return unfold(y.astype(jnp.float32), self.patch)

    @property
    def multiple(self) -> int:
        """Of what number of pixels each side of a picture is a multiple."""
        return self.patch * 2 ** (len(self.mults) - (0 if self.efficient else 1))

    def _down(self, x: Array, emb: Array, tokens: Tokens) -> list[list[Array]]:
        """What the blocks of every level give, and at last the middle."""
        levels, widths = [], [self.dim, *(self.dim * m for m in self.mults)]
        for i, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            last = i == len(self.mults) - 1
            if self.efficient:
                x = self._halve(wide, name=f"down_{i}")(x)
            levels.append(self._level(i, wide if self.efficient else narrow, f"down_blocks_{i}")(x, emb, tokens))
            x = levels[-1][-1]
            if not self.efficient:
                x = self._conv(wide, 3, name=f"down_{i}")(x) if last else self._halve(wide, name=f"down_{i}")(x)
        text = self.context_width > 0
        middle = Level(2, text, False, self._resnet(widths[-1]), self._mixer(), name="mid_block")
        return [*levels, middle(x, emb, tokens)]

    def _up(self, levels: list[list[Array]], emb: Array, tokens: Tokens) -> Float[Array, "b h w c"]:
        *levels, middle = levels
        x = middle[-1]
        for i in reversed(range(len(self.mults))):
            x = self._level(i, self.dim * self.mults[i], f"up_blocks_{i}")(x, emb, tokens, levels[i][::-1])[-1]
            if i or self.efficient:
                features = self.dim * self.mults[i - 1] if i else self.dim
                x = UpConv(features, **self._policy(), name=f"up_{i}")(x)
        return x

    def _stem(self, x: Array) -> Float[Array, "b h w c"]:
        """Three convolutions of different reach side by side."""
        widths = {3: self.dim - 2 * (self.dim // 4), 7: self.dim // 4, 15: self.dim // 4}
        return jnp.concatenate([self._conv(w, size, name=f"conv_in_{size}")(x) for size, w in widths.items()], axis=-1)

    def _policy(self) -> dict[str, Dtype]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _conv(self, features: int, size: int, **fields: Any) -> Conv:
        return Conv(features, (size, size), padding=size // 2, **self._policy(), **fields)

    def _halve(self, features: int, name: str) -> Conv:
        return Conv(features, (4, 4), strides=2, padding=1, **self._policy(), name=name)

    def _resnet(self, features: int) -> Callable[..., nn.Module]:
        kind = nn.remat(ResBlock) if self.remat else ResBlock
        return functools.partial(kind, features, self.groups, time_embedding="scale_shift", **self._policy())

    def _mixer(self) -> Callable[..., nn.Module]:
        return functools.partial(nn.remat(Mixer) if self.remat else Mixer, self.heads, self.head_dim, **self._policy())

    def _level(self, i: int, features: int, name: str) -> Level:
        text = self.context_width > 0 and self.cross_attention[i]
        return Level(self.blocks[i], text, self.attention[i], self._resnet(features), self._mixer(), name=name)

    def _embedding(self, t: Float[Array, " b"], name: str) -> Float[Array, "b e"]:
        dense = functools.partial(Dense, 4 * self.dim, **self._policy())
        return dense(name=f"{name}_2")(nn.silu(dense(name=f"{name}_1")(timestep_embedding(t, self.dim))))

    def _embed_label(self, label: Array | None) -> Float[Array, "b e"] | float:
        if not self.classes:
            return 0.0
        if label is None:
            raise UserError("this model is conditional on a class: give a label for every image")
        table = self.param("label_embedding", normal, (self.classes + 1, 4 * self.dim), self.param_dtype)
        return jnp.asarray(table)[label].astype(self.dtype)

    def _embed_text(self, tokens: Tokens) -> Float[Array, "b e"] | float:
        if not tokens:
            return 0.0
        return TextPool(4 * self.dim, self.heads, self.head_dim, **self._policy(), name="text_pool")(*tokens)

    def _tokens(self, context: Array | None, mask: Array | None) -> Tokens:
        """The states at width `dim`, normed, after the null token; and which are seen. Without text, nothing."""
        if not self.context_width:
            return ()
        if context is None:
            raise UserError("this model reads a text: give `context` and `mask`")
        null = self.param("null_token", nn.initializers.normal(1.0), (1, 1, self.dim), self.param_dtype)
        states = RMSNorm(**self._policy(), name="context_norm")(
            Dense(self.dim, **self._policy(), name="context_in")(context)
        )
        states = jnp.concatenate(
            [jnp.broadcast_to(null, (len(states), 1, self.dim)).astype(self.dtype), states], axis=1
        )
        seen = jnp.ones(context.shape[:2], bool) if mask is None else mask
        return states, jnp.pad(seen, ((0, 0), (1, 0)), constant_values=True)

    def _check(self, x: Array) -> None:
        if x.shape[1] % self.multiple or x.shape[2] % self.multiple:
            raise UserError(
                f"images of {x.shape[1]} x {x.shape[2]} pixels: this network reads multiples of {self.multiple}"
            )
