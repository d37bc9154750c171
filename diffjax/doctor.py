"""What is wrong with this machine: facts are gathered first, then each check is a function of the facts alone."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from diffjax.parallel import devices, targets
from diffjax.utils.files import home

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "diffjax-onednn")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
TPU_CHIPS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # PCI device ids, v2 to v7
PATIENCE = 300
"""Seconds in which jax starts."""

OLDEST_DRIVER = {"12": 525, "13": 580}  # of each CUDA major, NVIDIA's compatibility table


@dataclass(frozen=True)
class Device:
    """A device of jax; memory in bytes, None where the backend does not say."""

    kind: str
    memory: int | None = None


@dataclass(frozen=True)
class HostGpu:
    """A GPU as the driver sees it, before jax touched it; memory in bytes."""

    name: str
    used: int
    total: int


@dataclass(frozen=True)
class Holder:
    """Another process with memory (bytes) on a GPU."""

    pid: int
    name: str
    used: int


@dataclass(frozen=True)
class Facts:
    """All that the checks look at. `platform` is what jax computes on: cpu, gpu, tpu, or None when it cannot start;
    `death` is the signal that ends a process in which it starts.
    """

    python: str = ""
    executable: str = "python"
    packages: dict[str, str] = field(default_factory=dict)
    platform: str | None = "cpu"
    summary: str = ""
    devices: tuple[Device, ...] = ()
    error: str = ""
    death: str = ""
    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[HostGpu, ...] = ()
    holders: tuple[Holder, ...] = ()
    nvidia_card: bool = False
    tpu_chip: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    home: str = ""
    caches: dict[str, int] = field(default_factory=dict)
    free_disk: int = 0

    @property
    def cuda_build(self) -> str | None:
        """The CUDA major of the installed plugin, "12" or "13"; None for the CPU build."""
        return next((major for major in OLDEST_DRIVER if f"jax-cuda{major}-plugin" in self.packages), None)

    @property
    def driver_major(self) -> int:
        """580 of driver 580.95.05; 0 without one."""
        return int((self.driver or "0").partition(".")[0])


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the command (or the one sentence) that mends it."""

    what: str
    fix: str


def cpu_only_jax(facts: Facts) -> Problem | None:
    if facts.driver and not facts.cuda_build:
        return Problem(f"NVIDIA driver {facts.driver} is here but jax is the CPU-only build", _install_cuda(facts))


def plugin_version(facts: Facts) -> Problem | None:
    wanted = facts.packages.get("jaxlib")
    for name in PLUGINS[:-1]:
        if facts.packages.get(name, wanted) != wanted:
            return Problem(f"{name} {facts.packages[name]} does not belong to jaxlib {wanted}", _install_cuda(facts))


def jaxlib_version(facts: Facts) -> Problem | None:
    jax, jaxlib = facts.packages.get("jax", ""), facts.packages.get("jaxlib", "")
    if jax.split(".")[:2] != jaxlib.split(".")[:2]:
        fix = _install(facts, f"jax=={jax}", f"jaxlib=={jax}")
        return Problem(f"jaxlib {jaxlib} does not belong to jax {jax}", fix)


def old_driver(facts: Facts) -> Problem | None:
    oldest = OLDEST_DRIVER[facts.cuda_build or "12"]
    if facts.driver and facts.driver_major < oldest:
        return Problem(
            f"NVIDIA driver {facts.driver} is too old: jax for CUDA {facts.cuda_build or '12'} needs {oldest} or newer",
            "sudo apt install nvidia-driver-580 && sudo reboot",
        )


def no_driver(facts: Facts) -> Problem | None:
    if facts.nvidia_card and not facts.driver:
        return Problem(
            "an NVIDIA card is fitted but no driver is loaded", "sudo apt install nvidia-driver-580 && sudo reboot"
        )


def platforms_set(facts: Facts) -> Problem | None:
    value = facts.environment.get("JAX_PLATFORMS")
    if value:
        return Problem(f"JAX_PLATFORMS={value} lets jax use nothing else", "unset JAX_PLATFORMS")


def gpus_hidden(facts: Facts) -> Problem | None:
    if facts.driver and facts.environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        value = facts.environment["CUDA_VISIBLE_DEVICES"]
        return Problem(f"CUDA_VISIBLE_DEVICES={value or '(empty)'} hides every GPU", "unset CUDA_VISIBLE_DEVICES")


