"""Texts to token ids as published text encoders read them: CLIP's byte, T5's sentence and BERT's word pieces."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from diffjax.utils.errors import UserError
from diffjax.weights.config import read_json

if TYPE_CHECKING:
    import tokenizers

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
T5_SENTINELS = 100
UNLIMITED = 10**6
SHOWN = 80


@dataclass(frozen=True)
class Tokenizer:
    """Texts to rows of token ids, special tokens included; `limit` is the length its encoder was trained on."""

    rules: "tokenizers.Tokenizer"
    pad: int
    limit: int | None

    def __call__(
        self, texts: Sequence[str], length: int | None = None, at_least: int = 0
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Ids, and which of them are not padding.

        Rows hold at most `length` tokens (`limit` without it), and are padded to the longest and to `at_least`. A
        longer text loses its end, which a warning shows; its closing token stays.
        """
        length = self.limit if length is None else length
        rows = []
        for text, encoding in zip(texts, self.rules.encode_batch(list(texts))):
            rows.append(self._row(text, encoding, length))
        width = max([at_least, *map(len, rows)])
        ids = np.full((len(rows), width), self.pad, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return ids, np.arange(width) < np.array([len(row) for row in rows], int)[:, None]

    def _row(self, text: str, encoding: "tokenizers.Encoding", length: int | None) -> list[int]:
        if length is None or len(encoding.ids) <= length:
            return encoding.ids
        lost = text[encoding.offsets[length - 1][0] :].strip()
        shown = lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}..."
        said = f"{len(encoding.ids)} tokens where {length} are read: the end of the text is cut off, {shown!r}"
        warnings.warn(said, stacklevel=3)
        return encoding.ids[: length - 1] + encoding.ids[-1:]


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a published folder: tokenizer.json, else CLIP's vocab.json and merges.txt, else spiece.model.

    Raises `UserError` when there is none of them, or they are damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    readers = {"tokenizer.json": _whole, "vocab.json": _clip, "spiece.model": _t5}
    found = [name for name in readers if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder} holds no tokenizer ({', '.join(readers)}); download the model again")
    try:
        rules = readers[found[0]](folder, config)
    except UserError:
        raise
    except Exception as error:  # what `tokenizers` raises
        raise UserError(f"{folder / found[0]} is damaged ({str(error)[:80]}); download it again") from error
    limit = config.get("model_max_length")
    pad = rules.token_to_id(_pad_token(folder, config))
    if pad is None:
        raise UserError(f"{folder} does not say which token pads; download the model again")
    return Tokenizer(rules, pad, int(limit) if isinstance(limit, int | float) and limit < UNLIMITED else None)


def _pad_token(folder: Path, config: Mapping[str, Any]) -> str:
    if "pad_token" not in config and (folder / "special_tokens_map.json").exists():
        config = read_json(folder / "special_tokens_map.json")
    token = config.get("pad_token", "<pad>")
    return str(token["content"] if isinstance(token, dict) else token)


def _whole(folder: Path, config: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    import tokenizers

    rules = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rules.no_padding()
    rules.no_truncation()
    return rules


def _clip(folder: Path, config: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """Lower-case words, each byte-paired by itself, between the start and the end of text (arXiv:2103.00020)."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    merges = [(first, second) for first, second in pairs]
    vocabulary = read_json(folder / "vocab.json")
    start, end = "<|startoftext|>", "<|endoftext|>"
    rules = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>")
    )
    rules.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    rules.add_special_tokens([AddedToken(**token) for token in _added(config)] or [start, end])
    rules.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]), (start, vocabulary[start]), trim_offsets=False, add_prefix_space=False
    )
    return rules


def _added(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The special tokens that a tokenizer_config.json lists, by id; one that pads is among them, and read as such."""
    tokens = config.get("added_tokens_decoder", {})
    return [tokens[number] for number in sorted(tokens, key=int)]


def _t5(folder: Path, config: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """The unigram pieces of sentencepiece (arXiv:1808.06226), the sentinels after them, and the end of text."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]  made at import
    model.ParseFromString((folder / "spiece.model").read_bytes())
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(T5_SENTINELS))]
    pieces = [(piece.piece, piece.score) for piece in model.pieces] + [(name, 0.0) for name in sentinels]
    rules = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    rules.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
    )
    specials = [AddedToken(name, normalized=False) for name in ("<pad>", "</s>", "<unk>")]
    rules.add_special_tokens(specials + [AddedToken(name, lstrip=True, rstrip=True) for name in sentinels])
    rules.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return rules
