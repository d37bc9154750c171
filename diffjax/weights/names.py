"""Tables of names: which tensor of a checkpoint is which parameter here, and how its axes lie; read in both directions."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffjax.errors import UserError

Params = Mapping[str, Any]
LISTED = 8


@dataclass(frozen=True)
class Layout:
    """The axes of one tensor: `read` turns the checkpoint's array into ours, `write` ours into the checkpoint's."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _matrix(w: np.ndarray) -> np.ndarray:
    """(out, in), also when it is kept as a 1x1 convolution (out, in, 1, ..)."""
    return w.reshape(w.shape[:2]) if w.ndim > 2 and w.size == w.shape[0] * w.shape[1] else w


SAME = Layout(lambda w: w, lambda w: w)
DENSE = Layout(lambda w: _matrix(w).T, lambda w: w.T)
POINTWISE = Layout(lambda w: _matrix(w).T, lambda w: w.T[:, :, None, None])
CONV = Layout(lambda w: np.moveaxis(w, (0, 1), (-1, -2)), lambda w: np.moveaxis(w, (-1, -2), (0, 1)))


@dataclass(frozen=True)
class Names:
    """How the parameter paths of a network become the keys of a checkpoint.

    `renames` are pairs for `re.sub`, applied in turn to a path such as `down_blocks_0/conv/kernel`; then the leaf names
    kernel, scale and embedding become `weight` and slashes dots. A key with `{}` in it stands for one key per layer,
    stacked along the leaf's first axis. Kernels are read as `DENSE` or, with more than two axes, `CONV`; `layouts` holds
    the exceptions as (pattern of the path, layout). `aliases` turn keys of older files into today's; keys that match
    `ignored` may be present, and are not read.
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
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        key = names.key(path)
        stacked = "{}" in key
        keys = tuple(key.format(i) for i in range(leaf.shape[0])) if stacked else (key,)
        yield Row(path, leaf, keys, stacked, names.layout(path, len(leaf.shape) - stacked))


def read_params(
    tensors: Mapping[str, np.ndarray], shapes: Params, names: Names, source: str, dtype: Any = None
) -> dict[str, Any]:
    """The parameters of the given shapes out of a checkpoint's tensors, in the file's dtype or in `dtype`.

    Raises one `UserError` that lists the missing, the unexpected and the misshapen keys.
    """
    tensors, repeated = _renamed(tensors, names)
    rows = list(table(shapes, names))
    wanted = {key for row in rows for key in row.keys}
    leaves, misshapen = {}, []
    for row in rows:
        if not all(key in tensors for key in row.keys):
            continue
        parts = [row.layout.read(tensors[key]) for key in row.keys]
        if any(part.shape != tuple(row.leaf.shape[row.stacked :]) for part in parts):
            misshapen.append(f"{row.keys[0]} {list(tensors[row.keys[0]].shape)}")
        elif not misshapen:
            leaves[row.path] = _cast(np.stack(parts) if row.stacked else parts[0], dtype)
    problems = {
        "missing": sorted(wanted - set(tensors)),
        "unexpected": sorted(key for key in set(tensors) - wanted if not re.search(names.ignored, key)),
        "of another shape": misshapen,
        "given twice": repeated,
    }
    _complain(problems, source)
    return traverse_util.unflatten_dict(leaves, sep="/")


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


def _cast(array: np.ndarray, dtype: Any) -> jax.Array:
    """A device array of its own, floats in `dtype`."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.array(array, dtype if floating else None)


def _complain(problems: dict[str, list[str]], source: str) -> None:
    said = []
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            said.append(f"{len(keys)} {what}: {', '.join(ascii(key)[1:-1] for key in keys[:LISTED])}{more}")
    if said:
        raise UserError(f"{source} does not fit its configuration; {'; '.join(said)}")
