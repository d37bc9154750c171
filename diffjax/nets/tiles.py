"""Convolutional networks on pictures too large for one call: in tiles that agree where they meet.

A tile reaches as far beyond its core as a place hears of, and group norms take the moments of the whole picture, not
the tile's. These moments are found by going over the tiles again and again: the n-th pass makes them exact in the first
n norms (whose inputs depend on the norms before alone) and near in the others.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from diffjax.nets.layers import GroupNorm
from diffjax.utils.errors import UserError

TOLERANCE = 0.01
TINY = 1e-12

Moments = dict[str, tuple[Float[Array, "b g"], Float[Array, "b g"]]]


@functools.partial(jax.jit, static_argnames=("module", "method"))
def whole(module: nn.Module, method: str, params: Any, x: Array | np.ndarray) -> Any:
    """`module.apply` of one method, compiled."""
    return module.apply({"params": params}, x, method=method)


def run(
    module: nn.Module,
    method: str,
    params: Any,
    x: Float[Array | np.ndarray, "b h w c"],
    tile: int,
    reach: int,
    scales: tuple[int, int],
    tolerance: float = TOLERANCE,
) -> Float[np.ndarray, "b h2 w2 d"]:
    """`whole(module, method, params, x)` in tiles of `tile` x `tile` cells that overlap by twice `reach`, on the host.

    `scales` are the places that a cell has on a side in the input and in the output. The passes end when no norm's mean
    moves by `tolerance` deviations, nor its variance by that share. Raises `UserError` for a tile that is all overlap.
    """
    if tile <= 2 * reach:
        raise UserError(f"tiles of {tile} cells are all overlap: give more than {2 * reach}")
    evaluate = functools.partial(_outputs, module, method, params)
    result, moments = _pass(evaluate, np.asarray(x), None, tile, reach, scales)
    for _ in range(len(moments) + 1):
        before = moments
        result, moments = _pass(evaluate, np.asarray(x), before, tile, reach, scales)
        if change(before, moments) < tolerance:
            break
    return result


def _pass(
    evaluate: Callable[..., tuple[Array, Moments]],
    x: np.ndarray,
    moments: Moments | None,
    tile: int,
    reach: int,
    scales: tuple[int, int],
) -> tuple[np.ndarray, Moments]:
    """The picture under the given moments, and the moments that it has."""
    cells = tuple(length // scales[0] for length in x.shape[1:3])
    found, picture = [], np.zeros(0)
    for spot in spots(cells, tile, reach):
        y, seen = evaluate(spot.cut(x, scales[0]), spot.mask(), moments)
        if not found:
            picture = np.zeros((len(y), *(length * scales[1] for length in cells), y.shape[-1]), y.dtype)
        found.append((spot.core_size, jax.device_get(seen)))
        spot.paste(np.asarray(y), picture, scales[1])
    return picture, merged(found)


def change(old: Moments, new: Moments) -> float:
    """The largest move of a mean, in deviations, or of a variance, relative."""
    moves = [
        np.maximum(np.abs(old[name][0] - mean) / np.sqrt(variance + TINY), np.abs(old[name][1] / (variance + TINY) - 1))
        for name, (mean, variance) in new.items()
    ]
    return float(max(move.max() for move in moves))


@dataclass(frozen=True)
class Spot:
    """A tile: where it begins, its size, and the core of it that is its own (as first and last cell), by axis."""

    start: tuple[int, int]
    size: tuple[int, int]
    core: tuple[tuple[int, int], tuple[int, int]]

    @property
    def core_size(self) -> int:
        """The number of cells in the core."""
        return int(np.prod([last - first for first, last in self.core]))

    def cut(self, x: Float[np.ndarray, "b h w c"], scale: int) -> Float[np.ndarray, "b th tw c"]:
        """The tile out of a picture."""
        rows, columns = (slice(a * scale, (a + n) * scale) for a, n in zip(self.start, self.size))
        return x[:, rows, columns]

    def mask(self) -> Float[np.ndarray, "th tw"]:
        """1 in the core."""
        mask = np.zeros(self.size, np.float32)
        mask[tuple(slice(first - a, last - a) for a, (first, last) in zip(self.start, self.core))] = 1
        return mask

    def paste(self, y: Float[np.ndarray, "b th tw d"], picture: Float[np.ndarray, "b h w d"], scale: int) -> None:
        """Write the tile's core into the picture."""
        outside = tuple(slice(first * scale, last * scale) for first, last in self.core)
        inside = tuple(
            slice((first - a) * scale, (last - a) * scale) for a, (first, last) in zip(self.start, self.core)
        )
        picture[:, *outside] = y[:, *inside]


