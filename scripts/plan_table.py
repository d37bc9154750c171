"""What `diffjax plan` predicts against what is measured on this machine: a table in Markdown.

    python scripts/plan_table.py                     a few minutes on two cores

The rates are measured in turns with the programs, and the best time of each counts, since whatever else the machine
does slows both. Weights are random.
"""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp

from diffjax import config, plan
from diffjax.nets.unet import UNet
from diffjax.plan.rates import Rates, calibrate
from diffjax.utils import files
from diffjax.weights.scheduler import Scheduler, write_scheduler
from diffjax.weights.unet2d import FORMAT

EMOJI = Path(__file__).parents[1] / "experiments" / "emoji.py"
ROUNDS = 5
NETWORKS = {
    "google/ddpm-cat-256": UNet(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    ),
    "google/ddpm-cifar10-32": UNet(sample_size=32),
}


def jobs() -> list[plan.Job]:
    """Those of the table."""
    asked, drawn = plan.Asked(), []
    for name, module in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            files.write_json(Path(folder) / "unet" / "config.json", FORMAT.config(module))
            write_scheduler(folder, Scheduler())
            drawn.append(plan.published(Path(folder), asked, name))
    training, drawing = plan.experiment(config.load(str(EMOJI)), asked)
    return [*drawn, drawing, training]


def made(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of that shape."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.full(shape.shape, 0.01).astype(shape.dtype)


def seconds(part: plan.Part) -> float:
    """The best time of one call."""
    call, arguments = jax.jit(part.call), jax.tree.map(made, (part.held, *part.given))
    times = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def fastest(one: Rates, other: Rates) -> Rates:
    """The better of two measurements of the same device."""
    pairs = {name: (value, getattr(other, name)) for name, value in asdict(one).items()}
    return Rates(**{name: min(pair) if name == "launch" else max(pair) for name, pair in pairs.items()})


def main() -> None:
    """Print the table."""
    speed, measured = calibrate(), {}
    for _ in range(2):
        for job in jobs():
            took = seconds(job.parts[-1])
            measured[job.title] = min(took, measured.get(job.title, (took,))[0]), job.parts[-1]
            speed = fastest(speed, calibrate())
    print(speed)
    print("| job | GFLOP a step | predicted s a step | measured s a step | ratio |\n|---|---|---|---|---|")
    for title, (took, part) in measured.items():
        cost = plan.estimate(part).cost
        said = speed.seconds(cost)
        print(f"| {title} | {cost.flops / 1e9:.3g} | {said:.3g} | {took:.3g} | {said / took:.2f} |")


if __name__ == "__main__":
    main()
