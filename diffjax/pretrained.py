"""Published pipelines as models: which process, prediction, sampling and sizes a folder's configuration files mean."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from diffjax import grid, predict, process, sample, weights
from diffjax.denoise import Apply, Denoiser, table_step
from diffjax.model import Defaults, Model
from diffjax.nets.unet import UNet
from diffjax.refine import Clip, Refine, Threshold
from diffjax.weights.folder import component
from diffjax.weights.scheduler import Scheduler, read_scheduler

PREDICTIONS = {"epsilon": predict.Eps(), "sample": predict.X0(), "v_prediction": predict.V()}
DEVIATIONS = {
    "fixed_small": sample.small,
    "fixed_small_log": sample.small,
    "fixed_large": sample.large,
    "fixed_large_log": sample.large,
    "learned": sample.learned,
    "learned_range": sample.learned_range,
}


def ddpm(folder: str | Path, dtype: Any = None) -> Model:
    """The model of a DDPMPipeline or DDIMPipeline folder: `unet/` and `scheduler/`, or all files at the root."""
    scheduler = read_scheduler(folder)
    module, params = weights.load(component(folder, "unet"), dtype)
    denoiser = Denoiser(
        process.discrete(scheduler.betas()), PREDICTIONS[scheduler.prediction_type], params, Apply(module), table_step
    )
    classes = tuple(str(i) for i in range(module.num_class_embeds or 0))
    return Model(denoiser, shape(module), defaults(scheduler, module), classes=classes, name=Path(folder).name)


def shape(module: UNet) -> tuple[int, int, int]:
    """That of one of its pictures."""
    size = module.sample_size
    return (*((size, size) if isinstance(size, int) else size), module.in_channels)


def defaults(scheduler: Scheduler, module: UNet) -> Defaults:
    """What a scheduler's configuration means for sampling."""
    ancestral = scheduler.class_name == "DDPMScheduler"
    return Defaults(
        steps=1000 if ancestral else 50,
        sampler="ddpm" if ancestral else "ddim",
        grid=functools.partial(published_grid, scheduler),
        bound=_bound(scheduler),
        unit_start=True,
        deviation=DEVIATIONS[scheduler.variance_type],
        batch=8 if max(shape(module)) <= 64 else 1,
    )


def published_grid(scheduler: Scheduler, steps: int) -> Float[np.ndarray, "steps 2"]:
    """The grid of a scheduler's configuration: its spacing, its offset, and where it ends."""
    table = scheduler.num_train_timesteps
    if scheduler.timestep_spacing == "leading":
        times = grid.leading(steps, table, scheduler.steps_offset)
    else:
        times = {"linspace": grid.linspace, "trailing": grid.trailing}[scheduler.timestep_spacing](steps, table)
    times[-1, 1] = 0.0 if scheduler.set_alpha_to_one else 1 / table
    return times


def _bound(scheduler: Scheduler) -> Refine | None:
    if scheduler.thresholding:
        return Threshold(scheduler.dynamic_thresholding_ratio, scheduler.sample_max_value)
    return Clip(scheduler.clip_sample_range) if scheduler.clip_sample else None
