"""Text without a download: a vocabulary counted from the captions, and a small encoder trained with the network.

Every encoder, frozen or not, ends in the same `TextEncoder`: prompts in, the conditions of a network out.
"""

import functools
import json
import math
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PyTree

from diffjax.nets.layers import RMSNorm, SelfAttention, SwiGLU, rotary, stacked
from diffjax.text.reading import Reading, Reworded, Words, remarks
from diffjax.utils import struct

if TYPE_CHECKING:
    import tokenizers

Dtype = Any

PIECE = r"[\p{L}\p{M}\p{N}]+|[^\p{L}\p{M}\p{N}\s]"
"""A word, or one other sign; spaces are forgotten."""

LETTER, BYTE = -20.0, -1000.0
"""Log-probabilities, so that a word is read as itself before it is spelled, and spelled before its bytes are taken."""


CAPTIONS = 8192
"""The most different captions that a tokenizer keeps, so that prompts are read as they say."""


class TextEncoder(Protocol):
    """Prompts to `context` (b, l, d) and `mask` (b, l), or `pooled` (b, p), or all three; "" has no token."""

    def __call__(self, texts: Sequence[str]) -> dict[str, Array]: ...


@dataclass(frozen=True)
class CaptionTokenizer:
    """Texts to rows of `length` token ids: words of the captions, else letters, else bytes, so that nothing is unknown.

    Case and spacing are not kept. Padding is token 0, and its mask False. `captions` are those it was trained on, with
    their number (none where they are more than `CAPTIONS`), and `total` the number of words in them (0: not known).
    """

    rules: "tokenizers.Tokenizer"
    length: int
    captions: Mapping[str, int] = field(default_factory=dict, compare=False)
    total: int = 0

    @classmethod
    def train(cls, captions: Iterable[str], length: int, words: int = 8192) -> "CaptionTokenizer":
        """The most frequent words of the captions, and all their letters; the same captions give the same ids."""
        rules = _rules([])
        counts: Counter[str] = Counter()
        different: Counter[str] = Counter()
        for caption in captions:
            counts.update(_pieces(rules, caption))
            if len(different) <= CAPTIONS:
                different[caption] += 1
        letters = sorted(set(string.printable.lower()).union(*counts))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[:words]
        known = [(letter, LETTER) for letter in letters]
        kept = dict(sorted(different.items())) if len(different) <= CAPTIONS else {}
        rules = _rules(known + [(word, math.log(counts[word] / counts.total())) for word in frequent])
        return cls(rules, length, kept, counts.total())

    @classmethod
    def from_json(cls, text: str) -> "CaptionTokenizer":
        """What `to_json` wrote."""
        import tokenizers

        stored = json.loads(text)
        rules = tokenizers.Tokenizer.from_str(json.dumps(stored["tokenizer"]))
        return cls(rules, stored["length"], stored.get("captions", {}), stored.get("total", 0))

    def to_json(self) -> str:
        """The whole tokenizer as one string."""
        kept = {"length": self.length, "captions": dict(self.captions), "total": self.total}
        return json.dumps(kept | {"tokenizer": json.loads(self.rules.to_str())}, ensure_ascii=False)

    @functools.cached_property
    def words(self) -> Words:
        """The words of the captions. Without their `total`, the rarest is taken to occur once."""
        vocabulary = json.loads(self.rules.to_str())["model"]["vocab"]
        scores = {piece[1:]: score for piece, score in vocabulary if piece.startswith(" ") and score > LETTER}
        shares = {word: math.exp(score) for word, score in scores.items()}
        total = self.total or 1 / min(shares.values(), default=1)
        counts = {word: round(share * total) for word, share in shares.items()}
        complete = math.isclose(sum(shares.values()), 1, rel_tol=1e-6)
        return Words(counts, self.captions, complete, functools.partial(_split, self.rules))

    def read(self, prompt: str) -> Reading:
        """What a prompt is read as, which is not how training reads captions. Raises `UserError` as
        `Words.read` does.
        """
        return self.words.read(prompt)

    @property
    def size(self) -> int:
        """The number of different tokens."""
        return self.rules.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """`tokens` (b, length) int32 and `mask` (b, length), True where a token is real.

        Warns when a text is longer, showing what is cut off the first such text.
        """
        rows = [encoding.ids for encoding in self.rules.encode_batch(list(texts))]
        if long := [i for i, row in enumerate(rows) if len(row) > self.length]:
            row, text = rows[long[0]], texts[long[0]]
            lost = self.rules.decode(row[self.length :]).strip()
            warnings.warn(
                f"{text!r} has {len(row)} tokens of which {self.length} are read: it loses {lost!r}", stacklevel=2
            )
        tokens = np.zeros((len(rows), self.length), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row[: self.length]
        return {"tokens": tokens, "mask": np.arange(self.length) < np.array([len(row) for row in rows])[:, None]}


def _pieces(rules: "tokenizers.Tokenizer", text: str) -> list[str]:
    """The words and signs of a text as they are looked up, each after a space."""
    return [piece for piece, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text))]


