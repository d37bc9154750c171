"""Where a published model keeps its parts: component folders, and the files that hold their tensors."""

import re
from pathlib import Path

import numpy as np

from diffjax.errors import UserError
from diffjax.weights import safetensors, torchzip
from diffjax.weights.config import read_json

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SHARD = re.compile(r"-\d{5}-of-\d{5}")


def component(folder: str | Path, name: str) -> Path:
    """The folder of one component: `folder/name`, or `folder` itself where everything lies at the root."""
    folder = Path(folder)
    return folder / name if (folder / name).is_dir() else folder


def read_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a component folder, as views of its mapped files.

    The first of these that is there: safetensors, its sharded index, the same of a variant (`model.fp16.safetensors`),
    then the old pickles (.bin), whole or sharded. Raises `UserError` when there is none or one is damaged.
    """
    folder = Path(folder)
    path = find_weights(folder)
    if path is None:
        raise UserError(f"{folder} holds no weights ({STEMS[0]}.safetensors or .bin); download the model again")
    return _read_sharded(path) if ".index." in path.name else _read_file(path)


def find_weights(folder: Path) -> Path | None:
    """The file, or the index of shards, that `read_tensors` reads."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name.startswith(STEMS) and not SHARD.search(name)]
    for pattern in (
        r"\w+\.safetensors",
        r"\w+\.safetensors\.index\.json",
        r"\w+\.\w+\.safetensors",
        r"\w+\.safetensors\.index\.\w+\.json|\w+\.\w+\.safetensors\.index\.json",
        r"\w+\.bin",
        r"\w+\.bin\.index\.json",
    ):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return folder / found[0]
    return None


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    tensors = torchzip.read(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, np.ndarray) for key, tensor in tensors.items()
    ):
        raise UserError(f"{path} holds more than named tensors; save the model's state_dict alone")
    return tensors


def _read_sharded(index: Path) -> dict[str, np.ndarray]:
    """The tensors of all files that an index names, each of them in the file where the index says it is."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name) for name in places.values()
    ):
        raise UserError(f"{index} does not say which file holds which tensor; download it again")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        shard = _read_file(index.parent / name)
        absent = [key for key, place in places.items() if place == name and key not in shard]
        if absent:
            raise UserError(f"{index.parent / name} lacks {absent[0]!a}, which {index.name} promises; download both")
        tensors |= shard
    return tensors