def memory_held(facts: Facts) -> Problem | None:
    for gpu in facts.gpus:
        if gpu.used > 0.2 * gpu.total:
            holder = max(facts.holders, key=lambda holder: holder.used, default=None)
            name = f"process {holder.pid} ({holder.name})" if holder else "a process that is not visible here"
            share = "export XLA_PYTHON_CLIENT_PREALLOCATE=false"
            return Problem(
                f"{name} holds {_size(gpu.used)} of {_size(gpu.total)} on {gpu.name}; jax takes 75% as it starts",
                f"kill {holder.pid} (or, to share, {share})" if holder else share,
            )


def tpu_without_library(facts: Facts) -> Problem | None:
    if facts.tpu_chip and "libtpu" not in facts.packages:
        return Problem("a TPU is attached but libtpu is not installed", _install(facts, f"jax[tpu]=={_jax(facts)}"))


def gpu_does_not_start(facts: Facts) -> Problem | None:
    known = (cpu_only_jax, plugin_version, old_driver, platforms_set, gpus_hidden, plugin_aborts)
    explained = any(check(facts) for check in known)
    if facts.driver and facts.platform != "gpu" and not explained:
        another = "LD_LIBRARY_PATH" in facts.environment
        reason = "LD_LIBRARY_PATH may put another CUDA first" if another else facts.error or "jax does not say why"
        return Problem(
            f"jax has its CUDA build and the driver is fit, yet jax does not use the GPU: {reason}",
            "unset LD_LIBRARY_PATH"
            if another
            else f"JAX_PLATFORMS=cuda {facts.executable} -c 'import jax; jax.devices()'",
        )


def no_accelerator(facts: Facts) -> Problem | None:
    if not (facts.driver or facts.nvidia_card or facts.tpu_chip or facts.platform in ("gpu", "tpu")):
        return Problem(
            "no NVIDIA GPU and no TPU on this machine" + (": jax uses the CPU" if facts.platform == "cpu" else ""),
            "nothing to mend if there is none; for a container to see the host's: docker run --gpus all",
        )


def plugin_aborts(facts: Facts) -> Problem | None:
    if facts.death:
        plugins = [f"{name}=={facts.packages[name]}" for name in PLUGINS if name in facts.packages]
        return Problem(
            f"{facts.death} ends the process in which jax starts with {', '.join(plugins)}",
            _install(facts, "--force-reinstall", "--no-deps", *plugins)
            if facts.driver or facts.tpu_chip
            else "export JAX_PLATFORMS=cpu",
        )


def cannot_start(facts: Facts) -> Problem | None:
    if facts.platform is None and not (facts.driver or facts.death or platforms_set(facts)):
        return Problem(f"jax cannot start: {facts.error}", _install(facts, "--force-reinstall", f"jax=={_jax(facts)}"))


def little_disk(facts: Facts) -> Problem | None:
    if facts.free_disk < 5 * GIB:
        fix = f"rm -r {facts.home}/xla (compiled programs: it fills again)"
        return Problem(f"only {_size(facts.free_disk)} of disk are free", fix)


CHECKS: tuple[Callable[[Facts], Problem | None], ...] = (
    jaxlib_version,
    cpu_only_jax,
    plugin_version,
    no_driver,
    old_driver,
    platforms_set,
    gpus_hidden,
    memory_held,
    tpu_without_library,
    plugin_aborts,
    gpu_does_not_start,
    no_accelerator,
    cannot_start,
    little_disk,
)


def problems(facts: Facts) -> list[Problem]:
    """What the checks find, in their order."""
    return [problem for check in CHECKS if (problem := check(facts))]


def _install_cuda(facts: Facts) -> str:
    return _install(facts, f"jax[cuda{facts.cuda_build or '12'}]=={_jax(facts)}")


def _install(facts: Facts, *what: str) -> str:
    return f"{facts.executable} -m pip install {' '.join(map(shlex.quote, what))}"


def _jax(facts: Facts) -> str:
    return facts.packages["jax"]