def _split(rules: "tokenizers.Tokenizer", text: str) -> list[str]:
    return [piece.removeprefix(" ") for piece in _pieces(rules, text)]


def _rules(known: list[tuple[str, float]]) -> "tokenizers.Tokenizer":
    """Lower-case pieces, each after a space, in the most probable known parts; what is not known, in bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    signs = [("<pad>", BYTE), *((f"<0x{byte:02X}>", BYTE) for byte in range(256))]
    rules = Tokenizer(models.Unigram(signs + known, unk_id=0, byte_fallback=True))
    rules.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    rules.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.Metaspace(" ", "always", split=False)])
    rules.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return rules


class Block(nn.Module):
    """Pre-norm self-attention, then SwiGLU."""

    heads: int
    hidden: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], turn: Float[Array, "2 l f"], mask: Bool[Array, "b 1 1 l"]
    ) -> tuple[Float[Array, "b l c"], None]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(RMSNorm, param_dtype=self.param_dtype)
        x = x + SelfAttention(self.heads, **policy, name="attention")(norm(name="norm1")(x), turn, mask)
        return x + SwiGLU(self.hidden, **policy, name="mlp")(norm(name="norm2")(x)), None


class TextTransformer(nn.Module):
    """Tokens to `context` (b, l, width), `mask` as given, and `pooled` (b, width), the mean of the real tokens' states.

    Word embeddings and `depth` blocks that see the real tokens alone; a row without any has pooled = 0.
    """

    vocabulary: int
    width: int = 256
    depth: int = 1
    heads: int = 4
    hidden: int = 672
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> dict[str, Array]:
        words = nn.Embed(self.vocabulary, self.width, param_dtype=self.param_dtype, name="words")
        turn = rotary(np.arange(tokens.shape[1])[:, None], self.width // self.heads)
        blocks = stacked(Block, self.depth, scan=False)
        blocks = blocks(self.heads, self.hidden, self.dtype, self.param_dtype, name="blocks")
        x, _ = blocks(words(tokens).astype(jnp.float32), turn, mask[:, None, None])
        x = RMSNorm(param_dtype=self.param_dtype, name="norm")(x) * mask[..., None]
        pooled = x.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        return {"context": x, "mask": mask, "pooled": pooled}


@struct.dataclass
class Prompts:
    """`prompts(["a cat", ...]) -> cond` of a text encoder that was trained with its network.

    Prompts are read as `reading` says, which warns of those that are read in other words and of those that no caption
    says.
    """

    params: PyTree
    text: nn.Module = struct.field(pytree_node=False)
    tokenize: CaptionTokenizer = struct.field(pytree_node=False)

    def read(self, prompt: str) -> Reading:
        """What a prompt is read as. Raises `UserError` when the captions have no word of it."""
        return self.tokenize.read(prompt)

    def __call__(self, prompts: list[str]) -> dict[str, Array]:
        readings = [self.read(prompt) for prompt in prompts]
        for remark in remarks(readings):
            warnings.warn(remark, Reworded, stacklevel=2)
        found = self.tokenize([reading.text for reading in readings])
        return _encode(self.text, self.params, found["tokens"], found["mask"])


@functools.partial(jax.jit, static_argnums=0)
def _encode(text: nn.Module, params: PyTree, tokens: Array, mask: Array) -> dict[str, Array]:
    encoded: Any = text.apply({"params": params}, tokens, mask)
    return encoded
