"""The multimodal transformer of Stable Diffusion 3 and 3.5 (arXiv:2403.03206): image and text in one sequence.

Fields carry the names of diffusers' SD3Transformer2DModel. Layers of one kind that follow each other are stacked.
"""

import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from diffjax.nets.convolution import Conv
from diffjax.nets.layers import Dense, RMSNorm, attention, keep_words, stacked, timestep_embedding
from diffjax.nets.split import Split
from diffjax.nets.unet import EmbeddingMLP
from diffjax.utils.errors import UserError

Dtype = Any

EPS = 1e-6
TIME_WIDTH = 256


def layer_norm(x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """`(x - mean) / sqrt(var + 1e-6)` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)


def position_table(side: int, base: int, width: int) -> Float[Array, "1 side*side width"]:
    """Sines and cosines of the column, then of the row, on `side` x `side` places, `side / base` to a unit."""
    place = jnp.arange(side) * (base / side)
    rate = 10000.0 ** (-jnp.arange(width // 4) / (width // 4))
    angle = place[:, None] * rate
    wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    column, row = jnp.broadcast_to(wave, (side, *wave.shape)), jnp.broadcast_to(wave[:, None], (side, *wave.shape))
    return jnp.concatenate([column, row], axis=-1).reshape(1, side * side, width)


class Attention(nn.Module):
    """Attention of the image over itself and, when given, the text, whose tokens stand behind the image's.

    Queries and keys are normed per head. The result of the text is `None` where there is no text or `text_out` is off.
    With `split` there are heads of zeros, and devices share the heads.
    """

    heads: int
    head_dim: int
    qk_norm: bool
    split: Split | None
    text_out: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], text: Float[Array, "b l d"] | None = None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b l d"] | None]:
        dense = functools.partial(Dense, x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype)
        projected = self._project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if text is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            pairs = zip(projected, self._project(text, *names))
            projected = [jnp.concatenate(pair, axis=1) for pair in pairs]
            q, k, _ = projected
            own = slice(None), slice(None), slice(self.heads)
            keep_words(self, q[own], k[own], None, slice(x.shape[1]), slice(x.shape[1], None))
        y = self.split.attend(attention, *projected) if self.split else attention(*projected)
        y = y.reshape(*y.shape[:2], -1)
        own, rest = jnp.split(y, [x.shape[1]], axis=1)
        text_y = dense(name="to_add_out")(rest) if text is not None and self.text_out else None
        return dense(name="to_out_0")(own), text_y

    def _project(self, x: Array, names: tuple[str, ...], norms: tuple[str, str]) -> list[Float[Array, "b l n h"]]:
        """Queries, keys and values."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = self.split.padded(self.heads) if self.split else self.heads
        dense = functools.partial(Dense, heads * self.head_dim, **policy)
        q, k, v = (dense(name=name)(x).reshape(*x.shape[:2], heads, -1) for name in names)
        if self.qk_norm:
            q, k = (RMSNorm(EPS, **policy, name=name)(y) for y, name in zip((q, k), norms))
        return [q, k, v]


class FeedForward(nn.Module):
    """`W2 gelu(W1 x)`, four times as wide inside; the gelu is the tanh approximation."""

    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.gelu(dense(4 * x.shape[-1], name="net_0_proj")(x), approximate=True)
        return dense(x.shape[-1], name="net_2")(y)


class Kind(NamedTuple):
    """Whether a layer attends to the image alone a second time, and whether it is the last, whose text ends there."""

    dual: bool
    last: bool


class Block(nn.Module):
    """One layer: `x + gate * attention`, then `x + gate * feed_forward`, of image and text; gate, shift and scale are
    linear in `emb`, and norm 1 and norm 2 are `(1 + scale) layer_norm(x) + shift`.

    With `skippable`, the layer is left out where `keep` is False.
    """

    heads: int
    head_dim: int
    qk_norm: bool
    split: Split | None
    kind: Kind
    skippable: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b t d"], Float[Array, "b l d"]],
        emb: Float[Array, "b d"],
        keep: Bool[Array, ""],
    ) -> tuple[tuple[Array, Array], None]:
        if self.skippable and not self.is_initializing():
            return nn.cond(keep, lambda self: self._run(*streams, emb), lambda self: streams, self), None
        return self._run(*streams, emb), None

    def _run(self, x: Array, text: Array, emb: Array) -> tuple[Array, Array]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = functools.partial(Attention, self.heads, self.head_dim, self.qk_norm, self.split, **policy)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self._modulation(
            "norm1", emb, 9 if self.kind.dual else 6
        )
        x, text = (self.split.place(y) if self.split else y for y in (x, text))
        normed, text_normed = layer_norm(x), layer_norm(text)
        if self.kind.last:
            text_scale, text_shift, *text_rest = self._modulation("norm1_context", emb, 2)
        else:
            text_shift, text_scale, *text_rest = self._modulation("norm1_context", emb, 6)
        moved = text_normed * (1 + text_scale) + text_shift
        y, text_y = attend(not self.kind.last, name="attn")(normed * (1 + scale) + shift, moved)
        x = self._add(x, gate, y)
        if self.kind.dual:
            shift, scale, gate = second
            x = self._add(x, gate, attend(False, name="attn2")(normed * (1 + scale) + shift)[0])
        y = FeedForward(**policy, name="ff")(layer_norm(x) * (1 + scale_ff) + shift_ff)
        x = self._add(x, gate_ff, y)
        if self.kind.last or text_y is None:
            return x, text
        gate, shift_ff, scale_ff, gate_ff = text_rest
        text = self._add(text, gate, text_y)
        y = FeedForward(**policy, name="ff_context")(layer_norm(text) * (1 + scale_ff) + shift_ff)
        return x, self._add(text, gate_ff, y)

    def _modulation(self, name: str, emb: Array, parts: int) -> list[Float[Array, "b 1 d"]]:
        return modulation(emb, parts, f"{name}_linear", self.dtype, self.param_dtype)

    def _add(self, x: Array, gate: Array, y: Array) -> Array:
        return (x + gate * y).astype(self.dtype)


