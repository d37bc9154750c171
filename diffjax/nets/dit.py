"""The pixel transformer: patches in, the clean picture out, text in the same sequence.

The parts are those of JiT (arXiv:2511.13720): x0-prediction on large patches, RMS-normed queries and keys, positions as
rotations in two dimensions, SwiGLU. The modulation is adaLN-zero (DiT, arXiv:2212.09748, section 3.2) with one
projection for all layers and a low-rank term for each.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from diffjax.nets.layers import Dense, RMSNorm, SelfAttention, SwiGLU, rotary, stacked, timestep_embedding
from diffjax.utils.errors import UserError

Dtype = Any

zeros = nn.initializers.zeros

TIME_CHANNELS = 256


class Block(nn.Module):
    """Self-attention, then SwiGLU, each as `x + gate * f((1 + scale) norm(x) + shift)`.

    Shifts, scales and gates are `shared` and, of this layer alone, `emb A B` of rank `rank`. The first `text` tokens
    are a text.
    """

    heads: int
    hidden: int
    rank: int
    dtype: Dtype
    param_dtype: Dtype
    text: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        shared: Float[Array, "b 6*c"],
        emb: Float[Array, "b c"],
        turn: Float[Array, "2 t f"],
        mask: Bool[Array, "b 1 1 t"] | None,
    ) -> tuple[Float[Array, "b t c"], None]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        low = Dense(self.rank, use_bias=False, **policy, name="adapt_in")(emb)
        own = Dense(6 * x.shape[-1], **policy, kernel_init=zeros, name="adapt_out")(low)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split((shared + own)[:, None], 6, axis=-1)
        norm = RMSNorm(use_scale=False)
        y = norm(x) * (1 + scale1) + shift1
        x = x + gate1 * SelfAttention(self.heads, **policy, text=self.text, name="attention")(y, turn, mask)
        y = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * SwiGLU(self.hidden, **policy, name="mlp")(y)
        return x, None


class DiT(nn.Module):
    """A transformer on patches of `patch` x `patch` pixels; the residual stream and the output are float32.

    Text: with `context_width`, the token states `context` stand before the patches in one sequence, where those that
    `mask` leaves out are not seen; with `pooled_width`, `pooled` joins the time embedding. A row whose mask is False
    throughout has a learned null token and null vector in their place. Classes: `label` in [0, classes), or -1 for the
    learned null class. Positions are relative, so any size divisible by `patch` is read.

    `scan` compiles one block instead of `depth`, at the price of speed on a CPU; parameters are stacked either way.
    Raises `UserError` for a size that is no multiple of `patch`, and for a missing condition.
    """

    patch: int = 8
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int = 672
    rank: int = 32
    context_width: int = 0
    pooled_width: int = 0
    classes: int = 0
    remat: bool = False
    scan: bool = False
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
    ) -> Float[Array, "b h w c"]:
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UserError(f"{x.shape[1]} x {x.shape[2]} pixels do not cut into patches of {self.patch}: change one")
        has_text = None if mask is None else jnp.any(mask, axis=1)
        emb = self._embed_time(t) + self._embed_pooled(pooled, has_text) + self._embed_label(label)
        emb = nn.silu(emb.astype(jnp.float32))
        y = self._dense(self.width, name="patch_in")(self._cut(x)).astype(jnp.float32)
        y, mask = self._with_text(y, context, mask, has_text)
        lead = y.shape[1] - (x.shape[1] // self.patch) * (x.shape[2] // self.patch)
        y = self._blocks(y, emb, self._turn(x, lead), mask, lead)[:, lead:]
        shift, scale = jnp.split(self._zero(2 * self.width, name="adapt_last")(emb)[:, None], 2, axis=-1)
        y = RMSNorm(use_scale=False)(y) * (1 + scale) + shift
        return self._join(self._zero(self.patch**2 * x.shape[-1], name="patch_out")(y), x.shape)

    @property
    def multiple(self) -> int:
        """Of what number of pixels each side of a picture is a multiple."""
        return self.patch

    def _dense(self, features: int, **fields: Any) -> Dense:
        return Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, **fields)

    def _zero(self, features: int, name: str) -> Dense:
        return self._dense(features, kernel_init=zeros, name=name)

    def _null(self, name: str) -> Float[Array, " c"]:
        return self.param(name, nn.initializers.normal(0.02), (self.width,), self.param_dtype)

    def _embed_time(self, t: Float[Array, " b"]) -> Float[Array, "b c"]:
        y = self._dense(self.width, name="time_in")(timestep_embedding(t, TIME_CHANNELS))
        return self._dense(self.width, name="time_out")(nn.silu(y))

    def _embed_pooled(self, pooled: Array | None, has_text: Array | None) -> Float[Array, "b c"] | float:
        if not self.pooled_width:
            return 0.0
        if pooled is None:
            raise UserError("this model reads a pooled text vector: give `pooled`")
        emb, null = self._dense(self.width, name="pooled_in")(pooled), self._null("null_pooled")
        if has_text is None:
            return emb
        return jnp.where(has_text[:, None], emb, jnp.broadcast_to(null, emb.shape).astype(emb.dtype))

    def _embed_label(self, label: Array | None) -> Float[Array, "b c"] | float:
        if not self.classes:
            return 0.0
        if label is None:
            raise UserError("this model is conditional on a class: give a label for every image")
        shape = (self.classes + 1, self.width)
        return self.param("label_embedding", nn.initializers.normal(0.02), shape, self.param_dtype)[label]

    def _with_text(
        self, y: Float[Array, "b t c"], context: Array | None, mask: Array | None, has_text: Array | None
    ) -> tuple[Float[Array, "b t c"], Bool[Array, "b 1 1 t"] | None]:
        """The sequence with the text before the patches, and which of it is seen."""
        if not self.context_width:
            return y, None
        if context is None:
            raise UserError("this model reads a text: give `context` and `mask`")
        text, null = self._dense(self.width, name="context_in")(context), self._null("null_token")
        if mask is not None and has_text is not None:
            text = jnp.where(has_text[:, None, None], text, jnp.broadcast_to(null, text.shape).astype(text.dtype))
            mask = mask.at[:, 0].set(mask[:, 0] | ~has_text)
            mask = jnp.pad(mask, ((0, 0), (0, y.shape[1])), constant_values=True)[:, None, None]
        return jnp.concatenate([text.astype(jnp.float32), y], axis=1), mask

    def _blocks(self, y: Array, emb: Array, turn: np.ndarray, mask: Array | None, text: int) -> Float[Array, "b t c"]:
        shared = self._zero(6 * self.width, name="adapt")(emb).astype(jnp.float32)
        blocks = stacked(Block, self.depth, self.scan, self.remat)(
            self.heads, self.hidden, self.rank, self.dtype, self.param_dtype, text, name="blocks"
        )
        return blocks(y, shared, emb, turn, mask)[0]

    def _turn(self, x: Array, lead: int) -> Float[np.ndarray, "2 t f"]:
        """Rotations by row and column of the patches, after `lead` tokens that have no place."""
        place = np.indices((x.shape[1] // self.patch, x.shape[2] // self.patch)).reshape(2, -1).T
        return rotary(np.pad(place, ((lead, 0), (0, 0))), self.width // self.heads)

    def _cut(self, x: Float[Array, "b h w c"]) -> Float[Array, "b t p*p*c"]:
        return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)

    def _join(self, y: Float[Array, "b t p*p*c"], shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
        rows, p = shape[1] // self.patch, self.patch
        return rearrange(y.astype(jnp.float32), "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=p, q=p)
