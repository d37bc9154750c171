"""What programs need on accelerators, as compiled for each without one at hand: a table in Markdown.

    python scripts/device_table.py              all rows, half an hour on two cores
    python scripts/device_table.py large        those of whose program or target this is a part

It needs the extras `tpu` and `cuda`, and says of a target where one is not installed. Bytes are those of one device,
collectives what it receives in one call.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from diffjax import config, plan
from diffjax.parallel import devices
from diffjax.plan import rates
from diffjax.plan.report import si
from diffjax.utils.errors import UserError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LARGE, MEDIUM = (f"stabilityai/stable-diffusion-3.5-{size}" for size in ("large", "medium"))
EFFORT = "jax_exec_time_optimization_effort"
HEAD = "| program | target | compile s | held | beside | received in a call |\n|---|---|---|---|---|---|"

Row = tuple[str, str, Callable[[], plan.Part]]


def drawn(model: str, name: str, shard: str | None = None, **asked: object) -> plan.Part:
    """A part of drawing with a published model."""
    (job,) = plan.model(model, plan.Asked(**asked), shard=shard)  # pyright: ignore[reportArgumentType]
    return next(part for part in job.parts if part.name == name)


def trained(experiment: str, shard: str | None = None, model: str = "", **train: object) -> plan.Part:
    """The step of an experiment that an accelerator trains, maybe on from another model."""
    settings = config.decided(config.load(str(EXPERIMENTS / experiment)), lambda _: "bfloat16")
    settings.update({"model": model} if model else {})
    settings.train.update(train)
    return plan.config(settings, plan.Asked(), shard)[0].parts[0]


@contextlib.contextmanager
def little_effort() -> Iterator[None]:
    """A block in which compilers search less for the fastest program; a TPU's takes ten times as long for a U-Net
    otherwise.
    """
    before = getattr(jax.config, EFFORT)
    jax.config.update(EFFORT, -1.0)
    yield
    jax.config.update(EFFORT, before)


def rows() -> Iterator[Row]:
    """What the table has."""
    for target in ("h100", "a100", "v5p"):
        yield "SD3.5-large, 2 rows, 1024 px", target, lambda: drawn(LARGE, "transformer")
    for target in ("v5e-8", "h100-2", "h100-4", "h100-8"):
        yield "SD3.5-large, tensor", target, lambda: drawn(LARGE, "transformer", "tensor")
    for target in ("v5e-8", "h100-2", "h100-4"):
        yield "SD3.5-large, fsdp", target, lambda: drawn(LARGE, "transformer", "fsdp")
    yield "SD3.5-large, both", "h100-4", lambda: drawn(LARGE, "transformer", "both")
    for target in ("h100-4", "h100-8", "v5e-4"):
        yield "SD3.5-medium, tensor", target, lambda: drawn(MEDIUM, "transformer", "tensor")
    yield "VAE decoding, 1024 px", "h100", lambda: drawn(LARGE, "vae")
    for target in ("h100", "v5e"):
        yield "T5-XXL, 2 x 256 tokens", target, lambda: drawn(LARGE, "text_encoder_3")
    yield "SD3.5-medium, adapters, batch 4", "h100", lambda: trained("sd35_finetune.py")
    yield "SD3.5-medium, all of it, batch 4", "h100", lambda: trained("sd35_finetune.py:full")
    whole = lambda: trained("sd35_finetune.py:full", "fsdp", LARGE, batch=8)
    for target in ("h100-8", "v5e-8"):
        yield "SD3.5-large, all of it, batch 8, fsdp", target, whole
    hosted = lambda: trained("sd35_finetune.py:full", "fsdp", LARGE, batch=8, offload=True)
    yield "the same, train.offload", "v5e-8", hosted
    base = lambda: trained("minimagen/base64.py", "fsdp")
    yield "MinImagen's base, batch 256, fsdp", "h100-8", base
    with little_effort():
        yield "the same, little effort", "v5e-8", base
    yield "emoji64, batch 512", "h100", lambda: trained("emoji64.py", batch=512)
    yield "emoji64, batch 512, fsdp", "h100-4", lambda: trained("emoji64.py", "fsdp", batch=512)
    cat = lambda: drawn("google/ddpm-cat-256", "network", batch=8, dtype="bfloat16")
    yield "cat-256, batch 8, bfloat16", "h100", cat
    with little_effort():
        yield "the same, little effort", "v5e", cat


def line(program: str, target: str, made: Callable[[], plan.Part]) -> str:
    """One row, compiled."""
    there = plan.Target.parse(target).devices()
    assert there is not None
    part, begin = made(), time.process_time()
    found = plan.compile_part(part, there)
    seconds = time.process_time() - begin
    moved = ", ".join(f"{name} {si(size)}B" for name, size in found.collectives.most_common() if size > 1e6)
    room = rates.memory(target.partition("-")[0]) or 0
    if found.needed > room:
        moved = f"does not fit: {found.needed / 2**30:.1f} of {room / 2**30:.2f} GiB"
    moved += f"; {si(found.hosted)}B in its host" if found.hosted else ""
    moved += f" ({si(found.overlapped)}B while it computes)" if found.overlapped else ""
    return f"| {program} | {target} | {seconds:.0f} | {si(found.held)}B | {si(found.temporary)}B | {moved} |"


def main(word: str = "") -> None:
    """Print the rows as they are compiled."""
    devices.find()
    print(HEAD, flush=True)
    for program, target, made in rows():
        if word in program or word in target:
            try:
                print(line(program, target, made), flush=True)
            except UserError as error:
                print(f"| {program} | {target} | {error} | | | |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
