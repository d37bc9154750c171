"""Whether the same program gives the same bits again, and what to tell XLA for it.

XLA's programs are deterministic on CPUs and TPUs. On GPUs some operations add in an order that changes from run to run
(scatters and some gradients), and autotuning takes the kernels that were quickest when it looked, which may be others
on the next machine or day.
"""

import os
from typing import Any

import jax

ASKED = "DIFFJAX_DETERMINISTIC"
ORDERED, CHOSEN = "xla_gpu_exclude_nondeterministic_ops", "xla_gpu_autotune_level"
BOTH = "xla_gpu_deterministic_ops"
"""Of XLA's flags: no operation whose order changes; how much is autotuned, 0 for nothing; the two together."""


def ask_xla() -> None:
    """Where `DIFFJAX_DETERMINISTIC=1`, add to `XLA_FLAGS` what makes GPUs deterministic; flags that are there win.

    Must come before jax starts a device.
    """
    if os.environ.get(ASKED) != "1":
        return
    there = flags()
    added = [f"--{name}={value}" for name, value in ((ORDERED, "true"), (CHOSEN, "0")) if name not in there]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *added]).strip()


def flags() -> dict[str, str]:
    """What `XLA_FLAGS` says, by name; a flag without a value is "true"."""
    words = [word.lstrip("-").partition("=") for word in os.environ.get("XLA_FLAGS", "").split()]
    return {name: value or "true" for name, _, value in words}


def is_bitwise(backend: str) -> bool:
    """Whether the same program on the same kind of device gives the same bits in every run, by what XLA was told."""
    said = flags()
    on = lambda name: said.get(name, "false").lower() in ("true", "1")
    return backend != "gpu" or on(BOTH) or (on(ORDERED) and said.get(CHOSEN) == "0")


def facts() -> dict[str, Any]:
    """What the bits of a result depend on beside its recipe: for manifests and runs."""
    precision = jax.config.values["jax_default_matmul_precision"]
    return {"bitwise": is_bitwise(jax.default_backend()), "xla_flags": flags(), "matmul_precision": precision}
