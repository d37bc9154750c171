"""UNet2DModel: the configurations and keys of `google/ddpm-*` and what was trained from them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.nets.unet import ACTIVATIONS, DOWN_BLOCKS, UP_BLOCKS, UNet
from diffjax.utils.errors import UserError
from diffjax.weights.config import BOOLEAN, Field, either, integer, list_of, number, one_of, optional, read_fields
from diffjax.weights.format import Format
from diffjax.weights.names import POINTWISE, Names

SIZES = 2**16
SIZE = integer(1, SIZES)

# The defaults are the published class's own: a key that a file leaves out has this value, whatever ours is.
FIELDS = {
    "sample_size": Field(None, optional(either(SIZE, list_of(SIZE, 2, 2)))),
    "in_channels": Field(3, SIZE),
    "out_channels": Field(3, SIZE),
    "center_input_sample": Field(False, BOOLEAN),
    "time_embedding_type": Field("positional", one_of("positional")),
    "time_embedding_dim": Field(None, optional(SIZE)),
    "freq_shift": Field(0, number(0, 1)),
    "flip_sin_to_cos": Field(True, BOOLEAN),
    "down_block_types": Field(
        ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), list_of(one_of(*DOWN_BLOCKS), 1, 10)
    ),
    "mid_block_type": Field("UNetMidBlock2D", one_of("UNetMidBlock2D", None)),
    "up_block_types": Field(
        ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), list_of(one_of(*UP_BLOCKS), 1, 10)
    ),
    "block_out_channels": Field((224, 448, 672, 896), list_of(SIZE, 1, 10)),
    "layers_per_block": Field(2, integer(1, 16)),
    "mid_block_scale_factor": Field(1, number(1e-6, 1e6)),
    "downsample_padding": Field(1, integer(0, 1)),
    "downsample_type": Field("conv", one_of("conv", "resnet")),
    "upsample_type": Field("conv", one_of("conv", "resnet")),
    "dropout": Field(0.0, number(0, 1)),
    "act_fn": Field("silu", one_of(*ACTIVATIONS)),
    "attention_head_dim": Field(8, optional(SIZE)),
    "norm_num_groups": Field(32, SIZE),
    "attn_norm_num_groups": Field(None, optional(SIZE)),
    "norm_eps": Field(1e-5, number(0, 1)),
    "resnet_time_scale_shift": Field("default", one_of("default", "scale_shift")),
    "add_attention": Field(True, BOOLEAN),
    "class_embed_type": Field(None, one_of(None, "timestep", "identity")),
    "num_class_embeds": Field(None, optional(SIZE)),
    "num_train_timesteps": Field(None, optional(integer(1))),
}
# Of fixed value, or read only by what is not implemented: not fields of the network.
UNREAD = ("time_embedding_type", "num_train_timesteps")

OLD_FIELDS = {
    "image_size": "sample_size",
    "num_res_blocks": "layers_per_block",
    "block_channels": "block_out_channels",
    "down_blocks": "down_block_types",
    "up_blocks": "up_block_types",
    "resnet_eps": "norm_eps",
    "resnet_num_groups": "norm_num_groups",
    "resnet_act_fn": "act_fn",
    "num_head_channels": "attention_head_dim",
    "downscale_freq_shift": "freq_shift",
}

NAMES = Names(
    renames=(
        (r"(blocks|resnets|attentions|downsamplers|upsamplers|to_out)_(\d+)", r"\1.\2"),
        (r"class_embedding$", "class_embedding/embedding"),
    ),
    layouts=(("conv_shortcut/kernel$", POINTWISE),),
    aliases=(
        (r"^mid\.", "mid_block."),
        (r"^downsample_blocks\.", "down_blocks."),
        (r"^upsample_blocks\.", "up_blocks."),
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
    # Early files hold each downsampling convolution twice, as `conv` and as `op`.
    ignored=r"downsamplers\.0\.op\.(weight|bias)$",
)


def _module(config: Mapping[str, Any], path: str) -> UNet:
    values = read_fields(_renewed(config, path), FIELDS, path)
    module = UNet(**{name: value for name, value in values.items() if name not in UNREAD})
    check(module, path)
    return module


def check(module: UNet, path: str) -> None:
    """Raises `UserError` where the fields of a network contradict each other."""
    levels = {len(module.block_out_channels), len(module.down_block_types), len(module.up_block_types)}
    if len(levels) > 1:
        raise UserError(f"{path}: block_out_channels, down_block_types and up_block_types differ in length; mend them")
    odd = [width for width in module.block_out_channels if width % module.norm_num_groups]
    if odd:
        raise UserError(f"{path}: norm_num_groups = {module.norm_num_groups} does not divide {odd[0]}; mend it")
    if module.block_out_channels[-1] % (module.attn_norm_num_groups or 1):
        raise UserError(f"{path}: attn_norm_num_groups does not divide the last of block_out_channels; mend it")
    if (module.attention_head_dim or 1) > min(_attended(module), default=SIZES):
        raise UserError(f"{path}: attention_head_dim = {module.attention_head_dim} is wider than its block; mend it")
    if module.block_out_channels[0] < 4:
        raise UserError(f"{path}: block_out_channels begins below 4, too few for a time embedding; mend it")


def _attended(module: UNet) -> list[int]:
    """The widths at which there is attention."""
    widths = module.block_out_channels
    blocks = zip(module.down_block_types + module.up_block_types, widths + widths[::-1])
    mid = [widths[-1]] if module.add_attention and module.mid_block_type else []
    return mid + [width for block, width in blocks if block.startswith("Attn")]


def _renewed(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Field and block names of the first releases as today's."""
    twice = [name for name in config if OLD_FIELDS.get(name) in config]
    if twice:
        raise UserError(f"{path}: {twice[0]} is the old name of {OLD_FIELDS[twice[0]]}; keep one of them")
    renewed = {OLD_FIELDS.get(name, name): value for name, value in config.items()}
    for name in ("down_block_types", "up_block_types"):
        if isinstance(renewed.get(name), list):
            renewed[name] = [v.removeprefix("UNetRes") if isinstance(v, str) else v for v in renewed[name]]
    return renewed


def _config(module: UNet) -> dict[str, Any]:
    if module.context_width or module.pooled_width:
        raise UserError("UNet2DModel knows no text: a text-conditional U-Net is kept in the run's own checkpoint")
    own = {name: getattr(module, name) for name in FIELDS if name not in UNREAD}
    return {
        "_class_name": "UNet2DModel",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        "time_embedding_type": "positional",
    }


def _example(module: UNet) -> tuple[Any, ...]:
    """Shapes of an image as small as the network takes, a time and a label."""
    side = 2 ** (len(module.block_out_channels) - 1)
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    labels = {
        "identity": shape(1, module.time_embedding_dim or 4 * module.block_out_channels[0]),
        "timestep": shape(1),
        None: shape(1, dtype=jnp.int32),
    }
    return shape(1, side, side, module.in_channels), shape(1), None, None, None, labels[module.class_embed_type]


FORMAT = Format(_module, _config, _example, lambda module: NAMES)
