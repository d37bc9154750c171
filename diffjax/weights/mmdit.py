"""SD3Transformer2DModel: the configurations and keys of the transformers of Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.nets.mmdit import MMDiT
from diffjax.utils.errors import UserError
from diffjax.weights.config import Field, integer, list_of, one_of, optional, read_fields
from diffjax.weights.format import Format
from diffjax.weights.names import Names

SIZE = integer(1, 2**16)

# The defaults are the published class's own.
FIELDS = {
    "sample_size": Field(128, SIZE),
    "patch_size": Field(2, SIZE),
    "in_channels": Field(16, SIZE),
    "num_layers": Field(18, integer(1, 1024)),
    "attention_head_dim": Field(64, SIZE),
    "num_attention_heads": Field(18, SIZE),
    "joint_attention_dim": Field(4096, SIZE),
    "caption_projection_dim": Field(1152, SIZE),
    "pooled_projection_dim": Field(2048, SIZE),
    "out_channels": Field(16, optional(SIZE)),
    "pos_embed_max_size": Field(96, SIZE),
    "dual_attention_layers": Field((), list_of(integer(0, 1023), 0, 1024)),
    "qk_norm": Field(None, one_of("rms_norm", None)),
}

NAMES = Names(
    renames=(
        (r"^blocks_(\d+)/", r"transformer_blocks/{\1}/"),
        (r"^(timestep|text)_embedder/", r"time_text_embed/\g<0>"),
        (r"^pos_embed$", "pos_embed/pos_embed"),
        (r"^pos_embed_proj/", "pos_embed/proj/"),
        (r"\b(norm1|norm1_context|norm_out)_linear/", r"\1/linear/"),
        (r"/to_out_0/", "/to_out/0/"),
        (r"/net_0_proj/", "/net/0/proj/"),
        (r"/net_2/", "/net/2/"),
    )
)


def _module(config: Mapping[str, Any], path: str) -> MMDiT:
    values = read_fields(config, FIELDS, path)
    values["out_channels"] = values["out_channels"] or values["in_channels"]
    text_width = values.pop("caption_projection_dim")
    module = MMDiT(**values)
    if text_width != module.width:
        raise UserError(
            f"{path}: caption_projection_dim = {text_width}, and heads make {module.width}; they must be equal"
        )
    if module.width % 4:
        raise UserError(f"{path}: heads make {module.width} channels, which 4 does not divide; mend them")
    return module


def _config(module: MMDiT) -> dict[str, Any]:
    own = {name: getattr(module, name) for name in FIELDS if name != "caption_projection_dim"}
    return {
        "_class_name": "SD3Transformer2DModel",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        "caption_projection_dim": module.width,
    }


def _example(module: MMDiT) -> tuple[Any, ...]:
    """Shapes of one patch, a time, a token and a pooled vector."""
    p = module.patch_size
    shapes = (
        (1, p, p, module.in_channels),
        (1,),
        (1, 1, module.joint_attention_dim),
        (1, module.pooled_projection_dim),
    )
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


FORMAT = Format(_module, _config, _example, lambda module: NAMES)
