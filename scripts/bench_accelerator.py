"""All figures of an accelerator by one command, under nine minutes on one H100.

    python scripts/bench_accelerator.py              one GPU of 40 GB or more, or a TPU of 32 GB
    python scripts/bench_accelerator.py --tiny       the same programs at toy size, anywhere
    python scripts/bench_accelerator.py --only sd35 attention

Each part is a process of its own with a time of its own: it says its lines as they come, and one that fails or takes
too long is one line, while the others go on. Nothing is downloaded: weights are random. Where torch is there (the extra
`reference`, on a GPU its CUDA build) diffusers' networks run beside, under torch.compile. "of peak" is the share of the
data sheet's operations a second (model FLOPs utilization).
"""

import argparse
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from turns import timed

ROUNDS, STEPS = 3, 25
CAT_BATCH, TRAIN_CALLS = 16, 10
HEADS = {"SD3.5-large": (2, 4096 + 333, 38, 64), "cat-256": (16, 256, 1, 512)}
"""Attention at work: batch, tokens, heads, numbers a head."""


class Measured(NamedTuple):
    """Seconds of the first call and of the best one after it."""

    first: float
    best: float


def measured(call: Callable[[], Any], rounds: int = ROUNDS) -> Measured:
    """Time a call."""
    return Measured(timed(call), min(timed(call) for _ in range(rounds)))


def share(flops: float | None, seconds: float) -> str:
    """The share of the device's peak in words, where both are known."""
    from bench_sd35 import jax_device

    peak = jax_device()[2]
    return f", {flops / seconds / peak:.1%} of peak" if flops and peak else ""


def device(tiny: bool) -> Iterator[str]:
    """What computes."""
    import jax

    found = jax.devices()
    memory = (found[0].memory_stats() or {}).get("bytes_limit")
    said = f", {memory / 2**30:.1f} GiB for jax" if memory else ""
    yield f"{len(found)} x {found[0].device_kind}{said}, jax {jax.__version__}"


def sd35(tiny: bool) -> Iterator[str]:
    """A picture of 1024 pixels by SD3.5-large: seconds, operations, memory, compilation."""
    from bench_sd35 import STEPS, jax_device, jax_stages

    stages = jax_stages(tiny)
    total = 0.0
    for name in ("transformer", "text", "decoder"):
        call, flops = stages[name]
        found = measured(call)
        total += found.best
        step = f", {found.best / STEPS:.4f} s a guided step" if name == "transformer" else ""
        yield f"{name}: {found.best:.4f} s{step}{share(flops, found.best)}, first call {found.first:.1f} s"
    yield f"{total:.3f} s a picture ({STEPS} guided steps, bfloat16), peak memory {jax_device()[1] / 1e9:.1f} GB"


def sd35_torch(tiny: bool) -> Iterator[str]:
    """The same by diffusers under torch.compile."""
    from bench_sd35 import STEPS, torch_stages

    total = 0.0
    for name, (call, _) in torch_stages(tiny).items():
        found = measured(call)
        total += found.best
        step = f", {found.best / STEPS:.4f} s a guided step" if name == "transformer" else ""
        yield f"{name}: {found.best:.4f} s{step}, first call {found.first:.1f} s"
    yield f"{total:.3f} s a picture{torch_memory()}"


def cat(tiny: bool) -> Iterator[str]:
    """Pictures a second of cat-256 in 25 steps of DDIM, in two dtypes."""
    import jax
    import jax.numpy as jnp
    from bench_ddpm import jax_network

    from diffjax.diffusion import predict, process
    from diffjax.diffusion.denoise import Apply, Denoiser, table_step
    from diffjax.models.model import Defaults, Model
    from diffjax.nets import program_cost

    shrink_cat(tiny)
    module, params = jax_network()
    side, batch = module.sample_size, 2 if tiny else CAT_BATCH
    for dtype in (jnp.bfloat16, jnp.float32):
        network = module.clone(dtype=dtype, param_dtype=dtype)
        own = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
        denoiser = Denoiser(process.discrete(process.linear_betas()), predict.Eps(), own, Apply(network), table_step)
        model = Model(denoiser, (side, side, 3), Defaults(batch=batch))
        draw = functools.partial(model.sample, jax.random.key(0), num=batch, steps=STEPS, sampler="ddim")
        found = measured(lambda draw=draw: jax.block_until_ready(draw()))
        x, t = jnp.zeros((batch, side, side, 3)), jnp.zeros(batch)
        forward = lambda params, network=network, x=x, t=t: network.apply({"params": params}, x, t)
        flops = STEPS * program_cost(jax.make_jaxpr(forward)(own).jaxpr).flops
        rate, of_peak = batch / found.best, share(flops, found.best)
        name = jnp.dtype(dtype).name
        yield f"{name}: {rate:.3g} pictures a second, {batch} at once{of_peak}, first call {found.first:.1f} s"


def shrink_cat(tiny: bool) -> None:
    """At toy size, fewer channels of fewer pixels."""
    import bench_ddpm

    if tiny:
        bench_ddpm.CAT |= {"sample_size": 32, "block_out_channels": (32,) * 6}


