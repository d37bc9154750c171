"""Tables of names, read in both directions: which tensor of a checkpoint is which parameter here, and how it lies."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from diffjax.nets.quantize import Quantized, Scheme
from diffjax.utils.errors import UserError

Params = Mapping[str, Any]
Placement = Callable[[str, tuple[int, ...]], Sharding]
LISTED = 8
LONGEST = 150
SHOWN_FROM = 500_000_000
"""Bytes from which on loading shows a bar."""


@dataclass(frozen=True)
class Layout:
    """The axes of one tensor: `read` turns the checkpoint's array into ours, `write` ours into the checkpoint's.

    Both take numpy arrays (and give views) as well as traced ones.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def _matrix(w: np.ndarray) -> np.ndarray:
    """(out, in), also when it is kept as a 1x1 convolution (out, in, 1, ..)."""
    return w.reshape(w.shape[:2]) if w.ndim > 2 and w.size == w.shape[0] * w.shape[1] else w


SAME = Layout(lambda w: w, lambda w: w)
DENSE = Layout(lambda w: _matrix(w).T, lambda w: w.T)
POINTWISE = Layout(lambda w: _matrix(w).T, lambda w: w.T[:, :, None, None])
CONV = Layout(
    lambda w: w.transpose(*range(2, w.ndim), 1, 0),
    lambda w: w.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2)),
)


