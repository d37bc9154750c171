"""Stable Diffusion 3.5 large with random weights: seconds an image, operations, memory, and where the time goes.

    python scripts/bench_sd35.py              a GPU of 40 GB or more: 1024 px, 28 guided steps, bfloat16
    python scripts/bench_sd35.py --tiny       the same program at toy size, anywhere
    python scripts/bench_sd35.py --block      a CPU: one block of medium's width against the same in diffusers

Where torch and diffusers are installed (the extra `reference`), they run the same networks on the same device, the
transformer and the decoder under torch.compile, in a process of their own; else the published time of a step
stands beside.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
from importlib.util import find_spec

from turns import measure, say, serve, show, timed

PUBLISHED = 0.149
"""Seconds of one guided step on an H100 with torch.compile: 7.466 s for 50 (onnxruntime, pull request 22986)."""

STEPS, GUIDANCE, TOKENS = 28, 4.5, {"clip_l": 77, "clip_g": 77, "t5": 256}
CONTEXT = TOKENS["clip_l"] + TOKENS["t5"]
WIDTH, HEADS, IMAGE, TEXT = 1536, 24, 1024, 154
DTYPES = ("float32", "bfloat16")
BLOCKS = tuple(f"{library} {dtype}" for dtype in DTYPES for library in ("diffjax", "torch"))


def networks(tiny):
    """The modules of a pipeline, and the side of its latents."""
    from diffjax.nets.clip import ClipText
    from diffjax.nets.mmdit import MMDiT
    from diffjax.nets.t5 import T5Encoder
    from diffjax.nets.vae import AutoencoderKL

    if tiny:
        text = ClipText(1000, 32, 2, 2, 64, projection_dim=32)
        decoder = AutoencoderKL(block_out_channels=(32, 32), layers_per_block=1)
        transformer = MMDiT(16, 2, 16, 16, 2, 16, 4, 64, 64, 16)
        return dict(
            clip_l=text, clip_g=text, t5=T5Encoder(1000, 64, 16, 128, 2, 4), transformer=transformer, vae=decoder
        ), 16
    giant = ClipText(49408, 1280, 32, 20, 5120, projection_dim=1280, hidden_act="gelu")
    return dict(clip_l=ClipText(), clip_g=giant, t5=T5Encoder(), transformer=MMDiT(), vae=AutoencoderKL()), 128


def jax_stages(tiny):
    """For each stage a function that runs it once, and its operations."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from diffjax import weights
    from diffjax.diffusion import denoise, grid, guide, predict, process, sample
    from diffjax.nets import program_cost

    modules, side = networks(tiny)
    modules = {name: module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16) for name, module in modules.items()}
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    draw = lambda *shape, dtype=jnp.float32: 0.02 * jax.random.normal(next(keys), shape, dtype)
    params = {
        name: jax.tree.map(lambda leaf: draw(*leaf.shape, dtype=leaf.dtype), weights.shapes(module))
        for name, module in modules.items()
    }
    network, time = modules["transformer"], process.Shift(process.Flow(), 3.0)
    context, pooled = draw(2, CONTEXT, network.joint_attention_dim), draw(2, network.pooled_projection_dim)
    cond = {
        name: {"context": context[i : i + 1], "pooled": pooled[i : i + 1]} for i, name in enumerate(("cond", "null"))
    }
    apply = denoise.Apply(network)
    denoiser = denoise.Denoiser(time, predict.Straight(), params["transformer"], apply, denoise.thousand_sigma)
    guided, run_keys = guide.Guidance(denoiser, jnp.float32(GUIDANCE)), jax.random.split(next(keys), 1)
    steps = sample.Run(guided, time, sample.Sampler(), run_keys, cond)
    state = sample.start(steps, draw(1, side, side, network.in_channels))
    tokens = {name: jnp.asarray(np.random.default_rng(0).integers(0, 999, (2, n))) for name, n in TOKENS.items()}
    texts = lambda params: [modules[name].apply({"params": params[name]}, tokens[name]) for name in TOKENS]
    decode = lambda params, z: modules["vae"].apply({"params": params}, z, method="decode")
    programs = {
        "text": (texts, ({name: params[name] for name in TOKENS},)),
        "transformer": (sample.advance, (state, grid.uniform(STEPS), steps)),
        "decoder": (decode, (params["vae"], draw(1, side, side, network.in_channels))),
    }
    flops = {name: program_cost(jax.make_jaxpr(call)(*given).jaxpr).flops for name, (call, given) in programs.items()}
    run = lambda call, given: jax.block_until_ready(call(*given))
    return {
        name: (functools.partial(run, jax.jit(call), given), flops[name]) for name, (call, given) in programs.items()
    }


def jax_device():
    """The name of the device, the bytes in use at most, and the operations a second of its data sheet, if known."""
    import jax

    from diffjax.plan import rates

    device = jax.devices()[0]
    name = next((name for name in rates.NAMED if name in device.device_kind.lower()), None)
    sheet = rates.NAMED[name].products16 / rates.SHARE if name else None
    own = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return device.device_kind, own or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sheet