def modulation(emb: Float[Array, "b d"], parts: int, name: str, dtype: Dtype, param_dtype: Dtype) -> list[Array]:
    """`parts` vectors per image out of `emb`, which went through silu, by a layer called `name`; float32."""
    y = Dense(parts * emb.shape[-1], dtype=dtype, param_dtype=param_dtype, name=name)(emb)
    return jnp.split(y.astype(jnp.float32)[:, None], parts, axis=-1)


class MMDiT(nn.Module):
    """`(x, t, context, pooled) -> y`, the shape of `x` but for `out_channels`; the defaults are SD3.5 large's.

    `x` are latents, `t` is 1000 sigma, `context` the token states of the text encoders, `pooled` their pooled vectors.
    The position table is a constant (no gradient reaches it), cropped about its centre. `skip_layers` are left out, for
    skip-layer guidance; `scan` compiles one layer of each kind instead of all; `remat` recomputes layers in the
    backward pass. With `split` devices share the work, and the parameters are those of `pad_heads`.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 38
    attention_head_dim: int = 64
    num_attention_heads: int = 38
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    skip_layers: tuple[int, ...] = ()
    scan: bool = True
    remat: bool = False
    split: Split | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    out_dtype: Dtype = jnp.float32

    @property
    def width(self) -> int:
        """Channels of the image's and the text's stream."""
        return self.num_attention_heads * self.attention_head_dim

    def runs(self) -> list[tuple[int, int, Kind]]:
        """The stacks: first layer, number of layers, kind."""
        kinds = [Kind(i in self.dual_attention_layers, i == self.num_layers - 1) for i in range(self.num_layers)]
        groups = [(kind, list(layers)) for kind, layers in itertools.groupby(range(self.num_layers), kinds.__getitem__)]
        return [(layers[0], len(layers), kind) for kind, layers in groups]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b l {self.joint_attention_dim}"],
        pooled: Float[Array, "b {self.pooled_projection_dim}"],
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """The network's output. Raises `UserError` for a size that patches do not divide or the table lacks."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        (b, h, w, _), p = x.shape, self.patch_size
        embed = functools.partial(EmbeddingMLP, self.width, **policy)
        emb = embed(name="timestep_embedder")(timestep_embedding(t, TIME_WIDTH)) + embed(name="text_embedder")(pooled)
        emb = nn.silu(emb)
        patches = Conv(self.width, (p, p), strides=p, **policy, name="pos_embed_proj")(x)
        tokens = (patches + self._positions(h, w)).astype(self.dtype).reshape(b, -1, self.width)
        streams = tokens, Dense(self.width, **policy, name="context_embedder")(context)
        for run in self.runs():
            streams = self._run(*run, streams, emb)
        scale, shift = modulation(emb, 2, "norm_out_linear", **policy)
        y = Dense(p * p * self.out_channels, **policy, name="proj_out")(layer_norm(streams[0]) * (1 + scale) + shift)
        y = rearrange(y, "b (h w) (p q c) -> b (h p) (w q) c", h=h // p, p=p, q=p)
        return y.astype(self.out_dtype)

    def _positions(self, h: int, w: int) -> Float[Array, "1 h/p w/p d"]:
        """The middle of the position table."""
        p, side = self.patch_size, self.pos_embed_max_size
        if h % p or w % p:
            raise UserError(f"latents of {h} x {w}: give multiples of {p}")
        rows, columns = h // p, w // p
        if max(rows, columns) > side:
            raise UserError(
                f"latents of {h} x {w} are larger than this model's table of positions: give at most {side * p}"
            )
        init = lambda key: position_table(side, self.sample_size // p, self.width).astype(self.param_dtype)
        table = lax.stop_gradient(self.param("pos_embed", init)).reshape(1, side, side, self.width)
        top, left = (side - rows) // 2, (side - columns) // 2
        return table[:, top : top + rows, left : left + columns]

    def _run(
        self, first: int, length: int, kind: Kind, streams: tuple[Array, Array], emb: Array
    ) -> tuple[Array, Array]:
        """The layers of one stack."""
        keep = np.array([i not in self.skip_layers for i in range(first, first + length)])
        blocks = stacked(Block, length, self.scan, self.remat, (nn.broadcast, 0))(
            self.num_attention_heads,
            self.attention_head_dim,
            self.qk_norm is not None,
            self.split,
            kind,
            not keep.all(),
            self.dtype,
            self.param_dtype,
            name=f"blocks_{first}",
        )
        return blocks(streams, emb, jnp.asarray(keep))[0]
