"""Pytree dataclasses: never taken for one another, and what pytrees need."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from diffjax.diffusion import guide, predict, process, refine, sample
from diffjax.utils import struct


def numbered(number):
    @struct.dataclass
    class Numbered:
        def value(self, x):
            return x + number

    return Numbered()


@jax.jit
def value_of(numbered, x):
    return numbered.value(x)


def test_compiled_code_of_one_class_never_runs_for_another():
    assert [int(value_of(numbered(i), jnp.zeros(()))) for i in range(60)] == list(range(60))


def test_structures_of_different_classes_differ():
    values = [
        process.Flow(),
        process.Cosine(),
        predict.X0(),
        predict.Eps(),
        predict.V(),
        predict.Score(),
        predict.Velocity(),
    ]
    assert len({str(jax.tree.structure(value)) for value in values}) == len(values)
    for i, a in enumerate(values):
        assert [jax.tree.structure(a) == jax.tree.structure(b) for b in values] == [i == j for j in range(len(values))]


@pytest.mark.parametrize("module", [process, predict, guide, refine, sample])
def test_every_public_dataclass_is_registered_here(module):
    classes = [c for c in vars(module).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    assert classes
    assert all(c.replace is struct._replace for c in classes)


@struct.dataclass
class Pair:
    a: jax.Array
    b: jax.Array
    name: str = struct.field(pytree_node=False, default="pair")


def test_leaves_static_fields_paths_and_replace():
    pair = Pair(1.0, 2.0).replace(a=3.0)
    assert jax.tree.leaves(pair) == [3.0, 2.0]
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(pair)] == [".a", ".b"]
    assert jax.tree.map(lambda x: 2 * x, pair) == Pair(6.0, 4.0)
    assert jax.tree.structure(pair) != jax.tree.structure(pair.replace(name="other"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.a = 1.0
