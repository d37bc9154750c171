"""The facade: a model is a denoiser with what its publisher meant for it, and `sample` draws from it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffjax import build
from diffjax.diffusion import cascade, grid as grids, guide as guides, sample
from diffjax.diffusion.denoise import Denoiser
from diffjax.diffusion.process import Process, fold, image_keys, perturb
from diffjax.diffusion.refine import Chain, Clip, Extrapolate, Refine, SolverClock, Threshold, inpainted
from diffjax.models import fitted
from diffjax.models.options import Guide, Keywords, Method, Rule, Size, changed, sides
from diffjax.utils import struct
from diffjax.utils.errors import UserError

NAMED = 20
"""How many classes an error lists."""

LOW_RES = sample.START - np.uint32(1)
"""The number folded into an image's key for the noise in its low-res picture, as `sample.START` for its start."""


@dataclass(frozen=True)
class Defaults(Method):
    """How a model draws where nothing is said: its publisher's method, and what belongs to it.

    `bound` clips or thresholds x0; `unit_start` starts from unit variance instead of sigma(t0); `deviation` is the
    variance of ancestral steps; `batch` is the compiled batch shape; `level` is the noise in low-res pictures.
    `solver_clock` is that of the multistep samplers, when named (None: log(alpha / sigma)). `null_prompt` is what
    guidance leads away from without a negative prompt (None: no text at all).
    """

    steps: int = 30
    sampler: str | Refine | sample.Sampler = "dpmpp_2m"
    grid: str | Float[np.ndarray, "steps 2"] | Callable[[int], np.ndarray] = "logsnr"
    guidance: Guide | None = None
    bound: Refine | None = None
    unit_start: bool = False
    deviation: sample.Deviation = sample.small
    batch: int = 8
    level: float = 0.0
    solver_clock: SolverClock | None = None
    null_prompt: str | None = None
    guide: Rule | None = field(default=None, hash=False)

    def but(self, method: Method) -> "Defaults":
        """These but for what a method says; the own guide only where there is guidance."""
        how = replace(self, **method.said())
        is_guided = not callable(how.guidance) and build.scale(how.guidance) is not None
        return how if is_guided else replace(how, guide=method.guide)


@struct.dataclass
class Recipe:
    """All that one run of sampling is made of, but for what each image has of its own.

    `shape` is that of one state; `unit_start`: it starts from unit variance instead of sigma(t0). `reads` are the
    branches of its guide, () without one.
    """

    denoise: guides.Denoise
    process: Process
    sampler: sample.Sampler
    grid: Float[np.ndarray, "steps 2"]
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    unit_start: bool = struct.field(pytree_node=False, default=False)
    reads: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def begin(self, inputs: "Inputs") -> sample.State:
        """The state at the grid's first time: noise (times sigma(t0), or of unit variance), or the noised picture."""
        t0 = jnp.asarray(self.grid[0, 0], jnp.float32)
        shape = self.shape if inputs.image is None else inputs.image.shape[1:]
        z = sample.start_noise(inputs.keys, shape, jnp.float32)
        if inputs.image is not None:
            return self.start(inputs, perturb(self.process, inputs.image, z, t0))
        return self.start(inputs, z if self.unit_start else self.process.sigma(t0) * z)

    def start(self, inputs: "Inputs", x: Float[Array, "b ..."]) -> sample.State:
        """The state before the first step, from x at the grid's first time."""
        return sample.start(self._run(inputs), x)

    def advance(
        self, inputs: "Inputs", state: sample.State, noise: Float[Array, "steps b ..."] | None = None
    ) -> sample.State:
        """The state after the steps of the grid, compiled once for its length."""
        return sample.advance(state, self.grid, self._run(inputs), noise)

    def advance_part(self, inputs: "Inputs", state: sample.State) -> sample.State:
        """The same for a grid that ends in rows of (0, 0), which are left out: one program for any part of a run."""
        return sample.advance_part(state, self.grid, self._run(inputs))

    def _run(self, inputs: "Inputs") -> sample.Run:
        """The run of these images; of a picture with a mask its sampler draws only what the mask covers."""
        sampler = self.sampler
        if inputs.mask is not None and inputs.image is not None:
            sampler = replace(sampler, refine=inpainted(sampler.refine, inputs.image, inputs.mask))
        return sample.Run(self.denoise, self.process, sampler, inputs.keys, inputs.cond)


