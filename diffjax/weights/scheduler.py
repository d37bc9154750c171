"""Published scheduler configurations: what a model's publisher said of its noise table, prediction and sampling."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from diffjax.diffusion import process
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights.config import (
    BOOLEAN,
    Field,
    class_name,
    either,
    integer,
    list_of,
    number,
    one_of,
    optional,
    read_fields,
    read_json,
)
from diffjax.weights.folder import component

CLASSES = ("DDPMScheduler", "DDIMScheduler")
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
FILE = "scheduler_config.json"


@dataclass(frozen=True)
class Scheduler:
    """DDPMScheduler or DDIMScheduler (`class_name`) under their own field names and defaults.

    `variance_type` is DDPMScheduler's, `set_alpha_to_one` DDIMScheduler's; the other class leaves them at the default.
    The `_log` variances are the plain ones by another route; `learned` takes the second half of the network's channels
    as the variance, `learned_range` as the place between the logarithms of the fixed ones. With `thresholding`, x0 is
    clipped at the quantile `dynamic_thresholding_ratio` of its magnitude, itself held within [1, sample_max_value], and
    divided by it; else, with `clip_sample`, at `clip_sample_range`.
    """

    class_name: str = "DDPMScheduler"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    def betas(self) -> Float[np.ndarray, " steps"]:
        """The float32 table beta_0 .. beta_(T-1) that the publisher's code makes of these fields."""
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, np.float32)
        elif self.beta_schedule == "linear":
            betas = process.linear_betas(self.num_train_timesteps, self.beta_start, self.beta_end)
        elif self.beta_schedule == "scaled_linear":
            betas = process.scaled_linear_betas(self.num_train_timesteps, self.beta_start, self.beta_end)
        else:
            betas = process.squared_cosine_betas(self.num_train_timesteps)
        return process.zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas


CHECKS = {
    "num_train_timesteps": integer(2, 100_000),
    "beta_start": number(0, 1),
    "beta_end": number(0, 1),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": optional(list_of(number(0, 1), 2, 100_000)),
    "rescale_betas_zero_snr": BOOLEAN,
    "prediction_type": one_of("epsilon", "sample", "v_prediction"),
    "variance_type": one_of(
        "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
    ),
    "clip_sample": BOOLEAN,
    "clip_sample_range": number(1e-6),
    "thresholding": BOOLEAN,
    "dynamic_thresholding_ratio": number(0, 1),
    "sample_max_value": number(1e-6),
    "timestep_spacing": one_of("leading", "linspace", "trailing"),
    "steps_offset": integer(0),
    "set_alpha_to_one": BOOLEAN,
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Scheduler)}
FIELDS = {name: Field(DEFAULTS[name], check) for name, check in CHECKS.items()}
# Fields of early releases: `predict_epsilon` became prediction_type, `tensor_format` chose numpy or torch.
OLD_FIELDS = {
    "predict_epsilon": Field(None, either(BOOLEAN, one_of(None))),
    "tensor_format": Field(None, one_of("pt", "np")),
}


def read_scheduler(folder: str | Path) -> Scheduler:
    """The scheduler of a model folder, from `scheduler/` or the root.

    Raises `UserError` naming the field that is not implemented, and for a zero-terminal-SNR table with
    epsilon-prediction, where x0 cannot be told from the network's output at the first step.
    """
    path = component(folder, "scheduler") / FILE
    config = read_json(path)
    kind = class_name(config)
    if kind not in CLASSES:
        raise UserError(f"{path} is for {kind!a}; diffjax reads {' and '.join(CLASSES)}")
    values = read_fields(config, FIELDS | OLD_FIELDS, path)
    if values["predict_epsilon"] is False:
        values["prediction_type"] = "sample"
    if kind == "DDPMScheduler":
        values["set_alpha_to_one"] = True
    scheduler = Scheduler(kind, **{name: values[name] for name in CHECKS})
    _check(scheduler, path)
    return scheduler


@dataclass(frozen=True)
class FlowScheduler:
    """FlowMatchEulerDiscreteScheduler: sigma = shift t / (1 + (shift - 1) t), known at t = 1 / T, 2 / T, .. 1."""

    num_train_timesteps: int = 1000
    shift: float = 1.0


FLOW_FIELDS = {"num_train_timesteps": Field(1000, integer(2, 100_000)), "shift": Field(1.0, number(1e-3, 1e3))}
# What other models make of that class: a shift that depends on the size, and other spacings of sigma.
OTHER_FLOW_FIELDS = {
    "use_dynamic_shifting": Field(False, one_of(False)),
    "base_shift": Field(0.5, optional(number(0))),
    "max_shift": Field(1.15, optional(number(0))),
    "base_image_seq_len": Field(256, optional(integer(0))),
    "max_image_seq_len": Field(4096, optional(integer(0))),
    "invert_sigmas": Field(False, one_of(False)),
    "shift_terminal": Field(None, one_of(None)),
    "use_karras_sigmas": Field(False, one_of(False, None)),
    "use_exponential_sigmas": Field(False, one_of(False, None)),
    "use_beta_sigmas": Field(False, one_of(False, None)),
    "time_shift_type": Field("exponential", one_of("exponential", "linear")),
    "stochastic_sampling": Field(False, one_of(False)),
}


def read_flow_scheduler(folder: str | Path) -> FlowScheduler:
    """The scheduler of a flow model's folder. Raises `UserError` naming the field that is not implemented."""
    path = component(folder, "scheduler") / FILE
    config = read_json(path)
    if class_name(config) != FLOW_CLASS:
        raise UserError(f"{path} is for {class_name(config)!a}; diffjax reads {FLOW_CLASS} for this model")
    values = read_fields(config, FLOW_FIELDS | OTHER_FLOW_FIELDS, path)
    return FlowScheduler(**{name: values[name] for name in FLOW_FIELDS})


def _check(scheduler: Scheduler, path: Path) -> None:
    with np.errstate(all="ignore"):
        betas = scheduler.betas()
        signal = process.discrete(betas).alpha2
    if len(betas) != scheduler.num_train_timesteps:
        raise UserError(f"{path}: trained_betas has not num_train_timesteps = {scheduler.num_train_timesteps} values")
    if scheduler.steps_offset >= scheduler.num_train_timesteps:
        raise UserError(
            f"{path}: steps_offset leads past num_train_timesteps = {scheduler.num_train_timesteps}; it must be less"
        )
    if not np.all(np.isfinite(signal)) or signal[0] == 1:
        raise UserError(f"{path}: beta_start, beta_end or trained_betas give a table without noise; mend them")
    if signal[-1] == 0 and scheduler.prediction_type == "epsilon":
        field = "rescale_betas_zero_snr" if scheduler.rescale_betas_zero_snr else "the last of the betas"
        raise UserError(
            f"{path}: {field} ends in pure noise, where prediction_type = epsilon says nothing of the image; "
            "a model trained so has v_prediction or sample"
        )


def write_scheduler(folder: str | Path, scheduler: Scheduler | FlowScheduler) -> None:
    """Write `folder/scheduler/scheduler_config.json`."""
    if isinstance(scheduler, FlowScheduler):
        values = {"_class_name": FLOW_CLASS, **dataclasses.asdict(scheduler)}
        return files.write_json(Path(folder) / "scheduler" / FILE, values)
    foreign = "set_alpha_to_one" if scheduler.class_name == "DDPMScheduler" else "variance_type"
    values: dict[str, Any] = {"_class_name": scheduler.class_name}
    values |= {name: getattr(scheduler, name) for name in CHECKS if name != foreign}
    files.write_json(Path(folder) / "scheduler" / FILE, values)
