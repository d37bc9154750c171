"""The closed-form generator as a model: a data set and nothing else, with no network and no training.

What a prompt names are training pictures, and they are mixed window by window (`diffusion.local`). `load` makes the
model of a table such as that of experiments/closed_form.py; `sources` says which training picture each pixel of a
drawn picture looks like, and `mosaic` shows it.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

import diffjax.data
from diffjax import build
from diffjax.diffusion import local
from diffjax.diffusion.analytic import wiener
from diffjax.diffusion.local import Equivariant, Given, Ideal, Local, Windows
from diffjax.diffusion.process import Process
from diffjax.models.model import Defaults, Model
from diffjax.text.learned import CaptionTokenizer
from diffjax.text.reading import Reading, Reworded, Words
from diffjax.utils import image
from diffjax.utils.errors import UserError, unknown

NAME = "closed_form"

MACHINES = ("local", "broken", "circular", "ideal")
COVARIANCE = "covariance"
STEPS = 20

BETWEEN = re.compile(r"\s*[+,&]\s*|\s+and\s+", re.IGNORECASE)
"""What stands between the names in a prompt."""

UNIT = 32
"""The side of the pictures for which windows are given here; those of larger pictures are larger in proportion."""

ONE, DOUBLING, STRETCH = 9.0, 2.36, 6.0
"""The largest window that mixes n pictures of 32 pixels well, by the eye, is 9 + 2.36 log2(n): 11 for two, 27 for
200. Without any mixing it is 6 times as large, with the most 6 times smaller.
"""


def largest_window(count: Float[np.ndarray, " b"], size: int, mixing: float) -> Float[np.ndarray, " b"]:
    """The side of the windows in pure noise that mix so many pictures; `mixing` from 0 (windows as large as the
    picture, which copy) over 0.5 to 1.
    """
    side = (ONE + DOUBLING * np.log2(count)) * STRETCH ** (1 - 2 * mixing)
    return side * size / UNIT


@dataclasses.dataclass(frozen=True)
class Captions:
    """`captions(["frog + red heart", ...]) -> cond`: prompts as weights of training pictures, (b, n) logits, and the
    factor of the windows that mix them.

    A prompt names one thing or several, as "frog + red heart", "frog and red heart" or "frog, heart, pizza". Each name
    weighs as much as any other, shared by the pictures whose captions match it best: those that say the same, else
    those that have the most of its words. The empty prompt names all pictures. `mixing` None leaves windows as they
    are.
    """

    captions: tuple[tuple[str, ...], ...]
    size: int
    mixing: float | None

    @functools.cached_property
    def words(self) -> Words:
        """The words of the captions."""
        return CaptionTokenizer.train((text for group in self.captions for text in group), 1).words

    @functools.cached_property
    def _said(self) -> list[list[frozenset[str]]]:
        """The words of every caption of every picture."""
        return [[frozenset(self.words.split(text)) for text in group] for group in self.captions]

    def readings(self, prompt: str) -> list[Reading]:
        """What each name in a prompt is read as. Raises `UserError` for a name of which no caption has a word."""
        whole = " ".join(self.words.split(prompt))
        if any(whole == " ".join(self.words.split(text)) for group in self.captions for text in group):
            return [Reading(prompt, prompt)]
        return [self._reading(name) for name in BETWEEN.split(prompt.strip()) if name]

    def _reading(self, name: str) -> Reading:
        try:
            return self.words.read(name)
        except UserError as error:
            said = str(error).partition(": say what")[0]
            raise UserError(f"{said}: name what the training pictures show, such as {self._some}") from error

    @property
    def _some(self) -> str:
        return ", ".join(group[0] for group in self.captions[:3] if group)

    def read(self, prompt: str) -> Reading:
        """What a prompt is read as, names joined by "+"."""
        readings = self.readings(prompt)
        unknown = tuple(word for reading in readings for word in reading.unknown)
        near = tuple(word for reading in readings for word in reading.near)
        text = " + ".join(reading.text for reading in readings)
        plain = " + ".join(name for name in BETWEEN.split(prompt.strip()) if name)
        return Reading(prompt, prompt if text == plain else text, unknown, near)

    def matching(self, name: str) -> list[int]:
        """The pictures whose captions match a name best."""
        asked = frozenset(self.words.split(name))
        if same := [i for i, group in enumerate(self._said) if asked in group]:
            return same
        shared = np.array([max((len(asked & said) for said in group), default=0) for group in self._said])
        return np.flatnonzero(shared == shared.max()).tolist()

    def weights(self, prompt: str) -> Float[np.ndarray, " n"]:
        """How probable a prompt makes each training picture."""
        weight = np.zeros(len(self.captions))
        readings = self.readings(prompt) if prompt.strip() else []
        for reading in readings:
            found = self.matching(reading.text)
            weight[found] += 1 / len(found) / len(readings)
        return weight if readings else np.full(len(self.captions), 1 / len(self.captions))

    def __call__(self, prompts: Sequence[str]) -> dict[str, Array]:
        """`logits` (b, n), -inf for a picture that is not named, and `windows` (b,) for `Windows`."""
        for said in dict.fromkeys(self.read(prompt).said for prompt in prompts):
            if said:
                warnings.warn(said, Reworded, stacklevel=2)
        weight = np.stack([self.weights(prompt) for prompt in prompts])
        with np.errstate(divide="ignore"):
            logits = np.log(weight)
        cond = {"logits": jnp.asarray(logits, jnp.float32)}
        if self.mixing is None:
            return cond
        count = np.exp(-np.sum(weight * np.where(weight > 0, logits, 0), axis=1))
        side = largest_window(count, self.size, self.mixing)
        usual = largest_window(np.asarray(len(self.captions)), self.size, 0.5)
        return cond | {"windows": jnp.asarray((side - 1) / (usual - 1), jnp.float32)}


DEFAULTS = {"machine": "local", "windows": "", "mixing": 0.5, "process": {"name": "flow"}}


def settled(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with what it leaves out, and its data by their whole path. Raises `UserError` for a field that there is
    not.
    """
    if wrong := next((name for name in table if name not in ("data", *DEFAULTS)), None):
        raise unknown(f"field of {NAME}", wrong, ("data", *DEFAULTS))
    if not table.get("data"):
        raise UserError(f"{NAME} has no data: add the table `data` of an experiment such as experiments/closed_form.py")
    data = dict(table["data"])
    if data.get("path"):
        data["path"] = str(Path(data["path"]).expanduser().resolve())
    return DEFAULTS | dict(table) | {"data": data}


