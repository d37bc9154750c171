"""How well the closed form predicts a network: a small convolutional network (same-padded, no norm, no attention) is
trained on one class of Fashion-MNIST or CIFAR-10, shrunk; then both draw from the same noise.

    apt-get install dataset-fashion-mnist
    python scripts/predict_network.py --out drawn/predicted
    python scripts/predict_network.py --name cifar10 --label automobile --size 16 --pictures 1000 --out drawn/cars

Time: 8 processor minutes of training and half a minute of comparing for each picture (`--num`). The windows of the
machines are calibrated on the network's own trajectories (`local.calibrated`), and nothing else is fitted. Printed are
the median Pearson correlation r and the median R^2 = 1 - |x - y|^2 / |x - mean|^2 over pictures, x the network's; the
figures of Kamb and Ganguli (2025) are correlations.
"""

import argparse
import gzip
import json
import pickle
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from diffjax import data
from diffjax.diffusion import grid as grids, local, loss, sample
from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.diffusion.predict import Eps
from diffjax.diffusion.process import Cosine, unit_noise
from diffjax.utils import image

PROCESS = Cosine()
STEPS, START = 20, 1 / 1.008
"""The times of the paper: t = 1/20, ..., 1 of alpha = cos(pi t / 2.016)."""


class Convolutions(nn.Module):
    """`depth` residual 3 x 3 convolutions of ReLU between two others; the time is added in each."""

    width: int = 48
    depth: int = 5

    @nn.compact
    def __call__(self, x, t):
        angles = t[:, None] * jnp.pi * 2.0 ** jnp.arange(6)
        time = nn.relu(nn.Dense(self.width)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)))
        h = nn.Conv(self.width, (3, 3))(x)
        for _ in range(self.depth):
            h = h + nn.Conv(self.width, (3, 3))(nn.relu(h + nn.Dense(self.width)(time)[:, None, None]))
        return nn.Conv(x.shape[-1], (1, 1))(nn.relu(h))


DEBIAN = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts its files."""


def fashion(options):
    """The training pictures of a class of Fashion-MNIST, by its number."""
    read = lambda name, skip: np.frombuffer(gzip.open(f"{options.data or DEBIAN}/{name}").read(), np.uint8, offset=skip)
    pixels = read("train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
    return pixels[read("train-labels-idx1-ubyte.gz", 8) == int(options.label)]


def cifar10(options):
    """The training pictures of a class of CIFAR-10, by its name."""
    found = data.load({"name": "cifar10", "size": 32, "data_dir": options.data})
    examples = found.examples(range(len(found)))
    return examples["image"][examples["label"] == found.class_names.index(options.label)]


def shrunk(options):
    """Pictures of one class, the mean of squares of pixels, in [-1, 1]."""
    own = {"fashion_mnist": fashion, "cifar10": cifar10}[options.name](options)[: options.pictures]
    factor, channels = own.shape[1] // options.size, own.shape[-1]
    cells = image.from_uint8(own).reshape(len(own), options.size, factor, options.size, factor, channels)
    return cells.mean((2, 4))


def trained(options, images):
    """The network; what an interrupted training left in the folder goes on."""
    module, file = Convolutions(options.width, options.depth), options.out / "network.pkl"
    denoiser = lambda params: Denoiser(PROCESS, Eps(), params, Apply(module))
    params = module.init(jax.random.key(0), images[:1], jnp.zeros(1))["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, options.steps))
    begun, params, state = pickle.loads(file.read_bytes()) if file.exists() else (0, params, optimizer.init(params))

    @jax.jit
    def step(params, state, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        batch = jax.random.choice(key, images, (options.batch,))
        error = lambda params: jnp.mean(
            loss.drawn_error(denoiser(params), key, batch, loss.plain(), lambda process, u: START * u)
        )
        value, grads = jax.value_and_grad(error)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    begin, losses = time.time(), []
    for number in range(begun, options.steps):
        params, state, value = step(params, state, number)
        losses.append(value)
        if (number + 1) % 200 == 0:
            print(f"step {number + 1}: loss {np.mean(losses[-200:]):.4f}, {time.time() - begin:.0f} s", flush=True)
            file.write_bytes(pickle.dumps(jax.device_get((number + 1, params, state))))
    return denoiser(params)


def drawn(denoise, grid, x):
    """Pictures by DDIM from x at the grid's first time."""
    keys = jax.random.split(jax.random.key(0), len(x))
    return np.asarray(sample.solve(denoise, x, grid, sample.DDIM, keys))


def agreement(x, y):
    """The median Pearson r and the median R^2 of y as a prediction of x, picture by picture."""
    x, y = (np.asarray(rows, np.float64).reshape(len(rows), -1) for rows in (x, y))
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y)]
    r2 = 1 - np.sum((x - y) ** 2, 1) / np.sum((x - x.mean(1, keepdims=True)) ** 2, 1)
    return {"median r": float(np.median(r)), "median R2": float(np.median(r2))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="", help="the folder that holds the data")
    parser.add_argument("--name", choices=("fashion_mnist", "cifar10"), default="fashion_mnist")
    parser.add_argument("--label", default="9", help="the class: a number of fashion_mnist, a name of cifar10")
    numbers = {"size": 14, "pictures": 6000, "num": 16, "steps": 8000, "batch": 32, "width": 48, "depth": 6}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images = shrunk(options)
    print(f"{len(images)} pictures of {options.size} pixels")
    network, pictures = trained(options, images), local.pictures(images)
    grid, first = grids.uniform(STEPS, START), PROCESS.sigma(START)
    noise = lambda seed, num: first * unit_noise(jax.random.split(jax.random.key(seed), num), images.shape[1:])
    start, found = noise(2, options.num), {}
    own = drawn(network, grid, start)
    rows = [own[:16]]
    seeds = {"local": (8, 2 * options.size), "equivariant": (2, options.size + 2)}
    machines = {
        "local": local.Local(PROCESS, pictures, local.falling(17)),
        "equivariant": local.Equivariant(PROCESS, pictures, local.falling(17), "broken"),
        "ideal": local.Ideal(PROCESS, pictures),
    }
    for name, machine in machines.items():
        begin, used = time.time(), None
        if name != "ideal":
            seen, end = seeds[name]
            windows = local.calibrated(machine, network, noise(3, seen), grid, range(3, end, 2))
            machine = machine.replace(windows=windows)
            used = np.asarray(windows.side)[::-1].astype(int).tolist()
        pictured = np.concatenate([drawn(machine, grid, start[i : i + 4]) for i in range(0, options.num, 4)])
        found[name] = agreement(own, pictured) | {"windows": used, "seconds": round(time.time() - begin)}
        print(name, json.dumps(found[name]), flush=True)
        rows.append(pictured[:16])
    sheet = image.sheet(image.to_uint8(np.concatenate(rows)), 16)
    image.write_png(options.out / "predicted.png", sheet)
    (options.out / "predicted.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
