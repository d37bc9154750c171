"""Training on from a published latent model: all of its transformer, or low-rank adapters beside it.

Pictures become latents once, captions become states of the text encoders once; both are kept in the cache folder,
picture by picture and text by text, and training reads them from there. The loss is flow matching, |eps - x0 - y|^2, at
times that `config.loss.times` draws and the model's own shift moves (Esser et al. 2024, section 3).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from diffjax import build
from diffjax.data import dataset
from diffjax.data.dataset import Dataset
from diffjax.data.pipeline import MIDDLE, Batch, Batches, Changes, Example, Tokenize
from diffjax.diffusion.denoise import Apply
from diffjax.models import sd3
from diffjax.models.model import Model
from diffjax.nets import lora
from diffjax.text import frozen
from diffjax.train.checkpoint import load_run
from diffjax.train.experiment import Preview
from diffjax.train.step import Objective
from diffjax.utils import files, image, seeds
from diffjax.utils.errors import UserError
from diffjax.utils.progress import track
from diffjax.weights import hub, lora as lora_file

BASE = "base.json"


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step: the config, and the model that is trained on, its texts known by heart.

    With `config.lora` (rank, alpha, targets) the model's parameters are frozen and adapters are trained.
    """

    config: ConfigDict
    base: Model
    seen = None

    @property
    def conditions(self) -> tuple[str, ...]:
        """What of a batch the step reads besides latents."""
        return ("context", "pooled", "weight") if self.config.prior.weight else ("context", "pooled")

    @property
    def frozen(self) -> PyTree:
        """The parameters that never change."""
        return self.base.denoiser.params if self.config.lora else None

    def tokenize(self, captions: list[str]) -> dict[str, np.ndarray]:
        """The states of captions."""
        return self.base.text(captions)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The parameters to begin with: the model's own, or those of adapters that change nothing."""
        if not self.config.lora:
            return {"network": self.base.denoiser.params}
        rows = lora_file.linear(self.base.denoiser.apply.module)
        shapes = lora.chosen({path: row.leaf.shape for path, row in rows.items()}, self.config.lora.targets)
        made = lora.create(key, shapes, self.config.lora.rank, self.config.lora.alpha)
        trained = {f"{path}/{name}": getattr(adapter, name) for path, adapter in made.items() for name in ("a", "b")}
        return {"network": traverse_util.unflatten_dict(trained, sep="/")}

    start = init

    def whole(self, params: PyTree, frozen: PyTree) -> PyTree:
        """The network's parameters."""
        if not self.config.lora:
            return params
        trained = traverse_util.flatten_dict(params["network"], sep="/")
        scale = self.config.lora.alpha / self.config.lora.rank
        adapters = {}
        for path in sorted({name.rpartition("/")[0] for name in trained}):
            a, b = trained[f"{path}/a"], trained[f"{path}/b"]
            adapters[path] = lora.Adapter(a, b, jnp.full(b.shape[:-1], scale, jnp.float32))
        return {"network": lora.join(frozen, adapters)}

    def objective(self) -> Objective:
        """What training minimises."""
        config, denoiser = self.config.loss, self.base.denoiser
        return Objective(
            denoiser.process,
            denoiser.prediction,
            apply=denoiser.apply,
            encode=_as_float,
            weight=build.make("weight", build.WEIGHTS, config.weight),
            times=build.make("times", build.TIMES, config.times),
            uniforms=build.named("uniforms", build.UNIFORMS, config.uniforms),
            network_time=denoiser.network_time,
            whole=self.whole,
        )

    def model(self, params: PyTree) -> Model:
        """The model that `params` make."""
        whole = self.whole(params, self.frozen)["network"]
        return self.base.replace(denoiser=self.base.denoiser.replace(params=whole))

    def preview(self, params: PyTree) -> Preview:
        """Pictures of the config's prompts, the same noise every time."""
        prompts, data = list(self.config.sample.prompts), self.config.data
        key = seeds.key(self.config.seed)
        images = self.model(params).sample(key, num=len(prompts), prompt=prompts, size=data.size)
        return Preview(np.asarray(images), math.isqrt(len(prompts) - 1) + 1, [])


