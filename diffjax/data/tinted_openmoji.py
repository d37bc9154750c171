"""OpenMoji objects times colours, as a TFDS dataset: each object as it is and in eight tints, a quarter held out.

A model that is trained on a red and a blue penguin and on a purple and a green panda can be asked for a purple penguin,
which no training picture shows: `held_out` has the truth.
"""

import dataclasses
import re
from collections.abc import Iterator

import tensorflow_datasets as tfds

from diffjax.data import openmoji
from diffjax.data.openmoji import Emoji, OpenmojiConfig
from diffjax.utils.progress import track

COLOURS = {
    "red": (230, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (60, 180, 75),
    "blue": (50, 110, 230),
    "pink": (250, 130, 180),
    "gray": (150, 150, 150),
    "purple": (150, 70, 200),
}
NATURAL = "natural"
SPLITS = ("train", "held_out")
DARKEST = 0.3
"""How bright the darkest fill of a tinted picture is beside its brightest; outlines stay black."""

PAINT = re.compile(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b")


def tint(svg: str, colour: tuple[int, int, int]) -> str:
    """The SVG with all that is not black in shades of one colour.

    A paint of luminance l becomes colour x (d + (1 - d) l / L), where L is the largest luminance of the picture's
    paints and d is `DARKEST`.
    """
    brightest = max(map(_luminance, PAINT.findall(svg)), default=0.0)

    def shade(paint: re.Match) -> str:
        luminance = _luminance(paint[1])
        share = DARKEST + (1 - DARKEST) * luminance / brightest if luminance else 0.0
        return "#" + "".join(f"{round(channel * share):02x}" for channel in colour)

    return PAINT.sub(shade, svg)


def _luminance(paint: str) -> float:
    """Of three or six hexadecimal digits, between 0 and 255."""
    digits = paint if len(paint) == 6 else "".join(2 * digit for digit in paint)
    red, green, blue = bytes.fromhex(digits)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def objects(subset: str) -> list[Emoji]:
    """The first so many pictures of `everyday_first` that have anything to tint, each once: "red apple" and "green
    apple" are one "apple".
    """
    found: dict[str, Emoji] = {}
    for emoji in openmoji.everyday_first(openmoji.emojis()):
        names = tuple(dict.fromkeys(filter(None, map(_without_colour, emoji.names))))
        if names and any(map(_luminance, PAINT.findall(emoji.svg))):
            found.setdefault(openmoji.spelling(names[0]), dataclasses.replace(emoji, names=names))
    every = list(found.values())
    return openmoji.unambiguous(every if subset in openmoji.NAMED_SUBSETS else openmoji.first(subset, every))


def _without_colour(name: str) -> str:
    return " ".join(word for word in name.split() if word not in COLOURS)


def held_out(number: int) -> set[str]:
    """The two colours in which object `number` is not trained on; of each colour, a quarter of the objects."""
    names = list(COLOURS)
    return {names[number % 8], names[(number + 3) % 8]}


def captions(subset: str) -> list[tuple[str, ...]]:
    """Every picture's captions, of both splits."""
    found = [(number, emoji) for number, emoji in enumerate(objects(subset))]
    every = [_tints(emoji, number, split) for number, emoji in found for split in SPLITS]
    return [tuple(said) for pictures in every for _, _, said in pictures]


class TintedOpenmoji(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `tinted_openmoji`: `image` (size, size, 3), `captions` ("purple panda"), `label`, its colour.

    Split `train` has every object as it is, captioned "panda" and labelled "natural", and six of its tints; `held_out`
    the other two.
    """

    VERSION = tfds.core.Version("1.0.0")
    builder_config: OpenmojiConfig

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.ClassLabel(names=[NATURAL, *COLOURS]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji emoji in eight tints, with their English names.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        chosen = objects(self.builder_config.subset)
        return {split: self._generate_examples(chosen, split) for split in SPLITS}

    def _generate_examples(self, chosen: list[Emoji], split: str) -> Iterator[tuple[str, dict]]:
        settings = self.builder_config
        for number, emoji in enumerate(track(chosen, f"drawing the {split} tints at {settings.size} px", len(chosen))):
            for label, svg, captions in _tints(emoji, number, split):
                picture = openmoji.rasterise(svg, settings.size, settings.background)
                yield captions[0], {"image": picture, "captions": captions, "label": label}


def _tints(emoji: Emoji, number: int, split: str) -> Iterator[tuple[str, str, list[str]]]:
    """(colour, SVG, captions) of the pictures of an object in a split."""
    if split == "train":
        yield NATURAL, emoji.svg, list(emoji.names)
    for name, colour in COLOURS.items():
        if (name in held_out(number)) == (split == "held_out"):
            yield name, tint(emoji.svg, colour), [f"{name} {noun}" for noun in emoji.names]
