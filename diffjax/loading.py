"""`diffjax.load`: whatever holds a model, as a `Model`."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffjax import config as configs
from diffjax.diffusion.denoise import Apply
from diffjax.models import closed_form, ddpm, sd3
from diffjax.models.model import Model
from diffjax.models.options import Request
from diffjax.train import experiment, finetune
from diffjax.utils.errors import UserError
from diffjax.weights import foreign, hub, lora as lora_file


def load(
    name: str | Path,
    dtype: Any = None,
    revision: str | None = None,
    prompts: Iterable[str] | None = None,
    quantize: str | None = None,
    shard: str | None = None,
    lora: lora_file.Given | None = None,
    variant: str | None = None,
) -> Model:
    """The model of one of our runs, of a folder in a published layout, of a hub id, of a single file of SD3.5, or of
    the config file of a closed form.

    A path that exists or is absolute never asks the hub. With `dtype=None` parameters keep the file's dtype and the
    network computes as it was trained; else both are `dtype`. `revision` is the step of a run's checkpoint
    (None: the newest) or a branch, tag or commit of the hub. `variant`, as "fp16" or "ema", says which of several forms
    of the weights is read, where a published model has more than one. With `prompts`, a published text-to-image model
    encodes these while it loads and can draw no others: its text encoders and its denoiser are never in memory
    together. Of such a model, `quantize` ("int8", "int4") keeps the transformer and T5 in fewer bits, and `shard`
    ("fsdp", "tensor", "both") splits the transformer over all devices; `lora` adds adapters to the transformer and the
    text encoders: FILE or "FILE:STRENGTH", a list of them, or a table {FILE: strength}, in any order, FILE being a
    file, a folder that holds one, or a hub id. Raises `UserError` for what is not there, cannot be read or is not
    implemented.
    """
    folder = Path(name).expanduser()
    if folder.suffix == ".py":
        _refuse_kept(str(folder), quantize, shard, lora)
        config = configs.load(str(folder))
        if "closed_form" not in config:
            raise UserError(f"{folder} is an experiment of no closed form: train it, or load the model that it names")
        return closed_form.load(config.closed_form.to_dict())
    if is_run(folder):
        if revision is not None and not revision.isdigit():
            raise UserError(f"revision {revision} of a run: give the step of one of its checkpoints")
        if finetune.is_one(folder) and (quantize or shard or lora):
            raise UserError(
                f"{folder} is drawn with as it was trained: `diffjax convert {folder} OUT` it, and give fewer bits, "
                "split parameters or adapters with the published model"
            )
        _refuse_kept(str(folder), quantize, shard, lora)
        if variant:
            raise UserError(
                f"{folder} is a run, which has no variant {variant}: leave it out, or give a step as revision"
            )
        step = None if revision is None else int(revision)
        texts = None if prompts is None else list(prompts)
        model = finetune.load(folder, step, texts) if finetune.is_one(folder) else experiment.load(folder, step)
        return replace(_cast(model, dtype), name=str(folder.resolve()))
    loras = lora_file.sources(lora)
    folder, commit = hub.fetch(name, revision, variant=variant)
    called = str(name) if commit else str(folder.resolve())
    if sd3.is_one(folder):
        model = sd3.load(folder, sd3.Kept(dtype, quantize, shard, variant), called, prompts, loras)
    elif any((folder / part).exists() for part in ("config.json", "model_index.json", "unet")):
        _refuse_kept(called, quantize, shard, lora)
        model = ddpm.load(folder, dtype, variant)
    else:
        raise UserError(f"{folder} {foreign.no_model(path.name for path in folder.iterdir())}")
    return replace(model, name=called, revision=commit or "")


def requested(request: Request, texts: Iterable[str]) -> Model:
    """The model of a sampling job; `texts` are all that its text encoders will read."""
    if request.closed_form is not None:
        return closed_form.load(request.closed_form)
    kept = request.quantize, request.shard, request.lora, request.variant
    return load(request.model, request.dtype, request.revision or None, texts, *kept)


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a run."""
    return (folder / "run.json").exists() or (folder / "checkpoints").is_dir()


def run_folder(name: str | Path) -> str:
    """The whole path of a run's folder. Raises `UserError` when there is none, naming the runs beside it."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise hub.no_run(folder)
    return str(folder.resolve())


def _refuse_kept(name: str, *given: Any) -> None:
    if any(given):
        raise UserError(
            f"{name} is no Stable Diffusion 3: fewer bits, split parameters and adapters are for its kind; "
            "leave them out"
        )


def _cast(model: Model, dtype: Any) -> Model:
    """The network in `dtype`, parameters and computation; None changes nothing."""
    if dtype is None:
        return model
    denoiser, dtype = model.denoiser, jnp.dtype(dtype)
    apply = Apply(denoiser.apply.module.clone(dtype=dtype, param_dtype=dtype))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), denoiser.params)
    return replace(model, denoiser=replace(denoiser, apply=apply, params=params))
