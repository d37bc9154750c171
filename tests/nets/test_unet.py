import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import traverse_util

from diffjax import weights
from diffjax.nets.layers import UpConv
from diffjax.nets.unet import UNet
from diffjax.utils.errors import UserError
from diffjax.weights.unet2d import FORMAT

# Five published configurations that between them differ in every field.
CONFIGS = {
    "unet_google": dict(
        attention_head_dim=None,
        norm_num_groups=8,
        block_out_channels=[16, 32],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        norm_eps=1e-6,
        sample_size=16,
    ),
    "unet_heads_left_out": dict(
        norm_num_groups=4,
        block_out_channels=[16, 32, 32],
        down_block_types=["AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"],
        up_block_types=["ResnetUpsampleBlock2D", "UpBlock2D", "AttnUpBlock2D"],
        layers_per_block=1,
        center_input_sample=True,
        act_fn="mish",
        num_class_embeds=5,
        mid_block_scale_factor=1.4,
    ),
    "unet_scale_shift": dict(
        attention_head_dim=4,
        norm_num_groups=8,
        block_out_channels=[16, 24],
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        resnet_time_scale_shift="scale_shift",
        class_embed_type="timestep",
        act_fn="gelu",
        out_channels=6,
        time_embedding_dim=40,
    ),
    "unet_resnet_resizing": dict(
        attention_head_dim=15,
        norm_num_groups=8,
        block_out_channels=[16, 32],
        down_block_types=["AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D"],
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        downsample_type="resnet",
        upsample_type="resnet",
        class_embed_type="identity",
        act_fn="relu",
        in_channels=4,
        out_channels=1,
        dropout=0.3,
    ),
    "unet_bare": dict(
        norm_num_groups=16,
        block_out_channels=[32, 16],
        down_block_types=["DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D"],
        layers_per_block=3,
        add_attention=False,
        norm_eps=1e-3,
        act_fn="swish",
        sample_size=[8, 12],
    ),
}
CAT = dict(
    _class_name="UNet2DModel",
    sample_size=256,
    attention_head_dim=None,
    norm_eps=1e-6,
    freq_shift=1,
    flip_sin_to_cos=False,
    downsample_padding=0,
    block_out_channels=[128, 128, 256, 256, 512, 512],
    down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
)
CIFAR = CAT | dict(
    sample_size=32,
    block_out_channels=[128, 256, 256, 256],
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
)
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile
TEXT = UNet(
    block_out_channels=(8,),
    down_block_types=("AttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
    num_class_embeds=4,
    context_width=6,
    pooled_width=5,
)


def build(config):
    module = FORMAT.module(config, "config.json")
    return module, reference.checkpoint(FORMAT, module)


def inputs(module, size=(8, 12)):
    random = np.random.RandomState(1)
    labels = {
        "timestep": np.float32([3, 700]),
        "identity": random.standard_normal((2, 64)).astype(np.float32),
        None: np.int32([1, 4]) if module.num_class_embeds else None,
    }
    x = random.standard_normal((2, *size, module.in_channels)).astype(np.float32)
    return x, np.float32([3, 977]), labels[module.class_embed_type]


def theirs(config, size=(8, 12)):
    """What diffusers computes."""
    import torch
    from diffusers import UNet2DModel

    module, tensors = build(config)
    model = UNet2DModel(**{key: value for key, value in config.items() if key[0] != "_"}).eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    x, t, label = inputs(module, size)
    label = None if label is None else torch.tensor(label)
    with torch.no_grad():
        y = model(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), class_labels=label).sample
    return y.permute(0, 2, 3, 1).numpy()


def ours(config, size=(8, 12)):
    module, tensors = build(config)
    params = reference.params(FORMAT, module, tensors)
    x, t, label = inputs(module, size)
    with jax.default_matmul_precision("highest"):
        return jax.jit(module.apply, compiler_options=QUICK)({"params": params}, x, t, label=label)


def outputs(name):
    return {"y": theirs(CONFIGS[name])}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers_as_stored(name):
    assert reference.relative(ours(CONFIGS[name]), reference.stored(name)["y"]) < 1e-5


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    assert reference.relative(ours(CONFIGS[name]), theirs(CONFIGS[name])) < 1e-5


@pytest.mark.reference
def test_equals_diffusers_at_the_size_of_cifar10():
    assert reference.relative(ours(CIFAR, (32, 32)), theirs(CIFAR, (32, 32))) < 1e-5


