import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from diffjax import weights
from diffjax.nets import tiles
from diffjax.nets.vae import AutoencoderKL, tiled_decode, tiled_encode
from diffjax.utils.errors import UserError
from diffjax.weights.vae import FORMAT

SMALL = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16)
KINDS = {
    "vae_sd3": dict(latent_channels=6),
    "vae_quant": dict(
        latent_channels=4, use_quant_conv=True, use_post_quant_conv=True, scaling_factor=0.18215, shift_factor=None
    ),
}


def build(name):
    module = AutoencoderKL(**SMALL, **KINDS[name])
    return module, reference.checkpoint(FORMAT, module)


def inputs(module):
    random = np.random.RandomState(1)
    x, z = random.standard_normal((2, 12, 16, 3)), random.standard_normal((2, 6, 8, module.latent_channels))
    return x.astype(np.float32), z.astype(np.float32)


def channels_first(x):
    import torch

    return torch.tensor(x).permute(0, 3, 1, 2)


def published(model, module):
    """Mean and log-variance, and the decoded image, of a diffusers model on our inputs."""
    import torch

    x, z = (channels_first(value) for value in inputs(module))
    with torch.no_grad():
        latents = model.encode(x).latent_dist
        found = {"mean": latents.mean, "logvar": latents.logvar, "image": model.decode(z).sample}
    return {key: value.permute(0, 2, 3, 1).numpy() for key, value in found.items()}


def outputs(name):
    """What diffusers computes."""
    import torch
    from diffusers import AutoencoderKL as Published

    module, tensors = build(name)
    model = Published.from_config(FORMAT.config(module)).eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    return published(model, module)


def compare(module, params, expected, step=1):
    x, z = inputs(module)
    mean, logvar = tiles.whole(module, "encode", params, x)
    image = tiles.whole(module, "decode", params, z)
    for ours, name in ((mean, "mean"), (logvar, "logvar"), (image, "image")):
        assert reference.relative(ours[:, ::step], expected[name]) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_equals_diffusers_as_stored(name):
    module, tensors = build(name)
    compare(module, reference.params(FORMAT, module, tensors), reference.stored(name), step=2)


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_equals_diffusers(name):
    module, tensors = build(name)
    compare(module, reference.params(FORMAT, module, tensors), outputs(name))


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_diffusers_reads_what_is_saved(name, tmp_path):
    from diffusers import AutoencoderKL as Published

    module, tensors = build(name)
    weights.save(tmp_path, module, reference.params(FORMAT, module, tensors))
    model, info = Published.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    loaded, params = weights.load(tmp_path)
    assert loaded == module
    compare(loaded, params, published(model.eval(), module))


def resnet(key, before, after):
    found = {f"{key}.norm1": (before,), f"{key}.norm2": (after,)}
    found |= {f"{key}.conv1": (after, before, 3, 3), f"{key}.conv2": (after, after, 3, 3)}
    return found | ({f"{key}.conv_shortcut": (after, before, 1, 1)} if before != after else {})


