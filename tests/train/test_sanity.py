from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax.diffusion import cascade
from diffjax.diffusion.cascade import LowRes
from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.diffusion.predict import X0
from diffjax.diffusion.process import Flow, discrete, linear_betas
from diffjax.models.model import Defaults, Model
from diffjax.train import metrics, sanity
from diffjax.train.facts import Seen
from diffjax.utils import image

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}


class Echo:
    """Draws its conditioning, times `params`: a colour, or the low-res picture."""

    def apply(self, variables, x, t, mask=None, pooled=None, low_res=None, level=None):
        colour = jnp.broadcast_to(pooled[:, None, None], x.shape) if low_res is None else low_res
        return variables["params"] * colour


ECHO = Echo()


def text(prompts):
    pooled = np.array([COLOURS.get(prompt, (0, 0, 0)) for prompt in prompts], np.float32)
    return {"mask": np.ones((len(prompts), 1), bool), "pooled": pooled}


def experiment(captions, low_res=None, process=Flow()):
    """An experiment of 16 pixels: pictures of one colour each, or noise for a super-resolution stage."""
    pictures = np.stack([np.broadcast_to(np.array(COLOURS[caption]), (16, 16, 3)) for caption in captions])
    if low_res:
        pictures = cascade.upsample(
            np.random.default_rng(0).uniform(-1, 1, (len(captions), low_res.size, low_res.size, 3)), 16
        )
    seen = Seen(image.to_uint8(pictures), list(captions), np.full(len(captions), -1), np.mean(pictures, axis=0))

    def model(params):
        denoiser = Denoiser(process, X0(), jnp.float32(params), Apply(ECHO))
        size = low_res.size if low_res else 0
        return Model(
            denoiser, (16, 16, 3), Defaults(2, "ddim", "uniform", batch=4), None if low_res else text, low_res=size
        )

    config = SimpleNamespace(seed=0, text=not low_res)
    return SimpleNamespace(config=config, seen=seen, model=model, classes=(), low_res=low_res, shape=(16, 16, 3))


@pytest.mark.parametrize(("of", "name"), [(None, "text"), (LowRes(8, 0.2), "low-res picture")])
def test_a_network_that_ignores_its_conditioning_is_reported(of, name):
    stage = experiment(("red", "green", "blue"), of)
    uses, ignores = (sanity.look(stage, params) for params in (1.0, 0.0))
    assert uses.ignored() == [] and uses.error.mean() < 0.3 * uses.swapped[name].mean()
    assert ignores.ignored() == [name] and f"WARNING: the {name} is ignored" in ignores.lines()[-1]
    assert not any("WARNING" in line for line in uses.lines())


def test_warnings_wait_until_something_could_have_been_learned(tmp_path, capsys):
    class Mean:
        """Draws the mean of the three colours: all that can be learned without the conditioning."""

        def apply(self, variables, x, t, **cond):
            return jnp.full_like(x, -1 / 3)

    def said(step, apply, params):
        stage = experiment(("red", "green", "blue"))
        model = stage.model
        stage.model = lambda params: model(params).replace(denoiser=model(params).denoiser.replace(apply=apply))
        with metrics.Log(tmp_path, config, 0, lambda step: 1.0) as log:
            log.sanity(step, sanity.look(stage, params))
        return "WARNING: the text is ignored" in capsys.readouterr().err

    fields = {
        "train": {"steps": 9, "batch": 4},
        "optimizer": {"learning_rate": 0.5},
        "log": {"tensorboard": False, "wandb": ""},
    }
    config = ConfigDict(fields)
    assert not said(10, Apply(ECHO), 0.0) and said(1000, Apply(ECHO), 0.0)
    assert said(10, Apply(Mean()), 0.0) and not said(1000, Apply(ECHO), 1.0)


def test_errors_are_those_of_x0():
    panel = sanity.look(experiment(("red", "green", "blue")), 0.5)
    np.testing.assert_allclose(panel.error, 0.25, atol=0.01)
    np.testing.assert_allclose(panel.swapped["text"], (0.5**2 + 2 * 1.5**2) / 3, atol=0.01)
    np.testing.assert_allclose(panel.trivial["mean picture"], 8 / 9, atol=0.01)
    assert panel.x0.shape == (5, 3, 16, 16, 3) and list(panel.trivial) == ["mean picture"]


def test_interpolation_is_a_rival_of_a_super_resolution_stage():
    stage = experiment(("red", "green"), LowRes(8, 0.2))
    panel = sanity.look(stage, 1.0)
    truth = image.from_uint8(stage.seen.image)
    bicubic = cascade.upsample(cascade.downsample(truth, 8), 16)
    assert np.isclose(panel.trivial["bicubic"], np.mean((bicubic - truth) ** 2))
    np.testing.assert_allclose(panel.error, panel.trivial["bicubic"], rtol=1e-4)


def test_captions_that_are_all_alike_say_nothing():
    assert sanity.look(experiment(("red", "red")), 0.0).swapped == {}


def test_levels_lie_where_the_process_reaches():
    times = sanity._times(discrete(linear_betas(1000)))
    assert (np.diff(times) < 0).all() and times.min() >= 0.001 and times.max() <= 1


def test_the_panel_is_one_picture():
    drawn = sanity.look(experiment(("red", "green", "blue")), 1.0).draw()
    assert drawn.dtype == np.uint8 and drawn.shape[0] > 600 and drawn.shape[1] > 600 and drawn.shape[2] == 3
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 10
