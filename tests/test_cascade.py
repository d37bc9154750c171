import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from ml_collections import ConfigDict
from PIL import Image

from diffjax import cli, config, data, loading
from diffjax.diffusion import cascade, loss
from diffjax.diffusion.cascade import LowRes
from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.diffusion.predict import X0
from diffjax.diffusion.process import Cosine, Flow
from diffjax.evaluate import runs as evaluation
from diffjax.models.cascade import Cascade
from diffjax.models.model import Defaults, Model
from diffjax.train import loop
from diffjax.train.checkpoint import load_run
from diffjax.train.experiment import Experiment
from diffjax.train.step import Objective
from diffjax.utils import image
from diffjax.utils.errors import UserError

KEY = jax.random.key(3)
EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "minimagen"
SHRUNK = {
    "dim": 8,
    "mults": (1,),
    "blocks": (1,),
    "attention": (False,),
    "cross_attention": (True,),
    "heads": 1,
    "head_dim": 8,
}


class Echo:
    """A network that returns the low-res picture that it is told of."""

    def apply(self, variables, x, t, low_res, level, context=None, mask=None, pooled=None):
        return low_res + variables["params"]


def super_resolution(size=16, low_res=8, text=None, **fields):
    denoiser = Denoiser(Cosine(), X0(), jnp.zeros(()), Apply(ECHO))
    defaults = Defaults(steps=2, sampler="ddim", grid="uniform", batch=4)
    return Model(denoiser, (size, size, 3), defaults, text, low_res=low_res, name=f"to {size}", **fields)


ECHO = Echo()


def keys(num):
    return jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(num))


def pictures(num, size):
    return jax.random.uniform(jax.random.key(num), (num, size, size, 3), minval=-1)


def test_downsampling_is_the_mean_and_undoes_upsampling_by_whole_numbers():
    x = pictures(2, 8)
    np.testing.assert_allclose(cascade.downsample(x, 2)[1, 0, 1], x[1, :4, 4:].mean((0, 1)), atol=1e-6)
    flat = jnp.full((1, 4, 4, 3), 0.3)
    np.testing.assert_allclose(cascade.upsample(flat, 16), 0.3, atol=1e-6)
    ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 8)[:, None, None], (1, 8, 8, 3))
    inner = cascade.downsample(cascade.upsample(ramp, 32), 8)[:, 2:-2]
    np.testing.assert_allclose(inner, ramp[:, 2:-2], atol=1e-6)


def test_augmentation_keeps_the_variance_and_is_each_pictures_own():
    x, level = jax.random.normal(KEY, (4, 32, 32, 3)), jnp.array([0.0, 0.3, 0.6, 0.9])
    noised = cascade.augment(x, level, keys(4))
    np.testing.assert_array_equal(noised[0], x[0])
    np.testing.assert_allclose(jnp.var(noised, axis=(1, 2, 3)), 1, atol=0.1)
    np.testing.assert_allclose(jnp.mean(noised * x, axis=(1, 2, 3)), jnp.sqrt(1 - level**2), atol=0.1)
    np.testing.assert_array_equal(cascade.augment(x[2:], level[2:], keys(4)[2:]), noised[2:])


def test_noise_comes_after_the_range_is_right():
    """A picture out of range is brought into it first, and its noise is not cut off."""
    far = jnp.full((1, 16, 16, 3), 7.0)
    low = cascade.condition(far, 32, 0.5, keys(1))["low_res"]
    near = cascade.condition(jnp.ones_like(far), 32, 0.5, keys(1))["low_res"]
    np.testing.assert_array_equal(low, near)
    assert low.max() > 1.2


def test_training_pictures_at_random_levels():
    made = LowRes(8, 0.4)(pictures(64, 16), keys(64))
    assert made["low_res"].shape == (64, 16, 16, 3) and made["level"].shape == (64,)
    assert 0 <= made["level"].min() < 0.05 and 0.35 < made["level"].max() <= 0.4
    again = LowRes(8, 0.4)(pictures(64, 16)[5:9], keys(64)[5:9])
    np.testing.assert_array_equal(again["low_res"], made["low_res"][5:9])
    clean = LowRes(8, 0.0)(pictures(64, 16), keys(64))
    np.testing.assert_allclose(
        clean["low_res"], cascade.upsample(cascade.downsample(pictures(64, 16), 8), 16), atol=1e-6
    )


