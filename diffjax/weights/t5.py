"""T5EncoderModel: the configurations and keys of T5's encoder, also out of whole T5 models."""

from collections.abc import Mapping
from typing import Any

from diffjax.nets.t5 import T5Encoder
from diffjax.weights.config import Field, integer, number, one_of, read_fields
from diffjax.weights.format import Format, known_fields, tokens_example
from diffjax.weights.names import Names

SIZE = integer(1)

# The defaults are the published class's own.
FIELDS = {
    "vocab_size": Field(32128, SIZE),
    "d_model": Field(512, SIZE),
    "d_kv": Field(64, SIZE),
    "d_ff": Field(2048, SIZE),
    "num_layers": Field(6, integer(1, 1024)),
    "num_heads": Field(8, SIZE),
    "relative_attention_num_buckets": Field(32, integer(4)),
    "relative_attention_max_distance": Field(128, integer(2)),
    "layer_norm_epsilon": Field(1e-6, number(0, 1)),
    "feed_forward_proj": Field("relu", one_of("relu", "gated-gelu")),
}

NAMES = Names(
    renames=(
        ("^relative_attention_bias/", "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/"),
        ("^final_layer_norm/", "encoder/final_layer_norm/"),
        ("^blocks/attention/", "encoder/block/{}/layer/0/SelfAttention/"),
        ("^blocks/attention_norm/", "encoder/block/{}/layer/0/layer_norm/"),
        ("^blocks/ff/", "encoder/block/{}/layer/1/DenseReluDense/"),
        ("^blocks/ff_norm/", "encoder/block/{}/layer/1/layer_norm/"),
    ),
    # The token table once more, and the other half of whole models.
    ignored=r"^encoder\.embed_tokens\.weight$|^decoder\.|^lm_head\.",
)


def _module(config: Mapping[str, Any], path: str) -> T5Encoder:
    return T5Encoder(**read_fields(known_fields(config, FIELDS), FIELDS, path))


def _config(module: T5Encoder) -> dict[str, Any]:
    gated = module.feed_forward_proj == "gated-gelu"
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": False,
        "use_cache": False,
        "is_gated_act": gated,
        "dense_act_fn": "gelu_new" if gated else "relu",
        **{name: getattr(module, name) for name in FIELDS},
    }


FORMAT = Format(_module, _config, tokens_example, lambda module: NAMES, "model")
