"""U-Nets on this CPU, diffjax against diffusers: one forward of cat-256 (113.7 M parameters, 256 px), or with `--train`
one training step of a network of 49.8 M parameters at 64 px (gradients and Adam, batch 8 by default).

    python scripts/bench_ddpm.py [--quick] [--train] [--dtype float32 bfloat16] [--batch 1 4] [--rounds 5]

In bfloat16, both draw with parameters in bfloat16 and train with parameters in float32, torch under autocast. "diffjax
oneDNN" needs the optional package of `native/`, without which it runs as "diffjax" does.

Every variant is a process of its own, see scripts/turns.py. Needs the extra `reference`.
"""

import argparse
import json
import os
import tempfile

from turns import Worker, measure, serve, show, timed

VARIANTS = ("diffjax", "diffjax oneDNN", "torch eager", "torch channels_last", "torch compile")
CAT = dict(
    sample_size=256,
    attention_head_dim=None,
    norm_eps=1e-6,
    freq_shift=1,
    flip_sin_to_cos=False,
    downsample_padding=0,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
)
TRAINED = CAT | dict(
    sample_size=64,
    block_out_channels=(128, 256, 256, 384),
    down_block_types=("DownBlock2D",) * 2 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 2,
)


def torch_call(variant, batch, dtype, train):
    """A function that runs the network, or a training step of it, once."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    config, dtype = TRAINED if train else CAT, getattr(torch, dtype)
    model = UNet2DModel(**config).train(train)
    x, t = torch.randn(batch, 3, *[config["sample_size"]] * 2), torch.full((batch,), 500)
    if variant != "torch eager":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if not train:
        model, x = model.to(dtype), x.to(dtype)
    network = torch.compile(model) if variant == "torch compile" else model
    adam = torch.optim.Adam(model.parameters(), 1e-4)

    def forward():
        with torch.inference_mode():
            return network(x, t).sample

    def step():
        adam.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = network(x, t).sample
        (y.float() - x).square().mean().backward()
        adam.step()

    return step if train else forward


def jax_network(config=CAT, dtype="float32"):
    """The module and random parameters."""
    import jax
    import numpy as np

    from diffjax import weights
    from diffjax.nets.unet import UNet
    from diffjax.weights.unet2d import FORMAT

    module, random = UNet(**config, dtype=dtype), np.random.default_rng(0)

    def draw(leaf):
        return jax.numpy.asarray(random.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1])))

    return module, jax.tree.map(draw, weights.param_shapes(module, FORMAT))


def jax_call(variant, batch, dtype, train, cache):
    """A function that runs the network, or a training step of it, once."""
    os.environ["DIFFJAX_ONEDNN"] = str(int(variant == "diffjax oneDNN"))
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = TRAINED if train else CAT
    module, params = jax_network(config, dtype)
    x = jax.random.normal(jax.random.key(0), (batch, *[config["sample_size"]] * 2, 3))
    network = lambda params, x: module.apply({"params": params}, x, jnp.full(batch, 500.0))
    if not train:
        forward, params = jax.jit(network), jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return lambda: forward(params, x).block_until_ready()
    adam, loss = optax.adam(1e-4), lambda params: jnp.mean(jnp.square(network(params, x) - x))

    def update(params, state):
        change, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, change), state

    state, update = [params, adam.init(params)], jax.jit(update, donate_argnums=(0, 1))

    def step():
        state[:] = jax.block_until_ready(update(*state))

    return step


def compare(variants, batch, dtype, train, rounds):
    """The lines of all variants at one batch size."""
    with tempfile.TemporaryDirectory() as cache:
        asked = ["--batch", str(batch), "--dtype", dtype, "--cache", cache, *["--train"] * train]
        arguments = {one: ["--worker", one, *asked] for one in variants}
        lines = [dict(batch=batch, dtype=dtype, train=train) | line for line in measure(arguments, rounds)]
        print(f"{'training, ' if train else ''}{dtype}, batch {batch}")
        show(lines, "torch channels_last")
        if "diffjax" in variants:
            warm = Worker(arguments["diffjax"], False)
            print(f"diffjax, first call with a warm cache: {warm.first:.1f} s\n", flush=True)
            warm.close()
    return lines


def idle(params, x, t):
    """A network that costs nothing."""
    return 0.1 * x


def loop(step):
    """The cost of everything around the network: a step of the sampler at 256 px with an idle one, against `step` s."""
    import jax

    from diffjax.diffusion import predict, process
    from diffjax.diffusion.denoise import Denoiser, table_step
    from diffjax.models.model import Defaults, Model

    table = process.discrete(process.linear_betas())
    model = Model(Denoiser(table, predict.Eps(), {}, idle, table_step), (256, 256, 3), Defaults(batch=1))
    for sampler in ("ddpm", "ddim", "unipc"):
        spent = _a_step(
            lambda steps, sampler=sampler: model.sample(jax.random.key(0), num=1, steps=steps, sampler=sampler)
        )
        print(f"loop, {sampler}: {1e3 * spent:.2f} ms a step, {spent / step:.2%} of a step of the network", flush=True)


def _a_step(draw):
    """Seconds a step of `draw(steps)`, from the difference of 220 and 20 steps, compiled before."""
    import jax

    run = lambda steps: jax.block_until_ready(draw(steps))
    run(20), run(220)
    return min((timed(lambda: run(220)) - timed(lambda: run(20))) / 200 for _ in range(3))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="training steps")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 4, to train 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--quick", action="store_true", help="batch 1, three rounds, no torch.compile")
    parser.add_argument("--out", help="also write the lines to this JSON file")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        asked = args.worker, args.batch[0], args.dtype[0], args.train
        return serve(jax_call(*asked, args.cache) if args.worker.startswith("diffjax") else torch_call(*asked))
    if args.quick:
        args.batch, args.rounds, args.variants = args.batch or ([8] if args.train else [1]), 3, VARIANTS[:-1]
    batches = args.batch or ([8] if args.train else [1, 4])
    asked = [(batch, dtype) for batch in batches for dtype in args.dtype]
    lines = [line for one in asked for line in compare(args.variants, *one, args.train, args.rounds)]
    first = dict(variant="diffjax", batch=1, dtype="float32", train=False)
    ours = [line["best"] for line in lines if first.items() <= line.items()]
    if ours:
        loop(min(ours))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()
