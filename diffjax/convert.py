"""Models written for other programs: as a folder that diffusers loads, or as an Orbax checkpoint."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from diffjax import weights
from diffjax.diffusion import predict
from diffjax.diffusion.process import Discrete, discrete
from diffjax.diffusion.refine import Clip, Threshold
from diffjax.loading import is_run, load
from diffjax.models.ddpm import PREDICTIONS
from diffjax.models.model import Model
from diffjax.nets.lora import LowRank
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.unet import UNet
from diffjax.train.checkpoint import on_the_disk
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import hub, lora
from diffjax.weights.folder import component
from diffjax.weights.scheduler import FILE, Scheduler, read_scheduler

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "linspace", "trailing")


def convert_model(
    name: str, out: str | Path, to: str = "diffusers", revision: str | None = None, variant: str | None = None
) -> None:
    """Write the model of a run (its averaged parameters), a folder or a hub id as `to`, one of `FORMATS`.

    `revision` and `variant` are those of `diffjax.load`. Raises `UserError` when `out` is not empty, and for a model
    that the format has no place for.
    """
    out = files.local(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: name a new folder")
    FORMATS[to](name, load(name, revision=revision, variant=variant), out)


def to_diffusers(name: str, model: Model, out: Path) -> None:
    """A folder for `diffusers.DDPMPipeline.from_pretrained`; of Stable Diffusion 3, its transformer or its adapters."""
    module = model.denoiser.apply.module
    if isinstance(module, MMDiT):
        return to_sd3(model, out)
    if not (isinstance(module, UNet) and isinstance(model.denoiser.process, Discrete)) or model.low_res:
        raise UserError(
            f"{name} cannot be a DDPMPipeline, which is a U-Net trained on a discrete process: "
            "--to orbax keeps the parameters of any model"
        )
    module = module.clone(sample_size=module.sample_size or model.shape[0])
    weights.save_pipeline(out, module, model.denoiser.params, _published(model) or scheduler(model), named(model))


def to_sd3(model: Model, out: Path) -> None:
    """The adapters as the file that `load_lora_weights` reads; without any, the folder `transformer`."""
    module, params = model.denoiser.apply.module, model.denoiser.params
    leaves = traverse_util.flatten_dict(params, sep="/")
    if adapters := {path: leaf.adapter for path, leaf in leaves.items() if isinstance(leaf, LowRank)}:
        lora.write(out / lora.FILE, module, adapters)
    else:
        weights.save(out / "transformer", module, params)


def to_orbax(name: str, model: Model, out: Path) -> None:
    """The parameters as one tree, `network` and, of a text encoder that was trained with it, `text`. Raises `UserError`
    where they cannot be written.
    """
    import orbax.checkpoint as ocp

    params = {"network": model.denoiser.params}
    if jax.tree.leaves(model.text):
        params["text"] = model.text.params
    try:
        with ocp.StandardCheckpointer(temporary_path_class=on_the_disk()) as checkpointer:
            checkpointer.save(out.absolute(), params)
    except Exception as error:
        if not (said := re.search(r"([^:\n]+) \[os_error_code", str(error))):
            raise
        raise UserError(f"cannot write {out}: {said[1].strip()}; free some space or choose another folder") from error


def named(model: Model) -> tuple[str, ...]:
    """The names of a model's classes; none where they are only counted."""
    return () if model.classes == tuple(map(str, range(len(model.classes)))) and not model.has_null else model.classes


FORMATS: dict[str, Callable[[str, Model, Path], None]] = {"diffusers": to_diffusers, "orbax": to_orbax}


def scheduler(model: Model) -> Scheduler:
    """What `DDPMScheduler` must be told to sample a model of a table as we do.

    Raises `UserError` for a prediction that it does not know.
    """
    process, bound, spacing = model.denoiser.process, model.defaults.bound, model.defaults.grid
    fields: dict[str, Any] = {
        "clip_sample": isinstance(bound, Clip),
        "timestep_spacing": spacing if spacing in SPACINGS else "leading",
    }
    if isinstance(bound, Clip):
        fields["clip_sample_range"] = float(bound.radius)
    if isinstance(bound, Threshold):
        fields |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": float(bound.quantile),
            "sample_max_value": min(float(bound.limit), 1e6),
        }
    assert isinstance(process, Discrete)
    return Scheduler(prediction_type=_prediction(model.denoiser.prediction), **fields, **_table(process))


def _prediction(prediction: predict.Prediction) -> str:
    for name, known in PREDICTIONS.items():
        if type(known) is type(prediction):
            return name
    raise UserError(
        f"a DDPMPipeline predicts eps, v or x0, and this model {type(prediction).__name__}: --to orbax "
        "keeps its parameters"
    )


def _table(process: Discrete) -> dict[str, Any]:
    """The fields of a noise table: the name of a published one, or its betas."""
    steps = {"num_train_timesteps": process.steps}
    for schedule, zero in itertools.product(SCHEDULES, (False, True)):
        fields = {**steps, "beta_schedule": schedule, "rescale_betas_zero_snr": zero, **_ends(schedule)}
        with np.errstate(all="ignore"):
            known = discrete(Scheduler(**fields).betas())
        if np.array_equal(known.alpha2, process.alpha2):
            return fields
    alpha2 = np.asarray(process.alpha2, np.float64)
    return {**steps, "trained_betas": tuple((1 - alpha2 / np.append(1.0, alpha2[:-1])).tolist())}


def _ends(schedule: str) -> dict[str, float]:
    """The first and last beta with which a schedule was published."""
    return {"beta_start": 0.00085, "beta_end": 0.012} if schedule == "scaled_linear" else {}


def _published(model: Model) -> Scheduler | None:
    """The scheduler that a published model comes with."""
    if is_run(Path(model.name)):
        return None
    folder = hub.fetch(model.name, model.revision or None, [f"*{FILE}"]).folder
    return read_scheduler(folder) if (component(folder, "scheduler") / FILE).exists() else None
