"""Whole folders: every layout in which a DDPM is published, in and out."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torchfile

from diffjax import weights
from diffjax.nets.unet import UNet
from diffjax.utils.errors import UserError
from diffjax.weights import safetensors, unet2d
from diffjax.weights.folder import component
from diffjax.weights.names import write_params
from diffjax.weights.scheduler import Scheduler, read_scheduler

MODULE = UNet(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
CONFIG = unet2d.FORMAT.config(MODULE)
NAME = "diffusion_pytorch_model"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def params():
    random = np.random.RandomState(0)
    shapes = weights.param_shapes(MODULE, unet2d.FORMAT)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def tensors(params):
    return write_params(params, unet2d.NAMES)


def folder(tmp_path, config=CONFIG):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def loads(path, params):
    module, found = weights.load(path)
    assert module == MODULE
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_saved_and_loaded(tmp_path, params):
    weights.save(tmp_path / "unet", MODULE, params)
    loads(tmp_path / "unet", params)


def test_half_precision_is_kept_unless_another_dtype_is_asked(tmp_path, params):
    low = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    weights.save(tmp_path, MODULE, low)
    module, found = weights.load(tmp_path)
    assert module.dtype == module.param_dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, found, low)
    module, found = weights.load(tmp_path, jnp.float32)
    assert module == MODULE and found["conv_in"]["kernel"].dtype == jnp.float32


def test_sharded(tmp_path, params, tensors):
    keys = sorted(tensors)
    parts = {f"{NAME}-00001-of-00002.safetensors": keys[:20], f"{NAME}-00002-of-00002.safetensors": keys[20:]}
    for name, part in parts.items():
        safetensors.write(folder(tmp_path) / name, {key: tensors[key] for key in part})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    path = tmp_path / f"{NAME}.safetensors.index.json"
    path.write_text(json.dumps(index))
    loads(tmp_path, params)
    index["weight_map"]["conv_in.bias"] = list(parts)[1]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks 'conv_in.bias'"):
        weights.load(tmp_path)
    index["weight_map"]["conv_in.bias"] = "../other.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="which file holds which tensor"):
        weights.load(tmp_path)


def test_old_pickles_old_attention_names_and_repeated_downsamplers(tmp_path, params, tensors):
    old = {}
    for key, tensor in tensors.items():
        for new, name in OLD.items():
            key = key.replace(f"{new}.", f"{name}.")
        old[key] = tensor
        if "downsamplers" in key:
            old[key.replace("conv", "op")] = tensor
    old = {key: t[:, :, None, None] if ".query.w" in key else t for key, t in old.items()}
    torchfile.write_state(folder(tmp_path) / f"{NAME}.bin", old)
    loads(tmp_path, params)
    safetensors.write(tmp_path / f"{NAME}.safetensors", tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1})
    with pytest.raises(AssertionError):
        loads(tmp_path, params)


def test_first_releases(tmp_path, params, tensors):
    config = {name: value for name, value in CONFIG.items() if name != "norm_eps"}
    config |= {"_class_name": "UNetUnconditionalModel", "resnet_eps": MODULE.norm_eps}
    renames = {"down_blocks.": "downsample_blocks.", "up_blocks.": "upsample_blocks.", "mid_block.": "mid."}
    for new, old in renames.items():
        tensors = {key.replace(new, old) if key.startswith(new) else key: value for key, value in tensors.items()}
    torchfile.write_state(folder(tmp_path, config) / f"{NAME}.bin", tensors)
    loads(tmp_path, params)


def test_variants_serve_where_there_is_nothing_else(tmp_path, params, tensors):
    safetensors.write(folder(tmp_path) / f"{NAME}.fp16.safetensors", tensors)
    loads(tmp_path, params)


def test_a_pipeline_in_folders_or_at_the_root(tmp_path, params):
    scheduler = Scheduler(variance_type="fixed_large")
    weights.save_pipeline(tmp_path, MODULE, params, scheduler)
    assert component(tmp_path, "unet") == tmp_path / "unet" and read_scheduler(tmp_path) == scheduler
    for path in [*(tmp_path / "unet").iterdir(), *(tmp_path / "scheduler").iterdir()]:
        path.rename(tmp_path / path.name)
    for name in ("unet", "scheduler"):
        (tmp_path / name).rmdir()
    assert component(tmp_path, "unet") == tmp_path and read_scheduler(tmp_path) == scheduler
    loads(tmp_path, params)


def test_what_is_missing_is_said(tmp_path, tensors):
    with pytest.raises(UserError, match="config.json"):
        weights.load(tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        weights.load(folder(tmp_path))
    del (tensors := dict(tensors))["conv_in.bias"]
    safetensors.write(tmp_path / f"{NAME}.safetensors", tensors)
    with pytest.raises(UserError, match="1 missing: conv_in.bias"):
        weights.load(tmp_path)
    with pytest.raises(UserError, match="'FluxTransformer2DModel'; diffjax reads UNet2DModel"):
        weights.load(folder(tmp_path, {"_class_name": "FluxTransformer2DModel"}))


def test_weights_in_eight_bits_need_a_dtype_to_compute_in(tmp_path, tensors):
    low = {key: tensor.astype(ml_dtypes.float8_e4m3fn) for key, tensor in tensors.items()}
    safetensors.write(folder(tmp_path) / f"{NAME}.safetensors", low)
    with pytest.raises(UserError, match="8 bits"):
        weights.load(tmp_path)
    assert weights.load(tmp_path, jnp.bfloat16)[0].dtype == jnp.bfloat16


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path):
    torchfile.write(folder(tmp_path) / f"{NAME}.bin", {"epoch": 3}, {})
    with pytest.raises(UserError, match="more than named tensors"):
        weights.load(tmp_path)


def test_networks_of_our_own_have_no_published_class(tmp_path):
    from flax import linen as nn

    with pytest.raises(UserError, match="Dense has no published class"):
        weights.save(tmp_path, nn.Dense(3), {})


def test_importing_touches_no_device():
    code = "import jax._src.xla_bridge as b, diffjax.weights.unet2d, diffjax.weights.hub, sys; "
    code += "assert not b._backends and 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.reference
def test_diffusers_draws_the_same_from_a_saved_pipeline(tmp_path, params):
    import torch
    from diffusers import DDPMPipeline

    quiet = jax.tree.map(lambda leaf: leaf / np.sqrt(max(1, np.prod(leaf.shape[:-1]))), params)
    weights.save_pipeline(tmp_path, MODULE, quiet, Scheduler())
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    x = np.random.RandomState(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = pipeline.unet(torch.tensor(x).permute(0, 3, 1, 2), 500).sample.permute(0, 2, 3, 1).numpy()
    module, found = weights.load(tmp_path / "unet")
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(module.apply)({"params": found}, x, jnp.full(2, 500.0))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
