"""Guidance: from denoisers to a denoiser.

A guide evaluates branches (conditional, null, ...) and combines their estimates. With scale w = 1 every guide here
returns the conditional estimate. A guided denoiser is called with `cond = {"cond": ..., "null": ...}`, the conditioning
of each branch. Guides compose by application; an estimate carries the branches that it was made of, so that an outer
guide evaluates nothing again:

    guided = Rescale(Interval(Guidance(denoise, 3.0), 0.1, 0.9), prediction, 0.7)

A guide with momentum has a memory: `init(x)` is the one before the first step, the estimate of every step carries the
next one (`Estimate.memory`), and the sampler gives it back as `cond["past"]`.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffjax.diffusion.predict import Estimate, Prediction, Velocity, estimate, target, with_x0
from diffjax.diffusion.process import Images, Process, Time, expand
from diffjax.utils import struct

Scale = float | Float[Array, ""]


class Denoise(Protocol):
    """`(x, t, cond) -> Estimate`, of the process whose x_t it reads."""

    @property
    def process(self) -> Process:
        """The process of x."""
        ...

    def __call__(self, x: Images, t: Time, cond: Any) -> Estimate:
        """The pair (x0, eps) at x_t."""
        ...


def null(cond: dict[str, Array]) -> dict[str, Array]:
    """The conditioning of the null branch: no token counts (`mask` is False) and the label is -1.

    Networks take that for an image without text or class; what is known in closed form takes no logits (all 0) for it.
    """
    empty = {"mask": jnp.zeros_like, "label": lambda label: jnp.full_like(label, -1), "logits": jnp.zeros_like}
    return {name: empty.get(name, lambda value: value)(value) for name, value in cond.items()}


def branches(denoise: Denoise, x: Images, t: Time, conds: list[Any], together: bool = True) -> list[Estimate]:
    """The estimates of one network for each conditioning: as one batch, or one after the other to save memory."""
    if not together:
        return [denoise(x, t, cond) for cond in conds]
    n = len(conds)
    stack = lambda *leaves: jnp.concatenate(leaves)
    t = jnp.tile(jnp.broadcast_to(t, x.shape[:1]), n)
    joint = denoise(stack(*[x] * n), t, jax.tree.map(stack, *conds))
    return [jax.tree.map(lambda leaf, i=i: jnp.split(leaf, n)[i], joint) for i in range(n)]


def mix(weak: Estimate, strong: Estimate, scale: Scale) -> Estimate:
    """weak + w (strong - weak), of x0 and of eps alike: both are estimates at the same x_t, and so is the mix."""
    return strong._replace(x0=weak.x0 + scale * (strong.x0 - weak.x0), eps=weak.eps + scale * (strong.eps - weak.eps))


def _axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=_axes(a), keepdims=True)


def _over(a: Array | Scale, b: Array) -> Array:
    """a / b, and a where b is 0."""
    return a / jnp.where(b == 0, 1.0, b)


class Guide:
    """What guides have in common. `reads` are the branches of `cond` that a guide reads."""

    denoise: Denoise
    together: bool
    reads = ("cond", "null")

    @property
    def process(self) -> Process:
        """That of the guided denoiser."""
        return self.denoise.process

    def init(self, x: Images) -> Any:
        """The memory before the first step."""
        return ()

    def __call__(self, x: Images, t: Time, cond: Any) -> Estimate:
        """The guided pair (x0, eps) at x_t."""
        raise TypeError(f"{type(self).__name__} defines no __call__")

    def alone(self, x: Array, t: Time, cond: dict[str, Any]) -> Estimate:
        """The conditional estimate alone: no other branch is evaluated."""
        return self.denoise(x, t, cond["cond"])

    def pair(self, x: Array, t: Time, cond: dict[str, Any]) -> list[Estimate]:
        """The conditional and the null estimate."""
        return branches(self.denoise, x, t, [cond["cond"], cond["null"]], self.together)


class Over(Guide):
    """A guide that changes what another one, `guided`, returns; it reads the same branches."""

    guided: Guide
    reads = property(lambda self: self.guided.reads)
    process = property(lambda self: self.guided.process)

    def init(self, x: Images) -> Any:
        """The inner guide's memory."""
        return self.guided.init(x)

    def alone(self, x: Array, t: Time, cond: dict[str, Any]) -> Estimate:
        """The inner guide's conditional estimate."""
        return self.guided.alone(x, t, cond)


@struct.dataclass
class Guidance(Guide):
    """Classifier-free guidance: u + w (c - u) (Ho and Salimans 2022, eq. 6, with w there one less)."""

    denoise: Denoise
    scale: Scale
    together: bool = struct.field(pytree_node=False, default=True)

    def __call__(self, x: Array, t: Time, cond: dict[str, dict[str, Array]]) -> Estimate:
        c, u = self.pair(x, t, cond)
        return mix(u, c, self.scale)._replace(branches=(c, u))


@struct.dataclass
class Autoguidance(Guide):
    """weak + w (strong - weak), with a smaller or less trained network for weak (Karras et al. 2024, eq. 3).

    The branch `cond["weak"]` is the conditioning of that network: the same prompt or class, by its own text encoder.
    """

    denoise: Denoise
    weak: Denoise
    scale: Scale
    reads = ("cond", "weak")

    def __call__(self, x: Array, t: Time, cond: dict[str, dict[str, Array]]) -> Estimate:
        strong, weak = self.alone(x, t, cond), self.weak(x, t, cond["weak"])
        return mix(weak, strong, self.scale)._replace(branches=(strong, weak))


