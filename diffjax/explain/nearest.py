"""Where the picture comes from: the nearest training pictures, and whether it is one of them.

Pictures are compared by their pixels, and by what the network sees in them (`features`). The copy ratio of a picture
is d_1 / d, its distance to the nearest training picture over the mean distance to the 50 after that: near 0 for a copy,
near 1 for a picture that is like no other. Pictures that are known to be no copies say what is usual: those of the
split that was held out, or, without one, every training picture among the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

import diffjax.data
from diffjax.data import Dataset
from diffjax.explain import features
from diffjax.explain.section import Figure, Section, Shown, Strip, Table, Text
from diffjax.explain.subject import Subject
from diffjax.utils import image
from diffjax.utils.progress import counted

AFTER = 50
COPIED = 1 / 3
"""The copy ratio below which a picture that is called close or a copy is a copy."""

CLOSE = 0.05
"""The share of pictures that are no copies and nearer to a training picture than one that is called close."""

USUAL = 200
"""Pictures that say what is usual, at most."""

LARGEST = 60_000
"""Training pictures that are compared at most: of more, so many, evenly chosen."""

FEATURED = 1024
"""Training pictures that are compared by features, at most."""

AT_ONCE = 512
SHOWN = 5

Rows = Callable[[UInt8[np.ndarray, "n h w c"]], Float[np.ndarray, "n d"]]
"""What pictures are compared by: a row of numbers for each."""


@dataclass(frozen=True)
class Nearest:
    """The nearest training pictures, by record number, with their distances (rms of the rows), and the copy ratio."""

    records: np.ndarray
    distances: Float[np.ndarray, " n"]
    ratio: float


@dataclass(frozen=True)
class Compared:
    """A picture among so many training `pictures`, and the copy ratios of others that are no copies, `held_out` of the
    training or training pictures themselves.
    """

    found: Nearest
    usual: list[float]
    held_out: bool
    pictures: int

    @property
    def verdict(self) -> str:
        """copied, close or new."""
        return judged(self.found.ratio, self.usual)

    @property
    def numbers(self) -> dict[str, Any]:
        """In JSON types."""
        pairs = zip(self.found.records[:SHOWN], self.found.distances)
        return {
            "pictures": self.pictures,
            "nearest": [{"record": int(i), "distance": float(d)} for i, d in pairs],
            "ratio": self.found.ratio,
            "usual": self.usual,
            "held_out": self.held_out,
            "verdict": self.verdict,
        }


def target(subject: Subject) -> UInt8[np.ndarray, "h w c"] | None:
    """The training picture whose caption is the prompt, where exactly one has it and it has the picture's size."""
    if not subject.prompt or not subject.captions or subject.data is None:
        return None
    template = subject.data.config.templates[0]
    found = [
        i
        for i, group in enumerate(subject.captions)
        if any(template.replace("{}", text) == subject.prompt for text in group)
    ]
    if len(found) != 1:
        return None
    return subject.data.examples(found)["image"][0]


def chosen(data: Dataset, most: int = LARGEST) -> np.ndarray:
    """The records that are compared: of more than `most`, so many, evenly chosen."""
    return np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).astype(int))


