"""A frozen text encoder with random weights, in a folder: a BERT that knows ten words."""

import json

import jax
import numpy as np

from diffjax import weights
from diffjax.nets.bert import Bert

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "heart", "pizza", "cat", "of"]
TINY = Bert(len(WORDS), 16, 1, 2, 16, max_position_embeddings=16)


def write(folder, seed=0):
    """The folder, with the encoder in it."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    params = TINY.init(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]
    weights.save(folder, TINY, jax.tree.map(np.asarray, params))
    rules = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    rules.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "model_max_length": 16}))
    return folder