def _as_float(params: PyTree, cond: dict[str, Array]) -> dict[str, Array]:
    return {name: value.astype(jnp.float32) for name, value in cond.items()}


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
        weights = np.repeat(np.float32([2, 2 * self._prior]), [len(own["index"]), len(of_class["index"])])
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
        both = (data.batches(batch_size // 2, seed, tokenize, shard) for data in (self.own, self.of_class))
        return Paired(*both, self.prior)


def plan(config: ConfigDict, workdir: Path, data: Dataset) -> tuple[Plan, Dataset | WithPrior]:
    """The plan of a run on a data set, and the data with latents for pictures.

    Raises `UserError` for data that change from one look to the next, and for a model that is no latent one.
    """
    every = [data, dataset.load(config.prior.data)] if config.prior.weight else [data]
    if any(some.config.flip or some.config.crop != "center" for some in every):
        raise UserError("latents are computed once: set data.flip=False and data.crop=center")
    texts = [text for some in every for text in frozen.captions(some, config.sample.prompts)]
    base, commit = _base(config, config.get("revision", ""), texts)
    files.write_json(workdir / BASE, {"model": base.name, "commit": commit})
    every = [dataclasses.replace(some, pictures=latents(base, some)) for some in every]
    on_host = base.denoiser.replace(params=jax.device_get(base.denoiser.params))
    read = WithPrior(*every, config.prior.weight) if config.prior.weight else every[0]
    return Plan(config, base.replace(denoiser=on_host)), read


def latents(base: Model, data: Dataset) -> Latents:
    """The latents of all pictures; what no earlier run has encoded is, each written at once."""
    base.state_shape(data.size)
    folder = files.home() / "latents" / _digest(base.encode.params, repr(base.encode.module))
    found = []
    for index in track(range(len(data)), "pictures to latents", len(data)):
        example = data.pictures.example(index)
        pixels = np.repeat(example.image, 3 // data.channels, axis=-1)
        path = folder / f"{_digest(pixels, str(pixels.shape))}.npy"
        if not path.exists():
            with files.open_atomic(path) as file:
                np.save(file, np.asarray(base.encode(image.from_uint8(pixels[None])))[0].astype(np.float32))
        found.append((path, example.captions))
    return Latents(*zip(*found))


def _digest(tree: PyTree, *how: str) -> str:
    """A hash of arrays' bytes."""
    total = hashlib.sha256(repr(how).encode())
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return total.hexdigest()[:32]


def _base(config: ConfigDict, revision: str, prompts: Sequence[str] | None) -> tuple[Model, str]:
    """The model to train on, in the dtypes of training, and its commit.

    Computing in `config.dtype`; parameters that are trained are float32, frozen ones `config.dtype`.
    """
    folder, commit = hub.fetch(config.model, revision or None)
    if not sd3.is_one(folder):
        raise UserError(f"{config.model} is no Stable Diffusion 3: give the folder or the hub id of one as `model`")
    dtype = build.named("dtype", build.DTYPES, config.dtype)
    name = config.model if commit else str(folder.resolve())
    model = sd3.load(folder, sd3.Kept(dtype if config.lora else jnp.float32), name, prompts)
    module = model.denoiser.apply.module.clone(dtype=dtype, remat=config.remat)
    return model.replace(denoiser=model.denoiser.replace(apply=Apply(module))), commit or ""


def is_one(workdir: Path) -> bool:
    """Whether it is the folder of such a run."""
    return (workdir / BASE).exists()


def load(workdir: Path, step: int | None = None, prompts: Sequence[str] | None = None) -> Model:
    """The model of a run's newest checkpoint (or that of `step`), averaged parameters. Raises `UserError` as
    `load_run` does.
    """
    run = load_run(workdir, step)
    known = files.read_json(workdir / BASE)
    base, _ = _base(run.config, known["commit"], prompts)
    model = Plan(run.config, base).model(jax.tree.map(jnp.asarray, run.params))
    return model.replace(revision=str(run.step))
