"""Files of low-rank adapters, as diffusers, PEFT, kohya's scripts, OneTrainer and ComfyUI write them.

A layer has `lora_A.weight` (r, i) and `lora_B.weight` (o, r), in other programs' words `lora_down` and `lora_up`; some
have alpha as a tensor, a bias of B, or DoRA's magnitudes. `lora_names` says what keys mean, `peft` what settings do.
Whatever is not understood is refused by name.
"""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.nets.lora import Adapter, Adapters, Decomposed
from diffjax.utils.errors import UserError
from diffjax.weights import hub, safetensors
from diffjax.weights.lora_names import PREFIXES, Part, linear, meaning, parts, plain
from diffjax.weights.names import Row, listed
from diffjax.weights.peft import CONFIG, METADATA, Settings, config_of, read_settings
from diffjax.weights.single_file import Place, part_of

FILE = "pytorch_lora_weights.safetensors"
FILES = (FILE, "adapter_model.safetensors")
CALLED = {"a": "lora_A", "b": "lora_B", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector", "alpha": "alpha"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PREFIX = "transformer."


@dataclass(frozen=True)
class Source:
    """A file of adapters, how strongly they act, and how the user called it."""

    name: str
    file: Path
    strength: float

    def __str__(self) -> str:
        return f"{self.name}:{self.strength!r}"

    @functools.cached_property
    def digest(self) -> str:
        """A checksum of the file, and of the settings beside it."""
        told = config_of(self.file)
        return hashlib.sha256(self.file.read_bytes() + (told.read_bytes() if told else b"")).hexdigest()


Given = str | Path | Sequence[str | Path] | Mapping[str | Path, float]


def sources(given: Given | None) -> list[Source]:
    """The files that FILE[:STRENGTH], several of them, or a table of file and strength name, in an order that depends
    on their content alone.

    FILE is a file, a folder that holds one, a hub id, or `ID/FILE` on the hub. Raises `UserError` for what is
    not there.
    """
    if isinstance(given, Mapping):
        pairs = [(str(name), strength) for name, strength in given.items()]
    else:
        pairs = [_split(str(one)) for one in ([given] if isinstance(given, str | Path) else given or ())]
    found = []
    for name, strength in pairs:
        if not isinstance(strength, int | float) or not math.isfinite(strength):
            raise UserError(f"the strength of {name} is {strength}: give a number, such as {name}:0.8")
        path = Path(name).expanduser()
        found.append(Source(os.path.abspath(path) if path.exists() else name, _locate(path, name), float(strength)))
    return sorted(found, key=lambda source: (source.digest, source.strength))


def _split(text: str) -> tuple[str, float]:
    """The file and the strength of FILE[:STRENGTH]; a file that bears all of it as its name comes first."""
    name, colon, number = text.rpartition(":")
    if Path(text).expanduser().exists() or not colon:
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        if Path(name).expanduser().exists():
            raise UserError(f"{text}: {number!r} is no strength: give a number, such as {name}:0.8") from None
        return text, 1.0


def _locate(path: Path, name: str) -> Path:
    """The file of adapters that is `path`, lies in that folder, or on the hub."""
    if path.is_dir():
        return _only(path)
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle: adapters are read from .safetensors, which every program can write; save it so"
        )
    if path.exists():
        return path
    if not _on_hub(name):
        raise UserError(
            f"there is no file {name}; give a .safetensors file of adapters, its folder or its hub id, and :STRENGTH"
        )
    owner, repo, *inside = name.split("/")
    wanted = ["/".join(inside)] if inside else FILES
    folder = hub.fetch(f"{owner}/{repo}", patterns=(*wanted, CONFIG)).folder
    if inside and not folder.joinpath(*inside).is_file():
        raise UserError(
            f"the hub's {owner}/{repo} has no file {wanted[0]}; look at its page for the names of its files"
        )
    return folder.joinpath(*inside) if inside else _only(folder)


def _on_hub(name: str) -> bool:
    """Whether it can be OWNER/REPO or OWNER/REPO/FILE, of which no folder here has the beginning."""
    words = name.split("/")
    ends = name.endswith(".safetensors")
    return (
        bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)+", name))
        and ends == (len(words) > 2)
        and not Path(words[0]).exists()
    )


def _only(folder: Path) -> Path:
    """The one file of adapters in a folder."""
    found = sorted(folder.glob("*.safetensors"))
    usual = [path for path in found if path.name in FILES]
    if len(usual or found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{folder} must hold one file of adapters, {' or '.join(FILES)}: it holds {names}; name the file itself"
        )
    return (usual or found)[0]


