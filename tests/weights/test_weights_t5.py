import json

import jax
import numpy as np
import pytest
import torchfile

from diffjax import weights
from diffjax.nets.t5 import T5Encoder
from diffjax.weights import safetensors
from diffjax.weights.names import write_params
from diffjax.weights.t5 import FORMAT

MODULE = T5Encoder(40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")


@pytest.mark.parametrize("layout", ["bin", "old bin", "shards of bin", "shards of safetensors"])
def test_whole_models_are_read_as_the_hub_has_them(layout, tmp_path):
    """The decoder, the head and the fields of a T5ForConditionalGeneration's files are left aside."""
    shapes = weights.param_shapes(MODULE, FORMAT)
    random = np.random.RandomState(0)
    drawn = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), shapes)
    tensors = write_params(drawn, FORMAT.names(MODULE))
    whole = tensors | {key: np.ones((40, 16), np.float32) for key in ("lm_head.weight", "decoder.embed_tokens.weight")}
    config = FORMAT.config(MODULE) | {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"output_past": True, "num_decoder_layers": 2, "n_positions": 512})
    )
    ending = "safetensors" if layout.endswith("safetensors") else "bin"
    stem = "model" if ending == "safetensors" else "pytorch_model"
    write = {"safetensors": safetensors.write, "bin": torchfile.write_state}[ending]
    if layout.startswith("shards"):
        places = {key: f"{stem}-0000{1 + i % 2}-of-00002.{ending}" for i, key in enumerate(whole)}
        for name in set(places.values()):
            write(tmp_path / name, {key: whole[key] for key, place in places.items() if place == name})
        (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        (torchfile.write_old_state if layout == "old bin" else write)(tmp_path / "pytorch_model.bin", whole)
    loaded, params = weights.load(tmp_path)
    assert loaded == MODULE
    jax.tree.map(np.testing.assert_array_equal, params, drawn)
