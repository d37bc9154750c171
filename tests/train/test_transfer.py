import functools
import json
import operator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from diffjax.text.learned import CaptionTokenizer
from diffjax.train import transfer
from diffjax.train.checkpoint import Checkpoints
from diffjax.train.state import create
from diffjax.utils.errors import UserError


def config(**changes):
    base = {
        "process": {"name": "flow"},
        "prediction": {"name": "v"},
        "network": "dit",
        "text": {"name": "words", "tokens": 4},
    }
    return ConfigDict(base | changes)


def arrays(seed, **shapes):
    draw = np.random.default_rng(seed)
    flat = {name.replace("__", "/"): draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def write(folder, params, captions=(), classes=(), steps=(10, 20)):
    """A run whose averages are its parameters + step and whose raw ones are those + 100 steps."""
    checkpoints = Checkpoints(folder)
    for step in steps:
        raw, ema = (jax.tree.map(functools.partial(operator.add, number), params) for number in (100 * step, step))
        state = create(raw, optax.sgd(0.1), jax.random.key(0))
        checkpoints.save(state.replace(step=jnp.int32(step), ema=ema), "", 1.0)
    checkpoints.close()
    (folder / "config.json").write_text(config().to_json())
    (folder / "data.json").write_text(json.dumps({"shape": [8, 8, 3], "classes": classes}))
    if captions:
        (folder / "tokenizer.json").write_text(CaptionTokenizer.train(captions, 4).to_json())


def begin(tmp_path, params, experiment=None, **choice):
    experiment = experiment or SimpleNamespace(config=config(), tokenize=None, classes=())
    found = transfer.start(params, experiment, {"run": str(tmp_path / "old")} | choice, tmp_path)
    return traverse_util.flatten_dict(found, sep="/"), json.loads((tmp_path / "init.json").read_text())


def test_what_fits_is_taken_and_the_rest_is_named(tmp_path, capsys):
    old = arrays(0, network__in__kernel=(3, 4), network__out__kernel=(4, 3), network__gone=(2,), text__norm=(4,))
    new = arrays(1, network__in__kernel=(3, 4), network__out__kernel=(4, 6), network__new=(2,), text__norm=(4,))
    write(tmp_path / "old", old)
    found, told = begin(tmp_path, jax.tree.map(jnp.asarray, new))
    np.testing.assert_allclose(found["network/in/kernel"], old["network"]["in"]["kernel"] + 20)
    np.testing.assert_allclose(found["text/norm"], old["text"]["norm"] + 20)
    for name in ("network/out/kernel", "network/new"):
        np.testing.assert_array_equal(found[name], traverse_util.flatten_dict(new, sep="/")[name])
    why = {
        "network/out/kernel": "its shape is (4, 3) there and (4, 6) here",
        "network/new": "that run has none",
        "network/gone": "this run has none",
    }
    assert told["taken"] == ["network/in/kernel", "text/norm"] and told["not_taken"] == why
    said = capsys.readouterr().out
    assert "step 20: 2 arrays are taken" in said and all(f"{name}: {line}" in said for name, line in why.items())


def test_the_step_and_the_weights_are_chosen(tmp_path):
    old = arrays(0, network__kernel=(3, 4))
    write(tmp_path / "old", old)
    for choice, more in (
        ({}, 20),
        ({"step": 10}, 10),
        ({"weights": "raw"}, 2000),
        ({"step": 10, "weights": "raw"}, 1000),
    ):
        found, told = begin(tmp_path, arrays(1, network__kernel=(3, 4)), **choice)
        np.testing.assert_allclose(found["network/kernel"], old["network"]["kernel"] + more, rtol=1e-6)
        assert told["step"] == choice.get("step", 20) and told["weights"] == choice.get("weights", "ema")


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"run": "nowhere"}, "nowhere holds no run"),
        ({"step": 11}, "no checkpoint of step 11; there are 10, 20"),
        ({"weights": "emma"}, "did you mean ema"),
        ({}, "nothing of .* fits this network"),
    ],
)
def test_what_cannot_be_taken_is_said(tmp_path, choice, said):
    write(tmp_path / "old", arrays(0, network__kernel=(3, 4)))
    with pytest.raises(UserError, match=said):
        begin(tmp_path, arrays(1, network__kernel=(4, 4)), **choice)
    assert not (tmp_path / "init.json").exists()


def test_the_rows_of_words_follow_the_words(tmp_path):
    there, here = ["a cat", "a dog", "a dog"], ["one bird", "a cat", "one bird", "the dog"]
    words = CaptionTokenizer.train(here, 4)
    ids, old_ids = words.rules.get_vocab(), CaptionTokenizer.train(there, 4).rules.get_vocab()
    old = arrays(0, text__words__embedding=(len(old_ids), 5))
    new = arrays(1, text__words__embedding=(len(ids), 5))
    write(tmp_path / "old", old, there)
    found, told = begin(tmp_path, new, SimpleNamespace(config=config(), tokenize=words, classes=()))
    assert any(ids[word] != old_ids[word] for word in ids.keys() & old_ids.keys())
    table, before = found["text/words/embedding"], new["text"]["words"]["embedding"]
    for word, place in ids.items():
        expected = old["text"]["words"]["embedding"][old_ids[word]] + 20 if word in old_ids else before[place]
        np.testing.assert_allclose(table[place], expected, err_msg=word, rtol=1e-6)
    unknown = sorted(ids.keys() - old_ids.keys(), key=ids.get)
    assert len(unknown) == 3 and told["taken"] == ["text/words/embedding"]
    assert told["not_taken"]["text/words/embedding"].startswith(f"3 of its {len(ids)} rows are new: {unknown[0]!r}, ")


@pytest.mark.parametrize("name", ["network__label_embedding", "network__class_embedding"])
def test_the_rows_of_classes_follow_their_names(tmp_path, name):
    old, new = arrays(0, **{name: (4, 5)}), arrays(1, **{name: (4, 5)})
    write(tmp_path / "old", old, classes=["cat", "dog", "bird"])
    found, told = begin(tmp_path, new, SimpleNamespace(config=config(), tokenize=None, classes=("dog", "fish", "cat")))
    path = name.replace("__", "/")
    before, after = (traverse_util.flatten_dict(tree, sep="/")[path] for tree in (old, new))
    expected = np.stack([before[1] + 20, after[1], before[0] + 20, before[3] + 20])  # the last one is that of no class
    np.testing.assert_allclose(found[path], expected, rtol=1e-6)
    assert told["not_taken"] == {path: "1 of its 4 rows are new: 'fish'"}


def test_another_meaning_of_the_same_numbers_is_said(tmp_path, capsys):
    write(tmp_path / "old", arrays(0, network__kernel=(3, 4)))
    experiment = SimpleNamespace(config=config(prediction={"name": "eps"}), tokenize=None, classes=())
    _, told = begin(tmp_path, arrays(1, network__kernel=(3, 4)), experiment)
    assert told["other_meaning"] == ['prediction.name is "v" there and "eps" here']
    assert "note that prediction.name" in capsys.readouterr().out
