"""Convolutions of images by oneDNN, called from compiled programs on an x86 processor; diffjax takes it where it is
installed.
"""

import ctypes
import os
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

TARGET = "diffjax_convolution"


def _register() -> None:
    """Load oneDNN, then the handler, whose symbols it resolves. OpenMP's threads sleep between calls."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    files = metadata.files("onednn-cpu-gomp") or ()
    library = next(file for file in files if file.name == "libdnnl.so.3")
    ctypes.CDLL(str(Path(str(library.locate())).resolve()), mode=ctypes.RTLD_GLOBAL)
    handler = ctypes.CDLL(str(next(Path(__file__).parent.glob("_convolution*.so"))))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler.DiffjaxConvolution), platform="cpu")


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """The convolution of `x` (b, h, w, i) with `kernel` (kh, kw, i, o), both float32 or both bfloat16, zeros around."""
    sizes = zip(x.shape[1:3], kernel.shape[:2], padding)
    h, w = ((size + low + high - k) // stride + 1 for size, k, (low, high) in sizes)
    result = jax.ShapeDtypeStruct((len(x), h, w, kernel.shape[-1]), x.dtype)
    call = jax.ffi.ffi_call(TARGET, result, vmap_method="sequential")
    above, left = (np.int64(low) for low, _ in padding)
    return call(x, kernel, stride=np.int64(stride), above=above, left=left)


_register()