def write(path: str | Path, module: nn.Module, adapters: Adapters) -> None:
    """Write adapters of one rank and one scale. Raises `UserError` for others."""
    rows, tensors = linear(module), {}
    for name, adapter in adapters.items():
        pair = [np.asarray(leaf, np.float32) for leaf in (adapter.a, adapter.b)]
        down, up = pair if rows[name].stacked else [leaf[None] for leaf in pair]
        for key, a, b in zip(rows[name].keys, down, up):
            tensors |= {f"{PREFIX}{_layer(key)}.lora_A.weight": a.T, f"{PREFIX}{_layer(key)}.lora_B.weight": b.T}
    scales = {float(scale) for adapter in adapters.values() for scale in np.ravel(adapter.scale)}
    ranks = {adapter.a.shape[-1] for adapter in adapters.values()}
    if len(scales) != 1 or len(ranks) != 1:
        raise UserError("adapters of several ranks or scales cannot be written as one file")
    (scale,), (rank,) = scales, ranks
    layers = sorted(_layer(key) for name in adapters for key in rows[name].keys)
    told = {f"{PREFIX}r": rank, f"{PREFIX}lora_alpha": scale * rank, f"{PREFIX}target_modules": layers}
    safetensors.write(path, tensors, {"format": "pt", METADATA: json.dumps(told, sort_keys=True)})


def _layer(key: str) -> str:
    return key.removesuffix(".weight")


def read(path: str | Path, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Adapter | Decomposed]]:
    """The adapters of a file by component, for a model's networks; layers of a stack that it leaves out are
    not changed.

    Raises one `UserError` that lists what is not understood, when it is no such file, or fits another network.
    """
    path = Path(path)
    settings, layers = read_settings(path, PREFIXES), _layers(safetensors.read(path), path)
    known = {name: parts(module) for name, module in modules.items() if name in PREFIXES}
    _refuse_strangers(layers, known, path)
    return {name: _component(found, known[name], settings[name], path) for name, found in layers.items()}


Tensors = dict[str, np.ndarray]


def _layers(tensors: Tensors, path: Path) -> dict[str, dict[str, Tensors]]:
    """The tensors of each component's layers, by what they are.

    Raises `UserError` for names of no known form, and for one that is there twice.
    """
    layers: dict[str, dict[str, Tensors]] = {}
    strange = []
    for key, tensor in tensors.items():
        said = meaning(key)
        layer = layers.setdefault(said.component, {}).setdefault(said.layer, {}) if said else {}
        if said is None or said.kind in layer:
            strange.append(key)
        else:
            layer[said.kind] = tensor
    if strange:
        raise UserError(f"{path} holds {len(strange)} tensors that are not understood: {listed(sorted(strange))}")
    if not layers:
        raise UserError(f"{path} holds no adapters; their tensors are called {PREFIX}LAYER.lora_A.weight")
    return layers


def _refuse_strangers(layers: Mapping[str, Iterable[str]], known: Mapping[str, Mapping], path: Path) -> None:
    """Raise `UserError` for components and layers that the model has not."""
    if absent := sorted(layers.keys() - known.keys()):
        raise UserError(f"{path} adapts {', '.join(absent)}, which this model is without: load the model with it")
    if strange := sorted(
        f"{name} {layer}" for name in layers for layer in layers[name] if plain(layer) not in known[name]
    ):
        raise UserError(f"{path} is for another network: this one has no linear layers called {listed(strange)}")


def _component(
    layers: Mapping[str, Tensors], known: Mapping[str, list[Part]], settings: Settings, path: Path
) -> dict[str, Adapter | Decomposed]:
    """The adapters of one component. Raises `UserError` for a layer of another width, or one that is there by
    two names.
    """
    found: dict[str, dict[int, Pair]] = {}
    rows: dict[str, Row] = {}
    for layer, tensors in layers.items():
        pair, places = _pair(tensors, layer, settings, path), known[plain(layer)]
        i, o = places[0].row.leaf.shape[-2:]
        if (pair.a.shape[1], len(pair.b)) != (i, o * len(places)):
            raise UserError(f"{path} is for another network: {layer!a} is {i} to {o * len(places)} wide here")
        for row, index, place in places:
            rows[row.path], pairs = row, found.setdefault(row.path, {})
            if index in pairs:
                raise UserError(f"{path} adapts {row.keys[index]} twice, by two names")
            pairs[index] = pair.of(place)
    return {name: _stacked(pairs, rows[name]) for name, pairs in found.items()}


