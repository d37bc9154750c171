"""What a network sees in a picture is what its middle layer says, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.diffusion.predict import X0
from diffjax.diffusion.process import Flow
from diffjax.explain import features
from diffjax.explain.subject import Subject
from diffjax.models.model import Defaults, Model
from diffjax.models.options import Request
from diffjax.nets.dit import DiT
from diffjax.nets.unet import UNet
from diffjax.utils import image

REQUEST = Request(model="toy", steps=2, sampler="ddim")
UNET = UNet(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
DIT = {"patch": 4, "width": 16, "depth": 3, "heads": 2, "hidden": 16, "rank": 2}


@pytest.mark.parametrize(
    ("module", "place"),
    [(UNET, ("mid_block",)), (DiT(**DIT), ("blocks", 1)), (DiT(**DIT, scan=True), ("blocks", 1))],
    ids=["unet", "dit", "scanned"],
)
def test_features_are_the_mean_of_the_middle_layer(module, place):
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 8, 8, 3)), np.zeros(1))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 4, jnp.float32), shapes)
    model = Model(Denoiser(Flow(), X0(), params, Apply(module)), (8, 8, 3), Defaults(steps=2), name="toy")
    pixels = draw.integers(0, 256, (features.AT_ONCE + 2, 8, 8, 3), np.uint8)
    found = features.of(Subject(model, REQUEST))(pixels)
    x = 0.75 * image.from_uint8(pixels[-2:]) + 0.25 * jax.random.normal(jax.random.key(0), (8, 8, 3))
    _, kept = module.apply(
        {"params": params}, x, jnp.full(2, 0.25), capture_intermediates=True, mutable=["intermediates"]
    )
    layer = jax.tree.leaves(kept["intermediates"][place[0]]["__call__"])[0]
    layer = layer[place[1]] if len(place) > 1 else layer
    direct = np.asarray(layer).reshape(2, -1, layer.shape[-1]).mean(axis=1)
    assert len(found) == len(pixels) and found.std(axis=0).min() > 0
    np.testing.assert_allclose(found[-2:], direct, rtol=2e-5, atol=2e-5)


def test_a_network_without_a_known_middle_has_none():
    assert features.of(Subject(toys.model(guidance=None), REQUEST)) is None
