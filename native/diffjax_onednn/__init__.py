"""Convolutions of images and their gradients to kernels by oneDNN, called from compiled programs on an x86 processor;
diffjax takes them where this is installed.
"""

import ctypes
import os
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

TARGETS = {"diffjax_convolution": "DiffjaxConvolution", "diffjax_kernel_gradient": "DiffjaxKernelGradient"}


def _register() -> None:
    """Load oneDNN, then the handler, whose symbols it resolves. OpenMP's threads sleep between calls."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    files = metadata.files("onednn-cpu-gomp") or ()
    library = next(file for file in files if file.name == "libdnnl.so.3")
    ctypes.CDLL(str(Path(str(library.locate())).resolve()), mode=ctypes.RTLD_GLOBAL)
    handler = ctypes.CDLL(str(next(Path(__file__).parent.glob("_convolution*.so"))))
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(handler, symbol)), platform="cpu")


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """The convolution of `x` (b, h, w, i) with `kernel` (kh, kw, i, o), both float32 or both bfloat16, zeros around."""
    sizes = zip(x.shape[1:3], kernel.shape[:2], padding)
    h, w = ((size + low + high - k) // stride + 1 for size, k, (low, high) in sizes)
    return _call("diffjax_convolution", (x, kernel), (len(x), h, w, kernel.shape[-1]), stride, padding)


def kernel_gradient(
    x: jax.Array,
    dy: jax.Array,
    shape: tuple[int, ...],
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """The gradient to a kernel (kh, kw, i, o) of this shape from that to the result, `dy`; sums are float32."""
    return _call("diffjax_kernel_gradient", (x, dy), shape, stride, padding)


def _call(target: str, given: tuple[jax.Array, jax.Array], shape: tuple[int, ...], stride: int, padding) -> jax.Array:
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, given[0].dtype), vmap_method="sequential")
    above, left = (np.int64(low) for low, _ in padding)
    return call(*given, stride=np.int64(stride), above=above, left=left)


_register()
