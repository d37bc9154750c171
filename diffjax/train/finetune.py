"""Training on from a published latent model: all of its transformer, or low-rank adapters beside it.

Pictures become latents once, captions become states of the text encoders once; both are kept in the cache folder,
picture by picture and text by text, and training reads them from there. The loss is flow matching, |eps - x0 - y|^2, at
times that `config.loss.times` draws and the model's own shift moves (Esser et al. 2024, section 3).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from diffjax import build, config as configs
from diffjax.data import dataset
from diffjax.data.dataset import Dataset
from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.models import sd3
from diffjax.models.model import Model
from diffjax.nets import lora
from diffjax.text import frozen
from diffjax.train import latents
from diffjax.train.checkpoint import load_run
from diffjax.train.experiment import Experiment
from diffjax.train.state import State, create
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import hub, lora as lora_file

BASE = "base.json"


@dataclass(frozen=True)
class FineTuning(Experiment):
    """An experiment that trains on from the published model `base`, which has encoded all texts beforehand.

    Its `data` have latents for pictures, and `shape` is that of one latent. With `config.lora` (rank, alpha, targets)
    the model's parameters are frozen and adapters are trained. Since all of it follows from the model's files, it is
    not rehearsed before they are there.
    """

    base: Model = field(kw_only=True)

    @classmethod
    def begin(cls, config: ConfigDict, workdir: Path, data: Dataset) -> Self:
        """The experiment of a run that begins on a data set, or goes on; which model it trains is kept in `workdir`.

        Raises `UserError` for data that change from one look to the next, and for a model that is no latent one.
        """
        every, texts = _read(config, data)
        base, commit = _base(config, config.get("revision", ""), texts)
        files.write_json(workdir / BASE, {"model": base.name, "commit": commit})
        own, *prior = [replace(some, pictures=latents.encode(base, some)) for some in every]
        read = latents.WithPrior(own, prior[0], config.prior.weight) if prior else own
        on_host = replace(base.denoiser, params=jax.device_get(base.denoiser.params))
        return cls.on(config, replace(base, denoiser=on_host), read)

    @classmethod
    def recall(cls, workdir: Path, prompts: Sequence[str] | None = None) -> Self:
        """The experiment of a run that was begun, without its data; the model encodes `prompts` while it is read, and
        reads no others (None: any).
        """
        config = configs.read(workdir)
        base, _ = _base(config, files.read_json(workdir / BASE)["commit"], prompts)
        return cls.on(config, base)

    @classmethod
    def on(cls, config: ConfigDict, base: Model, data: Any = None) -> Self:
        """The experiment on a base that is read, or planned for: the latter's parameters are shapes."""
        height, width, channels = base.state_shape(config.data.size)
        return cls(config, (height, width, channels), tokenize=base.text, data=data, base=base)

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """That of the model."""
        return self.base.denoiser

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditioning in a batch."""
        return ("context", "pooled")

    @property
    def reads(self) -> tuple[str, ...]:
        """What of a batch a training step reads: beside pictures of the class, the weight of each too."""
        return (*super().reads, "weight") if self.config.prior.weight else super().reads

    def encode(self, params: PyTree, cond: dict[str, Array]) -> dict[str, Array]:
        """The conditioning as it is, in float32."""
        return {name: value.astype(jnp.float32) for name, value in cond.items()}

    @property
    def frozen_params(self) -> PyTree:
        """The parameters that never change: those of the model, beside adapters."""
        return self.base.denoiser.params if self.config.lora else None

    def holding(self, frozen_params: PyTree) -> Self:
        """The same experiment whose adapters are beside these parameters, as training has them on its devices."""
        return self._on(frozen_params) if self.config.lora else self

    def _on(self, params: PyTree) -> Self:
        return replace(self, base=replace(self.base, denoiser=replace(self.base.denoiser, params=params)))

    def first_state(self, params: PyTree, key: Key[Array, ""]) -> State:
        """The state before the first step, of a base of these parameters."""
        held = self._on(params)
        return replace(create(held.init(key), self.optimizer, key), frozen=held.frozen_params)

    def batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what a step reads of a batch: latents, and the states of the text encoders."""
        module = self.base.denoiser.apply.module
        tokens = sd3.CLIP_TOKENS + sd3.T5_TOKENS
        rows = {"image": self.shape, "context": (tokens, module.joint_attention_dim)}
        rows |= {"pooled": (module.pooled_projection_dim,), "weight": ()}
        return {name: jax.ShapeDtypeStruct((size, *rows[name]), jnp.float32) for name in self.reads}

    def whole(self, params: PyTree, frozen_params: PyTree) -> PyTree:
        """The parameters that the network reads: those that are trained, joined with those that are frozen."""
        if not self.config.lora:
            return params
        trained: dict[str, Any] = traverse_util.flatten_dict(params["network"], sep="/")
        scale = self.config.lora.alpha / self.config.lora.rank
        adapters = {}
        for path in sorted({name.rpartition("/")[0] for name in trained}):
            a, b = trained[f"{path}/a"], trained[f"{path}/b"]
            adapters[path] = lora.Adapter(a, b, jnp.full(b.shape[:-1], scale, jnp.float32))
        return {"network": lora.join(frozen_params, adapters)}

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The parameters to begin with: the model's own, or those of adapters that change nothing."""
        if not self.config.lora:
            return {"network": self.base.denoiser.params}
        rows = lora_file.linear(self.base.denoiser.apply.module)
        shapes = lora.chosen({path: row.leaf.shape for path, row in rows.items()}, self.config.lora.targets)
        made = lora.create(key, shapes, self.config.lora.rank, self.config.lora.alpha)
        trained = {f"{path}/{name}": getattr(adapter, name) for path, adapter in made.items() for name in ("a", "b")}
        return {"network": traverse_util.unflatten_dict(trained, sep="/")}

    def model(self, params: PyTree) -> Model:
        """The model that `params` make."""
        whole = self.whole(params, self.frozen_params)["network"]
        return replace(self.base, denoiser=replace(self.base.denoiser, params=whole))

    def subjects(self) -> dict[str, Any]:
        """What previews show, as arguments of `Model.sample`: the prompts, in the size of the pictures."""
        prompts = list(self.config.sample.prompts)
        return {"num": len(prompts), "prompt": prompts, "size": self.config.data.size}


