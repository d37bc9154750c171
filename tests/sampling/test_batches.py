import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import toys

from diffjax.sampling import batches
from diffjax.sampling.batches import Drawing, Picture
from diffjax.utils import image
from diffjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    return toys.model(text=True, steps=11)


def drawing(model, **how):
    return Drawing(model, model.recipe(**how), KEY, 4, {})


def drawn(job, parts, every=0):
    """The pictures of a whole job by what they are of."""
    out = {}
    for stage in job.stages(job.groups(parts), every):
        if stage.finished:
            out |= dict(zip(stage.pictures, job.images(stage), strict=True))
    return out


def equal(a, b):
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


PICTURES = [Picture(number, prompt) for prompt in ("a", "bee", "sea") for number in range(7)]


@pytest.fixture(scope="module")
def everything(model):
    job = drawing(model)
    return drawn(job, job.parts(PICTURES))


def test_a_picture_depends_on_its_number_and_prompt_only(model, everything):
    job = drawing(model)
    some = [PICTURES[i] for i in (20, 3, 11)]
    assert equal(drawn(job, job.parts(some)), {picture: everything[picture] for picture in some})


def test_one_device_and_several_draw_the_same(model, everything, monkeypatch):
    assert jax.local_device_count() == 8
    one_device(monkeypatch)
    job = drawing(model)
    assert len(job.groups(job.parts(PICTURES))) == 6
    assert equal(drawn(job, job.parts(PICTURES)), everything)


def test_the_facade_draws_the_same(model, everything):
    images = image.to_uint8(model.sample(KEY, num=7, prompt="bee"))
    assert all((images[number] == everything[Picture(number, "bee")]).all() for number in range(7))


@dataclasses.dataclass(frozen=True)
class Breaks:
    """A network whose output is not a number for bright x of prompts that begin with many e, below a time."""

    apply: Any
    below: float

    def __call__(self, params, x, t, **cond):
        bad = (cond["mask"].any(1) & (t < self.below) & (jnp.abs(cond["context"]).sum((1, 2)) > 1e3))[
            :, None, None, None
        ]
        return jnp.where(bad, jnp.nan, self.apply(params, x, t, **cond))


@pytest.mark.parametrize(("below", "step"), [(2.0, 1), (0.46, 7), (0.095, 11)])
def test_a_picture_that_is_not_finite_is_an_error_that_names_step_and_image(below, step):
    model = toys.model(text=True, steps=11, grid="uniform", guidance=None)
    model = model.replace(denoiser=model.denoiser.replace(apply=Breaks(model.denoiser.apply, below)))
    job = drawing(model)
    many = "e" * 100_000
    named = f"image 2 of '{'e' * 60}...' is not finite after step {step} of 11"
    for every in (0, 3):
        with pytest.raises(UserError) as error:
            drawn(job, job.parts([Picture(0, "a"), Picture(1, "bee"), Picture(2, many), Picture(3, "a")]), every)
        assert str(error.value).startswith(named)


def test_how_many_steps_a_call_makes_does_not_matter(model, everything):
    job = drawing(model)
    for every in (1, 4):
        assert equal(drawn(job, job.parts(PICTURES), every), everything)


def test_a_stage_comes_after_each_so_many_steps(model):
    job = drawing(model)
    done = [stage.done for stage in job.stages(job.groups(job.parts(PICTURES[:3])), every=3)]
    assert done == sorted(done) and {3, 6, 9, 11} <= set(done)


def test_parts_go_on_from_where_they_stood_on_another_number_of_devices(model, monkeypatch):
    job = drawing(model, sampler="dpmpp_2m_sde")
    whole = drawn(job, job.parts(PICTURES))
    stages = job.stages(job.groups(job.parts(PICTURES)), every=2)
    stage = next(stage for stage in stages if stage.done == 4)
    parts = stage.standing()
    assert [part.done for part in parts] == [4] * 6
    one_device(monkeypatch)
    assert equal(drawn(job, parts), whole)


def test_only_parts_at_the_same_step_run_together(model):
    job = drawing(model)
    first, second, third = job.parts(PICTURES[:12])
    half = second._replace(done=3)
    assert job.groups([first, half, third]) == [(half,), (first, third)]


def test_nothing_is_compiled_again_for_other_prompts_seeds_guidance_eta_and_steps(model, compilations):
    job = drawing(model, sampler="ddim")
    drawn(job, job.parts(PICTURES[:4]))
    other = Drawing(model, model.recipe(sampler="ddim", guidance=7.0, eta=0.3, steps=5), jax.random.key(1), 4, {})
    before = compilations()
    assert before > 0
    drawn(other, other.parts([Picture(17, "another one"), Picture(3, "and another")]))
    assert compilations() == before


def test_calls_get_longer_up_to_a_second(monkeypatch):
    pace, clock = batches.Pace(), iter([0.0, 30.0, 30.0, 30.25, 31.0, 33.5])
    monkeypatch.setattr(batches.time, "perf_counter", lambda: next(clock))
    taken = []
    for _ in range(3):
        taken.append(pace.steps())
        with pace.measured(taken[-1]):
            pass
    assert taken == [1, 1, 4]
    assert pace.steps() == 1


def test_the_bar_passes_on_every_stage(model):
    job = drawing(model)
    groups = job.groups(job.parts(PICTURES))
    stages = list(batches.shown(job.stages(groups), groups, job.steps, "drawing"))
    assert sum(stage.made for stage in stages) == job.steps * len(groups)
    assert list(itertools.chain(*(stage.pictures for stage in stages if stage.finished))) == PICTURES
