"""Random combinations of a published scheduler's fields, drawn by us and by diffusers.

A float64 run of diffusers is the judge where its steps are those of its own times, and a float64 loop written from the
papers where they are not, or where its numbers are NaN: there diffusers is wrong (docs/ddpm.md). That loop must agree
with diffusers everywhere else. Our error may be twice that of the judge's own float32 run.
"""

import collections
import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion.denoise import Denoiser, table_step
from diffjax.diffusion.process import discrete
from diffjax.models import ddpm
from diffjax.models.model import Model
from diffjax.nets.unet import UNet
from diffjax.utils.errors import UserError
from diffjax.weights.scheduler import read_scheduler

pytestmark = pytest.mark.reference

SHAPE = (2, 3, 3, 2)
FLOOR = 2e-6
"""Of the largest value on the way: 16 roundings of float32, below which the two are not told apart."""


def drawn(random):
    """A legal combination: fields of the scheduler, number of steps, eta."""
    one = lambda *values: values[random.randint(len(values))]
    table = one(10, 37, 100, 1000)
    fields = {
        "_class_name": one("DDPMScheduler", "DDIMScheduler"),
        "num_train_timesteps": table,
        "timestep_spacing": one("leading", "linspace", "trailing"),
        "steps_offset": one(0, 0, 1, 3),
        "beta_schedule": one("linear", "scaled_linear", "squaredcos_cap_v2"),
        "beta_start": float(random.uniform(1e-4, 2e-3)),
        "beta_end": float(random.uniform(0.01, 0.03)) * (1000 / table) ** 0.5,
        "prediction_type": one("epsilon", "sample", "v_prediction"),
        "rescale_betas_zero_snr": one(False, False, False, True),
        "clip_sample": one(False, True),
        "clip_sample_range": float(random.uniform(0.5, 2)),
        "thresholding": one(False, False, True),
        "dynamic_thresholding_ratio": float(random.uniform(0.6, 1)),
        "sample_max_value": float(random.uniform(1, 2)),
    }
    if one(False, False, False, True):
        fields["trained_betas"] = np.sort(random.uniform(1e-4, 0.05, table)).tolist()
    if fields["_class_name"] == "DDPMScheduler":
        variances = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
        fields["variance_type"] = one(*variances)
    else:
        fields["set_alpha_to_one"] = one(False, True)
    eta = one(0.0, 0.4, 1.0) if fields["_class_name"] == "DDIMScheduler" else None
    return fields, one(1, 2, 3, 10, 20, min(table, 50)), eta


class Network:
    """The exact denoiser of a Gaussian in the scheduler's own prediction, a line in x for every step, with a
    second half.
    """

    def __init__(self, alpha2, fields, seed):
        random = np.random.RandomState(seed)
        mean, spread = random.uniform(-0.8, 0.8, SHAPE[1:]), random.uniform(0.05, 1, SHAPE[1:])
        alpha, sigma = (
            np.sqrt(v.astype(np.float64))[:, None, None, None] for v in (alpha2, 1 - alpha2.astype(np.float64))
        )
        total = alpha**2 * spread + sigma**2
        x0, eps = (
            (alpha * spread / total, mean - alpha**2 * spread / total * mean),
            (sigma / total, -sigma * alpha * mean / total),
        )
        lines = {"epsilon": eps, "sample": x0, "v_prediction": tuple(alpha * e - sigma * x for e, x in zip(eps, x0))}
        self.slope, self.shift = (line.astype(np.float32) for line in lines[fields["prediction_type"]])
        self.second = None
        if fields.get("variance_type", "").startswith("learned"):
            low, high = (1e-4, 0.5) if fields["variance_type"] == "learned" else (-1, 1)
            self.second = random.uniform(low, high, self.slope.shape).astype(np.float32)

    def __call__(self, x, k):
        cast = lambda values: values[k].astype(x.dtype)
        return cast(self.slope) * x + cast(self.shift), None if self.second is None else np.broadcast_to(
            cast(self.second), x.shape
        )


def apply(params, x, k):
    slope, shift, second = params
    k = k.astype(int)
    y = slope[k] * x + shift[k]
    return y if second is None else jnp.concatenate([y, second[k]], axis=-1)