def load(table: Mapping[str, Any]) -> Model:
    """The model of a table: `data`, as of any experiment, and, if they are not as in `DEFAULTS`, `machine`, `windows`,
    `mixing` and `process`.

    The machine is "local" (windows at the same place: mixes pictures), "broken" or "circular" (at any place: textures,
    hundreds of times slower), or "ideal" (whole pictures: copies). `windows` is "" (those that mix well, by `mixing`
    from 0, which copies, to 1), a name of `local.PUBLISHED`, or "covariance" (given by the data). Raises `UserError`
    for what does not exist, and for data without captions.
    """
    given = settled(table)
    mixing = build.within("mixing", given["mixing"], 0.0, 1.0)
    found = diffjax.data.load(ConfigDict(given["data"]))
    if not found.has_captions:
        raise UserError(f"{found.name} has no captions, by which a prompt finds its pictures: add some")
    examples = found.examples(range(len(found)))
    images = image.from_uint8(examples["image"])
    denoiser: Any = machine(given["machine"], given["windows"], build.process(given["process"]), images)
    text = Captions(tuple(examples["captions"]), found.size, None if given["windows"] else mixing)
    defaults = Defaults(steps=STEPS, sampler="euler", grid="uniform", batch=1)
    return Model(denoiser, images.shape[1:], defaults, text=text, multiple=found.size, largest=found.size, name=NAME)


def machine(
    name: str, windows: str, process: Process, images: Float[np.ndarray, "n h w c"]
) -> Ideal | Local | Equivariant:
    """The denoiser of that name. Raises `UserError` for a name that there is not."""
    if name not in MACHINES:
        raise unknown("machine", name, MACHINES)
    pictures = local.pictures(images)
    if name == "ideal":
        return Ideal(process, pictures)
    if windows == COVARIANCE and name == "local":
        return Local(process, pictures, Given(wiener(process, images)))
    if windows and windows not in local.PUBLISHED:
        raise unknown("windows", windows, (*local.PUBLISHED, *([COVARIANCE] if name == "local" else [])))
    base = float(largest_window(np.asarray(len(images)), images.shape[1], 0.5))
    sides = local.published(windows) if windows else local.falling(base)
    return Local(process, pictures, sides) if name == "local" else Equivariant(process, pictures, sides, name)


