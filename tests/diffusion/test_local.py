"""The closed-form denoisers, held to sums over all pairs of pixels in float64 and to mixtures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build
from diffjax.diffusion import grid as grids, guide as guides, local, sample
from diffjax.diffusion.analytic import Mixture, wiener
from diffjax.diffusion.local import Equivariant, Given, Ideal, Local, Nearest, Windows
from diffjax.diffusion.process import Cosine, Discrete, Exploding, Flow, Linear, Shift
from diffjax.diffusion.refine import inpainted
from diffjax.utils.errors import UserError

N, H, W, C = 7, 6, 5, 2
DRAW = np.random.default_rng(0)
IMAGES = DRAW.uniform(-1, 1, (N, H, W, C)).astype(np.float32)
PRIOR = DRAW.normal(size=(3, N)).astype(np.float32)
NOISE = DRAW.normal(size=(3, H, W, C))
DATA = local.pictures(IMAGES, block=2 * H * W)
PROCESSES = {
    "flow": Flow(),
    "shift": Shift(Flow(), 3.0),
    "cosine": Cosine(),
    "exploding": Exploding(0.1, 20.0),
    "linear": Linear(20.0),
    "discrete": Discrete(np.cumprod(1 - np.linspace(0.01, 0.5, 12)).astype(np.float32)),
}
KINDS = ("local", "circular", "broken")


def constant(side):
    return Windows(jnp.zeros(1), jnp.full(1, float(side)))


def machine(kind, process, windows, data=DATA):
    return Local(process, data, windows) if kind == "local" else Equivariant(process, data, windows, kind)


def noised(process, t):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return (alpha * IMAGES[:3] + sigma * NOISE).astype(np.float32), alpha, sigma


def may(kind, u, v, radius, size):
    """Whether pixel u of the image is compared with pixel v of a picture, along one axis."""
    inside = lambda place: radius <= place < size - radius
    if kind == "local":
        return u == v
    if kind == "circular":
        return inside(v) if 2 * radius < size else u == v
    return u == v or (inside(u) and inside(v))


def pixel(x, alpha, sigma, prior, radius, kind, at):
    """Logits, colours and pictures of all that one pixel is compared with."""
    (i, j), logits, colours = at, [], []
    for vi, vj in np.ndindex(H, W):
        if not (may(kind, i, vi, radius, H) and may(kind, j, vj, radius, W)):
            continue
        steps = [(di, dj) for di in range(-radius, radius + 1) for dj in range(-radius, radius + 1)]
        inner = [(di, dj) for di, dj in steps if 0 <= vi + di < H and 0 <= vj + dj < W]
        apart = [x[(i + di) % H, (j + dj) % W] - alpha * IMAGES[:, vi + di, vj + dj] for di, dj in inner]
        logits.append(prior - np.sum(np.square(apart), axis=(0, 2)) / (2 * sigma**2))
        colours.append(IMAGES[:, vi, vj])
    return np.concatenate(logits), np.concatenate(colours)


def direct(x, alpha, sigma, prior, radius, kind):
    """x0 and the share of every picture in it, by a sum over all pairs of pixels in float64."""
    x, x0, shares = x.astype(np.float64), np.zeros(x.shape), np.zeros((N, H, W))
    for at in np.ndindex(H, W):
        logits, colours = pixel(x, alpha, sigma, prior, radius, kind, at)
        weight = np.exp(logits - logits.max())
        weight /= weight.sum()
        x0[at] = weight @ colours
        shares[:, *at] = weight.reshape(-1, N).sum(0)
    return x0, shares


@functools.partial(jax.jit, static_argnums=4)
def called(denoise, x, t, cond, method="__call__"):
    return getattr(denoise, method)(x, t, cond)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [1, 3, 5, 11])
@pytest.mark.parametrize("t", [0.3, 0.8])
def test_it_is_the_sum_over_all_pairs(kind, side, t):
    process = Flow()
    x, alpha, sigma = noised(process, t)
    made, cond = machine(kind, process, constant(side)), {"logits": jnp.asarray(PRIOR)}
    est, shares = called(made, x, t, cond), called(made, x, t, cond, "shares")
    for b in range(3):
        x0, share = direct(x[b], alpha, sigma, PRIOR[b], side // 2, kind)
        np.testing.assert_allclose(est.x0[b], x0, atol=1e-5)
        np.testing.assert_allclose(shares[b], share, atol=1e-5)
        np.testing.assert_allclose(est.eps[b], (x[b] - alpha * x0) / sigma, atol=3e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process(name):
    process, t = PROCESSES[name], 0.5
    x, alpha, sigma = noised(process, t)
    x0, _ = direct(x[0], alpha, sigma, np.zeros(N), 1, "broken")
    est = called(machine("broken", process, constant(3)), x, t, {})
    np.testing.assert_allclose(est.x0[0], x0, atol=1e-5)
    np.testing.assert_allclose(alpha * est.x0 + sigma * est.eps, x, atol=1e-5 * sigma)


def test_ideal_is_a_mixture_of_points():
    process, t = Flow(), jnp.asarray([0.2, 0.5, 0.9])
    x = np.stack([noised(process, float(t[b]))[0][b] for b in range(3)])
    points = Mixture(process, jnp.zeros(N), jnp.asarray(IMAGES.reshape(N, -1)), jnp.zeros((N, H * W * C)))
    cond = {"logits": jnp.asarray(PRIOR)}
    exact = lambda x: points(x.reshape(3, -1), t, cond).x0.reshape(x.shape)
    ours = lambda x: Ideal(process, DATA)(x, t, cond).x0
    for got, wanted in zip(jax.jvp(ours, (x,), (x,)), jax.jvp(exact, (x,), (x,))):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_pure_noise_is_the_mean():
    x = NOISE.astype(np.float32)
    for made in (Ideal(Flow(), DATA), machine("local", Flow(), constant(3)), wiener(Flow(), IMAGES)):
        np.testing.assert_allclose(made(x, 1.0).x0, np.broadcast_to(IMAGES.mean(0), x.shape), atol=1e-6)


def test_a_window_of_all_pixels_is_ideal():
    x, *_ = noised(Flow(), 0.6)
    for kind in KINDS:
        est = called(machine(kind, Flow(), constant(25)), x, 0.6, {})
        np.testing.assert_allclose(est.x0, Ideal(Flow(), DATA)(x, 0.6).x0, atol=1e-5)


def test_blocks_change_nothing():
    x, *_ = noised(Flow(), 0.5)
    for kind in KINDS:
        blocked, whole = (
            machine(kind, Flow(), constant(3), local.pictures(IMAGES, block)) for block in (H * W, N * H * W)
        )
        np.testing.assert_allclose(called(blocked, x, 0.5, {}).x0, called(whole, x, 0.5, {}).x0, atol=2e-6)


def test_an_image_does_not_depend_on_its_neighbours():
    t, cond = jnp.asarray([0.2, 0.5, 0.9]), {"logits": jnp.asarray(PRIOR), "windows": jnp.asarray([1.0, 2.0, 0.5])}
    x, *_ = noised(Flow(), 0.5)
    made = machine("circular", Flow(), local.falling(5))
    together = called(made, x, t, cond).x0
    for b in range(3):
        one = lambda leaf, b=b: leaf[b : b + 1]
        alone = called(made, one(x), one(t), jax.tree.map(one, cond)).x0
        np.testing.assert_array_equal(alone[0], together[b])
    mapped = jax.vmap(lambda x, t, cond: jax.tree.map(lambda leaf: leaf[0], made(x[None], t, cond).x0))
    rows = jax.tree.map(lambda leaf: leaf[:, None], cond)
    np.testing.assert_allclose(mapped(x, t, rows), together, atol=2e-6)


def test_pictures_that_are_ruled_out_have_no_share():
    x, *_ = noised(Flow(), 0.7)
    prior = jnp.full((3, N), -jnp.inf).at[:, 2].set(0.0)
    for kind in KINDS:
        made = machine(kind, Flow(), constant(3))
        shares = np.asarray(called(made, x, 0.7, {"logits": prior}, "shares"))
        assert (shares[:, 2] > 0.99999).all() and (np.delete(shares, 2, axis=1) == 0).all()
        np.testing.assert_allclose(called(made, x, 0.7, {}, "shares").sum(1), 1, atol=1e-5)


def test_the_nearest_pictures_are_enough_where_others_have_no_weight():
    cond = {"logits": jnp.asarray(PRIOR), "windows": jnp.full(3, 1.0)}
    for t, exact in ((0.1, True), (0.95, False)):
        x, *_ = noised(Flow(), t)
        for kind in KINDS:
            made = machine(kind, Flow(), constant(25))
            near, whole = (called(of, x, t, cond).x0 for of in (Nearest(made, 2), made))
            assert np.allclose(near, whole, atol=1e-5) == exact
            np.testing.assert_allclose(called(Nearest(made, N), x, t, cond).x0, whole, atol=1e-5)


def test_nearest_keeps_what_a_prior_allows():
    x, *_ = noised(Flow(), 0.7)
    prior = jnp.full((3, N), -jnp.inf).at[:, jnp.asarray([2, 5])].set(0.0)
    made = machine("broken", Flow(), constant(3))
    near, whole = (called(of, x, 0.7, {"logits": prior}).x0 for of in (Nearest(made, 3), made))
    np.testing.assert_allclose(near, whole, atol=1e-5)


def test_circular_moves_with_the_image():
    x, *_ = noised(Flow(), 0.5)
    made = machine("circular", Flow(), constant(3))
    moved = np.roll(x, (2, -1), (1, 2))
    np.testing.assert_allclose(
        called(made, moved, 0.5, {}).x0, np.roll(called(made, x, 0.5, {}).x0, (2, -1), (1, 2)), atol=1e-5
    )


def test_wiener_is_the_best_linear_denoiser():
    process, t = Cosine(), 0.4
    x, alpha, sigma = noised(process, t)
    rows = IMAGES.reshape(N, -1).astype(np.float64)
    mean, covariance = rows.mean(0), np.cov(rows.T, bias=True)
    total = alpha**2 * covariance + sigma**2 * np.eye(H * W * C)
    x0 = mean + (alpha * covariance @ np.linalg.solve(total, (x.reshape(3, -1) - alpha * mean).T)).T
    est = wiener(process, IMAGES)(x, t)
    np.testing.assert_allclose(est.x0.reshape(3, -1), x0, atol=1e-5)
    np.testing.assert_allclose(est.eps, (x - alpha * x0.reshape(x.shape)) / sigma, atol=1e-5)
    many = DRAW.normal(size=(50, 2, 2, 1))
    filtered = wiener(process, many).filter(jnp.float32(0.5))
    covariance = np.cov(many.reshape(50, -1).T, bias=True)
    np.testing.assert_allclose(filtered, covariance @ np.linalg.inv(covariance + np.exp(-0.5) * np.eye(4)), atol=1e-5)


def test_windows_given_by_the_covariance():
    process, t = Flow(), 0.5
    x, alpha, sigma = noised(process, t)
    linear = wiener(process, IMAGES)
    windows = np.asarray(Given(linear, 0.3).windows(process.logsnr(t)), np.float64)
    size = np.abs(linear.filter(process.logsnr(t)))
    assert 0 < windows.mean() < 1 and (windows == (size >= 0.3 * size.max(1, keepdims=True))).all()
    squares = (x.reshape(3, 1, -1).astype(np.float64) - alpha * IMAGES.reshape(1, N, -1)) ** 2
    weight = np.exp(-np.einsum("uq,bnq->bnu", windows, squares) / (2 * sigma**2))
    x0 = np.sum(weight * IMAGES.reshape(1, N, -1), 1) / weight.sum(1)
    est = called(Local(process, DATA, Given(linear, 0.3)), x, t, {})
    np.testing.assert_allclose(est.x0.reshape(3, -1), x0, atol=1e-5)


def test_sides_of_windows():
    windows = local.falling(27)
    sides = lambda sigma, factor=1.0: float(2 * windows.radius(Flow().logsnr(jnp.float32(sigma)), factor) + 1)
    assert [sides(sigma) for sigma in (0.0, 0.26, 0.51, 1.0)] == [3, 9, 15, 27]
    assert [sides(1.0, factor) for factor in (0.0, 0.4, 2.0)] == [3, 11, 53]
    t = np.arange(1, 21) / 20
    logsnr = 2 * np.log(np.cos(np.pi * t / 2.016) / np.sin(np.pi * t / 2.016))
    found = 2 * local.published("cifar10_unet").radius(jnp.asarray(logsnr, jnp.float32)) + 1
    assert " ".join(str(int(side)) for side in found) == local.PUBLISHED["cifar10_unet"]
    with pytest.raises(UserError, match="did you mean cifar10_unet"):
        local.published("cifar_unet")


def drawn(made, sampler, steps=4, cond=None):
    x, first = NOISE[:2].astype(np.float32), build.start(made)
    keys = jax.random.split(jax.random.key(0), len(x))
    grid = grids.uniform(steps, first)
    return sample.solve(made, x * made.process.sigma(first), grid, sampler, keys, cond)


@pytest.mark.parametrize("place, sampler", list(enumerate(build.SAMPLERS)))
def test_every_sampler_ends_in_the_only_picture(place, sampler):
    process = [process for process in PROCESSES.values() if process.sigma(0.0) == 0][place % 5]
    one = local.pictures(IMAGES[:1])
    made = [
        Ideal(process, one),
        machine("local", process, local.falling(5), one),
        Local(process, one, Given(wiener(process, IMAGES))),
        machine("local", process, local.published("mnist_unet"), one),
    ][place % 4]
    ended = drawn(made, build.sampler(sampler))
    np.testing.assert_allclose(ended, np.broadcast_to(IMAGES[0], ended.shape), atol=1e-4)


GUIDES = ["cfg", {"name": "cfg_zero"}, {"name": "apg"}, {"low": 0.2, "high": 0.8, "rescale": 0.5}]


@pytest.mark.parametrize("guide", GUIDES)
def test_guides(guide):
    made, (x, *_), t = machine("local", Flow(), local.falling(5)), noised(Flow(), 0.5), 0.5
    cond = {"logits": jnp.asarray(PRIOR), "windows": jnp.full(3, 0.7)}
    both = {"cond": cond, "null": guides.null(cond)}
    plain, null = called(made, x, t, cond), called(made, x, t, {"windows": cond["windows"]})
    once, twice = (build.guide(guide)(made, scale)(x, t, both) for scale in (1.0, 2.0))
    np.testing.assert_allclose(once.x0, plain.x0, atol=1e-5)
    np.testing.assert_allclose(0.5 * (twice.x0 + twice.eps), x, atol=1e-5)
    if guide == "cfg":
        np.testing.assert_allclose(twice.x0, 2 * plain.x0 - null.x0, atol=1e-5)
    assert np.abs(twice.x0 - plain.x0).max() > 0.01


def test_calibration_finds_the_windows_of_another_machine():
    """A machine of known windows stands for the network."""
    known = Windows(jnp.asarray([-1.0, 1.0]), jnp.asarray([5.0, 1.0]))
    data = local.pictures(DRAW.uniform(-1, 1, (30, 12, 12, 1)))
    made, x = Local(Flow(), data, known), DRAW.normal(size=(3, 12, 12, 1)).astype(np.float32)
    grid = grids.uniform(6, 0.9)
    found = local.calibrated(made, made, x, grid, (1, 3, 5, 7))
    at = Flow().logsnr(jnp.asarray(grid[:, 0], jnp.float32))
    np.testing.assert_array_equal(found.radius(at), known.radius(at))


def test_a_mask_keeps_the_rest():
    made = machine("broken", Flow(), local.falling(5))
    mask = jnp.zeros((2, H, W, 1)).at[:, :3].set(1.0)
    known = jnp.asarray(IMAGES[:2])
    ended = drawn(made, sample.Sampler(inpainted(sample.DDIM.refine, known, mask)))
    np.testing.assert_allclose(ended[:, 3:], known[:, 3:], atol=1e-5)
    assert np.abs(ended[:, :3] - known[:, :3]).max() > 0.05


def test_large_pictures_keep_their_channels(optimized):
    """Sums of products with a broadcast went wrong beyond 32,768 outputs in the fused programs of jax 0.10.2."""
    images = DRAW.uniform(-1, 1, (4, 128, 128, 3)).astype(np.float32)
    x = (0.1 * images[:1] + 0.9 * DRAW.normal(size=images[:1].shape)).astype(np.float32)
    apart = np.sum((x.astype(np.float64) - 0.1 * images) ** 2, axis=-1)
    for axis in (1, 2):
        padded = np.pad(apart, [(0, 0)] + [(3, 3) if other == axis else (0, 0) for other in (1, 2)])
        apart = sum(np.take(padded, np.arange(128) + step, axis) for step in range(7))
    weight = np.exp(-apart / (2 * 0.9**2))
    x0 = np.sum(weight[..., None] * images, axis=0) / weight.sum(0)[..., None]
    est = called(Local(Flow(), local.pictures(images), constant(7)), x, 0.9, {})
    np.testing.assert_allclose(est.x0[0], x0, atol=2e-5)
