"""What a page is about: one picture of one model, asked for as of `diffjax sample`, and the model's training data."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

import diffjax.data
from diffjax import build, config as configs, loading
from diffjax.diffusion import sample
from diffjax.loading import is_run
from diffjax.models.closed_form import Captions
from diffjax.models.model import Inputs, Model, Recipe
from diffjax.plan.report import duration
from diffjax.sampling import job
from diffjax.sampling.job import Request
from diffjax.text.learned import Prompts
from diffjax.utils import seeds
from diffjax.utils.errors import UserError

PATIENCE = 120.0
"""Seconds above which a figure that needs more drawings is put off by default."""

ROWS = 32
"""Steps that one program makes at most; a run of more calls it again."""


@dataclass(frozen=True)
class Subject:
    """A model, a completed request of one picture, and the `prompt` as the model reads it.

    Of a run, `folder` and `config` are its own; of a closed form, the latter is its table. A figure that would take
    longer than `patience` seconds is put off.
    """

    model: Model
    request: Request
    prompt: str | None = None
    folder: Path | None = None
    config: ConfigDict | None = None
    patience: float = PATIENCE

    def put_off(self, figure: str, seconds: float) -> str:
        """ "" where there is time for a figure, else a sentence that says why it is not here, and how to have it."""
        if seconds < self.patience:
            return ""
        needed = math.ceil(seconds * 1.5)
        return f"{figure}: not here, since it would take {duration(seconds)}; `--patience {needed}` draws it too."

    @property
    def label(self) -> str | None:
        """The class that is drawn."""
        return self.request.labels[0] if self.request.labels else None

    @property
    def called(self) -> str | None:
        """The text, or the name of the class, that is drawn; None where it is neither."""
        if self.prompt or self.label is None:
            return self.prompt or None
        number = self.model.condition(1, label=self.label)["label"][0]
        return self.model.classes[number] if number >= 0 else None

    @property
    def cause(self) -> str:
        """What the picture is drawn of: "text", or "class"."""
        return "class" if self.model.classes else "text"

    @property
    def is_conditional(self) -> bool:
        """Whether the model can draw with its text or class, and without."""
        return bool(self.model.text is not None or self.model.classes) and self.model.has_null

    def recipe(self, **how: Any) -> Recipe:
        """How the picture is drawn, but for what is given otherwise."""
        method = job.method(self.request)
        if "guidance" in how:
            guide = None if build.scale(how["guidance"]) is None else self.request.guide
            method = replace(method, guidance=None, guide=guide)
        return self.model.recipe(method, size=self.request.size, **how)

    def inputs(self, recipe: Recipe, prompt: str | None = None) -> Inputs:
        """What the picture has of its own, always from the same noise; with another prompt, "" for no text or class."""
        given: dict[str, Any] = {}
        if self.model.text is not None or self.prompt is not None:
            given["prompt"] = self.prompt if prompt is None else prompt
        if self.model.classes or self.label is not None:
            given["label"] = None if prompt == "" else self.label
        if self.request.negative_prompt is not None and "null" in recipe.reads:
            given["negative_prompt"] = self.request.negative_prompt
        return self.model.inputs(seeds.key(self.request.seed), np.arange(1), reads=recipe.reads, **given)

    def images(self, x: Float[Array | np.ndarray, "b ..."]) -> Float[np.ndarray, "b h w c"]:
        """Pictures of states, in [-1, 1]."""
        return np.clip(np.asarray(self.model.images(jnp.asarray(x))), -1, 1)

    @cached_property
    def data(self) -> diffjax.data.Dataset | None:
        """The training pictures of a run; None without, or where they are no longer there."""
        if self.config is None:
            return None
        try:
            return diffjax.data.load(self.config.data)
        except UserError as error:
            warnings.warn(f"the page goes without the training pictures: {error}", stacklevel=2)
            return None

    @cached_property
    def captions(self) -> list[tuple[str, ...]]:
        """Those of every training picture; none of data without."""
        return self.data.captions() if self.data is not None and self.data.has_captions else []


def advance(recipe: Recipe, inputs: Inputs, state: sample.State, rows: Float[np.ndarray, "n 2"]) -> sample.State:
    """The state after these steps, by one program for any number of them."""
    for first in range(0, len(rows), ROWS):
        part = np.asarray(rows[first : first + ROWS], np.float32)
        filled = np.concatenate([part, np.zeros((ROWS - len(part), 2), np.float32)])
        state = replace(recipe, grid=filled).advance_part(inputs, state)
    return jax.block_until_ready(state)


def find(request: Request) -> Subject:
    """The subject of a request. Raises `UserError` for several pictures, and for a model that begins with a picture."""
    if len(request.subjects) != 1:
        raise UserError("a page is about one picture: give one prompt, and one label")
    texts = [*request.texts, *(without for _, without in knocked_out(request.prompts[0]))] if request.prompts else []
    model = loading.requested(request, texts).against(request.guide)
    if model.low_res:
        raise UserError(f"{model.name} is super-resolution, drawn from a picture: explain the base of its cascade")
    request = job.completed(request, model)
    folder = Path(model.name) if is_run(Path(model.name)) else None
    prompt = read(model, request.prompts[0]) if request.prompts else None
    config = configs.read(folder) if folder else ConfigDict(request.closed_form) if request.closed_form else None
    return Subject(model, request, prompt, folder, config)


def read(model: Model, prompt: str) -> str:
    """A prompt in the words in which the model reads it. Raises `UserError` where it can read none of them."""
    if not isinstance(model.text, Prompts | Captions):
        return prompt
    reading = model.text.read(prompt)
    if reading.said:
        warnings.warn(reading.said, stacklevel=2)
    return reading.text


def knocked_out(prompt: str) -> list[tuple[str, str]]:
    """Each word of a prompt, with the prompt that is left without it."""
    words = prompt.split()
    left = [(word, " ".join(words[:i] + words[i + 1 :]).strip(" +,&")) for i, word in enumerate(words)]
    return [(word, rest) for word, rest in left if any(map(str.isalnum, word))]