def pixels(pictures: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """Their pixels in [-1, 1], as rows."""
    return image.from_uint8(pictures).reshape(len(pictures), -1)


def blocks(
    data: Dataset, records: np.ndarray, rows: Rows = pixels
) -> Iterator[tuple[np.ndarray, Float[np.ndarray, "n d"]]]:
    """The rows of records, some at a time."""
    for first in range(0, len(records), AT_ONCE):
        part = records[first : first + AT_ONCE]
        yield part, rows(data.examples(part)["image"])


def find(
    pictures: UInt8[np.ndarray, "n h w c"],
    data: Dataset,
    records: np.ndarray,
    but: np.ndarray | None = None,
    rows: Rows = pixels,
) -> list[Nearest]:
    """The nearest of these records to each picture by their `rows`, record `but[i]` left out for picture i."""
    own, found = rows(pictures), []
    for part, others in blocks(data, records, rows):
        square = (own**2).sum(1)[:, None] + (others**2).sum(1) - 2 * own @ others.T
        distance = np.sqrt(np.maximum(square, 0) / own.shape[1])
        if but is not None:
            distance = np.where(but[:, None] == part, np.inf, distance)
        found.append(distance)
    return [_nearest(row, records) for row in np.concatenate(found, axis=1)]


def _nearest(distances: Float[np.ndarray, " n"], records: np.ndarray) -> Nearest:
    order = np.argsort(distances, kind="stable")[: AFTER + 1]
    order = order[np.isfinite(distances[order])]
    first, rest = distances[order[0]], distances[order[1:]]
    ratio = float(first / rest.mean()) if len(rest) and rest.mean() > 0 else 1.0
    return Nearest(records[order], distances[order], ratio)


def compared(
    picture: UInt8[np.ndarray, "h w c"], data: Dataset, held_out: str, rows: Rows = pixels, most: int = LARGEST
) -> Compared:
    """A picture, and others that are no copies: those of the split `held_out`, or, without one, training pictures."""
    records = chosen(data, most)
    others = diffjax.data.load(ConfigDict(data.config.to_dict() | {"split": held_out})) if held_out else data
    some = chosen(others, USUAL)
    every = np.concatenate([picture[None], others.examples(some)["image"]])
    but = None if held_out else np.array([-1, *some])
    own, *usual = find(every, data, records, but, rows)
    return Compared(own, [of.ratio for of in usual], bool(held_out), len(records))


def section(subject: Subject, picture: UInt8[np.ndarray, "h w c"], each: float) -> Section:
    """The nearest training pictures by pixels and by features, and the verdict; an evaluation takes `each` seconds."""
    name, title, data = "nearest", "Where it comes from", subject.data
    if data is None or subject.config is None:
        return Section(
            name,
            title,
            left_out="The pictures that this model was trained on are not here, so none can be compared with.",
        )
    if picture.shape != (data.size, data.size, data.channels):
        return Section(name, title, left_out="This picture has another size than the training pictures.")
    held_out = subject.config.data.get("held_out", "")
    found = {"pixels": compared(picture, data, held_out)}
    rows, left_out = _featured(subject, min(FEATURED, len(data)) + USUAL, each)
    if rows is not None:
        found["features"] = compared(picture, data, held_out, rows, FEATURED)
    figures = tuple(_figure(data, picture, of, FIGURES[by], f"nearest-{by}") for by, of in found.items())
    verdict = min((of.verdict for of in found.values()), key=VERDICTS.index)
    numbers = {"verdict": verdict} | {by: of.numbers for by, of in found.items()}
    return Section(name, title, figures, numbers, left_out)


def _featured(subject: Subject, count: int, each: float) -> tuple[Rows | None, str]:
    """The features by which `count` pictures are compared, or why they are not."""
    if put_off := subject.put_off(FIGURES["features"].title, count * each):
        return None, put_off
    rows = features.of(subject)
    return (
        rows,
        "" if rows else "Nothing is compared by features: no layer here is known to be the middle of a network.",
    )


VERDICTS = ("copied", "close", "new")


def judged(ratio: float, usual: Sequence[float]) -> str:
    """copied, close or new; never worse than new where pictures that are no copies are as near."""
    if ratio >= np.quantile(usual, CLOSE):
        return "new"
    return "copied" if ratio < COPIED else "close"


@dataclass(frozen=True)
class Said:
    """The words of a figure: what of each verdict, of the comparison, and in the file that makes it."""

    title: str
    plain: str
    exact: str
    file: str
    verdicts: dict[str, str]


RATIO = f"copy ratio = d_1 / mean(d_2 ... d_{AFTER + 1}), d_i = sqrt(mean ({{}})^2); copied below 1/3 and the lowest 5%"

FIGURES = {
    "pixels": Said(
        "Its nearest relatives",
        "These are the pictures that look most like this one, pixel by pixel, of {}. If one of them is far nearer than "
        "all the others, the network has drawn it from memory.",
        RATIO.format("x - x_i"),
        "diffjax/explain/nearest.py",
        {
            "copied": "Copied: this is one of the training pictures, learned by heart.",
            "close": "Close: it is no copy, and yet nearer to one training picture than other pictures are.",
            "new": "New: it is no nearer to any training picture than pictures are that are no copies.",
        },
    ),
    "features": Said(
        "Its relatives in the eyes of the network",
        "The same by what the network itself sees in each of {}, in its middle layer: what means much the same to it "
        "is near there, even where the pixels differ.",
        RATIO.format("f(x) - f(x_i)") + "; f: the middle layer, the mean over places, at sigma / alpha = 1/3",
        "diffjax/explain/features.py",
        {
            "copied": "Copied: to the network this is one of its training pictures.",
            "close": "Close: to the network it is no copy, and yet nearer to one training picture than is usual.",
            "new": "New: to the network it is no nearer to any training picture than is usual.",
        },
    ),
}


def _figure(data: Dataset, picture: np.ndarray, found: Compared, said: Said, name: str) -> Figure:
    near, examples = found.found, data.examples(found.found.records[:SHOWN])
    names = [group[0] if group else f"record {i}" for group, i in zip(examples["captions"], near.records)]
    shown = [Shown(f"{name}-0", picture, "this picture", "the picture that was drawn")]
    shown += [
        Shown(f"{name}-{i + 1}", pixels, f"{called}: {distance:.2g} away", f"training picture: {called}")
        for i, (pixels, called, distance) in enumerate(zip(examples["image"], names, near.distances))
    ]
    who = "held-out pictures" if found.held_out else "training pictures among the others"
    low, middle, high = np.quantile(found.usual, [CLOSE, 0.5, 1 - CLOSE])
    rows = (
        ("this picture", f"{near.ratio:.3f}"),
        (f"{who}, the lowest {CLOSE:.0%}", f"{low:.3f}"),
        (f"{who}, the middle", f"{middle:.3f}"),
        (f"{who}, the highest {CLOSE:.0%}", f"{high:.3f}"),
    )
    plain = said.plain.format(counted(found.pictures, "training picture"))
    answer = Text(said.verdicts[found.verdict], strong=True)
    parts = (Strip(tuple(shown), SHOWN + 1, 3), answer, Table(("", "copy ratio"), rows))
    return Figure(said.title, plain, said.exact, said.file, parts)