@dataclass(frozen=True)
class Pair:
    """One layer's tensors, as files have them: `a` (r, i), `b` (o, r), `bias` and `magnitude` (o) where there
    are any.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def of(self, place: Place) -> "Pair":
        """Those of the layer here that has this place in the file's."""
        cut = lambda tensor: None if tensor is None else part_of(tensor, place)
        return Pair(self.a, part_of(self.b, place), self.scale, cut(self.bias), cut(self.magnitude))


def _pair(tensors: Tensors, layer: str, settings: Settings, path: Path) -> Pair:
    """A layer's tensors, checked. Raises `UserError` for what is missing, has no sensible shape or is not finite."""
    if absent := [CALLED[kind] for kind in settings.needed if kind not in tensors]:
        raise UserError(f"{path}: the adapter of {layer!a} has no {' and no '.join(absent)}; download the file again")
    checked = {kind: _finite(tensor, f"{CALLED[kind]} of {layer!a}", path) for kind, tensor in tensors.items()}
    a, b = _matrix(checked["a"]), _matrix(checked["b"])
    if a is None or b is None or len(a) != b.shape[1] or not 0 < len(a) <= a.shape[1] + len(b):
        shapes = " and ".join(str(list(tensors[kind].shape)) for kind in "ab")
        raise UserError(
            f"{path}: A and B of {layer!a} have the shapes {shapes}, which are no (rank, inputs) and (outputs, rank)"
        )
    alpha = checked.get("alpha")
    if alpha is not None and alpha.size != 1:
        raise UserError(f"{path}: alpha of {layer!a} is not one number but {list(alpha.shape)}")
    scale = settings.scale(layer, len(a), None if alpha is None else alpha.item())
    bias, magnitude = (
        _row(checked.get(kind), len(b), f"{CALLED[kind]} of {layer!a}", path) for kind in ("bias", "magnitude")
    )
    if bias is not None and magnitude is not None:
        raise UserError(f"{path}: {layer!a} has a bias and magnitudes, and no paper says what both together are")
    return Pair(a, b, scale, None if bias is None else scale * bias, magnitude)


def _finite(tensor: np.ndarray, what: str, path: Path) -> np.ndarray:
    """A tensor in float32. Raises `UserError` unless it is of finite numbers, alpha alone possibly whole ones."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating) and tensor.size != 1:
        raise UserError(f"{path}: {what} is of {tensor.dtype.name}, not of floating numbers")
    with np.errstate(over="ignore"):
        tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise UserError(f"{path}: {what} is not finite everywhere; the training broke, or the file did")
    return tensor


def _matrix(tensor: np.ndarray) -> np.ndarray | None:
    """The two axes, also of a 1x1 convolution; None where there are others."""
    if tensor.ndim < 2 or tensor.shape[2:] != (1,) * (tensor.ndim - 2):
        return None
    return tensor.reshape(len(tensor), tensor.shape[1])


def _row(tensor: np.ndarray | None, outputs: int, what: str, path: Path) -> np.ndarray | None:
    """One number for each output, as (o) or (o, 1)."""
    if tensor is None:
        return None
    if tensor.shape[:1] != (outputs,) or tensor.size != outputs:
        shape = list(tensor.shape)
        raise UserError(f"{path}: {what} has the shape {shape}: only one number for each of {outputs} outputs is read")
    return tensor.reshape(outputs)


def _stacked(pairs: Mapping[int, Pair], row: Row) -> Adapter | Decomposed:
    """The adapter of a leaf, filled up with zeros to the largest rank in it."""
    i, o = row.leaf.shape[-2:]
    rank, count = max(len(pair.a) for pair in pairs.values()), len(row.keys)
    blank = lambda *shape: np.zeros((count, *shape), np.float32)
    a, b, scale, bias, magnitude = blank(i, rank), blank(rank, o), blank(rank), blank(o), blank(o) + np.nan
    for index, pair in pairs.items():
        own = len(pair.a)
        a[index, :, :own], b[index, :own], scale[index, :own] = pair.a.T, pair.b.T, pair.scale
        bias[index] = 0 if pair.bias is None else pair.bias
        magnitude[index] = np.nan if pair.magnitude is None else pair.magnitude
    whole = lambda leaf: leaf if row.stacked else leaf[0]
    adapter = Adapter(whole(a), whole(b), whole(scale), bias=whole(bias) if bias.any() else None)
    return adapter if np.isnan(magnitude).all() else Decomposed(adapter, whole(magnitude))
