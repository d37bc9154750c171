"""Pictures as latents: those of a data set, each encoded once and kept in the cache folder, and those of its class
beside them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from diffjax.data.dataset import Dataset
from diffjax.data.pipeline import MIDDLE, Batch, Batches, Changes, Example, Tokenize
from diffjax.models.model import Model
from diffjax.utils import files, image
from diffjax.utils.errors import UserError
from diffjax.utils.progress import track


@dataclass(frozen=True)
class Latents:
    """The pictures of a data set as latents in files, for `pipeline.batches`."""

    paths: tuple[Path, ...]
    captions: tuple[tuple[str, ...], ...]
    labelled = False
    cached = True

    def __len__(self) -> int:
        return len(self.paths)

    def example(self, index: int, at: tuple[float, float] = MIDDLE) -> Example:
        """Record `index`."""
        return Example(np.load(self.paths[index]), self.captions[index], -1, index)


class Paired:
    """Batches of pictures and as large ones of their class, joined (Ruiz et al. 2022, DreamBooth, eq. 2).

    `weight` of the rows makes the mean of a loss that of the pictures and `prior` times that of their class.
    """

    def __init__(self, own: Batches, of_class: Batches, prior: float):
        self._both, self._prior = (own, of_class), prior

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        own, of_class = (next(batches) for batches in self._both)
        joined = {name: np.concatenate([own[name], of_class[name]]) for name in own}
        weights = np.repeat(np.array([2, 2 * self._prior], np.float32), [len(own["index"]), len(of_class["index"])])
        return joined | {"weight": weights}

    def get_state(self) -> bytes:
        """As `Batches.get_state`."""
        return json.dumps([batches.get_state().decode() for batches in self._both]).encode()

    def set_state(self, state: bytes, allow_change: bool = False) -> Changes:
        """As `Batches.set_state`."""
        found = {}
        for kind, batches, own in zip(("data", "prior"), self._both, json.loads(state)):
            changed = batches.set_state(own.encode(), allow_change)
            found |= {f"{kind}.{name}": pair for name, pair in changed.items()}
        return found

    def close(self) -> None:
        """As `Batches.close`."""
        for batches in self._both:
            batches.close()


@dataclass(frozen=True)
class WithPrior:
    """A data set and one of pictures of the same class, which a model should go on to draw as it did."""

    own: Dataset
    of_class: Dataset
    prior: float

    def batches(self, batch_size: int, seed: int, tokenize: Tokenize, shard: tuple[int, int]) -> Paired:
        """As `Dataset.batches`, half of each. Raises `UserError` for an odd number of rows."""
        if batch_size % 2:
            raise UserError(
                f"train.batch {batch_size} cannot be half pictures and half of their class: choose an even number"
            )
        own, of_class = (data.batches(batch_size // 2, seed, tokenize, shard) for data in (self.own, self.of_class))
        return Paired(own, of_class, self.prior)


def encode(base: Model, data: Dataset, part: tuple[int, int] = (0, 1)) -> Latents:
    """The latents of all pictures, or of every n-th from i on for the part (i, n); what no earlier run has encoded is,
    each written at once.
    """
    base.state_shape(data.size)
    folder = files.home() / "latents" / _digest(base.encode.params, repr(base.encode.module))
    found = []
    wanted = range(part[0], len(data), part[1])
    for index in track(wanted, "pictures to latents", len(wanted)):
        example = data.pictures.example(index)
        pixels = np.repeat(example.image, 3 // data.channels, axis=-1)
        path = folder / f"{_digest(pixels, str(pixels.shape))}.npy"
        if not path.exists():
            with files.open_atomic(path) as file:
                np.save(file, np.asarray(base.encode(image.from_uint8(pixels[None])))[0].astype(np.float32))
        found.append((path, example.captions))
    return Latents(*zip(*found, strict=True)) if found else Latents((), ())


def _digest(tree: PyTree, *how: str) -> str:
    """A hash of arrays' bytes."""
    total = hashlib.sha256(repr(how).encode())
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return total.hexdigest()[:32]
