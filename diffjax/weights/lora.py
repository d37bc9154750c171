"""LoRA files as diffusers reads and writes them: `transformer.LAYER.lora_A.weight` (r, i) and `lora_B.weight` (o, r).

`pytorch_lora_weights.safetensors` says alpha in its metadata, older files in tensors named `LAYER.alpha`; else it is r.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import linen as nn

from diffjax.errors import UserError
from diffjax.lora import Adapter, Adapters
from diffjax.weights import names_of, safetensors, shapes
from diffjax.weights.names import DENSE, Row, table

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
ENDS = ("lora_A.weight", "lora_B.weight", "alpha")
METADATA = "lora_adapter_metadata"


def linear(module: nn.Module) -> dict[str, Row]:
    """The kernels that can have an adapter, by path."""
    return {row.path: row for row in table(shapes(module), names_of(module)) if row.layout is DENSE}


def write(path: str | Path, module: nn.Module, adapters: Adapters) -> None:
    """Write adapters of one rank and one scale. Raises `UserError` for others."""
    rows, tensors = linear(module), {}
    for name, adapter in adapters.items():
        stack = lambda leaf: np.asarray(leaf, np.float32) if rows[name].stacked else np.asarray(leaf, np.float32)[None]
        for key, a, b in zip(rows[name].keys, stack(adapter.a), stack(adapter.b)):
            tensors |= {f"{PREFIX}{_layer(key)}.lora_A.weight": a.T, f"{PREFIX}{_layer(key)}.lora_B.weight": b.T}
    scales = {float(scale) for adapter in adapters.values() for scale in np.ravel(adapter.scale)}
    ranks = {adapter.a.shape[-1] for adapter in adapters.values()}
    if len(scales) != 1 or len(ranks) != 1:
        raise UserError("adapters of several ranks or scales cannot be written as one file")
    (scale,), (rank,) = scales, ranks
    layers = sorted(_layer(key) for name in adapters for key in rows[name].keys)
    told = {f"{PREFIX}r": rank, f"{PREFIX}lora_alpha": scale * rank, f"{PREFIX}target_modules": layers}
    safetensors.write(path, tensors, {"format": "pt", METADATA: json.dumps(told, sort_keys=True)})


def read(path: str | Path, module: nn.Module) -> dict[str, Adapter]:
    """The adapters of a file for a network; layers of a stack that it leaves out are not changed.

    Raises `UserError` when it is no such file, or fits another network.
    """
    tensors, alpha = safetensors.read(path), _alpha(path)
    found, known = {}, set()
    for name, row in linear(module).items():
        pairs = [_pair(tensors, _layer(key), alpha) for key in row.keys]
        if any(pair is not None for pair in pairs):
            found[name] = _adapter(pairs, row, path)
            known |= {f"{PREFIX}{_layer(key)}.{end}" for key in row.keys for end in ENDS}
    if unread := sorted(tensors.keys() - known):
        raise UserError(f"{path} is for another network: this one has no place for {len(unread)} tensors such as {unread[0]!a}")
    if not found:
        raise UserError(f"{path} holds no adapters; their tensors are called {PREFIX}LAYER.{ENDS[0]}")
    return found


def _alpha(path: str | Path) -> float | None:
    """Alpha of all layers, where the metadata says it."""
    try:
        alpha = json.loads(safetensors.metadata(path).get(METADATA, "{}")).get(f"{PREFIX}lora_alpha")
        return None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the metadata of {path} do not say alpha as diffusers does: {error}") from error


def _layer(key: str) -> str:
    return key.removesuffix(".weight")


def _pair(tensors: Mapping[str, np.ndarray], layer: str, alpha: float | None) -> tuple[np.ndarray, np.ndarray, float] | None:
    """A layer's A (i, r), B (r, o) and scale."""
    a, b, own = (tensors.get(f"{PREFIX}{layer}.{end}") for end in ENDS)
    if a is None or b is None:
        return None
    alpha = float(own) if own is not None else alpha or len(a)
    return a.astype(np.float32).T, b.astype(np.float32).T, alpha / len(a)


def _adapter(pairs: list, row: Row, path: str | Path) -> Adapter:
    """The adapter of a stack, filled up with zeros to the largest rank in it."""
    *layers, i, o = row.leaf.shape
    rank = max(pair[0].shape[-1] for pair in pairs if pair)
    shapes = (i, rank), (rank, o), ()
    a, b, scale = (np.zeros((len(pairs), *shape), np.float32) for shape in shapes)
    for layer, pair in enumerate(pairs):
        if pair is None:
            continue
        own = pair[0].shape[-1]
        if (pair[0].shape, pair[1].shape) != ((i, own), (own, o)):
            raise UserError(f"{path} is for another network: {row.keys[layer]} is {i} to {o} wide here")
        a[layer, :, :own], b[layer, :own], scale[layer] = pair
    return Adapter(a, b, scale) if layers else Adapter(a[0], b[0], scale[0])
