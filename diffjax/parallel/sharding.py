"""How the parameters of large networks are split over devices: rules by name, for MMDiT and T5.

Tensor parallelism as in Megatron (arXiv:1909.08053): queries, keys, values and the first product of a feed-forward by
their outputs, what follows by its inputs, so that each pair needs one sum over devices; modulations, a third of MMDiT's
weights, by their inputs. FSDP splits every parameter by its largest axis. Both: one on each axis of a mesh.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffjax.parallel.devices import Rule, largest_axis, one_axis, placement
from diffjax.utils.errors import UserError

OUTPUTS = r"/(to_[qkv]|add_[qkv]_proj|net_0_proj|[qkv]|wi(_[01])?)/(kernel|bias)"
INPUTS = r"/(to_out_0|to_add_out|net_2|\w+_linear|o|wo)/kernel"


def rules_of(outputs: str, inputs: str) -> dict[str, tuple[Rule, ...]]:
    """The rules of each way, where tensor parallelism splits the layers of these names by their outputs and inputs."""
    pairs = ((outputs, one_axis(-1, "model")), (inputs, one_axis(-2, "model")))
    every = (*pairs, (".", largest_axis("model")))
    return {
        "fsdp": ((".", largest_axis("data")),),
        "tensor": pairs,
        "both": tuple((pattern, largest_axis("data", beside=split)) for pattern, split in every),
    }


RULES = rules_of(OUTPUTS, INPUTS)


@dataclass(frozen=True)
class Way:
    """The axes of a mesh (the first of two has two devices), the rules for it, and the axes along which the rows of a
    batch and the heads of attention are split.
    """

    axes: tuple[str, ...]
    rules: tuple[Rule, ...]
    rows: str | None
    heads: str


WAYS = {
    "fsdp": Way(("data",), RULES["fsdp"], "data", "data"),
    "tensor": Way(("model",), RULES["tensor"], None, "model"),
    "both": Way(("data", "model"), RULES["both"], "data", "model"),
}


def mesh(
    way: str,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The devices, all unless some are given, along the axes of a way. Raises `UserError` when they are too few."""
    chosen, axes = np.asarray(jax.devices() if devices is None else devices), WAYS[way].axes
    check(way, len(chosen))
    return Mesh(chosen.reshape((2, -1) if len(axes) == 2 else (-1,)), axes)


def check(way: str, count: int) -> None:
    """Raises `UserError` for a number of devices over which parameters cannot be split that way."""
    least = 2 ** len(WAYS[way].axes)
    if count % least:
        raise UserError(f"parameters cannot be split ({way}) over {count} devices: it takes a multiple of {least}")


def over(
    way: str,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Where a parameter goes, by name and shape: as `weights.load(sharding=...)` takes it. `mesh` says over what."""
    return placement(WAYS[way].rules, mesh(way, devices))