def cat_torch(tiny: bool) -> Iterator[str]:
    """The same by diffusers' network under torch.compile."""
    import bench_ddpm
    import torch
    from bench_sd35 import torch_run
    from diffusers import DDIMScheduler, UNet2DModel

    shrink_cat(tiny)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    side, batch = bench_ddpm.CAT["sample_size"], 2 if tiny else CAT_BATCH
    for dtype in (torch.bfloat16, torch.float32):
        model = UNet2DModel(**bench_ddpm.CAT).eval().to(dtype=dtype, memory_format=torch.channels_last)
        network, scheduler = torch.compile(model), DDIMScheduler()
        noise = torch.randn(batch, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)

        def draw(network=network, scheduler=scheduler, x=noise):
            scheduler.set_timesteps(STEPS)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t).sample, t, x).prev_sample

        found = measured(lambda draw=draw: torch_run(draw))
        name = str(dtype).removeprefix("torch.")
        yield f"{name}: {batch / found.best:.3g} pictures a second, {batch} at once, first call {found.first:.1f} s"


def torch_memory() -> str:
    """The most that torch had of a GPU's memory, in words."""
    import torch

    return f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""


def emoji(tiny: bool) -> Iterator[str]:
    """Training pictures a second of experiments/emoji64.py, on random pictures."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from diffjax import config
    from diffjax.nets import program_cost
    from diffjax.train import facts
    from diffjax.train.experiment import Experiment
    from diffjax.train.state import create

    read = config.load(str(Path(__file__).parents[1] / "experiments" / "emoji64.py"))
    if tiny:
        read.dit.update(width=32, depth=1, heads=2, hidden=32, rank=4)
        read.text.update(width=32, depth=1, heads=2)
        read.train.batch = 2
    read = config.decided(read, lambda _: "bfloat16")
    experiment, key = Experiment.before_data(read, facts.Blank(read.text.tokens)), jax.random.key(0)
    make = lambda: create(experiment.init(key), experiment.optimizer, key)
    first = timed(lambda: jax.block_until_ready(jax.jit(make)().params))
    batch, draw = read.train.batch, np.random.default_rng(0)
    rows = {
        name: jnp.asarray(draw.integers(0, 2, leaf.shape), leaf.dtype)
        for name, leaf in experiment.batch_shapes(batch).items()
    }
    flops = program_cost(jax.make_jaxpr(experiment.step())(jax.eval_shape(make), rows).jaxpr).flops
    step, state = jax.jit(experiment.step(), donate_argnums=0), jax.jit(make)()

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, rows)
        jax.block_until_ready(state.params)

    compiled = timed(lambda: steps(1))
    calls = 2 if tiny else TRAIN_CALLS
    seconds = min(timed(lambda: steps(calls)) for _ in range(ROUNDS)) / calls
    of_peak = share(flops, seconds)
    yield f"{batch / seconds:.4g} pictures a second, {seconds:.4f} s a step of {batch}{of_peak}"
    yield f"first call of the step {compiled:.1f} s, of the parameters {first:.1f} s"


def attention(tiny: bool) -> Iterator[str]:
    """Attention by the platform's fused kernel and without it."""
    import jax
    import jax.numpy as jnp

    from diffjax.nets import layers

    for name, (batch, tokens, heads, width) in HEADS.items():
        shape = (1, 64, heads, width) if tiny else (batch, tokens, heads, width)
        q = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        fused = layers.flash.kernels(q, q, True)
        ways = {f"fused ({', '.join(fused) or 'none'})": layers.attention}
        ways["not fused"] = lambda q, k, v: layers._chunked(q, k, v, None, None)
        said = []
        for way, function in ways.items():
            call = jax.jit(function)
            found = measured(lambda call=call, q=q: jax.block_until_ready(call(q, q, q)))
            said.append(f"{way} {1e3 * found.best:.3f} ms (first call {found.first:.1f} s)")
        yield f"{name} {'x'.join(map(str, shape))}: {', '.join(said)}"


class Part(NamedTuple):
    """A part of the benchmark: how many seconds it may take, and the packages without which it is left out."""

    measure: Callable[[bool], Iterable[str]]
    seconds: int
    needs: tuple[str, ...] = ()


TORCH = ("torch", "diffusers", "transformers")
PARTS = {
    "device": Part(device, 30),
    "sd35": Part(sd35, 150),
    "attention": Part(attention, 40),
    "emoji64": Part(emoji, 70),
    "cat256": Part(cat, 80),
    "cat256 torch": Part(cat_torch, 50, TORCH),
    "sd35 torch": Part(sd35_torch, 110, TORCH),
}
"""In the order of what is missed most where the time ends early; together 530 seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy networks, on any device")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        for line in PARTS[args.part].measure(args.tiny):
            print(line, flush=True)
        return 0
    begin = time.monotonic()
    done = [run(name, args.tiny) for name in args.only]
    print(f"{sum(done)} of {len(done)} parts in {time.monotonic() - begin:.0f} s")
    return 0


def run(name: str, tiny: bool) -> bool:
    """Say the lines of a part as they come; whether it came to its end."""
    part = PARTS[name]
    if absent := [package for package in part.needs if not find_spec(package)]:
        print(f"{name}: left out, for {', '.join(absent)} is not installed", flush=True)
        return False
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if tiny else [])]
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": paths, "JAX_TRACEBACK_FILTERING": "off"}, **pipes
    )
    late, errors = threading.Event(), []
    watch = threading.Timer(part.seconds, lambda: (late.set(), process.kill()))
    watch.start()
    reader = threading.Thread(target=lambda: errors.extend(process.stderr))
    reader.start()
    for line in process.stdout:
        print(f"{name}: {line.rstrip()}", flush=True)
    status = process.wait()
    watch.cancel()
    reader.join()
    if late.is_set():
        print(f"{name}: stopped, for it took longer than its {part.seconds} s", flush=True)
    elif status:
        why = next((line.strip() for line in reversed(errors) if line.strip()), "it said nothing")
        print(f"{name}: failed with status {status}: {why[:300]}", flush=True)
    return not status


if __name__ == "__main__":
    sys.exit(main())
