"""Published DDPM pipelines: sampled step for step as diffusers samples them."""

import functools
import json
import sys

import jax
import numpy as np
import pytest
import reference

from diffjax import weights
from diffjax.diffusion import grid, process
from diffjax.diffusion.denoise import Denoiser, table_step
from diffjax.models import ddpm
from diffjax.models.model import Model
from diffjax.nets.unet import UNet
from diffjax.utils.errors import UserError
from diffjax.weights.scheduler import Scheduler
from diffjax.weights.unet2d import FORMAT

UNET = dict(
    sample_size=8,
    block_out_channels=(32, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    norm_num_groups=8,
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
)
# name: (sampler, steps, fields of the published scheduler, arguments of one step)
CASES = {
    "ddpm": ("ddpm", 20, {}, {}),
    "ddpm_large": ("ddpm", 20, {"variance_type": "fixed_large"}, {}),
    "ddpm_v": ("ddpm", 20, {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}, {}),
    "ddpm_x0": ("ddpm", 20, {"prediction_type": "sample", "timestep_spacing": "trailing"}, {}),
    "ddpm_threshold": ("ddpm", 10, {"thresholding": True, "clip_sample": False, "sample_max_value": 1.5}, {}),
    "ddpm_zero_snr": (
        "ddpm",
        10,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {},
    ),
    "ddim": ("ddim", 10, {"clip_sample": False}, {"eta": 0.0}),
    "ddim_half": ("ddim", 20, {}, {"eta": 0.5}),
    "dpmpp_2m": ("dpmpp_2m", 10, {}, {}),
    "dpmpp_2m_20": ("dpmpp_2m", 20, {}, {}),
    "unipc": ("unipc", 10, {}, {}),
    "unipc_20": ("unipc", 20, {}, {}),
    "euler": ("euler", 10, {"timestep_spacing": "leading"}, {}),
}
STORED = ("ddpm", "ddpm_large", "ddpm_v", "ddim_half", "dpmpp_2m", "unipc", "euler")
THEIRS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


@functools.cache
def tensors():
    return reference.checkpoint(FORMAT, UNet(**UNET))


def inputs(steps):
    random = np.random.RandomState(1)
    return random.standard_normal((1, 8, 8, 3)).astype(np.float32), random.standard_normal((steps, 1, 8, 8, 3)).astype(
        np.float32
    )


def outputs(name):
    """The last state and the integer times of diffusers' own loop, by a scheduler of theirs with the given noise."""
    import diffusers
    import torch

    sampler, steps, fields, arguments = CASES[name.removeprefix("sample_")]
    module = diffusers.UNet2DModel(**UNET)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in tensors().items()})
    scheduler = getattr(diffusers, THEIRS[sampler])(**fields)
    scheduler.set_timesteps(steps)
    init, noise = inputs(steps)
    x = torch.from_numpy(init).permute(0, 3, 1, 2) * float(scheduler.init_noise_sigma)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for i, t in enumerate(scheduler.timesteps):
            z = torch.from_numpy(noise[i]).permute(0, 3, 1, 2)
            patch.setattr(
                sys.modules[type(scheduler).__module__], "randn_tensor", lambda *a, z=z, **k: z, raising=False
            )
            y = module(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(y, t, x, **arguments).prev_sample
    return {"x": x.permute(0, 2, 3, 1).numpy(), "times": np.asarray(scheduler.timesteps, np.float64)}


def ours(name, times, folder):
    """The same by us: the published scheduler's own grid for ancestral sampling, theirs as an array for the solvers."""
    sampler, steps, fields, arguments = CASES[name]
    published = {**fields, "clip_sample": fields.get("clip_sample", sampler in ("ddpm", "ddim"))}
    module = UNet(**UNET)
    params = reference.params(FORMAT, module, tensors())
    kind = "DDIMScheduler" if sampler == "ddim" else "DDPMScheduler"
    weights.save_pipeline(folder, module, params, Scheduler(class_name=kind, **published))
    model = ddpm.load(folder)
    init, noise = inputs(steps)
    chosen = None if sampler in ("ddpm", "ddim") else grid.pairs(np.append((times + 1) / 1000, 0.0))
    with jax.default_matmul_precision("highest"):
        return model.sample(
            jax.random.key(0), steps=steps, sampler=sampler, grid=chosen, init=init, noise=noise, **arguments
        )


@pytest.mark.parametrize("name", STORED)
def test_as_published(name, tmp_path):
    theirs = reference.stored(f"sample_{name}")
    assert np.abs(np.asarray(ours(name, theirs["times"], tmp_path)) - theirs["x"]).max() < 1e-4 * max(
        1, np.abs(theirs["x"]).max()
    )


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_as_published_live(name, tmp_path):
    theirs = outputs(name)
    assert np.abs(np.asarray(ours(name, theirs["times"], tmp_path)) - theirs["x"]).max() < 1e-4 * max(
        1, np.abs(theirs["x"]).max()
    )


def published(folder, index=None, scheduler=None, **fields):
    """A folder of a small network with such fields and random weights."""
    module = UNet(**UNET | fields)
    params = reference.params(FORMAT, module, reference.checkpoint(FORMAT, module))
    weights.save_pipeline(folder, module, params, Scheduler(**scheduler or {}))
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (index or {})))
    return folder