@pytest.mark.reference
@pytest.mark.slow
def test_equals_diffusers_at_the_size_of_cats():
    assert reference.relative(ours(CAT, (256, 256)), theirs(CAT, (256, 256))) < 1e-5


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_reads_what_is_saved(name, tmp_path):
    import torch
    from diffusers import UNet2DModel

    module, tensors = build(CONFIGS[name])
    weights.save(tmp_path, module, reference.params(FORMAT, module, tensors))
    model, report = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, torch.tensor(tensors[key])), key
    plain = lambda config: {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k[0] != "_"}
    assert plain(model.config) == plain(UNet2DModel(**CONFIGS[name]).config)


def published_keys(config):
    """{key: shape} of the DDPM family by rule."""
    found = {}
    widths, emb = config["block_out_channels"], 4 * config["block_out_channels"][0]

    def layer(key, *shape):
        found.update({f"{key}.weight": shape, f"{key}.bias": shape[:1]})

    def resnet(key, i, o):
        layer(f"{key}.norm1", i)
        layer(f"{key}.conv1", o, i, 3, 3)
        layer(f"{key}.time_emb_proj", o, emb)
        layer(f"{key}.norm2", o)
        layer(f"{key}.conv2", o, o, 3, 3)
        if i != o:
            layer(f"{key}.conv_shortcut", o, i, 1, 1)

    def attention(key, c):
        layer(f"{key}.group_norm", c)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{key}.{part}", c, c)

    layer("conv_in", widths[0], 3, 3, 3)
    layer("time_embedding.linear_1", emb, widths[0])
    layer("time_embedding.linear_2", emb, emb)
    skips = [widths[0]]
    for i, (block, c) in enumerate(zip(config["down_block_types"], widths)):
        for j in range(2):
            resnet(f"down_blocks.{i}.resnets.{j}", skips[-1], c)
            skips.append(c)
            if block.startswith("Attn"):
                attention(f"down_blocks.{i}.attentions.{j}", c)
        if i < len(widths) - 1:
            layer(f"down_blocks.{i}.downsamplers.0.conv", c, c, 3, 3)
            skips.append(c)
    resnet("mid_block.resnets.0", c, c)
    attention("mid_block.attentions.0", c)
    resnet("mid_block.resnets.1", c, c)
    below = c
    for i, (block, c) in enumerate(zip(config["up_block_types"], reversed(widths))):
        for j in range(3):
            resnet(f"up_blocks.{i}.resnets.{j}", below + skips.pop(), c)
            below = c
            if block.startswith("Attn"):
                attention(f"up_blocks.{i}.attentions.{j}", c)
        if i < len(widths) - 1:
            layer(f"up_blocks.{i}.upsamplers.0.conv", c, c, 3, 3)
    layer("conv_norm_out", c)
    layer("conv_out", 3, c, 3, 3)
    return found


@pytest.mark.parametrize("config, tensors, params", [(CAT, 450, 113_673_219), (CIFAR, 328, 35_746_307)])
def test_keys_of_the_published_models(config, tensors, params):
    keys = reference.keys_and_shapes(FORMAT, FORMAT.module(config, "config.json"))
    assert keys == published_keys(config)
    assert (len(keys), sum(np.prod(shape) for shape in keys.values())) == (tensors, params)


def test_default_is_ddpm_on_cifar10():
    assert dataclasses.replace(FORMAT.module(CIFAR, "config.json"), sample_size=None) == UNet()


def test_a_head_width_left_out_is_eight_and_null_is_one_head():
    config = CONFIGS["unet_google"]
    absent = {key: value for key, value in config.items() if key != "attention_head_dim"}
    widths = [FORMAT.module(given, "config.json").attention_head_dim for given in (absent, config)]
    assert widths == [8, None]


def test_upconv_is_the_convolution_of_the_doubled_image():
    random = np.random.RandomState(0)
    x = random.standard_normal((2, 3, 5, 4)).astype(np.float32)
    params = {"kernel": random.standard_normal((3, 3, 4, 6)), "bias": random.standard_normal(6)}
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = jnp.float32(params["kernel"])
    y = jax.lax.conv_general_dilated(doubled, kernel, (1, 1), "SAME", dimension_numbers=layout) + params["bias"]
    np.testing.assert_allclose(UpConv(6).apply({"params": params}, x), y, atol=2e-5)


