import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffjax.diffusion import guide, sample
from diffjax.diffusion.refine import Clip, Threshold
from diffjax.models.model import feathered
from diffjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")

KEY = jax.random.key(3)
IMAGE = np.ones((1, 8, 8, 3), np.float32) * (np.arange(8) % 2)[:, None, None]


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


GUIDES = [
    {"name": "cfg"},
    {"name": "cfg", "low": 0.2, "high": 0.9, "rescale": 0.7},
    {"name": "apg", "momentum": -0.5, "radius": 5.0, "parallel": 0.1, "rescale": 0.5},
]


@pytest.mark.parametrize("rule", GUIDES, ids=str)
def test_nothing_is_compiled_again_for_other_prompts_seeds_numbers_of_the_guide_and_eta(texts, compilations, rule):
    other = jax.random.key(9)
    draw = functools.partial(texts.sample, num=2, steps=11, sampler="ddim")
    first = draw(KEY, prompt="a", guidance=2.0, eta=0.0, negative_prompt="b", guide=rule)
    before = compilations()
    assert before > 0
    changed = {name: value if name == "name" else value * 0.9 for name, value in rule.items()}
    second = draw(other, prompt="something else", guidance=5.0, eta=0.5, negative_prompt="not this", guide=changed)
    assert compilations() == before and jnp.isfinite(first).all() and jnp.isfinite(second).all()


def test_guidance_0_and_1_are_none_and_evaluate_no_null_branch(texts):
    draw = functools.partial(texts.sample, KEY, steps=2, prompt="red heart")
    none = draw(guidance=0.0)
    assert (draw(guidance=1.0) == none).all() and (draw(guidance=0) == none).all()
    assert (texts.recipe(guidance=0).denoise, texts.recipe(guidance=1).reads) == (texts.denoiser, ())
    assert jnp.allclose(draw(guidance=lambda denoise: guide.Guidance(denoise, 1.0)), none, atol=1e-5)
    assert not jnp.allclose(none, texts.sample(KEY, steps=2, prompt="", guidance=0), atol=1e-3)
    assert not jnp.allclose(draw(guidance=0.5), none, atol=1e-3)


def test_labels_are_names_or_numbers(classes):
    assert (classes.sample(KEY, label="dog") == classes.sample(KEY, label=1)).all()
    assert (classes.sample(KEY, label="1") == classes.sample(KEY, label=1)).all()
    assert not jnp.allclose(classes.sample(KEY, label="dog"), classes.sample(KEY))
    assert (classes.sample(KEY) == classes.sample(KEY, label=-1)).all() and (
        classes.sample(KEY) == classes.sample(KEY, label="-1")
    ).all()


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
    assert (
        model.sample(KEY, label="dog") == toys.model(classes=("cat", "dog"), guidance=None).sample(KEY, label=1)
    ).all()
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


@pytest.mark.parametrize(
    ("how", "bound"),
    [({}, None), ({"strength": 0.5}, Clip(0.5)), ({"sampler": "ddpm"}, Threshold(0.5)), ({"sampler": "heun"}, None)],
)
def test_what_the_mask_does_not_cover_stays_to_the_bit(bound, how):
    known = jnp.linspace(-1, 1, 192).reshape(1, 8, 8, 3)
    mask = jnp.ones((1, 8, 8, 1)).at[:, :4].set(0)
    grid = np.asarray([[1.0, 0.5], [0.5, 0.1]])  # as of a published grid that stops before t = 0
    for rest in ({"steps": 3}, {"grid": grid}):
        images = toys.model(bound=bound).sample(KEY, num=3, image=known, mask=mask, **how, **rest)
        assert (images[:, :4] == known[:, :4]).all() and jnp.isfinite(images).all()
        assert not np.allclose(images[0, 4:], images[1, 4:])


