"""Drawing with Stable Diffusion 3 and 3.5, and training on from it: the parts of the job, and the ways to fit them into
a device's memory.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffjax import build, weights
from diffjax.diffusion.denoise import Apply, Denoiser, thousand_sigma
from diffjax.diffusion.predict import Straight
from diffjax.diffusion.process import Flow, Shift
from diffjax.models import sd3
from diffjax.models.model import Defaults, Model
from diffjax.models.options import Asked, sides
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.quantize import SCHEMES, quantize_kernels
from diffjax.parallel import sharding
from diffjax.parallel.devices import shard_by_rules
from diffjax.plan.compiled import placed
from diffjax.plan.cost import Part, tree_size
from diffjax.plan.programs import Job, Way, apply, calls, chosen, guided_share, titled, training
from diffjax.train.finetune import FineTuning
from diffjax.utils.errors import UserError
from diffjax.weights import hub, single_file
from diffjax.weights.scheduler import FlowScheduler

TEXTS = dict.fromkeys(sd3.CLIPS, sd3.CLIP_TOKENS) | {sd3.T5: sd3.T5_TOKENS}
"""Text encoders and the tokens that each reads."""

COUNTS = (2, 4, 8)
"""The numbers of devices that the transformer is split over."""


def drawing(
    folder: Path,
    asked: Asked,
    name: str,
    shard: str | None = None,
    given: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Job:
    """Drawing with a published latent model, of which only the configurations need to be there, or those of the
    networks that are not `given`; its transformer split over devices in the way `shard`.
    """
    modules = described(folder, asked.dtype or "bfloat16", given)
    network, vae = modules["transformer"], modules["vae"]
    scheduler = FlowScheduler(shift=sd3.SHIFT)
    how = chosen(asked, sd3.defaults(scheduler, sd3.kind(name, network)))
    size = sides(asked.size or network.sample_size * vae.factor)
    share = guided_share(how, Shift(Flow(), scheduler.shift))
    parts = components(modules, how, asked.num, size, share)
    if shard:
        parts["transformer"] = split(parts["transformer"], network, shard)
    title, batches = titled(name, size, how, asked.num), math.ceil(asked.num / how.batch)
    every = (Way(f"texts first, --shard {shard}", _staged(parts)),) if shard else ways(parts)
    return Job(title, tuple(parts.values()), "transformer", how.steps, asked.num, ways=every, batches=batches)


def split(part: Part, module: MMDiT, way: str) -> Part:
    """The transformer's part split over devices."""

    def over(devices: Sequence[Any]) -> tuple[Any, PyTree, tuple[Any, ...]]:
        how = sd3.split_over(way, devices)
        shared, whole = module.clone(split=how), NamedSharding(how.mesh, PartitionSpec())
        params = weights.shapes(shared)
        places = shard_by_rules(params, sharding.WAYS[way].rules, how.mesh)
        program = jax.jit(functools.partial(apply, shared), out_shardings=whole)
        return program, {"params": placed(params, places)}, placed(part.given, whole)

    return replace(part, over=over, splits=True)


def of_file(path: Path, asked: Asked, shard: str | None = None) -> Job:
    """Drawing with a single file: of the weights only the shapes are read, and what it lacks is that of its family.

    Raises `UserError` for a file that holds no transformer.
    """
    parts, folder = single_file.read(path), path.parent
    if not (folder / "model_index.json").exists():
        folder = hub.configs(sd3.home(str(path), parts))
    given = {name: weights.check(part.config, part.tensors, name) for name, part in parts.items()}
    return drawing(folder, asked, str(path), shard, given)


def finetuning(config: ConfigDict, asked: Asked, shard: str | None = None, commit: str | None = None) -> list[Job]:
    """Training on from a published model, and drawing with what it becomes. Raises `UserError` for a model that is no
    Stable Diffusion 3.
    """
    folder = hub.configs(config.model, commit or config.get("revision") or None)
    if folder.is_file() or not (folder / "transformer").is_dir():
        raise UserError(f"{config.model} is no Stable Diffusion 3: give the folder or the hub id of one as `model`")
    dtype = build.named("dtype", build.DTYPES, config.dtype)
    modules = described(folder, config.dtype)
    network, vae = modules["transformer"].clone(remat=config.remat), modules["vae"]
    network = network if config.lora else network.clone(param_dtype=jnp.float32)
    params, scheduler = weights.shapes(network), FlowScheduler(shift=sd3.SHIFT)
    base = Model(
        Denoiser(Shift(Flow(), scheduler.shift), Straight(), params, Apply(network.clone(dtype=dtype)), thousand_sigma),
        (network.sample_size, network.sample_size, network.in_channels),
        sd3.defaults(scheduler, sd3.kind(config.model, network)),
        factor=vae.factor,
        multiple=vae.factor * network.patch_size,
        largest=vae.factor * network.patch_size * network.pos_embed_max_size,
        name=config.model,
    )
    found, key = FineTuning.on(config, base), jax.random.key(0)
    state = jax.eval_shape(lambda params: found.first_state(params, key), params)
    drawn = drawing(folder, replace(asked, size=asked.size or config.data.size), config.name, shard)
    return [training(found, shard, state), drawn]