def test_a_class_model_needs_a_label_unless_a_null_class_was_trained(tmp_path):
    key, rows = jax.random.key(0), 3
    bare = ddpm.load(published(tmp_path / "bare", num_class_embeds=rows))
    assert bare.classes == ("0", "1", "2") and not bare.has_null
    for how, said in (
        ({}, "give a label, one of 0, 1, 2"),
        ({"label": 2, "guidance": 2.0}, "nothing to lead away from"),
    ):
        with pytest.raises(UserError, match=said):
            bare.sample(key, steps=1, **how)
    named = {"id2label": {"0": "cat", "1": "dog"}}
    model = ddpm.load(published(tmp_path / "named", named, num_class_embeds=rows))
    assert model.classes == ("cat", "dog") and model.has_null
    same = model.sample(key, steps=1) == ddpm.load(published(tmp_path / "all", num_class_embeds=rows)).sample(
        key, steps=1, label=2
    )
    assert same.all()


@pytest.mark.parametrize(
    ("index", "scheduler", "fields", "said"),
    [
        (None, None, {"sample_size": None}, "config.json: sample_size is null"),
        (
            None,
            None,
            {"out_channels": 4},
            "out_channels = 4 beside in_channels = 3; a network that draws has 3, or 6 with a variance",
        ),
        (
            None,
            {"variance_type": "learned"},
            {},
            "out_channels = 3 beside in_channels = 3; a network that draws has 6, for the variance",
        ),
        (None, None, {"class_embed_type": "timestep"}, "class_embed_type = timestep reads labels that are no classes"),
        (None, None, {"class_embed_type": "identity"}, "class_embed_type = identity reads labels that are no classes"),
        ({"id2label": {"0": "cat"}}, None, {"num_class_embeds": 3}, "id2label names 1 classes, and the network has 3"),
        (
            {"id2label": {"1": "cat"}},
            None,
            {"num_class_embeds": 3},
            "id2label must name the classes of the numbers from 0",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_its_field(tmp_path, index, scheduler, fields, said):
    with pytest.raises(UserError, match=said):
        ddpm.load(published(tmp_path, index, scheduler, **fields))


def test_a_size_that_does_not_halve_is_refused_first(tmp_path):
    model = ddpm.load(published(tmp_path))
    assert model.recipe(steps=1, size=12).shape == (12, 12, 3)
    with pytest.raises(UserError, match="draws no picture 15 pixels wide and 15 high: give multiples of 2"):
        model.recipe(steps=1, size=15)


def of_scheduler(**fields):
    """The model of a scheduler whose network says nothing: y is 0, of twice the channels."""
    scheduler = Scheduler(**fields)
    silent = lambda params, x, k: jax.numpy.concatenate([0 * x, 0 * x + 0.5], axis=-1)
    told = ddpm.PREDICTIONS[scheduler.prediction_type]
    denoiser = Denoiser(process.discrete(scheduler.betas()), told, None, silent, table_step)
    return Model(denoiser, (4, 4, 3), ddpm.defaults(scheduler, UNet(sample_size=4)))


def test_default_steps_are_those_that_the_table_has():
    assert of_scheduler(num_train_timesteps=100).defaults.steps == 100
    assert of_scheduler(num_train_timesteps=20, class_name="DDIMScheduler").defaults.steps == 20
    assert of_scheduler(steps_offset=1).defaults.steps == 999
    for fields in (
        {"num_train_timesteps": 100},
        {"steps_offset": 1},
        {"num_train_timesteps": 30, "timestep_spacing": "trailing"},
    ):
        model = of_scheduler(**fields)
        assert len(model.recipe().grid) == model.defaults.steps
        with pytest.raises(UserError, match="take"):
            model.recipe(steps=model.defaults.steps + 1)
        assert len(model.recipe(steps=2000, grid="logsnr").grid) == 2000


VARIANCES, DRAWN = ("fixed_large", "learned", "learned_range"), ("ddpm", "ddim", "euler", "unipc", "dpmpp_2m")


@pytest.mark.parametrize(
    ("variance", "sampler"),
    [
        pytest.param(variance, sampler, marks=() if (i + j) % 3 == 0 else pytest.mark.slow)
        for i, variance in enumerate(VARIANCES)
        for j, sampler in enumerate(DRAWN)
    ],
)
def test_a_publishers_variance_adds_no_noise_without_eta(variance, sampler):
    model = of_scheduler(num_train_timesteps=20, variance_type=variance)
    init = np.random.RandomState(0).standard_normal((1, 4, 4, 3)).astype(np.float32)
    draw = lambda seed, eta: np.asarray(
        model.sample(jax.random.key(seed), steps=3, sampler=sampler, eta=eta, init=init)
    )
    np.testing.assert_array_equal(draw(0, 0.0), draw(1, 0.0))
    if sampler == "ddpm":
        assert np.abs(draw(0, 0.5) - draw(1, 0.5)).max() > 1e-3


def test_ddim_keeps_eps_when_it_bounds_x0():
    for fields in ({"thresholding": True}, {}):
        model = of_scheduler(class_name="DDIMScheduler", **fields)
        recipes = {name: model.recipe(steps=2, sampler=name) for name in ("ddim", "ddpm", "unipc")}
        keeps = {name: recipe.sampler.refine.links[0].keep_eps for name, recipe in recipes.items()}
        assert keeps == {"ddim": True, "ddpm": False, "unipc": False}
