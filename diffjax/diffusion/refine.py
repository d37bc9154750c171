"""Refinements: what a solver does to a denoiser's estimate before the one move of `sample.move`.

A refinement is a frozen pytree with

    init(x) -> state                             before the first step; of a fixed shape, so that it scans
    before(step) -> step                         x and t may move before the network is evaluated (EDM's churn)
    update(state, est, step) -> (state, est, x)  est is the estimate at (x, t)

Multistep solvers replace x0 (or a slope) by the polynomial through its history, integrated over the step. They
measure time by a *solver clock*, the variable in which they integrate. With h = clock_s - clock_t and the nodes
u_i = (clock_i - clock_t) / h, so that u = 0 at t and u = 1 at s, the integral is `sum_i w_i y_i` with
`sum_i w_i u_i^k = m_k`, where m_k is the k-th moment of the step's weight. Where the clock is infinite the order
falls to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import factorial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffjax.diffusion.guide import Scale
from diffjax.diffusion.predict import Estimate, Velocity, target, with_x0
from diffjax.diffusion.process import Images, Keys, Process, Time, expand, fold, root, unit_noise
from diffjax.utils import struct

SolverClock = Callable[[Process, Time], Time]
"""(process, t) -> the variable in which a solver integrates."""


def half_logsnr(process: Process, t: Time) -> Time:
    """lambda = log(alpha / sigma): the solver clock of DPM-Solver (Lu et al. 2022)."""
    return process.logsnr(t) / 2


def minus_log_sigma(process: Process, t: Time) -> Time:
    """-log(sigma): the solver clock of the DPM-Solver++ that was published with SD3.5."""
    return -jnp.log(process.sigma(t))


@struct.dataclass
class Step:
    """One step t -> s of the grid, as a refinement reads it.

    `x` is the state at time t. `denoise(x, t) -> Estimate` evaluates the network again, with the step's conditioning
    and with the refinements that come earlier in the chain. `keys`, one per image, belong to this step alone. `eta` is
    the sampler's amount of noise.
    """

    x: Images
    t: Time
    s: Time
    process: Process
    denoise: Callable[[Images, Time], Estimate] = struct.field(pytree_node=False)
    keys: Keys
    eta: Scale = 0.0


class Refine:
    """A refinement that changes nothing; the others override what they need."""

    def init(self, x: Images) -> Any:
        """The state before the first step."""
        return ()

    def before(self, step: Step) -> Step:
        """The step with the x and t at which the network is evaluated."""
        return step

    def update(self, state: Any, est: Estimate, step: Step) -> tuple[Any, Estimate, Array]:
        """The next state, the refined estimate, and x where the solver corrects it."""
        return state, est, step.x


@struct.dataclass
class Chain(Refine):
    """Refinements one after the other.

    What a link evaluates itself, as `Heun` does, passes through the links before it too.
    """

    links: tuple[Refine, ...]

    def init(self, x: Array) -> Any:
        return tuple(link.init(x) for link in self.links)

    def before(self, step: Step) -> Step:
        for link in self.links:
            step = link.before(step)
        return step

    def update(self, state: Any, est: Estimate, step: Step) -> tuple[Any, Estimate, Array]:
        states = []
        for link, old in zip(self.links, state):
            new, est, x = link.update(old, est, step)
            states.append(new)
            step = replace(step, x=x, denoise=_refined(link, old, step))
        return tuple(states), est, step.x


def _refined(link: Refine, state: Any, step: Step) -> Callable[[Array, Time], Estimate]:
    """`step.denoise`, refined by one more link."""
    return lambda x, t: link.update(state, step.denoise(x, t), replace(step, x=x, t=t))[1]


def chain(*links: Refine) -> Chain:
    """The refinements in order; `chain()` is none: DDIM, DDPM or Euler by eta."""
    return Chain(links)


@struct.dataclass
class Clip(Refine):
    """x0 clipped to [-radius, radius].

    eps moves with it, so that `alpha x0 + sigma eps = x` stays true; with `keep_eps` it does not, as in published DDIM.
    """

    radius: Scale = 1.0
    keep_eps: bool = struct.field(pytree_node=False, default=False)

    def update(self, state: Any, est: Estimate, step: Step) -> tuple[Any, Estimate, Array]:
        x0 = jnp.clip(est.x0, -self.radius, self.radius)
        return state, _bounded(est, x0, step, self.keep_eps), step.x


@struct.dataclass
class Threshold(Refine):
    """Dynamic thresholding: x0 clipped to [-q, q] and divided by q (Saharia et al. 2022, Imagen, section 2.3).

    q, one number per image, is the `quantile` of |x0|, but at least 1 and at most `limit`. eps is treated as in `Clip`.
    """

    quantile: Scale = 0.995
    limit: Scale = jnp.inf
    keep_eps: bool = struct.field(pytree_node=False, default=False)

    def update(self, state: Any, est: Estimate, step: Step) -> tuple[Any, Estimate, Array]:
        size = jnp.abs(est.x0).reshape(len(est.x0), -1)
        q = expand(jnp.clip(jnp.quantile(size, self.quantile, axis=1), 1.0, self.limit), est.x0)
        return state, _bounded(est, jnp.clip(est.x0, -q, q) / q, step, self.keep_eps), step.x


def _bounded(est: Estimate, x0: Array, step: Step, keep_eps: bool) -> Estimate:
    return est._replace(x0=x0) if keep_eps else with_x0(est, x0, step.process, step.t)


@struct.dataclass
class Inpaint(Refine):
    """Inpainting: where mask is 1 the picture is drawn; where mask is 0 it is the known `image`.

    There x0 = image and eps = (x - alpha image) / sigma, so that x follows the exact path from its first noise to the
    image (Lugmayr et al. 2022, eq. 8, applied to the estimate).
    """

    image: Images
    mask: Images

    def update(self, state: Any, est: Estimate, step: Step) -> tuple[Any, Estimate, Array]:
        eps = (step.x - step.process.alpha(step.t) * self.image) / step.process.sigma(step.t)
        drawn = lambda new, known: self.mask * new + (1 - self.mask) * known
        return state, est._replace(x0=drawn(est.x0, self.image), eps=drawn(est.eps, eps)), step.x


def inpainted(refine: Refine, image: Images, mask: Images) -> Chain:
    """The refinement with `Inpaint` before it and after each of its links, since any link may move the known part."""
    if not isinstance(refine, Chain):
        return Chain((refine, Inpaint(image, mask)))
    return Chain((Inpaint(image, mask), *(inpainted(link, image, mask) for link in refine.links)))


@struct.dataclass
class Churn(Refine):
    """EDM's churn: before a step, noise is added until sigma has grown by 1 + gamma (Karras et al. 2022, algorithm 2).

    That is for alpha = 1. For other processes the ratio sigma / alpha grows, and x is scaled to the alpha of its new
    time. `noise` multiplies the deviation of what is added; nothing is added where the ratio is below `low` or above
    `high`.
    """

    gamma: Scale
    noise: Scale = 1.0
    low: Scale = 0.0
    high: Scale = jnp.inf

    def before(self, step: Step) -> Step:
        process, x, t = step.process, step.x, step.t
        finite = process.alpha(t) > 0
        alpha = jnp.where(finite, process.alpha(t), 1.0)
        ratio = process.sigma(t) / alpha
        active = finite & (self.gamma > 0) & (ratio >= self.low) & (ratio <= self.high)
        later = jnp.where(active, process.inverse(-2 * jnp.log(ratio * (1 + self.gamma))), t)
        grown = process.sigma(later) / jnp.where(active, process.alpha(later), 1.0)
        added = self.noise * root(grown**2 - ratio**2)
        z = unit_noise(fold(step.keys, 1), x.shape[1:], x.dtype)
        return replace(step, x=jnp.where(active, process.alpha(later) * (x / alpha + added * z), x), t=later)


@struct.dataclass
class Line:
    """A straight line in a solver clock, z_s = z_t + (clock_s - clock_t) slope, as an estimate that the move follows.

    `eps`: z = x / alpha, clock = sigma / alpha, slope = eps. `flow`: z = x, clock = t, slope = alpha' x0 + sigma' eps.
    """

    of: str = struct.field(pytree_node=False, default="eps")

    def clock(self, process: Process, t: Time) -> Time:
        """The solver clock at time t."""
        return process.sigma(t) / process.alpha(t) if self.of == "eps" else jnp.asarray(t)

    def slope(self, est: Estimate, process: Process, t: Time) -> Array:
        """dz / dclock."""
        return est.eps if self.of == "eps" else target(Velocity(), process, est.x0, est.eps, t)

    def along(self, est: Estimate, slope: Array, step: Step) -> Estimate:
        """The estimate whose move from t to s is the line of that slope."""
        process, t, s = step.process, step.t, step.s
        if self.of == "eps":
            finite = process.alpha(t) > 0
            ratio = process.sigma(t) / jnp.where(finite, process.alpha(t), 1.0)
            return _where(finite, est._replace(eps=slope, x0=est.x0 + ratio * (est.eps - slope)), est)
        a, b, c, d = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        det, end = a * d - b * c, step.x + (s - t) * slope
        return est._replace(x0=(d * step.x - b * end) / det, eps=(a * end - c * step.x) / det)


def _where(ok: Array | bool, new: Estimate, old: Estimate) -> Estimate:
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)


@struct.dataclass
class Heun(Refine):
    """The mean of the slopes at both ends of the step, the second after a trial step (Karras et al. 2022, algorithm 1):
    order 2, two evaluations a step.

    A step to sigma = 0, and one from a time at which the solver clock is infinite, are left as they are.
    """

    line: Line

    def update(self, state: Any, est: Estimate, step: Step) -> tuple[Any, Estimate, Array]:
        process, t, s = step.process, step.t, step.s
        usable = (process.sigma(s) > 0) & jnp.isfinite(self.line.clock(process, t))
        at = jnp.where(usable, s, t)
        trial = process.alpha(at) * est.x0 + process.sigma(at) * est.eps
        mean = (self.line.slope(est, process, t) + self.line.slope(step.denoise(trial, at), process, at)) / 2
        return state, _where(usable, self.line.along(est, mean, step), est), step.x


def heun(of: str = "eps") -> Heun:
    """`Heun` along the line of "eps" (EDM) or "flow"."""
    return Heun(Line(of))


def moments(h: Float[Array, ""], order: int) -> list[Float[Array, ""]]:
    """m_k = I_k / I_0 for k < order, with I_k = int_0^1 h u^k e^{-(1-u) h} du: the exponential integrator's moments.

    I_k = 1 - (k / h) I_{k-1}; for small h, where that loses digits, the series h sum_j (-h)^j k! / (j + k + 1)!.
    """
    small = jnp.abs(h) < 1
    near, far = jnp.where(small, h, 0.5), jnp.where(small, 1.0, h)
    series = [sum((-near) ** j * (factorial(k) / factorial(j + k + 1)) for j in range(18)) for k in range(order)]
    recursion = [-jnp.expm1(-far)]
    for k in range(1, order):
        recursion.append(1 - k / far * recursion[-1])
    return [jnp.where(small, series[k] / series[0], recursion[k] / recursion[0]) for k in range(order)]


def quadrature(nodes: list[Array], m: Sequence[Array | float]) -> list[Any]:
    """Weights w with sum_i w_i u_i^k = m_k: a Vandermonde system in O(n^2) (Bjorck and Pereyra 1970)."""
    n = len(nodes)
    w: list[Any] = list(m)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] = w[i] - nodes[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            w[i] = w[i] / (nodes[i] - nodes[i - k - 1])
        for i in range(k, n - 1):
            w[i] = w[i] - w[i + 1]
    return w


@struct.dataclass
class History:
    """The last n values of a quantity and their times, the newest first; a place with the time -1 is still empty."""

    values: Float[Array, "n b ..."]
    times: Float[Array, " n"]

    @classmethod
    def empty(cls, x: Array, n: int) -> "History":
        """n empty places."""
        return cls(jnp.zeros((n, *x.shape), x.dtype), jnp.full((n,), -1, x.dtype))

    def push(self, value: Array, t: Time) -> "History":
        """The history with a new newest value."""
        times = jnp.concatenate([jnp.asarray(t, self.times.dtype)[None], self.times])
        return History(jnp.concatenate([value[None], self.values])[: len(self.values)], times[: len(self.times)])

    def nodes(self, clock: SolverClock, step: Step) -> tuple[list[Array], Array, Array]:
        """u_i = (clock_i - clock_t) / h, how many of them can be used, and h = clock_s - clock_t.

        A value can be used if the solver clock is finite at its time and at those of all newer values. The others get a
        node of their own, one step before the next newer one, so that no derivative is infinite. h is 0 where the clock
        is infinite at t or s: then none can be used.
        """
        at = lambda time: _finite(clock, step.process, time)
        (now, at_t), (end, at_s), there = at(step.t), at(step.s), self.times >= 0
        h = jnp.where(at_t & at_s, end - now, 0.0)
        length = jnp.where(h == 0, 1.0, h)
        past = [at(time) for time in jnp.where(there, self.times, step.t)]
        usable = jnp.cumprod(jnp.stack([ok & (h != 0) for _, ok in past] or [jnp.array(False)]) & there)
        u, last = [], jnp.zeros_like(h)
        for (value, _), ok in zip(past, usable):
            last = jnp.where(ok, (value - now) / length, last - 1)
            u.append(last)
        return u, jnp.sum(usable, dtype=jnp.int32), h

    def integral(
        self, now: Array, nodes: list[Array], usable: Array, m: list[Array], two: float | None = None
    ) -> Array:
        """The integral over the step of the polynomial through `now` (at u = 0) and the first `usable` values.

        `nodes` are the u of the values and `m` the moments; `two`, if given, replaces m_1 where one value is used.
        """
        out, steps = now, [value - now for value in self.values]
        for order in range(2, len(nodes) + 2):
            first = m[1] if two is None or order > 2 else two
            w = quadrature([jnp.zeros_like(nodes[0]), *nodes[: order - 1]], [m[0], first, *m[2:order]])
            out = jnp.where(usable >= order - 1, now + sum(a * step for a, step in zip(w[1:], steps)), out)
        return out


def _finite(clock: SolverClock, process: Process, time: Time) -> tuple[Time, Array]:
    """The clock at a time, or at 0.5 where it is infinite (so that no derivative is), and whether it is finite."""
    ok = jnp.isfinite(clock(process, time))
    return clock(process, jnp.where(ok, time, 0.5)), ok


@struct.dataclass
class Extrapolate(Refine):
    """DPM-Solver++ multistep: x0 extrapolated in the solver clock (Lu et al. 2022b, algorithm 2), of order 2 or 3.

    Order 2 is x0 + (h / h_previous) (x0 - x0_previous) / 2, as published. Order 3 integrates the quadratic exactly; the
    published 3M takes half of its second-difference term, and so its order is only 2. eta = 1 gives the SDE forms: h
    becomes h (1 + eta) in the moments.
    """

    order: int = struct.field(pytree_node=False, default=2)
    clock: SolverClock = struct.field(pytree_node=False, default=half_logsnr)

    def init(self, x: Array) -> History:
        return History.empty(x, self.order - 1)

    def update(self, state: History, est: Estimate, step: Step) -> tuple[History, Estimate, Array]:
        nodes, usable, h = state.nodes(self.clock, step)
        x0 = state.integral(est.x0, nodes, usable, moments((1 + step.eta) * h, self.order), two=0.5)
        return state.push(est.x0, step.t), with_x0(est, x0, step.process, step.t), step.x


def extrapolate(order: int = 2, clock: SolverClock = half_logsnr) -> Extrapolate:
    """`Extrapolate` of order 2 or 3."""
    return Extrapolate(order, clock)


@struct.dataclass
class Trail:
    """The state of UniPC: the history of x0, x at the start of the last step, and how many older x0 that step used."""

    history: History
    x: Images
    used: Int[Array, ""]


@struct.dataclass
class UniPC(Refine):
    """UniPC with B_2 (Zhao et al. 2023, algorithms 5-7): each new estimate first corrects the step that led to it.

    The corrector takes the new x0 as one more node, at u = 1; the predictor is `Extrapolate` of the same order p.
    Together they have order p + 1, with one evaluation a step. Made for eta = 0.
    """

    order: int = struct.field(pytree_node=False, default=2)
    clock: SolverClock = struct.field(pytree_node=False, default=half_logsnr)

    def init(self, x: Array) -> Trail:
        return Trail(History.empty(x, self.order), x, jnp.zeros((), jnp.int32))

    def update(self, state: Trail, est: Estimate, step: Step) -> tuple[Trail, Estimate, Array]:
        x = self._corrected(state, est, step)
        est = est._replace(eps=est.eps + (x - step.x) / step.process.sigma(step.t))
        history = History(state.history.values[: self.order - 1], state.history.times[: self.order - 1])
        nodes, usable, h = history.nodes(self.clock, step)
        x0 = history.integral(est.x0, nodes, usable, moments(h, self.order), two=0.5)
        state = Trail(state.history.push(est.x0, step.t), x, usable)
        return state, with_x0(est, x0, step.process, step.t), x

    def _corrected(self, state: Trail, est: Estimate, step: Step) -> Array:
        """x_t again, from the start of the last step, with the estimate made at x_t as one more node."""
        process, t = step.process, step.t
        there = state.history.times[0] >= 0
        last = jnp.where(there, state.history.times[0], 1.0)
        now, older = state.history.values[0], History(state.history.values[1:], state.history.times[1:])
        nodes, _, h = older.nodes(self.clock, replace(step, t=last, s=t))
        ahead = History(jnp.concatenate([est.x0[None], older.values]), jnp.zeros(self.order))
        m = moments(h, self.order + 1)
        x0 = ahead.integral(now, [jnp.ones_like(h), *nodes], 1 + state.used, m, two=0.5)
        ratio = process.sigma(t) / process.sigma(last)
        moved = ratio * state.x + (process.alpha(t) - ratio * process.alpha(last)) * x0
        return jnp.where(there & (h != 0), moved, step.x)


def unipc(order: int = 2) -> UniPC:
    """`UniPC` of order 2 or 3."""
    return UniPC(order)


@struct.dataclass
class Adams(Refine):
    """Adams-Bashforth of the slopes along a line: DEIS in sigma / alpha (Zhang and Chen 2022, rho-AB), order up to 4.

    `even` takes the coefficients of equal steps whatever the grid, (55, -59, 37, -9) / 24 at order 4: iPNDM (Zhang and
    Chen 2022, table 1), whose order is the stated one only if the steps are equal in the line's solver clock.
    Made for eta = 0.
    """

    line: Line
    order: int = struct.field(pytree_node=False, default=4)
    even: bool = struct.field(pytree_node=False, default=False)

    def init(self, x: Array) -> History:
        return History.empty(x, self.order - 1)

    def update(self, state: History, est: Estimate, step: Step) -> tuple[History, Estimate, Array]:
        nodes, usable, _ = state.nodes(self.line.clock, step)
        if self.even:
            nodes = [jnp.full_like(u, -1.0 - i) for i, u in enumerate(nodes)]
        m = [jnp.asarray(1 / (k + 1), step.x.dtype) for k in range(self.order)]
        slope = self.line.slope(est, step.process, step.t)
        mean = state.integral(slope, nodes, usable, m)
        return state.push(slope, step.t), self.line.along(est, mean, step), step.x


def adams(order: int = 4, of: str = "eps", even: bool = False) -> Adams:
    """`Adams` along the line of "eps" or "flow"."""
    return Adams(Line(of), order, even)
