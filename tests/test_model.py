import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffjax import guide, sample
from diffjax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def unconditional():
    return toys.model()


@pytest.fixture(scope="module")
def texts():
    return toys.model(text=True)


@pytest.fixture(scope="module")
def classes():
    return toys.model(classes=("cat", "dog"))


def test_an_image_depends_on_its_number_only(unconditional):
    ten = unconditional.sample(KEY, num=10)
    assert ten.shape == (10, 8, 8, 3) and jnp.isfinite(ten).all()
    for num in (1, 4, 7):
        assert (unconditional.sample(KEY, num=num) == ten[:num]).all()
    assert not jnp.allclose(ten[0], ten[1])


def test_an_image_does_not_depend_on_the_other_prompts(texts):
    prompts = ["a", "bee", "a", "sea", "dee", "a"]
    together = texts.sample(KEY, num=6, prompt=prompts)
    for prompt in set(prompts):
        alone = texts.sample(KEY, num=6, prompt=prompt)
        for i in (i for i in range(6) if prompts[i] == prompt):
            assert (together[i] == alone[i]).all()


def test_nothing_is_compiled_again_for_other_prompts_seeds_guidance_and_eta(texts, compilations):
    other = jax.random.key(9)
    texts.sample(KEY, num=2, steps=11, prompt="a", guidance=2.0, eta=0.0, negative_prompt="b")
    before = compilations()
    assert before > 0
    texts.sample(other, num=2, steps=11, prompt="something else", guidance=5.0, eta=0.5, negative_prompt="not this")
    assert compilations() == before


def test_guidance_1_is_the_conditional_estimate_and_0_the_null_one(texts):
    drawn = functools.partial(texts.sample, KEY, steps=2)  # more would let the toy's pictures, and their rounding, grow
    draw = functools.partial(drawn, prompt="red heart")
    assert jnp.allclose(draw(guidance=0.0), drawn(prompt="", guidance=1.0), atol=1e-5)
    assert not jnp.allclose(draw(guidance=1.0), draw(guidance=0.0), atol=1e-3)
    blue = drawn(prompt="blue", guidance=1.0)
    assert jnp.allclose(draw(guidance=0.0, negative_prompt="blue"), blue, atol=1e-5)


def test_labels_are_names_or_numbers(classes):
    assert (classes.sample(KEY, label="dog") == classes.sample(KEY, label=1)).all()
    assert (classes.sample(KEY, label="1") == classes.sample(KEY, label=1)).all()
    assert not jnp.allclose(classes.sample(KEY, label="dog"), classes.sample(KEY))
    assert (classes.sample(KEY) == classes.sample(KEY, label=-1)).all() and (classes.sample(KEY) == classes.sample(KEY, label="-1")).all()


def labels(model, *given):
    return model.condition(len(given), label=list(given))["label"].tolist()


def test_a_label_that_is_a_class_s_name_is_that_class():
    numbered = toys.model(classes=("1", "10", "2"))
    assert labels(numbered, "2", "10", "1", 2, 0) == [2, 1, 0, 2, 0]
    with pytest.raises(UserError, match="no class '0': give one of 1, 10, 2 or a number from 0 to 2"):
        labels(numbered, "0")
    spelled = toys.model(classes=("hot dog", "ice_cream", "tea"))
    assert labels(spelled, "hot_dog", "hot dog", "ice cream", "ice_cream", "2") == [0, 0, 1, 1, 2]
    both = toys.model(classes=("hot dog", "hot_dog"))
    assert labels(both, "hot_dog", "hot dog") == [1, 0]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "never trained without a class: give a label, one of cat, dog"),
        ({"label": -1}, "never trained without a class"),
        ({"label": "-1"}, "never trained without a class"),
        ({"label": "dog", "guidance": 2.0}, "nothing to lead away from"),
    ],
)
def test_a_null_class_exists_only_where_one_was_trained(how, said):
    model = toys.model(classes=("cat", "dog"), guidance=None).replace(has_null=False)
    assert (model.sample(KEY, label="dog") == toys.model(classes=("cat", "dog"), guidance=None).sample(KEY, label=1)).all()
    with pytest.raises(UserError, match=said):
        model.sample(KEY, **how)


