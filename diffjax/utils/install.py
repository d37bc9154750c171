"""What an extra of the package needs."""

import shlex
import sys
from importlib import metadata
from pathlib import Path


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