def ours(scheduler, fields, network, x, noise, eta, steps):
    params = (network.slope, network.shift, network.second)
    denoiser = Denoiser(
        discrete(scheduler.betas()), ddpm.PREDICTIONS[scheduler.prediction_type], params, apply, table_step
    )
    module = UNet(sample_size=SHAPE[1], in_channels=SHAPE[-1])
    model = Model(denoiser, SHAPE[1:], ddpm.defaults(scheduler, module))
    return np.asarray(
        model.sample(jax.random.key(0), num=len(x), steps=steps, eta=eta, init=x, noise=noise[:steps]), np.float64
    )


def theirs(fields, alpha2, network, x, noise, eta, steps, dtype):
    """(the last state, the times, the largest value on the way) of diffusers in this precision.

    On our table: torch's square root is not rounded alike on every processor, which a table of zero terminal SNR
    enlarges to some 1e-6; the tables must be as near as that.
    """
    import diffusers
    import torch

    kind = getattr(diffusers, fields["_class_name"])
    scheduler = kind(**{name: value for name, value in fields.items() if name != "_class_name"})
    np.testing.assert_allclose(np.sqrt(alpha2), np.sqrt(scheduler.alphas_cumprod.numpy()), rtol=0, atol=3e-6)
    scheduler.alphas_cumprod = torch.from_numpy(alpha2.copy())
    scheduler.final_alpha_cumprod = (
        scheduler.alphas_cumprod[0] if fields.get("set_alpha_to_one") is False else torch.ones(())
    )
    for name in ("betas", "alphas", "alphas_cumprod", "one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(
                scheduler,
                name,
                torch.as_tensor(getattr(scheduler, name)).to(torch.from_numpy(np.zeros(1, dtype)).dtype),
            )
    scheduler.set_timesteps(steps)
    torched = lambda value: torch.from_numpy(np.array(np.moveaxis(value, -1, 1)))
    x, largest = x.astype(dtype), 1.0
    with pytest.MonkeyPatch.context() as patch:
        for i, t in enumerate(scheduler.timesteps):
            z = torched(noise[i].astype(dtype))
            patch.setattr(sys.modules[kind.__module__], "randn_tensor", lambda *a, z=z, **k: z)
            y, second = network(x, int(t))
            out = y if second is None else np.concatenate([y, second], axis=-1)
            arguments = {} if eta is None else {"eta": eta}
            after = scheduler.step(torched(out), t, torched(x), **arguments).prev_sample
            x = np.moveaxis(after.numpy(), 1, -1)
            largest = max(largest, np.abs(y).max(), np.abs(x).max())
    return x.astype(np.float64), scheduler.timesteps.tolist(), largest


def papers(scheduler, alpha2, ks, network, x, noise, eta, dtype):
    """Ho et al. 2020, eq. 6-7, or Song et al. 2020, eq. 12 and 16, along the times k_0 > k_1 > ..., then the image."""
    alpha2, x, noise, one = alpha2.astype(dtype), x.astype(dtype), noise.astype(dtype), dtype(1)
    eta = None if eta is None else dtype(eta)
    last = one if scheduler.set_alpha_to_one else alpha2[0]
    for i, k in enumerate(ks):
        now, then = alpha2[k], alpha2[ks[i + 1]] if i + 1 < len(ks) else last
        y, second = network(x, k)
        alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
        if scheduler.prediction_type == "epsilon":
            x0, eps = (x - sigma * y) / alpha, y
        elif scheduler.prediction_type == "sample":
            x0, eps = y, (x - alpha * y) / sigma
        else:
            x0, eps = alpha * x - sigma * y, alpha * y + sigma * x
        x0 = bounded(scheduler, x0).astype(dtype)
        posterior, beta = (1 - then) / (1 - now) * (1 - now / then), 1 - now / then
        if eta is not None:
            x = (
                np.sqrt(then) * x0
                + np.sqrt(np.maximum(one - then - eta**2 * posterior, 0)) * eps
                + eta * np.sqrt(posterior) * noise[i]
            )
            continue
        variance = {"fixed_small": posterior, "fixed_large": beta, "learned": second}.get(
            scheduler.variance_type.removesuffix("_log")
        )
        if variance is None:
            variance = beta ** ((second + 1) / 2) * posterior ** ((1 - second) / 2)
        x = (np.sqrt(then) * beta * x0 + np.sqrt(now / then) * (1 - then) * x) / (1 - now)
        x = x + np.sqrt(variance) * noise[i] * (then < 1)
    return x.astype(np.float64)