def gather() -> Facts:
    """Look at this machine. The driver is asked before jax starts, so that jax's own memory is not counted."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    targets.skip_search()
    driver, packages = devices.nvidia_driver(), _versions()
    asked = dict(
        cuda=cuda_version(devices.nvidia_smi() or ""),
        gpus=host_gpus(_query("gpu", "name,memory.used,memory.total")),
        holders=holders(_query("compute-apps", "pid,process_name,used_memory")),
    )
    return Facts(
        python=sys.version.split()[0],
        executable=sys.executable,
        packages=packages,
        driver=driver,
        **(asked if driver else {}),
        **_backend(bool(packages.keys() & set(PLUGINS))),
        nvidia_card=any(kind.startswith("0x03") for _, kind in _pci("0x10de")),
        tpu_chip=any(chip in TPU_CHIPS for chip, _ in _pci("0x1ae0")),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        home=str(home()),
        caches=_caches(),
        free_disk=shutil.disk_usage(_existing(home())).free,
    )


def cuda_version(text: str) -> str | None:
    """The newest CUDA that the driver runs, from the head of what `nvidia-smi` prints."""
    found = re.search(r"CUDA[\w ]* Version\s*:\s*([\d.]+)", text)
    return found and found[1]


def host_gpus(table: str) -> tuple[HostGpu, ...]:
    """GPUs from lines `name, MiB used, MiB in all`."""
    rows = re.findall(r"^(.*), (\d+), (\d+)$", table, re.MULTILINE)
    return tuple(HostGpu(name, _mebibytes(used), _mebibytes(total)) for name, used, total in rows)


def holders(table: str) -> tuple[Holder, ...]:
    """Processes other than this one from lines `pid, name, MiB used`."""
    rows = re.findall(r"^(\d+), (.*), (.*)$", table, re.MULTILINE)
    return tuple(Holder(int(pid), name, _mebibytes(used)) for pid, name, used in rows if int(pid) != os.getpid())


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.strip().isdigit() else 0


def _query(what: str, columns: str) -> str:
    return devices.nvidia_smi(f"--query-{what}={columns}", "--format=csv,noheader,nounits") or ""


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES + PLUGINS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _backend(has_plugins: bool) -> dict:
    """What jax starts here. A plugin may end the process, so that another one tries it first."""
    if has_plugins and (death := _death(("-c", "import jax; jax.devices()"))):
        return dict(platform=None, error=f"{death} ended the process", death=death)
    try:
        import jax

        here = jax.local_devices()
        sizes = ((device.memory_stats() or {}).get("bytes_limit") for device in here)
        found = tuple(Device(device.device_kind, size) for device, size in zip(here, sizes))
        return dict(platform=jax.default_backend(), summary=devices.describe(), devices=found)
    except Exception as error:
        return dict(platform=None, error=" ".join(str(error).split())[:200] or "no device found")


def _death(arguments: Sequence[str]) -> str:
    """The signal that ends a Python process of these arguments; empty if it ends by itself."""
    try:
        status = subprocess.run([sys.executable, *arguments], capture_output=True, timeout=PATIENCE).returncode
    except subprocess.TimeoutExpired:
        return f"a limit of {PATIENCE} s"
    return signal.Signals(-status).name if status < 0 else ""


def _pci(vendor: str) -> list[tuple[str, str]]:
    def read(path: Path) -> str:
        return path.read_text().strip() if path.exists() else ""

    slots = Path("/sys/bus/pci/devices").glob("*")
    return [(read(slot / "device"), read(slot / "class")) for slot in slots if read(slot / "vendor") == vendor]


def _caches() -> dict[str, int]:
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub")
    folders = [*sorted(path for path in home().glob("*") if path.is_dir()), hub.expanduser()]
    return {str(folder): _bytes_in(folder) for folder in folders if folder.is_dir()}


def _bytes_in(folder: Path) -> int:
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def report(facts: Facts) -> str:
    """The facts, one to a line, then the problems."""
    packages = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    memory = sum(device.memory or 0 for device in facts.devices)
    lines = [
        f"python    {facts.python} at {facts.executable}",
        f"packages  {packages}",
        f"jax uses  {facts.summary or facts.error}" + (f" with {_size(memory)}" if memory else ""),
        f"driver    {f'NVIDIA {facts.driver}, CUDA up to {facts.cuda}' if facts.driver else 'no NVIDIA driver'}",
        *(f"gpu       {gpu.name}: {_size(gpu.used)} of {_size(gpu.total)} in use" for gpu in facts.gpus),
        *(f"set       {name}={value}" for name, value in facts.environment.items()),
        *(f"cache     {path}: {_size(size)}" for path, size in facts.caches.items()),
        f"disk      {_size(facts.free_disk)} free at {facts.home}",
    ]
    lines += [f"problem   {problem.what} -> {problem.fix}" for problem in problems(facts)]
    return "\n".join(lines)


def main(require: str | None = None, as_json: bool = False) -> int:
    """Print the report (or all facts and problems as JSON); 1 if `require` ("gpu" or "tpu") is not what jax uses."""
    facts = gather()
    if as_json:
        print(json.dumps(asdict(facts) | {"problems": [asdict(problem) for problem in problems(facts)]}, indent=2))
    else:
        print(report(facts))
    missing = require is not None and facts.platform != require
    if missing:
        print(f"diffjax: no {require} in use: jax runs on {facts.platform or 'nothing'}", file=sys.stderr)
    return int(missing)
