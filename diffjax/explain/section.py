"""What a page is made of: sections of figures, each said twice, with the pictures and numbers behind it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from diffjax.explain.chart import Chart


@dataclass(frozen=True)
class Shown:
    """A picture with the name of its file, what is written below it, and what is read in its place (`alt`)."""

    name: str
    pixels: UInt8[np.ndarray, "h w c"]
    caption: str
    alt: str


@dataclass(frozen=True)
class Strip:
    """Pictures side by side, in rows of `columns`, on a narrow screen of `narrow`."""

    kind: ClassVar[str] = "strip"
    pictures: tuple[Shown, ...]
    columns: int = 4
    narrow: int = 2


@dataclass(frozen=True)
class Table:
    """Rows under a head."""

    kind: ClassVar[str] = "table"
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Frame:
    """What a slider shows in one place: pictures, and formulas with their numbers."""

    label: str
    pictures: tuple[Shown, ...]
    formulas: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slider:
    """Frames of which one is seen at a time."""

    kind: ClassVar[str] = "slider"
    name: str
    label: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Text:
    """A sentence that says what was found; `strong` where it is the answer."""

    kind: ClassVar[str] = "text"
    text: str
    strong: bool = False


Block = Strip | Table | Slider | Text | Chart


@dataclass(frozen=True)
class Figure:
    """A figure, said twice: `plain`, for a person who has never heard of diffusion, and `exact`, the formula (as
    `formula.html` reads it) with the `file` that holds it.
    """

    title: str
    plain: str
    exact: str
    file: str
    blocks: tuple[Block, ...]

    @property
    def pictures(self) -> Iterator[Shown]:
        """All pictures of the figure."""
        for block in self.blocks:
            if isinstance(block, Strip):
                yield from block.pictures
            elif isinstance(block, Slider):
                for frame in block.frames:
                    yield from frame.pictures


@dataclass(frozen=True)
class Section:
    """A section of the page, and its numbers in JSON types; `left_out` says why it has no figures, or not all of
    them.
    """

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""
