"""A job of many images: batches of one shape on every device, advanced a few steps at a time.

One program serves a whole job, and the jobs after it: it makes up to `CHUNK` steps of one batch on each device. How
many steps a call makes, which images share a batch and how many devices there are change no bit of an image on a CPU.
"""

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from diffjax.diffusion import sample
from diffjax.models.model import Inputs, Model, Paste, Recipe
from diffjax.parallel import devices
from diffjax.utils import image
from diffjax.utils.errors import UserError
from diffjax.utils.progress import Every

CHUNK = 8
SECONDS = 1.0
REPORT_SECONDS = 60.0


class Picture(NamedTuple):
    """What tells one image from the others of a job: image number i has the key `fold_in(key, i)`."""

    number: int
    prompt: str | None = None
    label: str | None = None

    @property
    def called(self) -> str:
        """The picture in words."""
        words = ", ".join(filter(None, (self.prompt, self.label)))
        shown = words if len(words) <= 60 else f"{words[:60]}..."
        return f"image {self.number}" + (f" of {shown!r}" if shown else "")


class Part(NamedTuple):
    """A batch: its pictures, at most as many as it has rows, and where it stands if it was begun before."""

    pictures: tuple[Picture, ...]
    done: int = 0
    state: sample.State | None = None


Group = tuple[Part, ...]


@dataclass(frozen=True)
class Stage:
    """A group of parts, one on each device, after `done` steps, `made` of them since the last stage.

    The first axis of `state` are the devices.
    """

    parts: Group
    state: sample.State
    done: int
    made: int
    finished: bool

    @property
    def pictures(self) -> list[Picture]:
        """Those of all parts."""
        return [picture for part in self.parts for picture in part.pictures]

    def standing(self) -> list[Part]:
        """The parts as they stand now, in numpy arrays."""
        state = jax.tree.map(np.asarray, self.state)
        return [Part(part.pictures, self.done, _lane(state, i)) for i, part in enumerate(self.parts)]


@dataclass(frozen=True)
class Drawing:
    """How a job draws; `conditions` (negative_prompt, image, mask, low_res, level) are common to all its pictures, or a
    function of them; `paste` puts the kept pixels of a masked picture back. A super-resolution model is not given the
    prompts and labels that it does not read.
    """

    model: Model
    recipe: Recipe
    key: Key[Array, ""]
    batch: int
    conditions: Mapping[str, Any]
    paste: Paste | None = None

    @property
    def steps(self) -> int:
        """Steps of one image."""
        return len(self.recipe.grid)

    def parts(self, pictures: Sequence[Picture]) -> list[Part]:
        """The pictures in batches, none begun."""
        return [Part(tuple(pictures[i : i + self.batch])) for i in range(0, len(pictures), self.batch)]

    def groups(self, parts: Sequence[Part]) -> list[Group]:
        """The parts that run together: those that stand at the same step, as many as there are devices."""
        size = 1 if _spread(self.recipe) else jax.local_device_count()
        alike = itertools.groupby(sorted(parts, key=lambda part: -part.done), key=lambda part: part.done)
        runs = [list(run) for _, run in alike]
        return [tuple(run[i : i + size]) for run in runs for i in range(0, len(run), size)]

    def inputs(self, part: Part) -> Inputs:
        """What the rows of a part have of their own; the rows that are left have what the last picture has."""
        rows = [part.pictures[min(i, len(part.pictures) - 1)] for i in range(self.batch)]
        subject: dict[str, Any] = {
            name: [getattr(row, name) for row in rows]
            for name, read in (("prompt", self.model.text is not None), ("label", bool(self.model.classes)))
            if getattr(rows[0], name) is not None and (read or not self.model.low_res)
        }
        subject |= {name: value(rows) if callable(value) else value for name, value in self.conditions.items()}
        numbers = np.asarray([row.number for row in rows])
        return self.model.inputs(self.key, numbers, reads=self.recipe.reads, **subject)

    def blank(self, part: Part) -> sample.State:
        """The shapes of a part's state; nothing is computed."""
        return jax.eval_shape(self.recipe.begin, self.inputs(part))

    def stages(self, groups: Sequence[Group], every: int = 0) -> Iterator[Stage]:
        """What the groups pass, one after the other; with `every`, a stage after each so many steps is among it."""
        spread = _spread(self.recipe)
        mesh = None if spread else devices.data_mesh(jax.local_devices()[: max(map(len, groups))])
        recipe = devices.replicate(self.recipe, mesh) if mesh else self.recipe
        pace, chunk = Pace(), lambda done, rows: replace(recipe, grid=_filled(self.recipe.grid[done : done + rows]))
        for group in groups:
            inputs = _placed([_plain(self.inputs(part)) for part in group], mesh)
            state = _placed([part.state for part in group], mesh) if group[0].state else None
            done = group[0].done
            advance = lambda done, rows, state, inputs=inputs: _advance(
                mesh or spread, chunk(done, rows), inputs, state
            )
            while done < self.steps:
                rows = min(pace.steps(), self.steps - done, every - done % every if every else CHUNK)
                with pace.measured(rows):
                    before = _begin(mesh or spread, chunk(done, rows), inputs) if state is None else state
                    state = jax.block_until_ready(advance(done, rows, before))
                if not _finite(state).all():
                    raise self._broken(group, advance, before, state, range(done, done + rows))
                done += rows
                yield Stage(group, state, done, rows, done == self.steps)

    def _broken(
        self,
        group: Group,
        advance: Callable[..., sample.State],
        before: sample.State,
        after: sample.State,
        steps: range,
    ) -> UserError:
        """The error of `steps` that left numbers which are not finite: made again, one at a time, they show which was
        the first.
        """
        (lane, row), state = np.argwhere(~_finite(after))[0], before
        for step in steps:
            state = advance(step, 1, state)
            if not _finite(state)[lane, row]:
                break
        part = group[min(lane, len(group) - 1)]
        picture = part.pictures[min(row, len(part.pictures) - 1)]
        return UserError(
            f"{picture.called} is not finite after step {step + 1} of {self.steps}: compute in float32 (--dtype), take "
            "another sampler or a smaller guidance scale, or look at the model's weights"
        )

    def images(self, stage: Stage) -> UInt8[np.ndarray, "n h w c"]:
        """The pictures of a stage."""
        paste = self.paste or (lambda images: images)
        return _pictures(stage, stage.state.x, lambda x: paste(self.model.images(x)))

    def previews(self, stage: Stage) -> UInt8[np.ndarray, "n h w c"]:
        """What they will look like, by the estimates of x0: small pictures of latent models."""
        return _pictures(stage, stage.state.x0, self.model.preview or self.model.images)


