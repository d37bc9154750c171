"""One training step as a pure function: draw times and noise, differentiate the loss, update, average.

Every image draws from a key of its own, `fold_in(step_key, row)` with its row in the global batch, and the times of the
whole batch come from one key, so the result does not depend on how many devices share the batch, nor on whether `jit`
or `pmap` does the sharing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from diffjax.diffusion.cascade import LowRes
from diffjax.diffusion.denoise import Denoiser, OfTime, standard_time
from diffjax.diffusion.loss import Times, Weight, weighted_error
from diffjax.diffusion.predict import Prediction
from diffjax.diffusion.process import Process, fold, image_keys, unit_noise
from diffjax.train.state import State, average
from diffjax.utils import struct

Batch = dict[str, Array]
Step = Callable[..., tuple[State, dict[str, Array]]]

# Log-SNR bins of width 2 in which the loss is reported; the outer two are open.
BIN_EDGES = np.linspace(-10.0, 10.0, 11)

# Folded into an example's key for its low-res picture.
LOW_RES = 2


@struct.dataclass
class Objective:
    """What is learned: the loss `E_t w(t) |x0 - x0_hat|^2` of a network and the text encoder that is trained with it.

    `apply` and `network_time` are as in `Denoiser`; `encode(params, cond) -> cond` turns a batch's conditioning into
    the network's; `weight`, `times` and `uniforms` (`independent` or `antithetic`) are as in `diffjax.loss`. A share
    `drop` of the examples is trained unconditionally. `low_res` makes the low-res pictures of a super-resolution stage,
    with noise of a random augmentation level; `whole(params, frozen)` are the parameters that `apply` reads, where some
    are not trained.
    """

    process: Process
    prediction: Prediction
    apply: Callable = struct.field(pytree_node=False)
    encode: Callable[[PyTree, Batch], Batch] = struct.field(pytree_node=False)
    weight: Weight = struct.field(pytree_node=False)
    times: Times = struct.field(pytree_node=False)
    uniforms: Callable[[Key[Array, ""], Int[Array, " b"], int], Float[Array, " b"]] = struct.field(pytree_node=False)
    network_time: OfTime = struct.field(pytree_node=False, default=standard_time)
    drop: float = struct.field(pytree_node=False, default=0.0)
    low_res: LowRes | None = struct.field(pytree_node=False, default=None)
    whole: Callable[[PyTree, PyTree], PyTree] = struct.field(pytree_node=False, default=lambda params, frozen: params)

    def denoiser(self, params: PyTree) -> Denoiser:
        """The denoiser that `params` make of the network."""
        return Denoiser(self.process, self.prediction, params["network"], self.apply, self.network_time)

    def losses(self, params: PyTree, batch: Batch, t: Float[Array, " b"], keys: Key[Array, " b"]) -> Float[Array, " b"]:
        """The loss of each example; `keys` give its noise, whether its conditioning is dropped, and its low-res
        picture.
        """
        noise_keys, drop_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x0 = normalize(batch["image"])
        eps = unit_noise(noise_keys, x0.shape[1:])
        keep = jax.vmap(jax.random.uniform)(drop_keys) >= self.drop
        cond = {name: value for name, value in batch.items() if name not in ("image", "weight")}
        cond = self.encode(params, keep_conditions(cond, keep))
        if self.low_res is not None:
            cond = cond | self.low_res(x0, fold(keys, LOW_RES))
        return batch.get("weight", 1) * weighted_error(self.denoiser(params), x0, eps, t, cond, self.weight)


def normalize(image: UInt8[Array, "b h w c"] | Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Bytes to [-1, 1]; latents as they are."""
    return image if jnp.issubdtype(image.dtype, jnp.floating) else image.astype(jnp.float32) / 127.5 - 1


