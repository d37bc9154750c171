"""Whether this machine multiplies bfloat16 itself, which decides what a network with `dtype` "auto" computes in.

Processors without it emulate bfloat16: the demo then trains four times as long as in float32.
"""

import functools
import platform
import re
import subprocess
from pathlib import Path

AUTO = "auto"

NATIVE = {"avx512_bf16", "amx_bf16", "bf16"}
"""How Linux calls it: the first two on x86, the third on ARM."""


def dtype() -> str:
    """The name of the dtype that "auto" means here: float32 on a CPU that has no bfloat16 of its own, else bfloat16."""
    return "float32" if _on_cpu() and not has_bfloat16() else "bfloat16"


def has_bfloat16() -> bool:
    """Whether all of this machine's processors multiply bfloat16 themselves."""
    return bool(NATIVE & flags())


def reason() -> str:
    """Why `dtype` is what it is, in words."""
    if not _on_cpu():
        return "this is no CPU"
    found = sorted(NATIVE & flags())
    return f"this CPU has {' and '.join(found)}" if found else f"this CPU has none of {', '.join(sorted(NATIVE))}"


def flags() -> frozenset[str]:
    """What all of this machine's processors can do, in the words of Linux; empty where it cannot be asked."""
    if platform.system() == "Darwin":
        return frozenset({"bf16"}) if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else frozenset()
    try:
        return flags_of(Path("/proc/cpuinfo").read_text())
    except OSError:
        return frozenset()


def flags_of(cpuinfo: str) -> frozenset[str]:
    """The flags (x86) or features (ARM) that every processor in the text of `/proc/cpuinfo` has."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset.intersection(*(frozenset(line.split()) for line in lines)) if lines else frozenset()


@functools.cache
def _sysctl(name: str) -> str:
    try:
        return subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"
