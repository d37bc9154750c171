"""Measures of pictures that need no other network: retrieval among training pictures, and PSNR.

Retrieval top-1 is the share of prompts whose picture is nearer, pixel by pixel, to the prompt's own training picture
than to any other; PSNR compares with the same picture. Two floors say what no learning would reach: the mean picture,
and the nearest picture of another prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from diffjax.data.dataset import Dataset
from diffjax.utils import image

Pictures = UInt8[np.ndarray, "n h w c"]

AT_ONCE = 256
"""Training pictures in memory at a time."""


@dataclass(frozen=True)
class Nearest:
    """Squared distances of pictures to their own one in a training set, and to the nearest that differs from that."""

    own: Float[np.ndarray, " n"]
    other: Float[np.ndarray, " n"]


def retrieval(drawn: Pictures, truth: Pictures, data: Dataset) -> dict[str, Any]:
    """Retrieval and PSNR of pictures of prompts whose training pictures are `truth`, and the floors."""
    found, floor, mean = compare(drawn, truth, data)
    pixels = truth[0].size
    return {
        "num": len(drawn),
        "training_pictures": len(data),
        "top1": float(np.mean(found.own <= found.other)),
        "psnr": float(np.mean(image.psnr(drawn, truth))),
        "floors": {
            "mean_picture_psnr": float(np.mean(image.psnr(truth, mean))),
            "nearest_other_psnr": float(np.median(10 * np.log10(255**2 * pixels / floor.other))),
        },
    }


def compare(drawn: Pictures, truth: Pictures, data: Dataset) -> tuple[Nearest, Nearest, Float[np.ndarray, "h w c"]]:
    """How near `drawn` and `truth` itself are to the whole training set, and the mean of that set."""
    rows = _rows(np.concatenate([drawn, truth]))
    own, others, total = np.tile(_rows(truth), (2, 1)), [], 0.0
    for first in range(0, len(data), AT_ONCE):
        block = data.examples(range(first, min(first + AT_ONCE, len(data))))["image"]
        total = total + block.sum(axis=0, dtype=np.float64)
        apart = squared_distances(own, _rows(block)) > 0
        others.append(np.where(apart, squared_distances(rows, _rows(block)), np.inf).min(axis=1))
    other = np.min(others, axis=0)
    distance = np.sum((rows - own) ** 2, axis=1)
    n = len(drawn)
    return Nearest(distance[:n], other[:n]), Nearest(distance[n:], other[n:]), total / len(data)


def squared_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """|a_i - b_j|^2, exact for pixel values."""
    return (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T


def _rows(pictures: Pictures) -> Float[np.ndarray, "n d"]:
    return pictures.reshape(len(pictures), -1).astype(np.float64)