def test_the_objective_tells_the_network_of_them():
    """The loss of a network that returns its low-res picture is the loss of interpolation."""
    bytes_ = jax.random.randint(KEY, (4, 16, 16, 3), 0, 256).astype(jnp.uint8)
    objective = Objective(
        Flow(), X0(), Apply(ECHO), lambda params, cond: cond, loss.x0_weight(), loss.uniform(), loss.independent,
        low_res=LowRes(4, 0.0),
    )  # fmt: skip
    params = {"network": jnp.zeros(())}
    t = jnp.array([0.1, 0.4, 0.7, 1.0])
    x0 = bytes_.astype(jnp.float32) / 127.5 - 1
    trivial = jnp.mean((cascade.upsample(cascade.downsample(x0, 4), 16) - x0) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(objective.losses(params, {"image": bytes_}, t, keys(4)), trivial, rtol=1e-4)


def test_a_stage_draws_what_it_is_told_of():
    small = pictures(3, 8)
    drawn = super_resolution().sample(KEY, num=3, low_res=small)
    np.testing.assert_allclose(drawn, cascade.upsample(small, 16), atol=1e-5)
    np.testing.assert_allclose(super_resolution().sample(KEY, num=1, low_res=small[:1], level=0.2), drawn[:1], atol=1.5)
    assert np.abs(super_resolution().sample(KEY, num=1, low_res=small[:1], level=0.2) - drawn[:1]).max() > 0.1


def test_a_picture_does_not_depend_on_its_neighbours():
    small, stage = pictures(6, 8), super_resolution()
    six = stage.sample(KEY, num=6, low_res=small, level=0.5)
    np.testing.assert_array_equal(stage.sample(KEY, num=2, low_res=small[:2], level=0.5), six[:2])


def test_three_stages():
    first = toys.model(text=True, size=8)
    whole = Cascade((first, super_resolution(16, 8, text=first.text), super_resolution(64, 16)))
    drawn = whole.sample(KEY, num=2, prompt="bee", each=({"steps": 3}, {"level": 0.1}, {"sampler": "ddpm"}))
    assert [images.shape[1] for images in drawn] == [8, 16, 64]
    np.testing.assert_array_equal(drawn[0], first.sample(jax.random.fold_in(KEY, 0), num=2, prompt="bee", steps=3))
    np.testing.assert_allclose(drawn[2], cascade.upsample(jnp.clip(drawn[1], -1, 1), 64), atol=1e-4)


def test_starting_at_a_later_stage_from_a_picture():
    small = pictures(1, 8)
    drawn = Cascade((super_resolution(16, 8), super_resolution(32, 16))).sample(KEY, num=2, low_res=small)
    np.testing.assert_allclose(drawn[0], jnp.repeat(cascade.upsample(small, 16), 2, axis=0), atol=1e-5)


def test_inpainting_keeps_what_is_known_at_every_stage():
    image, mask = pictures(1, 16), jnp.ones((1, 16, 16, 1)).at[:, :, :8].set(0)
    drawn = Cascade((toys.model(size=8), super_resolution())).sample(KEY, num=2, image=image, mask=mask)
    np.testing.assert_allclose(drawn[0][:, :, :4], jnp.repeat(cascade.downsample(image, 8)[:, :, :4], 2, 0), atol=1e-5)
    np.testing.assert_allclose(drawn[1][:, :, :8], jnp.repeat(image[:, :, :8], 2, 0), atol=1e-5)
    assert np.abs(drawn[1][:, :, 8:] - image[:, :, 8:]).max() > 0.1


def test_image_to_image_starts_the_first_stage():
    image = pictures(1, 16)
    drawn = Cascade((toys.model(size=8), super_resolution())).sample(KEY, num=1, image=image, strength=0.5)
    alone = toys.model(size=8).sample(jax.random.fold_in(KEY, 0), image=cascade.downsample(image, 8), strength=0.5)
    np.testing.assert_array_equal(drawn[0], alone)
    np.testing.assert_allclose(drawn[1], cascade.upsample(jnp.clip(alone, -1, 1), 16), atol=1e-4)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: cascade.downsample(pictures(1, 8), 3), "8 x 8 pixels cannot be reduced to 3"),
        (lambda: LowRes(8, 1.0), "max_level 1.0"),
        (lambda: Cascade((toys.model(), toys.model())), "stage 2 .toy. reads no pictures"),
        (
            lambda: Cascade((toys.model(size=4), super_resolution())),
            "reads 8 pixels of 3 channels and stage 1 .toy. draws 4 of 3",
        ),
        (
            lambda: Cascade((toys.model(size=8).replace(shape=(8, 8, 1)), super_resolution())),
            "stage 1 .toy. draws 8 of 1",
        ),
        (
            lambda: Cascade((toys.model(), super_resolution(text=toys.model(text=True).text))),
            "stage 1 .toy. none: train it with",
        ),
        (
            lambda: super_resolution().sample(KEY),
            "to 16 draws from pictures of 8 x 8 pixels in 3 channels, and none is given",
        ),
        (lambda: super_resolution().sample(KEY, low_res=pictures(1, 4)), "and not 4 x 4 of 3"),
        (lambda: super_resolution().sample(KEY, low_res=pictures(1, 8), level=1.0), "level is 1.0"),
        (
            lambda: toys.model().sample(KEY, low_res=pictures(1, 8)),
            "toy is no super-resolution model: leave low_res and level out",
        ),
    ],
)
def test_what_does_not_fit_is_said(wrong, said):
    with pytest.raises(UserError, match=said):
        wrong()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The two test experiments, shrunk and trained for two steps on a folder of pictures."""
    folder = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(8):
        picture = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        picture.save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    for name, size in (("emoji_tiny_base32", 8), ("emoji_tiny_super64", 16)):
        settings = config.load(str(EXPERIMENTS / f"{name}.py"))
        settings.data.update(name="captioned_folder", path=str(folder / "pictures"), size=size)
        settings.imagen.update(SHRUNK)
        settings.text.update(width=16, heads=2)
        settings.train.update(steps=2, batch=8, log_every=1)
        settings.sample.update(steps=2, prompts=("picture 1",))
        if name == "emoji_tiny_super64":
            settings.low_res.size = 8
        with pytest.MonkeyPatch.context() as patch:
            toys.train_on_one(patch)
            loop.train(settings, folder / name)
    return folder


def test_the_test_experiments_train_and_draw_together(runs, capsys):
    out = runs / "out"
    words = [
        "sample",
        "--cascade",
        str(runs / "emoji_tiny_base32"),
        str(runs / "emoji_tiny_super64"),
        "--prompt",
        "picture 3",
        "--num",
        "2",
    ]
    assert cli.main([*words, "--out", str(out)]) == 0
    stages = [image.read_png(path / "000_picture-3_0001.png")[0] for path in (out / "stage_1", out)]
    assert [picture.shape for picture in stages] == [(8, 8, 3), (16, 16, 3)]
    before = (out / "000_picture-3_0001.png").stat().st_mtime_ns
    assert cli.main([*words, "--out", str(out)]) == 0 and "already: nothing to draw" in capsys.readouterr().out
    assert (out / "000_picture-3_0001.png").stat().st_mtime_ns == before


def test_one_super_resolution_stage_alone(runs):
    words = [
        "sample",
        "--run",
        str(runs / "emoji_tiny_super64"),
        "--low-res",
        str(runs / "pictures" / "1.png"),
        "--level",
        "0.2",
    ]
    assert cli.main([*words, "--prompt", "picture 1", "--num", "1", "--out", str(runs / "one")]) == 0
    assert image.read_png(runs / "one" / "000_picture-1_0000.png")[0].shape == (16, 16, 3)


@pytest.mark.parametrize(
    "order, said",
    [
        (("emoji_tiny_super64", "emoji_tiny_base32"), "stage 2 .*emoji_tiny_base32. reads no pictures"),
        (("emoji_tiny_super64",), "or give --low-res"),
    ],
)
def test_runs_in_the_wrong_order_are_refused(runs, order, said, capsys):
    words = ["sample", "--cascade", *(str(runs / name) for name in order), "--prompt", "x", "--out", str(runs / "none")]
    assert cli.main(words) == 2
    assert re.search(said, capsys.readouterr().err) and not (runs / "none").exists()


def test_previews_show_what_is_given_interpolation_the_model_and_the_truth(runs):
    preview = Experiment.recall(runs / "emoji_tiny_super64").preview(load_run(runs / "emoji_tiny_super64").params)
    shown = preview.images.reshape(8, 4, 16, 16, 3)
    assert preview.columns == 4 and preview.captions[3] == "truth" and preview.captions[1].startswith("bicubic ")
    truth = np.stack([np.asarray(Image.open(runs / "pictures" / f"{i}.png")) for i in range(8)]) / 127.5 - 1
    assert all(np.abs(truth - row[3]).max(axis=(1, 2, 3)).min() < 1e-5 for row in shown)
    np.testing.assert_allclose(shown[:, 1], cascade.upsample(cascade.downsample(shown[:, 3], 8), 16), atol=1e-5)


def test_a_super_resolution_stage_is_measured_on_pictures_it_was_not_shown(runs):
    settings = config.load(str(EXPERIMENTS / "emoji_tiny_super64.py")).data
    settings.update(name="captioned_folder", path=str(runs / "pictures"), size=16, held_out="train[6:]")
    kept = data.load(ConfigDict(settings.to_dict() | {"split": "train[6:]"})).examples([0, 1])["image"]
    interpolated = image.to_uint8(cascade.upsample(cascade.downsample(image.from_uint8(kept), 8), 16))
    model = loading.load(runs / "emoji_tiny_super64")
    found = evaluation.of_low_res(model, model.recipe(), settings, 64, 0).measures
    assert (found["num"], found["held_out"]) == (2, True)
    assert found["bicubic_psnr"] == pytest.approx(image.psnr(interpolated, kept).mean(), abs=1e-3)
    assert found["psnr"] < found["bicubic_psnr"]
    assert evaluation.measure(runs / "emoji_tiny_super64", num=8)["held_out"] is False


def test_a_size_that_does_not_divide_and_a_network_without_low_res(runs, tmp_path):
    settings = config.load(str(EXPERIMENTS / "emoji_tiny_super64.py"))
    settings.data.update(name="captioned_folder", path=str(runs / "pictures"), size=16)
    with pytest.raises(UserError, match="low_res.size=7 does not divide data.size=16"):
        settings.low_res.size = 7
        loop.train(settings, tmp_path / "seven")
    with pytest.raises(UserError, match="network unet reads no low-res pictures"):
        settings.low_res.size = 8
        settings.network = "unet"
        loop.train(settings, tmp_path / "unet")
