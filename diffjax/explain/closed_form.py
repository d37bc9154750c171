"""The network beside a machine that has no network: each pixel of what it draws is a mean of training pixels whose
surroundings look like its own (`diffusion/local.py`, `models/closed_form.py`). Both begin with the same noise and take
the same steps.

Where they agree, the network does what the formula says; where they do not, it has learned something else.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from diffjax.data import Dataset
from diffjax.diffusion.denoise import Denoiser
from diffjax.explain.nearest import chosen
from diffjax.explain.section import Block, Figure, Section, Shown, Strip, Text
from diffjax.explain.subject import Subject, advance
from diffjax.explain.walk import draw, look
from diffjax.models import closed_form
from diffjax.models.model import Model, Recipe
from diffjax.text.reading import Reworded
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted

PICTURES = 1024
"""Training pictures that the machine is made of at most: of more, so many, evenly chosen."""

MIXING = 0.5
"""How much the machine mixes, see `closed_form.largest_window`."""

SOURCES = 3
"""Training pictures that are shown as what it was made of, at most."""


@dataclass(frozen=True)
class Pair:
    """A picture of the network and one of the machine, drawn of `what`, with the machine's sources and their shares."""

    what: str
    network: Float[np.ndarray, "h w c"]
    machine: Float[np.ndarray, "h w c"]
    sources: list[tuple[int, float]]

    @property
    def r(self) -> float:
        """Pearson's correlation of the two."""
        return float(np.corrcoef(self.network.ravel(), self.machine.ravel())[0, 1])

    @property
    def r_squared(self) -> float:
        """1 - |network - machine|^2 / |network - its mean|^2: below 0 where the mean would be nearer."""
        spread = np.sum((self.network - self.network.mean()) ** 2)
        return float(1 - np.sum((self.network - self.machine) ** 2) / spread)


def section(subject: Subject, drawn: Float[np.ndarray, "1 h w c"]) -> Section:
    """The pairs: of everything, and of the text or class that `drawn`, the page's picture, was drawn of."""
    name, title, data = "closed_form", "Without a network", subject.data
    if data is None or subject.model.decode is not None or drawn.shape[1:] != (data.size, data.size, data.channels):
        return Section(
            name, title, left_out="The machine is made of training pictures, and there are none of this size."
        )
    if not isinstance(subject.model.denoiser, Denoiser):
        return Section(name, title, left_out="This picture was drawn without a network in the first place.")
    records = chosen(data)
    records = records[:: -(-len(records) // PICTURES)]
    machine = made(subject, data, records)
    found = list(_pairs(subject, machine, drawn))
    numbers = {"pictures": len(records), "pairs": [_numbers(pair, records) for pair in found]}
    return Section(name, title, (_figure(subject, data, found, records),), numbers)


def _numbers(pair: Pair, records: np.ndarray) -> dict[str, Any]:
    sources = [{"record": int(records[i]), "share": share} for i, share in pair.sources]
    return {"of": pair.what, "r": pair.r, "r_squared": pair.r_squared, "sources": sources}


def _figure(subject: Subject, data: Dataset, found: list[Pair], records: np.ndarray) -> Figure:
    blocks: list[Block] = []
    for i, pair in enumerate(found):
        agree = f"r = {pair.r:.2f} (R\N{SUPERSCRIPT TWO} = {pair.r_squared:.2f})"
        blocks += [
            _row(subject, data, pair, records, f"machine-{i}"),
            Text(f"Of {pair.what}, the two agree with {agree}."),
        ]
    plain = (
        f"This machine has learned nothing: it looks up, in {counted(len(records), 'training picture')}, pixels whose "
        "surroundings look like what it has, and takes their mean. From the same noise, it draws this; beside it are "
        "the pictures from which most of it comes."
    )
    exact = "x0(u) = sum_i w_i(u) x_i(u), w_i(u) = softmax_i -|x_t - alpha x_i|^2 / (2 sigma^2) over the window of u"
    return Figure("Network and formula", plain, exact, "diffjax/diffusion/local.py", tuple(blocks))


def made(subject: Subject, data: Dataset, records: np.ndarray) -> Model:
    """The machine of these records, with the network's process."""
    images = data.images(records)
    machine: Any = closed_form.machine("local", "", subject.model.denoiser.process, images)
    captions = tuple(subject.captions[i] for i in records) if subject.captions else ((),) * len(records)
    return Model(machine, images.shape[1:], text=closed_form.Captions(captions, data.size, MIXING))


def _pairs(subject: Subject, machine: Model, drawn: Float[np.ndarray, "1 h w c"]) -> Iterator[Pair]:
    """The network's pictures with the machine's of the same noise: of everything, and of the text or class."""
    recipe = subject.recipe(guidance=1.0)
    if subject.is_conditional or subject.called is None:
        network = draw(subject, recipe, "") if subject.is_conditional else drawn
        yield Pair("everything", network[0], *_draw(subject, recipe, machine, ""))
    if subject.called is None or not subject.captions:
        return
    with warnings.catch_warnings(), contextlib.suppress(UserError):
        warnings.simplefilter("ignore", Reworded)
        found = _draw(subject, recipe, machine, subject.called)
        yield Pair(f"what this {subject.cause} names", drawn[0], *found)


def _draw(
    subject: Subject, recipe: Recipe, machine: Model, prompt: str
) -> tuple[Float[np.ndarray, "h w c"], list[tuple[int, float]]]:
    """What the machine draws of a prompt, "" for everything, and the pictures that most of its pixels are from."""
    recipe, cond = replace(recipe, denoise=machine.denoiser, reads=()), machine.text([prompt])
    inputs = replace(subject.inputs(recipe, ""), cond=cond)
    picture = np.asarray(advance(recipe, inputs, recipe.begin(inputs), recipe.grid).x[0])
    found = closed_form.sources(machine, picture, cond)
    return picture, [part for part in found.parts() if part[1] >= closed_form.LEAST][:SOURCES]


def _row(subject: Subject, data: Dataset, pair: Pair, records: np.ndarray, name: str) -> Strip:
    """The network, the machine, and what that took most from."""
    views = [
        (look(subject, pair.network[None]), f"the network, of {pair.what}"),
        (look(subject, pair.machine[None]), "the machine, from the same noise"),
    ]
    for i, share in pair.sources:
        example = data.examples([records[i]])
        texts = example["captions"][0]
        views.append((example["image"][0], f"{share:.0%} of it from {texts[0] if texts else 'this one'}"))
    shown = tuple(Shown(f"{name}-{i}", pixels, text, text) for i, (pixels, text) in enumerate(views))
    return Strip(shown, 2 + SOURCES, 2)
