"""Compiles the one source file against the headers of XLA and of oneDNN, which are packages too."""

from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup


def headers(package, name):
    """The folder of the header `name`, which an installed package brings."""
    found = next(file for file in metadata.files(package) if str(file).endswith(f"include/{name}"))
    return str(Path(found.locate()).resolve().parents[name.count("/")])


setup(
    ext_modules=[
        Extension(
            "diffjax_onednn._convolution",
            ["diffjax_onednn/convolution.cc"],
            include_dirs=[
                headers("jaxlib", "xla/ffi/api/ffi.h"),
                headers("onednn-devel-cpu-gomp", "oneapi/dnnl/dnnl.hpp"),
            ],
            extra_compile_args=["-std=c++17", "-O2", "-w"],
        )
    ]
)
