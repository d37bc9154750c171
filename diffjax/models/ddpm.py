"""Published pipelines as models: which process, prediction, sampling and sizes a folder's configuration files mean."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from diffjax import weights
from diffjax.diffusion import grid, predict, process, sample
from diffjax.diffusion.denoise import Apply, Denoiser, table_step
from diffjax.diffusion.refine import Clip, Refine, Threshold
from diffjax.models import sd3
from diffjax.models.model import Defaults, Model
from diffjax.nets.unet import UNet
from diffjax.utils.errors import UserError
from diffjax.weights.config import class_name, read_json
from diffjax.weights.folder import component
from diffjax.weights.scheduler import Scheduler, read_scheduler

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
PREDICTIONS = {"epsilon": predict.Eps(), "sample": predict.X0(), "v_prediction": predict.V()}
DEVIATIONS = {
    "fixed_small": sample.small,
    "fixed_small_log": sample.small,
    "fixed_large": sample.large,
    "fixed_large_log": sample.large,
    "learned": sample.learned,
    "learned_range": sample.learned_range,
}


def load(folder: str | Path, dtype: Any = None, variant: str | None = None) -> Model:
    """The model of a DDPMPipeline or DDIMPipeline folder: `unet/` and `scheduler/`, or all files at the root.

    `variant` is which of several forms of the weights is read, as of `weights.load`. Raises `UserError` for
    another pipeline, by its name, and naming the field of the network's configuration with which nothing can be drawn.
    """
    _refuse_other_pipelines(Path(folder))
    scheduler = read_scheduler(folder)
    unet = component(folder, "unet")
    check(weights.describe(unet), scheduler, unet / "config.json")
    module, params = weights.load(unet, dtype, variant=variant)
    denoiser = Denoiser(
        process.discrete(scheduler.betas()), PREDICTIONS[scheduler.prediction_type], params, Apply(module), table_step
    )
    rows, names = module.num_class_embeds or 0, weights.class_names(folder)
    if names and len(names) not in (rows, rows - 1):
        raise UserError(
            f"{folder}: id2label names {len(names)} classes, and the network has {rows}, the null class among them: "
            "mend it"
        )
    classes = names or tuple(map(str, range(rows)))
    return Model(
        denoiser,
        shape(module),
        defaults(scheduler, module),
        multiple=module.multiple,
        classes=classes,
        has_null=len(classes) < rows,
        name=Path(folder).name,
    )


def check(module: UNet, scheduler: Scheduler, path: Path) -> None:
    """Raises `UserError` for a network that says nothing of its pictures' size, or of which `sample` cannot be told a
    label, or whose output is neither x's size nor twice that, for a learned variance.
    """
    channels, out = module.in_channels, module.out_channels
    learned = scheduler.variance_type in ("learned", "learned_range")
    if module.sample_size is None:
        raise UserError(
            f"{path}: sample_size is null, so nothing says how large its pictures are: write their size there"
        )
    if module.class_embed_type:
        raise UserError(
            f"{path}: class_embed_type = {module.class_embed_type} reads labels that are no classes, which sampling "
            "cannot give: call the network itself, diffjax.weights.load(folder)"
        )
    if out not in (channels, 2 * channels) or (learned and out == channels):
        wanted = f"{2 * channels}, for the variance" if learned else f"{channels}, or {2 * channels} with a variance"
        raise UserError(
            f"{path}: out_channels = {out} beside in_channels = {channels}; a network that draws has {wanted}"
        )


def _refuse_other_pipelines(folder: Path) -> None:
    index = folder / "model_index.json"
    name = class_name(read_json(index)) if index.exists() else None
    if name not in (None, *PIPELINES):
        raise UserError(f"{folder} holds a {name}: diffjax draws with {', '.join((*PIPELINES, *sd3.PIPELINES))}")


def shape(module: UNet) -> tuple[int, int, int]:
    """That of one of its pictures."""
    size = module.sample_size or 0  # `check` refuses None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, module.in_channels


def defaults(scheduler: Scheduler, module: UNet) -> Defaults:
    """What a scheduler's configuration means for sampling."""
    ancestral = scheduler.class_name == "DDPMScheduler"
    return Defaults(
        steps=most_steps(scheduler, 1000 if ancestral else 50),
        sampler="ddpm" if ancestral else "ddim",
        grid=functools.partial(published_grid, scheduler),
        bound=_bound(scheduler),
        unit_start=True,
        deviation=DEVIATIONS[scheduler.variance_type],
        batch=8 if max(shape(module)) <= 64 else 1,
    )


def published_grid(scheduler: Scheduler, steps: int) -> Float[np.ndarray, "steps 2"]:
    """The grid of a scheduler's configuration: its spacing, its offset, and where it ends.

    Raises `UserError` for more steps than the table has, or than its offset leaves.
    """
    table = scheduler.num_train_timesteps
    if scheduler.timestep_spacing == "leading":
        times = grid.leading(steps, table, scheduler.steps_offset)
    else:
        times = {"linspace": grid.linspace, "trailing": grid.trailing}[scheduler.timestep_spacing](steps, table)
    times[-1, 1] = 0.0 if scheduler.set_alpha_to_one else 1 / table
    return times


def most_steps(scheduler: Scheduler, steps: int) -> int:
    """The most steps, up to `steps`, that the published grid can have."""
    offset = scheduler.steps_offset if scheduler.timestep_spacing == "leading" else 0
    return grid.most_leading(steps, scheduler.num_train_timesteps, offset)


def _bound(scheduler: Scheduler) -> Refine | None:
    if scheduler.thresholding:
        return Threshold(scheduler.dynamic_thresholding_ratio, scheduler.sample_max_value)
    return Clip(scheduler.clip_sample_range) if scheduler.clip_sample else None
