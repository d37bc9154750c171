"""The text half of CLIP (arXiv:2103.00020): tokens to states and one vector a text.

Fields carry the names of published configurations.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from diffjax.nets.layers import Dense, attention, stacked

Dtype = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(nn.gelu, approximate=False),
}
LEGACY_EOS = 2
"""The end-of-text id that early configurations give, whatever the vocabulary's own."""


class Encoded(NamedTuple):
    """The last layer's states, normed; those of the layer before, as they are; the projected end-of-text state."""

    states: Float[Array, "b l d"]
    penultimate: Float[Array, "b l d"]
    pooled: Float[Array, "b p"]


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + W2 act(W1 norm(x))`; the second of the pair it carries is its input."""

    heads: int
    hidden: int
    act: Callable[[Array], Array]
    eps: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], mask: Bool[Array, "#b 1 l l"]) -> tuple[tuple[Array, Array], None]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.LayerNorm, self.eps, use_fast_variance=False, **policy)
        dense = functools.partial(Dense, **policy)
        before, _ = carry
        width = before.shape[-1]
        y = norm(name="layer_norm1")(before)
        q, k, v = (
            dense(width, name=name)(y).reshape(*y.shape[:2], self.heads, -1) for name in ("q_proj", "k_proj", "v_proj")
        )
        x = before + dense(width, name="out_proj")(attention(q, k, v, mask).reshape(y.shape))
        y = dense(self.hidden, name="fc1")(norm(name="layer_norm2")(x))
        return (x + dense(width, name="fc2")(self.act(y)), before), None


class ClipText(nn.Module):
    """`(tokens, mask=None) -> Encoded`; the defaults are CLIP-L (123.7 M parameters).

    Attention is causal. The text's vector is the state at the first `eos_token_id`, or where that is the legacy 2, at
    the highest id; it is normed, then projected. Layers are stacked; `scan` compiles one of them instead of all.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 77
    projection_dim: int = 768
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS
    scan: bool = True
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    out_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Encoded:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length = tokens.shape[1]
        embed = functools.partial(nn.Embed, features=self.hidden_size, param_dtype=self.param_dtype)
        x = embed(self.vocab_size, name="token_embedding")(tokens).astype(self.dtype)
        x = x + embed(self.max_position_embeddings, name="position_embedding")(jnp.arange(length)).astype(self.dtype)
        seen = jnp.tri(length, dtype=bool)[None, None]
        seen = seen if mask is None else seen & mask[:, None, None]
        blocks = stacked(Block, self.num_hidden_layers, self.scan, self.remat)(
            self.num_attention_heads,
            self.intermediate_size,
            ACTIVATIONS[self.hidden_act],
            self.layer_norm_eps,
            **policy,
            name="blocks",
        )
        (x, penultimate), _ = blocks((x, x), seen)
        states = nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, **policy, name="final_layer_norm")(x)
        end = tokens if self.eos_token_id == LEGACY_EOS else tokens == self.eos_token_id
        last = jnp.take_along_axis(states, jnp.argmax(end, axis=1)[:, None, None], axis=1)[:, 0]
        pooled = Dense(self.projection_dim, use_bias=False, **policy, name="text_projection")(last)
        return Encoded(*(y.astype(self.out_dtype) for y in (states, penultimate, pooled)))
