"""What an extra of the package needs, and whether it is there."""

import functools
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
"""The packages that bring jax's compiler for a platform, one of which is needed."""


@functools.cache
def has_compiler(platform: str) -> bool:
    """Whether jax's compiler for a platform, "tpu" or "cuda", is installed."""
    return any(find_spec(name) for name in COMPILERS[platform])


def to_install(extra: str) -> str:
    """The command that installs what an extra of the package needs: in a checkout its script, else pip with the
    packages.
    """
    root = Path(__file__).parents[2]
    if (root / "scripts" / "setup.sh").is_file() and Path(sys.prefix) == root / ".venv":
        return f"bash {shlex.quote(str(root / 'scripts' / 'setup.sh'))} {extra}"
    try:
        marked = [line.partition(";") for line in metadata.requires("diffjax") or ()]
    except metadata.PackageNotFoundError:
        return f"pip install 'diffjax[{extra}]'"
    needed = [name.strip() for name, _, marker in marked if f"extra == '{extra}'" in marker.replace('"', "'")]
    return shlex.join([sys.executable, "-m", "pip", "install", *needed])
