"""Other people's checkpoints, in and out: `load` and `save` for one component folder (config.json and its weights).

A class of component is one `Format`, in a module of its own; `FORMATS` says which serves which published class and
which network of ours.
"""

import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.nets.quantize import Scheme
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import safetensors
from diffjax.weights.config import class_name, read_json
from diffjax.weights.folder import read_tensors
from diffjax.weights.format import Format
from diffjax.weights.names import Names, Params, Placement, checked, read_params, write_params
from diffjax.weights.scheduler import Scheduler, write_scheduler

FORMATS = {
    # published class: (our network, the module here whose FORMAT it is)
    "UNet2DModel": ("diffjax.nets.unet.UNet", "diffjax.weights.unet2d"),
    "T5EncoderModel": ("diffjax.nets.t5.T5Encoder", "diffjax.weights.t5"),
    "T5ForConditionalGeneration": ("diffjax.nets.t5.T5Encoder", "diffjax.weights.t5"),
    "T5WithLMHeadModel": ("diffjax.nets.t5.T5Encoder", "diffjax.weights.t5"),
    "CLIPTextModelWithProjection": ("diffjax.nets.clip.ClipText", "diffjax.weights.clip"),
    "SD3Transformer2DModel": ("diffjax.nets.mmdit.MMDiT", "diffjax.weights.mmdit"),
    "AutoencoderKL": ("diffjax.nets.vae.AutoencoderKL", "diffjax.weights.vae"),
    "BertModel": ("diffjax.nets.bert.Bert", "diffjax.weights.bert"),
    "UNetUnconditionalModel": ("diffjax.nets.unet.UNet", "diffjax.weights.unet2d"),  # its name in the first releases
}


def load(
    path: str | Path,
    dtype: Any = None,
    sharding: Placement | None = None,
    scheme: Scheme | None = None,
    variant: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The network of a component folder, a flax module of the class that its configuration names, and its parameters.

    With `dtype=None` parameters keep the file's dtype, and the network computes in it; else both are `dtype`. Tensors
    go from the file to their devices one at a time; `sharding(path, shape)` says where (the default device without it),
    and `scheme` quantises large kernels on the way. `variant`, as "fp16" or "ema", is which of several forms of the
    weights is read (`folder.choose`). Raises `UserError` for a class or a field that is not implemented (naming it),
    for weights that are damaged or do not fit, and for several forms of which none can be said to be meant.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    return assemble(config, read_tensors(folder, variant), str(folder), dtype, sharding, scheme)


def describe(path: str | Path) -> Any:
    """The network of a component folder, from its config.json alone.

    Raises `UserError` for a class or a field that is not implemented, naming it.
    """
    config = read_json(Path(path) / "config.json")
    return _format(class_name(config), str(path)).module(config, str(path))


def assemble(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    source: str,
    dtype: Any = None,
    sharding: Placement | None = None,
    scheme: Scheme | None = None,
) -> tuple[Any, dict[str, Any]]:
    """`load` of a configuration and tensors that were read already; errors name `source`."""
    kind = _format(class_name(config), source)
    module = kind.module(config, source)
    params = read_params(tensors, param_shapes(module, kind), kind.names(module), source, dtype, sharding, scheme)
    compute = _common_dtype(params, source)
    return module.clone(dtype=compute, param_dtype=compute), params


def check(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str) -> Any:
    """The network that `assemble` would make, or its `UserError`, before anything is moved to a device."""
    kind = _format(class_name(config), source)
    module = kind.module(config, source)
    checked(tensors, param_shapes(module, kind), kind.names(module), source)
    return module


def save(path: str | Path, module: nn.Module, params: Params) -> None:
    """Write a component folder that `load`, and the library of its published class, read back to the same numbers.

    Raises `UserError` for a network, or a part of one, that has no published class.
    """
    folder = Path(path)
    kind = _format_of(module)
    config = kind.config(module)
    tensors = write_params(params, kind.names(module))
    safetensors.write(folder / f"{kind.stem}.safetensors", tensors, {"format": "pt"})
    files.write_json(folder / "config.json", config)


def save_pipeline(
    path: str | Path, module: nn.Module, params: Params, scheduler: Scheduler, classes: Sequence[str] = ()
) -> None:
    """Write a model folder that `diffusers.DDPMPipeline.from_pretrained` (DDIMPipeline, for its scheduler) loads.

    The names of the classes go where DiTPipeline keeps them, in `id2label` of `model_index.json`.
    """
    folder = Path(path)
    save(folder / "unet", module, params)
    write_scheduler(folder, scheduler)
    index = {
        "_class_name": scheduler.class_name.replace("Scheduler", "Pipeline"),
        "scheduler": ["diffusers", scheduler.class_name],
        "unet": ["diffusers", "UNet2DModel"],
    }
    named = {"id2label": dict(enumerate(classes))} if classes else {}
    files.write_json(folder / "model_index.json", index | named)


def class_names(path: str | Path) -> tuple[str, ...]:
    """The names of the classes in a model folder, by `id2label` of its `model_index.json`; none where it says nothing
    of them.

    Raises `UserError` where they are not numbered from 0.
    """
    index = Path(path) / "model_index.json"
    named = read_json(index).get("id2label") if index.exists() else None
    if not named:
        return ()
    if not isinstance(named, dict) or sorted(named) != sorted(map(str, range(len(named)))):
        raise UserError(f"{index}: id2label must name the classes of the numbers from 0; mend or remove it")
    return tuple(str(named[str(i)]) for i in range(len(named)))


def shapes(module: nn.Module) -> Params:
    """The shapes of the parameters of any network that has a published class."""
    return param_shapes(module, _format_of(module))


def names_of(module: nn.Module) -> Names:
    """The keys under which the parameters of such a network are published."""
    return _format_of(module).names(module)


@functools.lru_cache(maxsize=16)
def param_shapes(module: nn.Module, kind: Format) -> Params:
    """The shapes of a network's parameters, not to be changed; nothing is computed."""
    variables = jax.eval_shape(lambda *inputs: module.init(jax.random.key(0), *inputs), *kind.example(module))
    return variables["params"]


def _format(name: str | None, source: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"{source} is for {name!a}; diffjax reads {', '.join(FORMATS)}")
    return importlib.import_module(FORMATS[name][1]).FORMAT


def _format_of(module: nn.Module) -> Format:
    network = f"{type(module).__module__}.{type(module).__qualname__}"
    for ours, where in FORMATS.values():
        if ours == network:
            return importlib.import_module(where).FORMAT
    raise UserError(f"{network} has no published class to be saved as; keep the run's own checkpoint")


def _common_dtype(params: Params, source: str) -> Any:
    """The dtype to compute in: that of all floating parameters, or the widest of them."""
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if any(dtype.itemsize == 1 for dtype in dtypes):
        raise UserError(f"{source} keeps its weights in 8 bits: name the dtype to compute in, for example bfloat16")
    return jnp.result_type(*dtypes)
