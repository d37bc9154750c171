"""The configurations of well-known models, which come with the package: enough to describe and to plan, without
a network.

`README.md` says where they are from.
"""

import difflib
from importlib import resources
from pathlib import Path

FOLDERS = {
    **{
        f"google/ddpm-{ema}{data}-256": "ddpm_256"
        for data in ("bedroom", "cat", "celebahq", "church")
        for ema in ("", "ema-")
    },
    **{f"google/ddpm-{ema}cifar10-32": "ddpm_cifar10_32" for ema in ("", "ema-")},
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "stabilityai/stable-diffusion-3.5-large-turbo": "sd35_large",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "google/t5-v1_1-base": "t5_base",
    "sentence-transformers/all-MiniLM-L6-v2": "minilm_l6",
}
"""Hub ids, and the folders here; models of one architecture share one."""


def folder(name: str) -> Path | None:
    """The folder of a hub id's configurations, laid out as on the hub; None where they do not come with the package."""
    return Path(str(resources.files(__name__) / FOLDERS[name])) if name in FOLDERS else None


def suggestion(name: str) -> str:
    """What to add to an error about a hub id: the known one that is meant, if it is a slip of the pen, else nothing."""
    near = [] if name in FOLDERS else difflib.get_close_matches(name, FOLDERS, n=1, cutoff=0.8)
    return f"; did you mean {near[0]}?" if near else ""