@struct.dataclass
class Skip(Over):
    """g + s (c - c_skip) for start < 1 - t <= stop (Stability AI's SD3.5 medium).

    g is the guided and c the conditional estimate; c_skip is that of `skip`, the network with some layers left out.
    Outside the interval `skip` is not evaluated.
    """

    guided: Guide
    skip: Denoise
    scale: Scale
    start: Scale = 0.0
    stop: Scale = 1.0

    def __call__(self, x: Array, t: Time, cond: dict[str, dict[str, Array]]) -> Estimate:
        g, t = self.guided(x, t, cond), jnp.asarray(t)
        c, active = g.branches[0], (1 - t > self.start) & (1 - t <= self.stop)
        weak = jax.lax.cond(jnp.any(active), lambda: self.skip(x, t, cond["cond"])[:2], lambda: c[:2])
        scale = expand(jnp.where(active, self.scale, 0.0), x)
        return g._replace(x0=g.x0 + scale * (c.x0 - weak[0]), eps=g.eps + scale * (c.eps - weak[1]))


@struct.dataclass
class Interval(Over):
    """The guided estimate for low < t <= high (Kynkaanniemi et al. 2024, eq. 4).

    Elsewhere it is the conditional estimate, and no other branch is evaluated.
    """

    guided: Guide
    low: Scale
    high: Scale

    def __call__(self, x: Array, t: Time, cond: Any) -> Estimate:
        inside = (jnp.asarray(t) > self.low) & (jnp.asarray(t) <= self.high)
        g = jax.lax.cond(jnp.any(inside), lambda: self.guided(x, t, cond), lambda: self._outside(x, t, cond))
        c, inside = g.branches[0], expand(inside, x)
        return g._replace(x0=jnp.where(inside, g.x0, c.x0), eps=jnp.where(inside, g.eps, c.eps))

    def _outside(self, x: Array, t: Time, cond: Any) -> Estimate:
        c = self.alone(x, t, cond)
        return c._replace(branches=(c, c), memory=cond.get("past", self.init(x)))


@struct.dataclass
class Rescale(Over):
    """y' = phi y std(c) / std(y) + (1 - phi) y (Lin et al. 2024, eq. 15-16), with one standard deviation per image.

    y and c are what a network of that `prediction` would return for the guided and for the conditional estimate.
    """

    guided: Guide
    prediction: Prediction
    phi: Scale = 0.7

    def __call__(self, x: Array, t: Time, cond: Any) -> Estimate:
        g = self.guided(x, t, cond)
        y, c = (target(self.prediction, self.process, est.x0, est.eps, t) for est in (g, g.branches[0]))
        deviation = lambda value: jnp.std(value, axis=_axes(value), keepdims=True)
        y = y * (self.phi * _over(deviation(c), deviation(y)) + 1 - self.phi)
        pair = estimate(self.prediction, self.process, x, y, t)
        return g._replace(x0=pair.x0, eps=pair.eps)


@struct.dataclass
class CFGZero(Guide):
    """CFG-Zero*: s u + w (c - s u) of the velocity, s = <c, u> / |u|^2, and no motion at all while t > still
    (Fan et al. 2025, eq. 11 and section 4.2)."""

    denoise: Denoise
    scale: Scale
    still: Scale = 1.0
    together: bool = struct.field(pytree_node=False, default=True)

    def __call__(self, x: Array, t: Time, cond: dict[str, dict[str, Array]]) -> Estimate:
        pair = self.pair(x, t, cond)
        c, u = (target(Velocity(), self.process, est.x0, est.eps, t) for est in pair)
        best = _over(_dot(c, u), _dot(u, u))
        v = best * u + self.scale * (c - best * u)
        v = jnp.where(expand(jnp.asarray(t) > self.still, x), 0.0, v)
        est = estimate(Velocity(), self.process, x, v, t)
        return pair[0]._replace(x0=est.x0, eps=est.eps, branches=tuple(pair))


def project(c: Array, delta: Array, scale: Scale, radius: Scale, parallel: Scale) -> Array:
    """c + (w - 1) (d_perp + eta d_par), d = delta min(1, radius / |delta|), split along c (Sadat et al. 2024,
    eq. 7-10).
    """
    delta = delta * jnp.minimum(1.0, _over(radius, jnp.sqrt(_dot(delta, delta))))
    along = _over(_dot(delta, c), _dot(c, c)) * c
    return c + (scale - 1) * (delta - along + parallel * along)


@struct.dataclass
class APG(Guide):
    """Adaptive projected guidance of x0 (Sadat et al. 2024, eq. 7-11).

    It is `project` of the running difference d = (c - u) + momentum d_previous.
    """

    denoise: Denoise
    scale: Scale
    momentum: Scale = 0.0
    radius: Scale = jnp.inf
    parallel: Scale = 0.0
    together: bool = struct.field(pytree_node=False, default=True)

    def init(self, x: Images) -> Images:
        return jnp.zeros_like(x)

    def __call__(self, x: Array, t: Time, cond: dict[str, Any]) -> Estimate:
        c, u = self.pair(x, t, cond)
        delta = c.x0 - u.x0 + self.momentum * cond.get("past", 0.0)
        x0 = project(c.x0, delta, self.scale, self.radius, self.parallel)
        return with_x0(c, x0, self.process, t)._replace(branches=(c, u), memory=delta)