def test_without_a_trained_null_text_guidance_needs_a_negative_prompt():
    model = toys.model(text=True, guidance=None).replace(has_null=False)
    assert jnp.isfinite(model.sample(KEY, prompt="a", negative_prompt="b", guidance=2.0)).all()
    for how, said in (({}, "give a prompt"), ({"prompt": "a", "guidance": 2.0}, "nothing to lead away from")):
        with pytest.raises(UserError, match=said):
            model.sample(KEY, **how)


def test_a_run_can_be_replayed_from_its_start_and_noise(unconditional):
    given = np.random.default_rng(0).normal(size=(4, 2, 8, 8, 3)).astype(np.float32)
    images = unconditional.sample(KEY, num=2, sampler="ddpm", grid="uniform", steps=4, init=given[0], noise=given)
    x = given[0]
    recipe = unconditional.recipe(sampler="ddpm", grid="uniform", steps=4)
    for row, z in zip(recipe.grid, given, strict=True):
        est = unconditional.denoiser(x, row[0], {})
        x = sample.move(recipe.process, est, row[0], row[1], recipe.sampler, z)
    np.testing.assert_allclose(images, x, atol=1e-5)


def test_what_the_mask_covers_is_kept(unconditional):
    known = jnp.linspace(-1, 1, 192).reshape(1, 8, 8, 3)
    mask = jnp.zeros((1, 8, 8, 1)).at[:, :4].set(1)
    images = unconditional.sample(KEY, num=3, image=known, mask=mask)
    np.testing.assert_allclose(images[:, :4], jnp.broadcast_to(known[:, :4], (3, 4, 8, 3)), atol=1e-5)
    assert not np.allclose(images[0, 4:], images[1, 4:])


def test_a_weak_strength_starts_late_from_the_noised_picture(unconditional):
    recipe = unconditional.recipe(steps=10, strength=0.3, grid="uniform")
    assert len(recipe.grid) == 3
    np.testing.assert_allclose(recipe.grid[0, 0], 0.3, atol=1e-6)
    known = jnp.ones((1, 8, 8, 3))
    inputs = unconditional.inputs(KEY, np.arange(2), image=known)
    z = (recipe.begin(inputs).x - 0.7) / 0.3
    assert abs(float(z.mean())) < 0.2 and 0.8 < float(z.std()) < 1.2


@pytest.mark.parametrize(
    ("kind", "how", "said"),
    [
        ("unconditional", {"steps": 0}, "at least 1 step"),
        ("unconditional", {"prompt": "a cat"}, "without text: leave the prompt out"),
        ("unconditional", {"label": 1}, "without classes"),
        ("unconditional", {"guidance": 3.0}, "without text and classes: leave the guidance out"),
        ("unconditional", {"strength": 0.0}, "above 0"),
        ("unconditional", {"sampler": "eular"}, "did you mean euler"),
        ("unconditional", {"num": 0}, "num is 0: draw at least 1 image"),
        ("unconditional", {"num": -3}, "num is -3"),
        ("classes", {"label": "cow"}, "no class 'cow': give one of cat, dog or a number from 0 to 1"),
        ("classes", {"label": 2}, "no class 2: give one of cat, dog"),
        ("classes", {"label": -2}, "no class -2"),
        ("classes", {"label": "1.5"}, "no class '1.5'"),
        ("classes", {"negative_prompt": "no"}, "without text"),
        ("texts", {"num": 3, "prompt": ["a", "b"]}, "2 prompts or labels for 3 images"),
    ],
)
def test_bad_input_is_said(request, kind, how, said):
    with pytest.raises(UserError, match=said):
        request.getfixturevalue(kind).sample(KEY, **how)


def test_a_negative_prompt_without_guidance_is_refused():
    with pytest.raises(UserError, match="acts through guidance"):
        toys.model(text=True, guidance=None).sample(KEY, prompt="a", negative_prompt="b")


def test_without_guidance_there_is_no_null_branch():
    recipe = toys.model(text=True, guidance=None).recipe()
    assert not isinstance(recipe.denoise, guide.Guidance)
