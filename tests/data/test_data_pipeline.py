import io
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffjax import data
from diffjax.data import pipeline
from diffjax.data.pipeline import choose_caption
from diffjax.data.records import Record
from diffjax.data.skipped import Skipped
from diffjax.utils.errors import UserError

EXAMPLES = 23


class TinyClasses(tfds.core.GeneratorBasedBuilder):
    """Pictures whose grey is 10 times their number; number 7 is broken when the configuration says so."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="whole"), tfds.core.BuilderConfig(name="broken"))

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["hot_dog", "not_hot_dog"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(EXAMPLES):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 12, 3), 10 * number, np.uint8)).save(buffer, "PNG")
            broken = self.builder_config.name == "broken" and number == 7
            yield number, {"image": b"broken" if broken else buffer.getvalue(), "label": number % 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("whole", "broken"):
        TinyClasses(config=name, data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


@pytest.fixture
def load(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path))

    def load(name="whole", **fields):
        return data.load({"name": f"tiny_classes/{name}", "size": 8, "data_dir": str(folder), **fields})

    return load


def lengths(captions):
    return {"tokens": np.array([[len(caption)] for caption in captions], np.int32)}


def take(batches, number):
    return list(itertools.islice(batches, number))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_batch_has_pictures_classes_tokens_and_record_numbers(load):
    dataset = load()
    batch = next(dataset.batches(4, seed=0, tokenize=lengths))
    assert {name: (values.shape, values.dtype.name) for name, values in batch.items()} == {
        "image": ((4, 8, 8, 3), "uint8"),
        "index": ((4,), "int64"),
        "label": ((4,), "int32"),
        "tokens": ((4, 1), "int32"),
    }
    assert dataset.class_names == ("hot dog", "not hot dog") and dataset.num_classes == 2
    np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] // 10 % 2)
    np.testing.assert_array_equal(batch["tokens"][:, 0], np.where(batch["label"], len("not hot dog"), len("hot dog")))
    found = dataset.examples(batch["index"])
    np.testing.assert_array_equal(found["image"], batch["image"])
    np.testing.assert_array_equal(found["label"], batch["label"])


def test_every_epoch_has_every_record_once_in_an_order_of_its_own(load):
    indices = np.concatenate([batch["index"] for batch in take(load().batches(1, seed=3), 3 * EXAMPLES)])
    epochs = indices.reshape(3, EXAMPLES)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(EXAMPLES), (3, 1)))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def test_the_seed_decides_everything(load):
    fields = {"crop": "random", "flip": True}
    first = take(load(**fields).batches(4, seed=1, tokenize=lengths), 8)
    assert_same(first, take(load(**fields).batches(4, seed=1, tokenize=lengths), 8))
    other = take(load(**fields).batches(4, seed=2), 8)
    assert any((one["index"] != two["index"]).any() for one, two in zip(first, other, strict=True))


def test_a_decoded_cache_changes_nothing(load, monkeypatch):
    cached = load(flip=True)
    assert cached.pictures.cached
    expected = take(cached.batches(4, seed=0), 12)
    monkeypatch.setattr(pipeline, "CACHE_BYTES", 0)
    dataset = load(flip=True)
    assert not dataset.pictures.cached
    assert_same(expected, take(dataset.batches(4, seed=0), 12))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_take_equal_parts_of_the_same_batches(load, processes):
    dataset = load(crop="random", flip=True)
    whole = take(dataset.batches(8, seed=0, tokenize=lengths), 5)
    parts = [take(dataset.batches(8, seed=0, tokenize=lengths, shard=(i, processes)), 5) for i in range(processes)]
    joined = [{name: np.concatenate([p[name] for p in row]) for name in row[0]} for row in zip(*parts, strict=True)]
    assert_same(whole, joined)


def test_a_batch_that_cannot_be_shared_equally_is_refused(load):
    with pytest.raises(UserError, match="batch size 6 cannot be shared equally by 4 processes"):
        load().batches(6, seed=0, shard=(1, 4))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_restored_stream_goes_on_with_the_exact_next_batch(load, crop):
    dataset = load(crop=crop, flip=True)
    batches = dataset.batches(5, seed=9, tokenize=lengths)
    take(batches, 7)
    state = batches.get_state()
    expected = take(batches, 6)
    assert json.loads(state)["batch"] == 7
    batches.set_state(state)
    assert_same(expected, take(batches, 6))
    other = load(crop=crop, flip=True).batches(5, seed=9, tokenize=lengths, shard=(0, 1))
    other.set_state(state)
    assert_same(expected, take(other, 6))


def test_a_state_of_other_data_is_refused(load):
    state = load().batches(4, seed=0).get_state()
    for other in (load().batches(4, seed=1), load().batches(2, seed=0), load(split="train[:5]").batches(4, seed=0)):
        with pytest.raises(UserError, match="new --workdir"):
            other.set_state(state)


def test_what_has_changed_is_allowed_on_demand_and_said(load):
    state = load().batches(4, seed=0)
    take(state, 5)
    other = load("broken", split="train[:10]").batches(2, seed=1)
    changed = other.set_state(state.get_state(), allow_change=True)
    assert sorted(changed) == ["batch_size", "content", "examples", "seed", "split"] and changed["batch_size"] == (4, 2)
    assert json.loads(other.get_state())["batch"] == 10  # as many examples


def captioned(folder, words, colour=3):
    folder.mkdir(parents=True)
    for number, word in enumerate(words):
        Image.new("RGB", (8, 8), (number, 0, colour)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(word)
    return data.load({"name": "captioned_folder", "path": str(folder), "size": 8})


def test_data_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))
    state = captioned(tmp_path / "a", ["one", "two", "three"]).batches(2, seed=0).get_state()
    captioned(tmp_path / "moved" / "elsewhere", ["one", "two", "three"]).batches(2, seed=0).set_state(state)
    for name, told in {"exchanged": (["two", "one", "three"],), "pictures": (["one", "two", "three"], 4)}.items():
        with pytest.raises(
            UserError, match="not the data that the checkpoint was trained on: content was.*--allow-change"
        ):
            captioned(tmp_path / name, *told).batches(2, seed=0).set_state(state)


def test_a_state_of_before_contents_were_known_is_read(load):
    old = json.dumps(
        {"name": "tiny_classes/whole", "split": "train", "examples": EXAMPLES, "seed": 0, "batch_size": 4, "batch": 3}
    )
    batches = load().batches(4, seed=0)
    batches.set_state(old.encode())
    assert json.loads(batches.get_state())["batch"] == 3


def test_worker_processes_give_the_same_batches_from_any_state(load):
    batches = load(crop="random").batches(4, seed=0, tokenize=lengths)
    take(batches, 3)
    state, expected = batches.get_state(), take(batches, 5)
    batches = load(crop="random", workers=2).batches(4, seed=0, tokenize=lengths)
    batches.set_state(state)
    try:
        assert_same(expected, take(batches, 5))
    finally:
        batches.close()


@pytest.mark.parametrize("crop", ["center", "random"])
def test_an_unreadable_record_is_named_once_and_replaced_by_the_next(load, crop, caplog):
    dataset = load("broken", crop=crop)
    assert len(dataset) == EXAMPLES
    whole, broken = (
        np.concatenate([batch["index"] for batch in take(load(name, crop=crop).batches(1, seed=0), 2 * EXAMPLES)])
        for name in ("whole", "broken")
    )
    (bad,) = set(whole) - set(broken)
    np.testing.assert_array_equal(broken, np.where(whole == bad, (bad + 1) % EXAMPLES, whole))
    assert dataset.skipped.read() == [(f"record {bad}", "cannot be read: no picture in any known format")]
    assert caplog.text.count(f"record {bad} cannot be read; see {dataset.skipped.path}") == 1
    assert all(dataset.captions())


def test_nothing_but_unreadable_records_ends(load, monkeypatch):
    dataset = load("broken")
    monkeypatch.setattr(pipeline, "decode", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=f"{EXAMPLES} records in a row from 0 cannot be read"):
        dataset.examples([0])


class OneGradient:
    """Records with a single picture, 12 x 8, whose columns are 0 to 11."""

    class_names = ()

    def __len__(self):
        return 1

    def __getitem__(self, index):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(12, dtype=np.uint8)[None].repeat(8, 0)).save(buffer, "PNG")
        return Record(buffer.getvalue(), (), -1)


def test_random_crops_and_flips_vary_and_the_middle_does_not():
    def views(**fields):
        config = data.default_config()
        config.update(fields, size=8)
        pictures = pipeline.Pictures(OneGradient(), config, 1, Skipped(Path("gradient")))
        batches = pipeline.batches(pictures, config, 1, 0, None, (0, 1), {})
        return {tuple(batch["image"][0, 0, :, 0]) for batch in take(batches, 60)}

    starts = [tuple(range(start, start + 8)) for start in range(5)]
    assert views() == {starts[2]}
    assert views(flip=True) == {starts[2], starts[2][::-1]}
    assert views(crop="random") == set(starts)


@pytest.mark.parametrize(
    "captions, fields, possible",
    [
        (("a", "b"), {}, {"a", "b"}),
        (("a", "b"), {"caption": "first"}, {"a"}),
        ((), {}, {""}),
        (("cat",), {"templates": ("{}", "a {}")}, {"cat", "a cat"}),
        (("cat, red, big",), {"tag_dropout": 0.5}, {"cat", "cat, red", "cat, big", "cat, red, big"}),
        (("cat, red",), {"tag_dropout": 1.0}, {"cat"}),
    ],
)
def test_captions_are_chosen(captions, fields, possible):
    config = data.default_config()
    config.update(fields)
    rng = np.random.default_rng(0)
    assert {choose_caption(captions, config, rng) for _ in range(80)} == possible


MISTAKES = [
    ({"siz": 3}, "data.siz does not exist; did you mean data.size?"),
    ({"size": "big"}, "data.size='big' is of the wrong kind; write a value of type int"),
    ({"size": 0}, "data.size=0 is too small"),
    ({"crop": "left"}, 'data.crop="left" must be center or random'),
    ({"background": "blu"}, 'data.background="blu" is no colour'),
    ({"templates": ("a picture",)}, "data.templates must be"),
    ({"split": "test"}, "Unknown split 'test'.*tiny_classes has train"),
    ({"name": "cifer10"}, 'data.name="cifer10" is no data set; did you mean cifar10?'),
    ({"size": 16}, "12 x 8 pixels, smaller than data.size=16"),
]


@pytest.mark.parametrize("fields, message", MISTAKES)
def test_mistakes_are_one_clear_line(load, fields, message, folder):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as raised:
        next(data.load({"name": "tiny_classes/whole", "size": 8, "data_dir": str(folder), **fields}).batches(2, seed=0))
    assert "\n" not in str(raised.value)


def threads():
    return {thread.name for thread in threading.enumerate()}


def test_prefetched_batches_are_placed_and_their_state_is_the_next_ones(load):
    before = threads()
    expected = take(load().batches(4, seed=0), 9)
    prefetch = data.Prefetch(load().batches(4, seed=0), lambda batch: batch["index"] + 100, depth=3)
    states = [prefetch.get_state()]
    for batch in expected[:6]:
        np.testing.assert_array_equal(next(prefetch), batch["index"] + 100)
        states.append(prefetch.get_state())
        time.sleep(0.01)
    assert [json.loads(state)["batch"] for state in states] == list(range(7))
    prefetch.set_state(states[2])
    np.testing.assert_array_equal(next(prefetch), expected[2]["index"] + 100)
    prefetch.close()
    assert threads() == before
    np.testing.assert_array_equal(next(prefetch), expected[3]["index"] + 100)
    prefetch.close()


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for(load):
    def place(batch):
        placed.append(batch)
        if len(placed) == 3:
            raise UserError("no room on the device")
        return batch

    placed = []
    prefetch = data.Prefetch(load().batches(4, seed=0), place)
    take(prefetch, 2)
    with pytest.raises(UserError, match="no room"):
        next(prefetch)
    assert json.loads(prefetch.get_state())["batch"] == 2
    np.testing.assert_array_equal(next(prefetch)["index"], take(load().batches(4, seed=0), 3)[2]["index"])
    prefetch.close()


def test_importing_reads_no_data_library():
    code = "import sys, diffjax.data; print({'grain', 'tensorflow_datasets', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
