"""Random checkpoints that any library can be given, so that its outputs can be compared with ours.

Stored outputs lie in tests/references; scripts/make_references.py writes them with the libraries themselves.
"""

from pathlib import Path

import jax
import numpy as np

from diffjax import weights
from diffjax.weights.names import read_params, write_params

FOLDER = Path(__file__).parents[1] / "references"


def checkpoint(kind, module, seed=0):
    """Tensors by published key: kernels of unit gain, scales about 1, biases about 0."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), weights.param_shapes(module, kind))
    shapes = {key: tensor.shape for key, tensor in write_params(zeros, kind.names(module)).items()}
    random = np.random.RandomState(seed)
    return {key: _draw(random, key, shapes[key]) for key in sorted(shapes)}


def _draw(random, key, shape):
    z = random.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return z / np.float32(np.sqrt(np.prod(shape[1:])))
    return 1 + z / 10 if key.endswith("weight") else z / 10


def params(kind, module, tensors):
    return read_params(tensors, weights.param_shapes(module, kind), kind.names(module), "reference")


def keys_and_shapes(kind, module):
    """What a checkpoint of `module` holds: {key: shape} as published, without computing anything."""
    from diffjax.weights.names import table

    found = {}
    for row in table(weights.param_shapes(module, kind), kind.names(module)):
        for key in row.keys:
            assert key not in found
            part = np.broadcast_to(np.float32(0), row.leaf.shape[row.stacked :])
            found[key] = row.layout.write(part).shape
    return found


def stored(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
