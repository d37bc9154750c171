"""Files of weights that are not read: what each is, and what to do instead."""

from collections.abc import Iterable
from pathlib import Path

PICKLE = "a pickle of PyTorch"
TAKE = "take the model's safetensors, or its folder in the layout of diffusers"
BEGINNINGS = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "run `git lfs pull` in its folder"),
    b"<!DOCTYPE": ("a web page", "download the file again, logged in"),
    b"<html": ("a web page", "download the file again, logged in"),
    b"GGUF": ("GGUF, as llama.cpp and ComfyUI quantise", TAKE),
    b"\x89HDF": ("HDF5, as Keras writes", TAKE),
    b"PK\3\4": (PICKLE, f"write its state_dict as safetensors, or {TAKE}"),
    b"\x80\x02": (PICKLE, f"write its state_dict as safetensors, or {TAKE}"),
}
ENDINGS = {
    ".gguf": "GGUF, as llama.cpp and ComfyUI quantise",
    ".ckpt": PICKLE,
    ".pt": PICKLE,
    ".pth": PICKLE,
    ".pkl": "a pickle",
    ".bin": "not under a name that the libraries use",
    ".safetensors": "a single file (a model by itself: --model FILE)",
    ".onnx": "an ONNX graph",
    ".msgpack": "of Flax",
    ".h5": "of Keras",
    ".ot": "of Rust",
    ".pb": "of TensorFlow",
    ".tflite": "of TensorFlow Lite",
    ".engine": "compiled by TensorRT",
    ".mlmodel": "of Core ML",
    ".npz": "a NumPy archive",
}


def recognised(path: Path, but: str = "") -> str | None:
    """What a file is by its first bytes, and what to do; None where that is not known, or is the kind `but`."""
    try:
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError:
        return None
    known = [what for magic, what in BEGINNINGS.items() if begin.startswith(magic) and what[0] != but]
    return f"is {known[0][0]}: {known[0][1]}" if known else None


def no_model(names: Iterable[str]) -> str:
    """What to say of a folder of such files that is no model at all."""
    kinds = {name: ENDINGS[Path(name).suffix] for name in sorted(names) if Path(name).suffix in ENDINGS}
    holds = "holds no model: give a run's folder, one in the layout of diffusers, or a hub id"
    return "; ".join([holds, *(f"{name} is {kind}" for name, kind in list(kinds.items())[:3])])


def instead(names: Iterable[str]) -> str:
    """What to say of a folder of such files, which holds no weights by the libraries' names."""
    kinds = {name: ENDINGS[Path(name).suffix] for name in sorted(names) if Path(name).suffix in ENDINGS}
    lacks = "holds no weights that diffjax reads (diffusion_pytorch_model or model, .safetensors or .bin)"
    if not kinds:
        return f"{lacks}: download the model again"
    listed = ", ".join(f"{name} is {kind}" for name, kind in list(kinds.items())[:3])
    return f"{lacks}; {listed}: {TAKE}"