def _pictures(stage: Stage, x: Float[Array, "devices b ..."], look: Callable) -> UInt8[np.ndarray, "n h w c"]:
    lanes = zip(np.asarray(x), stage.parts, strict=False)
    return np.concatenate([image.to_uint8(look(rows))[: len(part.pictures)] for rows, part in lanes])


class Pace:
    """How many steps the next call makes, for it to take `SECONDS`: one until that is known, at most `CHUNK`."""

    def __init__(self):
        self.calls, self.seconds = 0, SECONDS

    def steps(self) -> int:
        """Steps of the next call."""
        return min(CHUNK, max(1, int(SECONDS / self.seconds)))

    @contextlib.contextmanager
    def measured(self, steps: int) -> Iterator[None]:
        """Time a call of so many steps, unless it is the first one, which is compiled."""
        begin = time.perf_counter()
        yield
        end = time.perf_counter()
        self.calls += 1
        if self.calls > 1:
            self.seconds = max(end - begin, 1e-6) / steps


def shown(stages: Iterator[Stage], groups: Sequence[Group], steps: int, title: str) -> Iterator[Stage]:
    """The same stages, with one bar over the steps of all groups and the time that is left; where stderr is no
    terminal, a line every `REPORT_SECONDS`.
    """
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("steps, left"),
        progress.TimeRemainingColumn(),
    )
    report = Every(REPORT_SECONDS)
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=steps * len(groups), completed=sum(group[0].done for group in groups))
        for stage in stages:
            bar.advance(task, stage.made)
            if not bar.console.is_terminal and report.due():
                said = [str(column.render(bar.tasks[0])) for column in columns if column is not columns[1]]
                print(*said, file=sys.stderr, flush=True)
            yield stage


def _on_devices(function: Callable[..., sample.State]) -> Callable[..., sample.State]:
    """`function(recipe, *trees)` for trees with the devices as their first axis, each device with its own part.

    Where the mesh is abstract the trees have one part, and its devices share it, as the parameters lie on them.
    """

    def one(recipe: Recipe, *lanes: PyTree) -> sample.State:
        out = function(recipe, *_lane(lanes, 0))
        return jax.tree.map(lambda leaf: leaf[None], out)

    @functools.partial(jax.jit, static_argnums=0)
    def run(mesh: Mesh | AbstractMesh, recipe: Recipe, *lanes: PyTree) -> sample.State:
        if isinstance(mesh, AbstractMesh):
            with jax.sharding.use_abstract_mesh(mesh):
                return one(recipe, *lanes)
        each = PartitionSpec("data")
        specs = (PartitionSpec(), *(each for _ in lanes))
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)(recipe, *lanes)

    return run


_begin = _on_devices(lambda recipe, inputs: recipe.begin(_typed(inputs)))
_advance = _on_devices(lambda recipe, inputs, state: recipe.advance_part(_typed(inputs), state))


def _finite(state: sample.State) -> Bool[np.ndarray, "devices b"]:
    """Which images have no NaN and nothing infinite."""
    return np.asarray(jnp.isfinite(state.x).all(axis=tuple(range(2, state.x.ndim))))


def _plain(inputs: Inputs) -> Inputs:
    """In numpy arrays, keys as their bits."""
    return jax.tree.map(np.asarray, replace(inputs, keys=jax.random.key_data(inputs.keys)))


def _typed(inputs: Inputs) -> Inputs:
    return replace(inputs, keys=jax.random.wrap_key_data(inputs.keys))


def _placed(lanes: list[PyTree], mesh: Mesh | None) -> PyTree:
    """Trees of numpy arrays as one, each on its device; devices that are left have what the last one has."""
    lanes = lanes + lanes[-1:] * ((mesh.size if mesh else 1) - len(lanes))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *lanes)
    return jax.device_put(stacked, NamedSharding(mesh, PartitionSpec("data"))) if mesh else stacked


def _lane(tree: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _filled(rows: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "chunk 2"]:
    """`CHUNK` rows: those of (0, 0) do nothing."""
    return np.concatenate([rows, np.zeros((CHUNK - len(rows), 2), rows.dtype)])


def _spread(recipe: Recipe) -> AbstractMesh | None:
    """The mesh over which the parameters are split; None where each device has all."""
    leaves = [leaf for leaf in jax.tree.leaves(recipe.denoise) if isinstance(leaf, jax.Array)]
    placed = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    return next((place.mesh.abstract_mesh for place in placed if place.mesh.size > 1), None)
