"""CLIPTextModelWithProjection: the configurations and keys of CLIP's text encoder."""

from collections.abc import Mapping
from typing import Any

from diffjax.nets.clip import ACTIVATIONS, ClipText
from diffjax.utils.errors import UserError
from diffjax.weights.config import Field, integer, number, one_of, read_fields
from diffjax.weights.format import Format, known_fields, tokens_example
from diffjax.weights.names import Names

SIZE = integer(1)

# The defaults are the published class's own.
FIELDS = {
    "vocab_size": Field(49408, SIZE),
    "hidden_size": Field(512, SIZE),
    "num_hidden_layers": Field(12, integer(1, 1024)),
    "num_attention_heads": Field(8, SIZE),
    "intermediate_size": Field(2048, SIZE),
    "max_position_embeddings": Field(77, SIZE),
    "projection_dim": Field(512, SIZE),
    "hidden_act": Field("quick_gelu", one_of(*ACTIVATIONS)),
    "layer_norm_eps": Field(1e-5, number(0, 1)),
    "eos_token_id": Field(49407, integer(0)),
}

NAMES = Names(
    renames=(
        ("^(token|position)_embedding/", r"text_model/embeddings/\g<0>"),
        ("^final_layer_norm/", r"text_model/\g<0>"),
        ("^blocks/(fc.)/", r"text_model/encoder/layers/{}/mlp/\1/"),
        ("^blocks/(.+_proj)/", r"text_model/encoder/layers/{}/self_attn/\1/"),
        ("^blocks/", "text_model/encoder/layers/{}/"),
    ),
    ignored=r"\.position_ids$",
)


def _module(config: Mapping[str, Any], path: str) -> ClipText:
    module = ClipText(**read_fields(known_fields(config, FIELDS), FIELDS, path))
    if module.hidden_size % module.num_attention_heads:
        raise UserError(
            f"{path}: num_attention_heads = {module.num_attention_heads} does not divide hidden_size; mend it"
        )
    return module


def _config(module: ClipText) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **{name: getattr(module, name) for name in FIELDS},
    }


FORMAT = Format(_module, _config, tokens_example, lambda module: NAMES, "model")
