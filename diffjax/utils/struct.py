"""Frozen dataclasses that are pytrees.

`flax.struct.dataclass` registers classes with `jax.tree_util.register_dataclass`, and jax (0.10.2) holds two such
classes for equal when their number of fields and their static values agree: `jit` then now and then runs what it
compiled for another class, `Cosine` by `Flow`. Classes registered as here are compared by their type.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def field(pytree_node: bool = True, **kwargs: Any) -> Any:
    """A field; static, so hashed and part of what `jit` compiles for, unless `pytree_node`."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **kwargs)


def _replace(self: Any, **updates: Any) -> Any:
    """A copy with the given fields changed."""
    return dataclasses.replace(self, **updates)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: type[T]) -> type[T]:
    """The class as a frozen dataclass, a pytree of its fields, with `replace(**updates)`."""
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    made.replace = _replace
    is_node = {f.name: f.metadata.get("pytree_node", True) for f in dataclasses.fields(made)}
    nodes = tuple(name for name, node in is_node.items() if node)
    static = tuple(name for name, node in is_node.items() if not node)

    def flatten(value: T) -> tuple[tuple, tuple]:
        return tuple(getattr(value, name) for name in nodes), tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: T) -> tuple[tuple, tuple]:
        children, aux = flatten(value)
        return tuple(zip(map(jax.tree_util.GetAttrKey, nodes), children)), aux

    def unflatten(aux: tuple, children: Iterable[Any]) -> T:
        value = object.__new__(cls)
        value.__dict__.update(zip(nodes, children), **dict(zip(static, aux)))
        return value

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made