def keep_conditions(cond: Batch, keep: Array) -> Batch:
    """The conditioning where `keep` (b,) is true; elsewhere no token counts (`mask` False) and the label is -1."""
    cond = dict(cond)
    if "mask" in cond:
        cond["mask"] = cond["mask"] & keep[:, None]
    if "label" in cond:
        cond["label"] = jnp.where(keep, cond["label"], -1)
    return cond


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, ema_decay: float = 0.999, accumulate: int = 1
) -> Step:
    """`step(state, batch, axis_name=None) -> (state, metrics)`.

    `batch` holds `image` (b, h, w, c), uint8 or latents, and conditioning: `tokens` and `mask` (b, l), or `context`
    (b, l, d), `mask` and `pooled` (b, p), or `label` (b,); and maybe a `weight` (b,) of each example's loss. With
    `axis_name` it is one device's share and gradients are averaged over that axis. `accumulate` micro-batches are
    differentiated one after the other; their mean is the gradient of the whole batch.

    Metrics, of the whole batch: `loss`, `grad_norm` (before clipping), `finite`, and `bin_sum`, `bin_count`: the loss
    summed over the examples of each log-SNR bin (`BIN_EDGES`), and their number.
    """

    def step(state: State, batch: Batch, axis_name: str | None = None) -> tuple[State, dict[str, Array]]:
        t, keys = draw(objective, jax.random.fold_in(state.key, state.step), len(batch["image"]), axis_name)
        of_whole = lambda params, *part: objective.losses(objective.whole(params, state.frozen), *part)
        losses, gradients = gradient(of_whole, state.params, (batch, t, keys), accumulate)
        metrics = {"loss": losses.mean()} | binned(losses, jnp.asarray(objective.process.logsnr(t)))
        if axis_name is not None:
            gradients, metrics["loss"] = jax.lax.pmean((gradients, metrics["loss"]), axis_name)
            metrics |= jax.lax.psum({name: metrics[name] for name in ("bin_sum", "bin_count")}, axis_name)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = average(state.ema, params, state.step, ema_decay)
        return replace(state, step=state.step + 1, params=params, ema=ema, optimizer=moments), metrics

    return step


def draw(
    objective: Objective, key: Key[Array, ""], local: int, axis_name: str | None
) -> tuple[Float[Array, " b"], Key[Array, " b"]]:
    """The times and the keys of this device's `local` rows of the batch."""
    devices, index = (1, 0) if axis_name is None else (jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name))
    time_key, row_key = jax.random.split(key)
    rows = index * local + jnp.arange(local)
    t = objective.times(objective.process, objective.uniforms(time_key, rows, devices * local))
    return t, image_keys(row_key, rows)


def gradient(
    losses: Callable[..., Float[Array, " b"]], params: PyTree, examples: Any, parts: int
) -> tuple[Float[Array, " b"], PyTree]:
    """`losses(params, *examples)` and the gradient of their mean, taken over `parts` micro-batches in turn.

    Micro-batch j holds the rows j, j + parts, ...: a batch that is sharded by contiguous rows stays evenly shared.
    """

    def part_gradient(part: Any) -> tuple[Float[Array, " m"], PyTree]:
        def mean(params: PyTree) -> tuple[Float[Array, ""], Float[Array, " m"]]:
            values = losses(params, *part)
            return values.mean(), values

        gradients, values = jax.grad(mean, has_aux=True)(params)
        return values, gradients

    if parts == 1:
        return part_gradient(examples)

    def add(total: PyTree, part: Any) -> tuple[PyTree, Float[Array, " m"]]:
        values, gradients = part_gradient(part)
        return jax.tree.map(jnp.add, total, gradients), values

    deal = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    total, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jax.tree.map(deal, examples))
    return values.swapaxes(0, 1).reshape(-1), jax.tree.map(lambda x: x / parts, total)


def binned(losses: Float[Array, " b"], logsnr: Float[Array, " b"]) -> dict[str, Float[Array, " bins"]]:
    """Sum and number of the losses in each log-SNR bin."""
    bins = len(BIN_EDGES) - 1
    index: Int[Array, " b"] = jnp.digitize(logsnr, BIN_EDGES[1:-1])
    total = lambda values: jax.ops.segment_sum(values, index, bins)
    return {"bin_sum": total(losses), "bin_count": total(jnp.ones_like(losses))}