@struct.dataclass
class Model:
    """A pretrained or trained model: parameters are its leaves, everything else is static.

    `text(prompts) -> cond` encodes prompts. `shape` is that of one state x; for latent models `encode(images) -> x` and
    `decode(x) -> images` lead to and from it, `factor` pixels to one of its cells, and `preview(x)` are small pictures
    that cost little; sizes are multiples of `multiple` pixels, at most `largest` (0: any). A super-resolution
    model reads pictures of `low_res` pixels a side. `has_null`: it was trained without its text or class now and
    then, so that it can draw without. `name` and `revision` (a run's step, a hub's commit) say where it was loaded
    from; `earlier(step)` is the model of an earlier checkpoint of the same run, `weak` the one that autoguidance leads
    away from.
    """

    denoiser: Denoiser
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    defaults: Defaults = struct.field(pytree_node=False, default=Defaults())
    text: Any = None
    decode: Any = None
    encode: Any = None
    preview: Callable | None = struct.field(pytree_node=False, default=None)
    multiple: int = struct.field(pytree_node=False, default=1)
    largest: int = struct.field(pytree_node=False, default=0)
    factor: int = struct.field(pytree_node=False, default=1)
    low_res: int = struct.field(pytree_node=False, default=0)
    classes: tuple[str, ...] = struct.field(pytree_node=False, default=())
    has_null: bool = struct.field(pytree_node=False, default=True)
    name: str = struct.field(pytree_node=False, default="")
    revision: str = struct.field(pytree_node=False, default="")
    earlier: Callable[[int], "Model"] | None = struct.field(pytree_node=False, default=None)
    weak: "Model | None" = None

    def recipe(
        self,
        method: Method = Method(),
        *,
        size: Size | None = None,
        strength: float | None = None,
        **given: Unpack[Keywords],
    ) -> Recipe:
        """How to draw pictures of `size` by a method, but for what is `given` of it; None is the model's own choice.

        `strength` is how much of a picture to start from may change, above 0 to 1, which is also None. Raises
        `UserError` for what does not exist.
        """
        how = self.defaults.but(changed(method, given, self.recipe))
        times = self._times(how, 1.0 if strength is None else strength)
        sampler, denoise = self._sampler(how), self._guided(how)
        shape = self.shape if size is None else self.state_shape(size)
        reads = () if denoise is self.denoiser else getattr(denoise, "reads", guides.Guide.reads)
        return Recipe(denoise, self.denoiser.process, sampler, times, shape, how.unit_start, reads)

    def _times(self, how: Defaults, strength: float) -> Float[np.ndarray, "steps 2"]:
        """The grid, of which the last part of length `strength` is left.

        Raises `UserError` for times that are no grid, or that begin where the prediction says nothing of the picture.
        """
        if how.steps < 1:
            raise UserError(f"steps is {how.steps}: sampling needs at least 1 step")
        if not 0 < strength <= 1:
            raise UserError(f"strength is {strength}: it must be above 0 (keep the picture) and at most 1 (forget it)")
        process, grid = self.denoiser.process, how.grid
        if isinstance(grid, str) and grid == fitted.FITTED:
            grid = fitted.stored(self, how)
        times = grid(how.steps) if callable(grid) else build.grid(grid, process, how.steps, build.start(self.denoiser))
        times = np.asarray(grids.after(times, strength) if strength < 1 else times, np.float32)
        if not len(times):
            raise UserError(f"strength is {strength}: it leaves none of {how.steps} steps, so the picture as it is")
        grids.check(times, process)
        if build.is_blind(self.denoiser, times[0, 0]):
            raise UserError(
                f"this grid begins at t = {times[0, 0]:g}, pure noise, of which "
                f"{type(self.denoiser.prediction).__name__} prediction makes no picture: take the grid logsnr, karras "
                f"or uniform, which begin at {build.start(self.denoiser):.4g}"
            )
        return times

    def _sampler(self, how: Defaults) -> sample.Sampler:
        """The sampler with the publisher's bound and solver clock, and in ancestral steps its variance."""
        chosen = build.sampler(how.sampler, how.eta)
        if chosen.deviation is sample.small and sample.is_ancestral(chosen):
            chosen = replace(chosen, deviation=how.deviation)
        if how.solver_clock is not None and isinstance(how.sampler, str) and isinstance(chosen.refine, Extrapolate):
            chosen = replace(chosen, refine=replace(chosen.refine, clock=how.solver_clock))
        if (bound := how.bound) is None:
            return chosen
        if isinstance(bound, (Clip, Threshold)) and chosen.law is sample.ddim_law:
            bound = replace(bound, keep_eps=True)
        return replace(chosen, refine=Chain((bound, chosen.refine)))

    def _guided(self, how: Defaults) -> guides.Denoise:
        """The guide over the denoiser, or that alone without guidance."""
        if callable(how.guidance):
            if how.guide is not None:
                raise UserError("guidance is a guide of your own: leave the other guide out, or give a scale")
            return how.guidance(self.denoiser)
        scale, rule = build.scale(how.guidance), self.rule(how.guide)
        make = build.guide(rule)
        if scale is None:
            if how.guide is not None:
                raise UserError(
                    f"the guide {rule['name']} acts through guidance: give a scale above 1 too, or leave it out"
                )
            return self.denoiser
        made = make(self.denoiser, scale, self.weak and self.weak.denoiser)
        if "null" in made.reads and self.text is None and not self.classes:
            raise UserError(f"{self._called} was trained without text and classes: leave the guidance out")
        if "weak" in made.reads and self.weak is None:
            raise UserError(f"{self._called} has no weaker network yet: `model.against(guide)` loads it")
        return made

    def rule(self, rule: Rule | None = None) -> Mapping[str, Any]:
        """How guidance is made, as a table: as given, or the model's own way, or classifier-free."""
        own = "cfg" if self.defaults.guide is None else self.defaults.guide
        return build.rule(own if rule is None else rule)

    def against(self, rule: Rule | None = None) -> "Model":
        """The model with the weaker one that autoguidance leads away from, an earlier checkpoint of the same run;
        itself for any other guide. Raises `UserError` when there is none.
        """
        chosen = self.rule(rule)
        build.guide(chosen)
        if chosen["name"] != "autoguidance":
            return self
        if self.earlier is None:
            raise UserError(
                f"{self._called} has no earlier checkpoints: autoguidance is for runs that were trained here"
            )
        weak = self.earlier(chosen["step"])
        weak = weak if weak.text is not None else replace(weak, text=self.text)
        like = lambda leaf, own: leaf.astype(own.dtype)
        params = jax.tree.map(like, weak.denoiser.params, self.denoiser.params)
        return replace(self, weak=replace(weak, denoiser=replace(self.denoiser, params=params)))

    def condition(
        self,
        num: int,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        label: int | str | list[int | str] | None = None,
        reads: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """The conditioning of each of `num` images; as the branches of a guide where it `reads` any."""
        cond: dict[str, Any] = {}
        if self.text is not None:
            if prompt is None and not self.has_null:
                raise UserError(f"{self._called} was never trained without a text: give a prompt")
            cond = self._encoded(_repeat("" if prompt is None else prompt, num))
        elif prompt is not None or negative_prompt is not None:
            raise UserError(f"{self._called} was trained without text: leave the prompt out")
        if self.classes:
            labels = [self._class(name) for name in _repeat(label, num)]
            cond["label"] = np.asarray(labels, np.int32)
        elif label is not None:
            raise UserError(f"{self._called} was trained without classes: leave the label out")
        if negative_prompt is not None and "null" not in reads:
            how = "autoguidance has no place for it" if reads else "give a guidance scale above 1"
            raise UserError(f"a negative prompt acts through guidance: {how}, or leave it out")
        branches: dict[str, Any] = {"cond": cond}
        if "null" in reads:
            if not self.has_null and (self.classes or negative_prompt is None):
                raise UserError(
                    f"{self._called} always knew its text or class in training, so guidance has nothing to lead away "
                    "from: leave it out"
                )
            instead = self.defaults.null_prompt if negative_prompt is None else negative_prompt
            branches["null"] = guides.null(cond) | ({} if instead is None else self._encoded(_repeat(instead, num)))
        if "weak" in reads and self.weak is not None:
            branches["weak"] = self.weak.condition(num, prompt, label=label)
        return branches if reads else cond

    @property
    def _called(self) -> str:
        return self.name or "this model"

    def _encoded(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """One row a prompt; each different prompt is encoded once, in groups of one shape, whatever the others are."""
        return remembered(self.text, prompts, self.defaults.batch)(prompts)

    def reading(self, tokens: int) -> "Model":
        """The model with a text encoder that reads so many tokens. Raises `UserError` where that cannot be chosen."""
        if not hasattr(self.text, "tokens"):
            raise UserError(f"{self._called} reads what it reads: leave max_sequence_length out")
        if tokens < 1:
            raise UserError(f"max_sequence_length is {tokens}: it must be at least 1")
        return replace(self, text=replace(self.text, tokens=tokens))

    def with_encoded(self, prompts: Iterable[str]) -> "Model":
        """The model with these prompts encoded in place of its text encoder, whose memory is then free."""
        if self.text is None:
            return self
        text, weak = remembered(self.text, ["", *prompts], self.defaults.batch), self.weak
        if weak is not None:
            weak = replace(weak, text=text) if weak.text is self.text else weak.with_encoded(text.prompts)
        return replace(self, text=text, weak=weak)

    def _class(self, label: int | str | None) -> int:
        """A class's place: of a name, spelled with spaces or underscores; of a number, itself; -1 of None or -1:
        no class.

        A number in a string is a place only where no class is called by a number.
        """
        if label is None or str(label) == "-1":
            if self.has_null:
                return -1
            raise UserError(f"{self._called} was never trained without a class: give a label, {self._choices}")
        if isinstance(label, str):
            spelled = [label, label.replace("_", " "), label.replace(" ", "_")]
            if found := next((name for name in spelled if name in self.classes), None):
                return self.classes.index(found)
            if not label.isdecimal() or any(name.isdecimal() for name in self.classes):
                raise UserError(f"no class {label!r}: give {self._choices}")
        if not 0 <= int(label) < len(self.classes):
            raise UserError(f"no class {label}: give {self._choices}")
        return int(label)

    @property
    def _choices(self) -> str:
        """The classes in words, the first of them where they are many."""
        named = f"{', '.join(self.classes[:NAMED])}{', ...' if len(self.classes) > NAMED else ''}"
        return f"one of {named} or a number from 0 to {len(self.classes) - 1}"

    def inputs(
        self,
        key: Key[Array, ""],
        numbers: Int[np.ndarray, " b"],
        *,
        reads: tuple[str, ...] = (),
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        label: int | str | list[int | str] | None = None,
        image: Float[Array, "#b h w c"] | None = None,
        mask: Float[Array, "#b h w 1"] | None = None,
        low_res: Float[Array, "#b h w c"] | None = None,
        level: float | None = None,
    ) -> "Inputs":
        """What each of the images has of its own; image number i has the key `fold_in(key, i)`. `reads` is that of
        the recipe.

        `low_res`, with noise of `level`, is what a super-resolution model draws from (see `cascade.condition`).
        """
        num, keys = len(numbers), _keys(key, np.asarray(numbers, np.uint32))
        cond = self.condition(num, prompt, negative_prompt, label, reads)
        repeat = lambda value: None if value is None else jnp.broadcast_to(value, (num, *value.shape[1:]))
        if self.low_res:
            small = self._low_res_cond(repeat(low_res), self.defaults.level if level is None else level, keys)
            cond = {branch: of | small for branch, of in cond.items()} if reads else cond | small
        elif low_res is not None or level is not None:
            raise UserError(f"{self._called} is no super-resolution model: leave low_res and level out")
        known = None if image is None else self.known(image)
        return Inputs(keys, cond, repeat(known), repeat(None if mask is None else self._cells(mask, known)))

    def known(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The state without noise that is a picture: of latent models encoded, unless it has as many channels
        as one.
        """
        channels = {self.shape[-1]} | ({3} if self.encode is not None else set())
        if np.ndim(image) != 4 or image.shape[-1] not in channels:
            many = " or ".join(map(str, sorted(channels)))
            raise UserError(
                f"the image has the shape {np.shape(image)}: give (1, height, width, {many}), or one for each"
            )
        return image if self.encode is None or self._is_state(image) else self.encode(image)

    def _is_state(self, image: Float[Array, "b h w c"]) -> bool:
        return self.encode is None or image.shape[-1] == self.shape[-1]

    def _size_of(self, image: Float[Array, "b h w c"] | None, size: Size | None) -> Size | None:
        """The size to draw, which is that of the image where there is one."""
        if image is None or np.ndim(image) != 4:
            return size
        factor = self.factor if self._is_state(image) else 1
        own = image.shape[1] * factor, image.shape[2] * factor
        if size is not None and own != tuple(sides(size)):
            raise UserError(
                f"the image is {own[1]} pixels wide and {own[0]} high, and size is {size}: leave size out, or resize "
                "the image"
            )
        return own

    def _cells(self, mask: Float[Array, "b h w 1"], known: Float[Array, "b h w c"] | None) -> Float[Array, "b h w 1"]:
        """A mask of the state's cells; of one of pixels, the most of each cell."""
        if known is None:
            raise UserError("a mask says what of a picture is drawn anew: give the `image` too")
        mask = checked_mask(mask)
        (b, height, width, _), (rows, columns) = mask.shape, known.shape[1:3]
        if (height, width) == (rows, columns):
            return mask
        if (height, width) != (rows * self.factor, columns * self.factor):
            raise UserError(f"the mask has {height} x {width} pixels, which the image has not: give one of its size")
        return jnp.reshape(mask, (b, rows, self.factor, columns, self.factor, 1)).max((2, 4))

    def paste(
        self, image: Float[Array, "#b h w c"] | None, mask: Float[Array, "#b h w 1"] | None, feather: int | None = None
    ) -> "Paste | None":
        """What puts the kept pixels of `image` back into a drawn picture; None where there are none, as of latents."""
        if feather and mask is None:
            raise UserError("feather softens the edge of a mask: give the mask too, or leave it out")
        if mask is None or image is None or (self.encode is not None and self._is_state(image)):
            return None
        mask = checked_mask(mask)
        if (cell := image.shape[1] // mask.shape[1]) > 1:
            mask = mask.repeat(cell, axis=1).repeat(cell, axis=2)
        return Paste(
            jnp.asarray(image), feathered(mask, int(build.within("feather", feather or 0, 0, max(mask.shape))))
        )

    def _low_res_cond(self, small: Array | None, level: float, keys: Key[Array, " b"]) -> dict[str, Array]:
        if not 0 <= level < 1:
            raise UserError(f"level is {level}: the noise in a low-res picture is from 0 to below 1")
        if small is None or small.shape[1:] != (self.low_res, self.low_res, self.shape[-1]):
            given = "none is given" if small is None else f"not {small.shape[1]} x {small.shape[2]} of {small.shape[3]}"
            raise UserError(
                f"{self._called} draws from pictures of {self.low_res} x {self.low_res} pixels in {self.shape[-1]} "
                f"channels, and {given}: give `low_res`, or draw with a cascade"
            )
        return _condition(small, self.shape[0], jnp.float32(level), _fold(keys, LOW_RES))

    def state_shape(self, size: Size) -> tuple[int, ...]:
        """The shape of one state for pictures of `size` pixels, a number or (height, width).

        Raises `UserError` for a size that the model has not.
        """
        height, width = sides(size)
        if self.low_res and (height, width) != self.shape[:2]:
            raise UserError(
                f"{self._called} draws {self.shape[1]} x {self.shape[0]} pixels and to no other size: "
                "leave the size out"
            )
        largest = self.largest or max(height, width)
        if min(height, width) < 1 or height % self.multiple or width % self.multiple or max(height, width) > largest:
            most = f" up to {self.largest}" if self.largest else ""
            said = f"{self._called} draws no picture {width} pixels wide and {height} high"
            raise UserError(f"{said}: give multiples of {self.multiple}{most}")
        return (height // self.factor, width // self.factor, self.shape[-1])

    def images(self, x: Float[Array, "b ..."]) -> Float[Array, "b h w c"]:
        """Pictures of states: themselves for pixel models, decoded and clamped to [-1, 1] for latent ones."""
        return x if self.decode is None else jnp.clip(self.decode(x), -1, 1)

    def sample(
        self,
        key: Key[Array, ""],
        *,
        num: int = 1,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        label: int | str | list[int | str] | None = None,
        size: Size | None = None,
        image: Float[Array, "#num h w c"] | None = None,
        mask: Float[Array, "#num h w 1"] | None = None,
        feather: int | None = None,
        strength: float = 1.0,
        low_res: Float[Array, "#num h w c"] | None = None,
        level: float | None = None,
        init: Float[Array, "num ..."] | None = None,
        noise: Float[Array, "steps num ..."] | None = None,
        max_sequence_length: int | None = None,
        **given: Unpack[Keywords],
    ) -> Float[Array, "num h w c"]:
        """`num` images, float NHWC (pixel models: the sampler's last state, not clamped; latent models: in [-1, 1]).

        `given` says how: steps, sampler, grid, guidance, guide, eta (`options.Method`). Image i has the key
        `fold_in(key, i)` and is computed in a batch of the model's own fixed shape, so it depends neither on `num` nor
        on its neighbours. `image` with `strength` < 1 starts from a noised picture. Where `mask` is 1 the image is
        drawn anew, where it is 0 its very pixels stay, by pixels or a state's cells; so many pixels around what is
        drawn, `feather`, pass over into them. `low_res` is the small picture of a super-resolution model, `level` the
        noise in it. `init` is the state at the grid's first time, `noise` that of each step: with them another run is
        replayed, in one batch. `max_sequence_length` is how many tokens T5 reads (SD3: 256 by default).
        """
        if num < 1:
            raise UserError(f"num is {num}: draw at least 1 image")
        method = changed(Method(), given, self.sample)
        self = self if max_sequence_length is None else self.reading(max_sequence_length)
        self = self if callable(method.guidance) else self.against(method.guide)
        recipe = self.recipe(method, size=self._size_of(image, size), strength=strength)
        if image is None and init is None and strength != 1:
            raise UserError("strength says how much of a picture may change: give the `image` too")
        paste = self.paste(image, mask, feather)
        subject = {"prompt": prompt, "negative_prompt": negative_prompt, "label": label}
        known = {"image": image, "mask": mask, "low_res": low_res, "level": level}
        inputs = self.inputs(key, np.arange(num), reads=recipe.reads, **subject, **known)
        images = self._drawn(recipe, inputs, init, noise)
        return images if paste is None else paste(images)

    def _drawn(
        self,
        recipe: Recipe,
        inputs: "Inputs",
        init: Float[Array, "num ..."] | None,
        noise: Float[Array, "steps num ..."] | None,
    ) -> Float[Array, "num h w c"]:
        """The images: in batches of the model's own shape, or in one batch those of a given start or noise."""
        if init is not None or noise is not None:
            state = recipe.begin(inputs) if init is None else recipe.start(inputs, jnp.asarray(init))
            return self.images(recipe.advance(inputs, state, noise).x)
        parts = inputs.parts(self.defaults.batch)
        drawn = [self.images(recipe.advance(part, recipe.begin(part)).x) for part in parts]
        return jnp.concatenate(drawn)[: len(inputs.keys)]


@struct.dataclass
class Paste:
    """Drawn pictures where `mask` is 1, the pixels of `image` where it is 0, a mix of both between."""

    image: Float[Array, "#b h w c"]
    mask: Float[Array, "#b h w 1"]

    def __call__(self, drawn: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.mask * drawn + (1 - self.mask) * self.image


def checked_mask(mask: Float[Array, "b h w 1"]) -> Float[Array, "b h w 1"]:
    """The mask in float32. Raises `UserError` for another shape, and for values outside [0, 1]."""
    if np.ndim(mask) != 4 or np.shape(mask)[-1] != 1:
        raise UserError(f"the mask has the shape {np.shape(mask)}: give (1, height, width, 1), or one for each image")
    values = np.asarray(mask, np.float32)
    if not (values.min() >= 0 and values.max() <= 1):
        raise UserError(
            f"the mask holds values from {values.min():g} to {values.max():g}: give 1 where it is drawn anew, "
            "0 where it stays"
        )
    return jnp.asarray(values)


def feathered(mask: Float[Array, "b h w 1"], width: int) -> Float[Array, "b h w 1"]:
    """The mask with a linear edge of `width` pixels around it: what is drawn stays drawn."""
    grown = lambda _, m: jnp.maximum(
        m, jax.lax.reduce_window(m, 0.0, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") - 1 / (width + 1)
    )
    return jax.lax.fori_loop(0, width, grown, mask) if width else mask


@struct.dataclass
class Inputs:
    """What each image of a run has of its own, one row an image: key, condition, and a known picture, drawn anew where
    the mask is 1.
    """

    keys: Key[Array, " b"]
    cond: dict[str, Any]
    image: Float[Array, "b ..."] | None = None
    mask: Float[Array, "b h w 1"] | None = None

    def rows(self, index: np.ndarray) -> "Inputs":
        """The rows of the given images."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def parts(self, batch: int) -> Iterator["Inputs"]:
        """The images in batches of one shape, the last one filled up with its last image."""
        num = len(self.keys)
        for first in range(0, num, batch):
            yield self.rows(np.minimum(np.arange(first, first + batch), num - 1))


@struct.dataclass
class Encoded:
    """A text encoder that knows some prompts by heart."""

    prompts: tuple[str, ...] = struct.field(pytree_node=False)
    cond: dict[str, np.ndarray]

    def __call__(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Raises `UserError` for another prompt."""
        if unknown := [prompt for prompt in prompts if prompt not in self.prompts]:
            raise UserError(f"{unknown[0]!r} was not among the prompts that were encoded: load the model with it")
        rows = np.asarray([self.prompts.index(prompt) for prompt in prompts])
        return jax.tree.map(lambda leaf: leaf[rows], self.cond)


def remembered(text: Callable, prompts: Iterable[str], batch: int) -> Encoded:
    """The different prompts, encoded `batch` at a time: groups of one shape, whatever the others are."""
    different = tuple(dict.fromkeys(prompts))
    filled = [*different, *[""] * (-len(different) % batch)]
    groups = [text(filled[i : i + batch]) for i in range(0, len(filled), batch)]
    return Encoded(different, jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(different)], *groups))


_condition = jax.jit(cascade.condition, static_argnums=1)
_keys = jax.jit(image_keys)
_fold = jax.jit(fold)


def _repeat(value: Any, num: int) -> list:
    """One value for all images, or one for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * num
    if len(value) != num:
        raise UserError(f"{len(value)} prompts or labels for {num} images: give one, or one for each image")
    return list(value)
