"""The T5 encoder (arXiv:1910.10683), v1.0 and v1.1: tokens to states.

Fields carry the names of published configurations. Queries are not scaled by 1/sqrt(d), positions enter as a bias that
all layers share, and norms divide by the root mean square.
"""

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from diffjax.nets.layers import Dense, RMSNorm, attention, stacked

Dtype = Any

normal = nn.initializers.normal


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "t t"]:
    """The bucket of each (query, key) pair: half of them for each sign of `key - query`.

    Of those, half hold one distance each; the others widen by equal ratios up to `max_distance`, and the last holds all
    that is beyond (section 2.1).
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance, half = np.abs(offset), buckets // 2
    exact = half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    wide = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return np.where(distance < exact, distance, wide) + half * (offset > 0)


class Attention(nn.Module):
    """Self-attention `softmax(q k^T + bias) v` with projections that have no bias of their own."""

    heads: int
    head_dim: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "1 n l l"], mask: Bool[Array, "b 1 1 l"] | None
    ) -> Float[Array, "b l d"]:
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        width = self.heads * self.head_dim
        q, k, v = (dense(width, name=name)(x).reshape(*x.shape[:2], self.heads, self.head_dim) for name in "qkv")
        # `attention` divides by sqrt(head_dim).
        y = attention(q * math.sqrt(self.head_dim), k, v, mask, bias.astype(self.dtype))
        return dense(x.shape[-1], name="o")(y.reshape(*x.shape[:2], width))


class FeedForward(nn.Module):
    """`relu(x W) V` (v1.0) or `(gelu(x W0) * x W1) V` (v1.1, arXiv:2002.05202).

    The inner values pass float16's range: where that is the dtype, the last product is in float32.
    """

    hidden: int
    gated: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        dense = functools.partial(Dense, self.hidden, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.gated:
            y = nn.gelu(dense(name="wi_0")(x).astype(jnp.float32), approximate=True) * dense(name="wi_1")(x)
        else:
            y = nn.relu(dense(name="wi")(x))
        wide = jnp.float32 if self.dtype == jnp.float16 else self.dtype
        return Dense(x.shape[-1], use_bias=False, dtype=wide, param_dtype=self.param_dtype, name="wo")(y)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`; `x` stays float32."""

    heads: int
    head_dim: int
    hidden: int
    gated: bool
    eps: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, bias: Array, mask: Array | None) -> tuple[Array, None]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = RMSNorm(self.eps, **policy, name="attention_norm")(x)
        x = x + Attention(self.heads, self.head_dim, **policy, name="attention")(y, bias, mask)
        y = RMSNorm(self.eps, **policy, name="ff_norm")(x)
        return x + FeedForward(self.hidden, self.gated, **policy, name="ff")(y), None


class T5Encoder(nn.Module):
    """`(tokens, mask=None) -> states (b, l, d_model)`; the defaults are T5 v1.1 XXL, 4.76 B parameters.

    Without a mask padding is attended to like any token, as SD3's pipeline has it; states at padded positions mean
    nothing with one. Layers are stacked; `scan` compiles one of them instead of all.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: Literal["relu", "gated-gelu"] = "gated-gelu"
    scan: bool = True
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    out_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l {self.d_model}"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = functools.partial(nn.Embed, embedding_init=normal(1.0), param_dtype=self.param_dtype)
        x = embed(self.vocab_size, self.d_model, name="shared")(tokens).astype(jnp.float32)
        buckets = self.relative_attention_num_buckets
        rows = relative_buckets(tokens.shape[1], buckets, self.relative_attention_max_distance)
        bias = embed(buckets, self.num_heads, name="relative_attention_bias")(rows)
        blocks = stacked(Block, self.num_layers, self.scan, self.remat)(
            self.num_heads,
            self.d_kv,
            self.d_ff,
            self.feed_forward_proj == "gated-gelu",
            self.layer_norm_epsilon,
            **policy,
            name="blocks",
        )
        x, _ = blocks(x, bias.transpose(2, 0, 1)[None], None if mask is None else mask[:, None, None])
        return RMSNorm(self.layer_norm_epsilon, **policy, name="final_layer_norm")(x).astype(self.out_dtype)
