"""BERT (arXiv:1810.04805) as a text encoder; the defaults are MiniLM-L6 (arXiv:2002.10957), 22.6 M parameters.

Fields carry the names of published configurations.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from diffjax.nets.layers import Dense, attention, stacked

Dtype = Any


class Block(nn.Module):
    """`norm(x + attention(x))`, then `norm(x + W2 gelu(W1 x))`."""

    heads: int
    hidden: int
    eps: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "b 1 1 l"] | None) -> tuple[Array, None]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.LayerNorm, self.eps, use_fast_variance=False, **policy)
        dense = functools.partial(Dense, **policy)
        width = x.shape[-1]
        q, k, v = (
            dense(width, name=name)(x).reshape(*x.shape[:2], self.heads, -1) for name in ("query", "key", "value")
        )
        y = dense(width, name="attention_out")(attention(q, k, v, mask).reshape(x.shape))
        x = norm(name="attention_norm")(x + y)
        y = nn.gelu(dense(self.hidden, name="ff_in")(x), approximate=False)
        return norm(name="ff_norm")(x + dense(width, name="ff_out")(y)), None


class Bert(nn.Module):
    """`(tokens, mask=None) -> states (b, l, hidden_size)` of single sentences.

    Layers are stacked; `scan` compiles one of them instead of all.
    """

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    scan: bool = True
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    out_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l {self.hidden_size}"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = functools.partial(nn.Embed, features=self.hidden_size, param_dtype=self.param_dtype)
        x = embed(self.vocab_size, name="word_embeddings")(tokens).astype(jnp.float32)
        x = x + embed(self.max_position_embeddings, name="position_embeddings")(jnp.arange(tokens.shape[1]))
        x = x + embed(self.type_vocab_size, name="token_type_embeddings")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, **policy, name="embedding_norm")(x)
        blocks = stacked(Block, self.num_hidden_layers, self.scan, self.remat)(
            self.num_attention_heads, self.intermediate_size, self.layer_norm_eps, **policy, name="blocks"
        )
        x, _ = blocks(x, None if mask is None else mask[:, None, None])
        return x.astype(self.out_dtype)
