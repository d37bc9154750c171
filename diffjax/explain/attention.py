"""Where a network looks: its own attention of the image's patches to the tokens of a text, at every state of a walk.

It is read off the network (`nets/layers.py`, `attention_weights`): softmax(q k / sqrt(h)) of the image's token u and
the text's token j, the mean over heads and layers.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float

from diffjax.diffusion.denoise import Denoiser
from diffjax.diffusion.guide import Denoise
from diffjax.diffusion.predict import estimate
from diffjax.explain.walk import Step, called
from diffjax.models import sd3
from diffjax.models.model import Encoded, Model
from diffjax.text import tokenizers
from diffjax.text.frozen import Frozen
from diffjax.text.learned import Prompts
from diffjax.weights import hub

if TYPE_CHECKING:
    import tokenizers as rules


@dataclass(frozen=True)
class Watching:
    """`module.apply` that returns what attention kept beside the network's output."""

    module: Any

    def __call__(self, params: Any, x: Array, t: Array, **cond: Array) -> tuple[Array, Any]:
        y, kept = self.module.apply({"params": params}, x, t, **cond, mutable=["intermediates"])
        return y, jax.tree.leaves(kept)


@jax.jit
def _asked(denoiser: Denoiser, x: Array, t: Array, cond: Any) -> tuple[Array, list[Array]]:
    y, kept = denoiser.network(x, t, cond)
    y = y[..., : x.shape[-1]].astype(x.dtype)
    return estimate(denoiser.prediction, denoiser.process, x, y, t).x0, kept


def ask(denoise: Denoise, step: Step, cond: Any) -> tuple[Float[np.ndarray, "b ..."], list[np.ndarray]]:
    """The estimate of x0 at the x_t of a step, and what attention keeps, (layers, b, image, text) or without the first
    axis each; nothing of a network that keeps none, or where there is no network.
    """
    x, t = step.seen.x, np.float32(step.t)
    if not isinstance(denoise, Denoiser):
        return np.asarray(called(denoise, x, t, cond).x0), []
    watching = dataclasses.replace(denoise, apply=Watching(denoise.apply.module))
    return jax.tree.map(np.asarray, _asked(watching, x, t, cond))


def looked(
    denoise: Denoise, steps: Sequence[Step], cond: dict[str, Array]
) -> Float[np.ndarray, "steps rows columns text"] | None:
    """How much every patch of the image attends to every token of the text, the mean over the layers; None of what does
    not say it. Layers of fewer patches are enlarged to the grid of those of most.
    """
    found = [ask(denoise, step, cond)[1] for step in steps]
    if not found[0]:
        return None
    shape = steps[0].after.shape[1:3]
    return np.stack([_joined([_patched(kept, shape) for kept in layers]) for layers in found])


def _patched(kept: np.ndarray, shape: tuple[int, int]) -> Float[np.ndarray, "layers r c text"]:
    """What one place in a network keeps, of one layer or of a stack of them, as patches of the first image."""
    layers = kept.reshape(-1, *kept.shape[-3:])[:, 0]
    return layers.reshape(len(layers), *grid(layers.shape[1], shape), -1)


def _joined(parts: Sequence[Float[np.ndarray, "layers _ _ text"]]) -> Float[np.ndarray, "r c text"]:
    """The mean over all layers, each patch of a coarser one repeated."""
    rows = max(part.shape[1] for part in parts)
    larger = (part.repeat(rows // part.shape[1], axis=1).repeat(rows // part.shape[1], axis=2) for part in parts)
    return np.concatenate(list(larger)).mean(axis=0)


def grid(tokens: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many patches of a state of that height and width."""
    side = round((shape[0] * shape[1] / tokens) ** 0.5)
    return shape[0] // side, shape[1] // side


def tokenized(model: Model) -> list[tuple["rules.Tokenizer", int, int]]:
    """The tokenizers of a model's text encoders, each with the place of its first token in what the network reads and
    the number of its tokens; none where they are not known.
    """
    text = model.text
    if isinstance(text, Prompts):
        return [(text.tokenize.rules, 0, text.tokenize.length)]
    if isinstance(text, Frozen):
        return [(text.rules.rules, 0, text.length)]
    if isinstance(text, Encoded) and isinstance(model.denoiser.apply.module, sd3.MMDiT):
        folder = _folder(model)
        places = [("tokenizer", 0, sd3.CLIP_TOKENS), (sd3.T5_RULES, sd3.CLIP_TOKENS, sd3.T5_TOKENS)]
        return [
            (tokenizers.load(folder / name).rules, start, length)
            for name, start, length in places
            if (folder / name).is_dir()
        ]
    return []


def _folder(model: Model) -> Path:
    """Where a published model lies."""
    path = Path(model.name)
    return path if path.is_dir() else path.parent if path.is_file() else hub.fetch(model.name, model.revision).folder


def places(prompt: str, readers: Sequence[tuple["rules.Tokenizer", int, int]]) -> list[tuple[str, list[int]]]:
    """Each word of a prompt with the places of its tokens."""
    found, end = [], 0
    for word in prompt.split():
        begin = prompt.index(word, end)
        end = begin + len(word)
        inside = []
        for rules, start, length in readers:
            offsets = rules.encode(prompt).offsets[:length]
            inside += [start + i for i, (a, b) in enumerate(offsets) if a < end and b > begin and a < b]
        found.append((word, inside))
    return found
