"""Stable Diffusion 3 and 3.5 in one safetensors file: recognised by its tensors, and taken apart into components.

Such a file has no configuration and other names: queries, keys and values in one tensor, and the two halves of the last
modulations (shift, scale) the other way round. Tensors stay views of the mapped file, but for those halves.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.nets.clip import ClipText
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.t5 import T5Encoder
from diffjax.nets.vae import AutoencoderKL
from diffjax.utils.errors import UserError
from diffjax.weights import clip, mmdit, param_shapes, safetensors, t5, vae
from diffjax.weights.format import Format
from diffjax.weights.names import table, write_params

Tensors = Mapping[str, np.ndarray]

TRANSFORMER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
HEAD_DIM = 64

# From the names of folders to those of single files. A part of a fused tensor is `qkv.q`, `qkv.k` or `qkv.v`.
TRANSFORMER_NAMES = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.", "t_embedder."),
    (r"^time_text_embed\.text_embedder\.", "y_embedder."),
    (r"^(._embedder)\.linear_1\.", r"\1.mlp.0."),
    (r"^(._embedder)\.linear_2\.", r"\1.mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.attn(2?)\.to_([qkv])\.", r".x_block.attn\1.qkv.\2."),
    (r"\.attn\.add_([qkv])_proj\.", r".context_block.attn.qkv.\1."),
    (r"\.attn(2?)\.to_out\.0\.", r".x_block.attn\1.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.attn(2?)\.norm_([qk])\.", r".x_block.attn\1.ln_\2."),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.ff\.net\.", ".x_block.mlp."),
    (r"\.ff_context\.net\.", ".context_block.mlp."),
    (r"\.mlp\.0\.proj\.", ".mlp.fc1."),
    (r"_block\.mlp\.2\.", "_block.mlp.fc2."),
)
VAE_NAMES = (
    (r"\.down_blocks\.", ".down."),
    (r"\.(down|up)\.(\d+)\.resnets\.", r".\1.\2.block."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
)


@dataclass(frozen=True)
class Component:
    """What a component's folder would hold: `weights.assemble(component.config, component.tensors, ...)`."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where a single file keeps a tensor: its key, which third of it (`None`: all), and whether its halves swap."""

    key: str
    third: int | None = None
    exchanged: bool = False


def read(path: str | Path) -> dict[str, Component]:
    """The components of a file by the names of folders: transformer, vae and text encoders, as far as they are there.

    Raises `UserError` for a damaged file, and for one of another model.
    """
    tensors = safetensors.read(path)
    bare = "joint_blocks.0.x_block.attn.qkv.weight" in tensors
    transformer = dict(tensors) if bare else _under(tensors, TRANSFORMER_PREFIX)
    readers = {"transformer": (_transformer, transformer), "vae": (_vae, _under(tensors, VAE_PREFIX))}
    for name, prefix in TEXT_PREFIXES.items():
        readers[name] = (_t5 if name == "text_encoder_3" else _clip, _under(tensors, prefix))
    try:
        found = {name: reader(part) for name, (reader, part) in readers.items() if part}
    except KeyError as error:
        raise UserError(f"{path} is no Stable Diffusion 3 or 3.5: it lacks {error}; name another file") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no Stable Diffusion 3 or 3.5: its shapes are others; name another file") from error
    if not found:
        raise UserError(
            f"{path} is no Stable Diffusion 3 or 3.5; name another file, or the folder of a published model"
        )
    return found


def write_transformer(path: str | Path, module: MMDiT, params: Any) -> None:
    """Write a transformer as a single file that `read` takes apart again."""
    tensors = write_params(params, mmdit.FORMAT.names(module))
    places = {key: transformer_place(key, module.num_layers) for key in tensors}
    fused: dict[str, list[np.ndarray]] = {}
    for key in sorted(tensors, key=lambda key: (places[key].key, places[key].third or 0)):
        tensor = _exchange(tensors[key]) if places[key].exchanged else tensors[key]
        fused.setdefault(TRANSFORMER_PREFIX + places[key].key, []).append(tensor)
    whole = {key: parts[0] if len(parts) == 1 else np.concatenate(parts) for key, parts in fused.items()}
    safetensors.write(path, whole, {"format": "pt"})


def transformer_place(key: str, layers: int) -> Place:
    """The place of a tensor of SD3Transformer2DModel."""
    exchanged = key.startswith(("norm_out.linear.", f"transformer_blocks.{layers - 1}.norm1_context."))
    key = _renamed(key, TRANSFORMER_NAMES)
    part = re.fullmatch(r"(.+\.qkv)\.([qkv])(\..+)", key)
    return Place(part[1] + part[3], "qkv".index(part[2])) if part else Place(key, None, exchanged)