@dataclasses.dataclass(frozen=True)
class Sources:
    """How much of each pixel comes from each training picture: `shares`, 1 in sum over the pictures that were
    `allowed`.
    """

    shares: Float[np.ndarray, "n h w"]
    allowed: int

    @property
    def bits(self) -> Float[np.ndarray, "h w"]:
        """The entropy of the shares: 0 where a pixel is copied from one picture, log2(n) where all have it in
        common.
        """
        return -np.sum(self.shares * np.log2(np.maximum(self.shares, 1e-30)), axis=0)

    @property
    def own(self) -> Int[np.ndarray, "h w"]:
        """The picture that a pixel has more than half of itself from; -1 where it is common to several."""
        return np.where(self.shares.max(0) > 0.5, self.shares.argmax(0), -1)

    def parts(self) -> list[tuple[int, float]]:
        """The pictures with pixels of their own here, each with its part of all pixels, the largest first."""
        found, counts = np.unique(self.own[self.own >= 0], return_counts=True)
        return sorted(zip(found.tolist(), (counts / self.own.size).tolist()), key=lambda part: -part[1])


def sources(model: Model, picture: Float[np.ndarray, "h w c"], cond: Mapping[str, Array]) -> Sources:
    """Which of the training pictures that `cond` (of one picture) allows each pixel is from: those whose windows of 9
    pixels (of 32) look like that around it, judged as if with noise of sigma / alpha = 1/3.
    """
    machine: Any = model.denoiser
    side = 9 * picture.shape[0] / UNIT
    windows = Windows(jnp.zeros(1), jnp.full(1, side))
    parted = (
        dataclasses.replace(machine, windows=windows)
        if isinstance(machine, Equivariant)
        else Local(machine.process, machine.data, windows)
    )
    t = machine.process.inverse(jnp.float32(2 * math.log(3)))
    x = machine.process.alpha(t) * jnp.asarray(picture)[None]
    logits = jnp.asarray(cond["logits"])
    shares = _shares(parted, x, t, {"logits": logits})
    return Sources(np.asarray(shares[0]), int(np.isfinite(logits).sum()))


_shares = jax.jit(lambda machine, x, t, cond: machine.shares(x, t, cond))

COLOURS = ((214, 69, 65), (52, 120, 199), (60, 160, 90), (240, 170, 40), (140, 90, 180))
OTHER, COMMON = (120, 120, 120), (255, 255, 255)
FRAME, SHOWN = 6, 128
LEAST = 0.01
"""The part of all pixels that a training picture must have to be shown."""


def mosaic(model: Model, picture: UInt8[np.ndarray, "h w c"], found: Sources) -> UInt8[np.ndarray, "h w 3"]:
    """A picture, where each of its pixels is from (white where several pictures have it in common, grey where from
    others than those shown), and the pictures that it has the most from, framed in their colour.
    """
    parts = [part for part in found.parts() if part[1] >= LEAST][: len(COLOURS)]
    colours = np.full((len(found.shares) + 1, 3), OTHER, np.uint8)
    colours[-1] = COMMON
    colours[[i for i, _ in parts]] = COLOURS[: len(parts)]
    denoiser: Any = model.denoiser
    planes = np.asarray(denoiser.data.planes)
    block = planes.shape[3]
    tiles = [_tile(_rgb(picture)), _tile(colours[found.own])]
    for (i, _), colour in zip(parts, COLOURS):
        tiles.append(_tile(_rgb(image.to_uint8(planes[i // block, :, :, i % block].transpose(1, 2, 0))), colour))
    said = [f"{model.text.captions[i][0]} {share:.0%}" for i, share in parts]
    common = (found.own < 0).mean()
    bits = f"{found.bits.mean():.1f} of {math.log2(found.allowed):.1f} bits, {common:.0%} in common"
    captions = ["drawn", bits, *said]
    return image.sheet(np.stack(tiles), len(tiles), captions)


def _rgb(picture: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def _tile(picture: UInt8[np.ndarray, "h w 3"], frame: tuple[int, int, int] = COMMON) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, pixels as squares, in a frame."""
    factor = max(1, SHOWN // picture.shape[0])
    tile = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    framed = np.empty((tile.shape[0] + 2 * FRAME, tile.shape[1] + 2 * FRAME, 3), np.uint8)
    framed[:] = frame
    framed[FRAME:-FRAME, FRAME:-FRAME] = tile
    return framed