def encode(config: ConfigDict, data: Dataset, part: tuple[int, int] = (0, 1)) -> None:
    """Encode what such a run reads, or part (i, n) of it, before it begins. Raises `UserError` as `FineTuning.begin`
    does.
    """
    every, texts = _read(config, data)
    base, _ = _base(config, config.get("revision", ""), texts[part[0] :: part[1]])
    for some in every:
        latents.encode(base, some, part)


def _read(config: ConfigDict, data: Dataset) -> tuple[list[Dataset], list[str]]:
    """The data sets of a run, that of its class beside its own, and all texts that it reads."""
    every = [data, dataset.load(config.prior.data)] if config.prior.weight else [data]
    if any(some.config.flip or some.config.crop != "center" for some in every):
        raise UserError("latents are computed once: set data.flip=False and data.crop=center")
    return every, [text for some in every for text in frozen.captions(some, config.sample.prompts)]


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
    return replace(model, denoiser=replace(model.denoiser, apply=Apply(module))), commit or ""


def is_one(workdir: Path) -> bool:
    """Whether it is the folder of such a run."""
    return (workdir / BASE).exists()


def load(workdir: Path, step: int | None = None, prompts: Sequence[str] | None = None) -> Model:
    """The model of a run's newest checkpoint (or that of `step`), averaged parameters. Raises `UserError` as
    `load_run` does.
    """
    run = load_run(workdir, step)
    model = FineTuning.recall(run.workdir, prompts).model(jax.tree.map(jnp.asarray, run.params))
    return replace(model, revision=str(run.step))
