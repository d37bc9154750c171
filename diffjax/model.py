"""The facade: a model is a denoiser with what its publisher meant for it, and `sample` draws from it."""

from dataclasses import dataclass
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Key

from diffjax import build, guide, sample
from diffjax import grid as grids
from diffjax.denoise import Denoiser
from diffjax.errors import UserError
from diffjax.predict import Estimate
from diffjax.process import Process, perturb
from diffjax.refine import Chain, Clip, Refine

FIRST = 0xFFFFFFFF
"""The number folded into an image's key for the noise it starts from; steps fold in 0, 1, 2, ..."""


@dataclass(frozen=True)
class Defaults:
    """What `sample` takes when nothing is said: the publisher's choice.

    `grid` is a name or a function of the number of steps; `bound` clips or thresholds x0; `unit_start` starts from unit variance
    instead of sigma(t0); `deviation` is the variance of ancestral steps; `batch` is the compiled batch shape.
    """

    steps: int = 30
    sampler: str = "dpmpp_2m"
    grid: str | Callable[[int], np.ndarray] = "logsnr"
    guidance: float | None = None
    bound: Refine | None = None
    unit_start: bool = False
    deviation: sample.Deviation = sample.small
    batch: int = 8


@struct.dataclass
class Recipe:
    """All that one run of sampling is made of, but for the images' own keys and conditions."""

    denoise: Callable[[Array, Array, Any], Estimate]
    process: Process
    sampler: sample.Sampler
    grid: Float[np.ndarray, "steps 2"]


