"""AutoencoderKL: the configurations and keys of the autoencoders of Stable Diffusion 1 to 3.5."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.nets.vae import AutoencoderKL
from diffjax.utils.errors import UserError
from diffjax.weights.config import BOOLEAN, Field, integer, list_of, number, one_of, optional, read_fields
from diffjax.weights.format import Format
from diffjax.weights.names import POINTWISE, Names

SIZE = integer(1, 2**16)

# The defaults are the published class's own.
FIELDS = {
    "in_channels": Field(3, SIZE),
    "out_channels": Field(3, SIZE),
    "down_block_types": Field(("DownEncoderBlock2D",), list_of(one_of("DownEncoderBlock2D"), 1, 16)),
    "up_block_types": Field(("UpDecoderBlock2D",), list_of(one_of("UpDecoderBlock2D"), 1, 16)),
    "block_out_channels": Field((64,), list_of(SIZE, 1, 16)),
    "layers_per_block": Field(1, integer(1, 64)),
    "act_fn": Field("silu", one_of("silu")),
    "latent_channels": Field(4, SIZE),
    "norm_num_groups": Field(32, SIZE),
    "sample_size": Field(32, SIZE),
    "scaling_factor": Field(0.18215, number(1e-9)),
    "shift_factor": Field(None, optional(number(-1e9))),
    "latents_mean": Field(None, one_of(None)),
    "latents_std": Field(None, one_of(None)),
    "force_upcast": Field(True, BOOLEAN),
    "use_quant_conv": Field(True, BOOLEAN),
    "use_post_quant_conv": Field(True, BOOLEAN),
    "mid_block_add_attention": Field(True, BOOLEAN),
}
# Of fixed value, told by the number of channels, or (force_upcast) left to whoever chooses the dtype.
UNREAD = ("down_block_types", "up_block_types", "act_fn", "latents_mean", "latents_std", "force_upcast")

NAMES = Names(
    renames=((r"(blocks|resnets|attentions|downsamplers|upsamplers|to_out)_(\d+)", r"\1.\2"),),
    layouts=(("(conv_shortcut|quant_conv)/kernel$", POINTWISE),),
    aliases=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)


def _module(config: Mapping[str, Any], path: str) -> AutoencoderKL:
    values = read_fields(config, FIELDS, path)
    levels = {len(values[name]) for name in ("block_out_channels", "down_block_types", "up_block_types")}
    if len(levels) > 1:
        raise UserError(f"{path}: block_out_channels, down_block_types and up_block_types differ in length; mend them")
    odd = [width for width in values["block_out_channels"] if width % values["norm_num_groups"]]
    if odd:
        raise UserError(
            f"{path}: norm_num_groups = {values['norm_num_groups']} does not divide {odd[0]} channels; mend it"
        )
    return AutoencoderKL(**{name: value for name, value in values.items() if name not in UNREAD})


def _config(module: AutoencoderKL) -> dict[str, Any]:
    own = {name: getattr(module, name) for name in FIELDS if name not in UNREAD}
    levels = len(module.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
    }


def _example(module: AutoencoderKL) -> tuple[Any, ...]:
    """The shape of an image of one latent cell."""
    return (jax.ShapeDtypeStruct((1, module.factor, module.factor, module.in_channels), jnp.float32),)


FORMAT = Format(_module, _config, _example, lambda module: NAMES)
