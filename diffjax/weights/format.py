"""One published class of component: its configuration, its module and its names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.weights.names import Names

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Format(Generic[Network]):
    """How components of one class lie on disk.

    `module(config, path)` builds the network of a config.json, raising `UserError` for what is not implemented, and
    `config(module)` is its inverse; `example(module)` gives arguments (shapes are enough) for `module.init`;
    `names(module)` maps parameters to keys; `stem` begins the name of the weights' file.
    """

    module: Callable[[Mapping[str, Any], str], Network]
    config: Callable[[Network], dict[str, Any]]
    example: Callable[[Network], tuple[Any, ...]]
    names: Callable[[Network], Names]
    stem: str = "diffusion_pytorch_model"


def known_fields(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a transformers configuration what describes the network; the rest steers training, generation and logging."""
    return {name: value for name, value in config.items() if name in fields}


def tokens_example(module: nn.Module) -> tuple[Any, ...]:
    """The shape of tokens, for any text encoder."""
    return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)
