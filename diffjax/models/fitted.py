"""Time grids that were fitted to a model (a `models.model.Model`), where they are kept and what they belong to."""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffjax import build
from diffjax.diffusion import grid as grids
from diffjax.models.options import Method
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.utils.provenance import checksum, differences

FITTED = "fitted"


def fitted_to(model: Any, method: Method = Method()) -> dict[str, Any]:
    """What a fitted grid belongs to, in JSON types: the model's parameters, its size, and its guidance.

    Parameters are known by a run's step or a hub's commit, those of a folder by the checksum of their bfloat16 too,
    which is the same in whatever dtype they were loaded. Raises `UserError` for a guide of one's own, which has
    no name.
    """
    how = model.defaults.but(method)
    if callable(how.guidance):
        raise UserError("a fitted grid belongs to guidance by a scale: give a scale, or a grid of another name")
    short = lambda leaf: np.asarray(leaf, jnp.bfloat16) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf
    local = Path(model.name).is_dir()
    return {
        "revision": model.revision,
        "checksum": checksum(jax.tree.map(short, model.denoiser)) if local else None,
        "shape": list(model.shape),
        "guidance": (scale := build.scale(how.guidance)),
        "guide": None if scale is None else dict(model.rule(how.guide)),
    }


def path(name: str, sampler: str, steps: int, to: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Where the fitted grid of the model called `name` lies: in its folder, or in the cache folder for models of
    the hub.

    One that is fitted `to` some guidance has a file of its own.
    """
    folder = Path(name) if Path(name).is_dir() else files.home()
    inner = "grids" if Path(name).is_dir() else f"grids/{re.sub(r'[^A-Za-z0-9.-]+', '__', name)}"
    guided = json.dumps([to["guidance"], to["guide"]], sort_keys=True) if to.get("guidance") else ""
    return folder / inner / f"{sampler}-{steps}{guided and f'-{zlib.crc32(guided.encode()):08x}'}.json"


def stored(model: Any, method: Method) -> Float[np.ndarray, "steps 2"]:
    """The grid that was fitted to this model, and to the sampler, number of steps and guidance of a method.

    Raises `UserError` when none was, and when the model's parameters have changed since.
    """
    how, to = model.defaults.but(method), fitted_to(model, method)
    steps, sampler = how.steps, how.sampler
    place = path(model.name, str(sampler), steps, to)
    again = f"diffjax fit-grid --steps {steps} --sampler {sampler}{flags(to)} makes one"
    if not place.exists():
        raise UserError(f"no grid of {steps} steps was fitted to {model.name} for {sampler}{flags(to)}: {again}")
    kept = json.loads(place.read_text())
    if lines := differences(kept.get("to", {}), to):
        raise UserError(
            f"the grid of {steps} steps for {sampler} was fitted to another state of {model.name} "
            f"({'; '.join(lines)}): {again}"
        )
    return grids.pairs(np.asarray(kept["times"]))


def flags(to: Mapping[str, Any]) -> str:
    """The guidance that a grid was fitted `to`, as on the command line; "" for none."""
    if to["guidance"] is None:
        return ""
    fields = " ".join(value if name == "name" else f"{name}={value:g}" for name, value in to["guide"].items())
    return f" --guidance {to['guidance']:g}" + ("" if fields == "cfg" else f" --guide {fields}")