def described(folder: Path, dtype: str, given: Mapping[str, nn.Module] = MappingProxyType({})) -> dict[str, Any]:
    """The networks of a folder's configurations, in the order in which they run, but for those that are given; T5 may
    be missing.
    """
    listed = (*TEXTS, "transformer", "vae")
    names = [name for name in listed if name != sd3.T5 or name in given or (folder / name).is_dir()]
    chosen = build.named("dtype", build.DTYPES, dtype)
    found = {name: given[name] if name in given else weights.describe(folder / name) for name in names}
    return {name: module.clone(dtype=chosen, param_dtype=chosen) for name, module in found.items()}


def components(
    modules: Mapping[str, nn.Module], how: Defaults, num: int, size: tuple[int, int], share: float
) -> dict[str, Part]:
    """The parts of a job: the texts once, the transformer at every step (`share` of them guided), the decoder for every
    batch of pictures.
    """
    branches = 2 if share else 1
    rows, network, vae = how.batch * branches, modules["transformer"], modules["vae"]
    cells = [side // vae.factor for side in size]
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    context = shape(rows, TEXTS["text_encoder"] + TEXTS[sd3.T5], network.joint_attention_dim)
    latents = (
        shape(rows, *cells, network.in_channels),
        shape(rows),
        context,
        shape(rows, network.pooled_projection_dim),
    )
    given = {name: (jax.ShapeDtypeStruct((branches, length), jnp.int32),) for name, length in TEXTS.items()}
    given |= {"transformer": latents, "vae": (shape(how.batch, *cells, vae.latent_channels),)}
    often = dict.fromkeys(TEXTS, 1) | {"transformer": calls(how, num, share), "vae": math.ceil(num / how.batch)}
    return {name: _part(name, module, given[name], often[name]) for name, module in modules.items()}


def _part(name: str, module: nn.Module, given: tuple[Any, ...], calls: float) -> Part:
    held = {"params": weights.shapes(module)}
    call = functools.partial(_decode if name == "vae" else apply, module)
    return Part(name, call, held, (*given, {}), tree_size(held), calls)


def _decode(module: nn.Module, variables: PyTree, z: Any, named: PyTree) -> PyTree:
    return module.apply(variables, z, method="decode", **named)


def ways(parts: Mapping[str, Part]) -> tuple[Way, ...]:
    """From the simplest to those that need least: texts first, fewer bits, T5 left out, split over devices."""
    large = [name for name in ("transformer", sd3.T5) if name in parts]
    small = {bits: dict(parts) | {name: _quantized(parts[name], bits) for name in large} for bits in SCHEMES}
    first, lighter = "texts first", {}
    if sd3.T5 in parts:
        lighter["T5 in int8"] = dict(parts) | {sd3.T5: small["int8"][sd3.T5]}
        lighter["no T5"] = {name: part for name, part in parts.items() if name != sd3.T5}
    return (
        Way("all components together", (tuple(parts.values()),)),
        Way(first, _staged(parts)),
        *(Way(f"{first}, {name}", _staged(some)) for name, some in lighter.items()),
        *(Way(f"{first}, --quantize {bits}", _staged(some)) for bits, some in small.items()),
        *(Way(f"{first}, --shard over {n}", _staged(parts), n) for n in COUNTS),
    )


def _staged(parts: Mapping[str, Part]) -> tuple[tuple[Part, ...], ...]:
    return tuple(parts[name] for name in TEXTS if name in parts), (parts["transformer"], parts["vae"])


def _quantized(part: Part, bits: str) -> Part:
    held = {"params": jax.eval_shape(lambda params: quantize_kernels(params, SCHEMES[bits]), part.held["params"])}
    return replace(part, held=held)
