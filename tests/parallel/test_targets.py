"""Devices that are not here: what is known of them, and that programs compile for them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.parallel import devices, targets
from diffjax.utils.errors import UserError

KINDS = sorted(targets.TARGETS)


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_compiler_a_line_says_what_to_install(kind, monkeypatch):
    monkeypatch.setattr(targets, "has_compiler", lambda platform: False)
    with pytest.raises(UserError, match=f"the compiler for {kind} is not installed: .*install.*jax|setup.sh"):
        devices.absent(kind)


def test_what_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(targets, "has_compiler", lambda platform: True)
    with pytest.raises(UserError, match="unknown device to compile for v5: did you mean v5p"):
        devices.absent("v5")
    with pytest.raises(UserError, match="v5e is compiled for on 1 to 16 devices, not 17"):
        devices.absent("v5e", 17)


def test_a_gpu_gives_a_program_what_jax_takes_of_its_memory(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert targets.of("h100").memory == 60e9 and targets.of("v5e").memory == 15.75 * 2**30
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert targets.of("h100").memory == 72e9


@pytest.mark.parametrize("driver, said", [(True, None), (False, "1")])
def test_plugins_do_not_search_for_what_is_not_here(driver, said, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path if driver else tmp_path / "nothing"))
    monkeypatch.setattr(targets, "MODULE", tmp_path / "nothing")
    for name in ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", *targets.NO_TPU):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    targets.skip_search()
    assert os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") == said
    assert ("TPU_WORKER_HOSTNAMES" in os.environ) == ("TPU_SKIP_MDS_QUERY" in os.environ)


@pytest.mark.accelerators
@pytest.mark.parametrize("kind, count", [(kind, 4) for kind in KINDS] + [("v5e", 1), ("v5p", 1), ("h100", 16)])
def test_a_program_compiles_for_devices_that_are_not_here(kind, count, compiler):
    compiler(kind)
    mesh = Mesh(np.asarray(devices.absent(kind, count)), ("data",))
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(lambda x: x @ x.T).lower(x).compile()
    assert program.memory_analysis().argument_size_in_bytes == 64 * 256 * 2 // count
    assert ("all-gather" in program.as_text()) == (count > 1)


@pytest.mark.accelerators
def test_jax_starts_quietly_beside_plugins_without_devices():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "TPU"))}
    code = (
        "from diffjax.parallel import devices; devices.find(); devices.absent('h100'); import jax; print(jax.devices())"
    )
    found = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert found.stderr == "" or "is not installed" in found.stderr
