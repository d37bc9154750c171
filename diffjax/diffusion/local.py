"""The closed-form generator: denoisers made of nothing but training pictures.

The exact denoiser of a data set x_1, ..., x_n is the mean of its pictures, weighted by how much alpha x_i looks like
x_t. Restricted to windows, every pixel u becomes the mean of training pixels v whose surroundings look like its own:

    weight(u; i, v) = softmax over (i, v) of  prior_i - |x_t[window of u] - alpha x_i[window of v]|^2 / (2 sigma^2)
    x0(u) = sum of weight(u; i, v) x_i(v)

It is non-local means with the training set as its search window. `Ideal` compares whole pictures, `Local` windows at
the same place, v = u, `Equivariant` windows at any place (Kamb and Ganguli 2025, "An analytic theory of creativity in
convolutional diffusion models"). As convolutional networks do, the last two draw pictures that no training picture
shows, each of whose pixels has a known source (`shares`).

All sums are exact: blocks of pictures are joined by log-sum-exp, distances are sums of squares (no difference of large
numbers), and each image of a batch is computed by itself, so that it does not depend on its neighbours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from diffjax.diffusion.analytic import Wiener
from diffjax.diffusion.grid import Grid
from diffjax.diffusion.guide import Denoise
from diffjax.diffusion.predict import X0, Estimate
from diffjax.diffusion.process import Process, Time, expand
from diffjax.diffusion.sample import DDIM, move
from diffjax.utils import struct
from diffjax.utils.errors import unknown

BLOCK = 2**18
"""How many pixels of training pictures are compared at once: as many as the cache of a core holds."""

Squares = Sequence[Float[Array, "h m w"]]
"""The squared differences of an image and m pictures, a plane a channel. They are never one array: its sum over
channels is thirty times slower on a CPU than that of planes.
"""

Sums = Callable[[Squares], Float[Array, "g h m w"]]
"""Squares summed over the window of every pixel; g is 1, or c where each channel has windows of its own. A window that
all pixels share leaves one place of them.
"""

NEVER = -1e30
"""The logit of what has no weight; finite, since the difference of two infinities is none."""


@struct.dataclass
class Pictures:
    """Training pictures in blocks, one plane a channel: (blocks, channels, height, pictures, width).

    The places of the last block that no picture fills are `real` = False.
    """

    planes: Float[Array, "k c h m w"]
    real: Bool[Array, "k m"]
    count: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one picture."""
        _, c, h, _, w = self.planes.shape
        return h, w, c


