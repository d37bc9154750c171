"""Devices: find them, say which one is used, and spread arrays over them.

Data parallelism is `jit` over arrays placed by `layout.shard_batch` and `replicate`; FSDP and tensor parallelism are
the same `jit` with parameters placed by `shard_by_rules`. The compiler derives the communication from the placement.
"""

import ctypes
import functools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from diffjax.parallel import hosts
from diffjax.parallel.targets import MODULE, absent as absent, skip_search
from diffjax.utils.determinism import ask_xla
from diffjax.utils.errors import UserError
from diffjax.utils.files import home
from diffjax.utils.progress import counted

Meshes = Mesh | AbstractMesh
Split = Callable[[tuple[int, ...], Meshes], PartitionSpec]
Rule = tuple[str, PartitionSpec | Split]

# From glibc's malloc.h: never trim the heap, grow it by 256 MB at least, and take large arrays from it too.
MALLOPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28), "M_MMAP_MAX": (-4, 0)}


def start() -> None:
    """What every command that computes does first: join the hosts, say which device is used, keep programs and memory.

    Raises `UserError` when jax cannot start the device that it was told to use.
    """
    ask_xla()
    join_hosts()
    keep_compiled()
    find()
    announce()
    if jax.default_backend() == "cpu":
        keep_memory()


def find() -> None:
    """Start jax's devices. Raises `UserError` when it has none of those that it was told to use."""
    skip_search()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        why = f" (JAX_PLATFORMS={asked} lets it use nothing else)" if asked else ""
        raise UserError(f"jax finds no device to run on{why}: `diffjax doctor` says why") from error


def join_hosts() -> None:
    """Join the other hosts of this job, when the environment says that there are any.

    Either `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set, or
    `DIFFJAX_MULTIHOST=1` lets jax ask Slurm, Open MPI, Kubernetes or the TPU pod. Raises `UserError` when they are
    not found.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        try:
            count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        except (KeyError, ValueError) as error:
            message = "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID (whole numbers) too"
            raise UserError(message) from error
        _join(f"the other hosts at JAX_COORDINATOR_ADDRESS={address}: start all of them", address, count, index)
    elif os.environ.get("DIFFJAX_MULTIHOST") == "1":
        clusters = "a cluster (Slurm, Open MPI, Kubernetes, TPU pod)"
        _join(f"{clusters}, which DIFFJAX_MULTIHOST=1 asks for: unset it, or set JAX_COORDINATOR_ADDRESS")


def _join(sought: str, *where: Any) -> None:
    try:
        hosts.join(*where)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"jax does not find {sought}") from error


def keep_compiled() -> None:
    """Keep compiled programs in `home()/xla` from one run to the next, unless jax was told another folder."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(home() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_memory() -> None:
    """Let glibc keep what is freed for the next step, which allocates the same large arrays again.

    Returned to the system, every page of them would have to be cleared and mapped anew: a sixth of a large
    U-Net's time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in MALLOPT.values():
            libc.mallopt(option, value)


def describe() -> str:
    """The devices in words, such as `2 x NVIDIA H100 80GB HBM3` or `CPU (2 cores)`."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        virtual = f", as {counted(len(devices), 'device')}" if len(devices) > 1 else ""
        return f"CPU ({counted(os.cpu_count() or 1, 'core')}{virtual})"
    return f"{len(devices)} x {devices[0].device_kind}"


def announce() -> None:
    """Print one line naming the device, and one more if the host has an NVIDIA GPU that jax does not use."""
    if jax.process_index() != 0:
        return
    print(f"device: {describe()}, jax {jax.__version__}", file=sys.stderr)
    if jax.default_backend() == "cpu" and (driver := nvidia_driver()):
        print(
            f"warning: NVIDIA driver {driver} is here but jax uses the CPU: run `diffjax doctor` to see why",
            file=sys.stderr,
        )


def nvidia_driver() -> str | None:
    """The version of the host's NVIDIA driver, as its kernel module or `nvidia-smi` says; None without one."""
    if MODULE.exists():
        return MODULE.read_text().strip()
    command = ["--query-gpu=driver_version", "--format=csv,noheader"]
    return (nvidia_smi(*command) or "").strip().partition("\n")[0] or None


def nvidia_smi(*arguments: str) -> str | None:
    """What `nvidia-smi` prints; None where there is none or it fails."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """All devices (of all hosts), or the given ones, along one axis named `data`."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with a copy of every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def placement(rules: Sequence[Rule], mesh: Meshes) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The function (name, shape) -> sharding of rules, as `weights.load` takes it.

    A leaf is named by its path, as in `blocks/attention/query/kernel`; the first rule whose regular expression is
    found in the name gives its `PartitionSpec`, itself or as a function (shape, mesh) -> spec such as `largest_axis`.
    No rule: replicated. Raises `UserError` where a spec does not fit the leaf's shape.
    """

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())
        spec = spec if isinstance(spec, PartitionSpec) else spec(shape, mesh)
        if not _fits(shape, spec, mesh):
            raise UserError(f"{name} of shape {shape} cannot be split as {spec}: change its rule")
        return NamedSharding(mesh, spec)

    return place


def shard_by_rules(tree: Any, rules: Sequence[Rule], mesh: Meshes) -> Any:
    """`placement` of every leaf (array or `ShapeDtypeStruct`), for `jax.device_put` or as `in_shardings`."""
    place = placement(rules, mesh)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: place(name(path), leaf.shape), tree)


def _fits(shape: tuple[int, ...], spec: PartitionSpec, mesh: Meshes) -> bool:
    parts = [math.prod(mesh.shape[name] for name in np.atleast_1d(axes)) if axes else 1 for axes in spec]
    return len(parts) <= len(shape) and all(size % part == 0 for size, part in zip(shape, parts))


def largest_axis(name: str, beside: Split | None = None) -> Split:
    """The rule of FSDP (ZeRO stage 3, Rajbhandari et al. 2020): split a leaf's largest axis among those that the mesh
    axis `name` divides, and that the rule `beside` left whole; a leaf without one is not split further.
    """

    def rule(shape: tuple[int, ...], mesh: Meshes) -> PartitionSpec:
        spec = list(beside(shape, mesh)) if beside else []
        spec += [None] * (len(shape) - len(spec))
        sizes = [size if size % mesh.shape[name] == 0 and not spec[i] else 0 for i, size in enumerate(shape)]
        if any(sizes):
            spec[int(np.argmax(sizes))] = name
        return PartitionSpec(*spec) if any(spec) else PartitionSpec()

    return rule


def one_axis(axis: int, name: str) -> Split:
    """The rule of tensor parallelism: split this axis over the mesh axis `name` if that divides it."""

    def rule(shape: tuple[int, ...], mesh: Meshes) -> PartitionSpec:
        if len(shape) < abs(axis) or shape[axis] % mesh.shape[name]:
            return PartitionSpec()
        return PartitionSpec(*(name if i == axis % len(shape) else None for i in range(len(shape))))

    return rule
