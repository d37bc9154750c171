"""The network beside a machine that has no network: each pixel of what it draws is a mean of training pixels whose
surroundings look like its own (`diffusion/local.py`). Both begin with the same noise and take the same steps.

Where they agree, the network does what the formula says; where they do not, it has learned something else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffjax.diffusion import local
from diffjax.explain.nearest import chosen
from diffjax.explain.section import Figure, Section, Shown, Strip, Text
from diffjax.explain.subject import Subject, advance
from diffjax.explain.walk import draw, look
from diffjax.models.model import Recipe
from diffjax.utils import image
from diffjax.utils.progress import counted

LARGEST, SMALLEST = 27 / 32, 3
"""The side of the windows in pure noise, as a share of the picture's, and without any, in pixels."""

PICTURES = 1024
"""Training pictures that the machine is made of at most: of more, so many, evenly chosen."""

SOURCES = 3
"""Training pictures that are shown as what it was made of, at most."""

LEAST = 0.01
"""The share of all pixels that such a picture has at least."""


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
    records = chosen(data)
    records = records[:: -(-len(records) // PICTURES)]
    pictures = image.from_uint8(data.examples(records)["image"])
    windows = local.falling(LARGEST * data.size, SMALLEST)
    machine = local.Local(subject.model.denoiser.process, local.pictures(pictures), windows)
    found = list(_pairs(subject, machine, records, drawn))
    rows = [_row(subject, pair, records, f"machine-{i}") for i, pair in enumerate(found)]
    numbers: dict[str, Any] = {"pictures": len(records), "windows": [float(LARGEST * data.size), SMALLEST]}
    numbers["pairs"] = [
        {
            "of": pair.what,
            "r": pair.r,
            "r_squared": pair.r_squared,
            "sources": [int(records[i]) for i, _ in pair.sources],
        }
        for pair in found
    ]
    said = tuple(
        Text(f"Drawn of {pair.what} the two agree with r = {pair.r:.2f} (R\N{SUPERSCRIPT TWO} = {pair.r_squared:.2f}).")
        for pair in found
    )
    blocks = tuple(block for pair in zip(rows, said) for block in pair)
    plain = (
        f"This machine has learned nothing: it looks up, in {counted(len(records), 'training picture')}, pixels whose "
        "surroundings look like what it has, and takes their mean. From the same noise, it draws this; beside it are "
        "the pictures from which most of it comes."
    )
    exact = "x0(u) = sum_i w_i(u) x_i(u), w_i(u) = softmax_i -|x_t - alpha x_i|^2 / (2 sigma^2) over the window of u"
    return Section(
        name, title, (Figure("Network and formula", plain, exact, "diffjax/diffusion/local.py", blocks),), numbers
    )


def _pairs(
    subject: Subject, machine: local.Local, records: np.ndarray, drawn: Float[np.ndarray, "1 h w c"]
) -> Iterator[Pair]:
    """The network's pictures with the machine's of the same noise."""
    recipe = subject.recipe(guidance=1.0)
    if subject.is_conditional or (subject.prompt is None and subject.label is None):
        network = draw(subject, recipe, "") if subject.is_conditional else drawn
        yield Pair("everything", network[0], *_draw(subject, recipe, machine, np.zeros(len(records))))
    match = _matching(subject, records)
    if match.any() and not match.all():
        logits = np.where(match, 0.0, local.NEVER)
        number = int(match.sum())
        what = "the picture" if number == 1 else f"the {number} pictures"
        yield Pair(f"{what} of this {subject.cause}", drawn[0], *_draw(subject, recipe, machine, logits))


def _matching(subject: Subject, records: np.ndarray) -> np.ndarray:
    """Which records have all words of the prompt in a caption, or the label."""
    data = subject.data
    if subject.label is not None and data.num_classes:
        labels = np.concatenate(
            [data.examples(part)["label"] for part in np.array_split(records, 1 + len(records) // 512)]
        )
        return labels == subject.model.condition(1, label=subject.label)["label"][0]
    if not subject.prompt:
        return np.zeros(len(records), bool)
    asked = set(subject.prompt.split())
    return np.array([any(asked <= set(text.lower().split()) for text in subject.captions[i]) for i in records])


@jax.jit
def _shares(machine: local.Local, x: Any, t: Any, cond: Any) -> Any:
    return machine.shares(x, t, cond).mean((2, 3))[0]


def _draw(
    subject: Subject, recipe: Recipe, machine: local.Local, logits: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "h w c"], list[tuple[int, float]]]:
    """What the machine draws of pictures with these logits, and its main sources at the last step."""
    recipe = recipe.replace(denoise=machine, reads=())
    inputs = subject.inputs(recipe, "").replace(cond={"logits": jnp.asarray(logits[None], jnp.float32)})
    before = advance(recipe, inputs, recipe.begin(inputs), recipe.grid[:-1])
    after = advance(recipe, inputs, before, recipe.grid[-1:])
    share = np.asarray(_shares(machine, before.x, recipe.grid[-1, 0], inputs.cond))
    most = np.argsort(-share, kind="stable")[:SOURCES]
    return np.asarray(after.x[0]), [(int(i), float(share[i])) for i in most if share[i] >= LEAST]


def _row(subject: Subject, pair: Pair, records: np.ndarray, name: str) -> Strip:
    """The network, the machine, and what that took most from."""
    data = subject.data
    found = data.examples([records[i] for i, _ in pair.sources])
    views = [
        (look(subject, pair.network[None]), f"the network, of {pair.what}"),
        (look(subject, pair.machine[None]), "the machine, from the same noise"),
    ]
    for pixels, texts, (_, share) in zip(found["image"], found["captions"], pair.sources):
        views.append((pixels, f"{share:.0%} from {texts[0] if texts else 'this one'}"))
    shown = tuple(Shown(f"{name}-{i}", pixels, text, text) for i, (pixels, text) in enumerate(views))
    return Strip(shown, 2 + SOURCES, 2)
