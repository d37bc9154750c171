"""Accelerators that are not here: devices that programs are compiled for and never run on.

The compilers come with jax's plugins, libtpu and the CUDA one, and need neither driver nor device.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from diffjax.utils.errors import UserError, unknown
from diffjax.utils.install import has_compiler, to_install

GIB = 2**30

POOL = 0.75
"""The share of a GPU's memory that jax takes as it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another."""

GPUS_A_HOST = 8

MODULE = Path("/sys/module/nvidia/version")
"""The version of NVIDIA's kernel module, there where it is loaded."""

NO_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu would ask the network of Google Cloud for, and that several processes may load it."""


LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 49152,
}
"""What all CUDA devices from compute capability 8.0 on have in common."""


@dataclass(frozen=True)
class Tpu:
    """A TPU as its compiler knows it: the slices by their number of devices, and the bytes of memory of a device."""

    slices: Mapping[int, str]
    memory: float
    platform = "tpu"

    def devices(self, name: str, count: int) -> Any:
        from jax.experimental import topologies

        size = min(size for size in self.slices if size >= count)
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if self.slices[size] == "1x1x1" else {}
        return topologies.get_topology_desc(f"{name}:{self.slices[size]}", "tpu", **bounds).devices


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, in the numbers that XLA's `GpuDeviceInfoProto` asks for; from the vendor's data sheets and
    architecture white papers.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    bandwidth: float
    cache: int
    shared: int
    total: float
    platform = "cuda"

    @property
    def memory(self) -> float:
        """The bytes that a program can have: those of jax's pool."""
        return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", POOL)) * self.total

    def devices(self, name: str, count: int) -> Any:
        from jax.experimental import topologies

        hosts = -(-count // GPUS_A_HOST)
        layout = f"1x{hosts}x{min(count, GPUS_A_HOST)}"
        return topologies.get_topology_desc(name, "cuda", target_config=self._config(), topology=layout).devices

    def _config(self) -> str:
        """The text of XLA's `GpuTargetConfigProto`."""
        major, minor = self.capability
        own = {
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": int(self.total),
        }
        numbers = " ".join(f"{key}: {value}" for key, value in (LIMITS | own).items())
        feature = "feature_extension: ACCELERATED_FEATURES" if self.capability == (9, 0) else ""
        cuda = " ".join(f'{name}_version: "12.9.0"' for name in ("runtime", "driver", "compile_time_toolkit"))
        return f"""
            gpu_device_info {{
              {numbers}
              cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
              device_vendor: "NVIDIA Corporation" name: "{self.kind}" dnn_version: "9.8.0" {cuda}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
            device_description_str: "{self.kind}"
        """


FLAT = {1: "1x1x1", 4: "2x2", 8: "2x4", 16: "4x4"}
DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
TARGETS = {
    "v4": Tpu({2 * size: shape for size, shape in DEEP.items()}, 15.25 * GIB),
    "v5e": Tpu(FLAT, 15.75 * GIB),
    "v5p": Tpu(DEEP, 95.74 * GIB),
    "v6e": Tpu(FLAT, 31.25 * GIB),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 2.039e12, 40 * 2**20, 164 * 1024, 80e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 3.352e12, 50 * 2**20, 228 * 1024, 80e9),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 4.8e12, 50 * 2**20, 228 * 1024, 141e9),
}
"""Every kind that `absent` knows. A TPU's memory is what its compiler says is available, a GPU's that of its name.

A v4's devices are its chips' two cores, which a real one joins.
"""


def absent(kind: str, count: int = 1) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """`count` devices of a kind ("v4", "v5e", "v5p", "v6e", "a100", "h100", "h200") to compile for; none need be here.

    Programs are compiled for them with `jax.jit(f).lower(*shapes).compile()`, where every
    `ShapeDtypeStruct` has a sharding over them; nothing can be run. They are the first of the smallest slice (TPU) or
    of hosts of eight (GPU). Raises `UserError` for a kind or number that is not known, and where the plugin with
    the kind's compiler is not installed.
    """
    target = of(kind)
    if not has_compiler(target.platform):
        raise UserError(f"the compiler for {kind} is not installed: {to_install(target.platform)}")
    most = max(target.slices) if isinstance(target, Tpu) else 256
    if not 1 <= count <= most:
        raise UserError(f"{kind} is compiled for on 1 to {most} devices, not {count}: choose such a number")
    skip_search()
    try:
        return list(target.devices(kind, count)[:count])
    except NotImplementedError as error:  # what jax says of a platform that did not start
        raise UserError(
            "jax started without its CUDA plugin, which found no driver: set JAX_PLATFORMS=cpu and start again"
        ) from error


def of(kind: str) -> Tpu | Gpu:
    """What is known of a kind. Raises `UserError` for another."""
    if kind not in TARGETS:
        raise unknown("device to compile for", kind, TARGETS)
    return TARGETS[kind]


def skip_search() -> None:
    """Spare jax's plugins the search for devices that are not here, in which they wait and complain.

    What counts is read when the plugins are loaded, at the first look for devices.
    """
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # which jax sets on a host without a TPU
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
    if not (MODULE.exists() or shutil.which("nvidia-smi")):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