def bounded(scheduler, x0):
    if scheduler.thresholding:
        size = np.abs(x0).reshape(len(x0), -1)
        q = np.clip(np.quantile(size, scheduler.dynamic_thresholding_ratio, axis=1), 1, scheduler.sample_max_value)
        q = q[:, None, None, None]
        return np.clip(x0, -q, q) / q
    return np.clip(x0, -scheduler.clip_sample_range, scheduler.clip_sample_range) if scheduler.clip_sample else x0


def errs(fields, ks, steps):
    """Whether diffusers leaves its own times: DDIM steps T // N back whatever comes next, DDPM adds noise to a picture
    whose last time is not 0 (but not of `fixed_small`), and takes the root of a logarithm for `fixed_large_log`.
    """
    if fields["_class_name"] == "DDIMScheduler":
        back = fields["num_train_timesteps"] // steps
        return any(k - back != after for k, after in itertools.pairwise(ks)) or ks[-1] - back >= 0
    noisy = not fields["variance_type"].startswith("fixed_small")
    return (noisy and ks[-1] > 0) or (fields["variance_type"] == "fixed_large_log" and len(ks) > 1)


def judged(seed, folder):
    """What became of a combination, and a line that says so."""
    random = np.random.RandomState(seed)
    fields, steps, eta = drawn(random)
    x, noise = random.standard_normal(SHAPE).astype(np.float32), random.standard_normal((50, *SHAPE)).astype(np.float32)
    (folder / "scheduler_config.json").write_text(json.dumps(fields))
    try:
        scheduler = read_scheduler(folder)
        alpha2 = discrete(scheduler.betas()).alpha2
        network = Network(alpha2, fields, seed)
        mine = ours(scheduler, fields, network, x, noise, eta, steps)
    except UserError as error:
        return "refused", str(error).replace(str(folder), "")
    with np.errstate(all="ignore"):
        run = functools.partial(theirs, fields, alpha2, network, x, noise, eta, steps)
        (single, ks, largest), (double, _, _) = run(np.float32), run(np.float64)
        loop = functools.partial(papers, scheduler, alpha2, ks, network, x, noise, eta)
        rounded, own = loop(np.float32), loop(np.float64)
    wrong = errs(fields, ks, steps) or not np.isfinite(double).all()
    judge, reference = (own, rounded) if wrong else (double, single)
    error, bound = np.abs(mine - judge).max(), max(FLOOR * largest, 2 * np.abs(reference - judge).max())
    line = f"{seed}: error {error:.2e}, at most {bound:.2e}; {fields}, {steps} steps, eta {eta}"
    if not wrong and np.abs(own - double).max() > 1e-5 * largest:
        return "the loop is not diffusers'", f"{np.abs(own - double).max():.2e} {line}"
    if not error <= bound:
        return "wrong", line
    return ("equal to the papers where diffusers is not" if wrong else "equal"), line


@pytest.mark.parametrize("combinations", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_random_combinations_are_drawn_as_published_or_refused(combinations, tmp_path, capsys):
    found = collections.defaultdict(list)
    for seed in range(combinations):
        kind, line = judged(seed, tmp_path)
        found[kind].append(line)
    with capsys.disabled():
        print(
            "\n"
            + ", ".join(f"{kind}: {len(lines)}" for kind, lines in sorted(found.items()))
            + f", wrong: {len(found['wrong'])}"
        )
        for line, count in collections.Counter(line[:110] for line in found["refused"]).most_common(40):
            print(f"  refused {count}: {line}")
    assert not found["wrong"] and not found["the loop is not diffusers'"], "\n".join(
        found["wrong"][:10] + found["the loop is not diffusers'"][:10]
    )
