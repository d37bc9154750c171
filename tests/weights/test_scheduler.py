import json

import numpy as np
import pytest

from diffjax.diffusion import process
from diffjax.utils.errors import UserError
from diffjax.weights.scheduler import Scheduler, read_scheduler, write_scheduler

CASES = [
    Scheduler(),
    Scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"),
    Scheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=77, variance_type="learned_range", steps_offset=1),
    Scheduler(trained_betas=(0.1, 0.2, 0.3), num_train_timesteps=3, clip_sample=False, thresholding=True),
    Scheduler("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type="sample", timestep_spacing="trailing"),
    Scheduler("DDIMScheduler", set_alpha_to_one=False, clip_sample_range=2.5),
]


def read(folder, **fields):
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"} | fields))
    return read_scheduler(folder)


@pytest.mark.parametrize("scheduler", CASES)
def test_what_is_written_is_read(tmp_path, scheduler):
    write_scheduler(tmp_path, scheduler)
    assert read_scheduler(tmp_path) == scheduler


@pytest.mark.reference
@pytest.mark.parametrize("scheduler", CASES)
def test_diffusers_makes_the_same_table(tmp_path, scheduler):
    import diffusers

    write_scheduler(tmp_path, scheduler)
    theirs = getattr(diffusers, scheduler.class_name).from_pretrained(tmp_path, subfolder="scheduler")
    atol = 3e-7 if scheduler.rescale_betas_zero_snr else 0
    np.testing.assert_allclose(scheduler.betas(), theirs.betas.numpy(), rtol=0, atol=atol)
    table = process.discrete(scheduler.betas()).alpha2
    np.testing.assert_allclose(table, theirs.alphas_cumprod.numpy(), rtol=0, atol=atol)


def test_the_published_table(tmp_path):
    """google/ddpm-cat-256: values of the publisher's own table, at the root of the repository."""
    scheduler = read(tmp_path, beta_start=1e-4, beta_end=0.02, trained_betas=None, tensor_format="pt")
    betas = scheduler.betas()
    assert betas.dtype == np.float32 and betas[0] == np.float32(1e-4) and betas[-1] == np.float32(0.02)
    np.testing.assert_allclose(process.discrete(betas).alpha2[[0, -1]], [0.9999, 4.0358304e-05], rtol=1e-7)
    assert scheduler.timestep_spacing == "leading" and scheduler.prediction_type == "epsilon"


def test_early_releases_said_what_is_predicted_otherwise(tmp_path):
    assert read(tmp_path, predict_epsilon=False).prediction_type == "sample"
    assert read(tmp_path, predict_epsilon=True).prediction_type == "epsilon"


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr .* prediction_type = epsilon"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "last of the betas .* prediction_type"),
        ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps = 1000"),
        ({"beta_start": 0, "beta_end": 0}, "table without noise"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
        ({"_class_name": None}, "None"),
    ],
)
def test_what_is_not_implemented_is_named(tmp_path, fields, named):
    with pytest.raises(UserError, match=named):
        read(tmp_path, **fields)


def test_zero_terminal_snr_is_read_with_the_other_predictions(tmp_path):
    for prediction in ("v_prediction", "sample"):
        scheduler = read(tmp_path, rescale_betas_zero_snr=True, prediction_type=prediction)
        assert process.discrete(scheduler.betas()).alpha2[-1] == 0