@pytest.fixture(scope="module")
def text():
    """Random parameters and a batch of two for the text-conditional network."""
    random = np.random.RandomState(0)
    x = random.standard_normal((2, 8, 8, 3)).astype(np.float32)
    cond = dict(
        context=random.standard_normal((2, 3, 6)).astype(np.float32),
        mask=np.array([[True, True, False], [False, False, False]]),
        pooled=random.standard_normal((2, 5)).astype(np.float32),
        label=np.array([1, -1]),
    )
    shapes = jax.eval_shape(lambda: TEXT.init(jax.random.key(0), x, jnp.ones(2), **cond))["params"]
    params = jax.tree.map(lambda leaf: np.float32(random.standard_normal(leaf.shape) / 4), shapes)
    return params, x, cond


def network(params, x, cond, module=TEXT, key=None):
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, x, jnp.float32([10, 500]), **cond, rngs=rngs)


apply = jax.jit(network, static_argnums=3, compiler_options=QUICK)


def test_text_is_read_where_the_mask_says_and_nowhere_else(text):
    params, x, cond = text
    y = apply(params, x, cond)
    assert y.shape == (2, 8, 8, 3) and y.dtype == np.float32
    other = cond["context"].copy()
    other[0, 2], other[1] = 7, 7
    pooled = cond["pooled"] * [[1], [5]]
    np.testing.assert_array_equal(apply(params, x, cond | {"context": other, "pooled": np.float32(pooled)}), y)
    told = apply(params, x, cond | {"context": cond["context"] + 1})
    assert np.abs(told[0] - y[0]).max() > 1e-3 and np.array_equal(told[1], y[1])
    assert np.abs(apply(params, x, cond | {"pooled": cond["pooled"] + 1})[0] - y[0]).max() > 1e-3


def gradient(params, x, cond, module):
    second = lambda params: jnp.sum(network(params, x, cond, module)[1] ** 2)
    return jax.jit(jax.grad(second), compiler_options=QUICK)(params)


def test_the_null_values_are_learned_and_remat_changes_nothing(text):
    plain, saving = (gradient(*text, module) for module in (TEXT, TEXT.clone(remat=True)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, saving)
    assert np.abs(plain["null_token"]).max() > 0 and np.abs(plain["null_pooled"]).max() > 0
    assert not np.any(plain["pooled_embedding"]["linear_1"]["kernel"])
    assert not np.any(plain["class_embedding"][:-1]) and np.any(plain["class_embedding"][-1])


def test_dtype_policy(text):
    params, x, cond = text
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    module = TEXT.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    y = apply(low, x, cond, module)
    assert y.dtype == np.float32 and np.linalg.norm(y - apply(params, x, cond)) < 0.1 * np.linalg.norm(y)
    assert jax.eval_shape(lambda: network(low, x, cond, module.clone(out_dtype=jnp.bfloat16))).dtype == jnp.bfloat16
    fresh = jax.eval_shape(lambda: module.init(jax.random.key(0), x, jnp.ones(2), **cond))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.bfloat16)}


def test_branches_start_at_zero(text):
    _, x, cond = text

    @jax.jit
    def last_kernels():
        params = TEXT.init(jax.random.key(0), x, jnp.ones(2), **cond)["params"]
        down = params["down_blocks_0"]
        return params["conv_out"], down["resnets_0"]["conv2"], down["cross_attentions_0"]["to_out_0"]

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(last_kernels()))


def test_dropout_acts_with_a_key(text):
    params, x, cond = text
    dropped = apply(params, x, cond, TEXT.clone(dropout=0.5), jax.random.key(0))
    assert np.abs(dropped - apply(params, x, cond)).max() > 1e-3


@pytest.mark.parametrize("name", ["context", "pooled", "label"])
def test_a_missing_condition_is_named(text, name):
    params, x, cond = text
    with pytest.raises(UserError, match=name):
        apply(params, x, cond | {name: None})


def test_a_size_that_does_not_halve_is_refused():
    with pytest.raises(UserError, match="multiples of 8"):
        jax.eval_shape(lambda: UNet().init(jax.random.key(0), jnp.zeros((2, 32, 28, 3)), jnp.zeros(2)))


def test_text_conditional_networks_are_not_unet2d(tmp_path, text):
    with pytest.raises(UserError, match="text"):
        weights.save(tmp_path, TEXT, text[0])


def test_parameters_are_named_as_published():
    names = traverse_util.flatten_dict(weights.param_shapes(UNet(), FORMAT), sep="/")
    assert "down_blocks_1/attentions_0/to_q/kernel" in names and "up_blocks_0/upsamplers_0/conv/bias" in names
