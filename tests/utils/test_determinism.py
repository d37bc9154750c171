import os
import subprocess
import sys

import jax
import pytest

from diffjax.utils import determinism, provenance


@pytest.fixture(autouse=True)
def started():
    """jax has read its flags before a test changes them."""
    jax.devices()


@pytest.mark.parametrize(
    ("flags", "bitwise"),
    [
        ("", False),
        ("--xla_gpu_exclude_nondeterministic_ops=true", False),
        ("--xla_gpu_exclude_nondeterministic_ops --xla_gpu_autotune_level=0", True),
        ("--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=4", False),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops=false", False),
    ],
)
def test_gpus_are_bitwise_by_flags_and_others_always(monkeypatch, flags, bitwise):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert determinism.is_bitwise("gpu") == bitwise
    assert determinism.is_bitwise("cpu") and determinism.is_bitwise("tpu")


def test_what_is_asked_for_is_added_to_the_flags_that_are_there(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2 --xla_dump_to=/x")
    determinism.ask_xla()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_autotune_level=2 --xla_dump_to=/x"
    monkeypatch.setenv("DIFFJAX_DETERMINISTIC", "1")
    determinism.ask_xla()
    assert determinism.flags() == {
        "xla_gpu_autotune_level": "2",
        "xla_dump_to": "/x",
        "xla_gpu_exclude_nondeterministic_ops": "true",
    }
    monkeypatch.setenv("XLA_FLAGS", "")
    determinism.ask_xla()
    assert determinism.is_bitwise("gpu")


def test_xla_knows_the_flags():
    """Of one that it does not know, XLA ends the process."""
    code = "from diffjax.parallel import devices; devices.start(); import jax; print(jax.numpy.ones(2).sum())"
    asked = os.environ | {"DIFFJAX_DETERMINISTIC": "1", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True)
    assert done.stdout.strip() == "2.0", done.stderr


def test_records_say_what_their_bits_depend_on(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    said = provenance.description("CPU")["determinism"]
    assert said == {
        "bitwise": True,
        "xla_flags": {"xla_cpu_use_fusion_emitters": "false"},
        "matmul_precision": None,
    }