@dataclass(frozen=True)
class Names:
    """How the parameter paths of a network become the keys of a checkpoint.

    `renames` are pairs for `re.sub`, applied in turn to a path such as `down_blocks_0/conv/kernel`; then the leaf names
    kernel, scale and embedding become `weight` and slashes dots. A key with `{}` in it stands for one key per layer,
    stacked along the leaf's first axis; layers count from 0, or with `{7}` from 7. Kernels are read as `DENSE` or, with
    more than two axes, `CONV`; `layouts` holds the exceptions as (pattern of the path, layout). `aliases` turn keys of
    older files into today's; keys that match `ignored` may be present, and are not read.
    """

    renames: tuple[tuple[str, str], ...] = ()
    layouts: tuple[tuple[str, Layout], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: str = r"(?!)"

    def key(self, path: str) -> str:
        """The checkpoint's key, or pattern of keys, of one of our paths."""
        path = _substitute(self.renames, path)
        return re.sub(r"(^|/)(kernel|scale|embedding)$", r"\1weight", path).replace("/", ".")

    def layout(self, path: str, ndim: int) -> Layout:
        """The layout of one of our leaves (of one layer of it, when stacked)."""
        for pattern, layout in self.layouts:
            if re.search(pattern, path):
                return layout
        if not path.endswith("kernel"):
            return SAME
        return DENSE if ndim == 2 else CONV


def _substitute(pairs: tuple[tuple[str, str], ...], text: str) -> str:
    for pattern, replacement in pairs:
        text = re.sub(pattern, replacement, text)
    return text


@dataclass(frozen=True)
class Row:
    """One line of the table: our leaf, the keys that make it, their layout."""

    path: str
    leaf: Any
    keys: tuple[str, ...]
    stacked: bool
    layout: Layout


def table(params: Params, names: Names) -> Iterator[Row]:
    """The lines of all leaves of `params` (arrays or shapes)."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in leaves.items():
        key = names.key(path)
        stacked = "{" in key
        keys = tuple(_numbered(key, i) for i in range(leaf.shape[0])) if stacked else (key,)
        yield Row(path, leaf, keys, stacked, names.layout(path, len(leaf.shape) - stacked))


def _numbered(key: str, layer: int) -> str:
    """`{}` as the layer's number, `{7}` as that plus 7."""
    return re.sub(r"\{(\d*)\}", lambda first: str(int(first[1] or 0) + layer), key)


def read_params(
    tensors: Mapping[str, np.ndarray],
    shapes: Params,
    names: Names,
    source: str,
    dtype: Any = None,
    sharding: Placement | None = None,
    scheme: Scheme | None = None,
) -> dict[str, Any]:
    """The parameters of the given shapes out of a checkpoint's tensors, in the file's dtype or in `dtype`.

    Tensors go to their devices one at a time; `sharding` says where by a leaf's path and shape (the default device
    without it). Stacked kernels that `scheme` reads are quantised there, layer by layer. Raises one `UserError` that
    lists the missing, the unexpected and the ill-fitting keys.
    """
    tensors, rows = checked(tensors, shapes, names, source)
    leaves = {}
    for row in _shown(rows, tensors, source):
        parts = [tensors[key] for key in row.keys]
        leaves[row.path] = _leaf(parts, row, _leaf_dtype(parts, dtype), sharding, scheme)
    return traverse_util.unflatten_dict(leaves, sep="/")


def _shown(rows: list[Row], tensors: Mapping[str, np.ndarray], source: str) -> Iterator[Row]:
    """The rows, on a terminal under a bar of bytes where there are so many that they take a while."""
    sizes = [sum(tensors[key].nbytes for key in row.keys) for row in rows]
    if sum(sizes) < SHOWN_FROM or not sys.stderr.isatty():
        yield from rows
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("loading {task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(os.path.basename(source), total=sum(sizes))
        for row, size in zip(rows, sizes):
            yield row
            bar.advance(task, size)


def checked(
    tensors: Mapping[str, np.ndarray], shapes: Params, names: Names, source: str
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """A checkpoint's tensors under today's keys, and the lines that they fill; `UserError` as of `read_params`."""
    tensors, repeated = _renamed(tensors, names)
    rows = list(table(shapes, names))
    _complain(_problems(tensors, rows, names) | {"given twice": repeated}, source)
    return tensors, rows


def write_params(params: Params, names: Names) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by key, as views where that is possible."""
    tensors = {}
    for row in table(params, names):
        leaf = np.asarray(row.leaf)
        for key, part in zip(row.keys, leaf if row.stacked else [leaf]):
            tensors[key] = row.layout.write(part)
    return tensors


def _renamed(tensors: Mapping[str, np.ndarray], names: Names) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors under today's keys, and the keys that two of them claim."""
    renamed: dict[str, np.ndarray] = {}
    repeated = []
    for key, tensor in tensors.items():
        key = _substitute(names.aliases, key)
        repeated += [key] if key in renamed else []
        renamed[key] = tensor
    return renamed, repeated


def _problems(tensors: Mapping[str, np.ndarray], rows: list[Row], names: Names) -> dict[str, list[str]]:
    """The keys that are wrong, by what is wrong with them."""
    wanted = {key: row for row in rows for key in row.keys}
    given = {key: row for key, row in wanted.items() if key in tensors}
    return {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(key for key in tensors.keys() - wanted.keys() if not re.search(names.ignored, key)),
        "of another shape": [
            f"{key} {list(tensors[key].shape)}" for key, row in given.items() if not _fits(tensors[key], row)
        ],
        "not floating": [
            key
            for key, row in given.items()
            if jnp.issubdtype(row.leaf.dtype, jnp.floating) and not jnp.issubdtype(tensors[key].dtype, jnp.floating)
        ],
    }


def _fits(tensor: np.ndarray, row: Row) -> bool:
    try:
        return row.layout.read(tensor).shape == tuple(row.leaf.shape[row.stacked :])
    except (ValueError, IndexError):
        return False


def _leaf_dtype(parts: list[np.ndarray], dtype: Any) -> Any:
    """The dtype of a leaf: the file's, or `dtype` for floats."""
    own = jnp.result_type(*parts)
    return dtype if dtype is not None and jnp.issubdtype(own, jnp.floating) else own


def _leaf(
    parts: list[np.ndarray], row: Row, dtype: Any, sharding: Placement | None, scheme: Scheme | None
) -> jax.Array | Quantized:
    if scheme and row.stacked and scheme.reads(row.path):
        return _quantized(parts, row, dtype, sharding, scheme)
    place = sharding(row.path, row.leaf.shape) if sharding else None
    return (_stack if row.stacked else _single)(parts, row, dtype, place)


def _put(array: np.ndarray, place: Sharding | None) -> jax.Array:
    """On the default device, or as `place` has it: every device is sent its own part."""
    if place is None:
        return jnp.array(array)
    return jax.make_array_from_callback(array.shape, place, lambda index: np.ascontiguousarray(array[index]))


def _single(parts: list[np.ndarray], row: Row, dtype: Any, place: Sharding | None) -> jax.Array:
    """A leaf of one tensor."""
    return _put(row.layout.read(parts[0]), place).astype(dtype)


def _stack(parts: list[np.ndarray], row: Row, dtype: Any, place: Sharding | None) -> jax.Array:
    """A stacked leaf, filled on the device layer by layer; the axes are put in order there, which is far quicker."""
    leaf = jnp.zeros(row.leaf.shape, dtype, device=place)
    for i, part in enumerate(parts):
        leaf = _fill(leaf, _put(part, _shares(part, place)), i, row.layout)
    return leaf


def _quantized(parts: list[np.ndarray], row: Row, dtype: Any, sharding: Placement | None, scheme: Scheme) -> Quantized:
    """A stacked leaf in whole numbers, filled on the device: one layer at a time is there in full."""

    def blank(path, leaf) -> Array:
        name = jax.tree_util.keystr(path, simple=True)
        place = sharding(f"{row.path}/{name}", leaf.shape) if sharding else None
        return jnp.zeros(leaf.shape, leaf.dtype, device=place)

    whole = jax.ShapeDtypeStruct(row.leaf.shape, dtype)
    leaf = jax.tree_util.tree_map_with_path(blank, jax.eval_shape(scheme, whole))
    for i, part in enumerate(parts):
        leaf = _fill_quantized(leaf, _put(part, _shares(part, leaf.values.sharding)), i, row.layout, dtype, scheme)
    return leaf


def _shares(part: np.ndarray, place: Sharding | None) -> Sharding | None:
    """How one layer's tensor travels: cut along its first axis so that no byte is sent twice, whole if it cannot be."""
    if not isinstance(place, NamedSharding):
        return place
    even = part.ndim and part.shape[0] % place.mesh.size == 0
    return NamedSharding(place.mesh, PartitionSpec(place.mesh.axis_names if even else None))


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="leaf")
def _fill(leaf: Array, part: Array, layer: int, layout: Layout) -> Array:
    part = layout.read(part).astype(leaf.dtype)
    # As whole numbers: on a CPU, XLA widens all of a bfloat16 leaf to write a layer of it.
    bits = f"uint{8 * leaf.dtype.itemsize}"
    return leaf.view(bits).at[layer].set(part.view(bits)).view(leaf.dtype)


@functools.partial(jax.jit, static_argnames=("layout", "dtype", "scheme"), donate_argnames="leaf")
def _fill_quantized(leaf: Quantized, part: Array, layer: int, layout: Layout, dtype: Any, scheme: Scheme) -> Quantized:
    whole = scheme(layout.read(part).astype(dtype))
    return jax.tree.map(lambda leaf, part: leaf.at[layer].set(part), leaf, whole)


def _complain(problems: dict[str, list[str]], source: str) -> None:
    said = []
    for what, keys in problems.items():
        if keys:
            said.append(f"{len(keys)} {what}: {listed(keys)}")
    if said:
        raise UserError(f"{source} does not fit its configuration; {'; '.join(said)}")


def listed(keys: Sequence[str]) -> str:
    """The first of the keys, cut off where they are very long, and how many more there are."""
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return f"{', '.join(ascii(key)[1:-1][:LONGEST] for key in keys[:LISTED])}{more}"
