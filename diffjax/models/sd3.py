"""Stable Diffusion 3 and 3.5 as models: published components, read as a process, a prediction, and ways to text and
pictures.

The process is a flow whose time is shifted towards noise. Networks read 1000 sigma and predict eps - x0.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, PyTree

from diffjax import build, weights
from diffjax.diffusion import grid
from diffjax.diffusion.denoise import Apply, Denoiser, thousand_sigma
from diffjax.diffusion.guide import Skip
from diffjax.diffusion.predict import Straight
from diffjax.diffusion.process import Flow, Shift
from diffjax.diffusion.refine import minus_log_sigma
from diffjax.models import prompt_cache
from diffjax.models.autoencoder import Decode, Encode, Preview
from diffjax.models.model import Defaults, Model
from diffjax.models.options import Rule
from diffjax.models.prompt_cache import remembered
from diffjax.nets import lora, tiles
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.quantize import SCHEMES
from diffjax.nets.split import Split, pad_heads
from diffjax.parallel import devices, sharding
from diffjax.text import tokenizers
from diffjax.utils import struct
from diffjax.utils.errors import UserError
from diffjax.weights import hub, lora as lora_file, single_file
from diffjax.weights.config import class_name, read_json
from diffjax.weights.folder import read_tensors
from diffjax.weights.scheduler import FlowScheduler, read_flow_scheduler
from diffjax.weights.single_file import Component

PIPELINES = tuple(f"StableDiffusion3{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
"""The names in an index of the same components."""

CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
T5, T5_RULES = "text_encoder_3", "tokenizer_3"
NEEDED = (*CLIPS, "transformer", "vae")
WEIGHTS = ("text_encoder*/*.safetensors", "vae/*.safetensors")
REST = ("model_index.json", "tokenizer*/*", "text_encoder*/*.json", "vae/*.json", *WEIGHTS)
"""What a single file has to be completed with."""

SHIFT = 3.0
CLIP_TOKENS = 77
T5_TOKENS = 256

PRESETS = {
    "large": {"steps": 40, "sampler": "dpmpp_2m", "guidance": 4.5},
    "medium": {"steps": 50, "sampler": "dpmpp_2m", "guidance": 5.0},
    "turbo": {"steps": 4, "sampler": "euler", "guidance": None},
}
"""What Stability AI samples with, by kind of model."""


@struct.dataclass
class TextEncoder:
    """A published encoder with its tokenizer; no padding is masked, as the model was trained."""

    params: PyTree
    module: nn.Module = struct.field(pytree_node=False)
    rules: tokenizers.Tokenizer = struct.field(pytree_node=False)

    def __call__(self, texts: Sequence[str], length: int) -> Any:
        """What the network makes of the texts' first `length` tokens, in numpy arrays."""
        tokens, _ = self.rules(texts, length, length)
        return tiles.whole(self.module, "__call__", self.params, tokens)


@struct.dataclass
class Texts:
    """Prompts to `context` (b, 77 + tokens, width) and `pooled` (b, p), both CLIPs' vectors.

    The context is both CLIPs' states before the last layer, side by side and filled up with zeros to `width`; behind
    them, as further tokens, those of T5, or as many zeros without it.
    """

    clips: tuple[TextEncoder, TextEncoder]
    t5: TextEncoder | None
    width: int = struct.field(pytree_node=False)
    tokens: int = struct.field(pytree_node=False, default=T5_TOKENS)

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        seen = [clip(texts, CLIP_TOKENS) for clip in self.clips]
        states = np.concatenate([one.penultimate for one in seen], axis=-1)
        states = np.pad(states, ((0, 0), (0, 0), (0, self.width - states.shape[-1])))
        nothing = np.zeros((len(texts), self.tokens, self.width), np.float32)
        more = nothing if self.t5 is None else np.asarray(self.t5(texts, self.tokens))
        pooled = np.concatenate([one.pooled for one in seen], axis=-1)
        return {"context": np.concatenate([states, more], axis=1), "pooled": pooled}


@dataclass(frozen=True)
class Kept:
    """How weights are kept: in a dtype (None: the files'), those of the transformer and of T5 in fewer bits
    ("int8", "int4"), those of the transformer split over all devices ("fsdp", "tensor", "both"); and which of several
    forms of them is read, in each component that has the `variant`. `added` are the adapters that act on them, by
    component, of each file with its strength.
    """

    dtype: Any = None
    quantize: str | None = None
    shard: str | None = None
    variant: str | None = None
    added: tuple[tuple[Mapping[str, Mapping[str, lora.Adapter | lora.Decomposed]], float], ...] = ()

    def read(self, name: str, part: Component, source: Path) -> tuple[Any, dict[str, Any]]:
        """A component's network and parameters."""
        scheme = SCHEMES[self.quantize] if self.quantize and name in ("transformer", T5) else None
        place = sharding.over(self.shard) if self.shard and name == "transformer" else None
        module, params = weights.assemble(part.config, part.tensors, str(source), self.dtype, place, scheme)
        params = lora.add(params, [(adapters.get(name, {}), strength) for adapters, strength in self.added])
        return shared(module, params, self.shard) if self.shard and name == "transformer" else (module, params)


