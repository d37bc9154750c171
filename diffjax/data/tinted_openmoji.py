"""OpenMoji objects times colours, as a TFDS dataset: each object as it is and in eight tints, a quarter held out.

A model that is trained on a red and a blue penguin and on a purple and a green panda can be asked for a purple penguin,
which no training picture shows: `held_out` has the truth.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from diffjax.data import openmoji
from diffjax.data.openmoji import Emoji, OpenmojiConfig
from diffjax.utils.progress import track

COLOURS = {
    "red": (230, 40, 40),
    "orange": (245, 125, 20),
    "yellow": (252, 234, 43),
    "green": (60, 180, 75),
    "blue": (50, 110, 230),
    "pink": (250, 130, 180),
    "gray": (150, 150, 150),
    "purple": (150, 70, 200),
}
OBJECTS = """
red heart, cat face, dog face, unicorn, panda, fox, frog, pink pig face, lion, rabbit face, mouse face, yellow star,
penguin, gray elephant, gray owl, bear, red octopus, turtle, butterfly, chicken, monkey face, cow face, koala, snail,
red crab, orange giraffe, orange camel, dolphin, spouting whale, snake, T-Rex, sauropod, bat, red lady beetle, honeybee,
ghost, alien, robot, skull, clown face, jack-o-lantern, snowman, rocket, flying saucer, ringed planet, yellow sun,
yellow crescent moon, cloud, droplet, yellow fire, house, castle, yellow tent, volcano, sailboat, airplane, automobile,
bicycle, locomotive, fire engine, red apple, pear, orange tangerine, yellow lemon, peach, strawberry, tomato, eggplant,
avocado, broccoli, mushroom, watermelon, pineapple, coconut, yellow banana, orange carrot, yellow bread,
yellow cheese wedge, yellow pizza, hamburger, hot dog, yellow taco, sushi, doughnut, cookie, cupcake, birthday cake,
chocolate bar, candy, soft ice cream, popcorn, teapot, beer mug, cactus, evergreen tree, orange maple leaf, umbrella,
balloon, yellow crown, gem stone, top hat, t-shirt, jeans, backpack, running shoe, glasses, soccer ball, basketball,
drum, camera, television, telephone, laptop, yellow bell, alarm clock, yellow locked, light bulb, open book, envelope,
money bag, teddy bear, wrapped gift, game die, yellow trophy, gray bomb, pencil, orange key, musical keyboard, pretzel,
orange croissant, honey pot, hot beverage, wine glass, lollipop, french fries, yellow ear of corn, kiwi fruit,
cherry blossom, yellow sunflower, four leaf clover, Christmas tree, rainbow, broken heart, sparkling heart, pink brain,
bone, eye, globe showing Europe-Africa, water wave, tropical fish, duck, hedgehog, pink flamingo, pink spiral shell,
yellow thumbs up, yellow clapping hands, grinning face, yellow thinking face, face with tears of joy, angry face
"""
"""Things whose colour is seen at 32 pixels, by the English names of their pictures. A colour in front says that the
picture as it is has that colour already: it then has both captions, and no tint of that colour is made.
"""

NATURAL = "natural"
SPLITS = ("train", "held_out")
DARKEST = 0.3
"""How bright the darkest fill of a tinted picture is beside its brightest; outlines stay black."""

PAINT = re.compile(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b")


@dataclasses.dataclass(frozen=True)
class Object:
    """A thing: its names without a colour, its picture as SVG, and the colour that this has, "" for none."""

    names: tuple[str, ...]
    svg: str
    natural: str

    @property
    def tints(self) -> list[str]:
        """The colours that it is tinted in."""
        return [colour for colour in COLOURS if colour != self.natural]


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


def objects(subset: str) -> list[Object]:
    """The first so many of `OBJECTS`, or all of them for a subset with a name. Raises `UserError` for more."""
    wanted = [name.strip() for name in OBJECTS.replace("\n", " ").split(",")]
    every = {emoji.names[0]: emoji for emoji in openmoji.emojis()}
    chosen = wanted if subset in openmoji.NAMED_SUBSETS else openmoji.first(subset, wanted)
    emojis = openmoji.unambiguous([every.get(name) or every[_without_colour(name)] for name in chosen])
    return [_object(name, emoji) for name, emoji in zip(chosen, emojis, strict=True)]


def _object(name: str, emoji: Emoji) -> Object:
    colour = name.split()[0]
    names = dict.fromkeys(filter(None, map(_without_colour, emoji.names)))
    return Object(tuple(names), emoji.svg, colour if colour in COLOURS else "")


def _without_colour(name: str) -> str:
    return " ".join(word for word in name.split() if word not in COLOURS)


def held_out(number: int, tints: Sequence[str]) -> set[str]:
    """The two tints of object `number` that are not trained on; each colour is about as often one of them."""
    return {tints[number % len(tints)], tints[(number + 3) % len(tints)]}


def captions(subset: str) -> list[tuple[str, ...]]:
    """Every picture's captions, of both splits."""
    numbered = list(enumerate(objects(subset)))
    return [tuple(said) for split in SPLITS for i, thing in numbered for _, _, said in pictures(thing, i, split)]


def pictures(thing: Object, number: int, split: str) -> Iterator[tuple[str, str, list[str]]]:
    """(colour, SVG, captions) of the pictures of object `number` in a split."""
    if split == "train":
        coloured = [f"{thing.natural} {name}" for name in thing.names if thing.natural]
        yield NATURAL, thing.svg, [*thing.names, *coloured]
    for colour in thing.tints:
        if (colour in held_out(number, thing.tints)) == (split == "held_out"):
            yield colour, tint(thing.svg, COLOURS[colour]), [f"{colour} {name}" for name in thing.names]


class TintedOpenmoji(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `tinted_openmoji`: `image` (size, size, 3), `captions` ("purple panda"), `label`, its colour.

    Split `train` has every object as it is, captioned "panda" and labelled "natural", and all but two of its tints;
    `held_out` these two.
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

    def _generate_examples(self, chosen: list[Object], split: str) -> Iterator[tuple[str, dict]]:
        settings = self.builder_config
        bar = f"drawing objects in colours at {settings.size} px, split {split}"
        for number, thing in enumerate(track(chosen, bar, len(chosen))):
            for colour, svg, said in pictures(thing, number, split):
                picture = openmoji.rasterise(svg, settings.size, settings.background)
                yield said[0], {"image": picture, "captions": said, "label": colour}
