"""Is a network learning? What it makes of noised training pictures, beside what needs no learning, and whether it uses
its conditioning.

Errors are those of x0, |x0_hat - x0|^2 as a mean over pixels: at every log-SNR the loss is this times its weight, and a
predictor that never looks at the noised picture is a level line. A network that uses its conditioning errs more with
that of another picture; one that does not is reported.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, UInt8

from diffjax.diffusion import cascade
from diffjax.diffusion.denoise import Cond, Denoiser
from diffjax.diffusion.process import Discrete, Process, Time, perturb
from diffjax.train.experiment import Experiment
from diffjax.utils import image, seeds

LEVELS = (-6.0, -3.0, 0.0, 3.0, 6.0)
MARGIN, LEARNED = 1.01, 1.1
SHOWN = 4


class Panel(NamedTuple):
    """What a network makes of n training pictures at the log-SNRs `LEVELS`.

    `x0` are its estimates and `error` theirs; `trivial` has the errors of the mean picture and, beside a
    super-resolution stage, of interpolation; `swapped` those of the network with the text, the class or the low-res
    picture of another one.
    """

    truth: Float[np.ndarray, "n h w c"]
    x0: Float[np.ndarray, "levels n h w c"]
    error: Float[np.ndarray, " levels"]
    trivial: dict[str, float]
    swapped: dict[str, Float[np.ndarray, " levels"]]

    def ignored(self) -> list[str]:
        """What the network does not use: with another picture's, it errs at most a hundredth more."""
        return [name for name, error in self.swapped.items() if error.mean() <= MARGIN * self.error.mean()]

    def learned(self) -> bool:
        """Whether in pure noise the network is about as good as the mean picture, which a new one is not."""
        return self.error[0] <= LEARNED * self.trivial["mean picture"]

    def lines(self, early: bool = False) -> list[str]:
        """What there is to say, the warnings last; none where it is too early for any."""
        trivial = ", ".join(f"{name} {error:.4f}" for name, error in self.trivial.items())
        swapped = "".join(f"; with another's {name}, {error.mean():.4f}" for name, error in self.swapped.items())
        warnings = [
            f"WARNING: the {name} is ignored: with another picture's, the error is no larger" for name in self.ignored()
        ]
        warnings = [] if early else warnings
        return [f"error of x0 {self.error.mean():.4f}{swapped}; without learning: {trivial}", *warnings]

    def draw(self) -> UInt8[np.ndarray, "h w 3"]:
        """The errors against log-SNR, and below it the estimates of `SHOWN` pictures, each beside the truth, with
        their PSNR.
        """
        columns = np.concatenate([self.x0, self.truth[None]]).swapaxes(0, 1)[:SHOWN]
        pictures = image.to_uint8(columns)
        quality = image.psnr(pictures[:, :-1], pictures[:, -1:])
        captions = [[f"{at:+g}: {value:.1f} dB" for at, value in zip(LEVELS, row)] + ["truth"] for row in quality]
        flat = pictures.reshape(-1, *pictures.shape[2:])
        strip = image.sheet(flat, len(LEVELS) + 1, [caption for row in captions for caption in row])
        return image.stack([self._chart(), strip])

    def _chart(self) -> UInt8[np.ndarray, "h w 3"]:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure((6.8, 3.4), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.semilogy(LEVELS, self.error, "o-", label="this network")
        for name, error in self.swapped.items():
            axes.semilogy(LEVELS, error, ".:", label=f"with another's {name}")
        for (name, error), colour in zip(self.trivial.items(), ("0.3", "0.6")):
            axes.axhline(error, linestyle="--", color=colour, label=name)
        axes.set(xlabel="log-SNR", ylabel="error of x0", xticks=LEVELS)
        axes.legend()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]


def look(experiment: Experiment, params: PyTree) -> Panel:
    """The panel of parameters on the pictures that the experiment has seen; the same noise every time."""
    seen, model = experiment.seen, experiment.model(params)
    assert seen is not None
    truth = image.from_uint8(seen.image)
    keys = jax.random.split(seeds.key(experiment.config.seed), len(truth))
    trivial, parts = {"mean picture": _square(seen.mean - truth)}, {}
    if experiment.config.text:
        parts["text"] = model.condition(len(truth), prompt=seen.caption)
    elif experiment.classes:
        parts["class"] = model.condition(len(truth), label=seen.label.tolist())
    if experiment.low_res:
        small, size = cascade.downsample(truth, experiment.low_res.size), experiment.shape[0]
        parts["low-res picture"] = cascade.condition(small, size, model.defaults.level, keys)
        trivial["bicubic"] = _square(cascade.upsample(small, size) - truth)
    own = {name: jnp.asarray(value) for part in parts.values() for name, value in part.items()}
    x0 = estimates(model.denoiser, truth, own, keys)
    swapped = {}
    for name, part in parts.items():
        others = {name: jnp.roll(value, 1, axis=0) for name, value in part.items()}
        if any((others[name] != own[name]).any() for name in part):
            swapped[name] = _square(estimates(model.denoiser, truth, own | others, keys) - truth, (1, 2, 3, 4))
    return Panel(truth, x0, _square(x0 - truth, (1, 2, 3, 4)), trivial, swapped)


def estimates(
    denoiser: Denoiser, truth: Float[np.ndarray, "n h w c"], cond: Cond, keys: Key[Array, " n"]
) -> Float[np.ndarray, "levels n h w c"]:
    """The denoiser's x0 of pictures noised to each of `LEVELS`, as far as its process reaches."""
    times = _times(denoiser.process)
    return np.stack([_denoised(denoiser, truth, cond, t, keys) for t in times])


def _times(process: Process) -> Float[np.ndarray, " levels"]:
    first = 1 / process.steps if isinstance(process, Discrete) else 0.0
    return np.clip(process.inverse(jnp.asarray(LEVELS)), first, 1.0)


@jax.jit
def _denoised(
    denoiser: Denoiser, x0: Float[Array, "n h w c"], cond: Cond, t: Time, keys: Key[Array, " n"]
) -> Float[Array, "n h w c"]:
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
    return denoiser(perturb(denoiser.process, x0, eps, t), t, cond).x0


def _square(x: Array | np.ndarray, axes: Any = None) -> Any:
    """The mean of squares: a number, or over some axes."""
    mean = np.square(np.asarray(x)).mean(axis=axes)
    return float(mean) if axes is None else mean
