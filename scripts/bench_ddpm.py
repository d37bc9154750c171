"""One forward of the cat-256 U-Net (113.7 M parameters, 256 px, float32) on this CPU: diffjax against diffusers.

    python scripts/bench_ddpm.py [--quick] [--batch 1 4] [--rounds 5] [--out bench.json]

Every variant is a process of its own, see scripts/turns.py. Needs the extra `reference`.
"""

import argparse
import json
import tempfile

from turns import Worker, measure, serve, show, timed

VARIANTS = ("diffjax", "torch eager", "torch channels_last", "torch compile")
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


def torch_forward(variant, batch):
    """A function that runs the network once."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(**CAT).eval()
    x, t = torch.randn(batch, 3, 256, 256), torch.full((batch,), 500)
    if variant != "torch eager":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    network = torch.compile(model) if variant == "torch compile" else model

    def forward():
        with torch.inference_mode():
            return network(x, t).sample

    return forward


def jax_network():
    """The module and random parameters."""
    import jax
    import numpy as np

    from diffjax import weights
    from diffjax.nets.unet import UNet
    from diffjax.weights.unet2d import FORMAT

    module, random = UNet(**CAT), np.random.default_rng(0)

    def draw(leaf):
        return jax.numpy.asarray(random.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1])))

    return module, jax.tree.map(draw, weights.param_shapes(module, FORMAT))


def jax_forward(batch, cache):
    """A function that runs the network once."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    module, params = jax_network()
    x = jax.random.normal(jax.random.key(0), (batch, 256, 256, 3))
    network = jax.jit(lambda params, x: module.apply({"params": params}, x, jnp.full(batch, 500.0)))
    return lambda: network(params, x).block_until_ready()


def compare(variants, batch, rounds):
    """The lines of all variants at one batch size."""
    with tempfile.TemporaryDirectory() as cache:
        arguments = {one: ["--worker", one, "--batch", str(batch), "--cache", cache] for one in variants}
        lines = [dict(batch=batch) | line for line in measure(arguments, rounds)]
        print(f"batch {batch}")
        show(lines, "torch eager")
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
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--quick", action="store_true", help="batch 1, three rounds, no torch.compile")
    parser.add_argument("--out", help="also write the lines to this JSON file")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        batch = args.batch[0]
        return serve(jax_forward(batch, args.cache) if args.worker == "diffjax" else torch_forward(args.worker, batch))
    if args.quick:
        args.batch, args.rounds, args.variants = [1], 3, VARIANTS[:3]
    lines = [line for batch in args.batch for line in compare(args.variants, batch, args.rounds)]
    ours = [line["best"] for line in lines if line["variant"] == "diffjax" and line["batch"] == 1]
    if ours:
        loop(min(ours))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()
