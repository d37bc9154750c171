"""Measures of pictures that need no other network: retrieval among the pictures of a data set, and PSNR.

Retrieval top-1 is the share of prompts whose picture is nearer, pixel by pixel, to the prompt's own picture of the data
than to any other; PSNR compares with the same picture. Where the data have classes, the class of the nearest picture is
compared with that of the own one. Two floors say what no learning would reach: the mean picture, and the nearest
picture of another prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from diffjax.data.dataset import Dataset
from diffjax.utils import image

Pictures = UInt8[np.ndarray, "n h w c"]

AT_ONCE = 256
"""Pictures of the data in memory at a time."""


@dataclass(frozen=True)
class Nearest:
    """Squared distances of pictures to their own one in the data, and to the nearest that differs from that, whose
    class is `label`.
    """

    own: Float[np.ndarray, " n"]
    other: Float[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether none is nearer than their own."""
        return self.own <= self.other


def retrieval(drawn: Pictures, own: dict[str, Any], among: Sequence[Dataset]) -> dict[str, Any]:
    """Retrieval and PSNR of pictures of prompts whose true pictures are those of the examples `own`, among all of
    several splits of one data set, and the floors.
    """
    truth, label = own["image"], own["label"]
    found, floor, mean = compare(drawn, truth, among)
    classes = {"class": float(np.mean(found.right | (found.label == label)))} if among[0].num_classes else {}
    pixels = truth[0].size
    return {
        "num": len(drawn),
        "among": sum(map(len, among)),
        "top1": float(np.mean(found.right)),
        **classes,
        "psnr": float(np.mean(image.psnr(drawn, truth))),
        "floors": {
            "mean_picture_psnr": float(np.mean(image.psnr(truth, mean))),
            "nearest_other_psnr": float(np.median(10 * np.log10(255**2 * pixels / floor.other))),
        },
    }


def compare(
    drawn: Pictures, truth: Pictures, among: Sequence[Dataset]
) -> tuple[Nearest, Nearest, Float[np.ndarray, "h w c"]]:
    """How near `drawn` and `truth` itself are to all pictures of the splits, and the mean of these."""
    rows = _rows(np.concatenate([drawn, truth]))
    own, others, labels, total = np.tile(_rows(truth), (2, 1)), [], [], np.zeros(truth.shape[1:])
    blocks = ((split, first) for split in among for first in range(0, len(split), AT_ONCE))
    for split, first in blocks:
        block = split.examples(range(first, min(first + AT_ONCE, len(split))))
        total += block["image"].sum(axis=0, dtype=np.float64)
        pictures = _rows(block["image"])
        distances = np.where(squared_distances(own, pictures) > 0, squared_distances(rows, pictures), np.inf)
        others.append(distances.min(axis=1))
        labels.append(block["label"][distances.argmin(axis=1)])
    best = np.argmin(others, axis=0)[None]
    other, label = (np.take_along_axis(np.array(each), best, axis=0)[0] for each in (others, labels))
    distance, n = np.sum((rows - own) ** 2, axis=1), len(drawn)
    of_drawn, of_truth = (Nearest(distance[part], other[part], label[part]) for part in (slice(n), slice(n, None)))
    return of_drawn, of_truth, total / sum(map(len, among))


def squared_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """|a_i - b_j|^2, exact for pixel values."""
    return (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T


def _rows(pictures: Pictures) -> Float[np.ndarray, "n d"]:
    return pictures.reshape(len(pictures), -1).astype(np.float64)