def pictures(images: Float[np.ndarray, "n h w c"], block: int = BLOCK) -> Pictures:
    """Training pictures, made ready; a block has at most `block` pixels, or is one picture."""
    rows = np.asarray(images, np.float32)
    n, h, w, _ = rows.shape
    blocks = -(-n // max(1, block // (h * w)))
    size = -(-n // blocks)
    filled = np.pad(rows, [(0, blocks * size - n), (0, 0), (0, 0), (0, 0)])
    planes = filled.reshape(blocks, size, *rows.shape[1:]).transpose(0, 4, 2, 1, 3)
    return Pictures(jnp.asarray(planes), jnp.asarray(np.arange(blocks * size).reshape(blocks, size) < n), n)


def _band(pixels: int, radius: Array) -> Float[Array, "n n"]:
    """1 where two places of a row are at most `radius` apart: what sums over windows, cut off at the ends."""
    place = jnp.arange(pixels)
    return (jnp.abs(place[:, None] - place) <= radius).astype(jnp.float32)


@struct.dataclass
class Windows:
    """Square windows of p pixels a side: p is odd, the nearest to `side` interpolated over log-SNR.

    `logsnr` rises; beyond its ends p stays. Windows end where the picture ends. `cond["windows"]`, (b,), is a factor of
    p - 1, by which it does not fall below the smallest `side`.
    """

    logsnr: Float[Array, " k"]
    side: Float[Array, " k"]

    def radius(self, logsnr: Float[Array, "*b"], factor: float | Float[Array, "*b"] = 1.0) -> Float[Array, "*b"]:
        """(p - 1) / 2."""
        half = (jnp.interp(logsnr, self.logsnr, self.side) - 1) / 2
        return jnp.maximum(jnp.round(factor * half), jnp.round((jnp.min(self.side) - 1) / 2))

    def of(self, logsnr: Float[Array, ""], factor: Array) -> Sums:
        """Sums over the window of every pixel and over channels, (1, h, m, w), as two products with band matrices, so
        that p may be traced.
        """
        radius = self.radius(logsnr, factor)

        def sums(squares: Squares) -> Float[Array, "1 h m w"]:
            h, _, w = squares[0].shape
            total = jnp.einsum("ij,jmw->imw", _band(h, radius), sum(squares), precision="highest")
            return jnp.einsum("imw,wv->imv", total, _band(w, radius), precision="highest")[None]

        return sums


def falling(largest: float, smallest: float = 3) -> Windows:
    """Windows that fall from `largest` in pure noise to `smallest` without any, as sigma / (alpha + sigma) does."""
    logsnr = np.linspace(-14, 14, 113)
    share = 1 / (1 + np.exp(logsnr / 2))
    return Windows(jnp.asarray(logsnr, jnp.float32), jnp.asarray(smallest + (largest - smallest) * share, jnp.float32))


PUBLISHED = {
    "cifar10_resnet": "3 3 3 3 5 5 5 7 7 7 7 9 9 11 11 13 15 17 17 17",
    "cifar10_unet": "3 3 3 3 5 5 5 5 7 7 7 7 9 9 11 13 13 15 17 25",
    "cifar10_resnet_circular": "3 3 3 3 5 5 5 5 7 7 7 9 9 11 11 13 13 15 15 15",
    "celeba_resnet": "3 3 3 5 5 5 5 5 7 7 9 9 9 11 11 11 13 15 19 19",
    "celeba_unet": "3 3 3 3 3 3 3 5 5 5 5 5 7 7 9 9 9 13 19 27",
    "fashion_mnist_resnet": "3 3 5 5 7 7 9 9 9 11 11 11 13 13 13 15 15 15 17 17",
    "fashion_mnist_unet": "3 3 5 5 7 7 7 9 11 11 11 13 15 15 21 23 25 25 25 25",
    "mnist_resnet": "3 3 5 5 5 7 7 7 9 9 11 11 11 11 13 15 15 15 15 15",
    "mnist_unet": "3 3 3 5 5 7 7 7 9 9 9 11 13 15 17 21 23 23 25 27",
}
"""Sides of the windows that predict a convolutional network best, at t = 1/20, 2/20, ..., 1 of alpha = cos(pi t /
2.016) (Kamb and Ganguli 2025, the files of their code).
"""


def published(name: str) -> Windows:
    """The windows of a data set and a kind of network of `PUBLISHED`. Raises `UserError` for another name."""
    if name not in PUBLISHED:
        raise unknown("windows", name, PUBLISHED)
    sides = np.array(PUBLISHED[name].split(), np.float32)
    angle = np.pi / 2.016 * np.arange(1, len(sides) + 1) / len(sides)
    logsnr = -2 * np.log(np.tan(angle))
    return Windows(jnp.asarray(logsnr[::-1], jnp.float32), jnp.asarray(sides[::-1]))


@struct.dataclass
class Given:
    """The windows that the covariance of the data gives, one for each pixel and channel u: all q for which
    |W_uq| >= threshold max_q |W_uq|, where W = U diag(L / (L + 1 / SNR)) U^T is Wiener's filter (Lukoianov et al. 2025,
    "Locality in image diffusion models emerges from data statistics").

    The square of the number of pixels and channels must fit into memory.
    """

    wiener: Wiener
    threshold: float = 0.02

    def windows(self, logsnr: Float[Array, ""]) -> Float[Array, "d d"]:
        """1 where row u has q in its window."""
        size = jnp.abs(self.wiener.filter(logsnr))
        return (size >= self.threshold * size.max(1, keepdims=True)).astype(jnp.float32)

    def of(self, logsnr: Float[Array, ""], factor: Array) -> Sums:
        """Sums over the window of every pixel and channel, (c, h, m, w)."""
        windows = self.windows(logsnr)

        def sums(squares: Squares) -> Float[Array, "c h m w"]:
            c, (h, m, w) = len(squares), squares[0].shape
            flat = jnp.stack(squares, -1).transpose(1, 0, 2, 3).reshape(m, -1)
            return jnp.dot(flat, windows.T, precision="highest").reshape(m, h, w, c).transpose(3, 1, 0, 2)

        return sums


def _whole(squares: Squares) -> Float[Array, " m"]:
    """The squared distance of whole pictures."""
    return jnp.sum(sum(squares), axis=(0, 2))


apart = jax.lax.optimization_barrier
"""The identity, behind which the CPU's compiler does not fuse: sums of fused weights are three times slower."""


class _Sum(NamedTuple):
    """sum_j exp(l_j) and sum_j exp(l_j) v_j, both times exp(-top), of every pixel."""

    top: Float[Array, "g h w"]
    total: Float[Array, "g h w"]
    value: Float[Array, "c h w"]

    def join(self, other: "_Sum") -> "_Sum":
        """The sums over the terms of both."""
        top = jnp.maximum(self.top, other.top)
        own, others = jnp.exp(self.top - top), jnp.exp(other.top - top)
        return _Sum(top, own * self.total + others * other.total, own * self.value + others * other.value)


def _mixed(weight: Float[Array, "g h m w"], planes: Float[Array, "c h m w"]) -> Float[Array, "c h w"]:
    """sum_m weight planes, channel by channel: in jax 0.10.2 the CPU's fused sum of a product with a broadcast repeats
    the first channels beyond 32,768 outputs.
    """
    return jnp.stack([_summed(weight[i % len(weight)] * plane) for i, plane in enumerate(planes)])


def _summed(values: Float[Array, "h m w"]) -> Float[Array, "h w"]:
    """The sum over m, eight slices at a time: on a CPU a quarter of the time of a reduction over an axis in the middle,
    and more exact.
    """
    left = []
    while (m := values.shape[1]) > 1:
        parts = min(8, m)
        size = m // parts
        left += [values[:, i : i + 1] for i in range(parts * size, m)]
        values = apart(sum(values[:, i * size : (i + 1) * size] for i in range(parts)))
    return sum(left, values)[:, 0]


class _Query(NamedTuple):
    """One image to be compared with training pictures moved by each of `shifts`: x and `scale` times a picture differ
    by squares that are logits.
    """

    x: Float[Array, "c h w"]
    scale: Float[Array, ""]
    sums: Sums
    shifts: Int[Array, "s 2"]
    barred: Callable[[Array], Array]

    def logits(self, planes: Float[Array, "c h m w"], prior: Float[Array, " m"], shift: Int[Array, "2"]) -> Array:
        """The logit of pixel v of every picture for pixel v - shift of the image, (g, h, m, w), in the places of v."""
        moved = jnp.roll(self.x, shift, (1, 2))
        squares = [(own[:, None] - self.scale * plane) ** 2 for own, plane in zip(moved, planes)]
        return prior[:, None] - self.sums(squares) + self.barred(shift)[:, None]

    def blocks(self, data: Pictures, prior: Float[Array, " n"]) -> tuple[Array, Array]:
        """The blocks of pictures and their logits, `NEVER` for none."""
        prior = jnp.maximum(jnp.pad(prior, (0, data.real.size - data.count)), NEVER)
        return data.planes, jnp.where(data.real, prior.reshape(data.real.shape), NEVER)

    def nearest(self, data: Pictures, prior: Float[Array, " n"], keep: int) -> tuple[Pictures, Float[Array, " keep"]]:
        """The pictures that are nearest as a whole, and their logits."""

        def block(given: tuple[Array, Array]) -> Float[Array, " m"]:
            planes, prior = given
            return prior - _whole([(own[:, None] - self.scale * plane) ** 2 for own, plane in zip(self.x, planes)])

        planes, priors = self.blocks(data, prior)
        whole = jax.lax.map(block, (planes, priors))
        _, place = jax.lax.top_k(whole.reshape(-1), keep)
        row, column = jnp.divmod(place, whole.shape[1])
        chosen = planes[row, :, :, column].transpose(1, 2, 0, 3)[None]
        return Pictures(chosen, jnp.ones((1, keep), bool), keep), priors[row, column]

    def _over(self, shifted: Callable[[Any, Array], Any], found: Any, prior: Float[Array, " m"]) -> Any:
        """`shifted(found, shift)` over all shifts at which some pixel may be compared, if any picture has a weight."""

        def step(found: Any, shift: Array) -> tuple[Any, None]:
            may = jnp.any(self.barred(shift) > NEVER)
            return jax.lax.cond(may, shifted, lambda found, shift: found, found, shift), None

        over = lambda found: jax.lax.scan(step, found, self.shifts)[0]
        return jax.lax.cond(jnp.any(prior > NEVER), over, lambda found: found, found)

    def total(self, data: Pictures, prior: Float[Array, " n"]) -> _Sum:
        """The sums over all pictures and shifts, in the places of the image's pixels."""

        def shifted(found: _Sum, shift: Array, planes: Array, prior: Array) -> _Sum:
            logits = apart(self.logits(planes, prior, shift))
            top = apart(logits.max(2))
            weight = apart(jnp.exp(logits - top[:, :, None]))
            part = _Sum(top, jnp.stack([_summed(one) for one in weight]), _mixed(weight, planes))
            return found.join(jax.tree.map(lambda leaf: jnp.roll(leaf, -shift, (1, 2)), part))

        def block(found: _Sum, given: tuple[Array, Array]) -> tuple[_Sum, None]:
            return self._over(lambda found, shift: shifted(found, shift, *given), found, given[1]), None

        blocks = self.blocks(data, prior)
        first = jax.tree.map(lambda leaf: leaf[0], blocks)
        top = jax.eval_shape(self.logits, *first, self.shifts[0])
        top = jnp.full((top.shape[0], top.shape[1], top.shape[3]), -jnp.inf)
        return jax.lax.scan(block, _Sum(top, jnp.zeros_like(top), jnp.zeros_like(self.x)), blocks)[0]

    def shares(self, data: Pictures, prior: Float[Array, " n"]) -> Float[Array, "n h w"]:
        """The weight of each picture in each pixel of the image."""
        found = self.total(data, prior)
        total = found.top + jnp.log(found.total)

        def block(given: tuple[Array, Array]) -> Float[Array, "h m w"]:
            def shifted(share: Array, shift: Array) -> Array:
                weight = jnp.exp(self.logits(*given, shift) - jnp.roll(total, shift, (1, 2))[:, :, None])
                return share + jnp.roll(weight.mean(0), -shift, (0, 2))

            _, _, h, m, w = data.planes.shape
            return self._over(shifted, jnp.zeros((h, m, w)), given[1])

        share = jax.lax.map(block, self.blocks(data, prior))
        return share.transpose(0, 2, 1, 3).reshape(-1, *self.x.shape[1:])[: data.count]


class Posterior:
    """What the denoisers here have in common: the mean of training pictures, weighted pixel by pixel.

    `cond["logits"]`, (b, n), are logarithms of how probable each training picture is beforehand, up to a constant; by
    default each is as probable as any other. `cond["windows"]` is that of `Windows`.
    """

    process: Process
    data: Pictures
    prediction = X0()

    def query(self, x: Float[Array, "c h w"], scale: Array, logsnr: Array, factor: Array) -> _Query:
        """The comparison that one image asks for."""
        raise TypeError(f"{type(self).__name__} compares nothing")

    def _each(self, function: Callable, x: Float[Array, "b h w c"], t: Time, cond: Any) -> Any:
        """`function(query, data, prior)` for every image, one after the other."""
        t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
        cond = {"logits": jnp.zeros((len(x), self.data.count)), "windows": jnp.ones(len(x)), **(cond or {})}
        unit = 1 / (self.process.sigma(t) * 2**0.5)
        planes = (expand(unit, x) * x).transpose(0, 3, 1, 2)
        given = planes, self.process.alpha(t) * unit, self.process.logsnr(t), jnp.asarray(cond["windows"])
        one = lambda rows: function(self.query(*rows[0]), self.data, rows[1])
        return jax.lax.map(one, (given, jnp.asarray(cond["logits"])))

    def __call__(self, x: Float[Array, "b h w c"], t: Time, cond: dict[str, Array] | None = None) -> Estimate:
        """The pair (x0, eps) at x_t."""
        found = self._each(_Query.total, x, t, cond)
        x0 = (found.value / found.total).transpose(0, 2, 3, 1)
        return Estimate(x0, (x - expand(self.process.alpha(t), x) * x0) / expand(self.process.sigma(t), x))

    def shares(
        self, x: Float[Array, "b h w c"], t: Time, cond: dict[str, Array] | None = None
    ) -> Float[Array, "b n h w"]:
        """How much of every pixel of x0 comes from each training picture; 1 in sum over them."""
        return self._each(_Query.shares, x, t, cond)


def _same_place() -> Int[Array, "1 2"]:
    return jnp.zeros((1, 2), jnp.int32)


def _nowhere(shift: Int[Array, "2"]) -> Float[Array, "1 1"]:
    return jnp.zeros((1, 1))


@struct.dataclass
class Ideal(Posterior):
    """E[x0 | x_t] of the training pictures themselves: what a network of unlimited size learns, which is to copy."""

    process: Process
    data: Pictures

    def query(self, x: Float[Array, "c h w"], scale: Array, logsnr: Array, factor: Array) -> _Query:
        return _Query(x, scale, lambda squares: _whole(squares)[None, None, :, None], _same_place(), _nowhere)


@struct.dataclass
class Local(Posterior):
    """Windows at the same place (the "LS machine" of Kamb and Ganguli 2025, section 3.2): layouts are kept, parts of
    pictures are joined.
    """

    process: Process
    data: Pictures
    windows: Windows | Given

    def query(self, x: Float[Array, "c h w"], scale: Array, logsnr: Array, factor: Array) -> _Query:
        return _Query(x, scale, self.windows.of(logsnr, factor), _same_place(), _nowhere)


@struct.dataclass
class Equivariant(Posterior):
    """Windows at any place (the "ELS machine" of Kamb and Ganguli 2025, section 3.3): parts move, textures grow.

    "circular": the image goes on at its other side, and training windows lie inside their picture. "broken": as
    networks padded with zeros see it, a pixel whose window leaves the image on one side is compared with pixels at the
    same distance from that side only, all others with each other. Where a window is larger than the picture, it is that
    of `Local`.
    """

    process: Process
    data: Pictures
    windows: Windows
    boundary: str = struct.field(pytree_node=False, default="broken")

    def query(self, x: Float[Array, "c h w"], scale: Array, logsnr: Array, factor: Array) -> _Query:
        radius = self.windows.radius(logsnr, factor)
        barred = lambda shift: jnp.where(self._may(shift, radius, x.shape[1:]), 0.0, NEVER)
        shifts = jnp.asarray(np.argwhere(np.ones(x.shape[1:])), jnp.int32)
        return _Query(x, scale, self.windows.of(logsnr, factor), shifts, barred)

    def _may(self, shift: Int[Array, "2"], radius: Array, shape: tuple[int, ...]) -> Bool[Array, "h w"]:
        """Which pixels v may be compared with pixel v - shift of the image, round its ends."""
        rows, columns = (self._may_along(shift[axis], radius, shape[axis]) for axis in (0, 1))
        return rows[:, None] & columns

    def _may_along(self, shift: Array, radius: Array, pixels: int) -> Bool[Array, " pixels"]:
        place = jnp.arange(pixels)
        inside = (place >= radius) & (place < pixels - radius)
        if self.boundary == "circular":
            return inside | ((shift == 0) & ~inside.any())
        return (shift == 0) | (inside & jnp.roll(inside, shift))


Windowed = Local | Equivariant


@struct.dataclass
class Nearest(Posterior):
    """A machine over the `keep` training pictures that are nearest to each x_t as a whole, those that `Ideal` gives the
    largest weights: exact where no others have any, as at low noise, and the quicker the fewer (the idea of GoldDiff,
    arXiv:2602.16498).
    """

    machine: Windowed
    keep: int = struct.field(pytree_node=False)

    @property
    def process(self) -> Process:
        """The machine's."""
        return self.machine.process

    @property
    def data(self) -> Pictures:
        """The pictures that are chosen from."""
        return self.machine.data

    def query(self, x: Float[Array, "c h w"], scale: Array, logsnr: Array, factor: Array) -> _Query:
        return self.machine.query(x, scale, logsnr, factor)

    def _each(self, function: Callable, x: Float[Array, "b h w c"], t: Time, cond: Any) -> Any:
        def chosen(query: _Query, data: Pictures, prior: Float[Array, " n"]) -> Any:
            found, prior = query.nearest(data, prior, self.keep)
            return function(query, found, prior)

        return super()._each(chosen, x, t, cond)


def agreement(
    machine: Windowed, network: Estimate, x: Float[Array, "b h w c"], t: Time, cond: Any, sides: Float[Array, " k"]
) -> Float[Array, "k b"]:
    """The cosine of the machine's eps with that of a network's estimate at x_t, for windows of each side."""

    def cosine(side: Array) -> Float[Array, " b"]:
        eps = dataclasses.replace(machine, windows=Windows(jnp.zeros(1), side[None]))(x, t, cond).eps
        dot = lambda a, b: jnp.sum(a * b, axis=(1, 2, 3))
        return dot(eps, network.eps) / jnp.sqrt(dot(eps, eps) * dot(network.eps, network.eps))

    return jax.lax.map(cosine, sides)


_agreement = jax.jit(agreement)
_called = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))


def calibrated(
    machine: Windowed,
    network: Denoise,
    x: Float[Array, "b h w c"],
    grid: Grid,
    sides: Sequence[int],
    cond: Any = None,
    network_cond: Any = None,
) -> Windows:
    """The windows with which a machine is most like a network: at every step of the network's own way from x at the
    grid's first time (DDIM), the median over images of the side whose `agreement` is largest (Kamb and Ganguli 2025,
    section 4.1).
    """
    process, best = machine.process, []
    network_cond = {} if network_cond is None else network_cond
    for t, s in np.asarray(grid, np.float32):
        found = _called(network, x, t, network_cond)
        cosines = _agreement(machine, found, x, t, cond, jnp.asarray(sides, jnp.float32))
        best.append(np.median(np.asarray(sides)[np.argmax(cosines, axis=0)]))
        x = move(process, found, t, s, DDIM, jnp.zeros_like(x))
    logsnr = process.logsnr(jnp.asarray(grid[:, 0], jnp.float32))
    finite = jnp.maximum(logsnr, -100.0)
    return Windows(finite, jnp.asarray(best, jnp.float32))
