"""BertModel: the configurations and keys of BERT encoders such as MiniLM."""

from collections.abc import Mapping
from typing import Any

from diffjax.nets.bert import Bert
from diffjax.utils.errors import UserError
from diffjax.weights.config import Field, integer, number, one_of, read_fields
from diffjax.weights.format import Format, known_fields, tokens_example
from diffjax.weights.names import Names

SIZE = integer(1)

# The defaults are the published class's own.
FIELDS = {
    "vocab_size": Field(30522, SIZE),
    "hidden_size": Field(768, SIZE),
    "num_hidden_layers": Field(12, integer(1, 1024)),
    "num_attention_heads": Field(12, SIZE),
    "intermediate_size": Field(3072, SIZE),
    "max_position_embeddings": Field(512, SIZE),
    "type_vocab_size": Field(2, SIZE),
    "layer_norm_eps": Field(1e-12, number(0, 1)),
    "hidden_act": Field("gelu", one_of("gelu")),
    "position_embedding_type": Field("absolute", one_of("absolute")),
}
# Of fixed value: not fields of the network.
UNREAD = ("hidden_act", "position_embedding_type")

NAMES = Names(
    renames=(
        ("^(word|position|token_type)_embeddings/", r"embeddings/\g<0>"),
        ("^embedding_norm/", "embeddings/LayerNorm/"),
        ("^blocks/(query|key|value)/", r"encoder/layer/{}/attention/self/\1/"),
        ("^blocks/attention_out/", "encoder/layer/{}/attention/output/dense/"),
        ("^blocks/attention_norm/", "encoder/layer/{}/attention/output/LayerNorm/"),
        ("^blocks/ff_in/", "encoder/layer/{}/intermediate/dense/"),
        ("^blocks/ff_out/", "encoder/layer/{}/output/dense/"),
        ("^blocks/ff_norm/", "encoder/layer/{}/output/LayerNorm/"),
    ),
    aliases=((r"^bert\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    # Heads on top of the token states.
    ignored=r"^pooler\.|^cls\.|\.position_ids$",
)


def _module(config: Mapping[str, Any], path: str) -> Bert:
    values = read_fields(known_fields(config, FIELDS), FIELDS, path)
    module = Bert(**{name: value for name, value in values.items() if name not in UNREAD})
    if module.hidden_size % module.num_attention_heads:
        raise UserError(
            f"{path}: num_attention_heads = {module.num_attention_heads} does not divide hidden_size; mend it"
        )
    return module


def _config(module: Bert) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        **{name: getattr(module, name) for name in FIELDS if name not in UNREAD},
    }


FORMAT = Format(_module, _config, tokens_example, lambda module: NAMES, "model")