def torch_stages(tiny):
    """The same in torch, whose operations are not counted."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from diffjax.weights import clip, mmdit, t5, vae

    modules, side = networks(tiny)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16)
    network = modules["transformer"]
    text = {
        name: CLIPTextModelWithProjection(CLIPTextConfig(**clip.FORMAT.config(modules[name]))).eval()
        for name in ("clip_l", "clip_g")
    } | {"t5": T5EncoderModel(T5Config(**t5.FORMAT.config(modules["t5"]))).eval()}
    transformer = torch.compile(SD3Transformer2DModel.from_config(mmdit.FORMAT.config(network)).eval())
    decode = torch.compile(AutoencoderKL.from_config(vae.FORMAT.config(modules["vae"])).eval().decode)
    tokens = {name: torch.randint(0, 999, (2, n)) for name, n in TOKENS.items()}
    latents = torch.randn(2, network.in_channels, side, side)
    context = torch.randn(2, CONTEXT, network.joint_attention_dim)
    pooled = torch.randn(2, network.pooled_projection_dim)

    def steps():
        x = latents[:1]
        for t in torch.linspace(1, 1 / STEPS, STEPS):
            y = transformer(torch.cat([x, x]), context, pooled, 1000 * t.expand(2)).sample
            x = x - (y[:1] + GUIDANCE * (y[1:] - y[:1])) / STEPS
        return x

    programs = {
        "text": lambda: [text[name](tokens[name]) for name in TOKENS],
        "transformer": steps,
        "decoder": lambda: decode(latents[:1]).sample,
    }
    return {name: (functools.partial(torch_run, call), None) for name, call in programs.items()}


def torch_run(call):
    """The call, without gradients, until the device is done."""
    import torch

    with torch.inference_mode():
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pipeline_worker(library, tiny, rounds):
    """Say the best seconds of each stage, the first call's, the operations and the memory."""
    for name, (call, flops) in LIBRARIES[library](tiny).items():
        first = timed(call)
        say(stage=name, first=first, seconds=min(timed(call) for _ in range(rounds)), flops=flops)
    if library == "diffjax":
        kind, memory, sheet = jax_device()
        say(device=kind, memory=memory, sheet=sheet)


LIBRARIES = {"diffjax": jax_stages, "diffusers": torch_stages}


def pipeline(library, tiny, rounds):
    """What the worker of a library says."""
    command = [sys.executable, __file__, "--worker", library, "--rounds", str(rounds), *(["--tiny"] if tiny else [])]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in said if line.startswith("{")]


def compare(tiny, rounds):
    """Both libraries, one after the other, in one table."""
    *ours, about = pipeline("diffjax", tiny, rounds)
    theirs = pipeline("diffusers", tiny, rounds) if all(map(find_spec, ("torch", "diffusers", "transformers"))) else []
    beside = {line["stage"]: line for line in theirs}
    print(f"{about['device']}, {'toy size' if tiny else 'SD3.5 large, 1024 px'}, {STEPS} steps with guidance, bfloat16")
    print(
        f"{'stage':12}{'TFLOP':>9}{'seconds':>10}{'share':>8}{'first s':>9}{'of peak':>9}"
        f"{'diffusers s':>13}{'ratio':>7}"
    )
    total = sum(line["seconds"] for line in ours)
    for line in ours:
        used = f"{line['flops'] / line['seconds'] / about['sheet']:.1%}" if about["sheet"] else ""
        other = beside.get(line["stage"])
        said = f"{other['seconds']:13.4f}{line['seconds'] / other['seconds']:7.2f}" if other else ""
        print(
            f"{line['stage']:12}{line['flops'] / 1e12:9.3g}{line['seconds']:10.4f}{line['seconds'] / total:8.1%}"
            f"{line['first']:9.1f}{used:>9}{said}"
        )
    step = next(line["seconds"] for line in ours if line["stage"] == "transformer") / STEPS
    print(f"{total:.4g} s an image, {step:.4g} s a guided step, peak memory {about['memory'] / 1e9:.3g} GB")
    if not tiny:
        print(f"published: {PUBLISHED} s a guided step (torch.compile, H100)")


def jax_block(dtype):
    """A function that runs one block."""
    import jax
    import jax.numpy as jnp

    from diffjax.nets.mmdit import Block, Kind

    block = Block(HEADS, WIDTH // HEADS, True, None, Kind(False, False), False, jnp.dtype(dtype), jnp.dtype(dtype))
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)
    given = (draw(0, 2, IMAGE, WIDTH), draw(1, 2, TEXT, WIDTH)), draw(2, 2, WIDTH), jnp.asarray(True)
    params = jax.jit(block.init)(jax.random.key(3), *given)
    call = jax.jit(block.apply)
    return lambda: jax.block_until_ready(call(params, *given))


def torch_block(dtype):
    """The same in diffusers."""
    import torch
    from diffusers.models.attention import JointTransformerBlock

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    block = JointTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, qk_norm="rms_norm").eval()
    x, text, emb = torch.randn(2, IMAGE, WIDTH), torch.randn(2, TEXT, WIDTH), torch.randn(2, WIDTH)
    return lambda: torch_run(lambda: block(x, text, emb))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy networks, on any device")
    parser.add_argument("--block", action="store_true", help="one block on this CPU, against diffusers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=[*LIBRARIES, *BLOCKS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker in LIBRARIES:
        return pipeline_worker(args.worker, args.tiny, args.rounds)
    if args.worker:
        library, dtype = args.worker.split()
        return serve({"diffjax": jax_block, "torch": torch_block}[library](dtype))
    if args.block:
        print(f"one MMDiT block, {WIDTH} wide, {IMAGE} + {TEXT} tokens, batch 2")
        return show(measure({name: ["--worker", name] for name in BLOCKS}, args.rounds), "torch float32")
    compare(args.tiny, args.rounds)


if __name__ == "__main__":
    main()