def split_over(way: str, over: Sequence[Any] | None = None) -> Split:
    """How devices, all unless some are given, share the work of a transformer whose parameters are split that way."""
    how = sharding.WAYS[way]
    return Split(sharding.mesh(way, over), (how.rows,) if how.rows else (), how.heads)


def shared(module: MMDiT, params: PyTree, way: str) -> tuple[MMDiT, PyTree]:
    """The transformer, and its parameters that are split over all devices, with heads of zeros so that all have as
    many.
    """
    split = split_over(way)
    more = split.padded(module.num_attention_heads) - module.num_attention_heads
    padded = pad_heads(params, module.num_attention_heads, module.attention_head_dim, more)
    places = devices.shard_by_rules(padded, sharding.WAYS[way].rules, split.mesh)
    moved = lambda new, old, place: new if new is old else jax.block_until_ready(jax.device_put(new, place))
    return module.clone(split=split), jax.tree.map(moved, padded, params, places)


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance as published for SD3.5 medium, given as `guidance`: classifier-free (or another `guide`, see
    `build.guide`), and `scale` times away from the network without `layers` while the time that is over, 1 - t, is
    within (start, stop].
    """

    guidance: float = 4.0
    scale: float = 2.5
    layers: tuple[int, ...] = (7, 8, 9)
    start: float = 0.01
    stop: float = 0.2
    guide: Rule = "cfg"

    def __call__(self, denoiser: Denoiser) -> Skip:
        """Raises `UserError` for a network without such layers."""
        module = getattr(denoiser.apply, "module", None)
        if not isinstance(module, MMDiT) or max(self.layers) >= module.num_layers:
            numbers = ", ".join(map(str, self.layers))
            raise UserError(
                f"skip-layer guidance leaves out layers {numbers}, which this network has not: leave it out"
            )
        weaker = replace(denoiser, apply=Apply(module.clone(skip_layers=self.layers)))
        guided = build.guide(self.guide)(denoiser, build.scale(self.guidance) or 1.0)
        return Skip(guided, weaker, *map(jnp.float32, (self.scale, self.start, self.stop)))


def is_one(path: Path) -> bool:
    """Whether it is a single file, or the folder of a Stable Diffusion 3 pipeline (text to image, image to image,
    inpaint).
    """
    index = path / "model_index.json"
    return path.is_file() or (index.exists() and class_name(read_json(index)) in PIPELINES)


def load(
    path: Path,
    kept: Kept = Kept(),
    name: str = "",
    prompts: Iterable[str] | None = None,
    loras: Sequence[lora_file.Source] = (),
) -> Model:
    """The model of a StableDiffusion3Pipeline folder or of a single file; `name`, as of a hub id, tells its kind.

    Adapters of `loras` are added to the transformer and the text encoders, whose parameters stay as they are kept.
    With `prompts` the model knows these by heart, and the text encoders are let go before the transformer is loaded.
    What a single file lacks comes from the folder it lies in, if that is a pipeline's, else from the hub. Raises one
    `UserError` that lists what is wrong with the components.
    """
    name = name or str(path)
    if path.is_dir():
        return assemble(
            components(path, variant=kept.variant), path, read_flow_scheduler(path), kept, name, prompts, loras
        )
    if kept.variant:
        raise UserError(f"{path} is one file, of which there are no variants: leave --variant out")
    parts, folder = single_file.read(path), path.parent
    if not (folder / "model_index.json").exists():
        folder = hub.fetch(home(name, parts), patterns=REST).folder
    return assemble(components(folder, parts), folder, FlowScheduler(shift=SHIFT), kept, name, prompts, loras)


def home(name: str, parts: Mapping[str, Component]) -> str:
    """The hub id of the model that a single file is of."""
    if "transformer" not in parts:
        raise UserError(f"{name} holds no transformer; name the file that does")
    module = MMDiT(**{field: parts["transformer"].config[field] for field in ("qk_norm", "dual_attention_layers")})
    if module.qk_norm is None:
        return "stabilityai/stable-diffusion-3-medium-diffusers"
    return f"stabilityai/stable-diffusion-3.5-{kind(name, module).replace('turbo', 'large-turbo')}"


def components(
    folder: Path, given: Mapping[str, Component] = MappingProxyType({}), variant: str | None = None
) -> dict[str, Component]:
    """The components that a folder's index names, weights as views of their files, but for those that are given.

    Raises `UserError` where one is missing; T5 can be.
    """
    index = read_json(folder / "model_index.json")
    listed = [name for name in (*NEEDED, T5) if name in given or index.get(name) not in (None, [None, None])]
    if absent := [name for name in NEEDED if name not in listed]:
        raise UserError(f"{folder / 'model_index.json'} has no {', '.join(absent)}: only {T5} can be left out")
    read = lambda part: Component(read_json(part / "config.json"), read_tensors(part, variant))
    return {name: given[name] if name in given else read(folder / name) for name in listed}


def assemble(
    parts: Mapping[str, Component],
    folder: Path,
    scheduler: FlowScheduler,
    kept: Kept,
    name: str,
    prompts: Iterable[str] | None,
    loras: Sequence[lora_file.Source] = (),
) -> Model:
    """The model of components, with the tokenizers of a folder."""
    modules = _check(parts, folder)
    kept = replace(kept, added=tuple((lora_file.read(source.file, modules), source.strength) for source in loras))
    load_texts = functools.partial(texts, parts, folder, kept)
    if prompts is None:
        text = load_texts()
    else:
        reads = [
            (source.digest, source.strength)
            for source, (of, _) in zip(loras, kept.added)
            if of.keys() - {"transformer"}
        ]
        text = remembered(_encoder_key(parts, folder, kept, name, *reads), ["", *prompts], load_texts)
    transformer, params = kept.read("transformer", parts["transformer"], folder / "transformer")
    vae, vae_params = kept.read("vae", parts["vae"], folder / "vae")
    process = Shift(Flow(), scheduler.shift)
    coder = Encode(vae_params, vae)
    return Model(
        Denoiser(process, Straight(), params, Apply(transformer), thousand_sigma),
        (transformer.sample_size, transformer.sample_size, transformer.in_channels),
        defaults(scheduler, kind(name, transformer)),
        text=text,
        decode=Decode(vae_params, vae),
        encode=coder,
        preview=Preview(coder),
        factor=vae.factor,
        multiple=vae.factor * transformer.patch_size,
        largest=vae.factor * transformer.patch_size * transformer.pos_embed_max_size,
        name=name,
    )


def texts(parts: Mapping[str, Component], folder: Path, kept: Kept) -> Texts:
    """The text encoders."""

    def read(name: str, rules: str) -> TextEncoder:
        module, params = kept.read(name, parts[name], folder / name)
        return TextEncoder(params, module, tokenizers.load(folder / rules))

    width = parts["transformer"].config.get("joint_attention_dim", MMDiT.joint_attention_dim)
    small, large = (read(*names) for names in CLIPS.items())
    return Texts((small, large), read(T5, T5_RULES) if T5 in parts else None, width)


def _encoder_key(
    parts: Mapping[str, Component], folder: Path, kept: Kept, name: str, *adapters: tuple[str, float]
) -> str:
    """What the encoded prompts are kept under; a single file may hold text encoders, and `adapters` change them."""
    files = sorted(
        file for pair in (*CLIPS.items(), (T5, T5_RULES)) for part in pair for file in (folder / part).glob("*")
    )
    files += [Path(name)] if Path(name).is_file() else []
    return prompt_cache.key(files, sorted(parts), kept.dtype, kept.quantize, kept.variant, T5_TOKENS, *adapters)


def kind(name: str, module: MMDiT) -> str:
    """large, medium or turbo: turbo differs from large by its name alone, a file's, a folder's or that of a
    hub's cache.
    """
    path = Path(name)
    if "turbo" in (path.parents[1] if path.parent.name == "snapshots" else path).name.lower():
        return "turbo"
    return "medium" if module.dual_attention_layers or module.qk_norm is None else "large"


def defaults(scheduler: FlowScheduler, kind: str) -> Defaults:
    """What the publisher samples a kind of model with."""
    return Defaults(
        **PRESETS[kind],
        grid=functools.partial(published_grid, scheduler),
        batch=1,
        solver_clock=minus_log_sigma,
        null_prompt="",
    )


def published_grid(scheduler: FlowScheduler, steps: int) -> Float[np.ndarray, "steps 2"]:
    """Even times from 1 to the *shifted* sigma of 1 / T, then 0, and these are shifted again by the process.

    So it was published: for any number of steps the last sigma before 0 is 0.0089286 with a shift of 3.
    """
    last = 1 / scheduler.num_train_timesteps
    last = scheduler.shift * last / (1 + (scheduler.shift - 1) * last)
    return grid.pairs(np.append(np.linspace(1, last, steps), 0.0))


def _check(parts: Mapping[str, Component], folder: Path) -> dict[str, nn.Module]:
    """The networks of the components.

    Raises one error for all whose configuration or keys are wrong, or one for text encoders of another model.
    """
    modules, wrong = {}, []
    for name, part in parts.items():
        try:
            modules[name] = weights.check(part.config, part.tensors, name)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError(f"{folder}: {'; '.join(wrong)}")
    clips, transformer = [modules[name] for name in CLIPS], modules["transformer"]
    width, pooled = sum(clip.hidden_size for clip in clips), sum(clip.projection_dim for clip in clips)
    deep = modules[T5].d_model if T5 in modules else transformer.joint_attention_dim
    if width > deep or (deep, pooled) != (transformer.joint_attention_dim, transformer.pooled_projection_dim):
        raise UserError(f"{folder}: the text encoders are of another model than the transformer; download it again")
    return modules
