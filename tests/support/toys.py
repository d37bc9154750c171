"""Models that cost nothing, for tests of what is done with a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.diffusion.predict import X0
from diffjax.diffusion.process import Flow
from diffjax.models.model import Defaults, Model
from diffjax.parallel import devices
from diffjax.utils import struct


class Net(nn.Module):
    """Two products; what it is told of text, class and time is added in between."""

    width: int = 16
    text: bool = False
    classes: int = 0

    @nn.compact
    def __call__(self, x, t, context=None, mask=None, pooled=None, label=None):
        b = len(x)
        y = nn.Dense(self.width)(x.reshape(b, -1)) + nn.Dense(self.width)(jnp.sin(t[:, None] / 100 + jnp.arange(4)))
        if self.text:
            y += jnp.where(mask.any(1, keepdims=True), nn.Dense(self.width)(context.mean(1) + pooled), 0.5)
        if self.classes:
            y += nn.Embed(self.classes + 1, self.width)(jnp.where(label < 0, self.classes, label))
        return nn.Dense(x[0].size)(nn.silu(y)).reshape(x.shape)


@struct.dataclass
class Letters:
    """Prompts as the counts of their letters."""

    table: np.ndarray

    def __call__(self, prompts):
        counts = np.stack([np.bincount(np.frombuffer(p.encode(), np.uint8) % 16, minlength=16) for p in prompts])
        pooled = counts.astype(np.float32) @ self.table
        return {"context": pooled[:, None], "mask": counts.sum(1, keepdims=True) > 0, "pooled": pooled}


def model(text=False, classes=(), size=8, seed=0, **defaults):
    """A model of `size` pixels with random weights."""
    net, draw = Net(text=text, classes=len(classes)), np.random.default_rng(seed)
    words = Letters(draw.normal(size=(16, 8)).astype(np.float32))
    told = words([""]) if text else {}
    if classes:
        told["label"] = np.zeros(1, np.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, size, size, 3)), np.zeros(1), **told)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 4, jnp.float32), shapes)
    denoiser = Denoiser(Flow(), X0(), params, Apply(net))
    defaults = Defaults(**{"steps": 6, "batch": 4, "guidance": 2.0 if text or classes else None} | defaults)
    return Model(denoiser, (size, size, 3), defaults, words if text else None, classes=tuple(classes), name="toy")


def train_on_one(patch):
    """From now on, with this monkeypatch, trainings run on one device, which compiles and saves sooner."""
    patch.setattr(devices, "data_mesh", functools.partial(devices.data_mesh, jax.devices()[:1]))