def middle(key, width):
    found = {f"{key}.attentions.0.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    found[f"{key}.attentions.0.group_norm"] = (width,)
    return found | resnet(f"{key}.resnets.0", width, width) | resnet(f"{key}.resnets.1", width, width)


def test_sd3_has_the_published_keys_and_size():
    wide, down, up = (128, 256, 512, 512), "encoder.down_blocks.{}", "decoder.up_blocks.{}"
    found = middle("encoder.mid_block", 512) | middle("decoder.mid_block", 512)
    for half, widths in (("encoder", (3, 128, 512, 32)), ("decoder", (16, 512, 128, 3))):
        found[f"{half}.conv_in"] = (widths[1], widths[0], 3, 3)
        found[f"{half}.conv_norm_out"] = (widths[2],)
        found[f"{half}.conv_out"] = (widths[3], widths[2], 3, 3)
    for i in range(4):
        before, after = wide[max(i - 1, 0)], wide[i]
        found |= resnet(f"{down.format(i)}.resnets.0", before, after) | resnet(
            f"{down.format(i)}.resnets.1", after, after
        )
        before, after = wide[::-1][max(i - 1, 0)], wide[::-1][i]
        found |= resnet(f"{up.format(i)}.resnets.0", before, after)
        found |= resnet(f"{up.format(i)}.resnets.1", after, after) | resnet(f"{up.format(i)}.resnets.2", after, after)
        if i < 3:
            found[f"{down.format(i)}.downsamplers.0.conv"] = (wide[i], wide[i], 3, 3)
            found[f"{up.format(i)}.upsamplers.0.conv"] = (after, after, 3, 3)
    expected = {f"{key}.weight": shape for key, shape in found.items()}
    expected |= {f"{key}.bias": shape[:1] for key, shape in found.items()}
    ours = reference.keys_and_shapes(FORMAT, AutoencoderKL())
    assert len(ours) == 244 and ours == expected
    assert sum(np.prod(shape) for shape in ours.values()) == 83_819_683


def test_first_releases_are_read():
    module, tensors = build("vae_quant")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in tensors.items():
        for new, name in old.items():
            if f".{new}." in key:
                key = key.replace(new, name)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[key] = tensor
    params = [reference.params(FORMAT, module, given) for given in (tensors, renamed)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_no_array_holds_all_scores_of_the_attention():
    module = AutoencoderKL()
    params = weights.param_shapes(module, FORMAT)
    z = jax.ShapeDtypeStruct((1, 128, 128, 16), jnp.float32)
    inner = lambda params, z: module.apply({"params": params}, z, method="decode_inner")
    assert max(sizes(jax.make_jaxpr(inner)(params, z).jaxpr)) < 128**4 / 8


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (np.prod(out.aval.shape) for out in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_a_size_that_the_factor_does_not_divide_is_an_error():
    module, tensors = build("vae_sd3")
    with pytest.raises(UserError, match="13 x 16 pixels: give multiples of 2"):
        module.apply({"params": reference.params(FORMAT, module, tensors)}, jnp.zeros((1, 13, 16, 3)), method="encode")


def test_tiles_make_the_same_picture_without_seams():
    """Latents whose contrast differs from place to place: tiles normed by themselves would differ by half the range."""
    module, tensors = build("vae_sd3")
    params = reference.params(FORMAT, module, tensors)
    ramp = np.linspace(0.3, 2.5, 40)[:, None, None] * np.linspace(1, 0.2, 24)[:, None]
    z = (ramp * np.random.RandomState(0).standard_normal((1, 40, 24, 6))).astype(np.float32)
    image = np.asarray(tiles.whole(module, "decode", params, z))
    error = np.abs(tiled_decode(module, params, z, tile=26) - image)
    assert error.max() < np.ptp(image) / 255
    for whole, tiled in zip(tiles.whole(module, "encode", params, image), tiled_encode(module, params, image, tile=26)):
        assert np.abs(tiled - whole).max() < np.ptp(whole) / 255


def test_tiles_share_out_the_picture_and_keep_their_distance():
    for length in (33, 60, 61, 127):
        taken = np.zeros((length, 40), int)
        for spot in tiles.spots((length, 40), 32, 9):
            mask = spot.mask()
            spot.paste(
                mask[None, :, :, None].astype(int) + spot.cut(taken[None, :, :, None], 1), taken[None, :, :, None], 1
            )
            for axis, (first, last) in enumerate(spot.core):
                start, size = spot.start[axis], spot.size[axis]
                assert start == first == 0 or first - start >= 9
                assert start + size == last == taken.shape[axis] or start + size - last >= 9
        assert (taken == 1).all()


def test_tiles_that_are_all_overlap_are_an_error():
    module, tensors = build("vae_sd3")
    with pytest.raises(UserError, match="all overlap"):
        tiled_decode(module, reference.params(FORMAT, module, tensors), np.zeros((1, 40, 8, 6), np.float32), tile=12)