def test_feather_is_an_edge_around_what_is_drawn():
    mask = np.zeros((1, 9, 9, 1), np.float32)
    mask[:, 4, 4] = 1
    soft = np.asarray(feathered(jnp.asarray(mask), 3))[0, :, :, 0]
    np.testing.assert_allclose(soft[4], [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    np.testing.assert_allclose(soft[0], 0)
    np.testing.assert_allclose(soft.diagonal(), soft[4], atol=1e-6)
    assert (feathered(mask, 0) == mask).all()


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
        ("unconditional", {"strength": 1e-20}, "it leaves none of 6 steps"),
        ("unconditional", {"strength": math.nan}, "strength is nan"),
        ("unconditional", {"strength": 0.5}, "how much of a picture may change: give the `image`"),
        ("unconditional", {"sampler": "eular"}, "did you mean euler"),
        ("unconditional", {"num": 0}, "num is 0: draw at least 1 image"),
        ("unconditional", {"num": -3}, "num is -3"),
        ("classes", {"label": "cow"}, "no class 'cow': give one of cat, dog or a number from 0 to 1"),
        ("classes", {"label": 2}, "no class 2: give one of cat, dog"),
        ("classes", {"label": -2}, "no class -2"),
        ("classes", {"label": "1.5"}, "no class '1.5'"),
        ("unconditional", {"mask": IMAGE[..., :1]}, "give the `image` too"),
        ("unconditional", {"feather": 3}, "softens the edge of a mask"),
        ("unconditional", {"image": IMAGE, "mask": IMAGE[..., :1], "feather": -1}, "feather is -1"),
        ("unconditional", {"image": IMAGE[0]}, r"the image has the shape \(8, 8, 3\): give \(1, height, width, 3\)"),
        ("unconditional", {"image": IMAGE[..., :1]}, r"the image has the shape \(1, 8, 8, 1\)"),
        ("unconditional", {"image": IMAGE, "mask": IMAGE[0, ..., :1]}, r"the mask has the shape \(8, 8, 1\)"),
        (
            "unconditional",
            {"image": IMAGE, "mask": 255 * IMAGE[..., :1]},
            "from 0 to 255: give 1 where it is drawn anew",
        ),
        ("unconditional", {"image": IMAGE, "mask": np.nan * IMAGE[..., :1]}, "from nan to nan"),
        ("unconditional", {"image": IMAGE, "size": 4}, "the image is 8 pixels wide and 8 high, and size is 4"),
        ("unconditional", {"eta": math.nan, "sampler": "ddim"}, "eta is nan: it must be a number from 0 to 1"),
        ("unconditional", {"eta": 1.5, "sampler": "ddim"}, "eta is 1.5"),
        ("unconditional", {"eta": -0.1, "sampler": "ddim"}, "eta is -0.1"),
        ("unconditional", {"guide": "apg"}, "the guide apg acts through guidance: give a scale above 1"),
        ("unconditional", {"guide": "apg", "guidance": 3.0}, "without text and classes: leave the guidance out"),
        ("texts", {"guidance": -1.0}, "guidance is -1.0: give a scale above 1"),
        ("texts", {"guidance": math.nan}, "guidance is nan"),
        ("texts", {"guidance": math.inf}, "guidance is inf"),
        ("texts", {"guidance": "3"}, "guidance is 3"),
        ("texts", {"guidance": 0, "negative_prompt": "b"}, "acts through guidance: give a guidance scale above 1"),
        ("texts", {"guidance": 1, "negative_prompt": "b"}, "acts through guidance: give a guidance scale above 1"),
        ("texts", {"guide": "abg"}, "unknown guide abg: did you mean apg"),
        (
            "texts",
            {"guide": {"name": "apg", "moment": 0.5}},
            "unknown field of guide apg moment: did you mean momentum",
        ),
        ("texts", {"guide": {"name": "cfg", "lov": 0.5}}, "unknown field of guide cfg lov: did you mean low"),
        ("texts", {"guide": {"name": "apg", "momentum": math.nan}}, "momentum of the guide is nan"),
        ("texts", {"guide": {"low": 0.7, "high": 0.3}}, "acts while 0.7 < t <= 0.3, which is never"),
        ("texts", {"guide": {"rescale": 1.5}}, "rescale of the guide is 1.5: it must be a number from 0 to 1"),
        (
            "texts",
            {"guide": {"name": "autoguidance", "step": 3}},
            "has no earlier checkpoints: autoguidance is for runs",
        ),
        (
            "texts",
            {"guide": "apg", "guidance": lambda denoise: denoise},
            "a guide of your own: leave the other guide out",
        ),
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


TOLD = {
    "nothing": {},
    "mask": {"image": IMAGE, "mask": IMAGE[..., :1]},
    "image": {"image": IMAGE, "strength": 0.5},
    "low_res": {"low_res": IMAGE},
}
SUBJECTS = {"texts": {"prompt": "red heart"}, "classes": {"label": "dog"}, "unconditional": {}}
RULES = [*GUIDES, {"name": "cfg_zero", "still": 0.9}, {"name": "autoguidance", "step": 3, "low": 0.3, "rescale": 0.5}]
SPACE = list(itertools.product(range(len(RULES)), TOLD, SUBJECTS))


def thinned(rule, told, subject):
    """A third of the space by default: every rule with every picture, and with every subject."""
    place = rule + list(TOLD).index(told) + list(SUBJECTS).index(subject)
    return pytest.param(rule, told, subject, marks=() if place % 3 == 0 else pytest.mark.slow)


@pytest.mark.parametrize(("rule", "told", "subject"), [thinned(*case) for case in SPACE])
def test_every_guide_draws_or_says_why_not(request, rule, told, subject):
    weaker = {"texts": {"text": True}, "classes": {"classes": ("cat", "dog")}, "unconditional": {}}[subject]
    model = request.getfixturevalue(subject).replace(earlier=lambda step: toys.model(seed=step, **weaker))
    draw = functools.partial(
        model.sample, KEY, num=2, steps=2, guidance=3.0, guide=RULES[rule], **TOLD[told], **SUBJECTS[subject]
    )
    if told == "low_res" or (subject == "unconditional" and RULES[rule]["name"] != "autoguidance"):
        with pytest.raises(UserError, match="no super-resolution model|leave the guidance out"):
            draw()
        return
    images = draw()
    assert images.shape == (2, 8, 8, 3) and jnp.isfinite(images).all()
    if told == "mask":
        kept = np.broadcast_to(IMAGE[..., :1] == 0, images.shape)
        assert (images[kept] == np.broadcast_to(IMAGE, images.shape)[kept]).all()
