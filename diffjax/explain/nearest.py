"""Where the picture comes from: the nearest training pictures, and whether it is one of them.

The copy ratio of a picture is d_1 / d, its distance to the nearest training picture over the mean distance to the 50
after that: near 0 for a copy, near 1 for a picture that is like no other. Pictures that are known to be no copies say
what is usual: those of the split that was held out, or, without one, every training picture among the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

import diffjax.data
from diffjax.data import Dataset
from diffjax.explain.section import Figure, Section, Shown, Strip, Table, Text
from diffjax.explain.subject import Subject
from diffjax.utils import image
from diffjax.utils.progress import counted

AFTER = 50
COPIED = 1 / 3
"""The copy ratio below which a picture is called a copy."""

CLOSE = 0.05
"""The share of pictures that are no copies and nearer to a training picture than one that is called close."""

USUAL = 200
"""Pictures that say what is usual, at most."""

LARGEST = 60_000
"""Training pictures that are compared at most: of more, so many, evenly chosen."""

AT_ONCE = 512
SHOWN = 5


@dataclass(frozen=True)
class Nearest:
    """The nearest training pictures, by record number, with their distances (rms, in [-1, 1]), and the copy ratio."""

    records: np.ndarray
    distances: Float[np.ndarray, " n"]
    ratio: float


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


def chosen(data: Dataset) -> np.ndarray:
    """The records that are compared."""
    return np.unique(np.linspace(0, len(data) - 1, min(LARGEST, len(data))).astype(int))


def blocks(data: Dataset, records: np.ndarray) -> Iterator[tuple[np.ndarray, Float[np.ndarray, "n d"]]]:
    """The pictures of records as rows in [-1, 1], some at a time."""
    for first in range(0, len(records), AT_ONCE):
        part = records[first : first + AT_ONCE]
        yield part, _rows(data.examples(part)["image"])


def _rows(pixels: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    return image.from_uint8(pixels).reshape(len(pixels), -1)


def nearest(
    pixels: UInt8[np.ndarray, "n h w c"], data: Dataset, records: np.ndarray, but: np.ndarray | None = None
) -> list[Nearest]:
    """The nearest of these records to each picture, record `but[i]` left out for picture i."""
    rows, found = _rows(pixels), []
    for part, others in blocks(data, records):
        square = (rows**2).sum(1)[:, None] + (others**2).sum(1) - 2 * rows @ others.T
        distance = np.sqrt(np.maximum(square, 0) / rows.shape[1])
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


def usual(data: Dataset, held_out: str, records: np.ndarray) -> tuple[list[float], bool]:
    """Copy ratios of pictures that are no copies, and whether they were held out of the training."""
    others = diffjax.data.load(ConfigDict(data.config.to_dict() | {"split": held_out})) if held_out else data
    some = np.unique(np.linspace(0, len(others) - 1, min(USUAL, len(others))).astype(int))
    found = nearest(others.examples(some)["image"], data, records, None if held_out else some)
    return [of.ratio for of in found], bool(held_out)


def section(subject: Subject, picture: UInt8[np.ndarray, "h w c"]) -> Section:
    """The nearest training pictures, and the verdict."""
    name, title, data = "nearest", "Where it comes from", subject.data
    if data is None or subject.config is None:
        return Section(
            name,
            title,
            left_out="The pictures that this model was trained on are not here, so none can be compared with.",
        )
    if picture.shape != (data.size, data.size, data.channels):
        return Section(name, title, left_out="This picture has another size than the training pictures.")
    records = chosen(data)
    found = nearest(picture[None], data, records)[0]
    ratios, held_out = usual(data, subject.config.data.get("held_out", ""), records)
    verdict, said = judged(found.ratio, ratios)
    numbers: dict[str, Any] = {
        "pictures": len(records),
        "nearest": [{"record": int(i), "distance": float(d)} for i, d in zip(found.records[:SHOWN], found.distances)],
        "ratio": found.ratio,
        "usual": ratios,
        "held_out": held_out,
        "verdict": verdict,
    }
    return Section(name, title, (_figure(data, picture, found, ratios, held_out, said),), numbers)


def judged(ratio: float, usual: Sequence[float]) -> tuple[str, str]:
    """copied, close or new, and that in a sentence."""
    if ratio < COPIED:
        return "copied", "Copied: this is one of the training pictures, learned by heart."
    if ratio < np.quantile(usual, CLOSE):
        return "close", "Close: it is no copy, and yet nearer to one training picture than other pictures are."
    return "new", "New: it is no nearer to any training picture than pictures are that are no copies."


def _figure(
    data: Dataset, picture: np.ndarray, found: Nearest, ratios: Sequence[float], held_out: bool, said: str
) -> Figure:
    examples = data.examples(found.records[:SHOWN])
    names = [group[0] if group else f"record {i}" for group, i in zip(examples["captions"], found.records)]
    shown = [Shown("nearest-0", picture, "this picture", "the picture that was drawn")]
    shown += [
        Shown(f"nearest-{i + 1}", pixels, f"{called}: {distance:.2f} away", f"training picture: {called}")
        for i, (pixels, called, distance) in enumerate(zip(examples["image"], names, found.distances))
    ]
    who = "held-out pictures" if held_out else "training pictures among the others"
    low, middle, high = np.quantile(ratios, [CLOSE, 0.5, 1 - CLOSE])
    rows = (
        ("this picture", f"{found.ratio:.3f}"),
        (f"{who}, the lowest {CLOSE:.0%}", f"{low:.3f}"),
        (f"{who}, the middle", f"{middle:.3f}"),
        (f"{who}, the highest {CLOSE:.0%}", f"{high:.3f}"),
    )
    looked = counted(len(chosen(data)), "training picture")
    plain = (
        f"These are the pictures that look most like this one, pixel by pixel, of {looked}. "
        "If one of them is far nearer than all the others, the network has drawn it from memory."
    )
    exact = f"copy ratio = d_1 / mean(d_2 ... d_{AFTER + 1}), d_i = sqrt(mean (x - x_i)^2); copied below 1/3"
    parts = (Strip(tuple(shown), SHOWN + 1, 3), Text(said, strong=True), Table(("", "copy ratio"), rows))
    return Figure("Its nearest relatives", plain, exact, "diffjax/explain/nearest.py", parts)