@struct.dataclass
class Model:
    """A pretrained or trained model: parameters are its leaves, everything else is static.

    `text(prompts) -> cond` encodes prompts. `shape` is that of one state x; for latent models `encode(images) -> x` and
    `decode(x) -> images` lead to and from it, `factor` pixels to one of its cells.
    """

    denoiser: Denoiser
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    defaults: Defaults = struct.field(pytree_node=False, default=Defaults())
    text: Any = None
    decode: Any = None
    encode: Any = None
    factor: int = struct.field(pytree_node=False, default=1)
    classes: tuple[str, ...] = struct.field(pytree_node=False, default=())
    name: str = struct.field(pytree_node=False, default="")

    def recipe(
        self,
        *,
        steps: int | None = None,
        sampler: str | Refine | sample.Sampler | None = None,
        grid: str | Float[np.ndarray, "steps 2"] | None = None,
        guidance: float | None = None,
        eta: float | None = None,
        strength: float = 1.0,
    ) -> Recipe:
        """The denoiser, sampler and grid of a run; None is the model's default. Raises `UserError` for what does not exist."""
        steps = self.defaults.steps if steps is None else steps
        if steps < 1:
            raise UserError(f"steps is {steps}: sampling needs at least 1 step")
        process = self.denoiser.process
        sampler = self.defaults.sampler if sampler is None else sampler
        chosen = build.sampler(sampler, eta)
        if chosen.deviation is sample.small:
            chosen = chosen.replace(deviation=self.defaults.deviation)
        bound = self.defaults.bound
        if bound is not None:
            if isinstance(bound, Clip) and sampler == "ddim":
                bound = bound.replace(keep_eps=True)
            chosen = chosen.replace(refine=Chain((bound, chosen.refine)))
        grid = self.defaults.grid if grid is None else grid
        times = grid(steps) if callable(grid) else build.grid(grid, process, steps)
        times = grids.after(times, strength) if strength < 1 else times
        return Recipe(self._guided(guidance), process, chosen, np.asarray(times, np.float32))

    def _guided(self, guidance: float | None) -> Callable:
        guidance = self.defaults.guidance if guidance is None else guidance
        return self.denoiser if guidance is None else guide.Guidance(self.denoiser, jnp.float32(guidance))

    def condition(
        self,
        num: int,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        label: int | str | list[int | str] | None = None,
        guided: bool = False,
    ) -> dict[str, Any]:
        """What the denoiser is told about each of `num` images; with `guided` as the two branches of a guide."""
        cond: dict[str, Array] = {}
        if self.text is not None:
            cond = self.text(_repeat("" if prompt is None else prompt, num))
        elif prompt is not None:
            raise UserError(f"{self.name or 'this model'} was trained without text: leave the prompt out")
        if self.classes:
            cond["label"] = jnp.asarray([self._class(name) for name in _repeat(-1 if label is None else label, num)], jnp.int32)
        elif label is not None:
            raise UserError(f"{self.name or 'this model'} was trained without classes: leave the label out")
        if not guided:
            return cond
        null = guide.null(cond) if negative_prompt is None else self.text(_repeat(negative_prompt, num))
        return {"cond": cond, "null": null}

    def _class(self, label: int | str) -> int:
        if isinstance(label, str) and not label.lstrip("-").isdigit():
            if label not in self.classes:
                raise UserError(f"no class {label!r}: the classes are {', '.join(self.classes)}")
            return self.classes.index(label)
        if not -1 <= int(label) < len(self.classes):
            raise UserError(f"no class {label}: the classes are 0 to {len(self.classes) - 1}")
        return int(label)

    def inputs(
        self,
        key: Key[Array, ""],
        num: int,
        *,
        guided: bool = False,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        label: int | str | list[int | str] | None = None,
        size: int | tuple[int, int] | None = None,
        image: Float[Array, "#num h w c"] | None = None,
        mask: Float[Array, "#num h w 1"] | None = None,
    ) -> "Inputs":
        """What each of `num` images has of its own; image i has the key `fold_in(key, i)`."""
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num))
        cond = self.condition(num, prompt, negative_prompt, label, guided)
        repeat = lambda value: None if value is None else jnp.broadcast_to(value, (num, *value.shape[1:]))
        known = image if image is None or self.encode is None else self.encode(image)
        shape = self.shape if known is None else known.shape[1:]
        if size is not None:
            shape = self.state_shape(size)
        z = sample.normal(keys, jnp.uint32(FIRST), shape, jnp.float32)
        return Inputs(keys, cond, z, repeat(known), repeat(mask))

    def state_shape(self, size: int | tuple[int, int]) -> tuple[int, ...]:
        """The shape of one state for pictures of `size` pixels, a number or (height, width)."""
        height, width = (size, size) if isinstance(size, int) else size
        return (height // self.factor, width // self.factor, self.shape[-1])

    def begin(self, recipe: Recipe, inputs: "Inputs") -> sample.State:
        """The state at the grid's first time: noise (times sigma(t0), or of unit variance), or the noised picture."""
        t0 = jnp.float32(recipe.grid[0, 0])
        if inputs.image is not None:
            return sample.start(recipe.sampler, perturb(recipe.process, inputs.image, inputs.z, t0))
        scale = 1.0 if self.defaults.unit_start else recipe.process.sigma(t0)
        return sample.start(recipe.sampler, scale * inputs.z)

    def advance(
        self,
        recipe: Recipe,
        inputs: "Inputs",
        state: sample.State,
        grid: Float[np.ndarray, "steps 2"],
        noise: Float[Array, "steps b ..."] | None = None,
    ) -> sample.State:
        """The state after the steps of `grid`, compiled once for its length."""
        denoise = recipe.denoise
        if inputs.mask is not None:
            denoise = guide.Inpaint(denoise, recipe.process, inputs.image, inputs.mask)
        return sample.run(state, grid, noise, denoise, recipe.process, recipe.sampler, inputs.cond, inputs.keys)

    def images(self, x: Float[Array, "b ..."]) -> Float[Array, "b h w c"]:
        """Pictures of states: themselves for pixel models, decoded and clamped to [-1, 1] for latent ones."""
        return x if self.decode is None else jnp.clip(self.decode(x), -1, 1)

    def sample(
        self,
        key: Key[Array, ""],
        *,
        num: int = 1,
        steps: int | None = None,
        sampler: str | Refine | sample.Sampler | None = None,
        grid: str | Float[np.ndarray, "steps 2"] | None = None,
        guidance: float | None = None,
        eta: float | None = None,
        strength: float = 1.0,
        init: Float[Array, "num ..."] | None = None,
        noise: Float[Array, "steps num ..."] | None = None,
        **conditions: Any,
    ) -> Float[Array, "num h w c"]:
        """`num` images, float NHWC (pixel models: the sampler's last state, not clamped; latent models: in [-1, 1]).

        `conditions` are those of `inputs`: prompt, negative_prompt, label, size, image, mask. Image i has the key `fold_in(key, i)`
        and is computed in a batch of the model's own fixed shape, so it depends neither on `num` nor on its neighbours.
        `image` with `strength` < 1 starts from a noised picture; `mask` is 1 where it must stay. `init` is the state at the
        grid's first time, `noise` that of each step: with them another run is replayed, in one batch.
        """
        recipe = self.recipe(steps=steps, sampler=sampler, grid=grid, guidance=guidance, eta=eta, strength=strength)
        inputs = self.inputs(key, num, guided=recipe.denoise is not self.denoiser, **conditions)
        if init is not None or noise is not None:
            state = self.begin(recipe, inputs) if init is None else sample.start(recipe.sampler, jnp.asarray(init))
            return self.images(self.advance(recipe, inputs, state, recipe.grid, noise).x)
        outputs = []
        for part in inputs.parts(self.defaults.batch):
            outputs.append(self.images(self.advance(recipe, part, self.begin(recipe, part), recipe.grid).x))
        return jnp.concatenate(outputs)[:num]


@struct.dataclass
class Inputs:
    """What each image of a run has of its own, one row an image: key, condition, first noise, and a known picture."""

    keys: Key[Array, "b"]
    cond: dict[str, Any]
    z: Float[Array, "b ..."]
    image: Float[Array, "b ..."] | None = None
    mask: Float[Array, "b h w 1"] | None = None

    def rows(self, index: np.ndarray) -> "Inputs":
        """The rows of the given images."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def parts(self, batch: int) -> Iterator["Inputs"]:
        """The images in batches of one shape, the last one filled up with its last image."""
        num = len(self.z)
        for first in range(0, num, batch):
            yield self.rows(np.minimum(np.arange(first, first + batch), num - 1))


def _repeat(value: Any, num: int) -> list:
    """One value for all images, or one for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * num
    if len(value) != num:
        raise UserError(f"{len(value)} prompts or labels for {num} images: give one, or one for each image")
    return list(value)