def vae_place(key: str, levels: int) -> Place:
    """The place of a tensor of AutoencoderKL, whose resolutions single files count upwards in both halves."""
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda block: f".up.{levels - 1 - int(block[1])}.", key)
    return Place(_renamed(key, VAE_NAMES))


def _renamed(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in pairs:
        key = re.sub(pattern, replacement, key)
    return key


def _exchange(tensor: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(tensor, 2)[::-1])


def part_of(tensor: np.ndarray, place: Place) -> np.ndarray:
    if place.exchanged and len(tensor) % 2 == 0:
        return _exchange(tensor)
    third = len(tensor) // 3 if tensor.ndim else 0
    return tensor if place.third is None else tensor[place.third * third : (place.third + 1) * third]


def _under(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _taken_apart(tensors: Tensors, places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Tensors under the names of folders; what has no place keeps its name, to be complained of."""
    known = {place.key for place in places.values()}
    found = {key: part_of(tensors[place.key], place) for key, place in places.items() if place.key in tensors}
    return found | {key: tensor for key, tensor in tensors.items() if key not in known}


def _keys(kind: Format, module: Any) -> list[str]:
    return [key for row in table(param_shapes(module, kind), kind.names(module)) for key in row.keys]


def _count(tensors: Tensors, pattern: str) -> int:
    """How many numbers follow each other from 0 in keys that match a pattern with one group."""
    return len({found[1] for key in tensors if (found := re.match(pattern, key))})


def _transformer(tensors: Tensors) -> Component:
    patches, depth = tensors["x_embedder.proj.weight"], _count(tensors, r"joint_blocks\.(\d+)\.")
    norm, width = tensors.get("joint_blocks.0.x_block.attn.ln_q.weight"), patches.shape[0]
    head_dim = HEAD_DIM if norm is None else norm.shape[0]
    dual = (i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in tensors)
    module = MMDiT(
        patch_size=patches.shape[2],
        in_channels=patches.shape[1],
        out_channels=tensors["final_layer.linear.weight"].shape[0] // patches.shape[2] ** 2,
        num_layers=depth,
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=tensors["context_embedder.weight"].shape[1],
        pooled_projection_dim=tensors["y_embedder.mlp.0.weight"].shape[1],
        pos_embed_max_size=math.isqrt(tensors["pos_embed"].shape[1]),
        dual_attention_layers=tuple(dual),
        qk_norm=None if norm is None else "rms_norm",
    )
    places = {key: transformer_place(key, depth) for key in _keys(mmdit.FORMAT, module)}
    return Component(mmdit.FORMAT.config(module), _taken_apart(tensors, places))


def _vae(tensors: Tensors) -> Component:
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    module = AutoencoderKL(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=tensors["decoder.conv_out.weight"].shape[0],
        block_out_channels=tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        layers_per_block=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        use_quant_conv="quant_conv.weight" in tensors,
        use_post_quant_conv="post_quant_conv.weight" in tensors,
    )
    places = {key: vae_place(key, levels) for key in _keys(vae.FORMAT, module)}
    return Component(vae.FORMAT.config(module), _taken_apart(tensors, places))


def _clip(tensors: Tensors) -> Component:
    width = tensors["text_model.embeddings.token_embedding.weight"].shape[1]
    module = ClipText(
        vocab_size=tensors["text_model.embeddings.token_embedding.weight"].shape[0],
        hidden_size=width,
        num_hidden_layers=_count(tensors, r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=width // HEAD_DIM,
        intermediate_size=tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        max_position_embeddings=tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        projection_dim=tensors["text_projection.weight"].shape[0],
        hidden_act="quick_gelu" if width == ClipText.hidden_size else "gelu",
    )
    return Component(clip.FORMAT.config(module), dict(tensors))


def _t5(tensors: Tensors) -> Component:
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = tensors[f"{attention}relative_attention_bias.weight"].shape
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in tensors
    module = T5Encoder(
        vocab_size=tensors["shared.weight"].shape[0],
        d_model=tensors["shared.weight"].shape[1],
        d_kv=tensors[f"{attention}q.weight"].shape[0] // heads,
        d_ff=tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
        num_layers=_count(tensors, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    return Component(t5.FORMAT.config(module), dict(tensors))