def spots(cells: Sequence[int], tile: int, reach: int) -> Iterator[Spot]:
    """Tiles of one size whose cores cover `cells`, each core `reach` away from the tile's edges within the picture."""
    size = min(tile, cells[0]), min(tile, cells[1])
    for top, above, below in _spans(cells[0], size[0], reach):
        for left, before, after in _spans(cells[1], size[1], reach):
            yield Spot((top, left), size, ((above, below), (before, after)))


def _spans(length: int, size: int, reach: int) -> list[tuple[int, int, int]]:
    """(start, first and last of the core) of the tiles along one axis."""
    if length == size:
        return [(0, 0, length)]
    count = -(-(length - 2 * reach) // (size - 2 * reach))
    starts = [i * (length - size) // (count - 1) for i in range(count)]
    borders = [0, *((a + b + size) // 2 for a, b in itertools.pairwise(starts)), length]
    return list(zip(starts, borders, borders[1:]))


@functools.partial(jax.jit, static_argnames=("module", "method"))
def _outputs(
    module: nn.Module, method: str, params: Any, x: Array, core: Float[Array, "th tw"], moments: Moments | None
) -> tuple[Any, Moments]:
    """A tile's output under the given moments (its own, where there are none), and the moments of its core."""
    seen: Moments = {}

    def norm(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if not isinstance(layer, GroupNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        name = "/".join(layer.path)
        seen[name] = core_moments(args[0], core, layer.groups)
        return call(*args, **kwargs) if moments is None else normed(layer, args[0], *moments[name])

    with nn.intercept_methods(norm):
        y = module.apply({"params": params}, x, method=method)
    return y, seen


def core_moments(
    x: Float[Array, "b h w c"], core: Float[Array, "th tw"], groups: int
) -> tuple[Float[Array, "b g"], Float[Array, "b g"]]:
    """Mean and variance of each group over the core, whose mask is brought to the size of `x`."""
    weight = jax.image.resize(core, x.shape[1:3], "nearest")[:, :, None, None]
    x = x.astype(jnp.float32).reshape(*x.shape[:3], groups, -1)
    total = jnp.sum(weight) * x.shape[-1]
    mean = jnp.sum(weight * x, axis=(1, 2, 4)) / total
    spread = weight * jnp.square(x - mean[:, None, None, :, None])
    return mean, jnp.sum(spread, axis=(1, 2, 4)) / total


def normed(layer: GroupNorm, x: Array, mean: Array, variance: Array) -> Array:
    """The layer's output, had `x` these moments."""
    y = x.astype(jnp.float32).reshape(*x.shape[:3], layer.groups, -1)
    place = lambda value: value[:, None, None, :, None]
    y = ((y - place(mean)) * lax.rsqrt(place(variance) + layer.eps)).reshape(x.shape)
    return (y * layer.get_variable("params", "scale") + layer.get_variable("params", "bias")).astype(layer.dtype)


def merged(found: Sequence[tuple[int, Moments]]) -> Moments:
    """The moments of the union of parts, from each part's size and moments: var = E[var_i + (mean_i - mean)^2]."""
    sizes = np.array([size for size, _ in found], np.float64)
    share = (sizes / sizes.sum())[:, None, None]
    result = {}
    for name in found[0][1]:
        means, variances = (np.stack([np.asarray(seen[name][i], np.float64) for _, seen in found]) for i in range(2))
        mean = np.sum(share * means, axis=0)
        variance = np.sum(share * (variances + (means - mean) ** 2), axis=0)
        result[name] = (mean.astype(np.float32), variance.astype(np.float32))
    return result
